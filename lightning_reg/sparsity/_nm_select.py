"""The N largest of each M consecutive numbers, as fast as memory allows.

All by comparisons of integers: the bits of non-negative floats order as the floats do. Strided columns of the groups
are compared, so there are no more comparisons than pairs that matter; a table turns the answers of a group into the M
bytes of its mask, written as one word. On the CPU the work is done in pieces that stay in the cache.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

__all__ = ["select_largest"]

# Elements: the working memory of a piece takes 5 bytes for each.
_PIECE = 1 << 18


def select_largest(flat: Tensor, kept: Tensor, n: int, m: int) -> None:
    """Marks the N largest magnitudes of each M consecutive elements, of equal ones the first.

    Args:
        flat: Contiguous values, as many as a multiple of M.
        kept: bool of the same length, filled.
        n: Elements to mark in each group, from 1 to ``m - 1``.
        m: Length of a group.

    """
    piece = flat.numel() if flat.device.type != "cpu" else max(_PIECE // m, 1) * m
    select = _selector(n, m, flat.device.type)
    for start in range(0, flat.numel(), max(piece, 1)):
        part = flat[start : start + piece]
        part = part if part.dtype in (torch.float32, torch.float64) else part.float()
        keys = part.abs().view(torch.int32 if part.dtype is torch.float32 else torch.int64)
        select(keys, kept[start : start + piece])


def _selector(n: int, m: int, device: str) -> Callable[[Tensor, Tensor], None]:
    if m in (2, 4):
        return partial(_by_pairs, n=n, m=m)
    if n == 1 and m % 8 == 0 and m & (m - 1) == 0:
        return partial(_by_tournament, m=m)
    if m <= 16:
        return partial(_by_counting, n=n, m=m)
    return partial(_by_sort if device != "cpu" else _by_threshold, n=n, m=m)


def _by_pairs(keys: Tensor, kept: Tensor, n: int, m: int) -> None:
    columns = keys.view(-1, m).unbind(1)
    code: Tensor | None = None
    for bit, (i, j) in enumerate(_pairs(m)):
        wins = (columns[i] >= columns[j]).view(torch.uint8)
        code = wins if code is None else code.add_(wins, alpha=1 << bit)
    if code is not None:
        words = _words_by_code(n, m, keys.device)
        torch.index_select(words, 0, code.int(), out=kept.view(words.dtype))


def _pairs(m: int) -> list[tuple[int, int]]:
    return [(i, j) for j in range(m) for i in range(j)]


@cache
def _words_by_code(n: int, m: int, device: torch.device) -> Tensor:
    """For every set of answers "is i at least j" (i before j) the bytes of the mask, as one integer."""
    pairs = _pairs(m)
    words = []
    for code in range(1 << len(pairs)):
        lost = [0] * m
        for bit, (i, j) in enumerate(pairs):
            lost[j if code >> bit & 1 else i] += 1
        words.append(sum(1 << (8 * i) for i in range(m) if lost[i] < n))
    with torch.inference_mode(False):
        return torch.tensor(words, dtype=torch.int32 if m == 4 else torch.int16, device=device)


def _by_tournament(keys: Tensor, kept: Tensor, m: int) -> None:
    """The largest of each group: halves of eight, pairwise, then the winners of the eights among themselves."""
    answers = []
    best = keys
    for _ in range(3):
        left, right = best[0::2], best[1::2]
        answers.append((left >= right).view(torch.uint8))
        best = torch.maximum(left, right)
    pairs, fours, eights = answers
    # Four answers about pairs, two about fours, one about eights: 7 bits in three bytes of different length per group.
    code = eights.mul_(64)
    for bit, answer in enumerate((*pairs.view(-1, 4).unbind(1), *fours.view(-1, 2).unbind(1))):
        code.add_(answer, alpha=1 << bit)
    words = kept.view(torch.int64)
    torch.index_select(_words_of_winners(keys.device), 0, code.int(), out=words)
    if m > 8:
        winners = torch.empty(best.shape, dtype=torch.bool, device=best.device)
        _selector(1, m // 8, keys.device.type)(best, winners)
        words.mul_(winners)


@cache
def _words_of_winners(device: torch.device) -> Tensor:
    words = []
    for code in range(128):
        four = 0 if code & 64 else 1
        pair = 2 * four + (0 if code >> (4 + four) & 1 else 1)
        words.append(1 << (8 * (2 * pair + (0 if code >> pair & 1 else 1))))
    with torch.inference_mode(False):
        return torch.tensor(words, dtype=torch.int64, device=device)


def _by_counting(keys: Tensor, kept: Tensor, n: int, m: int) -> None:
    """How many are larger, for each place in the group; (M - 1) / 2 comparisons per weight."""
    columns, mask = keys.view(-1, m).unbind(1), kept.view(-1, m)
    larger = torch.arange(m - 1, -1, -1, dtype=torch.uint8, device=keys.device)[:, None].repeat(1, len(mask))
    for i, j in _pairs(m):
        wins = (columns[i] >= columns[j]).view(torch.uint8)
        larger[j] += wins
        larger[i] -= wins
    for j in range(m):
        torch.lt(larger[j], n, out=mask[:, j])


def _by_threshold(keys: Tensor, kept: Tensor, n: int, m: int) -> None:
    """All at least as large as the n-th; where ties leave more than n, these groups are sorted."""
    groups, mask = keys.view(-1, m), kept.view(-1, m)
    threshold = groups.topk(n, dim=1).values[:, -1:]
    torch.ge(groups, threshold, out=mask)
    (tied,) = (mask.sum(1) > n).nonzero(as_tuple=True)
    if len(tied):
        rows = torch.empty((len(tied), m), dtype=torch.bool, device=keys.device)
        _by_sort(groups[tied].view(-1), rows.view(-1), n, m)
        mask[tied] = rows


def _by_sort(keys: Tensor, kept: Tensor, n: int, m: int) -> None:
    order = keys.view(-1, m).sort(dim=1, descending=True, stable=True).indices
    kept.zero_().view(-1, m).scatter_(1, order[:, :n], True)
