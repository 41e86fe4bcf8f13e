"""The formulas of Maestro, for any training loop: ordered factors, their truncation, the lasso on their tails."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "hierarchical_lasso",
    "kept_rank",
    "low_rank_gradients",
    "low_rank_product",
    "random_ranks",
    "rank_pairs",
    "svd_factors",
    "tail_norms",
]


def low_rank_product(left: Tensor, right: Tensor, rank: int | None = None) -> Tensor:
    r"""The matrix of the first columns of both factors, with gradient.

    .. math:: W_b = U_{:b} V_{:b}^\top

    Args:
        left: U, ``(..., m, r)``.
        right: V, ``(..., n, r)``.
        rank: b, from 1 to r; ``None`` for r.

    Returns:
        ``(..., m, n)``; columns beyond b get a gradient of zero.

    Example:
        >>> U, V = torch.eye(2) * 2, torch.eye(2)
        >>> low_rank_product(U, V, rank=1)
        tensor([[2., 0.],
                [0., 0.]])

    """
    return left[..., :rank] @ right[..., :rank].mT


def low_rank_gradients(gradient: Tensor, left: Tensor, right: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    r"""Gradients of both factors from that of the matrix which the network had.

    .. math:: \partial U_{:b} = \partial W_b\, V_{:b}, \qquad \partial V_{:b} = \partial W_b^\top U_{:b}

    Args:
        gradient: Of :func:`low_rank_product`, ``(..., m, n)``.
        left: U, ``(..., m, r)``.
        right: V, ``(..., n, r)``.
        rank: b, as there.

    Returns:
        Those of U and V, in their type and shapes; zero beyond b.

    """
    gradient = gradient.to(left.dtype)
    at_left, at_right = torch.zeros_like(left), torch.zeros_like(right)
    at_left[..., :rank] = gradient @ right.detach()[..., :rank]
    at_right[..., :rank] = gradient.mT @ left.detach()[..., :rank]
    return at_left, at_right


def tail_norms(factor: Tensor) -> Tensor:
    r"""The norm of each tail of columns: :math:`\lVert U_{b:} \rVert_F` for b from 1 to r; it never rises with b.

    Args:
        factor: ``(..., m, r)``; of a stack all matrices count together.

    Returns:
        ``(r,)``, in float32 at least. Where a tail is zero its gradient is zero too; the root's would be infinite.

    Example:
        >>> tail_norms(torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]]))
        tensor([5., 4., 0.])

    """
    kind = torch.promote_types(factor.dtype, torch.float32)
    columns = factor.to(kind).square().flatten(0, -2).sum(0)
    tails = columns.flip(0).cumsum(0).flip(0)
    empty = tails == 0
    return tails.masked_fill(empty, 1.0).sqrt().masked_fill(empty, 0.0)


def hierarchical_lasso(left: Tensor, right: Tensor) -> Tensor:
    r"""The hierarchical group lasso of a layer: each tail of columns is a group, so the last column is in all of them.

    .. math:: \sum_{b=1}^{r} \lVert U_{b:} \rVert_F + \lVert V_{b:} \rVert_F

    Args:
        left: U, ``(..., m, r)``.
        right: V, ``(..., n, r)``.

    Returns:
        A scalar, with gradient.

    Example:
        >>> hierarchical_lasso(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]]))
        tensor(13.)

    """
    return (tail_norms(left) + tail_norms(right)).sum()


def kept_rank(left: Tensor, right: Tensor, threshold: float) -> int:
    r"""How many columns stay: the tails with :math:`\lVert U_{b:} \rVert \lVert V_{b:} \rVert \ge \epsilon`.

    Args:
        left: U, ``(..., m, r)``.
        right: V, ``(..., n, r)``.
        threshold: :math:`\epsilon`, at least 0.

    Returns:
        The rank, at least 1; costs a host sync.

    Example:
        >>> kept_rank(torch.tensor([[3.0, 1e-4]]), torch.tensor([[2.0, 1e-4]]), threshold=1e-6)
        1

    """
    with torch.no_grad():
        return max(1, int((tail_norms(left) * tail_norms(right) >= threshold).sum()))


def svd_factors(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    r"""Factors to begin with: :math:`U = Q_U \sqrt S,\ V = Q_V \sqrt S` of the singular value decomposition.

    A column of singular value zero would never learn if both its sides were zero: there V keeps its singular vector, in
    the size of the largest one, and the product stays what it is.

    Args:
        matrix: ``(..., m, n)``; decomposed in float32 at least.
        rank: How many columns, ``None`` for the smaller side.

    Returns:
        U ``(..., m, r)`` and V ``(..., n, r)``, in float32 at least, without gradient.

    Example:
        >>> U, V = svd_factors(torch.tensor([[0.0, 2.0], [8.0, 0.0]]))
        >>> low_rank_product(U, V, rank=1).abs().round()
        tensor([[0., 0.],
                [8., 0.]])

    """
    whole = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
    q_left, sizes, q_right = torch.linalg.svd(whole, full_matrices=False)
    largest = sizes.amax(-1, keepdim=True)
    empty = sizes <= max(whole.shape[-2:]) * torch.finfo(sizes.dtype).eps * largest
    roots = sizes.masked_fill(empty, 0.0).sqrt().unsqueeze(-2)
    of_empty = torch.where(largest > 0, largest, 1.0).sqrt().unsqueeze(-2)
    left, right = q_left * roots, q_right.mT * torch.where(empty.unsqueeze(-2), of_empty, roots)
    return left[..., :rank].contiguous(), right[..., :rank].contiguous()


def rank_pairs(ranks: Sequence[int], generator: torch.Generator) -> Tensor:
    """All pairs of a layer and a rank in a random order: a training walks through them and truncates one layer a step.

    So a layer is drawn in proportion to its rank, and each of its ranks once in a walk.

    Args:
        ranks: The present rank of each layer.
        generator: Random generator on the CPU.

    Returns:
        ``(sum of ranks, 2)``: the layer's position, and a rank from 1 to its own.

    Example:
        >>> rank_pairs([1, 2], torch.Generator().manual_seed(0)).sort(0).values
        tensor([[0, 1],
                [1, 1],
                [1, 2]])

    """
    sizes = torch.tensor(ranks)
    layers = torch.arange(len(sizes)).repeat_interleave(sizes)
    first = (sizes.cumsum(0) - sizes)[layers]
    pairs = torch.stack([layers, torch.arange(len(layers)) - first + 1], 1)
    return pairs[torch.randperm(len(pairs), generator=generator)]


def random_ranks(ranks: Sequence[int], generator: torch.Generator) -> list[int]:
    """A rank for each layer, drawn for itself and uniform from 1 to the layer's own.

    Args:
        ranks: The present rank of each layer.
        generator: Random generator on the CPU.

    Returns:
        As many ranks.

    """
    shares = torch.rand(len(ranks), generator=generator, dtype=torch.float64).tolist()
    return [1 + int(share * rank) for share, rank in zip(shares, ranks, strict=True)]
