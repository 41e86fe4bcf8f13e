"""Where corrected masks are kept: in ADELE's own memory, or in the store that hands them out."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning_reg.engine.data.maps import MapMemory
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.noisy_labels.adele.label_store import LabelStore

__all__ = ["adopted", "memory_of", "store_of", "told"]


@contextmanager
def told(advice: str = "") -> Iterator[None]:
    """Tells what a memory cannot keep as ADELE's own."""
    try:
        yield
    except ValueError as error:
        raise MisconfigurationException(f"ADELE: {error}{advice}") from error


def store_of(loader: Any) -> LabelStore | None:
    """The store that is the dataset of a loader, if it is one."""
    store = getattr(loader, "dataset", None)
    return store if isinstance(store, LabelStore) else None


def adopted(store: LabelStore, memory: MapMemory | None) -> MapMemory:
    """The memory of a store, with the masks that were corrected so far and no others."""
    shared = store.maps()
    if memory is not shared:
        shared.clear()
        if memory is not None:
            shared.load_state_dict(memory.state_dict())
    return shared


def memory_of(state: dict[str, Any] | None) -> MapMemory | None:
    """A memory as it was saved."""
    if state is None:
        return None
    memory = MapMemory(state["num_samples"], state["num_classes"])
    memory.load_state_dict(state)
    return memory
