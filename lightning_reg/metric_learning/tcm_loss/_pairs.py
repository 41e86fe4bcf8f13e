"""Pairs of many rows, block by block: order statistics of their cosines, and how many a threshold accepts."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Rows", "accepted", "first_pass", "negatives_at"]

_ENTRIES = 2**22  # of a block: 16 MiB of float32
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
    start: int
    stop: int
    cosines: Tensor  # (stop - start, n - start)
    positive: Tensor
    negative: Tensor


def _blocks(rows: Rows) -> Iterator[_Block]:
    """All pairs, each once: some rows with those that follow, never the square table of all."""
    start, count = 0, len(rows.z)
    while start < count:
        stop = min(count, start + max(1, _ENTRIES // (count - start)))
        cosines = rows.z[start:stop] @ rows.z[start:].T  # the same numbers in every pass
        place = torch.arange(count - start, device=cosines.device)
        later = place > place[: stop - start, None]
        same = rows.codes[start:stop, None] == rows.codes[start:]
        yield _Block(start, stop, cosines, later & same, later & ~same)
        start = stop


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
        for best, pairs in zip(nearest, (block.positive, block.negative), strict=True):
            cosines = block.cosines.masked_fill(~pairs, -torch.inf)
            own, others = best[block.start : block.stop], best[block.start :]
            torch.maximum(others, cosines.amax(0), out=others)
            torch.maximum(own, cosines.amax(1), out=own)
        counts += torch.bincount(_upper(_bits(block.cosines[block.negative])), minlength=_HALF)
    return nearest[0] > nearest[1], counts


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
    lower = torch.zeros(len(ranks), _HALF, dtype=torch.int64, device=counts.device)
    for block in _blocks(rows):
        bits = _bits(block.cosines[block.negative])
        upper = _upper(bits)
        for number, one in enumerate(bins):
            lower[number] += torch.bincount(bits[upper == one] & (_HALF - 1), minlength=_HALF)
    low = torch.searchsorted(lower.cumsum(1), within[:, None], right=True)[:, 0]
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
    size = len(rows.sizes) * width
    positives, negatives = torch.zeros(2, size, dtype=torch.int64, device=rows.z.device)
    loosest = float(rising[0]) - _SLACK
    for block in _blocks(rows):
        near = block.cosines >= loosest
        inside, across = ((pairs & near).nonzero(as_tuple=True) for pairs in (block.positive, block.negative))
        for counts, (one, two), ends in ((positives, inside, [0]), (negatives, across, [0, 1])):
            # Column k: accepted from threshold k on.
            column = width - 1 - torch.searchsorted(rising, block.cosines[one, two].double(), right=True)
            for end in ends:
                codes = rows.codes[(one, two)[end] + block.start]
                counts.add_(torch.bincount(codes * width + column, minlength=size))
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
