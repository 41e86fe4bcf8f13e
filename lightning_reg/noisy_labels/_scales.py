"""Images, masks and scores in another size."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["resized", "scaled_size"]


def scaled_size(size: Sequence[int], scale: float, multiple_of: int = 1) -> tuple[int, int]:
    """Height and width at another scale, rounded down; to the nearest multiple where a network asks for one.

    Args:
        size: Height and width.
        scale: Factor, above 0.
        multiple_of: What both are multiples of, at least 1.

    Returns:
        Height and width, at least ``multiple_of``.

    """
    if multiple_of == 1:
        return max(1, int(size[0] * scale)), max(1, int(size[1] * scale))
    height, width = (max(1, round(side * scale / multiple_of)) * multiple_of for side in size)
    return height, width


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Images or scores in another size, bilinear with corners aligned; masks of classes by their nearest pixel.

    Args:
        maps: ``(B, C, H, W)`` floating, or ``(B, H, W)`` or ``(B, C, H, W)`` of integers.
        size: Height and width.

    Returns:
        The same at that size, with gradient where it is floating; itself if it has the size.

    """
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    if maps.is_floating_point():
        return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=True)
    rows, columns = (
        ((torch.arange(new, device=maps.device) + 0.5) * old / new).long()
        for new, old in zip(size, maps.shape[-2:], strict=True)
    )
    return maps[..., rows[:, None], columns]
