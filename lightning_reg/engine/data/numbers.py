"""Numbers of rows, in columns, free of Lightning."""

import torch
from torch import Tensor

__all__ = ["numbers"]


def numbers(values: Tensor) -> Tensor:
    """Numbers of rows, in columns.

    Args:
        values: ``(n,)``, ``(n, K)``, or a map for each row, ``(n, ..., H, W)``, which counts by its mean; one
            number is a row.

    Returns:
        ``(n, K)``, float32 at least.

    """
    dtype = torch.promote_types(values.dtype, torch.float32) if values.is_floating_point() else torch.float32
    values = values.to(dtype)
    if values.dim() > 2:
        return values.flatten(1).mean(1, keepdim=True)
    return values if values.dim() == 2 else values.reshape(-1, 1)
