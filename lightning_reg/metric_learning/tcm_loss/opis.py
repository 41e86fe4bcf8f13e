"""OPIS: how far the classes are apart in what one threshold does to them."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_reg.engine.host.arguments import check_number
from lightning_reg.metric_learning._unit_rows import unit_rows
from lightning_reg.metric_learning.tcm_loss._pairs import Rows, accepted, first_pass, negatives_at

__all__ = ["OPIS", "Consistency", "opis"]


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

    Memory: the embeddings in float32, on every rank, and blocks of four million pairs; never the table of all pairs.

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


class Consistency(NamedTuple):
    """What :func:`opis` has found.

    Attributes:
        opis: The inconsistency, ``()`` float64.
        recall_at_1: Share of rows whose most similar other row is of their class, ``()``.
        thresholds: Distances ``(K,)``, float64.
        utilities: Utility of each class at each threshold, ``(T, K)``, float64.
        classes: Class numbers of the T classes that count.
        excluded: Number of classes that do not.

    """

    opis: Tensor
    recall_at_1: Tensor
    thresholds: Tensor
    utilities: Tensor
    classes: Tensor
    excluded: int


@torch.no_grad()
def opis(
    embeddings: Tensor,
    labels: Tensor,
    far_low: float = 0.01,
    far_high: float = 0.1,
    num_thresholds: int = 101,
    sensitivity_weight: float = 1.0,
    min_per_class: int = 2,
) -> Consistency:
    """Operating-point inconsistency, with the curve of each class; see :class:`OPIS`.

    Args:
        embeddings: ``(n, ...)``, flattened and normalised.
        labels: Class numbers ``(n,)``.
        far_low: Share of the pairs of two classes that the tightest threshold accepts, in (0, far_high).
        far_high: Share that the loosest accepts, at most 1.
        num_thresholds: Thresholds in the range, both ends included.
        sensitivity_weight: Weight of the sensitivity in the mean (c).
        min_per_class: Rows that a class must have to count, at least 2.

    Returns:
        The numbers; NaN where there is no class that counts, or too few pairs for the range.

    Example:
        >>> angles = torch.tensor([0.0, 0.1, 3.0, 3.1])
        >>> found = opis(torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([0, 0, 1, 1]), far_low=0.25)
        >>> found.recall_at_1
        tensor(1.)

    """
    with torch.autocast(embeddings.device.type, enabled=False):
        order = labels.argsort(stable=True)
        runs = labels[order].unique_consecutive(return_inverse=True, return_counts=True)  # type: ignore[no-untyped-call]  # torch's
        classes, codes, sizes = runs
        rows = Rows(unit_rows(embeddings)[order].float(), codes, sizes)
        enough = sizes >= min_per_class
        hits, counts = first_pass(rows)
        recall = hits[enough[codes]].float().mean()
        low, high = (_distance(rows, counts, far) for far in (far_low, far_high))
        thresholds = (
            torch.linspace(0, 1, num_thresholds, dtype=torch.float64, device=rows.z.device) * (high - low) + low
        )
        utilities = _utilities(rows, thresholds, sensitivity_weight)[enough]
        value = (utilities - utilities.mean(0)).square().mean()
        return Consistency(value, recall, thresholds, utilities, classes[enough], int((~enough).sum()))


def _distance(rows: Rows, counts: Tensor, far: float) -> Tensor:
    """Quantile of the distances of negatives, linear between two of them."""
    total = int(counts.sum())
    if far * total < 1:
        return torch.tensor(math.nan, dtype=torch.float64, device=counts.device)
    place = far * (total - 1)
    first = min(math.floor(place), total - 2) if total > 1 else 0
    ranks = [total - 1 - first, max(total - 2 - first, 0)]  # the smallest distance has the largest cosine
    near, far_away = (2 - 2 * negatives_at(rows, ranks, counts)).clamp(min=0).sqrt()
    return torch.lerp(near, far_away, place - first)


def _utilities(rows: Rows, thresholds: Tensor, sensitivity_weight: float) -> Tensor:
    if thresholds.isnan().any():
        return thresholds.expand(len(rows.sizes), -1)
    inside, across = accepted(rows, 1 - thresholds.square() / 2)
    sensitivity = inside.double() / rows.positives[:, None]
    specificity = 1 - across.double() / rows.negatives[:, None]
    weight = sensitivity_weight**2
    total = weight * specificity + sensitivity
    utilities = (1 + weight) * specificity * sensitivity / total
    return torch.where(total > 0, utilities, 0.0)  # a class of one row has none: 0 / 0
