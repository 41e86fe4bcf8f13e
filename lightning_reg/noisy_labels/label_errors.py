"""A report of labels that a technique believes to be wrong."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

__all__ = ["LabelErrors", "ReportsLabelErrors", "contradicted", "errors_by_confidence"]


@dataclass(frozen=True)
class LabelErrors:
    """Suspected label errors, most confident first.

    Args:
        index: Position in the training dataset, ``(K,)``.
        given: Label as given, ``(K,)``.
        suggested: Class the network believes in, ``(K,)``.
        confidence: Share of that class in the sample's target, in (0, 1], ``(K,)``.

    """

    index: Tensor
    given: Tensor
    suggested: Tensor
    confidence: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def rows(self) -> Iterator[tuple[int, int, int, float]]:
        """Index, given label, suggested label, confidence."""
        return zip(
            self.index.tolist(), self.given.tolist(), self.suggested.tolist(), self.confidence.tolist(), strict=True
        )

    def to_csv(self, path: str | Path) -> None:
        """Writes ``index,given,suggested,confidence`` with a header line."""
        with Path(path).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("index", "given", "suggested", "confidence"))
            writer.writerows((*row[:3], f"{row[3]:.4f}") for row in self.rows())

    def by_class(self, classes: int) -> Tensor:
        """How often one class is given where another one is suggested.

        Args:
            classes: C.

        Returns:
            Counts ``(C, C)``: rows are the given, columns the suggested classes.

        """
        return (self.given * classes + self.suggested).bincount(minlength=classes**2).view(classes, classes)

    def __rich__(self) -> Table:
        table = Table("index", "given", "suggested", "confidence", title=f"{len(self)} suspected label errors")
        for position, (index, given, suggested, confidence) in enumerate(self.rows()):
            if position == 20:
                table.add_row("…", "", "", "")
                break
            table.add_row(str(index), str(given), str(suggested), f"{confidence:.2f}")
        return table


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
