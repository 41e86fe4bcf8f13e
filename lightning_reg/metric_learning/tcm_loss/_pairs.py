"""Pairs of many rows, block by block: order statistics of their cosines, and how many a threshold accepts."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Rows", "accepted", "first_pass", "negatives_at"]

_ENTRIES = 2**20  # of a block: 4 MiB of float32
_HALF = 2**16
_SLACK = 1e-6  # the first look for accepted pairs compares in float32, the second one exactly


class Rows(NamedTuple):
    """Unit rows ``(n, D)`` float32 in the order of their classes, each one's class ``(n,)`` from 0 on."""

    z: Tensor
    codes: Tensor
    sizes: Tensor  # (T,): rows of each class

    @property
    def positives(self) -> Tensor:
        """Pairs within each class, ``(T,)``."""
        return self.sizes * (self.sizes - 1) // 2

    @property
    def negatives(self) -> Tensor:
        """Pairs with one end in each class, ``(T,)``."""
        return self.sizes * (len(self.z) - self.sizes)


class _Block(NamedTuple):
    """Pairs of some rows with some that follow; without masks all are of two classes."""

    start: int
    left: int
    cosines: Tensor  # (rows from `start` on, rows from `left` on)
    positive: Tensor | None = None
    negative: Tensor | None = None

    @property
    def negatives(self) -> Tensor:
        """Cosines of the pairs of two classes, in a row."""
        return self.cosines.flatten() if self.negative is None else self.cosines[self.negative]


def _blocks(rows: Rows) -> Iterator[_Block]:
    """All pairs, each once: tiles that fit a processor's cache, never the square table of all."""
    count, height = len(rows.z), max(1, math.isqrt(_ENTRIES) // 2)
    width = max(1, _ENTRIES // height)
    starts = range(0, count, height)
    last = torch.arange(height, count + height, height, device=rows.codes.device).clamp(max=count) - 1
    edges = rows.sizes.cumsum(0)[rows.codes[last]].tolist()  # behind the class of the last row: other classes alone
    for start, edge in zip(starts, edges, strict=True):
        some, codes = rows.z[start : start + height], rows.codes[start : start + height, None]
        for left in range(start, edge, width):
            right = min(left + width, edge)
            cosines = some @ rows.z[left:right].T  # the same numbers in every pass
            place = torch.arange(left, right, device=cosines.device)
            later = place > torch.arange(start, start + len(some), device=cosines.device)[:, None]
            same = codes == rows.codes[left:right]
            yield _Block(start, left, cosines, later & same, later & ~same)
        for left in range(edge, count, width):
            yield _Block(start, left, some @ rows.z[left : left + width].T)


def first_pass(rows: Rows) -> tuple[Tensor, Tensor]:
    """Which rows have their most similar other row in their own class, and where the cosines of negatives lie.

    Args:
        rows: The rows.

    Returns:
        bool ``(n,)``, a tie with another class being none; and the number of negatives by the upper half of their
        cosine's bits, ``(65536,)`` in the order of the cosines.

    """
    nearest = rows.z.new_full((2, len(rows.z)), -torch.inf)
    counts = torch.zeros(_HALF, dtype=torch.int64, device=rows.z.device)
    for block in _blocks(rows):
        cosines = block.cosines
        if block.positive is not None:
            _keep_nearest(nearest[0], block, cosines.masked_fill(~block.positive, -torch.inf))
        if block.negative is not None:
            cosines = cosines.masked_fill(~block.negative, -torch.inf)
        _keep_nearest(nearest[1], block, cosines)
        counts += torch.bincount(_upper(_bits(block.negatives)), minlength=_HALF)
    return nearest[0] > nearest[1], counts


def _keep_nearest(nearest: Tensor, block: _Block, cosines: Tensor) -> None:
    own, others = (nearest[first : first + size] for first, size in zip(block[:2], cosines.shape, strict=True))
    torch.maximum(others, cosines.amax(0), out=others)
    torch.maximum(own, cosines.amax(1), out=own)


def negatives_at(rows: Rows, ranks: Sequence[int], counts: Tensor) -> Tensor:
    """Cosines of negatives by their rank among all, 0 for the least: exact, in one more pass.

    Args:
        rows: The rows.
        ranks: The ranks.
        counts: From :func:`first_pass`.

    Returns:
        float64, as many as ranks.

    """
    wanted = torch.tensor(ranks, device=counts.device)
    ends = counts.cumsum(0)
    bins = torch.searchsorted(ends, wanted, right=True)
    within = wanted - (ends - counts)[bins]
    distinct, position = bins.unique(return_inverse=True)  # type: ignore[no-untyped-call]  # torch's
    lower = torch.zeros(len(distinct), _HALF, dtype=torch.int64, device=counts.device)
    for block in _blocks(rows):
        bits = _bits(block.negatives)
        upper = _upper(bits)
        for number, one in enumerate(distinct):
            lower[number] += torch.bincount(bits[upper == one] & (_HALF - 1), minlength=_HALF)
    low = torch.searchsorted(lower.cumsum(1)[position], within[:, None], right=True)[:, 0]
    bits = ((bins - _HALF // 2) * _HALF + low).to(torch.int32)
    return _in_order(bits).view(torch.float32).double()


def accepted(rows: Rows, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """How many pairs have a cosine of at least each threshold.

    Args:
        rows: The rows.
        thresholds: ``(K,)`` float64, falling.

    Returns:
        Pairs within each class, and pairs with one end in it: ``(T, K)`` int64.

    """
    width = len(thresholds) + 1  # the last column has those that no threshold accepts
    rising = thresholds.flip(0).contiguous()
    size, codes = len(rows.sizes) * width, rows.codes * width
    positives, negatives = torch.zeros(2, size, dtype=torch.int64, device=rows.z.device)
    loosest = float(rising[0]) - _SLACK

    def columns(block: _Block, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Where each pair is counted, for the class of one end and of the other: the column of its first threshold."""
        one, two = pairs.nonzero(as_tuple=True)
        column = width - 1 - torch.searchsorted(rising, block.cosines[one, two].double(), right=True)
        return codes[block.start + one] + column, codes[block.left + two] + column

    for block in _blocks(rows):
        near = block.cosines >= loosest
        if block.positive is not None:
            positives += torch.bincount(columns(block, near & block.positive)[0], minlength=size)
        for places in columns(block, near if block.negative is None else near & block.negative):
            negatives += torch.bincount(places, minlength=size)
    return _columns(positives, width), _columns(negatives, width)


def _columns(counts: Tensor, width: int) -> Tensor:
    return counts.reshape(-1, width)[:, :-1].cumsum(1)


def _bits(cosines: Tensor) -> Tensor:
    """The numbers' bits as whole numbers of the same order."""
    return _in_order(cosines.view(torch.int32))


def _in_order(bits: Tensor) -> Tensor:
    # Of negative numbers all bits but the sign are turned; done twice it is undone.
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _upper(bits: Tensor) -> Tensor:
    return (bits >> 16) + _HALF // 2
