"""What ``training_step`` returned: the loss in it, what a loss call counts in it, and with another loss."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_reg.engine.host.autograd import bends, derivative, is_fixed
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.loss.call import LossCall

__all__ = ["check_contributes", "check_part", "loss_of", "swapped", "with_loss"]


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
    factor = derivative(total, old)
    if factor is None:
        raise MisconfigurationException(
            f'loss="last": the last loss call, {call}, does not contribute to the loss that `training_step` returns.'
        )
    return total + (factor * (new - old)).sum()


def check_part(
    total: Tensor, value: Tensor, call: LossCall, names: str, counting: str = "", *, in_place: bool = False
) -> None:
    """Refuses a loss that techniques cannot join by way of a call, because the user's code changes its value further.

    Args:
        total: The loss that ``training_step`` returned.
        value: What its code got from the call, with what techniques have made of it.
        call: The call.
        names: The techniques that work on it, for the errors.
        counting: Those of them that must know what each sample counts in the loss, "" if there are none.
        in_place: Whether the value was changed in place since.

    Raises:
        MisconfigurationException: If the loss is not linear in the call; if it counts the losses of
            ``reduction="none"`` unequally, by factors that depend on the network or, where ``counting``, by any.

    """
    slope = derivative(total, value)
    if slope is None:
        return
    unequal = call.reduction == "none" and _unequal(slope, call)
    if bends(slope, value) or (unequal and not is_fixed(slope)):
        raise MisconfigurationException(
            f"{names}: the code after {call} changes its value further, and the loss that `training_step` returns is"
            " not linear in it (a focal loss, a root, a factor that depends on the network): losses, weights and"
            " targets of samples would be those of another loss than the one that is trained. Hand over the losses of"
            " the samples, already changed: `LossMixin.reduce_loss(per_sample_loss, ...)`."
        )
    if counting and (unequal or (in_place and call.reduction == "none")):
        raise MisconfigurationException(
            f"{counting}: the code after {call} counts its losses unequally (a mask, weights, a mean per sample), and"
            " what each sample counts is not seen. Let the function count them (`ignore_index=...`, `weight=...`,"
            ' `reduction="mean"`), or hand over the losses of the samples: `LossMixin.reduce_loss(...)`.'
        )


def check_contributes(total: Tensor, value: Tensor, call: str) -> None:
    """Refuses a call that the returned loss does not depend on.

    Args:
        total: The loss that ``training_step`` returned.
        value: What its code got from the call.
        call: The call and the techniques that work on it, for the error.

    Raises:
        MisconfigurationException: If it does not.

    """
    if total.requires_grad and value.requires_grad and derivative(total, value) is None:
        raise MisconfigurationException(
            f"{call} does not contribute to the loss that `training_step` returns. Choose the call that does with"
            " `loss=...`; a loss written by hand is handed over with `LossMixin.reduce_loss`, and one that is only"
            " logged belongs under `torch.no_grad()`."
        )


def _unequal(slope: Tensor, call: LossCall) -> bool:
    """Whether elements that count have different factors; a host sync."""
    mass = call.mass
    counted = slope.detach().flatten() if mass is None else slope.detach().flatten()[mass.flatten() > 0]
    if not len(counted):
        return False
    low, high = counted.aminmax()
    return bool(high - low > 1e-5 * counted.abs().max())  # rounding of a user's own mean
