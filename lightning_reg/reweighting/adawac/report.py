"""A report of the weights that AdaWAC has given to the samples: whose labels tell much, and whose little."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from torch import Tensor

__all__ = ["SampleWeights"]


@dataclass(frozen=True)
class SampleWeights:
    """Weight b of the supervised loss of each training sample.

    Args:
        weight: By position in the training dataset, ``(N,)``, in (0, 1); 1/2 for a sample that was never visited.
        visits: How often each was visited, ``(N,)``.

    """

    weight: Tensor
    visits: Tensor

    def __len__(self) -> int:
        return len(self.weight)

    def dense(self) -> Tensor:
        """Samples that are trained by their labels (b above 1/2), the largest weight first, ``(K,)``."""
        order = self.weight.argsort(descending=True, stable=True)
        return order[self.weight[order] > 0.5]

    def sparse(self) -> Tensor:
        """Samples that are trained by consistency (b below 1/2), the smallest weight first, ``(K,)``."""
        order = self.weight.argsort(stable=True)
        return order[self.weight[order] < 0.5]

    def rows(self) -> Iterator[tuple[int, float, int]]:
        """Index, weight, visits."""
        return zip(range(len(self)), self.weight.tolist(), self.visits.tolist(), strict=True)

    def to_csv(self, path: str | Path) -> None:
        """Writes ``index,weight,visits`` with a header line."""
        with Path(path).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("index", "weight", "visits"))
            writer.writerows((index, f"{weight:.6f}", visits) for index, weight, visits in self.rows())

    def __rich__(self) -> Table:
        dense, sparse = self.dense(), self.sparse()
        table = Table("index", "weight", "visits", title=f"{len(dense)} dense labels, {len(sparse)} sparse ones")
        shown = [*dense[:10].tolist(), None, *sparse[:10].flip(0).tolist()]
        for index in shown:
            if index is None:
                table.add_row("…", "", "")
            else:
                table.add_row(str(index), f"{float(self.weight[index]):.3f}", str(int(self.visits[index])))
        return table
