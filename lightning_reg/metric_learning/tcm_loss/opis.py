"""OPIS: how far the classes are apart in what one threshold does to them."""

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_reg.engine.host.arguments import check_number
from lightning_reg.engine.loss.contrastive import unit_rows
from lightning_reg.metric_learning.tcm_loss.core import opis

__all__ = ["OPIS"]


class OPIS(Metric):
    r"""Operating-point inconsistency: the spread over the classes of what one threshold on the distance does to them.

    For each class and each threshold in the range where the system would be run, the harmonic mean of sensitivity
    (pairs of the class that are accepted) and specificity (pairs with one end in it that are rejected); of these
    curves the mean square about their mean over the classes. 0: all classes behave alike. Lower is better, and it is
    also low where every class is equally bad: ``recall_at_1`` stands beside it.

    .. math:: \frac1{TK} \sum_{i,k} \bigl(U_i(d_k) - \bar U(d_k)\bigr)^2, \qquad
        U_i = \frac{(1 + c^2)\,\phi_i \psi_i}{c^2 \phi_i + \psi_i}

    Compare over several seeds: it varies by a quarter of itself between them. Thresholds belong to one set of
    embeddings, so ``low`` and ``high`` are reported.

    ``compute`` gives ``opis``, ``recall_at_1`` (rows whose most similar other row is of their class, among classes that
    count; a tie is none), ``low`` and ``high`` (the distances of the range), ``classes`` and ``excluded`` (how many
    count and how many do not). Where there is no class that counts, or fewer than 1 / ``far_low`` pairs of two classes,
    the range is not known and ``opis`` is NaN.

    Source:
        Zhang et al., "Threshold-Consistent Margin Loss for Open-World Deep Metric Learning", ICLR 2024,
        arXiv 2307.04047.

    Differs:
        The number of thresholds, both ends included, and the rates that bound the range are those of an independent
        study; the range is exact, of all pairs. Epsilon-OPIS, the contrast with the worst classes, is left out: its
        formula was not read.

    Memory: the embeddings in float32, on every rank, and blocks of a million pairs; never the table of all pairs. For
    50,000 rows of 128 numbers in 500 classes ``compute`` takes 47 s of one core of a CPU and 66 MiB
    (``benchmarks/opis.py``).

    Args:
        far_low: Share of the pairs of two classes that the tightest threshold accepts, in (0, far_high).
        far_high: Share that the loosest accepts, at most 1.
        num_thresholds: Thresholds in the range, at equal steps of the distance of unit vectors, at least 2.
        sensitivity_weight: Weight of the sensitivity in the mean (c), above 0; 1: harmonic mean.
        min_per_class: Rows that a class must have to count, at least 2; all rows are in the pairs of the others.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> metric = OPIS(far_low=0.1, far_high=0.5)
        >>> angles = torch.tensor([0.0, 0.1, 1.0, 1.5, 3.0, 3.2])
        >>> metric.update(torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([0, 0, 1, 1, 2, 2]))
        >>> metric.compute()["opis"]
        tensor(0.0152)

    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False

    def __init__(
        self,
        far_low: float = 0.01,
        far_high: float = 0.1,
        num_thresholds: int = 101,
        sensitivity_weight: float = 1.0,
        min_per_class: int = 2,
    ) -> None:
        super().__init__()
        check_number(self, "far_high", far_high, low=0, low_open=True, high=1)
        check_number(self, "far_low", far_low, low=0, low_open=True, high=far_high, high_open=True)
        check_number(self, "num_thresholds", num_thresholds, low=2, integer=True)
        check_number(self, "sensitivity_weight", sensitivity_weight, low=0, low_open=True)
        check_number(self, "min_per_class", min_per_class, low=2, integer=True)
        self.far_low, self.far_high, self.num_thresholds = far_low, far_high, num_thresholds
        self.sensitivity_weight, self.min_per_class = sensitivity_weight, min_per_class
        self.add_state("embeddings", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")
        self.embeddings: list[Tensor] | Tensor
        self.labels: list[Tensor] | Tensor

    @override
    def update(self, embeddings: Tensor, labels: Tensor) -> None:
        """Takes a batch.

        Args:
            embeddings: ``(B, ...)``, flattened and normalised.
            labels: Class numbers ``(B,)``.

        Raises:
            ValueError: If there is not one class number for each row.

        """
        if labels.dim() != 1 or len(labels) != len(embeddings) or labels.is_floating_point():
            raise ValueError(
                f"OPIS: `labels` must be class numbers (B,), one for each of {len(embeddings)} embeddings, got"
                f" {labels.dtype} {tuple(labels.shape)}."
            )
        for state, rows in ((self.embeddings, unit_rows(embeddings.detach()).float()), (self.labels, labels.long())):
            if isinstance(state, list):
                state.append(rows)

    @override
    def compute(self) -> dict[str, Tensor]:
        """The six numbers."""
        embeddings, labels = (
            state if isinstance(state, Tensor) else torch.cat(state or [empty])
            for state, empty in (
                (self.embeddings, torch.zeros(0, 1, device=self.device)),
                (self.labels, torch.zeros(0, dtype=torch.int64, device=self.device)),
            )
        )
        options = (self.far_low, self.far_high, self.num_thresholds, self.sensitivity_weight, self.min_per_class)
        found = opis(embeddings, labels, *options)
        low, high = found.thresholds[[0, -1]].float()
        counts = {"classes": len(found.classes), "excluded": found.excluded}
        numbers = {"opis": found.opis.float(), "recall_at_1": found.recall_at_1, "low": low, "high": high}
        return numbers | {name: torch.tensor(float(count), device=self.device) for name, count in counts.items()}
