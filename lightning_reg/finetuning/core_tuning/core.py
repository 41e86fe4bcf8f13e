"""Contrast-regularized fine-tuning, for any training loop: hard pairs, mixed rows, the two losses."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_reg.engine.loss.contrastive import unit_rows

__all__ = [
    "MixedRows",
    "focal_contrastive_loss",
    "foreign_rows",
    "hard_pairs",
    "mix_pairs",
    "positive_pairs",
    "two_label_losses",
]


def focal_contrastive_loss(
    rows: Tensor,
    positive: Tensor,
    temperature: float = 0.07,
    *,
    focal: bool = True,
    keys: Tensor | None = None,
    per_positive: bool = True,
) -> Tensor:
    r"""Each row is to find its positives among all others; those that it finds already count less.

    .. math:: -\frac1{n'} \sum_i \frac1{|P_i|} \sum_{j \in P_i} (1 - p_{ij}) \log p_{ij},\quad
        p_{ij} = \frac{e^{z_i \cdot z_j / \tau}}{\sum_{k \ne i} e^{z_i \cdot z_k / \tau}}

    over the n' rows that have a positive.

    Args:
        rows: z, unit rows ``(m, D)``.
        positive: P, bool ``(m, m)``; a row is none of its own.
        temperature: :math:`\tau`, above 0.
        focal: Whether positives are weighted by 1 - p, through which the gradient flows.
        keys: Which rows count at all, bool ``(m,)``; ``None``: all.
        per_positive: Divide by the number of positives, as in the formula; else by m, as the authors' code.

    Returns:
        A scalar, float32 at least; 0 if no row has a positive.

    Example:
        >>> rows = torch.eye(2).repeat(2, 1)
        >>> same = torch.eye(2, dtype=torch.bool).repeat(2, 2) & ~torch.eye(4, dtype=torch.bool)
        >>> bool(focal_contrastive_loss(rows, same) < 1e-4)
        True

    """
    with torch.autocast(rows.device.type, enabled=False):
        z = rows if rows.dtype == torch.float64 else rows.float()
        others = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
        if keys is not None:
            others, positive = others & keys, positive & keys & keys[:, None]
        log_p = (z @ z.T / temperature).masked_fill(~others, -torch.inf).log_softmax(1)
        log_p = torch.where(positive, log_p, 0.0)
        terms = log_p * (1 - log_p.exp()) if focal else log_p
        count = positive.sum(1)
        losses = -terms.sum(1) / (count.clamp(min=1) if per_positive else len(z))
        return losses.sum() / (count > 0).sum().clamp(min=1)


def two_label_losses(logits: Tensor, mixed: "MixedRows") -> Tensor:
    r"""Cross-entropy of rows that have two classes each, :math:`-\sum_c \tilde y_c \log p_c`.

    Args:
        logits: ``(m, C)``.
        mixed: Classes and shares of the rows.

    Returns:
        ``(m,)``, float32 at least. A row of an unknown class (below 0) counts as one of class 0.

    Example:
        >>> one = MixedRows(torch.zeros(1, 2), torch.tensor([2]), torch.tensor([0]), torch.tensor([0.25]))
        >>> two_label_losses(torch.zeros(1, 4), one).exp().round(decimals=3)
        tensor([4.])

    """
    log_p = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(1)
    first, second = (log_p.gather(1, labels.clamp(min=0)[:, None])[:, 0] for labels in (mixed.first, mixed.second))
    return -(mixed.share * first + (1 - mixed.share) * second)


class MixedRows(NamedTuple):
    """Features of 3 n rows: the n rows that were given, n semi-hard negatives, n hard positives.

    Attributes:
        features: ``(3 n, D)``.
        first: A class of each, ``(3 n,)``.
        second: Another one.
        share: How much of the first it is, ``(3 n,)``; the rest is of the second.

    """

    features: Tensor
    first: Tensor
    second: Tensor
    share: Tensor


@torch.no_grad()
def hard_pairs(features: Tensor, labels: Tensor, *, released: bool = False) -> tuple[Tensor, Tensor]:
    """The row of its class that is least like each row, and the row of another class that is most like it, by cosine.

    Args:
        features: ``(n, D)``.
        labels: ``(n,)``; a row of a class below 0 is nobody's pair.
        released: Mine as the authors' code does, where zeros stand for what is no pair: of features that are not
            negative a positive is then never found.

    Returns:
        Positions ``(n,)`` of the hard positives and of the hard negatives; a row's own where there is none.

    """
    unit = unit_rows(features)
    cosines, own = unit @ unit.T, torch.arange(len(unit), device=unit.device)
    same, known = labels[:, None] == labels, labels >= 0
    positive, negative = same & (own[:, None] != own) & known, ~same & known
    if released:
        farthest = (cosines * positive).argmin(1)
        return torch.where(farthest == 0, own, farthest), (cosines * negative).argmax(1)
    farthest = cosines.masked_fill(~positive, torch.inf).argmin(1)
    nearest = cosines.masked_fill(~negative, -torch.inf).argmax(1)
    return torch.where(positive.any(1), farthest, own), torch.where(negative.any(1), nearest, own)


@torch.no_grad()
def foreign_rows(labels: Tensor, draws: Tensor) -> Tensor:
    """A row of another class for each row.

    Args:
        labels: ``(n,)``; a row of a class below 0 is nobody's.
        draws: Uniform in [0, 1), ``(n,)``.

    Returns:
        Positions ``(n,)``; a row's own where there is no other class.

    """
    foreign = (labels[:, None] != labels) & (labels >= 0)
    count = foreign.sum(1)
    chosen = (draws * count).long().clamp(max=count - 1)
    position = (foreign.cumsum(1) > chosen[:, None]).int().argmax(1)
    return torch.where(count > 0, position, torch.arange(len(labels), device=labels.device))


def mix_pairs(
    features: Tensor,
    labels: Tensor,
    pairs: tuple[Tensor, Tensor],
    partners: Tensor,
    positive_share: Tensor,
    negative_share: Tensor,
    *,
    detach: bool = False,
) -> MixedRows:
    r"""The rows, and 2 n rows that are mixed of them.

    .. math:: h^-_i = (1 - \mu_i) h_i + \mu_i h_{r_i},\quad
        h^+_i = \lambda_i h_{\mathrm{hp}_i} + (1 - \lambda_i) h_{\mathrm{hn}_i}

    Args:
        features: h, ``(n, D)``.
        labels: ``(n,)``.
        pairs: Positions of hard positives and negatives, by :func:`hard_pairs`.
        partners: r, ``(n,)``.
        positive_share: :math:`\lambda`, ``(n,)``.
        negative_share: :math:`\mu`, ``(n,)``.
        detach: Whether the given rows themselves get no gradient, as in the authors' code.

    Returns:
        The rows in the order h, :math:`h^-`, :math:`h^+`.

    """
    hard, near = pairs
    a, b = positive_share[:, None], negative_share[:, None]
    rows = [
        features.detach() if detach else features,
        (1 - b) * features + b * features[partners],
        a * features[hard] + (1 - a) * features[near],
    ]
    first = torch.cat([labels, labels, labels[hard]])
    second = torch.cat([labels, labels[partners], labels[near]])
    share = torch.cat([torch.ones_like(positive_share), 1 - negative_share, positive_share])
    return MixedRows(torch.cat(rows), first, second, share)


@torch.no_grad()
def positive_pairs(mixed: MixedRows, *, released: bool = False) -> Tensor:
    """Which rows are to find each other.

    Args:
        mixed: The rows.
        released: Those with the very same mixed label, as in the authors' code: generated rows seldom have one. Else
            each row belongs to the class with the larger share in it (ties: the first), our reading of the paper.

    Returns:
        bool ``(m, m)``, false on the diagonal.

    """
    first, second, share = mixed[1:]
    others = ~torch.eye(len(first), dtype=torch.bool, device=first.device)
    if not released:
        group = torch.where(share >= 0.5, first, second)
        return (group[:, None] == group) & others
    whole, swap = first == second, first > second
    low, high = torch.where(swap, second, first), torch.where(swap, first, second)
    part = torch.where(whole, 1.0, torch.where(swap, 1 - share, share))
    alike = [values[:, None] == values for values in (low, high, part)]
    return alike[0] & alike[1] & alike[2] & others
