"""Reports of labels that a technique believes to be wrong, of samples and of pixels in masks."""

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from rich.table import Table
from torch import Tensor
from typing_extensions import Self, override

__all__ = ["LabelErrors", "MaskErrors"]

Row = TypeVar("Row", bound=tuple[Any, ...])


@dataclass(frozen=True)
class _Report(Generic[Row]):
    """Columns of one length, of which the last is a share."""

    index: Tensor
    given: Tensor
    _share: ClassVar[str] = ".2f"

    def __len__(self) -> int:
        return len(self.index)

    def rows(self) -> Iterator[Row]:
        """A tuple for each, in the order of the arguments."""
        columns: Any = (getattr(self, field.name).tolist() for field in fields(self))
        rows: Any = zip(*columns, strict=True)
        return iter(rows)

    def to_csv(self, path: str | Path) -> None:
        """Writes them below a header line, which has the names of the arguments."""
        with Path(path).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([field.name for field in fields(self)])
            writer.writerows((*row[:-1], f"{row[-1]:.4f}") for row in self.rows())

    def __rich__(self) -> Table:
        names = [field.name.replace("_", " ") for field in fields(self)]
        table = Table(*names, title=self._title())
        for position, row in enumerate(self.rows()):
            if position == 20:
                table.add_row("…", *[""] * (len(names) - 1))
                break
            table.add_row(*map(str, row[:-1]), format(row[-1], self._share))
        return table

    def _title(self) -> str:
        raise NotImplementedError


@dataclass(frozen=True)
class LabelErrors(_Report[tuple[int, int, int, float]]):
    """Suspected label errors, most confident first.

    Args:
        index: Position in the training dataset, ``(K,)``.
        given: Label as given, ``(K,)``.
        suggested: Class the network believes in, ``(K,)``.
        confidence: Share of that class in the sample's target, in (0, 1], ``(K,)``.

    """

    suggested: Tensor
    confidence: Tensor

    def by_class(self, classes: int) -> Tensor:
        """How often one class is given where another one is suggested.

        Args:
            classes: C.

        Returns:
            Counts ``(C, C)``: rows are the given, columns the suggested classes.

        """
        return (self.given * classes + self.suggested).bincount(minlength=classes**2).view(classes, classes)

    @override
    def _title(self) -> str:
        return f"{len(self)} suspected label errors"


@dataclass(frozen=True)
class MaskErrors(_Report[tuple[int, int, int, int, float]]):
    """Replaced pixels by image and pair of classes, most pixels first.

    Args:
        index: Position in the training dataset, ``(K,)``.
        given: Class as given, ``(K,)``.
        replaced_by: Class in its place, ``(K,)``.
        pixels: How many, ``(K,)``.
        share: Of the pixels of the image that count, ``(K,)``.

    """

    replaced_by: Tensor
    pixels: Tensor
    share: Tensor
    _share: ClassVar[str] = ".1%"

    @classmethod
    def between(cls, masks: Iterable[tuple[int, Tensor, Tensor]], num_classes: int, ignore_index: int = 255) -> Self:
        """The report of the difference between two masks of each image.

        Args:
            masks: Position, mask as given and mask in its place, ``(H, W)`` each.
            num_classes: C.
            ignore_index: Of pixels that do not count.

        Returns:
            The report.

        """
        rows = [torch.empty(0, 5, dtype=torch.float64)]
        for index, before, after in masks:
            counted = before != ignore_index
            changed = counted & (before != after)
            pairs = before[changed].long() * num_classes + after[changed].long()
            pair, pixels = torch.unique(pairs.cpu(), return_counts=True)
            share = pixels / max(int(counted.sum()), 1)
            where = torch.full_like(pair, index)
            rows.append(torch.stack([where, pair // num_classes, pair % num_classes, pixels, share.double()], 1))
        found = torch.cat(rows)
        found = found[found[:, 3].argsort(descending=True, stable=True)]
        index_, given, replaced_by, pixels_ = found[:, :4].long().unbind(1)
        return cls(index_, given, replaced_by, pixels_, found[:, 4].float())

    def by_class(self, num_classes: int) -> Tensor:
        """How many pixels of one class were replaced by another one.

        Args:
            num_classes: C.

        Returns:
            Counts ``(C, C)``: rows are the given classes, columns those in their place.

        """
        places = self.given * num_classes + self.replaced_by
        zeros = torch.zeros(num_classes**2, dtype=torch.int64)
        return zeros.index_add_(0, places, self.pixels).view(num_classes, num_classes)

    @override
    def _title(self) -> str:
        return f"{int(self.pixels.sum())} replaced pixels in {len(set(self.index.tolist()))} masks"
