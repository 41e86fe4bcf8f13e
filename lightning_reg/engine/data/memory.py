"""A row per training sample, kept outside the module: never averaged, replicated, moved or compiled by mistake."""

from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["MemoryDtype", "SampleMemory", "last_occurrences"]

MemoryDtype = Literal["float32", "float16", "bfloat16", "int32", "int64"]


def last_occurrences(indices: Tensor, preferred: Tensor | None = None) -> Tensor:
    """For each position, the last position that holds the same index.

    Indexed assignment keeps one of several rows for the same sample, which one is undefined on a GPU. Writing
    ``rows[last_occurrences(indices)]`` lets the last one win everywhere, without a host sync.

    Args:
        indices: ``(B,)`` int64, at least 0.
        preferred: bool ``(B,)``: the last of these counts, where an index has one; ``None`` for all.

    Returns:
        Positions ``(B,)`` int64.

    Example:
        >>> last_occurrences(torch.tensor([7, 3, 7, 5]))
        tensor([2, 1, 2, 3])

    """
    keys = indices if preferred is None else 2 * indices + preferred
    ordered, order = torch.sort(keys, stable=True)
    return order[torch.searchsorted(ordered, keys if preferred is None else keys | 1, right=True) - 1]


class SampleMemory:
    """``num_samples`` rows of ``width`` numbers, initially ``fill``.

    Memory: ``num_samples * width`` numbers of ``dtype``; with ``top_k`` ``num_samples * top_k`` numbers and as many
    int16 (int32 from 32,768 columns on) column numbers.

    Args:
        num_samples: Number of rows N.
        width: Numbers per row.
        dtype: Type they are kept in; :meth:`read` returns float32 for the floating types.
        top_k: Keep only the largest entries of a row, the others read as 0; ``None`` keeps all.
        on_cpu: Keep the rows in host memory even if the model is on another device; costs a host sync per step.
        fill: Value of a row that was never written.

    """

    def __init__(
        self,
        num_samples: int,
        width: int,
        *,
        dtype: MemoryDtype = "float32",
        top_k: int | None = None,
        on_cpu: bool = False,
        fill: int = 0,
    ) -> None:
        self.num_samples, self.width, self.on_cpu = num_samples, width, on_cpu
        self._top_k = top_k if top_k is not None and top_k < width else None
        # One row more than there are samples, the first: rows that nobody shall keep are written there.
        shape = (num_samples + 1, self._top_k or width)
        self._values = torch.full(shape, fill, dtype=getattr(torch, dtype))
        column_dtype = torch.int16 if width <= 2**15 else torch.int32
        # Distinct columns even in a row never written, so that expanding it is well defined.
        self._columns = torch.arange(shape[1], dtype=column_dtype).repeat(shape[0], 1) if self._top_k else None

    @property
    def nbytes(self) -> int:
        """Bytes in use."""
        return self._values.nbytes + (0 if self._columns is None else self._columns.nbytes)

    def read(self, indices: Tensor, places: Tensor | None = None) -> Tensor:
        """Rows of the samples, ``(B, width)`` on the device of ``indices``.

        Args:
            indices: ``(B,)`` int64; negative ones give a row without meaning.
            places: What :meth:`places` says of ``indices``, if it was asked before.

        Returns:
            float32 for floating memories, else the memory's own type. A copy.

        Raises:
            IndexError: If an index is beyond the memory (on a GPU: its device-side assertion).

        """
        places = self.places(indices) if places is None else places
        self._follow(places.device)
        try:
            values = self._values.index_select(0, places)
        except (IndexError, RuntimeError) as error:
            raise IndexError(f"A sample index is not below num_samples={self.num_samples}: {error}") from error
        values = values.float() if values.is_floating_point() else values
        if self._columns is not None:
            columns = self._columns.index_select(0, places).long()
            values = values.new_zeros(len(places), self.width).scatter_(1, columns, values)
        return values.to(indices.device)

    def write(self, indices: Tensor, rows: Tensor, *, places: Tensor | None = None, distinct: bool = False) -> None:
        """Replaces the rows of the samples; of several rows for one sample the last stays.

        Args:
            indices: ``(B,)`` int64; a row with a negative index is dropped.
            rows: ``(B, width)``.
            places: What :meth:`places` says of ``indices``, if it was asked before.
            distinct: Whether the indices are known to be distinct, which saves a sort.

        """
        places = self.places(indices) if places is None else places
        self._follow(places.device)
        rows = rows.detach().to(self._values.device)
        if not distinct:
            rows = rows[last_occurrences(places)]
        if self._columns is not None:
            rows, columns = rows.topk(self._values.shape[1], dim=1)
            self._columns.index_copy_(0, places, columns.to(self._columns.dtype))
        self._values.index_copy_(0, places, rows.to(self._values.dtype))

    def all(self) -> Tensor:
        """All rows, ``(N, width)`` on the CPU."""
        return self.read(torch.arange(self.num_samples, device=self._values.device)).cpu()

    def state_dict(self) -> dict[str, Any]:
        """Tensors on the CPU."""
        state: dict[str, Any] = {"width": self.width, "values": self._values[1:].cpu().clone()}
        if self._columns is not None:
            state["columns"] = self._columns[1:].cpu().clone()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over rows saved by a memory of the same shape, in whatever type they were kept.

        Raises:
            ValueError: If the shapes differ.

        """
        theirs, ours = tuple(state["values"].shape), tuple(self._values[1:].shape)
        same_columns = (state["width"], "columns" in state) == (self.width, self._columns is not None)
        if theirs != ours or not same_columns:
            raise ValueError(
                f"The checkpoint has rows {theirs} of width {state['width']}, this run {ours} of width {self.width}:"
                " the training data, the number of classes or `top_k` changed."
            )
        self._values[1:].copy_(state["values"])
        if self._columns is not None:
            self._columns[1:].copy_(state["columns"])

    def places(self, indices: Tensor, kept: Tensor | None = None) -> Tensor:
        """Where the rows of the samples lie; the same in every memory that is kept in the same place.

        Args:
            indices: ``(B,)`` int64.
            kept: bool ``(B,)``, which rows shall be kept; ``None`` for those with an index of at least 0.

        Returns:
            Positions ``(B,)``; 0 for rows that nobody shall keep.

        """
        places = (indices + 1).clamp_(min=0) if kept is None else torch.where(kept, indices + 1, 0)
        return places.cpu() if self.on_cpu else places

    def _follow(self, device: torch.device) -> None:
        if self._values.device != device:
            self._values = self._values.to(device)
            self._columns = None if self._columns is None else self._columns.to(device)
