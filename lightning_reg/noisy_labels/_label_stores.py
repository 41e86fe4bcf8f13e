"""The store that a technique finds as the dataset of its training loader."""

from lightning_reg.engine.data.maps import MapMemory
from lightning_reg.noisy_labels.label_store import LabelStore

__all__ = ["LabelStore", "adopted", "store_of"]


def store_of(loader: object) -> LabelStore | None:
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
