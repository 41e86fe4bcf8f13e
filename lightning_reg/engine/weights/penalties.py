"""Gradients of penalties, which depend on parameters only: computed once per optimizer step, on dense weights."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.weights.shards import is_split

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

__all__ = ["add_penalties_"]


def add_penalties_(
    penalties: "Sequence[Callable[[LightningModule], Tensor | None]]",
    module: "LightningModule",
    trainer: "Trainer",
    optimizer: "Optimizer",
    owner: str,
) -> None:
    """Adds the gradients of penalties to those that the optimizer is about to use.

    Gradients are accumulated, averaged over the ranks and unscaled by then, and not yet clipped. An optimizer none of
    whose parameters has a gradient (a skipped step) is left alone.

    Args:
        penalties: Each gives a scalar for the module, or ``None``.
        module: The user's module, with dense weights in.
        trainer: The Trainer.
        optimizer: Whose parameters get a gradient.
        owner: Class to name in errors.

    Raises:
        MisconfigurationException: If the optimizer goes by values of the loss, which the penalty is no part of.

    """
    params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if all(p.grad is None for p in params):
        return
    if any(group.get("line_search_fn") for group in optimizer.param_groups):
        raise MisconfigurationException(
            f"{owner} adds the gradient of a penalty, but the line search of {type(optimizer).__name__} compares values"
            " of the loss, in which the penalty is not. Write `line_search_fn=None`."
        )
    with torch.enable_grad():
        given = [value for penalty in penalties if (value := penalty(module)) is not None and value.requires_grad]
        values = [value.full_tensor() if is_split(value) else value for value in given]
    if not values:
        return
    scale = host.gradient_scale(trainer, optimizer)
    gradients = torch.autograd.grad(
        values, params, [torch.ones_like(v) if scale is None else scale.to(v) for v in values], allow_unused=True
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
