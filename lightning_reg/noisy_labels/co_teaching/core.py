"""The formulas of co-teaching, for any training loop."""

import torch
from torch import Tensor

__all__ = ["estimated_forget_rate", "forget_rate_at", "small_loss_mask", "small_loss_weights"]

_STEPS, _FLOOR = 200, 1e-3


def small_loss_mask(losses: Tensor, forget_rate: float, counted: Tensor | None = None) -> Tensor:
    r"""Which samples have the smallest losses: :math:`\lfloor (1 - R)\, n \rfloor` of n, and at least one.

    Of equal losses the earlier ones come first, so that the number is exact; a loss that is not a number comes last.
    Nothing is read on the host.

    Args:
        losses: ``(B,)``, of the network that picks.
        forget_rate: R, in [0, 1).
        counted: bool ``(B,)``, samples that are there; others are never picked, and no part of n.

    Returns:
        bool ``(B,)``.

    Example:
        >>> small_loss_mask(torch.tensor([0.3, 2.0, 0.1, 0.3]), 0.5)
        tensor([ True, False,  True, False])

    """
    losses = losses.detach()
    # 0.8 * 10 is 8, and 0.2 * 10 is 2, which 1 - 0.8 in floating point is too small for.
    share, rounding = 1 - forget_rate, 1e-9
    if counted is None:
        kept: Tensor | int = max(1, int(share * len(losses) + rounding))
    else:
        losses = losses.masked_fill(~counted, torch.inf)
        precise = torch.float32 if losses.device.type == "mps" else torch.float64
        kept = (share * counted.sum().to(precise) + rounding).floor().clamp(min=1)
    order = losses.argsort(stable=True)
    places = torch.arange(len(losses), device=losses.device)
    mask = torch.empty_like(order, dtype=torch.bool).scatter(0, order, places < kept)
    return mask if counted is None else mask & counted


def small_loss_weights(losses: Tensor, forget_rate: float, mass: Tensor | None = None) -> Tensor:
    r"""Weights that make of the mean over all samples the mean over those of small loss.

    .. math:: w_i = \frac{\sum_j n_j}{\sum_{j \in S} n_j} \text{ for } i \in S, \text{ else } 0

    Args:
        losses: ``(B,)``, of the network that picks.
        forget_rate: R, in [0, 1).
        mass: What each sample counts in the mean, ``(B,)``; those of 0 are ignored. ``None``: all the same.

    Returns:
        ``(B,)`` float32.

    Example:
        >>> small_loss_weights(torch.tensor([0.3, 2.0, 0.1, 0.5]), 0.5)
        tensor([2., 0., 2., 0.])

    """
    kept = small_loss_mask(losses, forget_rate, None if mass is None else mass > 0)
    mass = torch.ones_like(kept, dtype=torch.float32) if mass is None else mass.float()
    chosen = (mass * kept).sum()
    return kept * (mass.sum() / torch.where(chosen > 0, chosen, 1.0))


def forget_rate_at(epoch: int, forget_rate: float, gradual_epochs: int, exponent: float = 1.0) -> float:
    r"""The share that is left out in an epoch: :math:`R(T) = \tau \min(T^c / T_k, 1)`.

    Args:
        epoch: T, epochs finished: the first one has 0.
        forget_rate: tau.
        gradual_epochs: T_k; 0 for the same rate from the start.
        exponent: c.

    Returns:
        R(T).

    Example:
        >>> [forget_rate_at(epoch, 0.2, 4) for epoch in (0, 1, 4, 9)]
        [0.0, 0.05, 0.2, 0.2]

    """
    return forget_rate * min(epoch**exponent / gradual_epochs, 1.0) if gradual_epochs else forget_rate


def estimated_forget_rate(losses: Tensor) -> float:
    r"""The share of samples with large losses: the weight of the upper one of two Gaussians that are fitted to them.

    The mixture is fitted by expectation maximisation from the 0.1 and 0.9 quantiles, on losses that are scaled to
    [0, 1] without the largest hundredth, and a sample belongs to the more probable one. It says what the losses say: a
    network that fits badly has large losses of clean samples too, and where all labels are right the tail of their
    losses is taken for wrong ones.

    Args:
        losses: ``(N,)`` of all training samples, early in a training; what is not finite does not count.

    Returns:
        From 0 to below 1; 0 where nine tenths of the losses are the same.

    Example:
        >>> estimated_forget_rate(torch.cat([torch.linspace(0.0, 0.2, 70), torch.linspace(3.0, 4.0, 30)]))
        0.3

    """
    values = losses.detach().double().cpu().flatten()
    values = values[values.isfinite()]
    if len(values) < 2 or values.max() == values.min():
        return 0.0
    low, high, ends = (torch.quantile(values, q) for q in (0.0, 0.99, torch.tensor([0.1, 0.9], dtype=torch.float64)))
    scale = (high - low) if high > low else values.max() - low
    values, means = ((values - low) / scale).clamp(max=1.0), (ends - low) / scale
    belongs = torch.zeros(len(values), 2, dtype=torch.float64)
    spread, shares = values.var(correction=0).clamp(min=_FLOOR).repeat(2), torch.full((2,), 0.5, dtype=torch.float64)
    for _ in range(_STEPS):
        log = shares.log() - 0.5 * spread.log() - 0.5 * (values[:, None] - means) ** 2 / spread
        belongs = log.softmax(1)
        shares = belongs.mean(0).clamp(min=1e-12)
        means = (belongs * values[:, None]).mean(0) / shares
        spread = ((belongs * (values[:, None] - means) ** 2).mean(0) / shares).clamp(min=_FLOOR)
    # The broad one is the more probable far below the narrow one too: what lies there is no large loss.
    upper = (belongs[:, means.argmax()] > 0.5) & (values > means.min())
    return float(upper.double().mean())
