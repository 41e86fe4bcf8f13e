"""How much is known after one task after the other, and how much was forgotten."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_reg.continual.rehearsal_free_cl.core import forgetting

__all__ = ["ContinualMetrics"]


class ContinualMetrics(Metric):
    """Accuracy over all classes so far, and forgetting, of a classifier that learned one task after the other.

    After each task call :meth:`update` with the test samples of all tasks so far; ``state_dict`` has what was counted.
    ``compute`` gives, for the last task that was tested: ``accuracy`` (no task is told: the largest logit of all
    classes so far), ``forgetting`` of that accuracy, and ``local_forgetting`` of the accuracy with the task told (the
    largest logit of its classes); see :func:`forgetting`, with the number of classes as size. A number that needs a
    test of an earlier task that was not made is NaN.

    Source:
        Smith et al., "A Closer Look at Rehearsal-Free Continual Learning", CVPR Workshops 2023, arXiv 2203.17269.

    Differs:
        Nothing.

    Args:
        new_classes: Number of classes that each task adds, at least 1 each; labels count through.

    Raises:
        ValueError: If a number is below 1.

    Example:
        >>> metrics = ContinualMetrics([1, 1])
        >>> metrics.update(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), after_task=1)
        >>> metrics.update(torch.eye(2)[[0, 0]], torch.tensor([0, 1]), after_task=2)
        >>> metrics.compute()["accuracy"]
        tensor(0.5000)

    """

    full_state_update = False

    def __init__(self, new_classes: Sequence[int]) -> None:
        super().__init__()
        if not new_classes or min(new_classes) < 1:
            raise ValueError(
                f"ContinualMetrics: `new_classes` must be whole numbers of at least 1, got {new_classes!r}."
            )
        self.new_classes = list(new_classes)
        self._ends = list(accumulate(self.new_classes))
        tasks = len(self.new_classes)
        for name in ("right", "right_in_task", "tested"):
            self.add_state(name, torch.zeros(tasks, tasks), dist_reduce_fx="sum", persistent=True)
        self.right: Tensor
        self.right_in_task: Tensor
        self.tested: Tensor

    @override
    def update(self, logits: Tensor, labels: Tensor, after_task: int) -> None:
        """Takes a batch of test samples.

        Args:
            logits: ``(B, C)``, with at least the classes so far.
            labels: ``(B,)`` int64.
            after_task: Number of tasks learned so far, from 1; ``datamodule.current_task + 1`` where these count from
                0.

        Raises:
            ValueError: If there is no such task.

        """
        if not 1 <= after_task <= len(self._ends):
            raise ValueError(f"ContinualMetrics: `after_task` must be in [1, {len(self._ends)}], got {after_task!r}.")
        ends = torch.tensor(self._ends, device=labels.device)
        task = torch.searchsorted(ends, labels, right=True)
        starts = ends - torch.tensor(self.new_classes, device=labels.device)
        seen = logits[:, : self._ends[after_task - 1]]
        column = torch.arange(logits.shape[1], device=labels.device)
        outside = (column < starts[task, None]) | (column >= ends[task, None])
        for state, hit in (
            (self.right, seen.argmax(1) == labels),
            (self.right_in_task, logits.masked_fill(outside, -torch.inf).argmax(1) == labels),
            (self.tested, torch.ones_like(labels)),
        ):
            state[after_task - 1].index_add_(0, task, hit.to(state.dtype))

    @override
    def compute(self) -> dict[str, Tensor]:
        """The three numbers."""
        tasks = int(self.tested.sum(1).nonzero().max()) + 1 if self.tested.any() else 1
        right, in_task, tested = (s[:tasks, :tasks] for s in (self.right, self.right_in_task, self.tested))
        sizes = self.new_classes[:tasks]
        return {
            "accuracy": right[-1].sum() / torch.where(tested[-1].all(), tested[-1].sum(), torch.nan),
            "forgetting": forgetting(right / tested, sizes),
            "local_forgetting": forgetting(in_task / tested, sizes),
        }
