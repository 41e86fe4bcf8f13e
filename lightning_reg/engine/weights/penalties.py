"""Gradients of penalties, which depend on parameters only: computed once per optimizer step, on dense weights."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.owner import Owner

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

__all__ = ["add_penalties_", "penalty_values"]


@torch.no_grad()
def penalty_values(techniques: Sequence[Owner], module: "LightningModule") -> dict[Owner, Tensor]:
    """Values of the penalties for the log, at the present weights."""
    values = ((technique, technique.penalty(module)) for technique in techniques)
    return {technique: value for technique, value in values if value is not None}


def add_penalties_(
    techniques: Sequence[Owner], module: "LightningModule", trainer: "Trainer", optimizer: "Optimizer"
) -> None:
    """Adds the gradients of the penalties to those that the optimizer is about to use.

    Gradients are accumulated, averaged over the ranks and unscaled by then, and not yet clipped. An optimizer none of
    whose parameters has a gradient (a skipped step) is left alone.

    Args:
        techniques: Those active in the present step.
        module: The user's module, with dense weights in.
        trainer: The Trainer.
        optimizer: Whose parameters get a gradient.

    Raises:
        MisconfigurationException: If the optimizer goes by values of the loss, which the penalty is no part of.

    """
    params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if all(p.grad is None for p in params):
        return
    if any(group.get("line_search_fn") for group in optimizer.param_groups):
        raise MisconfigurationException(
            f"{type(techniques[0]).__name__} adds the gradient of a penalty, but the line search of"
            f" {type(optimizer).__name__} compares values of the loss, in which the penalty is not. Write"
            " `line_search_fn=None`."
        )
    with torch.enable_grad():
        penalties = [p for technique in techniques if (p := technique.penalty(module)) is not None and p.requires_grad]
    if not penalties:
        return
    scale = host.gradient_scale(trainer, optimizer)
    gradients = torch.autograd.grad(
        penalties, params, [torch.ones_like(p) if scale is None else scale.to(p) for p in penalties], allow_unused=True
    )
    _add_(params, gradients)


@torch.no_grad()
def _add_(params: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    dense: list[tuple[Tensor, Tensor]] = []
    for param, gradient in zip(params, gradients, strict=True):
        if gradient is None:
            continue
        if param.grad is None or param.grad.is_sparse:
            param.grad = gradient if param.grad is None else gradient + param.grad
        else:
            dense.append((param.grad, gradient))
    if dense:
        torch._foreach_add_([old for old, _ in dense], [new for _, new in dense])
