"""Which samples are in which group."""

import torch
from torch import Tensor

__all__ = ["group_membership"]


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
