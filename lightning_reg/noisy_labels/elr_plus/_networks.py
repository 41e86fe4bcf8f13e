"""The two networks of ELR+ while a fit runs, their averages, and what is kept of them in between."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from typing_extensions import override

from lightning_reg.engine.host.errors import reading_state
from lightning_reg.engine.host.left_out import LeftOut
from lightning_reg.engine.networks.ensemble import JointForward, MeanOfTwo, layer_or_module, mean_of_layers, two_copies
from lightning_reg.engine.networks.followed import Follower, Source, TakenOver
from lightning_reg.engine.networks.named_weights import load_weights_, weights_of
from lightning_reg.engine.networks.peer import Peer
from lightning_reg.engine.networks.trained import PeerInit, PeerStep, TrainedPeer
from lightning_reg.noisy_labels._two_networks import SecondNetwork
from lightning_reg.noisy_labels.elr_plus.core import elr_plus_decay

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.loss.call import LossCall
    from lightning_reg.engine.step import Step
    from lightning_reg.engine.technique import Technique

__all__ = ["Networks", "Notes"]


@dataclass
class Notes:
    """What a step keeps between its phases.

    Args:
        teacher: The teacher's loss call on the batch before mixing, ``None`` if its step made no loss.
        targets: Targets of the batch before mixing, ``(B, C)``, once they are updated.

    """

    teacher: "LossCall | None"
    targets: Tensor | None = None


class Networks(SecondNetwork):
    """The module, perhaps a second network, and an average of each.

    Args:
        count: 1, or 2 with a second network.
        init: First weights of the second network.
        in_train_mode: Whether teachers run in the modes of the networks in training, or in eval mode.
        decay: Decay of the averages.
        rampup_steps: Optimizer steps over which the decay grows.

    """

    def __init__(self, count: int, *, init: PeerInit, in_train_mode: bool, decay: float, rampup_steps: int) -> None:
        super().__init__()
        self._has_second, self._init, self._in_train_mode = count == 2, init, in_train_mode
        self._decay, self._rampup_steps = decay, rampup_steps
        self._steps = 0
        self._averages: list[Peer] = []
        self._source: Source | None = None
        self._followers: list[Follower] = []
        self._settings: TakenOver | None = None
        self._joint: JointForward | None = None
        self.left_out = LeftOut("ELRPlusCallback", "updates of a teacher by weights that")

    @override
    def clear(self) -> None:
        super().clear()
        self._steps = 0
        self.left_out.restore(0)

    @override
    def start(self, owner: "Technique", trainer: "Trainer", module: "LightningModule") -> None:
        self.stop()
        self._live = [module]
        if self._has_second:
            self._second = TrainedPeer(trainer, module, owner, self._init)
            self._live.append(self._second.module)
        self._averages = [Peer(network, training=self._in_train_mode, owner=owner) for network in self._live]
        self._source = Source(module) if self._second is None else None
        self._followers = [Follower(average.module) for average in self._averages]
        if self._kept:
            with reading_state(owner):
                for average, weights in zip(self._averages, self._kept["averages"], strict=True):
                    load_weights_(average.module, weights, owner)
                if self._second is not None:
                    self._second.load_state_dict(self._kept["second"])
        self._kept = {}

    @override
    def stop(self) -> None:
        self.end_joint_validation()
        super().stop()
        self._averages, self._followers, self._source, self._settings = [], [], None, None

    # -- training -----------------------------------------------------------------------------------------------------

    def steps_of(self, step: "Step") -> int:
        """Optimizer steps that the network of a step has had."""
        return step.global_step if isinstance(step, PeerStep) else self._steps

    def teacher_of(self, step: "Step") -> Peer:
        """The average of the other network; of the only one, where there is one."""
        return self._averages[(1 - self.number_of(step)) % len(self._averages)]

    def begin_step(self, step: "Step") -> None:
        """To be told of a step before its teacher is asked: hooks may have changed the modes of layers."""
        if self._second is None:
            self._settings = None if self._source is None else self._source.now()
        else:
            self._settings = self._second.settings if self.number_of(step) else self._second.note()
        if self._in_train_mode and self._settings is not None:
            self._followers[self._averages.index(self.teacher_of(step))].take_over_modes(self._settings)

    def after_step(self) -> None:
        """To be told of an optimizer step of the module."""
        self._steps += 1
        self._follow(0, self._steps)

    @override
    @torch.no_grad()
    def _follow(self, number: int, steps: int) -> None:
        average = self._averages[number]
        self.left_out.add(~average.update_average_(elr_plus_decay(steps, self._decay, self._rampup_steps)))
        settings = self._settings
        if not self._in_train_mode or (settings is not None and not all(settings.in_train_mode)):
            # Running statistics count: those of the network.
            for own, live in zip(average.module.buffers(), self._live[number].buffers(), strict=True):
                own.copy_(live)

    # -- both at once -------------------------------------------------------------------------------------------------

    def begin_joint_validation(self, layer: str) -> None:
        """Lets a layer of the module answer for both networks; "" is the module itself."""
        if self._second is not None and self._joint is None:
            self._joint = JointForward(*(layer_or_module(network, layer) for network in self._live))

    def end_joint_validation(self) -> int | None:
        """The layer answers for itself again; how often it answered for both, ``None`` if it did not begin to."""
        joint, self._joint = self._joint, None
        if joint is not None:
            joint.undo()
        return None if joint is None else joint.calls

    def ensemble(self, module: "LightningModule", owner: "Technique", layer: str) -> MeanOfTwo:
        """Copies of a layer of both networks in eval mode, as one."""
        kept = self.state_dict().get("second")
        if not kept:
            raise RuntimeError(
                f"{type(owner).__name__}: there is no second network; fit with networks=2 first, or load a checkpoint."
            )
        return mean_of_layers(two_copies(module, owner, kept["weights"]), layer)

    # -- state --------------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        if not self._averages:
            return self._kept
        averages = [weights_of(average.module) for average in self._averages]
        copied: list[Any] = tree_map_only(Tensor, lambda t: t.cpu().clone(), averages)
        second = None if self._second is None else self._second.state_dict()
        return {"steps": self._steps, "left_out": self.left_out.read(), "averages": copied, "second": second}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keeps what :meth:`state_dict` gave for the next :meth:`start`.

        Raises:
            ValueError: If it is the state of another number of networks.

        """
        count, found = 1 + self._has_second, len(state["averages"])
        if found != count:
            raise ValueError(f"The checkpoint has the state of {found} networks, this run has networks={count}.")
        super().load_state_dict(state)
        self._steps = state["steps"]
        self.left_out.restore(state["left_out"])

    @override
    def __getstate__(self) -> dict[str, Any]:
        running = dict.fromkeys(("_joint", "_source", "_settings"))
        return {**super().__getstate__(), **running, "_averages": [], "_followers": []}
