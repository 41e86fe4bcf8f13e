"""A report of labels that a technique believes to be wrong."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from torch import Tensor

__all__ = ["LabelErrors"]


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
