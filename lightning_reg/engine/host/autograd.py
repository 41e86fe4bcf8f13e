"""What the autograd graph says of how tensors were made."""

from typing import Any

from torch import Tensor

__all__ = ["descends"]


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
