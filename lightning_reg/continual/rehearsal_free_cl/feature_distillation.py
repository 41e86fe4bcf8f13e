"""Feature distillation: outputs of a layer as the network of the task before has them."""

from typing import TYPE_CHECKING, Any, Literal, final

from torch import Tensor
from typing_extensions import override

from lightning_reg.continual._tasks import TaskTechnique
from lightning_reg.continual.rehearsal_free_cl._teacher import Teacher, network
from lightning_reg.continual.rehearsal_free_cl.core import feature_distillation_loss
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

__all__ = ["FeatureDistillation"]


@final
class FeatureDistillation(TaskTechnique, ReferenceTechnique, LossTechnique):
    r"""Keeps the outputs of a layer as the network of the task before has them, on the new samples.

    .. math:: \frac{\lambda}{B} \sum_b \lVert f(x_b; \theta) - f(x_b; \theta^\text{old}) \rVert_2^2

    The paper's finding is to leave it: it lowered accuracy in every combination. Use it as a baseline, or to fine-tune
    a pre-trained network near its features (``anchor="start_of_fit"``). A task is a fit that came to its end, or a
    number in the datamodule's ``current_task``; keep the object from fit to fit.

    Source:
        Smith et al., "A Closer Look at Rehearsal-Free Continual Learning", CVPR Workshops 2023, arXiv 2203.17269.

    Differs:
        ``anchor="start_of_fit"`` is an addition: the paper has no teacher in the first task.

    Memory: the module's parameters and buffers once more; a forward pass of the old network per step.

    Args:
        layer: The layer, named as in ``named_modules()``; paper: the one before the head. Its outputs are ``(B, ...)``.
        weight: lambda, at least 0. Neutral: 0. Sensible: 1e-2 to 1 for a vector of features (0.1 for 100 of them in
            ``benchmarks/effects``). The sum over tokens and channels is larger as many times as there are tokens: take
            as many times less, or ``elements="mean"``, and compare the logged ``term`` with the loss.
        anchor: ``"end_of_task"`` (paper): the network when the task before ended, in the first task none.
            ``"start_of_fit"``: the network at the start of each fit (where tasks have numbers, of each task).
        elements: Whether the squares of a sample are summed over everything but the batch (``"sum"``, paper), or their
            mean is taken (``"mean"``), of a size that does not grow with tokens and channels.
        loss: Which loss call it joins, if there are several: position, ``"last"``, function name, or ``"model.py:42"``.
            Where no loss of torch is called (another library's loss, a model that returns its own) the term joins the
            loss that ``training_step`` returns, as a mean over the batch.
        name: Tells several instances in one Trainer apart.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> distillation = FeatureDistillation("net.body", weight=0.1)
        >>> trainer = Trainer(max_epochs=10, callbacks=[distillation], logger=False, enable_checkpointing=False)

    """

    def __init__(
        self,
        layer: str,
        weight: float = 0.1,
        anchor: Literal["start_of_fit", "end_of_task"] = "end_of_task",
        elements: Literal["sum", "mean"] = "sum",
        loss: int | str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(loss=loss, name=name)
        check_number(self, "weight", weight, low=0)
        check_choice(self, "elements", elements, ("sum", "mean"))
        check_choice(self, "anchor", anchor, ("start_of_fit", "end_of_task"))
        self.layer, self.weight, self.anchor, self.elements = layer, weight, anchor, elements
        self._teacher = Teacher([layer])

    @property
    @override
    def remembers_channels(self) -> bool:
        """Whether the teacher's features are those of an earlier task."""
        of_earlier_fit = self._tasks.has_numbers if self.anchor == "start_of_fit" else self.tasks > 0
        return of_earlier_fit and not self.is_neutral

    @property
    @override
    def is_neutral(self) -> bool:
        return self.weight == 0

    @property
    @override
    def acts(self) -> bool:
        return self._teacher.weights is not None

    @override
    def describe(self) -> str:
        if self.is_neutral:
            return "weight=0: inactive"
        to = f"to the {self.anchor.replace('_', ' ')}"
        if self.anchor == "end_of_task" and not self.tasks:
            to = "no teacher in the first task"
        mean = ", mean of elements" if self.elements == "mean" else ""
        return f"layer {self.layer}, weight={self.weight:g}{mean}; {to}; {self._tasks.so_far}"

    @property
    @override
    def feature_layers(self) -> "Sequence[str]":
        return () if self.is_neutral else (self.layer,)

    @override
    def check(self, trainer: "Trainer", module: "LightningModule") -> None:
        super().check(trainer, module)
        check_runs_on_copy(module, self)

    @override
    def begin(self, step: "Step") -> None:
        if self.anchor == "start_of_fit" and not self._tasks.goes_on:
            self._tasks.kept = {"teacher": weights_of(step.module)}
        self._teacher.weights = self._tasks.kept.get("teacher")

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
    def loss_term(self, call: "LossCall") -> Tensor | None:
        return self._distances(call.step, call.batch_size)

    @override
    def term_of_step(self, step: "Step") -> Tensor:
        return self._distances(step, step.batch_sizes[0] if len(step.batch_sizes) == 1 else None).mean()

    def _distances(self, step: "Step", size: int | None) -> Tensor:
        """Distance of each sample times lambda; as many as the layer's output has if that is not known."""
        own, theirs = (s.features.get(self.layer) for s in (step, self.sight(step, self._teacher)))
        fits = isinstance(own, Tensor) and own.dim() > 0 and (size is None or len(own) == size)
        if not fits or not isinstance(own, Tensor) or not isinstance(theirs, Tensor) or theirs.shape != own.shape:
            found = f"a tensor of shape {tuple(own.shape)}" if isinstance(own, Tensor) else f"a {type(own).__name__}"
            samples = "the samples" if size is None else f"the {size} samples"
            raise MisconfigurationException(
                f"FeatureDistillation(layer={self.layer!r}): its output must be a tensor with {samples} in its first"
                f" dimension, got {found}."
            )
        return self.weight * feature_distillation_loss(own, theirs, reduction="none", elements=self.elements)

    @override
    def keep(self, trainer: "Trainer", module: "LightningModule") -> dict[str, Any]:
        return {"teacher": network(module)}

    @override
    def forget(self) -> None:
        self._teacher.weights = None
