"""What techniques say afterwards of the labels of training samples."""

import torch
from torch import Tensor

from lightning_reg.noisy_labels.label_errors import LabelErrors, MaskErrors

__all__ = ["MaskErrors", "ReportsLabelErrors", "contradicted", "errors_by_confidence"]


def contradicted(targets: Tensor, labels: Tensor) -> Tensor:
    """Which labels their targets contradict: bool ``(N,)``; a sample never seen is not suspected."""
    return (targets.sum(1) > 0) & (labels >= 0) & (targets.argmax(1) != labels)


def errors_by_confidence(targets: Tensor, labels: Tensor) -> LabelErrors:
    """The labels that their targets contradict, most confident first."""
    (index,) = contradicted(targets, labels).nonzero(as_tuple=True)
    confidence, suggested = (targets[index] / targets[index].sum(1, keepdim=True)).max(1)
    order = confidence.argsort(descending=True, stable=True)
    return LabelErrors(index[order], labels[index][order], suggested[order], confidence[order])


class ReportsLabelErrors:
    """What a technique says afterwards that has a target for each training sample: which labels are wrong."""

    def _targets_and_labels(self, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Targets ``(N, C)``, a row of zeros for a sample never seen, and the given labels ``(N,)``, on the CPU."""
        raise NotImplementedError

    def suspected_label_errors(self, labels: Tensor | None = None) -> Tensor:
        """Which training samples have a label that their target contradicts: ``argmax(t) != y``.

        Args:
            labels: Given labels ``(N,)``; ``None`` for those seen in training.

        Returns:
            bool ``(N,)`` on the CPU, by position in the training dataset. A sample never seen is not suspected.

        Raises:
            RuntimeError: If nothing was trained yet.

        """
        return contradicted(*self._targets_and_labels(labels))

    def label_errors(self, labels: Tensor | None = None) -> LabelErrors:
        """The suspected label errors with the suggested labels, most confident first.

        Args:
            labels: Given labels ``(N,)``; ``None`` for those seen in training.

        Returns:
            A report to print through rich or to write as CSV.

        """
        return errors_by_confidence(*self._targets_and_labels(labels))

    def pred_probs(self) -> Tensor:
        """What the technique believes of each training sample, for tools that judge labels by probabilities (cleanlab).

        Returns:
            Rows that sum to 1, ``(N, C)`` float32 on the CPU, by position in the training dataset; uniform for a sample
            never seen.

        Raises:
            RuntimeError: If nothing was trained yet.

        """
        targets = self._targets_and_labels(None)[0].float()
        sums = targets.sum(1, keepdim=True)
        return torch.where(sums > 0, targets / sums, 1 / targets.shape[1])
