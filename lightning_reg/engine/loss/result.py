"""What ``training_step`` returned: the loss in it, and with another loss."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.loss.call import LossCall

__all__ = ["loss_of", "swapped", "with_loss"]


def loss_of(output: Any) -> Tensor | None:
    """The loss in it, if there is one."""
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return loss if isinstance(loss, Tensor) else None


def with_loss(output: Any, loss: Tensor) -> Any:
    """The same with another loss."""
    if not isinstance(output, Mapping):
        return loss
    return {**output, "loss": loss}  # the user may keep the mapping


def swapped(total: Tensor | None, old: Tensor, new: Tensor, call: LossCall) -> Tensor:
    """The total loss with one of its parts exchanged, for a total that is linear in that part."""
    if total is None:
        raise MisconfigurationException("`training_step` returned no loss.")
    (factor,) = torch.autograd.grad(total, old, retain_graph=True, allow_unused=True)
    if factor is None:
        raise MisconfigurationException(
            f'loss="last": the last loss call, {call}, does not contribute to the loss that `training_step` returns.'
        )
    return total + (factor * (new - old)).sum()
