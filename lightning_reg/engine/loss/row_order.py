"""Whether the rows of a loss call lie sample after sample, so that they can be told apart into samples."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_reg.engine.data.batches import lies_across, lies_by_sample, repeats_by_sample
from lightning_reg.engine.loss.evaluation import Evaluation

if TYPE_CHECKING:
    from lightning_reg.engine.step import Step

__all__ = ["RowOrder"]


class RowOrder:
    """What is known of the order of the rows of a call at one place of the step, from one step to the next.

    How the user's code lays its rows out is looked at until it is certain, which is in the first step.

    Args:
        looks_at_batch: Whether the batch is looked at in the first step: whether it comes with time first.

    """

    def __init__(self, *, looks_at_batch: bool = False) -> None:
        self._looks_at_batch, self._is_by_sample = looks_at_batch, False

    def problem(self, evaluation: Evaluation, target: Tensor | None, step: "Step", size: int) -> str:
        """What speaks against rows that lie sample after sample.

        Args:
            evaluation: What the call computes, with a multiple of ``size`` rows.
            target: Its target as the user gave it.
            step: The step.
            size: Number of samples.

        Returns:
            A sentence without its end; "" if it is certain that they do, or if there is one for each sample.

        """
        if self._looks_at_batch:
            self._looks_at_batch = False
            if step.has_samples_second or (target is not None and lies_across(target, step.batch, size)):
                return "which lie with time first, as the batch has them"
        if evaluation.rows == size:
            return ""
        self._is_by_sample = self._is_by_sample or _is_by_sample(evaluation, target, step.batch, size)
        if self._is_by_sample:
            return ""
        return (
            "and that they lie sample after sample is not certain (rows of several loaders or views that were joined,"
            " and rows with time first, lie otherwise)"
        )


def _is_by_sample(evaluation: Evaluation, target: Tensor | None, batch: Any, size: int) -> bool:
    if evaluation.lies_by_sample(size):
        return True
    if target is None or target.shape[:1] != (evaluation.rows,):
        return False
    if lies_by_sample(target, batch, size):
        return True
    # Last, because values are read: what a compiled model has flattened, the graph does not tell.
    return repeats_by_sample(target, batch, size, evaluation.arguments.get("ignore_index"))
