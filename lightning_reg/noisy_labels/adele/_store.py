"""Where corrected masks are kept: in ADELE's own memory, or in the store that hands them out."""

from typing import TYPE_CHECKING, Any

from lightning_reg.engine.data.maps import MapMemory
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.noisy_labels.adele.label_store import LabelStore

if TYPE_CHECKING:
    from lightning_reg.noisy_labels.adele._settings import Settings

__all__ = ["adopted", "memory_of", "new_memory", "store_of"]


def store_of(owner: "Settings", loader: Any) -> LabelStore | None:
    """The store that is the dataset of a loader, refused where it cannot be used."""
    store = getattr(loader, "dataset", None)
    if not isinstance(store, LabelStore):
        return None
    problem = ""
    if owner.predict == "train":
        problem = (
            'predict="train" predicts what it trains on, which a LabelStore may have cropped. Write predict="eval"'
        )
    elif owner.num_samples is not None:
        problem = "a LabelStore knows its number of samples. Leave `num_samples` out"
    elif owner.dataloader is not None:
        problem = "a LabelStore works with one training loader, and `dataloader` is for several. Leave it out"
    if problem:
        raise MisconfigurationException(f"ADELE: {problem}.")
    return store


def adopted(store: LabelStore, memory: MapMemory | None) -> MapMemory:
    """The memory of a store, with the masks that were corrected so far and no others."""
    shared = store.maps()
    if memory is not shared:
        shared.clear()
        if memory is not None:
            shared.load_state_dict(memory.state_dict())
    return shared


def new_memory(num_samples: int, num_classes: int) -> MapMemory:
    """A memory of ADELE's own."""
    try:
        return MapMemory(num_samples, num_classes)
    except ValueError as error:
        raise MisconfigurationException(f"ADELE: {error}") from error


def memory_of(state: dict[str, Any] | None) -> MapMemory | None:
    """A memory as it was saved."""
    if state is None:
        return None
    memory = MapMemory(state["num_samples"], state["num_classes"])
    memory.load_state_dict(state)
    return memory
