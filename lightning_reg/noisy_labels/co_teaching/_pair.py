"""The two networks of co-teaching while a fit runs, what each of them makes of the other's batches, and their state."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.engine.host.checkpoints import read_checkpoint
from lightning_reg.engine.host.errors import MisconfigurationException, reading_state
from lightning_reg.engine.host.names import plain_name
from lightning_reg.engine.layers.named import find_layer, named_layers
from lightning_reg.engine.networks.edits_beside import EditsBeside
from lightning_reg.engine.networks.ensemble import MeanOfTwo, mean_of_layers, two_copies
from lightning_reg.engine.networks.named_weights import weights_of
from lightning_reg.engine.networks.peer import Peer
from lightning_reg.engine.networks.trained import PeerInit, TrainedPeer
from lightning_reg.engine.run.engine import attached_engine
from lightning_reg.engine.run.phases import OnLayers
from lightning_reg.engine.step import EvaluationStep
from lightning_reg.noisy_labels._two_networks import SecondNetwork

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.loss.call import LossCall
    from lightning_reg.engine.step import Step
    from lightning_reg.engine.technique import Technique

__all__ = ["Pair"]


class Pair(SecondNetwork):
    """The module and a second network.

    Args:
        init: First weights of the second network.
        file: Of a checkpoint with them, in place of those.

    """

    def __init__(self, init: PeerInit, file: str | None) -> None:
        super().__init__()
        self._init, self._file = init, file
        self._askers: list[tuple[Peer, EditsBeside]] = []

    @override
    def start(self, owner: "Technique", trainer: "Trainer", module: "LightningModule") -> None:
        self.stop()
        beside = [t for t in attached_engine(trainer).techniques if isinstance(t, OnLayers) and t.edits_second]
        first = None if self._file is None or self._kept else _weights_in_file(self._file, module, owner)
        second = TrainedPeer(trainer, module, owner, self._init, beside, first)
        if self._kept:
            with reading_state(owner):
                second.load_state_dict(self._kept)
        self._second, self._live, self._kept = second, [module, second.module], {}
        for network in self._live:
            asked = Peer(network, owner=owner)
            asked.share_memory_with(network)
            self._askers.append((asked, EditsBeside(asked.module, beside, training=False)))

    @override
    def stop(self) -> None:
        super().stop()
        self._askers = []

    def ask_other(self, step: "Step", owner: "Technique") -> "LossCall | None":
        """The loss call of the other network on the step's batch, in eval mode and without gradient."""
        if self._second is not None and not self.number_of(step):
            self._second.note()
        other = 1 - self.number_of(step)
        asked, edits = self._askers[other]
        as_asked = EvaluationStep(step.trainer, asked.module, (step.batch, *step.arguments), "predict")
        with edits.around(as_asked):
            return asked.see(step, owner, weights=weights_of(self._live[other])).call

    def ensemble(
        self, module: "LightningModule", owner: "Technique", layer: str, prefix: Mapping[str, int]
    ) -> MeanOfTwo:
        """Copies of a layer of both networks in eval mode, as one; linear layers see the first features alone."""
        kept = self.state_dict()
        if not kept:
            raise RuntimeError(
                f"{type(owner).__name__}: there is no second network; fit first, or load a checkpoint of a fit."
            )
        networks = two_copies(module, owner, kept["weights"])
        for network in networks:
            for name, size in prefix.items():
                found = find_layer(named_layers(network), name, type(owner).__name__)
                found.register_forward_pre_hook(_first_features(size))
        return mean_of_layers(networks, layer)

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_askers": []}


def _weights_in_file(file: str, module: "LightningModule", owner: "Technique") -> dict[str, Tensor]:
    """The weights of a checkpoint or state dict, by the names of a module; all that it saves must be there."""
    name = f"{type(owner).__name__}(second={file!r})"
    try:
        content = read_checkpoint(Path(file))
    except ValueError as error:
        raise MisconfigurationException(f"{name}: {error}") from error
    state = content.get("state_dict", content)
    found = {plain_name(key): value for key, value in state.items() if isinstance(value, Tensor)}
    needed = [plain_name(key) for key, value in module.state_dict().items() if isinstance(value, Tensor)]
    missing = [key for key in needed if key not in found]
    if missing:
        raise MisconfigurationException(
            f"{name}: the file has no {', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''}. It must hold"
            f" weights of {type(module).__name__} under the same names, as a checkpoint of the same module does."
        )
    return {key: found[key] for key in needed}


def _first_features(size: int) -> "Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]":
    def cut(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        features: Tensor = args[0]
        rest = max(features.shape[-1] - size, 0)
        return F.pad(features[..., :size], (0, rest)), *args[1:]

    return cut
