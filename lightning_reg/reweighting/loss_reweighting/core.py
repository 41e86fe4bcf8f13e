"""The formulas of loss-based reweighting, for any training loop."""

import math
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine.host.distributed import all_gather, all_reduce_max
from lightning_reg.reweighting.loss_reweighting._weights import cap_weights

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "apply_strategy",
    "normalize_losses",
    "reweight",
    "scheduled_temperature",
    "sequence_losses",
    "weighted_loss",
]

Objective = Literal["token_share", "sample_mean"]
Strategy = Literal["linupper", "quadratic", "extremes", "uniform"]


def reweight(
    losses: Tensor,
    strategy: Strategy = "linupper",
    r: float = 0.4,
    delta: float = 1.0,
    eps: float = 1e-6,
    max_weight: float | None = None,
    counted: Tensor | None = None,
    group: "ProcessGroup | None" = None,
) -> Tensor:
    r"""Weights of the samples of a batch, from their losses.

    .. math:: w = \operatorname{softmax}(f(h) / r)
        = \arg\max_{w} \textstyle\sum_i w_i f_i - r\, \mathrm{KL}(w \,\|\, \text{uniform})

    Args:
        losses: Loss of each sample, ``(M,)``; no gradient flows into them.
        strategy: The shape ``f``, see :func:`apply_strategy`.
        r: Temperature, above 0. Large: uniform. Small: all weight on the largest ``f``. For ``f`` in [0, 1] two weights
            differ by at most the factor :math:`e^{1/r}`.
        delta: Half the width of ``h``.
        eps: Floor of the range of the losses.
        max_weight: Cap in units of 1/M, at least 1; what is cut off goes to the others in proportion to their weights,
            the solution of the problem above under that bound. ``None`` for none. A host sync under several ranks.
        counted: bool ``(M,)``, which samples count; ``None`` for all. The others get weight 0 and change nothing.
        group: Ranks whose samples count too, each with its own losses, in any number; ``None``: these are all.

    Returns:
        Weights ``(M,)`` float32 that sum to 1, over all ranks of the group.

    Example:
        >>> reweight(torch.tensor([1.0, 1.1, 0.9, 1.05, 12.0]))
        tensor([0.0638, 0.0668, 0.0610, 0.0653, 0.7432])

    """
    with torch.no_grad():
        scores = apply_strategy(normalize_losses(losses, delta, eps, counted, group), strategy, delta) / r
        if counted is not None:
            scores = scores.masked_fill(~counted, -math.inf)
        # A rank on which nothing counts has a largest score of -inf, whose difference from itself would be NaN.
        top = scores.max().clamp(min=torch.finfo(scores.dtype).min)
        weights = (scores - top).exp()
        own = torch.stack([top, weights.sum()])
        tops, sums = (own[None] if group is None else all_gather(own, group)).unbind(1)
        weights = weights * (top - tops.max()).exp() / (sums * (tops - tops.max()).exp()).sum()
        if counted is not None:
            weights = weights.masked_fill(~counted, 0.0)  # 0/0 where nothing counts at all
        if max_weight is None:
            return weights
        return cap_weights(weights, max_weight, counted, group)


def normalize_losses(
    losses: Tensor,
    delta: float = 1.0,
    eps: float = 1e-6,
    counted: Tensor | None = None,
    group: "ProcessGroup | None" = None,
) -> Tensor:
    r"""Where each loss stands between the smallest and the largest.

    .. math:: h_i = \delta\, \frac{(L_i - L_{\min}) - (L_{\max} - L_i)}{\max(L_{\max} - L_{\min}, \epsilon)}
        \in [-\delta, \delta]

    Args:
        losses: ``(M,)``; no gradient flows into them.
        delta: Half the width of the interval, above 0.
        eps: Floor of the range, above 0. Losses that are all equal stand at 0.
        counted: bool ``(M,)``, which losses count; ``None`` for all. What comes out for the others has no meaning.
        group: Ranks whose losses count too, each with its own; ``None``: these losses are all there are.

    Returns:
        ``h``, ``(M,)`` float32. Both differences are exact where losses are close, so that a tiny range does not cancel
        as :math:`2 L_i - (L_{\max} + L_{\min})` does.

    Example:
        >>> normalize_losses(torch.tensor([1.0, 2.0, 5.0]))
        tensor([-1.0000, -0.5000,  1.0000])

    """
    losses = losses.detach().float()
    low, high = losses, losses
    if counted is not None:
        low, high = losses.masked_fill(~counted, math.inf), losses.masked_fill(~counted, -math.inf)
    ends = torch.stack([-low.min(), high.max()])
    ends = ends if group is None else all_reduce_max(ends, group)
    smallest, largest = -ends[0], ends[1]
    return delta * ((losses - smallest) - (largest - losses)) / (largest - smallest).clamp(min=eps)


def apply_strategy(h: Tensor, strategy: Strategy, delta: float = 1.0) -> Tensor:
    r"""What a loss is worth by its place ``h`` between the smallest and the largest.

    .. math:: f = \min(h + \delta, \delta) \;\text{(linupper)}, \quad 1 - h^2/\delta^2 \;\text{(quadratic)},
        \quad |h| \;\text{(extremes)}, \quad 0 \;\text{(uniform)}

    Args:
        h: ``(M,)`` in [-delta, delta], see :func:`normalize_losses`.
        strategy: The shape. ``"linupper"`` rises from 0 at the smallest loss to ``delta`` in the middle of the range
            (which is not the median) and stays there.
        delta: Half the width of the interval.

    Returns:
        ``f``, ``(M,)``.

    Raises:
        ValueError: If the strategy is none of these.

    Example:
        >>> apply_strategy(torch.tensor([-1.0, -0.5, 0.0, 1.0]), "linupper")
        tensor([0.0000, 0.5000, 1.0000, 1.0000])

    """
    if strategy == "linupper":
        return (h + delta).clamp(max=delta)
    if strategy == "quadratic":
        return 1.0 - (h / delta).square()
    if strategy == "extremes":
        return h.abs()
    if strategy == "uniform":
        return torch.zeros_like(h)
    raise ValueError(
        f"apply_strategy: `strategy` must be 'linupper', 'quadratic', 'extremes' or 'uniform', got {strategy!r}."
    )


def weighted_loss(losses: Tensor, weights: Tensor, counts: Tensor | None = None, world_size: int = 1) -> Tensor:
    r"""The loss to go backward from on one rank; the mean over the ranks is the objective of the global batch.

    .. math:: W \sum_i w_i L_i \quad\text{or, with counts,}\quad W b \sum_i w_i \frac{n_i}{\sum_j n_j} L_i

    Args:
        losses: Losses of this rank's samples, ``(B,)`` with gradient.
        weights: Their weights ``(B,)``, which sum to 1 over all ranks.
        counts: Numbers of tokens ``n``, ``(B,)``: samples count by their share of the rank's tokens, as they do in a
            mean over tokens; ``None``: by their weight alone. ``b`` is the number of samples with a token.
        world_size: Number of ranks ``W`` whose gradients are averaged.

    Returns:
        A scalar. With uniform weights and ranks of equal size it is the mean over samples or, with counts, over tokens.

    """
    weights = weights.detach() * world_size
    if counts is None:
        return (weights * losses).sum()
    return (counts > 0).sum() * (weights * losses * counts).sum() / counts.sum().clamp(min=1)


def weights_in_mean(weights: Tensor, mass: Tensor | None, objective: Objective, world_size: int) -> Tensor:
    r"""Factors of the losses under a mean, for :func:`weighted_loss` to come out of the user's own reduction.

    .. math:: W M w_i \;\text{(token\_share)}, \qquad W \textstyle\sum_j m_j\, w_i / m_i \;\text{(sample\_mean)}

    Args:
        weights: Weights ``(M,)`` of this rank's samples, which sum to 1 over all ranks.
        mass: What each sample counts in the mean, m, ``(M,)``; ``None`` where all count the same. M is the number of
            samples with a mass above 0.
        objective: Whether samples keep their share of the mean, or count by their weight alone.
        world_size: Number of ranks W whose gradients are averaged.

    Returns:
        Factors ``(M,)``.

    """
    if mass is None:
        return weights * (world_size * len(weights))
    counted = mass > 0
    if objective == "token_share":
        return weights * (world_size * counted.sum())
    return weights * (world_size * mass.sum()) / torch.where(counted, mass, 1.0)


def sequence_losses(
    logits: Tensor, labels: Tensor, ignore_index: int = -100, shift: bool = True
) -> tuple[Tensor, Tensor]:
    r"""Mean cross-entropy of each sequence.

    .. math:: L_i = \frac{1}{n_i} \sum_{t:\ y_{it} \ne \text{ignore\_index}} -\log p_{it}(y_{it})

    Args:
        logits: ``(B, T, V)``.
        labels: ``(B, T)`` int64.
        ignore_index: Label of positions that do not count.
        shift: Whether the logits at ``t`` predict the label at ``t + 1``.

    Returns:
        Losses ``(B,)`` float32 with gradient, 0 where no position counts, and the number of counted positions ``n``,
        ``(B,)`` int64, after the shift.

    """
    if shift:  # the labels move, because slicing the logits would copy them
        labels = F.pad(labels[:, 1:], (0, 1), value=ignore_index)
    flat = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=ignore_index, reduction="none")
    counts = (labels != ignore_index).sum(1)
    return flat.reshape(labels.shape).sum(1) / counts.clamp(min=1), counts


def scheduled_temperature(
    step: int, r: float, r_start: float, num_steps: int, schedule: Literal["constant", "linear", "cosine"]
) -> float:
    r"""Temperature on its way from ``r_start`` to ``r``.

    .. math:: r + (r_\text{start} - r)\,(1 - s) \;\text{(linear)}, \quad
        r + (r_\text{start} - r)\,\tfrac12 (1 + \cos \pi s) \;\text{(cosine)}, \qquad s = \min(\text{step} / N, 1)

    Args:
        step: Steps since the way began; before it, the temperature is ``r_start``.
        r: Temperature at the end.
        r_start: Temperature at the beginning.
        num_steps: Length ``N`` of the way.
        schedule: Its shape; ``"constant"`` is at the end from the beginning.

    Returns:
        The temperature.

    """
    if step < 0:
        return r_start
    if schedule == "constant" or step >= num_steps:
        return r
    way = step / num_steps
    return r + (r_start - r) * (1 - way if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * way)))
