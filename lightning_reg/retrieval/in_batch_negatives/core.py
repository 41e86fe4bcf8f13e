"""Which columns of a contrastive batch's scores are negatives: those of all ranks, but none that is relevant."""

import hashlib
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_reg.engine.host import distributed

__all__ = [
    "fitted_scale",
    "same_document_mask",
    "scores_of_other_ranks",
    "similar_document_mask",
    "text_hashes",
    "token_hashes",
]


def scores_of_other_ranks(
    rows: Tensor, columns: Tensor, group: "torch.distributed.ProcessGroup | None" = None, capacity: int | None = None
) -> Tensor:
    r"""Scores of a rank's rows and the columns of all other ranks, with gradient to both.

    With them behind a rank's own scores, the mean over the ranks of

    .. math:: -\frac1B \sum_i \log \frac{e^{s_{i y_i}}}{\sum_{j \in \text{own}} e^{s_{ij}} + \sum_{j \in \text{others}}
        e^{s_{ij}}}

    is the loss of the joined batch, and so is the mean of the gradients, which DDP makes: the backward pass brings home
    what every rank has found for a column, in one collective.

    Args:
        rows: ``(B, D)``.
        columns: Of this rank, ``(C, D)``, another C on each rank.
        group: The ranks, all without one.
        capacity: Most columns that a rank can have, the same on all; ``None`` costs a collective and a host sync.

    Returns:
        ``(B, (W - 1) * capacity)``, in the order of the ranks; -inf where a rank has fewer.

    """
    others, there = distributed.rows_of_other_ranks(columns, group, capacity)
    return (rows @ others.T).masked_fill(~there, -torch.inf)


def same_document_mask(ids: Tensor, labels: Tensor, column_ids: Tensor | None = None) -> Tensor:
    r"""Columns that are the same document as a row's own: :math:`\text{id}_j = \text{id}_{y_i},\ j \ne y_i`.

    Args:
        ids: Of the first columns, those that labels count, int64 ``(C,)``.
        labels: Column of each row's own document :math:`y`, ``(B,)``; a row with another number, to be ignored, has
            none.
        column_ids: Of all columns, ``(N,)``, the same first C; ``None``: there are no others.

    Returns:
        bool ``(B, N)``, ``False`` in the row's own column.

    Example:
        >>> same_document_mask(torch.tensor([7, 5, 7]), torch.tensor([0, 1]))
        tensor([[False, False,  True],
                [False, False, False]])

    """
    every = ids if column_ids is None else column_ids
    there = (labels >= 0) & (labels < len(ids))
    own = ids[torch.where(there, labels, 0)]
    return (every == own[:, None]) & _not_own(labels, len(every)) & there[:, None]


def similar_document_mask(
    similarities: Tensor, labels: Tensor, margin: float = 0.0, strategy: Literal["absolute", "relative"] = "absolute"
) -> Tensor:
    r"""Columns that a guide finds more similar to the row than the row's own document, less a margin.

    .. math:: s_{ij} > s_{i y_i} - m \quad\text{or}\quad s_{ij} > s_{i y_i} - m\,|s_{i y_i}|

    The relative threshold is below the positive's score for scores of either sign; ``s (1 - m)`` would be above a
    negative one.

    Args:
        similarities: The guide's, ``(B, N)``.
        labels: Column of each row's own document :math:`y`, ``(B,)``; a row with another number has none.
        margin: m. 0: what is more similar than the positive. Below 0 fewer are found, above 0 more.
        strategy: What the margin is of: ``"absolute"``, or ``"relative"`` to the size of the positive's score.

    Returns:
        bool ``(B, N)``, ``False`` in the row's own column.

    Example:
        >>> similar_document_mask(torch.tensor([[-0.4, -0.3, -0.43, -0.5]]), torch.tensor([0]), 0.1, "relative")
        tensor([[False,  True,  True, False]])

    """
    there = (labels >= 0) & (labels < similarities.shape[1])
    own = torch.take_along_dim(similarities, torch.where(there, labels, 0)[:, None], dim=1)
    threshold = own - margin * (own.abs() if strategy == "relative" else 1.0)
    return (similarities > threshold) & _not_own(labels, similarities.shape[1]) & there[:, None]


def _not_own(labels: Tensor, columns: int) -> Tensor:
    return torch.arange(columns, device=labels.device) != labels[:, None]


def token_hashes(tokens: Tensor, padding: int = 0) -> Tensor:
    r"""A number of 64 bits for each row of tokens; rows of equal tokens have the same, and others another.

    :math:`\sum_t (x_t - \text{padding})\, a_t \bmod 2^{64}` with fixed random numbers a: two given texts of a
    vocabulary below :math:`2^{17}` meet by chance once in :math:`2^{47}`. Padding behind the tokens counts nothing.

    Args:
        tokens: Whole numbers ``(N, T)``.
        padding: The token that fills rows up, behind the others.

    Returns:
        int64 ``(N,)``.

    Example:
        >>> one, two = torch.tensor([[3, 1], [1, 3]]), torch.tensor([[3, 1, 0]])
        >>> (token_hashes(one) == token_hashes(two)).tolist()
        [True, False]

    """
    generator = torch.Generator().manual_seed(0)
    least, most = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    factors = torch.randint(least, most, (tokens.shape[1],), generator=generator).to(tokens.device, non_blocking=True)
    return ((tokens.long() - padding) * factors).sum(1)


def text_hashes(texts: Sequence[str]) -> Tensor:
    """A number of 64 bits for each text, the same in every process; two given texts meet by chance once in 2^64.

    Args:
        texts: N strings.

    Returns:
        int64 ``(N,)``.

    Example:
        >>> one, two, three = text_hashes(["a", "b", "a"]).tolist()
        >>> one == three, one == two
        (True, False)

    """
    digests = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests], dtype=torch.int64)


def fitted_scale(scores: Tensor, similarities: Tensor, counts: Tensor | None = None) -> Tensor:
    r"""What similarities were multiplied by to give scores, by least squares: :math:`\sum s c / \sum c^2`.

    Of scores that are so made its gradient is that of the scale alone: what it gives to the similarities by way of the
    scores and what it gives them itself cancel. So a learned temperature learns from scores that are added.

    Args:
        scores: s, of any shape.
        similarities: c, of the same.
        counts: Which entries count, bool; ``None``: all.

    Returns:
        A scalar.

    Example:
        >>> fitted_scale(torch.tensor([2.0, -6.0]), torch.tensor([0.1, -0.3]))
        tensor(20.)

    """
    if counts is not None:
        scores, similarities = torch.where(counts, scores, 0.0), torch.where(counts, similarities, 0.0)
    return (scores * similarities).sum() / similarities.square().sum().clamp(min=1e-12)
