"""What contrastive losses share: unit rows, the rows of all ranks, and what attraction and repulsion come to."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lightning_reg.engine.host.distributed import all_gather_rows, all_reduce_sum, world_size

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "RankRows",
    "contrastive_losses",
    "info_nce",
    "rows_in_turn",
    "rows_of_ranks",
    "rows_with_labels",
    "supervised_contrastive",
    "unit_rows",
]


def contrastive_losses(
    similarities: Tensor,
    positive: Tensor,
    negative: Tensor,
    push: Tensor | None = None,
    more: Tensor | None = None,
    anchors: Tensor | None = None,
) -> Tensor:
    r"""How badly each row's positives stand out among all its pairs.

    .. math:: \ell_i = \frac1{|P_i|} \sum_{p \in P_i} -\log \frac{e^{s_{ip}}}{\sum_{p' \in P_i} e^{s_{ip'}} +
        \sum_{j \in Q_i} e^{b_{ij}} e^{s_{ij}} + e^{c_i}}

    With one positive it is InfoNCE; with all rows of the class the supervised contrastive loss, the sum outside the
    logarithm.

    Args:
        similarities: ``s``, cosines over the temperature ``(n, m)``.
        positive: ``P``, bool ``(n, m)``.
        negative: ``Q``, bool ``(n, m)``, none of them a positive.
        push: ``b``, ``(n, m)``, which counts for negatives; ``None`` for 0.
        more: ``c``, ``(n,)``; ``None``: no such summand.
        anchors: Which rows have a loss, bool ``(n,)``, all with a positive; ``None``: those that have one.

    Returns:
        ``(n,)``; 0 without gradient where a row is no anchor.

    """
    positives = positive.sum(1)
    anchors = positives > 0 if anchors is None else anchors
    logits = similarities if push is None else similarities + torch.where(negative, push, 0.0)
    logits = logits.masked_fill(~(positive | negative), -torch.inf)
    if more is not None:
        logits = torch.cat([logits, more[:, None]], dim=1)
    # Other rows may have no finite entry, where the gradient of logsumexp is 0 only by a special case of torch.
    logits = torch.where(anchors[:, None], logits, 0.0)
    attraction = torch.where(positive, similarities, 0.0).sum(1) / positives.clamp(min=1)
    return torch.where(anchors, logits.logsumexp(1) - attraction, 0.0)


def info_nce(
    queries: Tensor,
    keys: Tensor,
    temperature: float,
    group: "ProcessGroup | None" = None,
    capacity: int | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """Each query is to find its own key among the keys of all ranks.

    Args:
        queries: Unit rows ``(n, D)``.
        keys: Those that belong to them, ``(n, D)``.
        temperature: Divides the cosines, above 0.
        group: Ranks whose rows take part too. The mean over the ranks is the loss of all rows, and so is the mean of
            the gradients.
        capacity: Most rows that a rank can have, see ``all_gather_rows``.
        labels: Whole numbers ``(n,)``, on all ranks or none: other keys with a query's number are left out.

    Returns:
        The mean over the queries.

    """
    if labels is None:
        all_keys, same = rows_of_ranks(keys, group, capacity), None
    else:
        all_keys, key_labels = rows_with_labels(keys, labels, group, capacity)
        same = labels[:, None] == key_labels
    others = all_keys.others(len(queries))
    own = ~others if all_keys.there is None else ~others & all_keys.there
    wrong = others if same is None else others & ~same
    losses = contrastive_losses(queries @ all_keys.rows.T / temperature, own, wrong)
    return losses.sum() * all_keys.ranks / all_keys.total


def supervised_contrastive(
    rows: Tensor,
    labels: Tensor,
    temperature: float,
    group: "ProcessGroup | None" = None,
    capacity: int | None = None,
) -> Tensor:
    """Each row is to find those of its class among the rows of all ranks.

    Args:
        rows: Unit rows ``(n, D)``.
        labels: Class numbers ``(n,)``.
        temperature: Divides the cosines, above 0.
        group: Ranks whose rows take part too, as in :func:`info_nce`.
        capacity: Most rows that a rank can have, see ``all_gather_rows``.

    Returns:
        The mean over the rows of all ranks that are not alone in their class; 0 if there is none.

    """
    keys, key_labels = rows_with_labels(rows, labels, group, capacity)
    others, same = keys.others(len(rows)), labels[:, None] == key_labels
    losses = contrastive_losses(rows @ keys.rows.T / temperature, same & others, ~same & others)
    count = all_reduce_sum((same & others).any(1).sum(), group) if group is not None else (same & others).any(1).sum()
    return losses.sum() * keys.ranks / count.clamp(min=1)


class RankRows(NamedTuple):
    """Rows of all ranks, as one of them sees them.

    Attributes:
        rows: ``(m, D)``, with gradient.
        there: Which of them are no padding, bool ``(m,)``; ``None``: all.
        first: Position of this rank's first row.
        ranks: Number of ranks. What a rank's own rows add to a sum over all rows has to be multiplied by it: gradients
            are averaged over the ranks.

    """

    rows: Tensor
    there: Tensor | None
    first: int
    ranks: int

    @property
    def total(self) -> Tensor | int:
        """Number of rows that are there, at least 1."""
        return max(len(self.rows), 1) if self.there is None else self.there.sum()

    def others(self, own: int) -> Tensor:
        """Which rows are there and another one than each of this rank's ``own`` rows, bool ``(own, m)``."""
        position = torch.arange(len(self.rows), device=self.rows.device)
        others = position[self.first : self.first + own, None] != position
        return others if self.there is None else others & self.there


def rows_of_ranks(rows: Tensor, group: "ProcessGroup | None", capacity: int | None = None) -> RankRows:
    """Rows of all ranks of a group, of this one alone without a group.

    Args:
        rows: ``(n, D)``, another n on each rank.
        group: The ranks.
        capacity: Most rows that a rank can have, see ``all_gather_rows``.

    Returns:
        The rows.

    """
    if group is None:
        return RankRows(rows, None, 0, 1)
    return RankRows(*all_gather_rows(rows, group, capacity), world_size(group))


def rows_with_labels(
    rows: Tensor, labels: Tensor, group: "ProcessGroup | None", capacity: int | None = None
) -> tuple[RankRows, Tensor]:
    """Rows of all ranks and their labels, in one collective.

    Args:
        rows: ``(n, D)``, float32 or float64.
        labels: Whole numbers ``(n,)`` of any size.
        group: The ranks; ``None``: this one alone.
        capacity: Most rows that a rank can have, see ``all_gather_rows``.

    Returns:
        The rows, and the labels ``(m,)``.

    """
    if group is None:
        return rows_of_ranks(rows, None), labels
    # The 64 bits of a label travel as words of the rows: as a number float32 would round it.
    bits = labels.long()[:, None].contiguous().view(rows.dtype)
    found = rows_of_ranks(torch.cat([rows, bits], dim=1), group, capacity)
    own, gathered = torch.split(found.rows, [rows.shape[1], bits.shape[1]], dim=1)
    return found._replace(rows=own), gathered.detach().contiguous().view(torch.int64)[:, 0]


def rows_in_turn(
    rows: Tensor, labels: Tensor, group: "ProcessGroup | None", capacity: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of all ranks, in turn from each rank, as torch's sampler has dealt them: the order of the joined batch.

    Where each rank computes the same loss of all these rows, the mean of their gradients is that of the joined batch.

    Args:
        rows: ``(n, D)``, float32 or float64.
        labels: Whole numbers ``(n,)``.
        group: The ranks; ``None``: this one alone.
        capacity: Most rows that a rank can have, see ``all_gather_rows``.

    Returns:
        The rows ``(m, D)`` with gradient, their labels ``(m,)``, and where this rank's own are ``(n,)``.

    """
    own = torch.arange(len(rows), device=rows.device)
    if group is None:
        return rows, labels, own
    found, labels = rows_with_labels(rows, labels, group, capacity)
    positions = torch.arange(len(found.rows), device=rows.device)
    there = torch.ones_like(positions, dtype=torch.bool) if found.there is None else found.there
    turns = positions.view(found.ranks, -1).T.flatten()
    turns = turns[there[turns]]
    place = torch.zeros_like(positions).index_copy(0, turns, positions[: len(turns)])
    return found.rows[turns], labels[turns], place[found.first + own]


def unit_rows(features: Tensor) -> Tensor:
    """Rows divided by their norms.

    Args:
        features: ``(n, ...)``, flattened per row.

    Returns:
        ``(n, D)``, float32 at least; a row of zeros stays one, without gradient.

    """
    flat = features.flatten(1).to(torch.promote_types(features.dtype, torch.float32))
    norms = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    # A row of zeros has no direction: it stays 0 and gets no gradient, where dividing by a floor would give 1e12 of it.
    there = norms > 1e-12
    return torch.where(there, flat, 0.0) / torch.where(there, norms, 1.0)
