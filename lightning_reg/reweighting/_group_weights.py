"""What techniques share in which the groups of the samples count by their losses."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.distributed import world_size
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.run.phases import Member, phases_of
from lightning_reg.engine.technique import DrawTechnique, LossTechnique
from lightning_reg.reweighting._group_losses import (
    group_ascent,
    group_draws,
    group_losses,
    group_sample_weights,
    worst_group_weights,
)

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.loss.call import LossCall

__all__ = ["GroupWeights"]


class GroupWeights(DrawTechnique, LossTechnique, ABC):
    """Weights of groups that follow their losses, and epochs in which groups come alike."""

    watched = ("worst_loss",)
    num_groups: int
    mode: str
    eta: float
    draws: str | None

    _log_weights: Tensor | None
    _table: Tensor | None  # membership by sample, (N, G)

    @property
    @override
    def draws_samples(self) -> bool:
        return self.draws == "balanced"

    @override
    def conflict_with(self, other: Member) -> str | None:
        if other.mixes != "none":
            return "a mixed sample is of two groups. Remove one of them."
        if "sample_weights" in phases_of(other) and other.loss == self.loss:
            return (
                "both weigh the samples of the same loss, and the product is the loss of no group. Remove one of them,"
                " or let them work on different calls with `loss=...`."
            )
        return None

    @override
    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        if host.batches_so_far(trainer) == 0:  # a new training, not a resumed or continued one
            self._log_weights = None

    @override
    def draw_samples(self, epoch: int, size: int) -> Tensor | None:
        if not self.draws_samples or self._table is None:
            return None
        self._check_size(size)
        return group_draws(self._table, size, self.draw_generator(epoch))

    @override
    def sample_weights(self, call: "LossCall") -> Tensor | None:
        membership, mass = self._of_batch(call), call.sample_mass
        if mass is not None:
            membership = membership * (mass > 0)[:, None]
        group = host.data_parallel_group(call.step.trainer)
        losses, counts = group_losses(call.losses, membership, group)
        weights = self._weights(losses, counts)
        if call.step.is_logging:
            shown = torch.where(counts > 0, losses, -torch.inf).max()
            call.step.log(self, "worst_loss", shown)
            for position, weight in enumerate(weights.unbind()):
                call.step.log(self, f"weight_{position}", weight)
        # The user's mean divides by the mass of this rank, and DDP by the number of ranks.
        each = group_sample_weights(membership, weights, counts) * (1 if group is None else world_size(group))
        return each * call.batch_size if mass is None else each * mass.sum() / torch.where(mass > 0, mass, 1.0)

    def _weights(self, losses: Tensor, counts: Tensor) -> Tensor:
        present = (counts > 0) & losses.isfinite()
        losses = self._adjusted_losses(losses)
        if self.mode == "max":
            return worst_group_weights(losses, present)
        if self._log_weights is None:
            self._log_weights = losses.new_zeros(self.num_groups).log_softmax(0)
        self._log_weights = group_ascent(self._log_weights.to(losses.device), losses, present, self.eta)
        return self._log_weights.exp()

    def _adjusted_losses(self, losses: Tensor) -> Tensor:
        return losses

    def _of_batch(self, call: "LossCall") -> Tensor:
        samples = call.samples(self)
        if self._table is None:
            raise RuntimeError("The groups are read when the fit starts.")
        if samples.size is not None:
            self._check_size(samples.size)
        self._table = self._table.to(call.input.device)
        return self._table[samples.indices]

    def _check_size(self, size: int) -> None:
        if self._table is not None and size != len(self._table):
            who, remedy = self._table_source()
            raise MisconfigurationException(
                f"{type(self).__name__}: {who} {len(self._table)} samples, the training dataset has {size}. {remedy}"
            )

    @abstractmethod
    def _table_source(self) -> tuple[str, str]:
        """Who says how many samples there are, as the beginning of a sentence, and what to do if they are others."""

    @override
    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_table": None}  # the user's data, read again at each fit

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self._log_weights is None else {"log_weights": self._log_weights}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            self._log_weights = state_dict["log_weights"].clone()
