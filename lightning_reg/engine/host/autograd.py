"""What the autograd graph says of how tensors were made."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

__all__ = ["bends", "derivative", "descends", "is_fixed", "is_view_of_rows", "version_of"]


def derivative(total: Tensor, part: Tensor) -> Tensor | None:
    """The derivative of a scalar by a tensor that it was made of; no gradient of a parameter changes.

    Args:
        total: The scalar.
        part: The tensor.

    Returns:
        In the shape of ``part``, with a graph of its own where it is not constant; ``None`` if the scalar does not
        depend on it.

    """
    if total is part:
        return torch.ones_like(part)
    if not total.requires_grad or not part.requires_grad:
        return None
    # Typed in torch as tensors alone.
    outputs: Any = _before_reducer(total)
    return torch.autograd.grad(outputs, part, create_graph=True, retain_graph=True, allow_unused=True)[0]


def bends(slope: Tensor, part: Tensor) -> bool:
    """Whether a derivative changes with what it was taken by, so that the total is not linear in that.

    Args:
        slope: What :func:`derivative` gave.
        part: What it was taken by.

    Returns:
        ``False`` as well where it cannot be known, in a compiled function. A host sync, unless the derivative is
        constant.

    """
    if not slope.requires_grad:
        return False
    # One direction of many, and none of those in which a softmax stays as it is.
    direction = torch.linspace(1, 2, slope.numel(), device=slope.device, dtype=slope.dtype).reshape(slope.shape)
    try:
        second: Any = torch.autograd.grad(slope, part, direction, retain_graph=True, allow_unused=True)[0]
    except RuntimeError:  # torch.compile differentiates once
        return False
    return second is not None and bool(second.any())


def is_fixed(slope: Tensor) -> bool:
    """Whether a derivative is made of constants alone, of nothing that is trained."""
    stack: list[Any] = [slope.grad_fn]
    seen: set[Any] = set()
    while stack:
        current = stack.pop()
        if current is None or current in seen:
            continue
        if current.name().endswith("AccumulateGrad"):
            return False
        seen.add(current)
        stack.extend(following for following, _ in current.next_functions)
    return True


def _before_reducer(total: Tensor) -> Tensor | GradientEdge:
    # DDP counts a first pass through what it wraps a step's output in as the backward pass, and with `static_graph` the
    # ranks' gradients would no longer be averaged. torch takes the place before it from 2.5 on.
    node = total.grad_fn
    if node is None or not node.name().startswith("_DDPSink") or torch.__version__ < "2.5":
        return total
    before, number = node.next_functions[total.output_nr]
    return total if before is None else GradientEdge(before, number)


def descends(value: Tensor, node: Any) -> bool:
    """Whether a tensor was made from what a node of the graph made.

    Args:
        value: The tensor.
        node: The ``grad_fn`` of the other one.

    Returns:
        Whether the node is in the graph of the tensor; ``False`` for ``None``.

    """
    if node is None:
        return False
    stack, seen = [value.grad_fn], set()
    while stack:
        current = stack.pop()
        if current is node:
            return True
        if current is not None and current not in seen:
            seen.add(current)
            stack.extend(following for following, _ in current.next_functions)
    return False


def version_of(tensor: Tensor) -> int:
    """How often a tensor, or a view of it, was changed in place."""
    return tensor._version


def is_view_of_rows(rows: Tensor, count: int) -> bool:
    """Whether rows are certainly those of a tensor with ``count`` rows in another shape, by what made them."""
    node = rows.grad_fn
    while node is not None and node.name() in _KEEP_ORDER:
        if node._saved_self_sym_sizes[0] == count:  # type: ignore[attr-defined]  # of each kind of node its own
            return True
        node = node.next_functions[0][0]
    return False


# `view` and `reshape` without a copy: another shape, the elements in the same order.
_KEEP_ORDER = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")
