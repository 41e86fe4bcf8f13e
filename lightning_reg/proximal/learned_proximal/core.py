"""Proximal matching, its schedule, and the norm of a linear operator, for any training loop."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

__all__ = ["largest_eigenvalues", "proximal_matching_gamma", "proximal_matching_loss"]


def proximal_matching_loss(
    predictions: Tensor,
    targets: Tensor,
    gamma: float,
    elementwise: bool = False,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    r"""Counts the samples that are missed by more than a width: its minimizer tends to the mode, not to the mean.

    .. math:: m_\gamma\bigl(\|f(y) - x\|_2\bigr) = 1 - \exp\bigl(-\|f(y) - x\|_2^2 / \gamma^2\bigr) \in [0, 1]

    Far from the target, where the distance is some multiples of the width, the gradient vanishes: train by the mean
    absolute error first. For a wide one it is the squared distance over :math:`\gamma^2`.

    Args:
        predictions: ``(B,)`` or ``(B, ...)``.
        targets: In the same shape.
        gamma: Width, above 0, in the unit of the distance; it grows with the root of the number of elements of a
            sample.
        elementwise: Whether each element is a sample of its own, which is right for one dimension and for priors that
            factorize.
        reduction: ``"mean"`` and ``"sum"`` over the samples, or ``"none"``.

    Returns:
        ``()``; for ``"none"`` ``(B,)``, or elementwise of the shape of ``predictions``. At least float32.

    Raises:
        ValueError: If the shapes differ, or an argument is outside its range.

    Example:
        >>> proximal_matching_loss(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.zeros(2, 2), gamma=5.0)
        tensor(0.3161)

    """
    if predictions.shape != targets.shape:
        raise ValueError(
            f"proximal_matching_loss: `targets` must be of the shape of `predictions`, {tuple(predictions.shape)}, got"
            f" {tuple(targets.shape)}."
        )
    if not gamma > 0:
        raise ValueError(f"proximal_matching_loss: `gamma` must be above 0, got {gamma!r}.")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"proximal_matching_loss: `reduction` must be 'mean', 'sum' or 'none', got {reduction!r}.")
    wide = torch.promote_types(predictions.dtype, torch.float32)  # the exponential of a half has few digits near 1
    squares = (predictions.to(wide) - targets.to(wide)).square()
    distances = squares if elementwise or squares.dim() == 1 else squares.flatten(1).sum(1)
    losses = -torch.expm1(-distances / gamma**2)
    return losses if reduction == "none" else getattr(losses, reduction)()


def proximal_matching_gamma(
    step: int, gamma_min: float, steps: int = 40_000, pretrain_steps: int = 20_000, stages: int = 4
) -> float | None:
    r"""The width at a step: none while the mean absolute error is trained, then halved from stage to stage.

    :math:`\gamma = \gamma_{min} 2^{S - 1 - s}` in stage s of S, stages of equal length; the last one goes on if the
    training does.

    Args:
        step: Optimizer steps so far, at least 0.
        gamma_min: Width of the last stage, above 0.
        steps: Of the whole training.
        pretrain_steps: Of them those on the mean absolute error.
        stages: S, at least 1.

    Returns:
        The width; ``None`` for the mean absolute error.

    Example:
        >>> [proximal_matching_gamma(step, 0.1, steps=100, pretrain_steps=60, stages=2) for step in (59, 60, 80, 200)]
        [None, 0.2, 0.1, 0.1]

    """
    if step < pretrain_steps:
        return None
    length = max((steps - pretrain_steps) // stages, 1)
    stage = min((step - pretrain_steps) // length, stages - 1)
    return float(gamma_min * 2 ** (stages - 1 - stage))


def largest_eigenvalues(
    operator: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor], like: Tensor, iterations: int = 50
) -> Tensor:
    r""":math:`\|A^T A\|` for each row, by the power method from a fixed start: from below, and near after 50 turns.

    Args:
        operator: A, of a batch of inputs; rows are treated alone.
        adjoint: Its transpose.
        like: ``(B, ...)``, a batch of inputs; only its shape, type and device count.
        iterations: At least 1.

    Returns:
        ``(B, 1, ...)`` with as many dimensions as ``like``.

    Example:
        >>> scale = torch.tensor([1.0, 3.0])
        >>> largest_eigenvalues(lambda x: scale * x, lambda y: scale * y, torch.zeros(1, 2))
        tensor([[9.]])

    """
    start = torch.randn(like.shape[1:], generator=torch.Generator().manual_seed(0)).to(like)
    vectors, sizes = start.expand_as(like), torch.ones_like(like)
    for _ in range(iterations):
        vectors = vectors / torch.where(sizes > 0, sizes, 1.0)
        vectors = adjoint(operator(vectors))
        sizes = row_dots(vectors, vectors).sqrt()
    return sizes


def row_dots(one: Tensor, two: Tensor) -> Tensor:
    """Inner products of the rows of two batches ``(B, ...)``, as ``(B, 1, ...)``."""
    return (one * two).flatten(1).sum(1).reshape(-1, *[1] * (one.dim() - 1))
