"""The user's network as it was when its training began: what a fit with frozen latents has of it, and no more."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.networks.named_weights import weights_of
from lightning_reg.engine.networks.peer import Peer
from lightning_reg.engine.run.engine import attached_engine
from lightning_reg.engine.run.phases import ThroughMap, taking_part
from lightning_reg.engine.weights.deltas import frozen_names

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    from lightning_reg.engine.host.owner import Owner
    from lightning_reg.engine.step import Step

__all__ = ["FirstNetwork"]


class FirstNetwork:
    """The network with its first weights, and what it makes of the batches; of a fit with frozen latents.

    Weights that nobody trains are those of the module itself, and what its owner has of the first weights is not copied
    either. All else (heads that are trained as they are, weights that another technique maps, buffers) is kept when a
    training begins, and saved with the owner's state: a resumed run asks the same network.

    Attributes:
        kept: First values of what may change, by name.

    """

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}
        self._given: dict[str, Tensor] = {}
        self._peer: Peer | None = None

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {"kept": self.kept, "_given": {}, "_peer": None}

    @property
    def is_there(self) -> bool:
        """Whether it was asked in this fit already."""
        return self._peer is not None

    def forget(self) -> None:
        """Another training begins."""
        self.kept = {}
        self.rest()

    def rest(self) -> None:
        """The fit is over; first values are kept for one that goes on."""
        self._given, self._peer = {}, None

    def load(self, kept: Mapping[str, Tensor]) -> None:
        """Goes on with first values that were kept."""
        self.kept = dict(kept)
        self.rest()

    def observe(self, step: "Step", owner: "Owner", first: Mapping[str, Tensor]) -> None:
        """Has a look at the step's batch; ``step.notes`` keeps for the owner what it saw.

        Args:
            step: The step, with its final batch; the module's weights are dense.
            owner: Whose it is; its ``loss`` chooses the loss call.
            first: What the owner has of the first weights, by name; used as it is.

        """
        if self._peer is None:
            self._peer = Peer(step.module, owner=owner)
            self._peer.share_memory_with(step.module)
            self._given = self._weights(step.module, step, first)
            for name, parameter in self._peer.module.named_parameters():
                if name in first:  # the user may have frozen all: a loss call is one by its gradient
                    parameter.requires_grad_()
        step.notes[owner] = self._peer.see(step, owner, weights=self._given)

    def _weights(self, module: "LightningModule", step: "Step", first: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # Not those of the Trainer, which has none while it looks for a learning rate.
        mapping = taking_part(attached_engine(step.trainer).techniques, ThroughMap)
        mapped = {name for technique in mapping for name in technique.latents.values}
        resting = frozen_names(module, [t for t in mapping if t.latents.frozen], mapped)
        given = dict(first)
        for name, value in weights_of(module).items():
            if name in resting:
                given[name] = value
            elif name not in given:
                held = self.kept.get(name)
                self.kept[name] = given[name] = value.clone() if held is None else held.to(value.device)
        return given
