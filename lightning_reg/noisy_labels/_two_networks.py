"""What techniques with a second network have in common: both networks while a fit runs, and the hooks around them."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.networks.trained import PeerStep, TrainedPeer, check_trainable
from lightning_reg.engine.run.engine import attached_engine
from lightning_reg.engine.run.phases import Member, draws_samples, has_prompts, phases_of
from lightning_reg.engine.technique import BatchTechnique, LossTechnique
from lightning_reg.noisy_labels._reports import ReportsLabelErrors

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.host.left_out import LeftOut
    from lightning_reg.engine.loss.call import LossCall
    from lightning_reg.engine.step import Step
    from lightning_reg.engine.technique import Technique
    from lightning_reg.noisy_labels._target_table import TargetTable

__all__ = ["SecondNetwork", "TwoNetworks"]


class SecondNetwork:
    """The module and a second network: trained while a fit runs, kept as plain tensors from one to the next."""

    def __init__(self) -> None:
        self._kept: dict[str, Any] = {}
        self._live: list[LightningModule] = []
        self._second: TrainedPeer | None = None

    @property
    def is_started(self) -> bool:
        """Whether there are networks: not in the steps that Lightning's learning-rate finder makes before the fit."""
        return bool(self._live)

    @property
    def second_loss(self) -> Tensor | None:
        """Mean loss of the second network in the part of an epoch that it trained last."""
        return None if self._second is None else self._second.loss

    def start(self, owner: "Technique", trainer: "Trainer", module: "LightningModule") -> None:
        """Makes the networks for a fit, and puts in what was kept."""
        raise NotImplementedError

    def stop(self) -> None:
        """Keeps plain tensors of the networks and lets go of them."""
        self._kept = self.state_dict()
        self._live, self._second = [], None

    def clear(self) -> None:
        """Forgets everything: a new training begins."""
        self.stop()
        self._kept = {}

    def number_of(self, step: "Step") -> int:
        """0 for the module, 1 for the second network."""
        return int(isinstance(step, PeerStep))

    def catch_up(self, trainer: "Trainer") -> None:
        """Trains the second network on as many batches of this epoch as the module has had."""
        if (second := self._second) is not None:
            batches = host.batches_of_epoch(trainer)
            second.train(attached_engine(trainer), batches, lambda: self._follow(1, second.steps))

    def _follow(self, number: int, steps: int) -> None:
        """Follows an optimizer step of the network of a number, which has had as many."""

    def end_epoch(self) -> None:
        """Moves the second network's schedulers that count epochs."""
        if self._second is not None:
            self._second.end_epoch()

    def state_dict(self) -> dict[str, Any]:
        """Tensors on the CPU and plain values; empty before the first fit."""
        return self._kept if self._second is None else self._second.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keeps what :meth:`state_dict` gave for the next :meth:`start`."""
        self._kept = state

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_live": [], "_second": None, "_kept": self.state_dict()}


class TwoNetworks(ReportsLabelErrors, BatchTechnique, LossTechnique, ABC):
    """Trains a second network beside the module, an epoch of it behind each of the module's, before validation."""

    needs_indices: ClassVar[bool] = True
    _without: ClassVar[str] = "the second network lacks"  # what others do to the module's weights

    _networks: SecondNetwork
    _tables: "list[TargetTable]"  # one for each network

    @abstractmethod
    def _works(self) -> bool:
        """Whether it does anything, by its arguments."""

    @override
    def check(self, trainer: "Trainer", module: "LightningModule") -> None:
        if self._works():
            check_trainable(self, trainer, module)

    @override
    def conflict_with(self, other: Member) -> str | None:
        if not self._works():
            return None
        name = type(other).__name__
        if "edit_weights" in phases_of(other):
            return f"{name} changes the module's weights in each step, and {self._without} that."
        if has_prompts(other):
            return f"what {name} trains is beside the module's weights, and {self._without} that."
        if draws_samples(other):
            return f"{name} draws the samples of the epochs, and the second network reads them in an order of its own."
        return None

    @property
    @override
    def trains_second(self) -> bool:
        return self._works()

    @override
    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        if host.batches_so_far(trainer) == 0:  # a new training, not a resumed or continued one
            self._begin_anew()
        if self._works():
            self._networks.start(self, trainer, pl_module)

    def _begin_anew(self) -> None:
        self._networks.clear()
        for table in self._tables:
            table.clear()

    @override
    def is_active(self, step: "Step") -> bool:
        return self._networks.is_started

    def _log_networks(self, call: "LossCall") -> None:
        left_out = [one.scalar(call.input.device) for one in self._left_out()]
        call.step.log(self, "not_finite", torch.stack(left_out).sum())
        if (second_loss := self._networks.second_loss) is not None:
            call.step.log(self, "second_loss", second_loss)

    def _left_out(self) -> "list[LeftOut]":
        return [table.left_out for table in self._tables]

    @override
    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_last_batch:  # before validation, and before a checkpoint
            self._catch_up(trainer)
            self._networks.end_epoch()

    @override
    def on_train_epoch_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:  # if it was cut short
        self._catch_up(trainer)
        for left_out in self._left_out():
            left_out.say()

    def _catch_up(self, trainer: "Trainer") -> None:
        self._networks.catch_up(trainer)

    @override
    def on_exception(self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException) -> None:
        self._networks.stop()

    @override
    def teardown(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        self._networks.stop()

    @override
    def state_dict(self) -> dict[str, Any]:
        networks = self._networks.state_dict()
        return {"networks": networks, "tables": [table.state_dict() for table in self._tables]} if networks else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            self._networks.load_state_dict(state_dict["networks"])
            for table, state in zip(self._tables, state_dict["tables"], strict=True):
                table.load_state_dict(state)

    @override
    def _targets_and_labels(self, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """The mean of the targets over the networks."""
        tables = [table.all(labels) for table in self._tables]
        return torch.stack([targets for targets, _ in tables]).mean(0), tables[0][1]
