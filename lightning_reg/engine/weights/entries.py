"""Single entries of a weight, by their positions in the flat weight."""

import torch
from torch import Tensor

__all__ = ["entries_of", "positions_of", "write_entries_"]


def positions_of(mask: Tensor) -> Tensor:
    """Where a mask is true, ``(K,)``, rising; int32 where that is wide enough."""
    found = mask.flatten().nonzero()[:, 0]
    return found.to(torch.int32) if mask.numel() < 2**31 else found


def entries_of(tensor: Tensor, positions: Tensor) -> Tensor:
    """The entries at these positions, ``(K,)``."""
    return tensor.flatten().index_select(0, positions)


def write_entries_(tensor: Tensor, positions: Tensor, values: Tensor) -> None:
    """Writes entries, rounded to the tensor's type; all others stay as they are."""
    flat = tensor.flatten()  # a copy where the numbers lie in another order, as in channels_last
    flat.index_copy_(0, positions.long(), values.to(tensor.dtype))
    if not tensor.is_contiguous():
        tensor.copy_(flat.view_as(tensor))
