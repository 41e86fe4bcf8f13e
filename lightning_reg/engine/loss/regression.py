"""What a loss call says of a regression: a prediction, a target and a feature for each row."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine.data.numbers import numbers
from lightning_reg.engine.host.autograd import descends
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.loss.call_by_hand import HandedOver

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_reg.engine.loss.call import LossCall

__all__ = ["features_per_row", "regression_pairs"]

_REGRESSION = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.gaussian_nll_loss, F.poisson_nll_loss)


def regression_pairs(call: "LossCall") -> tuple[Tensor, Tensor]:
    """Predictions of all rows, those of further views included, and the targets of the batch's own.

    Args:
        call: A call of a regression loss, or one that was written by hand and says what it compares.

    Returns:
        Predictions ``(k * R, K)`` without gradient, and targets ``(R, K)``; k counts the batch and its views.

    Raises:
        MisconfigurationException: If the call is no regression, or predictions and targets do not fit.

    """
    by_hand = isinstance(call.evaluation, HandedOver)
    if not by_hand and call.function not in _REGRESSION:
        raise MisconfigurationException(
            f"{call} is no regression: a technique needs numbers that are compared with numbers (F.mse_loss, F.l1_loss,"
            " F.smooth_l1_loss, F.huber_loss, F.gaussian_nll_loss, F.poisson_nll_loss). If there is such a call too,"
            " choose it with `loss=...`."
        )
    output, target = call.whole_output, call.target
    if output is None or target is None:
        raise MisconfigurationException(
            "A technique needs predictions and targets, and `reduce_loss` got none: call"
            " `self.reduce_loss(per_sample_loss, logits=predictions, targets=targets)`."
        )
    output = output.detach()
    if not by_hand and call.function is F.poisson_nll_loss and call.arguments.get("log_input", True):
        output = output.float().exp()
    predictions, targets = numbers(output), numbers(target.detach())
    blocks = 1 if call.views is None else call.views.count
    if predictions.shape != (blocks * len(targets), targets.shape[1]):
        raise MisconfigurationException(
            f"{call}: predictions {tuple(output.shape)} and targets {tuple(target.shape)} are not numbers of the same"
            " rows."
        )
    return predictions, targets


def features_per_row(passes: "Sequence[Any]", rows: int, layer: str, output: Tensor) -> Tensor:
    """What a layer gave out for each row of the predictions: in one pass of the step, or in several together.

    Args:
        passes: Outputs of the layer in this step, in order.
        rows: Number of rows.
        layer: Name of the layer, for the error.
        output: What the loss compares; of several passes those count that it was made from.

    Returns:
        ``(rows, ...)``, with gradient.

    Raises:
        MisconfigurationException: If there are not as many, or several passes with as many.

    """
    tensors = [given for given in passes if isinstance(given, Tensor) and given.dim() > 0]
    used = tensors if len(tensors) < 2 else _used_for(output, tensors)
    fitting = [features for features in used if len(features) == rows]
    if len(fitting) == 1:
        return fitting[0]
    if used and sum(map(len, used)) == rows:
        return torch.cat(used)
    found = ", ".join(str(tuple(t.shape)) for t in tensors) or "no tensor"
    several = f", in {len(fitting)} passes that the predictions come from" if fitting else ""
    raise MisconfigurationException(
        f"Layer {layer!r} gave {found} before the loss{several}, where a feature for each of {rows} predictions is"
        " needed."
    )


def _used_for(output: Tensor, passes: list[Tensor]) -> list[Tensor]:
    used = [features for features in passes if descends(output, features.grad_fn)]
    # What is kept may be a view that only this module has: the rows of the first of several copies.
    return used or [f for f in passes if f._base is not None and descends(output, f._base.grad_fn)]
