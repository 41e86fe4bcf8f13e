"""Which samples of the dataset a batch holds, without touching the dataset, the workers or the user's batch.

The batch sampler is where the indices are drawn, so that is where they are noted: a :class:`_Tap` around it keeps the
lists it hands to the loader, and because a loader yields its batches in the order of those lists (refused otherwise),
the k-th batch that leaves the loader has the k-th list. Nothing travels through worker processes.
"""

import copy
from collections import deque
from collections.abc import Generator, Iterator
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_reg.engine.data.draws import Draws
from lightning_reg.engine.data.entries import find_entry
from lightning_reg.engine.data.unused_passes import UnusedPass
from lightning_reg.engine.host.errors import MisconfigurationException

__all__ = ["BatchIndices", "IndexSource", "check_has_indices", "entry_of_batch"]

_ALTERNATIVE = (
    'let the dataset put its index into the batch and name that entry with `index_key="..."` (a key, or a position such'
    ' as "2").'
)


class BatchIndices:
    """The dataset indices of one batch.

    Args:
        draw: What the sampler drew: one index, or one per sample in batch order. Read when somebody asks.

    """

    def __init__(self, draw: Any) -> None:
        self._draw = draw

    @cached_property
    def list(self) -> list[int]:
        """One index per sample."""
        return [int(self._draw)] if hasattr(self._draw, "__index__") else [int(index) for index in self._draw]

    @cached_property
    def host(self) -> Tensor:
        """``(B,)`` int64 on the CPU."""
        return torch.tensor(self.list, dtype=torch.int64)

    @cached_property
    def distinct(self) -> bool:
        """Whether no index occurs twice."""
        return len(set(self.list)) == len(self.list)


class _Tap:
    """A sampler or batch sampler that notes what it hands out; everything else is the original's."""

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler
        self.drawn: deque[Any] = deque()
        self.draws: Draws | None = None  # what stands in for those of the sampler
        self.passing: Generator[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        self.drawn = deque()  # each pass has a queue of its own: loaders may be iterated twice at once
        self.passing = _noting(iter(self._sampler if self.draws is None else self.draws), self.drawn)
        return self.passing

    def __len__(self) -> int:
        return len(self._sampler if self.draws is None else self.draws)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_sampler":
            raise AttributeError(name)
        return getattr(self._sampler, name)


def _noting(draws: Iterator[Any], drawn: deque[Any]) -> Generator[Any]:
    for draw in draws:
        drawn.append([*draw] if isinstance(draw, list) else draw)  # a sampler may fill the same list again
        yield draw


class _Pass:
    """One pass over a loader: the draws of the batches that have left it, whether it is used, and came to its end."""

    def __init__(self, pending: deque[Any]) -> None:
        self.pending, self.used, self.exhausted = pending, False, False


class _Delivery:
    """An iterator over a loader that pairs each batch leaving it with the indices it was made of.

    Nobody whom it knows may know it: torch's iterator over worker processes waits for ten seconds if it goes as part of
    a circle.
    """

    def __init__(self, batches: Iterator[Any], drawn: deque[Any], one: _Pass) -> None:
        self._batches, self._drawn, self._pass = batches, drawn, one

    def __iter__(self) -> "_Delivery":
        return self

    def __next__(self) -> Any:
        self._pass.used = True
        try:
            batch = next(self._batches)
        except StopIteration:
            self._pass.exhausted = True
            raise
        draw = self._drawn.popleft()
        if batch is not None:  # Lightning skips a batch that is None: it reaches no training step
            self._pass.pending.append(draw)
        return batch


def _followed_class(loader_class: type[Any]) -> type[Any]:
    def followed_iter(self: Any) -> Iterator[Any]:
        source = cast("IndexSource", self.index_source)
        source.begin(self)
        batches = loader_class.__iter__(self)  # a pass of its own over the tap begins in here
        return source.deliver(batches, self.index_tap.drawn)

    return type(loader_class.__name__, (loader_class,), {"__iter__": followed_iter})


class IndexSource:
    """Indices of the batches of one training loader.

    Args:
        is_drawn: Whether a technique may draw the samples of an epoch in place of the loader's sampler.

    Attributes:
        size: Length of the loader's dataset.
        capacity: The loader's nominal batch size, ``None`` if it has none.
        passes: How many passes over the loader have begun.

    """

    def __init__(self, is_drawn: bool = False) -> None:
        self.size = 0
        self.capacity: int | None = None
        self.passes = 0
        self._is_drawn = is_drawn
        self._tap: _Tap | None = None
        self._loader: Any = None
        self._before: UnusedPass | None = None
        self._pass = _Pass(deque())

    def attach(self, loader: Any) -> Any:
        """Returns a copy of the loader whose batches are followed.

        Args:
            loader: The loader, after Lightning put its distributed sampler in.

        Returns:
            A loader of the same class with the same workers, samplers and dataset, for the engine's eyes only.

        Raises:
            MisconfigurationException: If there is no index to be had: no DataLoader, an iterable dataset, batches out
                of order, or an iteration of the loader's own.

        """
        check_has_indices(loader)
        twin = copy.copy(loader)
        place = "sampler" if loader.batch_sampler is None else "batch_sampler"
        tap = _Tap(getattr(loader, place))
        twin.__class__ = _followed_class(type(loader))
        # DataLoader forbids assigning these after its construction; the copy has not been iterated yet.
        twin.__dict__.update({place: tap, "index_tap": tap, "index_source": self, "_iterator": None})
        self._tap, self._loader = tap, loader
        self.size = len(loader.dataset)
        self.capacity = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
        self._pass = _Pass(deque())
        return twin

    def begin(self, twin: Any) -> None:
        """Before a pass over the loader: a technique may decide that it was begun for nothing."""
        is_own = self._is_drawn and self._tap is not None and self._tap.draws is None
        self._before = UnusedPass(self._loader, twin) if is_own else None

    def deliver(self, batches: Iterator[Any], drawn: deque[Any]) -> Iterator[Any]:
        """Follows a new pass over the loader; what an abandoned pass left over is dropped."""
        self.passes += 1
        if not self._pass.exhausted:
            self.pending.clear()
        self._pass = _Pass(self.pending)
        return _Delivery(batches, drawn, self._pass)

    def draw(self, draws: Draws | None) -> None:
        """What the passes that begin from now on are made of; ``None`` for what the loader's own sampler draws."""
        if self._tap is not None:
            self._tap.draws = draws

    def give_up(self, epoch: int) -> list[str]:
        """The present pass ends, and what it took from the sampler's state comes back, if no batch has left it.

        Args:
            epoch: The present one.

        Returns:
            Attributes of samplers that it has changed and that cannot be put back.

        """
        before, self._before = self._before, None
        if before is None or self._pass.used or self._tap is None or self._tap.passing is None:
            return []
        self._tap.passing.close()
        return before.put_back(epoch)

    @property
    def pending(self) -> deque[Any]:
        """What the batches were made of that have left the loader and reached no step yet."""
        return self._pass.pending

    def advance(self) -> BatchIndices | None:
        """The indices of the batch that the present step works on; ``None`` if this loader gave none to it."""
        return BatchIndices(self.pending.popleft()) if self.pending else None

    def missing(self) -> BatchIndices:
        """Raises: somebody needs the indices of a batch that did not come from the loader.

        Raises:
            MisconfigurationException: Always.

        """
        raise MisconfigurationException(
            "The training step got a batch that did not come from the training DataLoader, so its sample indices are"
            f" unknown. Fetch batches through the loader, or {_ALTERNATIVE}"
        )


def check_has_indices(loader: Any, owner: object | None = None, why: str = "needs sample indices") -> None:
    """Refuses a loader of whose batches nobody knows which samples they hold.

    Args:
        loader: Any.
        owner: Who needs the indices; its class is named in the message.
        why: What the owner does with them.

    Raises:
        MisconfigurationException: If it is no DataLoader, has an iterable dataset, or gives its batches out of order.

    """
    if not isinstance(loader, DataLoader):
        problem = f"a {type(loader).__name__} is no torch DataLoader, so sample indices cannot be followed"
    elif isinstance(loader.dataset, IterableDataset):
        problem = f"{type(loader.dataset).__name__} is an IterableDataset and has no sample indices"
    elif not getattr(loader, "in_order", True):
        problem = "the DataLoader has in_order=False, so its batches cannot be told apart; set in_order=True"
    elif type(loader).__iter__ is not DataLoader.__iter__:
        problem = (
            f"{type(loader).__name__} iterates in its own way (it overrides __iter__), so the order of its batches is"
            " not known to be that of its sampler"
        )
    else:
        return
    if owner is None:
        raise MisconfigurationException(f"Sample indices are needed, but {problem}; or {_ALTERNATIVE}")
    raise MisconfigurationException(f"{type(owner).__name__} {why}, but {problem}.")


def entry_of_batch(batch: Any, key: str) -> Tensor:
    """The entry of the user's batch that holds the sample indices.

    Args:
        batch: The batch, in any structure.
        key: Where they are: names and positions, separated by dots (``"index"``, ``"2"``, ``"labelled.index"``).

    Returns:
        The indices, ``(B,)``.

    Raises:
        MisconfigurationException: If there is no such entry, or it is no tensor of whole numbers.

    """
    entry = find_entry(batch, key, "index_key")
    if not isinstance(entry, Tensor) or entry.dtype not in _WHOLE_NUMBERS or entry.dim() != 1:
        found = (
            f"a tensor of {entry.dtype}, {tuple(entry.shape)}" if isinstance(entry, Tensor) else type(entry).__name__
        )
        raise MisconfigurationException(f"index_key={key!r} must name a tensor of whole numbers (B,), found {found}.")
    return entry.long()


_WHOLE_NUMBERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
