"""Random bits that belong to the rows of the global batch, whichever rank holds them and whatever device draws them.

A counter-based generator: a bit is a hash of (seed, row, position), as in splitmix64 (Steele, Lea and Flood, "Fast
splittable pseudorandom number generators", OOPSLA 2014), so a rank draws for its own rows alone and there is no state.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_reg.engine.host import distributed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["global_rows", "keep_mask", "normals", "uniforms"]

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def global_rows(count: int, device: torch.device, group: "ProcessGroup | None" = None) -> Tensor:
    """Numbers of this rank's rows in the batch of all ranks, ``(count,)`` int64: the ranks' rows lie in turns."""
    ranks, rank = (1, 0) if group is None else (distributed.world_size(group), distributed.rank(group))
    return rank + ranks * torch.arange(count, device=device)


def keep_mask(seed: int, rows: Tensor, copies: range, shape: Sequence[int], p: float) -> Tensor:
    """Independent draws that are True with probability ``1 - p``.

    Args:
        seed: Of the step and of the layer.
        rows: Numbers of the rows ``(B,)`` int64.
        copies: Numbers of the copies of each row, K of them.
        shape: Shape of a row's own draws.
        p: Probability of False, in [0, 1), rounded to a multiple of 2^-32.

    Returns:
        bool ``(K, B, *shape)`` on the device of ``rows``.

    """
    count = math.prod(shape)
    words = -(-count // 2)  # a word of 64 bits serves two draws
    keys = _mixed(rows * _signed(_GOLDEN) + _signed(seed))
    numbers = torch.arange(
        copies.start, copies.stop, copies.step, device=rows.device
    )  # made there: no copy to wait for
    counters = numbers[:, None] * words + torch.arange(words, device=rows.device) + 1
    bits = _mixed(keys[:, None] + counters[:, None, :] * _signed(_GOLDEN)).view(torch.int32)[..., :count]
    threshold = min(round(p * 2**32) - 2**31, 2**31 - 1)
    return (bits >= threshold).reshape(len(copies), len(rows), *shape)


def uniforms(seed: int, rows: Tensor) -> Tensor:
    """One number for each row, uniform over the multiples of 2^-24 in [0, 1).

    Args:
        seed: Of the step and of what is drawn.
        rows: Numbers of the rows ``(B,)`` int64.

    Returns:
        float32 ``(B,)`` on the device of ``rows``.

    """
    bits = _mixed(_mixed(rows * _signed(_GOLDEN) + _signed(seed)) + _signed(_GOLDEN))
    return ((bits >> 40) & (2**24 - 1)).float() * 2**-24


def normals(seed: int, rows: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Independent draws of the standard normal distribution, a set for each row (Box and Muller, 1958).

    Args:
        seed: Of what is drawn.
        rows: Numbers of the rows ``(B,)`` int64.
        shape: Shape of a row's own draws.
        dtype: Of the result.

    Returns:
        ``(B, *shape)`` on the device of ``rows``.

    """
    count = math.prod(shape)
    counters = torch.arange(-(-count // 2), device=rows.device) + 1  # a word of 64 bits serves two draws
    bits = _mixed(_mixed(rows * _signed(_GOLDEN) + _signed(seed))[:, None] + counters * _signed(_GOLDEN))
    high, low = (((half & (2**32 - 1)).double() + 0.5) * 2**-32 for half in (bits >> 32, bits))
    radius, angle = (-2 * high.log()).sqrt(), 2 * math.pi * low
    both = torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(1)
    return both[:, :count].reshape(len(rows), *shape).to(dtype)


def _mixed(z: Tensor) -> Tensor:
    # Shifts of int64 keep the sign, so the bits shifted in are masked off. Products wrap.
    z = (z ^ ((z >> 30) & (2**34 - 1))) * _signed(_FIRST)
    z = (z ^ ((z >> 27) & (2**37 - 1))) * _signed(_SECOND)
    return z ^ ((z >> 31) & (2**33 - 1))


def _signed(word: int) -> int:
    return (word + 2**63) % 2**64 - 2**63
