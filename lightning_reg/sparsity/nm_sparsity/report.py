"""What a network with N:M sparsity looks like, weight by weight."""

import csv
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.markup import escape
from rich.table import Table

__all__ = ["SparsityReport"]


@dataclass(frozen=True)
class SparsityRow:
    """One weight.

    Args:
        name: Name of the parameter.
        shape: ``out x in x kernel``, as the parameter has it.
        pattern: Target pattern ``N:M``, or "dense".
        why_dense: Why it stays dense; "" if it is sparse.
        kept_magnitude: Share of the sum of magnitudes that the N:M mask keeps; of a hardened weight that before.
        zeros: Share of the weights that are zero now.
        flops_dense: Multiplications and additions per output position, dense; 0 if it is not known how it is used.
        flops: The same for the weights that are not zero now.

    """

    name: str
    shape: str
    pattern: str
    why_dense: str
    kept_magnitude: float
    zeros: float
    flops_dense: int
    flops: int


@dataclass(frozen=True)
class SparsityReport:
    """All weights of linear, convolution and attention layers, and what stays dense: for rich, or to write as CSV.

    Other parameters of two dimensions or more are listed too, but for embeddings and norms.

    FLOPs are per output position (a token, a pixel of the output), 2 per weight: what hardware makes of zeros is
    another matter.

    Args:
        rows: One for each weight.

    """

    rows: list[SparsityRow] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def flops_share(self) -> float:
        """FLOPs of all layers listed, as a share of the dense ones; 1 if there are none."""
        return sum(row.flops for row in self.rows) / max(sum(row.flops_dense for row in self.rows), 1)

    def to_csv(self, path: str | Path) -> None:
        """Writes the rows with a header line."""
        with Path(path).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(SparsityRow.__dataclass_fields__))
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.rows)

    def __rich__(self) -> Table:
        title = f"N:M sparsity: {100 * self.flops_share:.1f} % of the dense FLOPs"
        table = Table(title=title, title_justify="left")
        for column in ("weight", "shape", "pattern", "kept magnitude", "zeros", "FLOPs per position"):
            table.add_column(column, overflow="fold")
        for row in self.rows:
            pattern = row.pattern + (f" ({row.why_dense})" if row.why_dense else "")
            shares = f"{100 * row.kept_magnitude:.1f} %", f"{100 * row.zeros:.1f} %"
            table.add_row(
                escape(row.name), row.shape, escape(pattern), *shares, f"{row.flops:,} of {row.flops_dense:,}"
            )
        return table
