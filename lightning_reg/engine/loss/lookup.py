"""Finding what is attached to a Trainer; kept outside the Trainer and the callbacks, so both stay plain data."""

from typing import Any, Protocol
from weakref import WeakKeyDictionary

from torch import Tensor

__all__ = ["ENGINES", "TakesLosses", "engine_behind"]


class TakesLosses(Protocol):
    """What takes the losses of a module that computes them itself."""

    def reduce_loss(
        self, per_sample: Tensor, logits: Tensor | None, targets: Tensor | None, indices: Tensor | None
    ) -> Tensor:
        """What :meth:`LossMixin.reduce_loss` returns."""


ENGINES: "WeakKeyDictionary[Any, TakesLosses]" = WeakKeyDictionary()


def engine_behind(module: Any) -> TakesLosses | None:
    """What stands around the module's training step at present, ``None`` outside of a fit."""
    try:
        return ENGINES.get(module.trainer)
    except RuntimeError:  # Lightning's answer when the module is attached to no Trainer
        return None
