"""Which N of M consecutive weights are kept, how the constraint comes in, channel orders, and masks in single bits."""

import math
from collections.abc import Callable
from functools import cache, partial
from itertools import combinations
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

__all__ = [
    "best_channel_permutation",
    "check_nm",
    "decay_factor",
    "nm_mask",
    "pack_mask",
    "pattern_at",
    "sparsify_weight",
    "unpack_mask",
]

# Elements that are selected from at a time on a CPU: the working memory takes 5 bytes for each.
_PIECE = 1 << 18


@torch.no_grad()
def nm_mask(weight: Tensor, n: int, m: int, dim: Literal["in", "out"] = "in") -> Tensor:
    r"""The N weights of largest magnitude in every group of M consecutive ones.

    .. math:: \Phi_i = \bigl[\,\#\{j \in g(i) : |w_j| > |w_i| \text{ or } (|w_j| = |w_i|,\ j < i)\} < N\,\bigr]

    Of equal magnitudes the one that comes first in the group is kept, on every device and in every layout. Half
    precision is ranked exactly (as float32); NaN counts as larger than any number. Groups never reach into another row.

    Args:
        weight: ``(out, in)``, or ``(out, in, *kernel)`` of a convolution. Read only.
        n: Weights kept in each group, from 1 to ``m``.
        m: Length of a group.
        dim: ``"in"``: groups along the reduction dimension (input features; input channels at a fixed kernel position).
            ``"out"``: along output features or channels.

    Returns:
        bool, shape and memory layout of ``weight``: exactly ``n`` true in each group.

    Raises:
        ValueError: If the pattern is impossible, or the dimension is not a multiple of ``m``.

    Example:
        >>> nm_mask(torch.tensor([[1.0, -3.0, 2.0, 0.0]]), n=2, m=4)
        tensor([[False,  True,  True, False]])

    """
    grouped = _grouped(weight, n, m, dim)
    if n == m:
        return torch.ones_like(weight, dtype=torch.bool)
    kept = torch.empty(grouped.shape, dtype=torch.bool, device=weight.device)
    _select_largest(grouped.reshape(-1), kept.view(-1), n, m)
    back = kept.movedim(-1, _axis(dim))
    mask = torch.empty_like(weight, dtype=torch.bool)
    return back if back.stride() == mask.stride() else mask.copy_(back)


def check_nm(weight: Tensor, n: int, m: int, dim: Literal["in", "out"] = "in") -> int:
    """Number of groups with more than N non-zero weights.

    Args:
        weight: ``(out, in)`` or ``(out, in, *kernel)``.
        n: Weights allowed in each group.
        m: Length of a group.
        dim: As in :func:`nm_mask`.

    Returns:
        Violations; 0 if the weight has the pattern.

    Raises:
        ValueError: If the pattern is impossible, or the dimension is not a multiple of ``m``.

    Example:
        >>> check_nm(torch.tensor([[0.0, 1.0, 2.0, 0.0], [1.0, 1.0, 1.0, 0.0]]), n=2, m=4)
        1

    """
    return int((_grouped(weight, n, m, dim).reshape(-1, m).count_nonzero(1) > n).sum())


def _grouped(weight: Tensor, n: int, m: int, dim: str) -> Tensor:
    """The weight with the grouped dimension last, checked."""
    if dim not in ("in", "out"):
        raise ValueError(f"`dim` must be 'in' or 'out', got {dim!r}.")
    if not 1 <= n <= m:
        raise ValueError(f"`n` must be in [1, m], got n={n}, m={m}.")
    if weight.dim() < 2 or weight.shape[_axis(dim)] % m:
        raise ValueError(
            f'Groups of {m} do not fit a weight of shape {tuple(weight.shape)} along dim="{dim}": its length there must'
            f" be a multiple of {m}."
        )
    return weight.detach().movedim(_axis(dim), -1)


def _axis(dim: str) -> int:
    return 1 if dim == "in" else 0


def sparsify_weight(weight: Tensor, mask: Tensor, factor: float = 0.0, lambda_w: float = 0.0) -> Tensor:
    r"""Effective weight, with the straight-through gradient.

    .. math:: W_\text{eff} = W \odot (\Phi + D\,(1 - \Phi)), \qquad
        \frac{\partial L}{\partial W} := \frac{\partial L}{\partial W_\text{eff}} + \lambda_w\,(1 - \Phi) \odot W

    Args:
        weight: Dense weight W.
        mask: Which weights are kept, bool, as from :func:`nm_mask`.
        factor: What the others are multiplied by (D), in [0, 1].
        lambda_w: Pull of SR-STE on pruned weights. 0 is plain straight-through.

    Returns:
        The effective weight; kept entries are those of ``weight`` to the last bit.

    Example:
        >>> w = torch.tensor([[1.0, -3.0]], requires_grad=True)
        >>> sparsify_weight(w, nm_mask(w, 1, 2), factor=0.5)
        tensor([[ 0.5000, -3.0000]], grad_fn=<_SparsifyBackward>)

    """
    effective: Tensor = _Sparsify.apply(weight, mask, factor, lambda_w)  # type: ignore[no-untyped-call]  # torch's
    return effective


class _Sparsify(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, weight: Tensor, mask: Tensor, factor: float, lambda_w: float) -> Tensor:
        if lambda_w:
            ctx.save_for_backward(weight, mask)
        ctx.lambda_w = lambda_w
        return apply_mask_(weight.clone(), mask, factor)

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        if ctx.lambda_w:
            weight, mask = ctx.saved_tensors
            gradient = gradient.addcmul(weight, (~mask).to(weight.dtype), value=ctx.lambda_w)
        return gradient, None, None, None


def apply_mask_(weight: Tensor, mask: Tensor, factor: float = 0.0) -> Tensor:
    """Turns a dense weight into the effective one, in place: ``weight * (mask + factor * (1 - mask))``.

    Args:
        weight: Dense weight, changed.
        mask: Which weights are kept, bool.
        factor: What the others are multiplied by, in [0, 1].

    Returns:
        ``weight``.

    """
    if factor == 0.0:
        return weight.mul_(mask)
    # Kept weights stay as they are to the last bit. A product of floats is what a CPU does fastest: `torch.where` takes
    # ten times as long. Half precision would round the factor.
    if weight.dtype in (torch.float32, torch.float64):
        return weight.mul_(mask.to(weight.dtype).clamp_(min=factor))
    kept = weight * mask
    return weight.sub_(kept).mul_(factor).add_(kept)


def decay_factor(kind: Literal["linear", "exp"], step: int, beta: float) -> float:
    r"""What pruned weights are multiplied by while the constraint comes in.

    .. math:: D_\text{linear}(j) = \max(1 - \beta j,\, 0), \qquad D_\text{exp}(j) = e^{-\beta j}

    Args:
        kind: ``"linear"`` or ``"exp"``.
        step: Optimizer steps since the end of the dense phase (j), at least 0.
        beta: Rate per step, above 0. Paper: 2e-4 (linear), 1e-4 (exp, ViT).

    Returns:
        D, from 1 at the first step down to 0.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> decay_factor("linear", step=625, beta=8e-4)
        0.5

    """
    if kind not in ("linear", "exp") or step < 0 or not beta > 0:
        raise ValueError(
            "decay_factor: `kind` must be 'linear' or 'exp', `step` at least 0 and `beta` above 0, got"
            f" {kind!r}, {step!r} and {beta!r}."
        )
    return max(1.0 - beta * step, 0.0) if kind == "linear" else math.exp(-beta * step)


def patterns_of(recipe: str, n: int, m: int, k: int = 16) -> list[tuple[int, int]]:
    """Patterns that a recipe goes through, the target last.

    Args:
        recipe: ``"sdgf_stepwise"``: M-1:M, then M/2:M, M/4:M, ... down to N:M. ``"sdgf_geometric"``: kN:kM, then half
            of both, ... down to N:M. Any other recipe has the target alone.
        n: Weights kept of the target pattern.
        m: Length of a group of the target pattern.
        k: First multiple of the geometric recipe, a power of two. Paper: 16; authors' code: 8.

    Returns:
        ``(n, m)`` of each frame.

    Example:
        >>> patterns_of("sdgf_stepwise", 1, 8)
        [(7, 8), (4, 8), (2, 8), (1, 8)]
        >>> patterns_of("sdgf_geometric", 1, 8, k=8)
        [(8, 64), (4, 32), (2, 16), (1, 8)]

    """
    if recipe == "sdgf_stepwise" and n < m:
        halves = [(m >> d, m) for d in range(1, (m // n).bit_length())]
        return list(dict.fromkeys([(m - 1, m), *halves]))
    if recipe == "sdgf_geometric" and n < m:
        return [((k >> d) * n, (k >> d) * m) for d in range(k.bit_length())]
    return [(n, m)]


def pattern_at(recipe: str, n: int, m: int, frame: int, k: int = 16) -> tuple[int, int]:
    """Pattern of one frame of a recipe; after the last frame the target stays.

    Args:
        recipe: As in :func:`patterns_of`.
        n: Weights kept of the target pattern.
        m: Length of a group of the target pattern.
        frame: Number of the frame, from 0.
        k: First multiple of the geometric recipe.

    Returns:
        ``(n, m)`` of the frame.

    Example:
        >>> pattern_at("sdgf_stepwise", 2, 4, frame=0)
        (3, 4)

    """
    patterns = patterns_of(recipe, n, m, k)
    return patterns[min(frame, len(patterns) - 1)]


@torch.no_grad()
def best_channel_permutation(weight: Tensor, n: int = 2, m: int = 4, passes: int = 10) -> Tensor:
    """An order of the input channels in which the N:M mask keeps more magnitude: a local optimum.

    From pair to pair of groups the two channels are exchanged that gain most, until no exchange gains anything. Without
    randomness: the same on all ranks. One pass costs about ``size * in`` multiplications.

    Args:
        weight: ``(out, in)`` or ``(out, in, *kernel)``; ``in`` is a multiple of ``m``.
        n: Weights kept in each group.
        m: Length of a group.
        passes: Most passes over all pairs of groups.

    Returns:
        Permutation ``(in,)`` int64; ``weight[:, permutation]`` is to be pruned.

    Example:
        >>> w = torch.tensor([[9.0, 8.0, 7.0, 6.0, 1.0, 1.0, 1.0, 1.0]])
        >>> permuted = w[:, best_channel_permutation(w)]
        >>> float((permuted * nm_mask(permuted, 2, 4)).sum())
        30.0

    """
    columns = weight.detach().abs().float().movedim(1, 0).flatten(1)  # (in, rows)
    order = torch.arange(len(columns), device=weight.device)
    swaps = torch.tensor([(i, m + j) for i in range(m) for j in range(m)], device=weight.device)
    trials = torch.arange(2 * m, device=weight.device).repeat(1 + len(swaps), 1)
    rows = torch.arange(1, 1 + len(swaps), device=weight.device)
    trials[rows, swaps[:, 0]], trials[rows, swaps[:, 1]] = swaps[:, 1], swaps[:, 0]
    groups = range(0, len(order), m)
    for _ in range(passes):
        improved = False
        for a, b in combinations(groups, 2):
            places = torch.cat([order[a : a + m], order[b : b + m]])
            magnitudes = columns[places][trials].view(len(trials), 2, m, -1)
            kept = magnitudes.topk(n, dim=2).values.double().sum((1, 2, 3))
            best = int(kept.argmax())
            if kept[best] > kept[0] * (1 + 1e-9):
                order[a : a + m], order[b : b + m] = places[trials[best]].view(2, m)
                improved = True
        if not improved:
            break
    return order


def pack_mask(mask: Tensor) -> Tensor:
    """A mask in one bit per weight.

    Args:
        mask: bool, any shape.

    Returns:
        uint8 ``(ceil(numel / 8),)`` on the CPU, the first weight in the lowest bit.

    Example:
        >>> pack_mask(torch.tensor([True, False, True]))
        tensor([5], dtype=torch.uint8)

    """
    flat = mask.detach().contiguous().view(-1)
    padded = torch.zeros(-(-flat.numel() // 8) * 8, dtype=torch.uint8, device=mask.device)
    padded[: flat.numel()] = flat
    bits = padded.view(-1, 8) << torch.arange(8, dtype=torch.uint8, device=mask.device)
    return bits.sum(1, dtype=torch.uint8).cpu()


def unpack_mask(packed: Tensor, shape: torch.Size | tuple[int, ...] | list[int]) -> Tensor:
    """The mask that :func:`pack_mask` packed.

    Args:
        packed: uint8, one bit per weight.
        shape: Shape of the mask.

    Returns:
        bool, contiguous.

    Raises:
        ValueError: If the number of bytes does not fit the shape.

    """
    size = math.prod(shape)
    if packed.numel() != -(-size // 8):
        raise ValueError(f"unpack_mask: {packed.numel()} bytes do not hold a mask of shape {tuple(shape)}.")
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.view(-1)[:size].view(tuple(shape)).bool()


# -- the N largest of each M consecutive numbers -----------------------------------------------------------------------
#
# All by comparisons of integers: the bits of non-negative floats order as the floats do. Strided columns of the groups
# are compared, so there are no more comparisons than pairs that matter; a table turns the answers of a group into the M
# bytes of its mask, written as one word. On the CPU the work is done in pieces that stay in the cache.


def _select_largest(flat: Tensor, kept: Tensor, n: int, m: int) -> None:
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
