"""Elastic weight consolidation: weights tied to those of the task before by their Fisher information."""

import math
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, final

from torch import Tensor, nn
from torch.optim import SGD
from typing_extensions import override

from lightning_reg.continual._tasks import TaskTechnique
from lightning_reg.continual.weight_anchors._fisher import FisherPass
from lightning_reg.continual.weight_anchors._ties import Slot, Ties, add_earlier_, free_rows_
from lightning_reg.continual.weight_anchors.core import fisher_diagonal
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_bool, check_choice, check_number
from lightning_reg.engine.host.distributed import all_reduce_sum
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.networks.peer import Peer, check_runs_on_copy
from lightning_reg.engine.run.engine import attached_engine
from lightning_reg.engine.run.watching import counted, progress
from lightning_reg.engine.technique import PenaltyTechnique
from lightning_reg.engine.weights.chosen import chosen_weights

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer

    from lightning_reg.engine.step import Step

__all__ = ["EWC"]


@final
class EWC(TaskTechnique, PenaltyTechnique):
    r"""Elastic weight consolidation: ties weights to those of the task before, each as firmly as it matters there.

    .. math:: \lambda \sum_j F_j (\theta_j - \theta^*_j)^2, \qquad
        F_j = \frac1N \sum_i \Bigl(\frac{\partial \ell_i}{\partial \theta_j}\Bigr)^2

    When a task ends, F is estimated by a pass over its training data (without the transforms of other techniques, in
    eval mode and full precision), of which the fit notices nothing. In the first task there is nothing to tie to.

    Use it for the least forgetting, in class-incremental training together with :class:`PredictionDistillation`: alone
    it leaves old classes at chance there. A task is a fit that came to its end, or a number in the datamodule's
    ``current_task``, which may not change within a fit; keep the object from fit to fit.

    Source:
        Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017, arXiv 1612.00796; as
        compared in Smith et al., "A Closer Look at Rehearsal-Free Continual Learning", CVPR Workshops 2023, arXiv
        2203.17269.

    Differs:
        F is the mean of the samples' squared gradients, as in the formula; the code that the paper builds on squares
        the gradient of a batch's mean (``per_sample=False``). Samples (batches then) whose gradients are not finite are
        left out of the mean, with a warning.

    Memory: the tied parameters twice more for each task (``memory="online"``: twice in all); in the Fisher pass one
    copy of the module and the gradients of a few samples. Time: the Fisher pass takes as long as about four epochs.

    Args:
        weight: lambda, at least 0. Sensible: 1 to 1e4, and with SGD below 1 / (learning rate x largest F): beyond that
            weights move ever farther from their anchors, with a warning in the first step. Neutral: 0.
        params: Patterns of parameter names as in ``named_parameters()``, one of which must match; ``None`` for all that
            are trained.
        exclude: Patterns of names to leave free (``"head.*"``). Free anyway are rows by which a parameter has grown
            since, and in the layer that the logits come from the rows of classes that were no target so far (in the
            batches that F was estimated on): a head may have all classes from the start on.
        fisher_batches: Training batches to estimate F on, at least 1; ``None`` for all of a loader that has a length.
        per_sample: Whether gradients are squared sample by sample; ``False``: batch by batch, much cheaper.
        labels: At whose label the gradient is taken: the model's own most probable (``"argmax"``), one drawn from its
            probabilities (``"sample"``), or the given one (``"true"``). A regression (mse_loss, l1_loss,
            smooth_l1_loss, huber_loss) counts as a Gaussian with variance 1 around the prediction, gaussian_nll_loss as
            one with its variances, poisson_nll_loss as counts; they need ``"sample"`` or ``"true"``. In
            binary_cross_entropy_with_logits each label is there or not by itself.
        memory: ``"separate"``: a penalty for each task before; ``"online"``: one, with the sum of all F and the weights
            of the last task.
        loss: Which loss call has the logits, if there are several: position, ``"last"``, function name, or
            ``"model.py:42"``.
        name: Tells several instances in one Trainer apart.
        seed: Of the draws of ``labels="sample"``.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> ewc = EWC(weight=100.0, exclude=["head.*"])
        >>> trainer = Trainer(max_epochs=20, callbacks=[ewc], logger=False, enable_checkpointing=False)

    """

    reads_data_of_task = True

    def __init__(
        self,
        weight: float = 100.0,
        params: list[str] | str | None = None,
        exclude: list[str] | str | None = None,
        fisher_batches: int | None = None,
        per_sample: bool = True,
        labels: Literal["argmax", "sample", "true"] = "argmax",
        memory: Literal["separate", "online"] = "separate",
        loss: int | str | None = None,
        name: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(loss=loss, name=name, seed=seed)
        check_number(self, "weight", weight, low=0)
        check_number(self, "fisher_batches", fisher_batches, low=1, integer=True, optional=True)
        check_bool(self, "per_sample", per_sample)
        check_choice(self, "labels", labels, ("argmax", "sample", "true"))
        check_choice(self, "memory", memory, ("separate", "online"))
        self.weight, self.params, self.exclude = weight, params, exclude
        self.fisher_batches, self.per_sample, self.labels, self.memory = fisher_batches, per_sample, labels, memory
        self._ties = Ties()
        self._has_looked = self._has_said = False
        self._pass = FisherPass(self, self.labels, per_sample=self.per_sample)

    @property
    @override
    def is_neutral(self) -> bool:
        return self.weight == 0

    @property
    @override
    def acts(self) -> bool:
        return bool(self._ties)

    @property
    @override
    def remembers_channels(self) -> bool:
        """Whether it ties to an earlier task."""
        return self.tasks > 0 and not self.is_neutral

    @override
    def describe(self) -> str:
        if self.is_neutral:
            return "weight=0: inactive"
        to = self._tasks.so_far if self.tasks else "nothing to tie to in the first task"
        seen: Tensor | None = self._tasks.kept.get("seen")
        if seen is not None and not seen.all():
            to += f"; free: the head's rows of {int((~seen).sum())} of {len(seen)} classes"
        passes = "samples" if self.per_sample else "batches"
        return f"weight={self.weight:g}, Fisher by {passes} at {self.labels} labels, {self.memory}; {to}"

    @override
    def check(self, trainer: "Trainer", module: "LightningModule") -> None:
        super().check(trainer, module)
        check_runs_on_copy(module, self)

    @override
    def begin(self, step: "Step") -> None:
        # Asked in the first task too, so that a pattern without a match is not found out at its end.
        chosen = self._chosen(step.module)
        self._ties.tie(self, step.module, self._tasks.kept.get("slots", ()))
        if self.fisher_batches is None and step.trainer.num_training_batches == math.inf:
            loader = step.trainer.train_dataloader
            raise MisconfigurationException(
                "EWC reads the training data once more when the fit ends, and"
                f" {type(getattr(loader, 'dataset', loader)).__name__} has no length, so it may not end. Write"
                " `fisher_batches`, how many batches to read then at most."
            )
        # What the Fisher pass cannot do is told now, not when the training is over.
        peer = Peer(step.module, owner=self)
        named = dict(peer.module.named_parameters())
        self._pass.try_out(peer, step, [named[name] for name in chosen])

    @override
    def penalty(self, module: "LightningModule") -> Tensor | None:
        value = self._ties.penalty()
        return None if value is None else self.weight * value

    @override
    def on_before_optimizer_step(
        self, trainer: "Trainer", pl_module: "LightningModule", optimizer: "Optimizer"
    ) -> None:
        if isinstance(optimizer, SGD) and not self._has_said and self._ties and self._has_to_look(trainer):
            for group in optimizer.param_groups:
                self._look_at(float(group["lr"]), float(group["momentum"]), group["params"])

    def _has_to_look(self, trainer: "Trainer") -> bool:
        """Whether the learning rate is looked at: in the fit's first step, and where scalars are logged."""
        is_first, self._has_looked = not self._has_looked, True
        return is_first or host.is_logging_step(trainer)

    def _look_at(self, rate: float, momentum: float, params: "Sequence[Tensor]") -> None:
        largest = self._ties.largest_weight(params)
        # The penalty curves by 2 lambda F, and gradient descent diverges where rate times curvature is above
        # 2 (1 + momentum).
        if rate * self.weight * largest > 1 + momentum and not self._has_said:
            self._has_said = True
            host.rank_zero_warn(
                f"EWC(weight={self.weight:g}): the largest Fisher information is {largest:.3g}, and at SGD's learning"
                f" rate {rate:g} the penalty moves that weight beyond its anchor, farther away in each step. Write a"
                f" `weight` below {(1 + momentum) / (rate * largest):.3g}, or a lower learning rate."
            )

    @override
    def keep(self, trainer: "Trainer", module: "LightningModule") -> dict[str, Any]:
        chosen = self._chosen(module)
        fisher = self._fisher(trainer, module, list(chosen))
        slot = Slot(
            anchors={name: p.detach().clone() for name, p in chosen.items()},
            weights=dict(zip(chosen, fisher, strict=True)),
        )
        seen = self._free_classes_to_come_(slot, host.data_parallel_group(trainer))
        before: list[Slot] = self._tasks.kept.get("slots", [])
        if self.memory == "online":
            add_earlier_(slot, before)
            before = []
        return {"slots": [*before, slot], **({} if seen is None else {"seen": seen})}

    def _free_classes_to_come_(self, slot: Slot, group: "ProcessGroup | None") -> Tensor | None:
        """Lets the head's rows of classes go that were no target so far, and returns which ones were."""
        before: Tensor | None = self._tasks.kept.get("seen")
        seen = self._pass.seen
        if seen is None:
            return before
        if group is not None:
            seen = all_reduce_sum(seen.float(), group) > 0
        if before is not None:
            seen[: len(before)] |= before.to(seen.device)
        if not seen.all():
            free_rows_(slot, self._pass.head, ~seen)
            if not self._pass.head and self.exclude is None:
                host.rank_zero_warn(
                    f"EWC: {int((~seen).sum())} of {len(seen)} classes were no target so far, and the layer that the"
                    " logits come from was not found, so its rows for these classes are tied as the others are. Write"
                    " `exclude`, the names of that layer's parameters."
                )
        return seen

    @override
    def forget(self) -> None:
        self._ties.clear()
        self._has_looked = self._has_said = False
        self._pass = FisherPass(self, self.labels, per_sample=self.per_sample)

    def _chosen(self, module: nn.Module) -> dict[str, nn.Parameter]:
        return chosen_weights(self, module, self.params, self.exclude)

    def _fisher(self, trainer: "Trainer", module: "LightningModule", names: list[str]) -> list[Tensor]:
        peer = Peer(module, owner=self)
        named = dict(peer.module.named_parameters())
        batches = min(trainer.num_training_batches, self.fisher_batches or math.inf)
        with (
            attached_engine(trainer).training_steps() as steps,
            progress(trainer, "EWC: Fisher information", None if batches == math.inf else batches) as advance,
        ):
            losses = self._pass.losses(peer, counted(islice(steps, self.fisher_batches), advance))
            group = host.data_parallel_group(trainer)
            return fisher_diagonal([named[name] for name in names], losses, self.per_sample, group)
