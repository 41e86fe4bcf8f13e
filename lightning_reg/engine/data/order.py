"""The user's training loader once more, in another order and with random states of its own."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_reg.engine.data.indices import BatchIndices, IndexSource
from lightning_reg.engine.host import distributed
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.generators import isolated_randomness, kept_generators, own_randomness
from lightning_reg.engine.host.owner import Owner

__all__ = ["Reordered"]


class Reordered:
    """The batches of a training loader in an order that depends on the epoch and the technique's seed only.

    The user's own samplers make the order, from another seed: a sampler that weights or balances classes does so here
    too. An order is drawn whole before its first batch, so any part of it can be read; the user's samplers, generators
    and the global random states are put back. Datasets and collate functions that draw random numbers get other ones.

    Args:
        loader: The user's DataLoader, after Lightning put its distributed sampler in.
        technique: Whose seed and name choose the order.

    Attributes:
        source: Size and batch size of the loader, as the techniques get them with their indices.

    Raises:
        MisconfigurationException: If the loader is none of torch's DataLoaders with a map-style dataset.

    """

    def __init__(self, loader: Any, technique: Owner) -> None:
        fine = isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__
        if not fine or isinstance(loader.dataset, IterableDataset):
            kind = type(loader.dataset).__name__ if fine else type(loader).__name__
            raise MisconfigurationException(
                f"{type(technique).__name__} reads the training data in a second order, and a {kind} has only the one"
                " that it iterates in. Use a torch DataLoader with a map-style dataset."
            )
        self._loader, self._technique = loader, technique
        self._place = "sampler" if loader.batch_sampler is None else "batch_sampler"
        self.source = IndexSource()
        self.source.size = len(loader.dataset)
        self.source.capacity = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)

    def draws(self, epoch: int) -> list[Any]:
        """What the batches of an epoch are made of: one index, or a list of them, for each batch."""
        seed = self._technique.derived_seed(f"order {epoch}")  # the same on all ranks, as shuffling is
        sampler = _copied_sampler(getattr(self._loader, self._place), epoch + seed % 2**30)
        with own_randomness(seed), kept_generators(self._loader, seed):
            return [[*draw] if isinstance(draw, list) else draw for draw in sampler]

    def batches(self, draws: Sequence[Any], epoch: int, start: int) -> Iterator[tuple[int, BatchIndices, Any]]:
        """The rest of an epoch, with the random states of each batch its own while it is made and worked on.

        Args:
            draws: The epoch's draws, or the first of them.
            epoch: Which epoch.
            start: Position of the first batch.

        Yields:
            Position, dataset indices, and the batch as the loader gives it; one that is ``None`` is left out.

        """
        twin = copy.copy(self._loader)
        generator = torch.Generator().manual_seed(self._technique.derived_seed(f"workers {epoch} {start}"))
        changes = {self._place: draws[start:], "generator": generator, "_iterator": None, "persistent_workers": False}
        twin.__dict__.update(changes)  # torch forbids to set them
        with isolated_randomness():
            batches = iter(twin)
            for position, draw in enumerate(draws[start:], start):
                seed = self._technique.derived_seed(f"batch {distributed.rank()} {epoch} {position}")
                with own_randomness(seed):
                    batch = next(batches)
                    if batch is not None:
                        yield position, BatchIndices(draw), batch


def _copied_sampler(sampler: Any, epoch: int) -> Any:
    """The sampler, and the one behind it, with positions and epochs of their own."""
    twin = copy.copy(sampler)
    if hasattr(twin, "sampler"):
        twin.sampler = _copied_sampler(twin.sampler, epoch)
    if callable(getattr(twin, "set_epoch", None)):
        twin.set_epoch(epoch)
    return twin
