"""The engine: stands around ``Strategy.training_step`` and lets the techniques act on one batch after the other."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_reg.engine.copies import Copies, CopiesCall
from lightning_reg.engine.data.loaders import TrainLoaders
from lightning_reg.engine.data.order import Reordered
from lightning_reg.engine.data.views import Views
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.layers.edits import FeatureEdits
from lightning_reg.engine.layers.named import FeatureTap
from lightning_reg.engine.loss.call import LossCall
from lightning_reg.engine.loss.call_by_hand import HandWrittenCall
from lightning_reg.engine.loss.call_mixed import MixedCall, mixed_call
from lightning_reg.engine.loss.choice import Selection
from lightning_reg.engine.loss.elements import bind, has_gradient
from lightning_reg.engine.loss.lookup import ENGINES
from lightning_reg.engine.loss.mixin import LossMixin
from lightning_reg.engine.loss.result import loss_of, swapped, with_loss
from lightning_reg.engine.loss.watch import Interception, call_site
from lightning_reg.engine.replays import Replays
from lightning_reg.engine.run import passes as extra_passes
from lightning_reg.engine.run import report
from lightning_reg.engine.run.composition import check_composition
from lightning_reg.engine.run.hooks import EngineHooks, LastHook
from lightning_reg.engine.run.phases import LOSS_PHASES, Member, phases_of
from lightning_reg.engine.step import Step
from lightning_reg.engine.weights import penalties as penalties_of
from lightning_reg.engine.weights.maps import WeightMaps, check_mappable
from lightning_reg.engine.weights.strategies import check_editable, check_split
from lightning_reg.engine.weights.swap import Surgery, named_weights

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

__all__ = ["Engine"]


class Engine:
    """Attached to a Trainer while it fits; there is one, however many techniques.

    Args:
        trainer: The Trainer.
        module: The user's module.
        techniques: In the order of the Trainer's callbacks.

    """

    def __init__(self, trainer: "Trainer", module: "LightningModule", techniques: Sequence[Member]) -> None:
        self.trainer, self.module, self.techniques = trainer, module, list(techniques)
        self._stepping = host.Replacement(trainer.strategy, "training_step", self.training_step)
        self._phases = {technique: frozenset(phases_of(technique)) for technique in techniques}
        self._by_mixin = isinstance(module, LossMixin)
        self._interception = Interception(self._intercept, compiled=host.is_compiled(module))
        self._loaders = TrainLoaders(trainer, techniques)
        self._features: FeatureTap | None = None
        self._edits: FeatureEdits | None = None
        self._copies: Copies | None = None
        self._replays: Replays | None = None
        self._surgery: Surgery | None = None
        self._maps: WeightMaps | None = None
        self._optimizing: host.Replacement | None = None
        self._saving: host.Replacement | None = None
        self._step: Step | None = None
        self._active: Sequence[Member] = techniques
        self._selection = Selection(())
        self._last: tuple[LossCall, Tensor, list[Member]] | None = None
        self._call_ever_seen = self._said_nothing_seen = False

    # -- attaching and detaching --------------------------------------------------------------------------------------

    @classmethod
    def attach(cls, trainer: "Trainer", module: "LightningModule", techniques: Sequence[Member]) -> None:
        """Attaches an engine for all techniques among the Trainer's callbacks, unless there is one."""
        if trainer in ENGINES:
            return
        check_composition(techniques, trainer, module)
        engine = ENGINES[trainer] = cls(trainer, module, techniques)
        # First the hooks, which detach on any exception. A new list leaves the one Lightning iterates over as it is.
        hooks = EngineHooks(
            engine,
            edits_weights=bool(engine._in(techniques, "edit_weights")),
            penalizes=bool(engine._in(techniques, "penalty")),
        )
        last = [LastHook(engine)] if engine._in(techniques, "map_weights") or hooks.edits_weights else []
        host.set_callbacks(trainer, [hooks, *host.callbacks(trainer), *last])
        engine._loaders.attach()

    def detach(self) -> None:
        """Puts everything back as it was; may be called twice."""
        self.restore_weights()
        for watcher in (self._maps, self._surgery, self._features, self._edits, self._copies):
            if watcher is not None:
                watcher.close()
        self._loaders.detach()
        for replacement in (self._optimizing, self._saving):
            if replacement is not None:
                replacement.undo()
        self._stepping.undo()
        ours = (EngineHooks, LastHook)
        kept = [callback for callback in host.callbacks(self.trainer) if not isinstance(callback, ours)]
        host.set_callbacks(self.trainer, kept)
        ENGINES.pop(self.trainer, None)

    def prepare_module(self) -> None:
        """Finds the named layers and parameters, once ``configure_model`` has made them."""
        self._prepare_edits()
        layers = [layer for technique in self.techniques for layer in getattr(technique, "feature_layers", ())]
        view = (lambda output: output) if self._copies is None else self._copies.first
        self._features = FeatureTap(self.module, layers, view) if layers else None
        editors = self._in(self.techniques, "edit_weights")
        if editors:
            check_editable(editors[0], self.trainer)
            names = {technique: technique.weights_to_edit(self.module) for technique in editors}
            edits = [(names[t], t.edit_weights) for t in editors]
            self._surgery = Surgery(self.module, edits, ", ".join(type(t).__name__ for t in editors))
            parameters = named_weights(self.module)
            for technique in editors:
                check_split(technique, {name: parameters[name] for name in names[technique]})
            self._saving = host.Replacement(self.trainer, "save_checkpoint", self._save_checkpoint)
        mappers = self._in(self.techniques, "map_weights")
        if mappers:
            check_mappable(mappers[0], self.trainer)
            self._maps = WeightMaps(self.module, mappers)
        if editors or mappers:
            self._optimizing = host.Replacement(self.trainer.strategy, "optimizer_step", self._optimizer_step)

    def _prepare_edits(self) -> None:
        for technique in self.techniques:
            plan = technique.copy_plan() if hasattr(technique, "copy_plan") else None
            if plan is not None:
                self._copies = Copies(technique, plan, self.module)
                if plan.backbone is not None:
                    self._replays = Replays(self.module, plan.backbone, plan.number, type(technique).__name__)
        editors = self._in(self.techniques, "edit_features")
        if self._copies is not None:  # first, so that all others see an output with all copies
            owner = self._copies.owner
            editors.sort(key=lambda technique: technique is not owner)
        if editors:
            layers = {technique: technique.features_to_edit(self.module) for technique in editors}
            self._edits = FeatureEdits(self.module, layers, self._copies)

    def prepare_data(self) -> None:
        """Says what is attached to what, once the loaders are there; optimizers are there as well."""
        if self._surgery is not None:
            self._surgery.guard.watch(self.trainer.optimizers)
        report.show_table(self.trainer, self.techniques, self._loaders.sizes())

    # -- weights ------------------------------------------------------------------------------------------------------

    def apply_weights(self) -> None:
        """Puts in the effective weights of the techniques active now; in validation, of those of the last step."""
        if self._surgery is not None:
            editors = self._in(self.techniques, "edit_weights")
            with self._own_writes():
                self._surgery.apply([position for position, editor in enumerate(editors) if editor in self._active])

    def restore_weights(self, optimizer: Any = None) -> None:
        """Puts the dense weights back; before a step under manual optimization those of the optimizer."""
        if self._surgery is not None:
            with self._own_writes():
                self._surgery.restore(None if self.module.automatic_optimization else optimizer)

    def pull_back(self, optimizer: Any) -> None:
        """Gives the optimizer what weights are mapped from, with its gradients, once these are final."""
        if self._maps is not None:
            self._maps.open(optimizer, check=host.is_logging_step(self.trainer))

    def _begin_maps(self) -> None:
        if self._maps is not None:
            self._maps.begin(self.trainer.optimizers, fresh=host.batches_so_far(self.trainer) <= 1)

    def _own_writes(self) -> AbstractContextManager[None]:
        return nullcontext() if self._maps is None else self._maps.own_writes()

    def _optimizer_step(self, optimizer: Any, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        def with_weights() -> Any:  # an optimizer may call it several times, each time after a change of its own
            if self._maps is not None:
                self._maps.put_weights()
            if self._step is not None:
                self.apply_weights()
            return closure()

        self._begin_maps()
        strategy = self.trainer.strategy
        original = strategy.optimizer_step if self._optimizing is None else self._optimizing.original
        with ExitStack() as around:
            for one in (None if self._surgery is None else self._surgery.guard, self._maps):
                around.enter_context(nullcontext() if one is None else one.stepping(optimizer))
            result = original(optimizer, with_weights, *args, **kwargs)
        if self._step is not None:  # manual optimization: the rest of training_step sees effective weights again
            self.apply_weights()
        return result

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self._saving is None:
            return
        given = signature(self._saving.original).bind(*args, **kwargs).arguments
        with ExitStack() as saved:
            for technique in self.techniques if given.get("weights_only") else ():
                weights = technique.weights_to_save(self.trainer, self.module)
                if weights is not None:
                    saved.enter_context(weights)
            self._saving.original(*args, **kwargs)

    # -- the step -----------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """What the Trainer calls in place of ``Strategy.training_step``."""
        followed = self._loaders.advance()
        self._begin_maps()
        step = Step(self.trainer, self.module, args[0] if args else None, followed, self._loaders.several, args[1:])
        active = self._active = [t for t in self.techniques if t.is_active(step)]
        if not active:
            return self._stepping.original(*args, **kwargs)
        for technique in self._in(active, "transform_batch"):
            step.batch = technique.transform_batch(step.batch, step)
        for technique in self._in(active, "observe_batch"):
            technique.observe_batch(step)
        step.views = self._make_views(self._in(active, "extra_views"), step)
        penalizing = self._in(active, "penalty") if step.is_logging else []
        penalties = penalties_of.penalty_values(penalizing, self.module) if penalizing else {}
        self.apply_weights()
        on_loss = [t for t in active if self._phases[t] & LOSS_PHASES or t is step.mixer]
        copies = self._copies if self._copies is not None and self._copies.owner in active else None
        passes = self._pass if self._edits is None else self._passes
        output = self._run(step, on_loss, lambda: passes(step, args, kwargs), copies)
        self._log_penalties(penalties, output, step)
        if step.scalars:
            report.log_scalars(self.module, step.scalars, sum(step.batch_sizes))
        return output

    def _make_views(self, techniques: list[Member], step: Step) -> Views | None:
        made = {technique: technique.extra_views(step.batch, step) for technique in techniques}
        made = {technique: views for technique, views in made.items() if views}
        if not made:
            return None
        if self._loaders.several or len(step.batch_sizes) != 1:
            why = "comes from several loaders" if self._loaders.several else "has no number of samples that is known"
            name = type(next(iter(made))).__name__
            raise MisconfigurationException(f"{name} adds views to the batch, but the batch {why}.")
        return Views(step.batch, step.batch_sizes[0], made)

    def run_alone(self, technique: Member, step: Step) -> Tensor | None:
        """A step of a network beside the user's (``step.module``), on which the one technique acts and no other.

        Args:
            technique: Whose network it is; its phases up to the loss act as they do on the user's.
            step: The step, with the batch on its device.

        Returns:
            The loss, ``None`` if the network's ``training_step`` skips the batch.

        """
        if "transform_batch" in self._phases[technique]:
            step.batch = technique.transform_batch(step.batch, step)
        if "observe_batch" in self._phases[technique]:
            technique.observe_batch(step)
        on_loss = [technique] if self._phases[technique] & LOSS_PHASES or technique is step.mixer else []
        return loss_of(self._run(step, on_loss, lambda: step.module.training_step(step.batch, *step.arguments)))

    def _run(self, step: Step, on_loss: list[Member], network: Callable[[], Any], copies: Copies | None = None) -> Any:
        self._step, self._selection, self._last = step, Selection(on_loss, step.mixer), None
        if self._features is not None:
            self._features.open, step.features, step.passes = True, self._features.outputs, self._features.passes
            if step.views is not None:
                self._features.own = step.views.own
        rows_differ = step.views is not None or (copies is not None and copies.plan.way == "rows")
        watched = not self._by_mixin and bool(on_loss or rows_differ)
        by_hand = not self.module.automatic_optimization
        before = self.trainer.global_step if by_hand else 0
        try:
            with self._interception.watch() if watched else nullcontext():
                output = network()
            made_loss = (by_hand and self.trainer.global_step > before) or loss_of(output) is not None
            missed = made_loss and bool(on_loss or watched) and self._missed()
            if on_loss:
                output = self._settle(output, nothing_seen=made_loss and not missed)
            if copies is not None:
                copies.end(made_loss=made_loss and not missed)
        except Exception as error:
            if self._copies is not None:
                self._copies.explain(error)
            raise
        finally:
            self._step = self._last = None
            for watcher in (self._features, self._edits, self._copies):
                if watcher is not None:
                    watcher.shut()
        return output

    def _pass(self, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._stepping.original(*(step.given_batch, *args[1:]), **kwargs)

    def _passes(self, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def once(batch: Any, number: int) -> Any:
            if self._copies is not None:
                self._copies.begin(redirected=host.reaches_step_through_call(self.trainer, self.module))
            if self._edits is not None:
                self._edits.open(step, list(self._active), number)
            return self._stepping.original(*(batch, *args[1:]), **kwargs)

        if self._replays is None or self._copies is None or self._copies.owner not in self._active:
            return once(step.given_batch, 0)
        outputs = self._replays.run(once, step.given_batch)
        losses = [loss for output in outputs if (loss := loss_of(output)) is not None]
        if not losses:
            return outputs[0]
        values = torch.stack([loss.to(torch.promote_types(loss.dtype, torch.float32)) for loss in losses])
        if step.is_logging:
            step.log(self._copies.owner, "spread", values.detach().std())
        return with_loss(outputs[0], values.mean())

    def _missed(self) -> bool:
        """Whether the gate did not see a call that the mode may see from the next step on."""
        selection = self._selection
        if selection.seen:
            return False
        if selection.mixer is not None and self._call_ever_seen:
            raise selection.not_mixed()
        return self._interception.missed(self.trainer.global_step)

    def _settle(self, output: Any, *, nothing_seen: bool) -> Any:
        selection = self._selection
        if not selection.seen:
            if nothing_seen:
                if not self._call_ever_seen:
                    raise selection.nothing_seen(by_mixin=self._by_mixin)
                self._say_nothing_seen(", ".join(type(t).__name__ for t in selection.techniques))
            return output
        self._call_ever_seen = True
        selection.check()
        late = selection.last()
        if not late or self._last is None or loss_of(output) is None:
            return output
        call, value, before = self._last
        if isinstance(call, MixedCall):  # its labels were recognized, so the mixer has had its way already
            late = [technique for technique in late if technique is not selection.mixer]
        before = [technique for technique in before if technique is not selection.mixer]
        for technique in late:
            if before and (technique is selection.mixer or "change_targets" in self._phases[technique]):
                raise selection.too_late(technique, before[0])
        new = self._value(self._mixed(call, late), late) if late else value
        return with_loss(output, swapped(loss_of(output), value, new, call))

    def _say_nothing_seen(self, names: str) -> None:
        if not self._said_nothing_seen:
            host.rank_zero_warn(
                f"{names}: the step after global step {self.trainer.global_step} made a loss without a call that could"
                " be seen, unlike steps before it: it went without. This is said once."
            )
        self._said_nothing_seen = True

    def add_penalties(self, optimizer: "Optimizer") -> None:
        """Adds the gradients of the active techniques' penalties, before the optimizer's step."""
        penalizing = self._in(self._active, "penalty")
        if penalizing:
            penalties_of.add_penalties_(penalizing, self.module, self.trainer, optimizer)

    # -- passes of their own ------------------------------------------------------------------------------------------

    @contextmanager
    def training_batches(self) -> Iterator[Iterator[Any]]:
        """A pass over the training batches that training does not notice: neither samplers nor indices nor draws."""
        with extra_passes.training_batches(self.trainer, self._loaders.original) as batches:
            yield batches

    @contextmanager
    def training_steps(self) -> Iterator[Iterator[Step]]:
        """The same as steps, for a :class:`Peer` to see."""
        wanted = host.arguments_of_training_step(self.module) - 1
        with self.training_batches() as batches:
            yield (
                Step(self.trainer, self.module, batch, {}, self._loaders.several, (position,)[:wanted])
                for position, batch in enumerate(batches)
            )

    def reordered(self, technique: Member) -> Reordered:
        """The training loader in another order, chosen by the technique's seed, for a network of its own."""
        return Reordered(self._loaders.the_only_one(technique), technique)

    # -- the loss -----------------------------------------------------------------------------------------------------

    def _intercept(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = bind(function, args, kwargs)
        if self._step is None:
            return function(*args, **kwargs)
        counts = torch.is_grad_enabled() and has_gradient(arguments)
        site = call_site() if counts and (self._selection.needs_site() or not self._call_ever_seen) else ""
        copies = self._copies.loss_call(function, arguments, self._step, site) if self._copies is not None else None
        if not counts:  # a teacher, a metric, a loss that is only logged
            return function(*args, **kwargs) if copies is None else copies.plain
        return self._take(copies or LossCall(function, arguments, self._step, site))

    def reduce_loss(
        self, per_sample: Tensor, logits: Tensor | None, targets: Tensor | None, indices: Tensor | None
    ) -> Tensor:
        """What :meth:`LossMixin.reduce_loss` returns."""
        if self._step is None or not per_sample.requires_grad:
            return per_sample.mean()
        site = call_site() if self._selection.needs_site() or not self._call_ever_seen else ""
        return self._take(HandWrittenCall(per_sample, logits, targets, indices, self._step, site))

    def _take(self, call: LossCall) -> Tensor:
        takers = self._selection.take(call.name, call.site, str(call) if call.site else call.name)
        if call.step.views is not None:
            call.narrow(call.step.views)
        if isinstance(call, CopiesCall) and self._copies is not None and call.step.is_logging:
            call.step.log(self._copies.owner, "spread", call.spread())
        call = self._mixed(call, takers)
        value = self._value(call, takers) if takers else call.given_value(call.plain)
        if self._selection.last():
            self._last = call, value, takers
        return value

    def _mixed(self, call: LossCall, takers: list[Member]) -> LossCall:
        """The call as it follows the mixing of the batch."""
        mixing = call.step.mixing
        if mixing is None or call.step.mixer is None or isinstance(call, MixedCall):
            return call
        concerned = mixing.concerns(call.given_target, call.step.batch, call.step.given_batch)
        self._selection.recognized += concerned is not None
        taken = concerned is None and mixing.by in takers
        return mixed_call(call, mixing, certain=not taken) if concerned or taken else call

    def _value(self, call: LossCall, techniques: list[Member]) -> Tensor:
        call.check_views()
        step = call.step
        changed = any(self._phases[t] & LOSS_PHASES for t in techniques)  # not by a mixer: what it gives is the base
        given = call.plain if step.is_logging and changed else None
        for _, target in self._answers(techniques, "change_targets", call):
            call.replace_target(target)
        for technique in self._in(techniques, "change_losses"):
            self._change_losses(technique, call)
        weights, terms = call.weights, [*call.terms]
        for _, own in self._answers(techniques, "sample_weights", call):
            weights = call.combined(weights, own)
        for technique, term in self._answers(techniques, "loss_term", call):
            terms.append(term)
            if step.is_logging:
                step.log(technique, "term", term.mean())
        call.weights, call.terms = weights, terms  # for techniques that know only later that this call is theirs
        value = call.value(weights, terms)
        if given is not None:
            step.scalars["reg/loss/base"] = given.detach().mean()
            step.scalars["reg/loss/total"] = value.detach().mean()
        return call.given_value(value)

    def _change_losses(self, technique: Member, call: LossCall) -> None:
        of_copies = [
            losses for copy in call.copies() for _, losses in self._answers([technique], "change_losses", copy)
        ]
        if not of_copies:
            return
        losses = of_copies[0] if len(of_copies) == 1 else torch.stack(of_copies).mean(0)
        with _said_by(technique):
            call.replace_losses(losses)
        if call.step.is_logging:
            call.step.log(technique, "loss", losses.mean())

    def _log_penalties(self, penalties: Mapping[Member, Tensor], output: Any, step: Step) -> None:
        loss = loss_of(output)
        for technique, penalty in penalties.items():
            step.log(technique, "penalty", penalty)
            if loss is not None:  # under manual optimization nothing need be returned
                step.scalars.setdefault("reg/loss/base", loss.detach())
                total = step.scalars.setdefault("reg/loss/total", loss.detach())
                step.scalars["reg/loss/total"] = total + penalty

    def _answers(self, techniques: list[Member], phase: str, call: LossCall) -> Iterator[tuple[Member, Tensor]]:
        for technique in self._in(techniques, phase):
            call.reader = None if getattr(technique, "takes_mixed", False) else technique
            with _said_by(technique):
                answer = getattr(technique, phase)(call)
            if answer is not None:
                yield technique, answer

    def _in(self, techniques: Sequence[Member], phase: str) -> list[Member]:
        return [t for t in techniques if phase in self._phases[t]]


@contextmanager
def _said_by(technique: Member) -> Iterator[None]:
    """Errors name the technique."""
    try:
        yield
    except MisconfigurationException as error:
        name = type(technique).__name__
        if name in str(error):
            raise
        raise MisconfigurationException(f"{name}: {error}") from error
