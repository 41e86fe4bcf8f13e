"""Weights tied to what they were: to their start, or to the task before, each as firmly as it matters."""

import math
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.optim import LBFGS
from typing_extensions import override

from lightning_reg.continual._anchors import fisher_diagonal, fisher_losses, pull_, quadratic_penalty
from lightning_reg.continual._tying import Anchor, TyingTechnique
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_choice, check_number
from lightning_reg.engine.host.distributed import world_size
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.loss.lookup import ENGINES
from lightning_reg.engine.networks.peer import Peer, check_runs_on_copy

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

    from lightning_reg.engine.loss.call import LossCall
    from lightning_reg.engine.step import Step

__all__ = ["EWC", "L2ToStart", "fisher_diagonal", "fisher_losses", "quadratic_penalty"]


_SAMPLES_AT_ONCE = 4  # of the Fisher pass; fewer do not pay for their calls


class L2ToStart(TyingTechnique):
    r"""Ties weights to their values at the start of the fit (L2-SP): pre-trained ones, those of the task before.

    .. math:: \lambda \sum_j (\theta_j - \theta^*_j)^2

    Use it to fine-tune pre-trained networks, once or task after task; the paper's best choice for vision transformers,
    on query, key and value weights. Leave it in class-incremental training from scratch without
    :class:`PredictionDistillation`. Set ``weight_decay`` to 0 on tied weights, it pulls to 0. Statistics of batch norm
    drift all the same. A task is a fit that came to its end; keep the object from fit to fit.

    Source:
        Smith et al., "A Closer Look at Rehearsal-Free Continual Learning", CVPR Workshops 2023, arXiv 2203.17269.

    Differs:
        ``mode="decoupled"`` is an addition. The paper's values of lambda are not published.

    Memory: the parameters that match once more, frozen ones too; in the optimizer's step two temporary copies of those
    that are trained.

    Args:
        weight: lambda, at least 0. Sensible: 1e-3 to 10. Neutral: 0.
        params: Patterns of parameter names as in ``named_parameters()``, one of which must match (``"*.qkv.weight"``);
            ``None`` for all. Frozen ones are tied from the step on that trains them.
        exclude: Patterns of names to leave free, those of a new head for example (``"head.*"``). Parameters that are
            new since the last task, and rows by which one has grown, are free anyway.
        anchor: ``"start_of_fit"`` (paper), or ``"end_of_task"``: to the weights when the task before ended, whatever
            was done to the module since, and in the first task to nothing.
        mode: ``"gradient"`` adds :math:`2 \lambda (\theta - \theta^*)` to the gradient (paper); ``"decoupled"`` moves
            weights by :math:`\eta \lambda (\theta^* - \theta)` before each step, with the learning rate :math:`\eta`.
        name: Tells several instances in one Trainer apart.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> tie = L2ToStart(weight=0.1, exclude=["head.*"])
        >>> trainer = Trainer(max_epochs=20, callbacks=[tie], logger=False, enable_checkpointing=False)

    """

    ties_frozen = True

    def __init__(
        self,
        weight: float = 0.1,
        params: list[str] | None = None,
        exclude: list[str] | None = None,
        anchor: Anchor = "start_of_fit",
        mode: Literal["gradient", "decoupled"] = "gradient",
        name: str | None = None,
    ) -> None:
        super().__init__(weight, params, exclude, name)
        check_choice(self, "anchor", anchor, ("start_of_fit", "end_of_task"))
        check_choice(self, "mode", mode, ("gradient", "decoupled"))
        self.anchor, self.mode = anchor, mode

    @classmethod
    @override
    def key(cls) -> str:
        return "l2_to_start"

    @property
    @override
    def remembers_channels(self) -> bool:
        """Whether it ties to an earlier task."""
        return self.anchor == "end_of_task" and super().remembers_channels

    @override
    def describe(self) -> str:
        if self.is_neutral:
            return "weight=0: inactive"
        to = f"to the {self.anchor.replace('_', ' ')}"
        if self.anchor == "end_of_task" and not self.tasks:
            to = "nothing to tie to in the first task"
        return f"weight={self.weight:g}, {self.mode}; {to}; tasks before: {self.tasks}"

    @override
    def begin(self, step: "Step") -> None:
        if self.anchor == "start_of_fit" and not self._resumed:
            rows: dict[str, int] | None = self._kept.get("rows")
            chosen = self.chosen(step.module)
            named = {name: p.detach() for name, p in chosen.items() if rows is None or name in rows}
            anchors = {n: (p[: rows[n]] if rows and p.dim() else p).clone() for n, p in named.items()}
            self._kept = {"slots": [{"anchors": anchors, "weights": {}}], "rows": rows}
        if self.mode == "decoupled" and any(isinstance(o, LBFGS) for o in step.trainer.optimizers):
            raise MisconfigurationException(
                "L2ToStart(mode='decoupled') pulls once in each step of the optimizer, and LBFGS evaluates the loss"
                " several times in one. Write `mode='gradient'`, or choose another optimizer."
            )
        super().begin(step)

    @override
    def penalty(self, module: "LightningModule") -> Tensor | None:
        return super().penalty(module) if self.mode == "gradient" else None

    @override
    def on_before_optimizer_step(
        self, trainer: "Trainer", pl_module: "LightningModule", optimizer: "Optimizer"
    ) -> None:
        if self.mode == "decoupled":
            for params, anchors, _ in self._tied:
                for group in optimizer.param_groups:
                    pull_(params, anchors, group["params"], float(group["lr"]) * self.weight)

    @override
    def keep(self, trainer: "Trainer", module: "LightningModule") -> dict[str, Any]:
        chosen = self.chosen(module)
        if self.anchor == "start_of_fit":
            return {"rows": {name: len(p) if p.dim() else 1 for name, p in chosen.items()}}
        return {"slots": [{"anchors": {name: p.detach().clone() for name, p in chosen.items()}, "weights": {}}]}


class EWC(TyingTechnique):
    r"""Elastic weight consolidation: ties weights to those of the task before, each as firmly as it matters there.

    .. math:: \lambda \sum_j F_j (\theta_j - \theta^*_j)^2, \qquad
        F_j = \frac1N \sum_i \Bigl(\frac{\partial \ell_i}{\partial \theta_j}\Bigr)^2

    When a task ends, F is estimated by a pass over its training data (without the transforms of other techniques, in
    eval mode and full precision), of which the fit notices nothing. In the first task there is nothing to tie to.

    Use it for the least forgetting, in class-incremental training together with :class:`PredictionDistillation`: alone
    it leaves old classes at chance there. A task is a fit that came to its end; keep the object from fit to fit.

    Source:
        Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017, arXiv 1612.00796; as
        compared in Smith et al., "A Closer Look at Rehearsal-Free Continual Learning", CVPR Workshops 2023, arXiv
        2203.17269.

    Differs:
        F is the mean of the samples' squared gradients, as in the formula; the code that the paper builds on squares
        the gradient of a batch's mean (``per_sample=False``).

    Memory: the tied parameters twice more for each task (``memory="online"``: twice in all); in the Fisher pass one
    copy of the module and the gradients of a few samples. Time: the Fisher pass takes as long as about four epochs.

    Args:
        weight: lambda, at least 0. Sensible: 10 to 1e4. Neutral: 0.
        params: Patterns of parameter names as in ``named_parameters()``, one of which must match; ``None`` for all that
            are trained.
        exclude: Patterns of names to leave free. Rows by which a parameter has grown since are free anyway.
        fisher_batches: Training batches to estimate F on, at least 1; ``None`` for all of a loader that has a length.
        per_sample: Whether gradients are squared sample by sample; ``False``: batch by batch, much cheaper.
        labels: At whose label the gradient is taken: the model's own most probable (``"argmax"``), one drawn from its
            probabilities (``"sample"``), or the given one (``"true"``).
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

    def __init__(
        self,
        weight: float = 100.0,
        params: list[str] | None = None,
        exclude: list[str] | None = None,
        fisher_batches: int | None = None,
        per_sample: bool = True,
        labels: Literal["argmax", "sample", "true"] = "argmax",
        memory: Literal["separate", "online"] = "separate",
        loss: int | str | None = None,
        name: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(weight, params, exclude, name, loss, seed)
        if fisher_batches is not None:
            check_number(self, "fisher_batches", fisher_batches, low=1, integer=True)
        check_choice(self, "labels", labels, ("argmax", "sample", "true"))
        check_choice(self, "memory", memory, ("separate", "online"))
        self.fisher_batches, self.per_sample, self.labels, self.memory = fisher_batches, per_sample, labels, memory

    @classmethod
    @override
    def key(cls) -> str:
        return "ewc"

    @override
    def describe(self) -> str:
        if self.is_neutral:
            return "weight=0: inactive"
        to = f"tasks before: {self.tasks}" if self.tasks else "nothing to tie to in the first task"
        passes = "samples" if self.per_sample else "batches"
        return f"weight={self.weight:g}, Fisher by {passes} at {self.labels} labels, {self.memory}; {to}"

    @override
    def check(self, trainer: "Trainer", module: "LightningModule") -> None:
        super().check(trainer, module)
        check_runs_on_copy(module, self)

    @override
    def begin(self, step: "Step") -> None:
        super().begin(step)
        if self.fisher_batches is None and step.trainer.num_training_batches == math.inf:
            loader = step.trainer.train_dataloader
            raise MisconfigurationException(
                "EWC reads the training data once more when the fit ends, and"
                f" {type(getattr(loader, 'dataset', loader)).__name__} has no length, so it may not end. Write"
                " `fisher_batches`, how many batches to read then at most."
            )
        # What the Fisher pass cannot do is told now, not when the training is over.
        peer = Peer(step.module, owner=self)
        for part in islice(self._parts(step), 1):
            call = peer.see(part, self).call
            if call is not None:
                self._logits(call)

    @override
    def keep(self, trainer: "Trainer", module: "LightningModule") -> dict[str, Any]:
        chosen = self.chosen(module)
        fisher = dict(zip(chosen, self._fisher(trainer, module, list(chosen)), strict=True))
        anchors = {name: p.detach().clone() for name, p in chosen.items()}
        slots = self._kept.get("slots", [])
        if self.memory == "online":
            found = [(name, value, slot["anchors"][name]) for slot in slots for name, value in slot["weights"].items()]
            for name, value, anchor in found:
                if name in fisher:
                    fisher[name][: len(value) if value.dim() else None] += value.to(fisher[name].device)
                else:  # frozen in this task
                    fisher[name], anchors[name] = value, anchor
            slots = []
        return {"slots": [*slots, {"anchors": anchors, "weights": fisher}]}

    def _fisher(self, trainer: "Trainer", module: "LightningModule", names: list[str]) -> list[Tensor]:
        peer = Peer(module, owner=self)
        named = dict(peer.module.named_parameters())
        with ENGINES[trainer].training_steps() as steps:
            losses = self._losses(peer, islice(steps, self.fisher_batches))
            group = host.data_parallel_group(trainer)
            return fisher_diagonal([named[name] for name in names], losses, self.per_sample, group)

    def _losses(self, peer: Peer, steps: "Iterator[Step]") -> Iterator[Tensor]:
        generator: torch.Generator | None = None
        for part in (part for step in steps for part in self._parts(step)):
            call = peer.see(part, self, gradient=True).call
            if call is not None:
                generator = generator or self.generator(part, call.input.device)
                kept = None if call.sample_mass is None else call.sample_mass > 0
                labels = call.labels if kept is None else call.labels.where(kept, 0)  # what is ignored may be no class
                losses = fisher_losses(self._logits(call), labels, self.labels, generator)
                yield losses if kept is None else losses[kept]
        if generator is None and world_size() == 1:
            raise MisconfigurationException(
                "EWC: the training data gives no batch with a loss when the fit has ended. Let it start anew with each"
                " `iter` of the DataLoader."
            )

    def _parts(self, step: "Step") -> "Iterator[Step]":
        # The gradients of B samples out of one pass cost B passes: a few samples at a time.
        return step.parts(_SAMPLES_AT_ONCE) if self.per_sample else iter([step])

    @staticmethod
    def _logits(call: "LossCall") -> Tensor:
        try:
            return call.logits
        except MisconfigurationException as error:
            raise MisconfigurationException(f"EWC: {error}") from error
