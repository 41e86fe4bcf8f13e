"""The adaptive scale of a row's gradient, factors to begin with, the adapter as a function with its own backward."""

from math import sqrt
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

__all__ = ["allora_linear", "allora_row_scale", "low_rank_factor", "low_rank_norm", "new_low_rank"]


def allora_row_scale(left: Tensor, right: Tensor, eta: float) -> Tensor:
    r"""What the gradient of each output row is multiplied by: ``1 / sqrt(|(B A)_i| + 1 / eta^2)``.

    The norm itself stands under the root, not its square: eta for a row at zero, and the norm's inverse root for a
    large one. The norms come from ``B (A A') B'``, so that the product is never made.

    Args:
        left: B, ``(..., n1, r)``.
        right: A, ``(..., r, n2)``.
        eta: Multiplier of a row at zero, above 0.

    Returns:
        ``(..., n1)``, without gradient, in float32 at least.

    Example:
        >>> allora_row_scale(torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0, 4.0]]), eta=2.0)
        tensor([2.0000, 0.3123])

    """
    kind = torch.promote_types(left.dtype, torch.float32)
    b, a = left.detach().to(kind), right.detach().to(kind)
    norms = ((b @ (a @ a.mT)) * b).sum(-1).clamp(min=0.0).sqrt()
    return (norms + 1 / eta**2).rsqrt()


def low_rank_factor(scale: Literal["row", "fixed", "rank"], rank: int, alpha: float | None = None) -> float:
    """What the product of both factors is multiplied by.

    Args:
        scale: ``"row"``: by nothing (ALLoRA); ``"fixed"``: ``alpha / r`` (LoRA); ``"rank"``: ``alpha / sqrt(r)``
            (rsLoRA).
        rank: r, at least 1.
        alpha: ``None`` for r.

    Returns:
        The factor.

    """
    if scale == "row":
        return 1.0
    return (rank if alpha is None else alpha) / (rank if scale == "fixed" else sqrt(rank))


def low_rank_norm(left: Tensor, right: Tensor) -> Tensor:
    """The Frobenius norm of ``B A``, which is never made: the root of the trace of ``(B'B)(AA')``.

    Args:
        left: B, ``(..., n1, r)``.
        right: A, ``(..., r, n2)``.

    Returns:
        A scalar, without gradient; over all matrices of a stack.

    Example:
        >>> low_rank_norm(torch.tensor([[1.0], [2.0]]), torch.tensor([[2.0, 4.0]]))
        tensor(10.)

    """
    b, a = left.detach(), right.detach()
    return ((b.mT @ b) * (a @ a.mT)).sum().clamp(min=0.0).sqrt()


def new_low_rank(
    shape: tuple[int, ...], rank: int, generator: torch.Generator, *, table: bool = False
) -> tuple[Tensor, Tensor]:
    """Factors whose product is zero.

    Args:
        shape: ``(..., n1, n2)`` of the product.
        rank: r, at least 1.
        generator: Random generator on the CPU.
        table: Whether it is the table of an embedding, of which few columns are seen in a step.

    Returns:
        B ``(..., n1, r)`` of zeros and A ``(..., r, n2)``, uniform in ``+-1/sqrt(n2)``, float32. Of a table A is zeros
        and B standard normal.

    """
    *stack, n1, n2 = shape
    if table:
        return torch.randn(*stack, n1, rank, generator=generator), torch.zeros(*stack, rank, n2)
    right = (2 * torch.rand(*stack, rank, n2, generator=generator) - 1) / sqrt(n2)
    return torch.zeros(*stack, n1, rank), right


def allora_linear(x: Tensor, left: Tensor, right: Tensor, eta: float) -> Tensor:
    """The adapter's output ``x A' B'``, for a training loop of one's own; its gradients are those of ALLoRA.

    Those of A and B go through the output's gradient with each row scaled by :func:`allora_row_scale`; that of x is
    left alone. The callback works without it.

    Args:
        x: ``(..., n2)``.
        left: B, ``(n1, r)``.
        right: A, ``(r, n2)``.
        eta: Multiplier of a row at zero, above 0.

    Returns:
        ``(..., n1)``.

    Example:
        >>> B = torch.zeros(3, 2, requires_grad=True)
        >>> y = allora_linear(torch.ones(1, 4), B, torch.ones(2, 4), eta=2.0)
        >>> y.sum().backward()
        >>> B.grad[0]
        tensor([8., 8.])

    """
    output: Tensor = _Branch.apply(x, left, right, eta)  # type: ignore[no-untyped-call]  # torch's
    return output


class _Branch(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, left: Tensor, right: Tensor, eta: float) -> Tensor:  # torch's
        ctx.save_for_backward(x, left, right, allora_row_scale(left, right, eta))
        return x @ right.mT @ left.mT

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # torch's
        x, left, right, scale = ctx.saved_tensors
        g, rows = gradients[0].reshape(-1, len(left)), x.reshape(-1, x.shape[-1])
        scaled = g * scale.to(g.dtype)
        at_x = (g @ left @ right).reshape(x.shape)
        return at_x, scaled.mT @ (rows @ right.mT), (scaled @ left).mT @ rows, None
