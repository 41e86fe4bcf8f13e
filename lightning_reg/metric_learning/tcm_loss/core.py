"""Threshold-consistent margins over the pairs that violate them, and the inconsistency of classes under a threshold."""

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lightning_reg.engine.host.distributed import all_reduce_sum
from lightning_reg.engine.loss.contrastive import rows_of_ranks, rows_with_labels, unit_rows
from lightning_reg.metric_learning.tcm_loss._pairs import Rows, accepted, first_pass, negatives_at

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Consistency", "opis", "tcm_loss"]


def tcm_loss(
    embeddings: Tensor,
    labels: Tensor,
    margin_plus: float = 0.9,
    margin_minus: float = 0.5,
    lambda_plus: float = 1.0,
    lambda_minus: float = 1.0,
    reference: Tensor | None = None,
    reference_labels: Tensor | None = None,
    group: "ProcessGroup | None" = None,
    capacity: int | None = None,
) -> Tensor:
    r"""The threshold-consistent margin, to be added to a metric loss.

    .. math:: \lambda_+ \frac{\sum_{s \in S_+} (m_+ - s)\,[s \le m_+]}{|\{s \in S_+: s \le m_+\}|} +
        \lambda_- \frac{\sum_{s \in S_-} (s - m_-)\,[s \ge m_-]}{|\{s \in S_-: s \ge m_-\}|}

    with the cosines of pairs of one class, :math:`S_+`, and of two, :math:`S_-`. Each fraction is a mean over the hard
    pairs alone, whose number has no gradient, and 0 if there is none. So the gradient does not fade as hard pairs
    become rare, and pairs that satisfy their margin change nothing.

    Args:
        embeddings: Rows ``(n, ...)``, flattened and normalised; the gradient flows through both ends of a pair.
        labels: Class numbers ``(n,)``, whole numbers of any size.
        margin_plus: What cosines of one class are to reach (m+), in (margin_minus, 1].
        margin_minus: What cosines of two classes are to stay below (m-).
        lambda_plus: Weight of the pairs of one class, at least 0.
        lambda_minus: Weight of the pairs of two classes, at least 0.
        reference: Rows ``(m, ...)``, a memory bank say: pairs are then those of a row with one of these, all of them.
            ``None``: the rows' pairs among themselves.
        reference_labels: Their class numbers ``(m,)``.
        group: Ranks whose rows take part too, each with its own; ``None``: these rows are all there are. With ranks,
            the mean over the ranks is the loss of all rows, and so is the mean of the gradients. Not with references.
        capacity: Most rows that a rank of the group can have, see ``all_gather_rows``.

    Returns:
        A scalar, float32 (float64 for such embeddings), with a gradient of 0 where there is no hard pair.

    Example:
        >>> embeddings = torch.tensor([[0.0, 1.0], [0.43, 0.9], [1.0, 0.0], [0.5, 0.5]])
        >>> tcm_loss(embeddings, torch.tensor([0, 0, 1, 1]))
        tensor(0.5179)

    """
    margins = (margin_plus, margin_minus, reference, reference_labels, group, capacity)
    terms = margin_terms(embeddings, labels, *margins)
    return lambda_plus * terms.positive + lambda_minus * terms.negative


class MarginTerms(NamedTuple):
    """The two means, without weights, and the numbers of hard pairs, each counted once from either end: scalars."""

    positive: Tensor
    negative: Tensor
    hard_positives: Tensor
    hard_negatives: Tensor


def margin_terms(
    embeddings: Tensor,
    labels: Tensor,
    margin_plus: float = 0.9,
    margin_minus: float = 0.5,
    reference: Tensor | None = None,
    reference_labels: Tensor | None = None,
    group: "ProcessGroup | None" = None,
    capacity: int | None = None,
) -> MarginTerms:
    """The parts of :func:`tcm_loss`; the arguments are the same. The numbers of hard pairs are those of all ranks."""
    with torch.autocast(embeddings.device.type, enabled=False):  # float16 hardly tells 0.9 from 1
        z = unit_rows(embeddings)
        others = None
        if reference is not None and reference_labels is not None:
            keys, key_labels = rows_of_ranks(unit_rows(reference), None), reference_labels
        else:
            keys, key_labels = rows_with_labels(z, labels, group, capacity)
            others = keys.others(len(z))
        cosines = z @ keys.rows.T
        same = labels[:, None] == key_labels
        positive, negative = (same, ~same) if others is None else (same & others, ~same & others)
        pulled, hard_positives = _hinge(margin_plus - cosines, positive)
        pushed, hard_negatives = _hinge(cosines - margin_minus, negative)
        counts = torch.stack([hard_positives, hard_negatives])
        if group is not None:
            # A mean of the ranks' means is no mean over all pairs: the denominators are those of all.
            counts = all_reduce_sum(counts, group)
        shares = keys.ranks * torch.stack([pulled, pushed]) / counts.clamp(min=1)
        return MarginTerms(*shares.unbind(), *counts.unbind())


def _hinge(gap: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    hard = pairs & (gap >= 0)
    return torch.where(hard, gap, 0.0).sum(), hard.sum()


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
    """Operating-point inconsistency, with the curve of each class; the formula is that of the metric ``OPIS``.

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
        low, high = _distances(rows, counts, far_low, far_high)
        thresholds = (
            torch.linspace(0, 1, num_thresholds, dtype=torch.float64, device=rows.z.device) * (high - low) + low
        )
        utilities = _utilities(rows, thresholds, sensitivity_weight)[enough]
        value = (utilities - utilities.mean(0)).square().mean()
        return Consistency(value, recall, thresholds, utilities, classes[enough], int((~enough).sum()))


def _distances(rows: Rows, counts: Tensor, *fars: float) -> Tensor:
    """Quantiles of the distances of negatives, linear between two of them."""
    total = int(counts.sum())
    if min(fars) * total < 1:
        return torch.full((len(fars),), math.nan, dtype=torch.float64, device=counts.device)
    places = [far * (total - 1) for far in fars]
    firsts = [min(math.floor(place), total - 2) if total > 1 else 0 for place in places]
    # The smallest distance has the largest cosine.
    ranks = [max(total - 1 - first - step, 0) for first in firsts for step in (0, 1)]
    near, far_away = (2 - 2 * negatives_at(rows, ranks, counts)).clamp(min=0).sqrt().reshape(-1, 2).T
    return torch.lerp(near, far_away, near.new_tensor(places) - near.new_tensor(firsts))


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
