"""The formulas of group distributionally robust optimization, for any training loop."""

import torch
from torch import Tensor

from lightning_reg.reweighting._group_losses import (
    group_ascent,
    group_draws,
    group_losses,
    group_sample_weights,
    worst_group_weights,
)

__all__ = [
    "group_ascent",
    "group_draws",
    "group_losses",
    "group_membership",
    "group_sample_weights",
    "worst_group_weights",
]


def group_membership(groups: Tensor, num_groups: int) -> Tensor:
    """Which samples are in which group, float32 ``(B, G)``.

    Args:
        groups: Group of each sample, ``(B,)`` whole numbers, negative for a sample of no group; or bool ``(B, G)``,
            where groups overlap.
        num_groups: G.

    Returns:
        1 where a sample is in a group, else 0.

    Raises:
        ValueError: If ``groups`` is of another shape or type.

    """
    if groups.dtype == torch.bool and groups.dim() == 2 and groups.shape[1] == num_groups:
        return groups.float()
    if groups.dim() != 1 or groups.is_floating_point() or groups.dtype == torch.bool:
        raise ValueError(
            f"groups must be whole numbers (B,), or bool (B, {num_groups}) where groups overlap; they are"
            f" {groups.dtype} {tuple(groups.shape)}."
        )
    return (groups[:, None] == torch.arange(num_groups, device=groups.device)).float()
