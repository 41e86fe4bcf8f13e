"""A map of classes per training sample (a mask), of any size, packed into as few bits as its classes need."""

from typing import Any

import torch
from torch import Tensor

from lightning_reg.engine.data.memory import last_occurrences
from lightning_reg.engine.host.distributed import all_gather_rows, world_size

__all__ = ["MapMemory"]


class MapMemory:
    """Maps ``(H, W)`` of class numbers by sample index, in host memory; most samples may have none.

    1, 2, 4 or 8 bits a pixel, as many as the classes need: 1,000 masks of 250 x 250 take 63 MB from 17 classes on, and
    31 MB from 5 on. A sample without a map of its own takes 25 bytes.

    Args:
        num_samples: Number of samples N.
        num_classes: How many numbers there are, at most 256.

    Raises:
        ValueError: If there are more classes than a byte can tell.

    """

    def __init__(self, num_samples: int, num_classes: int) -> None:
        if not 1 <= num_classes <= 256:
            raise ValueError(f"A map is kept with one byte a pixel at most: 256 classes, got {num_classes}.")
        self.num_samples, self.num_classes = num_samples, num_classes
        self._bits = next(bits for bits in (1, 2, 4, 8) if num_classes <= 2**bits)
        self.clear()

    def clear(self) -> None:
        """Forgets all maps."""
        self._values = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self._starts = torch.full((self.num_samples,), -1)
        self._shapes = torch.zeros(self.num_samples, 2, dtype=torch.int64)
        self._fresh = torch.zeros(self.num_samples, dtype=torch.bool)  # what the other ranks have not got

    @property
    def nbytes(self) -> int:
        """Bytes in use."""
        return self._values.nbytes + self._starts.nbytes + self._shapes.nbytes

    @property
    def indices(self) -> Tensor:
        """Which samples have a map, in order."""
        return (self._starts >= 0).nonzero()[:, 0]

    def read(self, indices: Tensor, given: Tensor) -> Tensor:
        """The maps of samples, and the given ones of those that have none.

        Args:
            indices: ``(B,)`` int64, each at least 0; on a device they cost a host sync.
            given: ``(B, H, W)`` of whole numbers.

        Returns:
            Maps ``(B, H, W)`` like those given.

        Raises:
            IndexError: If an index is not below N.
            ValueError: If a map that is kept has another size.

        """
        indices = self._checked(indices)
        starts = self._starts[indices]
        kept = starts >= 0
        if not kept.any():
            return given
        self._check_shapes(indices[kept], given.shape[1:])
        maps = self._unpacked(starts.clamp(min=0), given[0].numel()).reshape(given.shape)
        kept = kept.to(given.device, non_blocking=True)
        return torch.where(kept[:, None, None], maps.to(given.device, non_blocking=True).to(given.dtype), given)

    def map_of(self, index: int) -> Tensor | None:
        """The map of one sample, ``(H, W)`` int64, or ``None``."""
        if self._starts[index] < 0:
            return None
        height, width = self._shapes[index].tolist()
        return self._unpacked(self._starts[index][None], height * width).reshape(height, width).long()

    def write(self, indices: Tensor, maps: Tensor) -> None:
        """Replaces the maps of samples; of several for one sample the last stays.

        Args:
            indices: ``(B,)`` int64.
            maps: ``(B, H, W)``, from 0 to ``num_classes - 1``.

        Raises:
            IndexError: If an index is not below N.
            ValueError: If a sample has a map of another size.

        """
        indices, shape = self._checked(indices), maps.shape[1:]
        if not len(indices):
            return
        self._check_shapes(indices[self._starts[indices] >= 0], shape)
        self._place(indices, torch.tensor(shape), self._packed(maps.flatten(1).cpu().to(torch.uint8)))
        self._fresh[indices] = True

    def gather(self, device: torch.device, group: Any = None) -> None:
        """Takes in what the other ranks have written since the last time; to be called on all ranks.

        Args:
            device: Where collectives work.
            group: The ranks; ``None`` for all. Of several maps for one sample the last rank's stays.

        """
        if world_size(group) > 1:
            heads, values = self._taken(self._fresh.nonzero()[:, 0])
            heads, values = (_of_all(rows, device, group) for rows in (heads, values[:, None]))
            self._take_in(heads, values[:, 0])
        self._fresh.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Tensors on the CPU: those of the samples that have a map."""
        heads, values = self._taken(self.indices)
        return {"num_samples": self.num_samples, "num_classes": self.num_classes, "heads": heads, "values": values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave.

        Raises:
            ValueError: If it is of another number of samples or classes.

        """
        theirs, ours = (state["num_samples"], state["num_classes"]), (self.num_samples, self.num_classes)
        if theirs != ours:
            raise ValueError(
                f"The checkpoint has maps of {theirs[0]} samples and {theirs[1]} classes, this run {ours[0]} and"
                f" {ours[1]}: the training data or the number of classes changed."
            )
        self.clear()
        self._take_in(state["heads"], state["values"])

    def _taken(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Index, height and width of the maps of samples, and their packed values one after another."""
        heads = torch.stack([indices, *self._shapes[indices].T], 1)
        pieces = zip(self._starts[indices].tolist(), self._lengths(heads).tolist(), strict=True)
        return heads, torch.cat([self._values[:0], *(self._values[start : start + size] for start, size in pieces)])

    def _take_in(self, heads: Tensor, values: Tensor) -> None:
        for head, packed in zip(heads, torch.split(values, self._lengths(heads).tolist()), strict=True):
            self._place(head[None, 0], head[1:], packed[None])

    def _place(self, indices: Tensor, shape: Tensor, rows: Tensor) -> None:
        """Puts packed maps of one shape where those of these samples are or shall be."""
        size = rows.shape[1]
        new = torch.unique(indices[self._starts[indices] < 0])
        if len(new):
            self._reserve(self._used + len(new) * size)
            self._starts[new] = self._used + size * torch.arange(len(new))
            self._shapes[new] = shape
            self._used += len(new) * size
        places = self._starts[indices][:, None] + torch.arange(size)
        self._values[places] = rows[last_occurrences(indices)]

    def _lengths(self, heads: Tensor) -> Tensor:
        """Bytes of maps, from their index, height and width."""
        return (heads[:, 1] * heads[:, 2] * self._bits + 7) // 8

    def _packed(self, values: Tensor) -> Tensor:
        each = 8 // self._bits
        padded = torch.nn.functional.pad(values, (0, -values.shape[1] % each))
        packed: Tensor = (padded.reshape(len(values), -1, each) << self._shifts()).sum(2, dtype=torch.uint8)
        return packed

    def _unpacked(self, starts: Tensor, pixels: int) -> Tensor:
        length = (pixels * self._bits + 7) // 8
        rows = self._values[starts[:, None] + torch.arange(length)]
        values: Tensor = (rows[:, :, None] >> self._shifts()) & (2**self._bits - 1)
        return values.flatten(1)[:, :pixels]

    def _shifts(self) -> Tensor:
        return torch.arange(0, 8, self._bits, dtype=torch.uint8)

    def _reserve(self, size: int) -> None:
        if size > len(self._values):
            more = max(size, min(2 * len(self._values), len(self._values) + 2**26)) - len(self._values)
            self._values = torch.cat([self._values, torch.zeros(more, dtype=torch.uint8)])

    def _checked(self, indices: Tensor) -> Tensor:
        indices = indices.cpu()
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < self.num_samples:
            raise IndexError(f"Sample indices must be from 0 to {self.num_samples - 1}, got {indices.tolist()}.")
        return indices

    def _check_shapes(self, indices: Tensor, shape: torch.Size) -> None:
        other = (self._shapes[indices] != torch.tensor(shape)).any(1)
        if other.any():
            index = int(indices[other][0])
            raise ValueError(
                f"The mask of sample {index} was {tuple(self._shapes[index].tolist())} and is {tuple(shape)} now."
            )


def _of_all(rows: Tensor, device: torch.device, group: Any) -> Tensor:
    flat, there, _ = all_gather_rows(rows.to(device), group)
    return flat[there].cpu()
