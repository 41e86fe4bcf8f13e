"""Squares over many tensors at once: distances of parameters from constants, gradients of single samples."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from typing_extensions import override

__all__ = ["add_row_squares_", "weighted_squares"]

_NUMBERS_AT_ONCE = 1 << 24  # in the gradients of samples that are computed together


def weighted_squares(
    params: Sequence[Tensor], anchors: Sequence[Tensor], weights: Sequence[Tensor] | Sequence[float] | None = None
) -> Tensor:
    r"""Weighted squared distance of parameters from anchors; its gradient is :math:`2 w (\theta - \theta^*)`.

    .. math:: \sum_j w_j (\theta_j - \theta^*_j)^2

    Fused operations over all tensors, two temporary copies of them. It can be differentiated once.

    Args:
        params: Parameters, or parts of them, with gradient.
        anchors: Constants of the same shapes.
        weights: Constants of the same shapes, or a number for each tensor, at least 0; ``None`` for 1.

    Returns:
        A scalar, in float32 at least.

    """
    value: Tensor = _Squares.apply(len(params), *params, *anchors, *(weights or ()))  # type: ignore[no-untyped-call]  # torch's
    return value


class _Squares(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, count: int, *values: Any) -> Tensor:
        params, anchors, weights = values[:count], values[count : 2 * count], values[2 * count :]
        wide = [p if p.dtype == torch.float64 else p.float() for p in params]
        deltas = torch._foreach_sub(wide, [a.to(p.dtype) for a, p in zip(anchors, wide, strict=True)])
        slopes = torch._foreach_mul(deltas, list(weights)) if weights else deltas
        ctx.slopes, ctx.dtypes = slopes, [p.dtype for p in params]
        # Products are not negative, so that the sum of magnitudes is their sum: one operation for all tensors.
        return torch.stack(list(torch._foreach_norm(torch._foreach_mul(slopes, deltas), 1))).sum()

    @staticmethod
    @once_differentiable
    @override
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = torch._foreach_mul(ctx.slopes, 2.0 * grad)
        own = [g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)]
        return (None, *own, *[None] * (len(ctx.needs_input_grad) - 1 - len(own)))


def add_row_squares_(sums: Sequence[Tensor], values: Tensor, params: Sequence[Tensor]) -> int:
    """Adds the squared gradients of single values, those that are finite.

    Args:
        sums: For each parameter a tensor of its shape, changed in place.
        values: ``(B,)`` with gradient.
        params: The parameters.

    Returns:
        Of how many values they were.

    """
    at_once = max(1, _NUMBERS_AT_ONCE // sum(p.numel() for p in params))
    rows = torch.eye(len(values), dtype=values.dtype, device=values.device)
    count = 0
    for start in range(0, len(values), at_once):
        now = rows[start : start + at_once]
        found = [
            (total, gradient.to(total.dtype))
            for total, gradient in zip(sums, _gradients_of_rows(values, params, now), strict=True)
            if gradient is not None
        ]
        finite = torch.ones(len(now), dtype=torch.bool, device=values.device)
        for _, gradient in found:
            largest = math.sqrt(torch.finfo(gradient.dtype).max)  # whose square is finite still
            finite &= (gradient.abs() <= largest).flatten(1).all(1) if gradient.dim() > 1 else gradient.abs() <= largest
        for total, gradient in found:
            total.add_(gradient[finite].square().sum(0))
        count += int(finite.sum())
    return count


def _gradients_of_rows(values: Tensor, params: Sequence[Tensor], rows: Tensor) -> list[Tensor | None]:
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    if len(rows) > 1:
        try:
            return list(torch.autograd.grad(values, params, rows, is_grads_batched=True, **options))
        except RuntimeError:  # an operation that cannot be batched: one sample after the other
            pass
    each = [torch.autograd.grad(values, params, row, **options) for row in rows]
    return [None if column[0] is None else torch.stack(column) for column in zip(*each, strict=True)]
