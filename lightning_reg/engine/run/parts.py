"""The engine's own parts, in the order of the step: the batch, weights, layers, the loss."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from inspect import signature
from typing import TYPE_CHECKING, Any

from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.data.views import Views
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.loss.mixin import LossMixin
from lightning_reg.engine.loss.watch import Interception
from lightning_reg.engine.run.layer_parts import EditPart, TapPart
from lightning_reg.engine.run.loss_path import LossPath, Sightings
from lightning_reg.engine.run.map_part import MapPart
from lightning_reg.engine.run.part import Part
from lightning_reg.engine.run.period_part import PeriodPart
from lightning_reg.engine.run.phases import (
    LOSS_PHASES,
    Member,
    Observer,
    OnBatch,
    OnGradients,
    OnLayers,
    OnLoss,
    OnModules,
    OnParameters,
    OnStep,
    OnWeights,
    ThroughMap,
    phases_of,
    taking_part,
)
from lightning_reg.engine.run.rehearsal import rehearsals
from lightning_reg.engine.run.step_parts import GradientPart, OwnPart, PenaltyPart, TermPart
from lightning_reg.engine.weights.strategies import check_editable, check_split
from lightning_reg.engine.weights.swap import Surgery, named_weights

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.step import Step

__all__ = ["LossPart", "make_parts"]


def make_parts(trainer: "Trainer", module: "LightningModule", techniques: Sequence[Member]) -> "list[Part]":
    """The parts that these techniques need, in the order of the step; the loss comes behind these."""
    parts: list[Part] = []
    mapped = taking_part(techniques, ThroughMap)
    seeing = [technique for technique in techniques if _sees_weights(technique)]
    maps = MapPart(trainer, module, mapped, type(seeing[0]).__name__ if seeing else "")
    if owning := taking_part(techniques, OnModules):
        parts.append(OwnPart(trainer, module, owning))
    if on_gradients := taking_part(techniques, OnGradients):
        parts.append(GradientPart(trainer, module, on_gradients))
    if on_batch := [technique for technique in taking_part(techniques, OnBatch) if "train" in technique.stages]:
        parts.append(BatchPart(on_batch))
    if penalized := taking_part(techniques, OnParameters):
        parts.append(PenaltyPart(trainer, module, penalized))
    if edited := taking_part(techniques, OnWeights):
        parts.append(SwapPart(trainer, module, edited, maps.own_writes if mapped else nullcontext))
    if mapped:
        parts.append(maps)
    return parts + _parts_on_layers(trainer, module, techniques)


def _sees_weights(technique: Member) -> bool:
    of_own_parts = isinstance(technique, ThroughMap) and technique.latents.frozen
    penalizes = bool(taking_part([technique], OnParameters)) and not of_own_parts
    edits = bool(taking_part([technique], OnWeights)) and not _maps_steps(technique)
    return penalizes or edits or "change_gradients" in phases_of(technique)


def _maps_steps(technique: Member) -> bool:
    return isinstance(technique, ThroughMap) and technique.maps_steps


def _parts_on_layers(trainer: "Trainer", module: "LightningModule", techniques: Sequence[Member]) -> "list[Part]":
    parts: list[Part] = []
    if on_layers := [technique for technique in taking_part(techniques, OnLayers) if "train" in technique.stages]:
        parts.append(EditPart(module, on_layers))
    for technique in taking_part(techniques, Member, "parts"):
        parts += technique.parts(trainer, module)
    if any(technique.periods for technique in techniques):
        parts.append(PeriodPart(trainer, module, techniques))
    if observers := [t for t in techniques if isinstance(t, Observer) and t.feature_layers]:
        parts.append(TapPart(module, observers))
    if on_step := taking_part(techniques, OnStep):
        parts.append(TermPart(on_step))
    return parts


class BatchPart(Part):
    """Batches changed, observed, joined with views.

    Args:
        techniques: Those that take part.

    """

    def __init__(self, techniques: Sequence[OnBatch]) -> None:
        self._techniques = techniques

    @override
    def around(self, step: "Step") -> AbstractContextManager[None]:
        active = [technique for technique in self._techniques if technique in step.active]
        for technique in taking_part(active, OnBatch, "transform_batch"):
            step.batch = technique.transform_batch(step.batch, step)
        for technique in taking_part(active, OnBatch, "observe_batch"):
            technique.observe_batch(step)
        made = {t: t.extra_views(step.batch, step) for t in taking_part(active, OnBatch, "extra_views")}
        views = {technique: own for technique, own in made.items() if own}
        if views:
            step.views = Views(step.batch, _size_for_views(views, step), views)
        return nullcontext()


def _size_for_views(views: "dict[OnBatch, Sequence[Any]]", step: "Step") -> int:
    if step.several or len(step.batch_sizes) != 1:
        why = "comes from several loaders" if step.several else "has no number of samples that is known"
        name = type(next(iter(views))).__name__
        raise MisconfigurationException(f"{name} adds views to the batch, but the batch {why}.")
    return step.batch_sizes[0]


class SwapPart(Part):
    """Effective weights in place of the dense ones, from the forward pass until the gradients are there.

    Args:
        trainer: The Trainer.
        module: The user's module.
        techniques: Those that take part.
        own_writes: A context for writes into weights that are no news to whoever watches them.

    """

    def __init__(
        self,
        trainer: "Trainer",
        module: "LightningModule",
        techniques: Sequence[OnWeights],
        own_writes: Callable[[], AbstractContextManager[None]],
    ) -> None:
        # A map that makes other weights for the step comes first: others edit these.
        techniques = sorted(techniques, key=lambda technique: not _maps_steps(technique))
        self._trainer, self._module, self._techniques, self._own_writes = trainer, module, techniques, own_writes
        self._active: Sequence[Member] = techniques
        self._is_in_step = False
        self._surgeries: list[Surgery] = []
        self._saving: list[host.Replacement] = []

    @override
    def prepare(self) -> None:
        check_editable(self._techniques[0], self._trainer)
        named = {technique: technique.weights_to_edit(self._module) for technique in self._techniques}
        owners = ", ".join(type(technique).__name__ for technique in self._techniques)
        self._surgeries = [Surgery(self._module, [(named[t], t.edit_weights) for t in self._techniques], owners)]
        parameters = named_weights(self._module)
        for technique, names in named.items():
            edited = {name: parameters[name] for name in names}
            check_split(technique, edited, technique.needs_whole_parameters())
        self._saving = [host.Replacement(self._trainer, "save_checkpoint", self._save_checkpoint)]

    @override
    def start(self) -> None:
        for surgery in self._surgeries:
            surgery.guard.watch(self._trainer.optimizers)

    @override
    def begin_step(self) -> None:
        self._active = ()  # as above

    @override
    @contextmanager
    def around(self, step: "Step") -> Iterator[None]:
        self._active, self._is_in_step = [t for t in self._techniques if t in step.active], True
        try:
            self._apply()
            yield
        finally:
            self._is_in_step = False

    @override
    def before_optimizer(self, optimizer: Any) -> None:
        # Under manual optimization those of the optimizer alone: graphs through others stay valid.
        self._restore(None if self._module.automatic_optimization else optimizer)

    @override
    def before_closure(self) -> None:
        if self._is_in_step:
            self._apply()

    @override
    @contextmanager
    def around_optimizer(self, optimizer: Any) -> Iterator[None]:
        with self._surgeries[0].guard.stepping(optimizer):
            yield
        self.before_closure()  # manual optimization: the rest of training_step sees effective weights again

    @override
    def rest(self) -> None:
        self._restore(None)

    @override
    def begin_validation(self) -> None:
        # Those of the last step, but for what that alone ran with.
        self._active = [technique for technique in self._active if not _maps_steps(technique)]
        self._apply()

    @override
    def close(self) -> None:
        self._restore(None)
        for surgery in self._surgeries:
            surgery.close()
        for replaced in self._saving:
            replaced.undo()
        self._saving = []

    def _apply(self) -> None:
        for surgery in self._surgeries:
            with self._own_writes():
                surgery.apply([position for position, t in enumerate(self._techniques) if t in self._active])

    def _restore(self, optimizer: Any) -> None:
        for surgery in self._surgeries:
            with self._own_writes():
                surgery.restore(optimizer)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        original = self._saving[0].original
        if signature(original).bind(*args, **kwargs).arguments.get("weights_only"):
            with _entered([t.weights_to_save(self._trainer, self._module) for t in self._techniques]):
                original(*args, **kwargs)
        else:
            original(*args, **kwargs)


@contextmanager
def _entered(contexts: "Sequence[AbstractContextManager[None] | None]") -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            if context is not None:
                stack.enter_context(context)
        yield


class LossPart(Part):
    """The loss.

    Args:
        module: The user's module.
        techniques: All of them: one that mixes a batch works on its loss as well.

    """

    def __init__(self, module: "LightningModule", techniques: Sequence[Member]) -> None:
        self._techniques = techniques
        self._on_loss = frozenset(t for t in techniques if LOSS_PHASES.intersection(phases_of(t)))
        interception = Interception(compiled=host.is_compiled(module))
        acting = {phase: taking_part(techniques, OnLoss, phase) for phase in LOSS_PHASES}
        self._sightings = Sightings(interception, acting, by_mixin=isinstance(module, LossMixin))

    @override
    def around(self, step: "Step") -> AbstractContextManager[Any]:
        mixer = step.mixer
        acting = [t for t in self._techniques if t in step.active and t not in step.resting and not step.alone]
        on_loss = [t for t in acting if t in self._on_loss or t is mixer]
        rehearsed = rehearsals(step, self._techniques, self._on_loss) if self._sightings.is_first else ()
        return LossPath(step, on_loss, self._sightings, rehearsed)

    def has_to_rehearse(self, step: "Step") -> bool:
        """Whether the step is a fit's first, and is to tell what is wrong for techniques that are not active yet."""
        return self._sightings.is_first and any(technique.waits(step) for technique in self._techniques)

    def reduce_loss(
        self, per_sample: Tensor, logits: Tensor | None, targets: Tensor | None, indices: Tensor | None
    ) -> Tensor:
        """What :meth:`LossMixin.reduce_loss` returns."""
        if not self._sightings.paths or not per_sample.requires_grad:
            return per_sample.mean()
        return self._sightings.paths[-1].reduce_loss(per_sample, logits, targets, indices)
