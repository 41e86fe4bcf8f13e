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
from lightning_reg.engine.networks.trained import PeerInit, PeerStep, TrainedPeer
from lightning_reg.engine.run.phases import OnLayers
from lightning_reg.engine.step import EvaluationStep

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.loss.call import LossCall
    from lightning_reg.engine.run.engine import Engine
    from lightning_reg.engine.step import Step
    from lightning_reg.engine.technique import Technique

__all__ = ["Pair"]


class Pair:
    """The module and a second network.

    Args:
        init: First weights of the second network.

    """

    def __init__(self, init: PeerInit) -> None:
        self._init = init
        self._kept: dict[str, Any] = {}
        self._live: list[LightningModule] = []
        self._askers: list[tuple[Peer, EditsBeside]] = []
        self._second: TrainedPeer | None = None

    @property
    def is_started(self) -> bool:
        """Whether there are networks: not in the steps that Lightning's learning-rate finder makes before the fit."""
        return self._second is not None

    @property
    def second_loss(self) -> Tensor | None:
        """Mean loss of the second network in the part of an epoch that it trained last."""
        return None if self._second is None else self._second.loss

    def clear(self) -> None:
        """Forgets everything: a new training begins."""
        self.stop()
        self._kept = {}

    def start(
        self, owner: "Technique", trainer: "Trainer", module: "LightningModule", engine: "Engine", file: str | None
    ) -> None:
        """Makes the networks for a fit, and puts in what was kept, or what is in the file."""
        self.stop()
        beside = [t for t in engine.techniques if isinstance(t, OnLayers) and t.edits_second]
        first = None if file is None or self._kept else _weights_in_file(file, module, owner)
        second = TrainedPeer(trainer, module, owner, self._init, beside, first)
        if self._kept:
            with reading_state(owner):
                second.load_state_dict(self._kept)
        self._second, self._live, self._kept = second, [module, second.module], {}
        for network in self._live:
            asked = Peer(network, owner=owner)
            asked.share_memory_with(network)
            self._askers.append((asked, EditsBeside(asked.module, beside, training=False)))

    def stop(self) -> None:
        """Keeps plain tensors of the second network and lets go of both."""
        self._kept = self.state_dict()
        self._live, self._askers, self._second = [], [], None

    # -- training -----------------------------------------------------------------------------------------------------

    def number_of(self, step: "Step") -> int:
        """0 for the module, 1 for the second network."""
        return int(isinstance(step, PeerStep))

    def ask_other(self, step: "Step", owner: "Technique") -> "LossCall | None":
        """The loss call of the other network on the step's batch, in eval mode and without gradient."""
        if self._second is not None and not self.number_of(step):
            self._second.note()
        other = 1 - self.number_of(step)
        asked, edits = self._askers[other]
        as_asked = EvaluationStep(step.trainer, asked.module, (step.batch, *step.arguments), "predict")
        with edits.around(as_asked):
            return asked.see(step, owner, weights=weights_of(self._live[other])).call

    def catch_up(self, engine: "Engine", batches: int) -> None:
        """Trains the second network on as many batches of this epoch as the module has had."""
        if self._second is not None:
            self._second.train(engine, batches, _nothing)

    def end_epoch(self) -> None:
        """Moves the second network's schedulers that count epochs."""
        if self._second is not None:
            self._second.end_epoch()

    # -- afterwards ---------------------------------------------------------------------------------------------------

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

    def state_dict(self) -> dict[str, Any]:
        """The second network's; empty before the first fit."""
        return self._kept if self._second is None else self._second.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keeps what :meth:`state_dict` gave for the next :meth:`start`."""
        self._kept = state

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_live": [], "_askers": [], "_second": None, "_kept": self.state_dict()}


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


def _nothing() -> None:
    pass


def _first_features(size: int) -> "Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]":
    def cut(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        features: Tensor = args[0]
        rest = max(features.shape[-1] - size, 0)
        return F.pad(features[..., :size], (0, rest)), *args[1:]

    return cut
