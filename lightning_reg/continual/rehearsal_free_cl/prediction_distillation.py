"""Learning without forgetting: outputs for old classes as the network of the task before has them."""

from typing import TYPE_CHECKING, Any, Literal, final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.continual._tasks import TaskTechnique
from lightning_reg.continual.rehearsal_free_cl._teacher import Teacher, network
from lightning_reg.continual.rehearsal_free_cl.core import (
    bce_distillation_loss,
    cross_entropy_shift,
    softmax_distillation_loss,
)
from lightning_reg.engine.host.arguments import check_choice, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.networks.named_weights import weights_of
from lightning_reg.engine.networks.peer import check_runs_on_copy
from lightning_reg.engine.networks.references import ReferenceTechnique
from lightning_reg.engine.technique import LossTechnique

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.loss.call import LossCall
    from lightning_reg.engine.networks.references import Reference
    from lightning_reg.engine.step import Step

__all__ = ["PredictionDistillation"]


@final
class PredictionDistillation(TaskTechnique, ReferenceTechnique, LossTechnique):
    r"""Keeps the outputs for old classes as the network of the task before has them, on the new samples (LwF).

    ``loss_form="bce"`` replaces your loss by a sum of one-vs-all losses, from the first task on:

    .. math:: \frac1B \sum_b \sum_{c<v} \operatorname{BCE}(\sigma(z_{bc}), t_{bc}), \quad
        t_{bc} = \sigma(z^\text{old}_{bc})\;(c < o), \quad t_{bc} = [y_b = c]\;(o \le c < v)

    ``loss_form="softmax"`` adds :math:`\mu` times the cross-entropy with the old network's probabilities, softened by
    T, over the old classes; your cross-entropy becomes one over the classes so far, as the authors' is, where the head
    has outputs for classes to come. Classes of a task must come after those of the tasks before; predict by the largest
    logit of the classes so far.

    Use ``"bce"`` as the base of class-incremental training without old samples. The softmax form alone does not help
    there. A task is a fit that came to its end, or a number in the datamodule's ``current_task``; keep the object from
    fit to fit. A head may grow by rows in between; a head of its own for each task is refused.

    Source:
        Li and Hoiem, "Learning without Forgetting", ECCV 2016, arXiv 1606.09282, in the forms compared in Smith et al.,
        "A Closer Look at Rehearsal-Free Continual Learning", CVPR Workshops 2023, arXiv 2203.17269.

    Differs:
        Soft targets (of a batch that was mixed) take the place of :math:`[y_b = c]`.

    Memory: the module's parameters and buffers once more; a forward pass of the old network per step.

    Args:
        loss_form: ``"bce"`` (paper's good one), or ``"softmax"``.
        weight: mu of the softmax form, at least 0; paper: 1. Not used by ``"bce"``. Neutral: 0 with ``"softmax"``.
        temperature: T of the softmax form, above 0. Paper: 2.
        new_classes: How many classes each task adds, in the order of the tasks, each at least 0. ``None``: the head
            grows, and has just the classes so far.
        loss: Which loss call it works on, if there are several: position, ``"last"``, function name, or
            ``"model.py:42"``.
        name: Tells several instances in one Trainer apart.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> distillation = PredictionDistillation(new_classes=[2, 2, 2, 2, 2])
        >>> trainer = Trainer(max_epochs=10, callbacks=[distillation], logger=False, enable_checkpointing=False)

    """

    def __init__(
        self,
        loss_form: Literal["bce", "softmax"] = "bce",
        weight: float = 1.0,
        temperature: float = 2.0,
        new_classes: list[int] | None = None,
        loss: int | str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(loss=loss, name=name)
        check_choice(self, "loss_form", loss_form, ("bce", "softmax"))
        check_number(self, "weight", weight, low=0)
        check_number(self, "temperature", temperature, low=0, low_open=True)
        for count in new_classes or ():
            check_number(self, "new_classes", count, low=0, integer=True)
        self.loss_form, self.weight, self.temperature, self.new_classes = loss_form, weight, temperature, new_classes
        self._teacher, self._columns = Teacher(), 0
        self._new_rows: dict[str, int] = {}

    @property
    @override
    def is_neutral(self) -> bool:
        return self.loss_form == "softmax" and self.weight == 0

    @property
    @override
    def acts(self) -> bool:
        return True  # in the first task too: the outputs are counted

    @override
    def describe(self) -> str:
        if self.is_neutral:
            return "weight=0: inactive"
        form = (
            "bce" if self.loss_form == "bce" else f"softmax, weight={self.weight:g}, temperature={self.temperature:g}"
        )
        if self.loss_form == "softmax" and self.new_classes is not None:
            form += ", your loss over the classes so far"
        old = self._tasks.so_far if self.tasks else "no old classes in the first task"
        return f"{form}; {old}"

    @override
    def check(self, trainer: "Trainer", module: "LightningModule") -> None:
        super().check(trainer, module)
        check_runs_on_copy(module, self)

    @override
    def begin(self, step: "Step") -> None:
        known = {_layer(name) for name in self._tasks.kept.get("teacher", ())}
        named = weights_of(step.module) if known else {}
        self._new_rows = {name: len(p) for name, p in named.items() if p.dim() and _layer(name) not in known}
        self._teacher.weights = self._tasks.kept.get("teacher")
        self._columns = 0

    @property
    @override
    def references(self) -> "Sequence[Reference]":
        return self._teacher.there

    @override
    def observe_batch(self, step: "Step") -> None:
        super().observe_batch(step)
        if self._teacher.weights is not None:
            self._tasks.kept["teacher"] = self._teacher.weights  # the same, by the shapes that the module has now

    @override
    def change_losses(self, call: "LossCall") -> Tensor | None:
        old, seen = self._classes(call)
        if self.loss_form != "bce":
            return self._over_classes_so_far(call, seen)
        targets = call.labels if call.target is None else call.target
        targets = targets.reshape(call.logits.shape if targets.is_floating_point() else call.logits.shape[:1])
        if call.step.is_logging or self._columns != call.logits.shape[1]:
            self._check_labels(targets if call.sample_mass is None else targets[call.sample_mass > 0], seen)
        self._columns = call.logits.shape[1]
        teacher = self._teacher_logits(call)
        return bce_distillation_loss(call.logits, teacher, targets, old, seen, reduction="none")

    @override
    def loss_term(self, call: "LossCall") -> Tensor | None:
        if self.loss_form == "bce":
            return None
        old, _ = self._classes(call)
        self._columns = call.logits.shape[1]
        teacher = self._teacher_logits(call)
        if teacher is None or not old:
            return None
        of_copies = [
            softmax_distillation_loss(copy.logits[:, :old], teacher[:, :old], self.temperature, reduction="none")
            for copy in call.copies()
        ]
        return self.weight * torch.stack(of_copies).mean(0)

    @override
    def keep(self, trainer: "Trainer", module: "LightningModule") -> dict[str, Any]:
        return {"teacher": network(module), "columns": self._columns}

    @override
    def forget(self) -> None:
        self._teacher.weights = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "columns_now": self._columns}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = dict(state_dict)
        self._columns = state.pop("columns_now", 0)
        super().load_state_dict(state)

    def _classes(self, call: "LossCall") -> tuple[int, int]:
        columns = call.logits.shape[1]
        head = next((name for name, rows in self._new_rows.items() if rows == columns), None)
        if head is not None:
            raise MisconfigurationException(
                f"PredictionDistillation: {head!r} is new since the task before and has a row for each of the"
                f" {columns} outputs, so each task seems to have a head of its own, and what the old network's heads"
                " say of a batch is in no loss call. Use one head that grows by rows, or FeatureDistillation on what"
                " the heads get."
            )
        if self.new_classes is None:
            old = int(self._tasks.kept.get("columns", 0))
            if old and columns <= old:
                raise MisconfigurationException(
                    f"PredictionDistillation: the head has {columns} outputs and had {old} in the task before, so it is"
                    " not known which classes are old. Write `new_classes=[...]`, the number that each task adds."
                )
            return old, columns
        if self.tasks >= len(self.new_classes):
            raise MisconfigurationException(
                f"PredictionDistillation(new_classes={self.new_classes}): this is task {self.tasks + 1}, and there are"
                f" numbers for {len(self.new_classes)}."
            )
        old, seen = sum(self.new_classes[: self.tasks]), sum(self.new_classes[: self.tasks + 1])
        if seen > columns:
            raise MisconfigurationException(
                f"PredictionDistillation(new_classes={self.new_classes}): there are {seen} classes by task"
                f" {self.tasks + 1}, and the head has {columns} outputs."
            )
        return old, seen

    def _over_classes_so_far(self, call: "LossCall", seen: int) -> Tensor | None:
        """The user's cross-entropy as it is of the logits of the classes so far alone; ``None`` if these are all."""
        if seen == call.logits.shape[1]:
            return None
        soft = call.given_target is not None and call.given_target.is_floating_point()
        smoothing = float(call.arguments.get("label_smoothing", 0.0))
        if call.function is None or (call.arguments.get("weight") is not None and (soft or smoothing)):
            what = "computed already" if call.function is None else "of soft targets with class weights"
            raise MisconfigurationException(
                f"PredictionDistillation(loss_form='softmax', new_classes={self.new_classes}): the head has outputs for"
                f" classes to come, and {call} is {what}, so it cannot be made one over the {seen} classes so far. Hand"
                f" over `logits[:, :seen]`, and leave out `new_classes` if that grows with each task."
            )
        if not soft and (call.step.is_logging or not self._columns):
            self._check_labels(call.labels if call.sample_mass is None else call.labels[call.sample_mass > 0], seen)
        mass = call.sample_mass
        losses = call.decomposition.elements.float().reshape(call.batch_size)
        losses = losses if mass is None else losses / torch.where(mass > 0, mass, 1.0)
        return losses + cross_entropy_shift(call.logits, seen, smoothing)

    def _check_labels(self, targets: Tensor, seen: int) -> None:
        if not targets.is_floating_point() and targets.numel() and int(targets.max()) >= seen:
            raise MisconfigurationException(
                f"PredictionDistillation: there are {seen} classes so far, and a label is {int(targets.max())}. Classes"
                " of a task must come after those of the tasks before, in the order of `new_classes`."
            )

    def _teacher_logits(self, call: "LossCall") -> Tensor | None:
        if self._teacher.weights is None:
            return None
        sight = self.sight(call.step, self._teacher)
        if sight.call is None:
            raise MisconfigurationException(
                "PredictionDistillation: on a copy of the module `training_step` called no loss with a gradient, so the"
                " old network's outputs are not known."
            )
        return sight.call.logits


def _layer(parameter: str) -> str:
    """The name of the layer that a parameter is of."""
    return parameter.rpartition(".")[0]
