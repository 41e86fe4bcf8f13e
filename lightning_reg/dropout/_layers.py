"""Dropout as each of torch's modules does it, with masks that are drawn elsewhere."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["ALPHA", "drop", "kind_of", "mask_shape"]

ALPHA = -1.7580993408473766  # the value of dropped elements: minus SELU's scale times its alpha

# Modules with the number of dimensions of a batch; None where any will do.
_KINDS: dict[type[nn.Module], tuple[int, ...] | None] = {
    nn.Dropout: None,
    nn.Dropout1d: (3,),
    nn.Dropout2d: (3, 4),
    nn.Dropout3d: (5,),
    nn.AlphaDropout: None,
    nn.FeatureAlphaDropout: None,
}
_ELEMENTWISE, _ALPHA = (nn.Dropout, nn.AlphaDropout), (nn.AlphaDropout, nn.FeatureAlphaDropout)


def kind_of(layer: nn.Module) -> type[nn.Module] | None:
    """The dropout module of torch whose ``forward`` the layer runs, ``None`` if it is none of these."""
    return next((kind for kind in _KINDS if type(layer).forward is kind.forward), None)


def mask_shape(kind: type[nn.Module], shape: Sequence[int]) -> tuple[int, ...] | None:
    """Shape of a row's draws: of its elements, or of its channels.

    Args:
        kind: One of torch's dropout modules.
        shape: ``(B, ...)``.

    Returns:
        The shape, which broadcasts to the row; ``None`` where the module takes no such input for a batch.

    """
    dims = _KINDS[kind]
    if not shape or (dims is not None and len(shape) not in dims):
        return None
    return tuple(shape[1:]) if kind in _ELEMENTWISE else (*shape[1:2], *(1 for _ in shape[2:]))


def drop(kind: type[nn.Module], h: Tensor, keep: Tensor, p: float) -> Tensor:
    r"""Dropout with given masks.

    .. math:: h\,m / (1 - p) \quad\text{or, for alpha dropout,}\quad a\,(h\,m + \alpha' (1 - m)) + b

    with :math:`a = ((1 - p)(1 + p \alpha'^2))^{-1/2}` and :math:`b = -a \alpha' p`, which keep mean 0 and variance 1.

    Args:
        kind: One of torch's dropout modules.
        h: Features, broadcast to ``keep``.
        keep: Masks ``m``, bool.
        p: Drop rate, in [0, 1).

    Returns:
        In the type of ``h``.

    """
    if kind in _ALPHA:
        a = ((1 - p) * (1 + p * ALPHA**2)) ** -0.5
        alpha: Tensor = torch.where(keep, h, ALPHA) * a - a * ALPHA * p
        return alpha
    # The features are scaled before they are spread over the copies, and what backward keeps is the bool mask.
    dropped: Tensor = torch.where(keep, h * (1 / (1 - p)), 0.0)
    return dropped
