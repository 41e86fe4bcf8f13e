"""The formulas of AdaWAC, for any training loop: weights of samples, consistency of views, views that can be undone.

Symbols: sample i has a weight ``b_i`` for its supervised loss and ``1 - b_i`` for its consistency. What is stored is
``a_i = log(b_i / (1 - b_i))``: its update is a sum, where that of ``b_i`` is a product that underflows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "adawac_loss",
    "adawac_update",
    "apply_symmetry",
    "batch_dice_loss",
    "draw_symmetries",
    "encoder_consistency",
    "undo_symmetry",
    "weight_ascent",
]


def weight_ascent(
    logits: Tensor, supervised: Tensor, consistency: Tensor, eta: float, limit: float | None = None
) -> Tensor:
    r"""One step of mirror descent on the weights, towards the larger of the two losses.

    .. math:: a_i \leftarrow a_i + \eta\,(\ell^{CE}_i - \ell^{AC}_i), \qquad b_i = \sigma(a_i)

    the same as :math:`b \leftarrow b\,e^{\eta(\ell^{CE} - \ell^{AC})}` with the pair :math:`(b, 1-b)` normalised.

    Args:
        logits: Present ``a`` of the samples, ``(B,)``.
        supervised: ``(B,)``; no gradient is taken.
        consistency: ``(B,)``, with its factor lambda.
        eta: Step, at least 0.
        limit: Largest ``|a|``; ``None`` for none.

    Returns:
        New ``a``, ``(B,)`` float32. Where a loss is not finite it is the given one.

    Example:
        >>> a = torch.zeros(2)
        >>> for _ in range(7):
        ...     a = weight_ascent(a, torch.tensor([0.8, 0.1]), torch.tensor([0.3, 0.5]), eta=2.0)
        >>> a.sigmoid()
        tensor([0.9991, 0.0037])

    """
    logits = logits.detach().float()
    moved = logits + eta * (supervised.detach().float() - consistency.detach().float())
    moved = torch.where(moved.isfinite(), moved, logits)
    return moved if limit is None else moved.clamp(-limit, limit)


def adawac_update(
    table: Tensor,
    indices: Tensor,
    supervised: Tensor,
    consistency: Tensor,
    eta: float = 2.0,
    limit: float | None = None,
) -> Tensor:
    """The same for the samples of a batch in a table of all samples, in place.

    Args:
        table: ``a`` of all samples, ``(N,)``, 0 at the start.
        indices: Distinct samples of the batch, ``(B,)``.
        supervised: As in :func:`weight_ascent`.
        consistency: As in :func:`weight_ascent`.
        eta: As in :func:`weight_ascent`.
        limit: As in :func:`weight_ascent`.

    Returns:
        New weights ``b`` of the batch, ``(B,)``.

    """
    moved = weight_ascent(table[indices], supervised, consistency, eta, limit)
    table[indices] = moved.to(table.dtype)
    return moved.sigmoid()


def encoder_consistency(features: Tensor, other: Tensor) -> Tensor:
    r"""Mean square difference of what the encoder makes of two views, with gradient through both.

    Args:
        features: ``(B, ...)``.
        other: Of the other view, positions aligned.

    Returns:
        ``(B,)`` float32.

    """
    return (features.float() - other.float()).square().flatten(1).mean(1)


def adawac_loss(supervised: Tensor, consistency: Tensor, weights: Tensor) -> Tensor:
    r"""Loss of a batch, :math:`\frac1B \sum_i b_i\,\ell^{CE}_i + (1 - b_i)\,\ell^{AC}_i`.

    Args:
        supervised: ``(B,)``, the mean of both views.
        consistency: ``(B,)``, with its factor lambda.
        weights: ``b`` after the update, ``(B,)``; constant.

    Returns:
        A scalar.

    """
    weights = weights.detach()
    return (weights * supervised + (1 - weights) * consistency).mean()


def batch_dice_loss(logits: Tensor, targets: Tensor, smooth: float = 1e-5) -> Tensor:
    r"""Soft Dice loss over the whole batch, the mean over all classes with the background.

    .. math:: 1 - \frac1C \sum_c \frac{2 \sum p_c y_c + s}{\sum p_c^2 + \sum y_c^2 + s}

    Args:
        logits: ``(B, C, ...)``.
        targets: Class of each position, ``(B, ...)``.
        smooth: s.

    Returns:
        A scalar, which the paper adds with share d: :math:`d\,L^{Dice} + (1 - d)\,L`.

    """
    shares = logits.float().softmax(1).transpose(0, 1).flatten(1)
    truth = F.one_hot(targets, logits.shape[1]).movedim(-1, 0).flatten(1).to(shares.dtype)
    overlap, size = (shares * truth).sum(1), shares.square().sum(1) + truth.square().sum(1)
    return 1 - ((2 * overlap + smooth) / (size + smooth)).mean()


def draw_symmetries(size: int, generator: torch.Generator | None = None, turns: bool = True) -> Tensor:
    """Draws for each sample one of the symmetries of a square, or of a rectangle.

    Args:
        size: Number of samples B.
        generator: Where to draw from; ``None`` for torch's own.
        turns: Whether quarter turns are among them, for square maps: all 8, in place of the 4 of flips.

    Returns:
        bool ``(B, 3)``: whether rows and columns are exchanged, and flipped downwards and sidewards after that.

    """
    device = None if generator is None else generator.device
    draws = torch.rand(size, 3, generator=generator, device=device) < 0.5
    draws[:, 0] &= turns
    return draws


def apply_symmetry(maps: Tensor, draws: Tensor) -> Tensor:
    """Turns and flips maps, each by its own symmetry.

    Args:
        maps: ``(B, ..., H, W)``; with turns H = W.
        draws: bool ``(B, 3)``, see :func:`draw_symmetries`.

    Returns:
        Maps of the same shape.

    """
    exchange, down, side = _columns(maps, draws)
    if maps.shape[-1] == maps.shape[-2]:
        maps = torch.where(exchange, maps.transpose(-1, -2), maps)
    maps = torch.where(down, maps.flip(-2), maps)
    return torch.where(side, maps.flip(-1), maps)


def undo_symmetry(maps: Tensor, draws: Tensor) -> Tensor:
    """What :func:`apply_symmetry` has turned, as it was: at any size of the maps, features of an encoder too.

    Args:
        maps: ``(B, ..., h, w)``.
        draws: What they were turned by, bool ``(B, 3)``.

    Returns:
        Maps of the same shape.

    """
    exchange, down, side = _columns(maps, draws)
    maps = torch.where(side, maps.flip(-1), maps)
    maps = torch.where(down, maps.flip(-2), maps)
    if maps.shape[-1] == maps.shape[-2]:
        maps = torch.where(exchange, maps.transpose(-1, -2), maps)
    return maps


def _columns(maps: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    each = draws.to(maps.device).reshape(len(draws), 3, *[1] * (maps.dim() - 1))
    return each[:, 0], each[:, 1], each[:, 2]
