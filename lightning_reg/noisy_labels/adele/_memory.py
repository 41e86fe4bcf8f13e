"""What ADELE says of the memory of its masks, and how it is made of a state."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning_reg.engine.data.maps import MapMemory
from lightning_reg.engine.host.errors import MisconfigurationException

__all__ = ["memory_of", "told"]


@contextmanager
def told(advice: str = "") -> Iterator[None]:
    """Tells what a memory cannot keep as ADELE's own."""
    try:
        yield
    except ValueError as error:
        raise MisconfigurationException(f"ADELE: {error}{advice}") from error


def memory_of(state: dict[str, Any] | None) -> MapMemory | None:
    """A memory as it was saved."""
    if state is None:
        return None
    memory = MapMemory(state["num_samples"], state["num_classes"])
    memory.load_state_dict(state)
    return memory
