"""Weights of queries by how well they are answered, harder negatives, and what text encoders make of their tokens."""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "draw_mixtures",
    "focal_weights",
    "hardest_negatives",
    "matryoshka_loss",
    "mean_pooled",
    "mix_hard_negatives",
    "own_negatives",
]

Layout = Literal["interleaved", "grouped", "stacked"]


def focal_weights(losses: Tensor, gamma: float = 0.5) -> Tensor:
    r"""Weights by the probability that a loss leaves its target.

    .. math:: w_i = (1 - P_i)^\gamma, \qquad P_i = e^{-\ell_i}

    Args:
        losses: Cross-entropies :math:`\ell`, ``(B,)``; no gradient flows into the weights.
        gamma: At least 0. Neutral: 0.

    Returns:
        ``(B,)``, float32 at least: 0 for a target of probability 1, near 1 for one that is hardly believed in.

    Example:
        >>> focal_weights(torch.tensor([0.0, 100.0]))
        tensor([0., 1.])

    """
    wide = losses.detach().to(torch.promote_types(losses.dtype, torch.float32))
    return (-torch.expm1(-wide)).clamp(min=0.0) ** gamma  # expm1: of losses near 0, too


def mix_hard_negatives(
    queries: Tensor,
    negatives: Tensor,
    shares: Tensor,
    chances: Tensor,
    list_mix: bool = False,
    there: Tensor | None = None,
) -> Tensor:
    r"""Negatives that no document has: convex mixtures of each query's hard negatives, brought to length 1.

    .. math:: h = \operatorname{unit}\bigl(\lambda\, n_m + (1 - \lambda)\, n_{m'}\bigr), \qquad
        h = \operatorname{unit}\Bigl(\sum_k b_k n_k\Bigr), \quad b = \operatorname{softmax}_k(q \cdot n_k)

    A mixture as it is would be shorter than 1, and easy for it.

    Args:
        queries: Unit rows :math:`q`, ``(B, D)``.
        negatives: Unit rows :math:`n`, ``(B, K, D)``, K of at least 2.
        shares: :math:`\lambda` of P pairs, in [0, 1], ``(B, P)``.
        chances: Distinct numbers of at least 0, ``(B, P, K)``: the two largest are the pair.
        list_mix: Whether one mixture of all of a query's negatives follows.
        there: Which negatives take part, bool ``(B, K)``, two at least; else all of the row do. ``None``: all.

    Returns:
        Unit rows ``(B, P, D)``, or ``(B, P + 1, D)``.

    Example:
        >>> axes = torch.eye(2)[None]
        >>> mix_hard_negatives(axes[0, :1], axes, torch.tensor([[0.25]]), torch.tensor([[[2.0, 1.0]]]))
        tensor([[[0.3162, 0.9487]]])

    """
    if there is None:
        there = torch.ones_like(negatives[..., 0], dtype=torch.bool)
    there = there | (there.sum(1, keepdim=True) < 2)
    first, second = chances.masked_fill(~there[:, None], -1.0).topk(2, dim=2).indices.unbind(2)
    one, two = (torch.take_along_dim(negatives, which[..., None], dim=1) for which in (first, second))
    mixed = shares[..., None] * one + (1.0 - shares[..., None]) * two
    if list_mix:
        similarities = (negatives @ queries[:, :, None])[..., 0].masked_fill(~there, -torch.inf)
        whole = (similarities.softmax(1)[..., None] * negatives).sum(1, keepdim=True)
        mixed = torch.cat([mixed, whole], dim=1)
    return F.normalize(mixed, dim=2)


def hardest_negatives(
    similarities: Tensor, labels: Tensor, pool: int, own: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The wrong answers that are nearest to each query.

    Args:
        similarities: Cosines of queries and candidates, ``(B, N)``; what is below -1.5 is no candidate.
        labels: Column of each query's own document, ``(B,)``.
        pool: Number K of them; at most N - 1.
        own: The columns that a query takes its negatives from, bool ``(B, N)``; ``None``: all.

    Returns:
        Columns ``(B, K)``, the nearest first, and which of them are negatives, bool ``(B, K)``: a row may have fewer.

    Example:
        >>> hardest_negatives(torch.tensor([[0.9, 0.2, 0.5, -9.0]]), torch.tensor([0]), pool=3)
        (tensor([[2, 1, 3]]), tensor([[ True,  True, False]]))

    """
    wrong = torch.arange(similarities.shape[1], device=similarities.device) != labels[:, None]
    wrong = wrong if own is None else wrong & own
    scores = similarities.detach().masked_fill(~wrong, -torch.inf)
    values, columns = scores.topk(min(pool, scores.shape[1] - 1), dim=1)
    return columns, values > -1.5


def own_negatives(queries: int, columns: int, layout: Layout, device: torch.device | str = "cpu") -> Tensor:
    """Which columns hold a query's own hard negatives, where each query has M of them and a document.

    Args:
        queries: Number of queries B.
        columns: Number of candidates, B times 1 + M.
        layout: ``"interleaved"``: a document and its negatives after it, query by query; ``"grouped"``: all
            documents, then the negatives query by query; ``"stacked"``: all documents, then the first negative of each
            query, then the second.
        device: Device of the result.

    Returns:
        bool ``(B, B * (1 + M))``.

    Example:
        >>> own_negatives(2, 6, "grouped").int()
        tensor([[0, 0, 1, 1, 0, 0],
                [0, 0, 0, 0, 1, 1]], dtype=torch.int32)

    """
    column, each = torch.arange(columns, device=device), columns // queries
    if layout == "interleaved":
        owner, negative = column // each, column % each > 0
    else:
        negative = column >= queries
        owner = (column - queries) // max(each - 1, 1) if layout == "grouped" else column % queries
    return (owner == torch.arange(queries, device=device)[:, None]) & negative


def draw_mixtures(
    rows: int, pairs: int, pool: int, beta: float = 2.0, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    r"""What :func:`mix_hard_negatives` mixes with: shares from Beta(a, a), and chances of the negatives to be drawn.

    Args:
        rows: Number of queries. What a row draws does not depend on how many follow it.
        pairs: Mixtures of each, P.
        pool: Number K of negatives.
        beta: :math:`a`, above 0; 1 is uniform, and more keeps to the middle.
        generator: Generator on the CPU; ``None`` for the global one.

    Returns:
        float32 ``(rows, P)`` and ``(rows, P, K)``, on the CPU.

    Example:
        >>> [tuple(draws.shape) for draws in draw_mixtures(5, 2, 7)]
        [(5, 2), (5, 2, 7)]

    """
    seeds = torch.randint(2**62, (2,), generator=generator, device="cpu").tolist()
    shares = np.random.default_rng(seeds[0]).beta(beta, beta, (rows, pairs))
    chances = np.random.default_rng(seeds[1]).random((rows, pairs, pool))
    return torch.from_numpy(shares).float(), torch.from_numpy(chances).float()


def mean_pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean of the tokens that are there.

    Args:
        hidden: What an encoder puts out for each token, ``(B, T, D)``.
        mask: 1 for tokens and 0 for padding, ``(B, T)``.

    Returns:
        ``(B, D)`` as ``hidden``, summed in float32 at least; zeros where there is no token.

    Example:
        >>> mean_pooled(torch.tensor([[[1.0], [3.0], [8.0]]]), torch.tensor([[1, 1, 0]]))
        tensor([[2.]])

    """
    there = mask.bool()[..., None]
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    total = wide.masked_fill(~there, 0.0).sum(1)  # not times 0: attention may leave NaN where it sees nothing
    return (total / there.sum(1).clamp(min=1)).to(hidden.dtype)


def matryoshka_loss(
    loss: Callable[..., Tensor],
    embeddings: Sequence[Tensor],
    dims: Sequence[int],
    weights: Sequence[float] | None = None,
) -> Tensor:
    r"""A loss of embeddings that are also good when they are cut off: the sum over leading parts of them.

    .. math:: \sum_d \omega_d\, \ell\bigl(\operatorname{unit}(e_{1:d}), \dots\bigr)

    Parts are cut from the embeddings as they are, and each is brought to length 1 after it.

    Args:
        loss: Of unit rows, as many arguments as ``embeddings``: a scalar.
        embeddings: Before any normalisation, each ``(..., D)``.
        dims: Numbers that are kept, each in 1 to D. KaLM-Embedding: 896, 512, 256, 128, 64.
        weights: :math:`\omega`, one for each; ``None``: 1. KaLM-Embedding: 1, 0.3, 0.2, 0.1, 0.1.

    Returns:
        A scalar.

    Raises:
        ValueError: If a part is longer than the embeddings, or there are not as many weights.

    Example:
        >>> rows = torch.tensor([[3.0, 4.0]])
        >>> matryoshka_loss(lambda a: a.sum(), [rows], dims=[2, 1], weights=[1.0, 0.5])
        tensor(1.9000)

    """
    weights = [1.0] * len(dims) if weights is None else list(weights)
    width = embeddings[0].shape[-1]
    if len(weights) != len(dims) or not dims:
        raise ValueError(f"matryoshka_loss: `weights` must be one for each of `dims`={list(dims)!r}, got {weights!r}.")
    if not all(1 <= dim <= width for dim in dims):
        raise ValueError(f"matryoshka_loss: `dims` must be from 1 to {width}, got {list(dims)!r}.")
    parts = [loss(*(F.normalize(rows[..., :dim], dim=-1) for rows in embeddings)) for dim in dims]
    return torch.stack([weight * part for weight, part in zip(weights, parts, strict=True)]).sum()
