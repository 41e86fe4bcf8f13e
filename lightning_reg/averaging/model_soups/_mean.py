"""Means in little memory: of tensors a chunk at a time, of state dicts from a running sum."""

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from lightning_reg.averaging._state_dicts import Aligned, Part, accumulated, is_averaged
from lightning_reg.engine.host.names import Patterns, matches

__all__ = ["RunningSum", "Workspace", "in_chunks", "mean_of_parts"]

_CHUNK = 1 << 17  # elements at a time: for each worker 3 MB
_SMALL_CHUNK = 1 << 15  # where torch computes: below that it starts no threads of its own inside a worker
_IN_NUMPY = (torch.float32, torch.float64)
_MOST_WORKERS = 4  # reading memory is the limit beyond


class Workspace:
    """Threads that average chunks, and the memory that each of them does it in; a context manager."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(min(_MOST_WORKERS, os.cpu_count() or 1))
        self._own = threading.local()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(self, work: Callable[[tuple[int, int]], None], chunks: Iterable[tuple[int, int]]) -> None:
        """Does the work for all chunks, several at a time."""
        for _ in self._pool.map(work, chunks):
            pass

    def buffers(self, wide: torch.dtype, device: torch.device, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Accumulator, scratch and bytes to read into, the thread's own; made once, or they leave holes in the heap."""
        kept: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = self._own.__dict__.setdefault("kept", {})
        if (wide, device) not in kept:
            sums = torch.empty(2, _CHUNK, dtype=wide, device=device)
            kept[wide, device] = sums, torch.empty(_CHUNK * 16, dtype=torch.uint8, device="cpu")
        sums, buffer = kept[wide, device]
        return sums[0, :count], sums[1, :count], buffer


def in_chunks(numel: int, size: int = _CHUNK) -> list[tuple[int, int]]:
    """Where chunks start, and how many elements they have."""
    return [(start, min(size, numel - start)) for start in range(0, numel, size)]


def mean_of_parts(
    out: Tensor,
    parts: Sequence[Part],
    dtypes: Sequence[torch.dtype],
    shares: Sequence[float],
    accumulate_dtype: torch.dtype,
    workspace: Workspace,
) -> bool:
    r"""Writes :math:`\sum_i w_i x_i / \sum_i w_i` into a tensor.

    Args:
        out: Contiguous, of any shape.
        parts: Gives each member's elements.
        dtypes: Type of each member's elements.
        shares: Weight of each, with a positive sum. A member with weight 0 is not read (0 times infinity is not 0).
        accumulate_dtype: Type of the sums.
        workspace: Threads, used if ``out`` is on the CPU, and memory.

    Returns:
        Whether all of it is finite for sure.

    """
    members = [member for member in zip(parts, dtypes, shares, strict=True) if member[2] != 0]
    total = float(sum(shares))
    wide = torch.promote_types(accumulate_dtype, torch.complex64) if out.is_complex() else accumulate_dtype
    in_numpy = out.device.type == "cpu" and all(dtype in _IN_NUMPY for dtype in (out.dtype, *dtypes))
    result, accumulate = out.view(-1), _add_in_numpy if in_numpy else _add_in_torch
    sums: list[Tensor] = []

    def chunk(place: tuple[int, int]) -> None:
        start, count = place
        accumulator, scratch, buffer = workspace.buffers(wide, result.device, count)
        for position, (part, dtype, share) in enumerate(members):
            bytes_of_part = buffer[: count * dtype.itemsize].view(dtype)
            accumulate(accumulator, scratch, part(start, bytes_of_part), share, position == 0)
        if total != 1:
            accumulator.div_(total)
        sums.append(accumulator.sum())  # finite only if all are
        result[start : start + count].copy_(accumulator)

    on_cpu = result.device.type == "cpu"
    chunks = in_chunks(result.numel(), _CHUNK if in_numpy or not on_cpu else _SMALL_CHUNK)
    if on_cpu and len(chunks) > 1:
        workspace.run(chunk, chunks)
    else:
        for place in chunks:
            chunk(place)
    return not sums or bool(torch.stack(sums).isfinite().all())


def _add_in_numpy(accumulator: Tensor, scratch: Tensor, part: Tensor, share: float, first: bool) -> None:
    # numpy adds numbers of two types without a temporary array, and starts no threads.
    total, terms, dtype = accumulator.numpy(), part.numpy(), accumulator.numpy().dtype
    if first and share == 1:
        np.copyto(total, terms, casting="same_kind")
    elif first:
        np.multiply(terms, share, out=total, dtype=dtype, casting="same_kind")
    elif share == 1:
        np.add(total, terms, out=total, dtype=dtype, casting="same_kind")
    else:
        np.add(total, np.multiply(terms, share, out=scratch.numpy(), dtype=dtype, casting="same_kind"), out=total)


def _add_in_torch(accumulator: Tensor, scratch: Tensor, part: Tensor, share: float, first: bool) -> None:
    target = accumulator if first else scratch
    target.copy_(part)
    if not first:
        accumulator.add_(scratch, alpha=share)
    elif share != 1:
        accumulator.mul_(share)


class RunningSum:
    """Sum of state dicts in float64, and the mean with one more without adding it.

    Memory: the sum takes two float32 models, each mean that is asked for one.
    """

    def __init__(self, first: Aligned, exclude: Patterns = None) -> None:
        self.count = 1
        self._sums: dict[str, Any] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._tied: dict[str, str] = {}
        places: dict[tuple[Any, ...], str] = {}
        for key, value in first.items():
            self._sums[key] = value
            if is_averaged(value) and not matches(key, exclude):
                self._dtypes[key] = value.dtype
                self._sums[key] = accumulated(value).clone() if value.dtype.itemsize >= 8 else accumulated(value)
                one_of_it = places.setdefault(first.place(key), key)
                if one_of_it != key:
                    self._tied[key] = one_of_it
            elif isinstance(value, Tensor):
                self._sums[key] = value.detach().clone()

    @property
    def averaged(self) -> list[str]:
        """Keys of what is averaged; all else is the first's."""
        return list(self._dtypes)

    def add(self, member: Aligned) -> None:
        """Adds a state dict with the same keys."""
        for key in self._dtypes:
            self._sums[key].add_(member[key].detach().to(self._sums[key]))
        self._tied = {key: other for key, other in self._tied.items() if member.place(key) == member.place(other)}
        self.count += 1

    def mean(self, member: Aligned | None = None) -> dict[str, Any]:
        """The mean so far, or with one more, which is not added."""
        result: dict[str, Any] = {}
        count = self.count + (member is not None)
        for key, value in self._sums.items():
            if key not in self._dtypes:
                result[key] = value.clone() if isinstance(value, Tensor) else value
                continue
            other = self._tied.get(key)
            if other is not None and (member is None or member.place(key) == member.place(other)):
                result[key] = result[other]
                continue
            total = value if member is None else value + member[key].detach().to(value)
            result[key] = (total / count).to(self._dtypes[key])
        return result
