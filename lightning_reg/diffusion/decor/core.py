"""Directions of undesired tokens, their projection out of embeddings, and what the axes of an embedding carry."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "EmbeddingComponents",
    "decor_project",
    "embedding_components",
    "keep_axes",
    "token_rows",
    "undesired_basis",
    "undesired_rows",
]

TokenKind: TypeAlias = Literal["words", "end", "padding"]


def decor_project(embeddings: Tensor, basis: Tensor, alpha: float = 1.0, token_mask: Tensor | None = None) -> Tensor:
    r"""Embeddings without their component along undesired directions.

    .. math:: X' = X - \alpha X V V^T

    Args:
        embeddings: X, token vectors ``(B, l, d)``, or pooled ones ``(B, d)``.
        basis: V, orthonormal columns (or zero) ``(d, r)``, or one for each prompt ``(B, d, r)``.
        alpha: 0 is the identity; with 1 every row is orthogonal to all undesired vectors.
        token_mask: Rows that are changed, bool ``(B, l)``; ``None``: all.

    Returns:
        X', of the shape and type of X, computed in float32 at least. It is never brought back to its norm.

    Example:
        >>> decor_project(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[1.0], [0.0]]), alpha=0.75)
        tensor([[[0.2500, 2.0000]]])

    """
    rows = embeddings[:, None] if embeddings.dim() == 2 else embeddings
    directions = basis.to(rows.device, torch.promote_types(rows.dtype, torch.float32))
    with torch.autocast(rows.device.type, enabled=False):  # directions that are rounded are not orthonormal any more
        # The d x d projector is never formed.
        removed = (rows.to(directions.dtype) @ directions) @ directions.mT
        changed = (rows - alpha * removed).to(rows.dtype)
    if token_mask is not None:
        changed = torch.where(token_mask[..., None], changed, rows)
    return changed[:, 0] if embeddings.dim() == 2 else changed


def undesired_basis(
    undesired: Tensor,
    rank: int | None = None,
    rtol: float = 1e-5,
    mask: Tensor | None = None,
    widths: Sequence[int] | None = None,
) -> Tensor:
    r"""Right singular vectors of undesired token vectors, :math:`\tilde X = U S V^T`.

    Rows are neither centred nor scaled. Vectors of two text encoders that stand side by side along d (SDXL) are one
    vector, whose larger part decides, unless ``widths`` keeps the encoders apart.

    Args:
        undesired: Token vectors ``(m, d)``, those of several prompts one below the other; or a set for each prompt
            ``(B, m, d)``.
        rank: The leading directions that are taken; ``None``: all.
        rtol: Singular values below this share of the largest are rounding, and not taken.
        mask: Rows that count, bool ``(m,)`` or ``(B, m)``.
        widths: How many of the d numbers belong to each text encoder: each has directions of its own, and a ``rank``.
            ``None``: there is one.

    Returns:
        ``(d, r)`` in float64, or ``(B, d, r)`` with zero columns where a set has fewer directions.

    Raises:
        ValueError: If there is no direction, or an argument is outside its range.

    Example:
        >>> undesired_basis(torch.tensor([[0.0, 2.0], [0.0, 3.0]])).abs()
        tensor([[0.],
                [1.]], dtype=torch.float64)

    """
    if widths is not None:
        return _side_by_side(undesired, rank, rtol, mask, widths)
    rows = undesired.detach().double()
    if mask is not None:
        rows = rows * mask[..., None]
    if rows.dim() not in (2, 3) or not rows.numel() or not bool(rows.flatten(-2).any(-1).all()):
        raise ValueError(
            "undesired_basis: `undesired` must have vectors (m, d) that are not all zero, got shape"
            f" {tuple(undesired.shape)}."
        )
    if rank is not None and not 1 <= rank <= min(rows.shape[-2:]):
        raise ValueError(f"undesired_basis: `rank` must be in [1, {min(rows.shape[-2:])}], got {rank!r}.")
    if not 0 <= rtol < 1:
        raise ValueError(f"undesired_basis: `rtol` must be in [0, 1), got {rtol!r}.")
    _, sizes, right = torch.linalg.svd(rows, full_matrices=False)
    is_taken = sizes > rtol * sizes[..., :1]
    most = int(is_taken.sum(-1).max()) if rank is None else min(rank, int(is_taken.sum(-1).max()))
    basis: Tensor = (right * is_taken[..., None]).mT[..., :most]
    return basis


def _side_by_side(
    undesired: Tensor, rank: int | None, rtol: float, mask: Tensor | None, widths: Sequence[int]
) -> Tensor:
    if sum(widths) != undesired.shape[-1] or min(widths) < 1:
        raise ValueError(
            f"undesired_basis: `widths` must be at least 1 and sum to {undesired.shape[-1]}, the length of a vector,"
            f" got {list(widths)}."
        )
    parts = [undesired_basis(part, rank, rtol, mask) for part in torch.split(undesired, list(widths), -1)]
    joined = parts[0].new_zeros(*undesired.shape[:-2], sum(widths), sum(part.shape[-1] for part in parts))
    row = column = 0
    for part in parts:
        joined[..., row : row + part.shape[-2], column : column + part.shape[-1]] = part
        row, column = row + part.shape[-2], column + part.shape[-1]
    return joined


class EmbeddingComponents(NamedTuple):
    """The axes of a prompt's embedding, strongest first.

    Attributes:
        singular_values: ``(r,)``.
        words: Share of the word rows' energy on each axis, ``(r,)``.
        padding: Share of the other rows', ``(r,)``.

    """

    singular_values: Tensor
    words: Tensor
    padding: Tensor


def embedding_components(embeddings: Tensor, words: Tensor) -> EmbeddingComponents:
    """Which axes of an embedding carry its words, and which the padding.

    Args:
        embeddings: Token vectors of one prompt ``(l, d)``.
        words: Which rows are words, bool ``(l,)``, see :func:`token_rows`; the others count as padding.

    Returns:
        Singular values, and shares of energy by axis; each kind's shares sum to 1.

    """
    left, sizes, _ = torch.linalg.svd(embeddings.detach().double(), full_matrices=False)
    energy = (left * sizes).square()
    kinds = (energy[kind].sum(0) for kind in (words, ~words))
    one, two = (kind / kind.sum() for kind in kinds)
    return EmbeddingComponents(sizes, one, two)


def keep_axes(embeddings: Tensor, axes: list[int] | slice) -> Tensor:
    """An embedding made of some of its axes alone, :math:`X V_k V_k^T`.

    Args:
        embeddings: Token vectors of one prompt ``(l, d)``.
        axes: Numbers of the axes, strongest first.

    Returns:
        ``(l, d)``.

    """
    _, _, right = torch.linalg.svd(embeddings.double(), full_matrices=False)
    kept = right[axes].to(embeddings.dtype)
    result: Tensor = embeddings @ kept.mT @ kept
    return result


def token_rows(input_ids: Tensor, end: int, start: int | None = None) -> dict[str, Tensor]:
    """Which rows of an embedding are words, the end and padding; padding may be the end again, as in CLIP.

    Args:
        input_ids: Tokens ``(B, l)`` or ``(l,)``.
        end: Number of the token that ends a text.
        start: Number of the token that starts one; it belongs to no kind.

    Returns:
        bool of the shape of ``input_ids`` by ``"words"``, ``"end"`` and ``"padding"``.

    Example:
        >>> rows = token_rows(torch.tensor([7, 3, 4, 0, 0]), end=0, start=7)
        >>> {name: row.nonzero()[:, 0].tolist() for name, row in rows.items()}
        {'words': [1, 2], 'end': [3], 'padding': [4]}

    """
    after = (input_ids == end).long().cumsum(-1)
    is_end = (after == 1) & (input_ids == end)
    words = after == 0
    if start is not None:
        words &= input_ids != start
    return {"words": words, "end": is_end, "padding": (after > 0) & ~is_end}


def undesired_rows(
    embeddings: Tensor, input_ids: Tensor, end: int, start: int | None = None, kinds: Sequence[TokenKind] = ("words",)
) -> Tensor:
    """The vectors of an undesired prompt that :func:`undesired_basis` is to get.

    Args:
        embeddings: Token vectors ``(B, l, d)``; those of several prompts come one below the other.
        input_ids: Their tokens ``(B, l)``.
        end: Number of the token that ends a text.
        start: Number of the token that starts one, which is never taken.
        kinds: Of ``"words"``, ``"end"`` and ``"padding"``.

    Returns:
        ``(m, d)``.

    Raises:
        ValueError: If there is no such row.

    Example:
        >>> undesired_rows(torch.arange(6.0).view(1, 3, 2), torch.tensor([[7, 5, 0]]), end=0, start=7)
        tensor([[2., 3.]])

    """
    by_kind = token_rows(input_ids, end, start)
    chosen = torch.stack([by_kind[kind] for kind in kinds]).any(0) if kinds else torch.zeros_like(input_ids).bool()
    if not bool(chosen.any()):
        raise ValueError(
            f"undesired_rows: `kinds` must be of those that the prompts have, got {list(kinds)} for"
            f" {int(by_kind['words'].sum())} words."
        )
    return embeddings[chosen]
