"""Finding the engine of a Trainer; kept outside the Trainer and the callbacks, so both stay plain data."""

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from lightning_reg.engine.run.engine import Engine

__all__ = ["ENGINES", "engine_of"]

ENGINES: "WeakKeyDictionary[Any, Engine]" = WeakKeyDictionary()


def engine_of(module: Any) -> "Engine | None":
    """The engine that stands around the module's training step at present, ``None`` outside of a fit."""
    try:
        return ENGINES.get(module.trainer)
    except RuntimeError:  # Lightning's answer when the module is attached to no Trainer
        return None
