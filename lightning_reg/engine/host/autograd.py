"""What the autograd graph says of how tensors were made."""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["descends", "lies_by_row", "version_of"]


def descends(value: Tensor, node: Any, but_through: Sequence[Any] = ()) -> bool:
    """Whether a tensor was made from what a node of the graph made.

    Args:
        value: The tensor.
        node: The ``grad_fn`` of the other one.
        but_through: Nodes of which nothing counts that comes through them alone.

    Returns:
        Whether the node is in the graph of the tensor; ``False`` for ``None``.

    """
    if node is None:
        return False
    stack, seen = [value.grad_fn], set(but_through)
    while stack:
        current = stack.pop()
        if current is not None and current not in seen:
            if current is node:
                return True
            seen.add(current)
            stack.extend(following for following, _ in current.next_functions)
    return False


def version_of(tensor: Tensor) -> int:
    """How often a tensor, or a view of it, was changed in place."""
    return tensor._version


def lies_by_row(rows: Tensor, count: int) -> bool:
    """Whether rows certainly were made row after row from a tensor with ``count`` rows, as many from each.

    Args:
        rows: ``(n, ...)``, a multiple of ``count``.
        count: Rows of the other tensor.

    Returns:
        ``False`` also where that cannot be known: where an operation changes the order (a transpose, a concatenation)
        or is not one of the few whose order is known, and where a second dimension that the rows were made from has
        ``count`` entries too.

    """
    node, shape = rows.grad_fn, tuple(rows.shape)
    while node is not None:
        origin = _origin(node, shape, count)
        if origin is None:
            return False
        node, shape = origin
        if shape[0] == count:
            return count not in _flattened(shape, len(rows))[1:]
    return False


class _Origin(NamedTuple):
    """What an operation was applied to: what made it, and its shape (-1 for what does not matter)."""

    node: Any
    shape: tuple[int, ...]


# Another shape, the elements in the same order.
_RESHAPING = (
    "ViewBackward0",
    "UnsafeViewBackward0",
    "ReshapeAliasBackward0",
    "SqueezeBackward0",
    "SqueezeBackward1",
)
# The same shape, each element from the one at its place: `contiguous`, `clone`, another type or device.
_COPYING = ("CloneBackward0", "ToCopyBackward0", "AliasBackward0")
# Along one dimension: each row from its own row, unless the rows are that dimension.
_SELECTING = ("SliceBackward0", "SelectBackward0")
_NORMALIZING = ("LogSoftmaxBackward0", "SoftmaxBackward0")
# Matrix products, and which of their inputs the rows come from, each from its own.
_LINEAR = {"AddmmBackward0": 1, "MmBackward0": 0}


def _origin(node: Any, shape: tuple[int, ...], count: int) -> _Origin | None:
    """What an operation was applied to that keeps the order of the rows; ``None`` for any other operation."""
    name, before = node.name(), node.next_functions
    if name in _RESHAPING:
        return _Origin(before[0][0], tuple(node._saved_self_sym_sizes))
    if name in _COPYING:
        return _Origin(before[0][0], shape)
    if shape[0] % count:  # what follows goes by rows, so a sample must be some of them
        return None
    if name in _LINEAR:
        return _Origin(before[_LINEAR[name]][0], (shape[0], -1))
    if name in _SELECTING or name in _NORMALIZING:
        given = tuple(node._saved_self_sym_sizes) if name in _SELECTING else shape
        return _Origin(before[0][0], given) if _dimension(node, len(given)) else None
    return None


def _dimension(node: Any, dims: int) -> int:
    """The dimension that an operation went along; a negative one is saved as an unsigned number."""
    dimension = int(node._saved_dim)
    return (dimension - 2**64 if dimension >= 2**63 else dimension) % dims


def _flattened(shape: tuple[int, ...], rows: int) -> tuple[int, ...]:
    """The dimensions of which so many rows were made."""
    return next((shape[:dims] for dims in range(1, len(shape) + 1) if prod(shape[:dims]) == rows), shape)
