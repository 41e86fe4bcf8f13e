"""Weights of queries by how well they are answered, and what text encoders make of their tokens."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["focal_weights", "matryoshka_loss", "mean_pooled"]


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
    there = mask.to(torch.promote_types(hidden.dtype, torch.float32))[..., None]
    mean = (hidden * there).sum(1) / there.sum(1).clamp(min=1)
    return mean.to(hidden.dtype)


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
