"""Collectives over the data-parallel ranks; on one process each is a no-op."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work

__all__ = [
    "RowExchange",
    "all_gather",
    "all_gather_padded",
    "all_gather_rows",
    "all_reduce_max",
    "all_reduce_mean",
    "all_reduce_sum",
    "average_",
    "broadcast_",
    "rank",
    "rows_of_other_ranks",
    "world_size",
]


def _gather_into(
    gathered: Tensor, tensor: Tensor, *, group: "ProcessGroup | None" = None, async_op: bool = False
) -> "Work | None":
    # Renamed in torch 2.13, where the old name warns.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    work: Work | None = gather(gathered, tensor, group=group, async_op=async_op)
    return work


def world_size(group: "ProcessGroup | None" = None) -> int:
    """Number of processes of a group, of all without one; 1 where nothing is distributed."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: "ProcessGroup | None" = None) -> int:
    """Rank of this process in a group, global without one; 0 where nothing is distributed."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def all_gather(tensor: Tensor, group: "ProcessGroup | None" = None) -> Tensor:
    """Tensors of the same shape from all ranks, stacked: ``(W, *shape)``, without gradient."""
    ranks = world_size(group)
    if ranks == 1:
        return tensor.detach()[None]
    gathered = tensor.new_empty(ranks * tensor.numel())
    _gather_into(gathered, tensor.detach().flatten(), group=group)
    return gathered.reshape(ranks, *tensor.shape)


def all_gather_padded(tensor: Tensor, group: "ProcessGroup | None" = None) -> tuple[Tensor, Tensor]:
    """Vectors of differing lengths from all ranks, padded with zeros to the longest.

    One host sync: the ranks have to agree on the length.

    Args:
        tensor: ``(n,)``, another n on each rank.
        group: The ranks, all without one.

    Returns:
        The values ``(W, n_max)`` without gradient, and bool ``(W, n_max)``: what is no padding.

    """
    lengths = all_gather(torch.tensor(len(tensor), device=tensor.device), group)
    padded = tensor.new_zeros(int(lengths.max()))
    padded[: len(tensor)] = tensor.detach()
    return all_gather(padded, group), torch.arange(len(padded), device=tensor.device) < lengths[:, None]


def all_gather_rows(
    rows: Tensor, group: "ProcessGroup | None" = None, capacity: int | None = None
) -> tuple[Tensor, Tensor, int]:
    """Rows of all ranks, in the order of the ranks, with gradient.

    The backward pass sums over the ranks what each of them found for a row, in one collective; every rank must go
    backward. DDP averages gradients over the ranks: if the values of the ranks add up to the loss of the global batch,
    each rank's value has to be multiplied by their number.

    Args:
        rows: ``(n, D)``, another n on each rank, D > 0.
        group: The ranks, all without one.
        capacity: Rows that every rank sends, at least n and the same on all ranks; ``None`` if it is not known, which
            costs a collective and a host sync to agree on it.

    Returns:
        The rows ``(W * capacity, D)``, 0 where a rank has none; bool ``(W * capacity,)``: which are there; and the
        position of this rank's first row.

    Raises:
        ValueError: If there are more rows than ``capacity``.

    """
    if world_size(group) == 1:
        return rows, torch.ones(len(rows), dtype=torch.bool, device=rows.device), 0
    if capacity is None:
        capacity = int(all_reduce_max(torch.tensor(len(rows), device=rows.device), group))
    if len(rows) > capacity:
        raise ValueError(f"all_gather_rows: {len(rows)} rows are more than `capacity`={capacity}.")
    # A column of ones tells rows from padding, which saves a collective for the lengths.
    marked = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
    padded = torch.cat([marked, marked.new_zeros(capacity - len(rows), marked.shape[1])])
    gathered: Tensor = _GatherRows.apply(padded, group)  # type: ignore[no-untyped-call]  # torch's
    return gathered[:, :-1], gathered[:, -1].detach() > 0, rank(group) * capacity


def rows_of_other_ranks(
    rows: Tensor, group: "ProcessGroup | None" = None, capacity: int | None = None
) -> tuple[Tensor, Tensor]:
    """The same of all ranks but this one.

    Args:
        rows: As above.
        group: As above.
        capacity: As above.

    Returns:
        The rows ``((W - 1) * capacity, D)``, 0 where a rank has none; and bool: which are there.

    Raises:
        ValueError: As above.

    """
    found, there, first = all_gather_rows(rows, group, capacity)
    size = len(found) // world_size(group)
    others, there = (torch.cat([each[:first], each[first + size :]]) for each in (found, there))
    return others, there


class _GatherRows(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, rows: Tensor, group: "ProcessGroup | None") -> Tensor:
        ctx.group = group
        return all_gather(rows, group).flatten(0, 1)

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # All ranks' gradients of all rows; not every backend has a reduce-scatter.
        total = all_reduce_sum(gradients[0].contiguous(), ctx.group)
        return total.chunk(world_size(ctx.group))[rank(ctx.group)], None


def all_reduce_max(tensor: Tensor, group: "ProcessGroup | None" = None) -> Tensor:
    """Elementwise maximum over the ranks, without gradient."""
    tensor = tensor.detach().clone()
    if world_size(group) > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return tensor


def all_reduce_sum(tensor: Tensor, group: "ProcessGroup | None" = None) -> Tensor:
    """Elementwise sum over the ranks, without gradient."""
    tensor = tensor.detach().clone()
    if world_size(group) > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Mean over the ranks, without gradient."""
    return all_reduce_sum(tensor) / world_size()


def average_(tensors: Sequence[Tensor], group: "ProcessGroup | None" = None) -> None:
    """Replaces tensors by their means over the ranks: one collective for each type."""
    ranks = world_size(group)
    if ranks == 1:
        return
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        alike = [tensor.detach() for tensor in tensors if tensor.dtype is dtype]
        flat = torch.cat([tensor.flatten() for tensor in alike])
        dist.all_reduce(flat, group=group)
        parts = torch.split(flat / ranks, [tensor.numel() for tensor in alike])
        torch._foreach_copy_(alike, [part.view_as(tensor) for part, tensor in zip(parts, alike, strict=True)])


def broadcast_(tensors: Sequence[Tensor], group: "ProcessGroup | None" = None) -> None:
    """Replaces tensors by those of the first rank."""
    if world_size(group) > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), group=group, group_src=0)


class RowExchange:
    """Sends rows with their sample indices to all ranks, behind the back of the step.

    :meth:`start` launches one collective and returns at once; :meth:`finish`, called before the rows are next needed,
    waits for it. Every rank must start in the same steps. On one process nothing happens.

    A step sends ``capacity * (width + 2)`` 32-bit words per rank, and waits for none of them.
    """

    def __init__(self) -> None:
        self._gathered: Tensor | None = None
        self._work: Work | None = None
        self._widths: list[int] = []

    def start(self, indices: Tensor, *fields: Tensor, capacity: int | None) -> None:
        """Launches the exchange.

        Args:
            indices: Sample index of each row, ``(B,)`` int64; negative for a row that nobody shall keep.
            *fields: What to send, each ``(B, width)`` in a 32-bit type.
            capacity: Rows every rank sends, at least B and the same on all ranks (the nominal batch size); ``None`` if
                it is not known, which costs a second collective and a host sync per step to agree on it.

        Raises:
            RuntimeError: If the previous exchange was not finished.

        """
        if world_size() == 1:
            return
        if self._gathered is not None:
            raise RuntimeError("finish() must come before the next start().")
        if capacity is None:
            largest = indices.new_tensor(len(indices))
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
            capacity = int(largest)
        # The 64 bits of an index travel as two float32 words: bytes are copied, no arithmetic touches them.
        words = [
            indices[:, None].contiguous().view(torch.float32),
            *(f.contiguous().view(torch.float32) for f in fields),
        ]
        self._widths = [w.shape[1] for w in words]
        nobody = indices.new_full((capacity, 1), -1).view(torch.float32)
        packed = torch.cat([nobody, nobody.new_zeros(capacity, sum(self._widths[1:]))], dim=1)
        packed[: len(indices)] = torch.cat(words, dim=1)
        self._gathered = packed.new_empty(world_size() * capacity, packed.shape[1])
        self._work = _gather_into(self._gathered, packed, async_op=True)

    def finish(self) -> list[Tensor] | None:
        """Waits for what was started.

        Returns:
            Indices ``(W * capacity,)`` in the order of the ranks, then each field as float32 words (``view`` it back);
            ``None`` if nothing was started.

        """
        gathered, work = self._gathered, self._work
        if gathered is None or work is None:
            return None
        work.wait()
        self._gathered = self._work = None
        words, *fields = torch.split(gathered, self._widths, dim=1)
        return [words.contiguous().view(torch.int64)[:, 0], *(field.contiguous() for field in fields)]
