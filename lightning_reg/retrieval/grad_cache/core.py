"""A call in chunks of rows, of which the graph is kept for one chunk at a time."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["recomputed", "row_chunks"]

Result = TypeVar("Result")


def recomputed(
    function: Callable[..., Result],
    *args: object,
    anchors: Sequence[Tensor] = (),
    contexts: Callable[[], tuple[AbstractContextManager[object], AbstractContextManager[object]]] | None = None,
) -> Result:
    r"""Calls a function and keeps no graph of it; the backward pass calls it once more, with the same random numbers.

    With the calls of an encoder f on chunks :math:`X_k` the gradient is, chunk by chunk,

    .. math:: \frac{\partial L}{\partial \theta} = \sum_k \sum_{x \in X_k} \frac{\partial L}{\partial f(x)}
        \frac{\partial f(x)}{\partial \theta}

    where the first factors, of all rows, are there before the first chunk is called again.

    Args:
        function: What is called. What it draws from the global generators of torch is drawn again in the backward pass;
            all else that it reads has to be then what it is now.
        args: What it is called with.
        anchors: Tensors on the devices that it draws random numbers on, besides the CPU; one for each is enough.
        contexts: Makes a context for the first call, and one for the second; ``None`` for none.

    Returns:
        What the function returns, with a graph.

    Example:
        >>> rows = torch.ones(3, requires_grad=True)
        >>> recomputed(torch.dot, rows, rows).backward()
        >>> rows.grad
        tensor([2., 2., 2.])

    """
    # Each chunk casts the weights anew, so that their gradients are added up in the weights' own precision.
    torch.clear_autocast_cache()
    try:
        # torch keeps the random states of the devices of positional arguments, and of no others.
        result: Result = checkpoint(
            lambda *_: function(*args), *anchors, use_reentrant=False, context_fn=contexts or _no_contexts
        )
    finally:
        torch.clear_autocast_cache()
    return result


def _no_contexts() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    return nullcontext(), nullcontext()


def row_chunks(rows: int, size: int) -> list[slice]:
    """Chunks of rows, as few as there can be and as equal as they can be.

    Args:
        rows: Number of rows.
        size: Most rows of a chunk, at least 1.

    Returns:
        The chunks in order.

    Example:
        >>> row_chunks(5, 2)
        [slice(0, 1, None), slice(1, 3, None), slice(3, 5, None)]

    """
    count = max(-(-rows // size), 1)
    ends = [rows * part // count for part in range(count + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]
