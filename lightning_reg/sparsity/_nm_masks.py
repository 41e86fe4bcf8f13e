"""N:M masks: which N of M consecutive weights are kept, how the constraint comes in, and masks in single bits."""

import math
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.sparsity._nm_select import select_largest

__all__ = [
    "apply_mask_",
    "check_nm",
    "decay_factor",
    "nm_mask",
    "pack_mask",
    "pattern_at",
    "patterns_of",
    "sparsify_weight",
    "unpack_mask",
]


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
    select_largest(grouped.reshape(-1), kept.view(-1), n, m)
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


def _axis(dim: str) -> int:
    return 1 if dim == "in" else 0


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
