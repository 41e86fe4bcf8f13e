"""Weights of samples, whatever they come from: a cap, and what is told of them."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_reg.engine.host.distributed import all_gather_padded, all_reduce_max, all_reduce_sum, rank

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["cap_weights", "weight_statistics"]


def cap_weights(
    weights: Tensor, max_weight: float, counted: Tensor | None = None, group: "ProcessGroup | None" = None
) -> Tensor:
    r"""Weights of which none is above ``max_weight / M``; what is cut off goes to the others in proportion.

    .. math:: w_i \leftarrow \min(c\, w_i,\ \text{max\_weight} / M), \quad c \ge 1 \text{ such that } \sum_i w_i = 1

    Weights below the cap keep their ratios. For weights of a softmax this is the solution of the softmax's own problem
    (scores against divergence from uniform) under the constraint.

    Args:
        weights: ``(M,)``, at least 0, with sum 1.
        max_weight: Cap in units of 1/M, at least 1 (which gives uniform weights).
        counted: bool ``(M,)``, which samples count in M; ``None`` for all.
        group: Ranks whose weights count too, for one host sync; ``None``: these weights are all.

    Returns:
        Weights ``(M,)`` with sum 1, or less only if fewer than M / max_weight of them are above 0.

    Example:
        >>> cap_weights(torch.tensor([0.7, 0.2, 0.1]), max_weight=1.5)
        tensor([0.5000, 0.3333, 0.1667])

    """
    if group is not None:
        everyone, real = all_gather_padded(weights, group)
        if counted is not None:
            real = all_gather_padded(counted.float(), group)[0] > 0
        capped = cap_weights(everyone.flatten(), max_weight, real.flatten())
        return capped.reshape(everyone.shape)[rank(group), : len(weights)]
    size = weights.new_tensor(len(weights)) if counted is None else counted.sum().to(weights.dtype)
    cap = max_weight / size.clamp(min=1)
    descending = weights.sort(descending=True).values
    # With the k largest at the cap, the rest shares 1 - k cap; k is the least for which the next one fits under it.
    rest = descending.flip(0).cumsum(0).flip(0)
    scales = (1 - torch.arange(len(weights), device=weights.device) * cap) / rest.clamp(
        min=torch.finfo(rest.dtype).tiny
    )
    fits = descending * scales <= cap * (1 + 1e-6)
    scale = scales.gather(0, fits.int().argmax(0, keepdim=True))
    return torch.minimum(weights * scale, cap)


def weight_statistics(
    weights: Tensor, losses: Tensor, counted: Tensor | None = None, group: "ProcessGroup | None" = None
) -> dict[str, Tensor]:
    r"""What to log of weights that sum to 1.

    Args:
        weights: ``(M,)``, with sum 1.
        losses: Losses of the samples, ``(M,)``.
        counted: bool ``(M,)``, which samples count; ``None`` for all. The others have weight 0.
        group: Ranks whose samples count too; ``None``: these are all.

    Returns:
        Scalars: ``samples`` M; ``effective_samples`` :math:`1 / \sum_i w_i^2`; ``max_weight`` in units of 1/M;
        ``small_weights``, the share of samples with less than 0.1/M; ``loss_weighted`` :math:`\sum_i w_i L_i` and
        ``loss_unweighted`` :math:`\sum_i L_i / M`.

    """
    weights, losses = weights.detach(), losses.detach()
    real = torch.ones_like(weights) if counted is None else counted.to(weights.dtype)
    sums = torch.stack([real.sum(), weights.square().sum(), (weights * losses).sum(), (real * losses).sum()])
    largest = weights.max()
    if group is not None:
        sums, largest = all_reduce_sum(sums, group), all_reduce_max(largest, group)
    samples, squares, weighted, unweighted = sums.unbind()
    small = (real * (weights < 0.1 / samples)).sum()
    return {
        "samples": samples,
        "effective_samples": 1 / squares,
        "max_weight": largest * samples,
        "small_weights": (small if group is None else all_reduce_sum(small, group)) / samples,
        "loss_weighted": weighted,
        "loss_unweighted": unweighted / samples,
    }
