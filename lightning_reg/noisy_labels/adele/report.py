"""A report of the pixels that were replaced in masks."""

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor
from typing_extensions import Self

__all__ = ["MaskErrors"]


@dataclass(frozen=True)
class MaskErrors:
    """Replaced pixels by image and pair of classes, most pixels first.

    Args:
        index: Position in the training dataset, ``(K,)``.
        given: Class as given, ``(K,)``.
        replaced_by: Class in its place, ``(K,)``.
        pixels: How many, ``(K,)``.
        share: Of the pixels of the image that count, ``(K,)``.

    """

    index: Tensor
    given: Tensor
    replaced_by: Tensor
    pixels: Tensor
    share: Tensor

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

    def __len__(self) -> int:
        return len(self.index)

    def rows(self) -> Iterator[tuple[int, int, int, int, float]]:
        """Index, given class, class in its place, pixels, share."""
        columns = (self.index, self.given, self.replaced_by, self.pixels, self.share)
        return zip(*(column.tolist() for column in columns), strict=True)

    def to_csv(self, path: str | Path) -> None:
        """Writes ``index,given,replaced_by,pixels,share`` with a header line."""
        with Path(path).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("index", "given", "replaced_by", "pixels", "share"))
            writer.writerows((*row[:4], f"{row[4]:.4f}") for row in self.rows())

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

    def __rich__(self) -> Table:
        title = f"{int(self.pixels.sum())} replaced pixels in {len(set(self.index.tolist()))} masks"
        table = Table("index", "given", "replaced by", "pixels", "share", title=title)
        for position, (index, given, replaced_by, pixels, share) in enumerate(self.rows()):
            if position == 20:
                table.add_row("…", "", "", "", "")
                break
            table.add_row(str(index), str(given), str(replaced_by), str(pixels), f"{share:.1%}")
        return table
