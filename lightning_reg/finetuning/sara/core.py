"""The formulas of SaRA, for any training loop."""

from collections.abc import Mapping, Sequence
from math import exp, inf

import torch
from torch import Tensor

__all__ = [
    "magnitude_threshold",
    "nuclear_norm",
    "pack_positions",
    "sara_learning_rate",
    "small_masks",
    "unpack_positions",
]


def small_masks(params: Mapping[str, Tensor], threshold: float) -> dict[str, Tensor]:
    r"""The entries that SaRA trains.

    .. math:: M = [\,|P| < \theta\,]

    Args:
        params: Trained weights by name, of any shapes.
        threshold: :math:`\theta`, one for all; compared in float32.

    Returns:
        A boolean mask of each, of its shape.

    Example:
        >>> small_masks({"w": torch.tensor([0.1, -0.3, 0.0, 0.2])}, 0.2)["w"]
        tensor([ True, False,  True, False])

    """
    return {name: value.detach().float().abs() < threshold for name, value in params.items()}


def magnitude_threshold(params: Sequence[Tensor], share: float) -> float:
    """The threshold below which a share of all entries lies, over all weights together.

    It is exact: bits of positive float32 numbers are ordered as these, so two histograms, of 16 and of 15 bits, find
    it, and no copy of all weights is made. Ties with the threshold are not below it.

    Args:
        params: Trained weights, of any shapes.
        share: Of the entries, in [0, 1].

    Returns:
        The threshold; infinity for all.

    Example:
        >>> magnitude_threshold([torch.tensor([4.0, -1.0]), torch.tensor([3.0, -2.0])], share=0.5)
        3.0

    """
    rank = round(share * sum(value.numel() for value in params))
    if rank >= sum(value.numel() for value in params):
        return inf
    high, below = _bin_of(sum(torch.bincount(_bits(v) >> 15, minlength=1 << 16).cpu() for v in params), rank)
    within = (bits[bits >> 15 == high] & 0x7FFF for bits in map(_bits, params))
    low, _ = _bin_of(sum(torch.bincount(bits, minlength=1 << 15).cpu() for bits in within), rank - below)
    return float(torch.tensor([high << 15 | low], dtype=torch.int32).view(torch.float32))


def _bits(value: Tensor) -> Tensor:
    return value.detach().float().abs().flatten().view(torch.int32)


def _bin_of(counts: Tensor | int, rank: int) -> tuple[int, int]:
    """The bin of the number of this rank, and how many numbers lie in those before it."""
    upto = torch.as_tensor(counts).cumsum(0)
    found = int(torch.searchsorted(upto, rank, right=True))
    return found, int(upto[found - 1]) if found else 0


def nuclear_norm(matrix: Tensor) -> Tensor:
    r"""The sum of singular values, with gradient :math:`UV^\top` of those that are not zero.

    Args:
        matrix: ``(n1, n2)``; computed in float32 at least.

    Returns:
        A scalar.

    Example:
        >>> nuclear_norm(torch.diag(torch.tensor([3.0, -4.0])))
        tensor(7.)

    """
    values = torch.linalg.svdvals(matrix.to(torch.promote_types(matrix.dtype, torch.float32)))
    least = torch.finfo(values.dtype).eps * max(matrix.shape) * values.detach().max()
    total: Tensor = (values * (values.detach() > least)).sum()
    return total


def sara_learning_rate(threshold: float) -> float:
    r"""The learning rate that the authors' code takes with Adam: :math:`10^{-3} e^{-350\,\theta}`.

    Args:
        threshold: :math:`\theta`.

    Returns:
        The learning rate.

    Example:
        >>> round(sara_learning_rate(2e-3), 6)
        0.000497

    """
    return 1e-3 * exp(-350 * threshold)


def pack_positions(positions: Tensor) -> Tensor:
    """Positions as steps from one to the next, of two bytes each.

    A code c in [0, 65534] goes c + 1 places on, to a position of the list; 65535 goes 65535 on, to none of the list.

    Args:
        positions: ``(K,)``, at least 0, rising.

    Returns:
        int16, ``(K,)`` and one more for 65,535 places without a position.

    Example:
        >>> pack_positions(torch.tensor([0, 1, 5]))
        tensor([0, 0, 3], dtype=torch.int16)

    """
    steps = positions.long().diff(prepend=positions.new_full((1,), -1, dtype=torch.int64)) - 1
    further = steps // _MARK
    codes = torch.full((len(steps) + int(further.sum()),), _MARK, dtype=torch.int64, device=positions.device)
    codes[torch.arange(len(steps), device=positions.device) + further.cumsum(0)] = steps % _MARK
    return torch.where(codes > 0x7FFF, codes - 0x10000, codes).to(torch.int16)


def unpack_positions(codes: Tensor) -> Tensor:
    """The positions that :func:`pack_positions` packed.

    Args:
        codes: int16.

    Returns:
        int64, ``(K,)``.

    Example:
        >>> unpack_positions(pack_positions(torch.tensor([7, 200_000])))
        tensor([     7, 200000])

    """
    steps = codes.long() & _MARK
    places = torch.where(steps == _MARK, steps, steps + 1).cumsum(0) - 1
    return places[steps != _MARK]


_MARK = 0xFFFF
