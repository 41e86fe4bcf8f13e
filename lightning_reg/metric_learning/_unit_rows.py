"""Rows on the unit sphere."""

import torch
from torch import Tensor

__all__ = ["unit_rows"]


def unit_rows(features: Tensor) -> Tensor:
    """Rows divided by their norms.

    Args:
        features: ``(n, ...)``, flattened per row.

    Returns:
        ``(n, D)``, float32 at least; a row of zeros stays one, without gradient.

    """
    flat = features.flatten(1).to(torch.promote_types(features.dtype, torch.float32))
    norms = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    # A row of zeros has no direction: it stays 0 and gets no gradient, where dividing by a floor would give 1e12 of it.
    there = norms > 1e-12
    return torch.where(there, flat, 0.0) / torch.where(there, norms, 1.0)
