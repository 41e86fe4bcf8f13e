"""The network of an earlier time as a teacher: a copy of the module with the weights that were kept."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.engine.networks.peer import Peer, load_weights_, weights_of

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    from lightning_reg.engine.host.owner import Owner
    from lightning_reg.engine.step import Step

__all__ = ["Teacher", "network"]


class Teacher:
    """An earlier network, for the time of a fit, and what it makes of the batches.

    Args:
        layers: Layers whose outputs it gives; without any it gives its loss call.

    Attributes:
        peer: The network, ``None`` if there is none in this task.

    """

    def __init__(self, layers: Sequence[str] = ()) -> None:
        self._layers = layers
        self.peer: Peer | None = None

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {"_layers": self._layers, "peer": None}  # its weights are kept elsewhere

    def clear(self) -> None:
        """There is no teacher any more."""
        self.peer = None

    def take(self, owner: object, module: "LightningModule", kept: dict[str, Any]) -> None:
        """Makes the teacher of the weights that were kept, if any were.

        Args:
            owner: Whose it is; its class is named in messages.
            module: The user's module, which it is a copy of.
            kept: The weights are under ``"teacher"``, by name; replaced by the same in the teacher's own memory, by the
                shapes that the module has now.

        Raises:
            MisconfigurationException: If the module cannot be copied, or its shapes are others.

        """
        if "teacher" in kept:
            self.peer = Peer(module, layers=self._layers, owner=owner)
            load_weights_(self.peer.module, kept["teacher"], owner)
            kept["teacher"] = weights_of(self.peer.module)

    def observe(self, step: "Step", owner: "Owner") -> None:
        """Has a look at the step's batch; ``step.notes`` keeps for the owner what it saw."""
        if self.peer is not None:
            step.notes[owner] = self.peer.see(step, None if self._layers else owner)


def network(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers as they are now, by name."""
    return {name: value.clone() for name, value in weights_of(module).items()}
