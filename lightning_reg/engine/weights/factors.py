"""Weights that are a frozen one and a product of two factors, and gradients pulled back to the factors.

With M the weight as a matrix of outputs by inputs, V the frozen one, B ``(n1, r)``, A ``(r, n2)``, a number c and a
row's own scale s of its gradient, which is a constant:

    M = V + c B A,    dB = c diag(s) dM A',    dA = c B' diag(s) dM

A weight may be a stack of matrices ``(E, n1, n2)``, with factors stacked alike.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Factors", "Layout", "product", "pulled_back", "write_product_"]


class Factors(NamedTuple):
    """Two factors, whose product is what is added to a frozen weight.

    Args:
        left: B, ``(..., n1, r)``.
        right: A, ``(..., r, n2)``.
        factor: c.
        scale: s, ``(..., n1)``; ``None`` for 1.

    """

    left: Tensor
    right: Tensor
    factor: float = 1.0
    scale: Tensor | None = None

    def scaled_left(self) -> Tensor:
        """``c diag(s) B``, which the gradient of A takes in place of B."""
        left = self.left if self.scale is None else self.left * self.scale.unsqueeze(-1)
        return left if self.factor == 1.0 else left * self.factor

    def scale_left_gradient(self, gradient: Tensor) -> Tensor:
        """``c diag(s) g`` for the gradient of B."""
        gradient = gradient if self.scale is None else gradient * self.scale.unsqueeze(-1)
        return gradient if self.factor == 1.0 else gradient * self.factor


class Layout(NamedTuple):
    """How a weight lies as a matrix of outputs by inputs.

    Args:
        turned: Whether inputs come first: ``(in, out, ...)``, and the table of an embedding.
        stacked: Whether it is a stack of such matrices.

    """

    turned: bool = False
    stacked: bool = False

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as ``(out, in * kernel)``, or a stack of such; a view where it can be one."""
        if self.stacked:
            return weight.mT if self.turned else weight
        return (weight.transpose(0, 1) if self.turned else weight).flatten(1)

    def weight(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """The matrix as a weight of this shape."""
        if self.stacked or len(shape) == 2:
            return matrix.mT if self.turned else matrix
        if not self.turned:
            return matrix.reshape(shape)
        return matrix.reshape(shape[1], shape[0], *shape[2:]).transpose(0, 1)


def product(factors: Factors) -> Tensor:
    """``c B A``, in the factors' type."""
    both = factors.left @ factors.right
    return both if factors.factor == 1.0 else both * factors.factor


def write_product_(weight: Tensor, frozen: Tensor, factors: Factors, layout: Layout) -> None:
    """Writes ``V + c B A`` into a weight: computed in the factors' type, and rounded once.

    Args:
        weight: What is written into.
        frozen: V, of its shape; on any device.
        factors: The factors.
        layout: How the weight lies.

    """
    flat, frozen = weight.dim() == 2 and not layout.stacked, frozen.to(weight.device)
    if flat and weight.dtype == factors.left.dtype:
        one, two = (factors.right.t(), factors.left.t()) if layout.turned else (factors.left, factors.right)
        torch.addmm(frozen, one, two, alpha=factors.factor, out=weight)
    else:
        weight.copy_(layout.weight(product(factors), weight.shape).add(frozen))


def pulled_back(gradient: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
    """Gradients of both factors, from that of the matrix.

    Args:
        gradient: ``dM``, ``(..., n1, n2)``.
        factors: The factors.

    Returns:
        ``dB`` and ``dA``, in the factors' type.

    """
    gradient = gradient.to(factors.left.dtype)
    return factors.scale_left_gradient(gradient @ factors.right.mT), factors.scaled_left().mT @ gradient
