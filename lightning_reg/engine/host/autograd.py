"""What the autograd graph says of how tensors were made."""

from typing import Any

from torch import Tensor

__all__ = ["descends", "is_view_of_rows", "version_of"]


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
