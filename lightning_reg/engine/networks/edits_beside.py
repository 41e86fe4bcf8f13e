"""What techniques change of layers, on a network beside the user's: one that is trained, or one that is asked."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lightning_reg.engine.layers.edits import LayerEdits
from lightning_reg.engine.run.layer_parts import edits_of

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    from lightning_reg.engine.run.phases import OnLayers
    from lightning_reg.engine.step import Step

__all__ = ["EditsBeside"]


class EditsBeside:
    """Layers of a network beside the user's, edited by techniques that say so (``edits_second``).

    Args:
        module: The network, a copy of the user's.
        techniques: Whose edits act, in the order of the callbacks.
        training: Whether the network is trained, or asked in eval mode.

    """

    def __init__(self, module: "LightningModule", techniques: "Sequence[OnLayers]", *, training: bool = True) -> None:
        self._techniques = techniques
        self._edits = LayerEdits(module, edits_of(techniques, module), training=training)

    @contextmanager
    def around(self, step: "Step") -> Iterator[None]:
        """A context in which the network runs.

        Args:
            step: Its step; techniques that are active in it and act at its stage join those that are in it already.

        """
        acting = [t for t in self._techniques if step.stage in t.stages and t.is_active(step)]
        step.active = [*step.active, *acting]
        self._edits.open(step)
        try:
            yield
        finally:
            self._edits.shut()

    def rest(self) -> None:
        """The step is over, with its backward pass."""
        self._edits.rest()
