"""What the autograd graph says of how tensors were made."""

import inspect
from collections import deque
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils.checkpoint import CheckpointFunction, checkpoint

__all__ = [
    "bends",
    "derivative",
    "descends",
    "hides_layers",
    "is_checkpointed",
    "is_fixed",
    "is_reentrant",
    "is_wanted",
    "lies_by_row",
    "nearest_leaf",
    "rows_of_output",
    "runs_backward",
    "version_of",
]


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


def rows_of_output(output: Tensor, count: int) -> list[Tensor]:
    """The parameters of the layer that an output comes from, which have a row for each of its columns.

    Args:
        output: ``(B, count)`` with gradient, of a linear or convolutional layer, or a function of such outputs.
        count: Number of columns.

    Returns:
        Weights and biases; nothing where the graph does not show such a layer, or one whose weight is computed.

    """
    stack: list[Any] = [output.grad_fn]
    seen: set[Any] = set()
    found: list[Tensor] = []
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        following = [after for after, _ in node.next_functions]
        own = [value for after in following if (value := _row_parameter(after, node.name(), count)) is not None]
        found += own
        if not node.name().startswith(_PRODUCTS):
            stack += following
        elif all(value.dim() == 1 for value in own):  # a weight that is computed from others
            return []
    return found


_PRODUCTS = "Addmm", "Mm", "Bmm", "Baddbmm", "Convolution", "Linear"


def _row_parameter(node: Any, product: str, count: int) -> Tensor | None:
    """A parameter that a product takes as it is, or transposed, if its rows are the product's columns."""
    transposed = product.startswith(("Convolution", "Linear"))
    while node is not None and node.name().startswith(_TURNED):
        transposed |= not node.name().startswith("View")
        node = node.next_functions[0][0]
    value: Tensor | None = getattr(node, "variable", None)
    if value is None or value.dim() == 0 or len(value) != count:
        return None
    # A square matrix that is multiplied as it is may have its rows for the inputs.
    return value if value.dim() == 1 or transposed or value.shape[1] != count else None


_TURNED = "TBackward", "Transpose", "Permute", "View"


def _before_reducer(total: Tensor) -> Tensor | GradientEdge:
    # DDP counts a first pass through what it wraps a step's output in as the backward pass, and with `static_graph` the
    # ranks' gradients would no longer be averaged.
    node = total.grad_fn
    if node is None or not node.name().startswith("_DDPSink"):
        return total
    before, number = node.next_functions[total.output_nr]
    return total if before is None else GradientEdge(before, number)


def descends(value: Tensor, node: Any, but_through: Sequence[Any] = ()) -> bool:
    """Whether a tensor was made from what a node of the graph made.

    Args:
        value: The tensor.
        node: The ``grad_fn`` of the other one.
        but_through: Nodes of which nothing counts that comes through them alone.

    Returns:
        Whether the node is in the graph of the tensor; ``False`` for ``None``.

    """
    return node is not None and any(current is node for current in _nodes(value, but_through))


def hides_layers(value: Tensor) -> bool:
    """Whether layers that a tensor was made by are not in its graph: those in checkpoints with ``use_reentrant``."""
    return any(node.name() == "CheckpointFunctionBackward" for node in _nodes(value))


def _nodes(value: Tensor, but_through: Sequence[Any] = ()) -> Iterator[Any]:
    stack, seen = [value.grad_fn], set(but_through)
    while stack:
        current = stack.pop()
        if current is not None and current not in seen:
            yield current
            seen.add(current)
            stack.extend(following for following, _ in current.next_functions)


def nearest_leaf(value: Tensor) -> Tensor | None:
    """The leaf of a tensor's graph that lies the fewest operations before it; itself, if it is one."""
    if value.grad_fn is None:
        return value if value.requires_grad else None
    queue: deque[Any] = deque([value.grad_fn])
    seen = {value.grad_fn}
    while queue:
        for following, _ in queue.popleft().next_functions:
            if following is None or following in seen:
                continue
            leaf: Tensor | None = getattr(following, "variable", None)
            if leaf is not None:
                return leaf
            seen.add(following)
            queue.append(following)
    return None


def runs_backward() -> bool:
    """Whether a backward pass is under way, in which checkpointed layers run once more."""
    return torch._C._current_graph_task_id() != -1


def is_wanted(node: Any) -> bool:
    """Whether the backward pass that is under way asks for what a node is given.

    Args:
        node: Of the graph, of a leaf say.

    Returns:
        ``False`` in a pass that asks for gradients of other tensors alone, as ``torch.autograd.grad`` does.

    """
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # it is the very one that `torch.autograd.grad` was asked for
        return True


def is_reentrant() -> bool:
    """Whether what runs now does so under a reentrant checkpoint: without gradient, to run again later."""
    # Read off the Python stack: torch has no question for it.
    return _runs_in(CheckpointFunction.forward.__code__)


def is_checkpointed() -> bool:
    """Whether what runs now does so under a checkpoint of either kind, to run again in the backward pass."""
    return is_reentrant() or _runs_in(inspect.unwrap(checkpoint).__code__)


def _runs_in(code: Any) -> bool:
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


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
        return _Origin(before[0][0], given) if _dimension(node, len(given)) or _takes_all(node) else None
    return None


def _dimension(node: Any, dims: int) -> int:
    """The dimension that an operation went along; a negative one is saved as an unsigned number."""
    dimension = int(node._saved_dim)
    return (dimension - 2**64 if dimension >= 2**63 else dimension) % dims


def _takes_all(node: Any) -> bool:
    """Whether an operation is a slice of everything, which torch before 2.8 notes for ``[:, i]``."""
    if node.name() != "SliceBackward0":
        return False
    rows = node._saved_self_sym_sizes[0]
    return bool(node._saved_start == 0 and node._saved_end >= rows and node._saved_step == 1)


def _flattened(shape: tuple[int, ...], rows: int) -> tuple[int, ...]:
    """The dimensions of which so many rows were made."""
    return next((shape[:dims] for dims in range(1, len(shape) + 1) if prod(shape[:dims]) == rows), shape)
