"""Maps of classes that the workers of a loader read while the training process writes them."""

import os
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.data.maps import MapMemory

__all__ = ["SharedMapMemory"]


class SharedMapMemory(MapMemory):
    """A :class:`MapMemory` in a mapped file, which grows with what is written only.

    A copy that comes to another process (a worker) reads the same file; a copy in the same process has one of its own.
    One process writes; the file goes with the memory that made it.

    Args:
        num_samples: Number of samples N.
        num_classes: How many numbers there are, at most 256.
        pixels: Most pixels of a map.

    Raises:
        ValueError: If there are more classes than a byte can tell.

    """

    def __init__(self, num_samples: int, num_classes: int, pixels: int) -> None:
        self.pixels = pixels
        super().__init__(num_samples, num_classes)

    @property
    def is_ours(self) -> bool:
        """Whether this process has made the file."""
        return self._process == os.getpid()

    @property
    @override
    def nbytes(self) -> int:
        return self._used + self._starts.nbytes + self._shapes.nbytes

    @override
    def clear(self) -> None:
        if "_path" not in vars(self):
            self._make_file()
        self._used = 0
        self._starts.fill_(-1)
        self._shapes.zero_()
        self._fresh = torch.zeros(self.num_samples, dtype=torch.bool)

    def _make_file(self) -> None:
        handle, path = tempfile.mkstemp(prefix="lightning_reg_maps_")
        os.close(handle)
        self._path, self._process = path, os.getpid()
        self._map_file()
        weakref.finalize(self, _remove, path, self._process)

    def _map_file(self) -> None:
        tables, values = 24 * self.num_samples, self.num_samples * ((self.pixels * self._bits + 7) // 8)
        whole = torch.from_file(self._path, shared=True, size=tables + values, dtype=torch.uint8)
        self._values = whole[tables:]
        numbers = whole[:tables].view(torch.int64)
        self._starts, self._shapes = numbers[: self.num_samples], numbers[self.num_samples :].view(-1, 2)

    @override
    def _reserve(self, size: int) -> None:
        if size > len(self._values):
            raise ValueError(f"There is room for maps of {self.pixels} pixels each, and some are larger.")

    @override
    def __getstate__(self) -> dict[str, Any]:
        own = {"_values", "_starts", "_shapes"}
        return {name: value for name, value in vars(self).items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._map_file()
        if self.is_ours:
            before: list[Tensor] = [self._values[: self._used], self._starts, self._shapes]
            self._make_file()
            for value, old in zip((self._values[: self._used], self._starts, self._shapes), before, strict=True):
                value.copy_(old)


def _remove(path: str, process: int) -> None:
    if os.getpid() == process:  # and not in a worker, which holds a copy
        with suppress(OSError):
            Path(path).unlink()
