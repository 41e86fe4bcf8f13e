"""The loss of one step, from the call that the user's code makes to the value that it gets."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.autograd import is_checkpointed, version_of
from lightning_reg.engine.host.errors import MisconfigurationException, in_the_name_of
from lightning_reg.engine.loss.call import LossCall
from lightning_reg.engine.loss.call_by_hand import call_by_hand
from lightning_reg.engine.loss.call_mixed import mixed_call
from lightning_reg.engine.loss.choice import Selection, constant_loss, loss_in_checkpoint, no_loss_seen
from lightning_reg.engine.loss.elements import bind, has_gradient
from lightning_reg.engine.loss.evaluation import FunctionEvaluation
from lightning_reg.engine.loss.result import check_contributes, check_part, loss_of, swapped, with_loss
from lightning_reg.engine.loss.row_order import RowOrder
from lightning_reg.engine.loss.watch import Interception, call_site
from lightning_reg.engine.run.phases import Member, OnLoss, needs_call, phases_of, taking_part

if TYPE_CHECKING:
    from lightning_reg.engine.run.rehearsal import Rehearsal
    from lightning_reg.engine.step import Step

__all__ = ["LossPath", "Sightings"]


def _order_at_first() -> RowOrder:
    return RowOrder(looks_at_batch=True)


@dataclass
class Sightings:
    """What is known of the loss calls of a fit, from one step to the next.

    Args:
        interception: Sees the loss functions.
        acting: The techniques that take part in each phase on the loss.
        by_mixin: Whether the module hands its losses over.
        changes_calls: Whether a technique takes part that changes logits, targets or losses.
        any_call: Whether a call was ever seen.
        is_first: Whether the first step that makes a loss is still to come, or at work.
        said_none: Whether it was said that a step went without.
        orders: What is known of the order of each call's rows, by the call's place among those of a step.

    """

    interception: Interception
    acting: "Mapping[str, Sequence[OnLoss]]"
    by_mixin: bool
    changes_calls: bool = field(init=False)
    any_call: bool = False
    is_first: bool = True
    said_none: bool = False
    paths: "list[LossPath]" = field(default_factory=list)
    orders: "defaultdict[int, RowOrder]" = field(default_factory=lambda: defaultdict(_order_at_first))

    def __post_init__(self) -> None:
        self.changes_calls = any(self.acting[phase] for phase in ("change_input", "change_targets", "change_losses"))


@dataclass
class _Seen:
    """A call that was seen, and what came of it.

    Args:
        call: The call as techniques have it.
        takers: Techniques that work on it.
        owners: Everybody who has a part in it, those included that wait.

    Attributes:
        value: What the user's code got; with views, what that was made of.
        version: How often that had been changed in place.
        weights: What techniques have made of it.
        terms: The same.

    """

    call: LossCall
    takers: "list[Member]"
    owners: "list[Any]"
    value: Tensor = field(init=False)
    version: int = field(init=False)
    weights: Tensor | None = None
    terms: list[Tensor] = field(default_factory=list)


class LossPath:
    """The way of a step's loss: sees its calls, lets the techniques work on them, settles what is known at the end.

    It lives for one step, around the user's ``training_step``, and takes all it knows with it.

    Args:
        step: The step.
        techniques: Active techniques that work on the loss, the mixer of the batch included.
        sightings: What is known of the calls of the fit.
        rehearsals: In a fit's first step the techniques that act on losses in later ones only.

    """

    def __init__(
        self,
        step: "Step",
        techniques: "Sequence[Member]",
        sightings: Sightings,
        rehearsals: "Sequence[Rehearsal]" = (),
    ) -> None:
        self._step, self._techniques, self._sightings, self._rehearsals = step, techniques, sightings, rehearsals
        self._selection: Selection[Member] = Selection(techniques, step.mixer)
        self._seen: list[_Seen] = []
        self._by_hand = not step.module.automatic_optimization
        involved = bool(techniques or rehearsals)
        watched = not sightings.by_mixin and bool(involved or step.call_changes or step.views is not None)
        self._watching: AbstractContextManager[None] = (
            sightings.interception.watch(self.see) if watched else nullcontext()
        )
        self._is_needed = watched or involved

    def __enter__(self) -> "LossPath":
        self._sightings.paths.append(self)
        self._steps_before = self._step.global_step if self._by_hand else 0
        self._watching.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._watching.__exit__(kind, error, traceback)
        self._sightings.paths.pop()
        if kind is None:
            self._finish()

    # -- calls of the user's code -------------------------------------------------------------------------------------

    def see(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a call of a loss function returns to the user's code."""
        arguments, step = bind(function, args, kwargs), self._step
        if not self._sightings.any_call and is_checkpointed():
            self._refuse_recomputed(function.__name__)
        counts = torch.is_grad_enabled() and has_gradient(arguments)
        if not counts and not step.call_changes:  # a teacher, a metric, a loss that is only logged
            return function(*args, **kwargs)
        evaluation = FunctionEvaluation(function, arguments)
        order, site = self._sightings.orders[len(self._selection.seen)], self._site() if counts else ""
        seen = call = LossCall(evaluation, step, site, evaluation.target, order=order)
        owners: list[Any] = []
        for owner, change in step.call_changes.items():
            before, call = call, change(call)
            owners += [] if call is before else [owner]
        if counts:
            return self._take(call, owners)
        return function(*args, **kwargs) if call is seen else call.plain

    def _refuse_recomputed(self, function: str) -> None:
        if techniques := [*self._techniques, *(r.technique for r in self._rehearsals)]:
            raise loss_in_checkpoint(techniques, function, call_site())

    def reduce_loss(
        self, per_sample: Tensor, logits: Tensor | None, targets: Tensor | None, indices: Tensor | None
    ) -> Tensor:
        """What :meth:`LossMixin.reduce_loss` returns to the user's code."""
        call = call_by_hand(per_sample, logits, targets, indices, self._step, self._site())
        return self._step.add_terms(self._take(call, []))

    def _site(self) -> str:
        return call_site() if not self._sightings.any_call or self._selection.needs_site() else ""

    def _take(self, call: LossCall, owners: list[Any]) -> Tensor:
        selection, step, name = self._selection, self._step, call.name
        description = str(call) if call.site else name
        takers = selection.take(name, call.site, description)
        if step.views is not None:
            call = call.narrowed(step.views)
        owners += takers
        owners += [r.technique for r in self._rehearsals if r.takes(call, description)]
        if step.mixing is not None:
            call = self._mixed(call, takers)
            owners += [step.mixing.by] if call.is_mixed and step.mixing.by not in owners else []
        seen = _Seen(call, takers, owners)
        self._seen.append(seen)
        seen.value = self._work(seen, takers) if takers else call.plain
        seen.version = version_of(seen.value)
        return call.given_value(seen.value)

    def _mixed(self, call: LossCall, takers: list[Member]) -> LossCall:
        """The call as it follows the mixing of the batch."""
        step, mixing = call.step, call.step.mixing
        if mixing is None or step.mixer is None or call.is_mixed:
            return call
        concerned = mixing.concerns(call.given_target, step.batch, step.given_batch)
        self._selection.recognized += concerned is not None
        taken = concerned is None and mixing.by in takers
        return mixed_call(call, mixing, certain=not taken) if concerned or taken else call

    def _work(self, seen: _Seen, techniques: list[Member]) -> Tensor:
        step, acting, call = self._step, self._sightings.acting, seen.call
        if step.views is not None:
            call.check_views()
        # Not changed by a mixer: what it gives is the base.
        given = call.plain if step.is_logging and taking_part(techniques, OnLoss) else None
        if self._sightings.changes_calls:
            call = _changed(call, techniques, acting, looks=step.is_logging or self._sightings.is_first)
        for technique in acting["sample_weights"]:
            if technique in techniques and (own := _ask(technique, technique.sample_weights, call)) is not None:
                seen.weights = call.combined(seen.weights, own)
        for technique in acting["loss_term"]:
            if technique in techniques and (term := _ask(technique, technique.loss_term, call)) is not None:
                seen.terms.append(term)
                if step.is_logging:
                    step.log(technique, "term", term.mean())
        seen.call, value = call, call.value(seen.weights, seen.terms)
        if given is not None:
            step.scalars["reg/loss/base"] = given.detach().mean()
            step.scalars["reg/loss/total"] = value.detach().mean()
        return value

    # -- the end of the step ------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        step, selection, sightings = self._step, self._selection, self._sightings
        stepped = self._by_hand and step.global_step > self._steps_before
        step.made_loss = stepped or loss_of(step.output) is not None
        if selection.seen:
            sightings.any_call = True
            selection.check()
            for rehearsal in self._rehearsals:
                rehearsal.check()
            total = loss_of(step.output)
            if total is not None and not self._by_hand:
                self._settle(total)
        elif step.made_loss and self._is_needed:
            self._miss()
        sightings.is_first &= not step.made_loss

    def _miss(self) -> None:
        """A loss was made, and no call was seen."""
        step, selection, sightings = self._step, self._selection, self._sightings
        if selection.mixer is not None and sightings.any_call:
            raise selection.not_mixed()
        total = None if self._by_hand or sightings.by_mixin else loss_of(step.output)
        techniques, rehearsed = self._techniques, [r.technique for r in self._rehearsals]
        if total is not None:
            self._join(total, [t for t in techniques if isinstance(t, OnLoss) and not needs_call(t)])
            techniques, rehearsed = ([t for t in some if needs_call(t)] for some in (techniques, rehearsed))
            if not techniques and not rehearsed:
                return
        everyone, joined = [*techniques, *rehearsed], None if total is None else loss_of(step.output)
        if everyone and joined is not None and not (sightings.any_call or joined.requires_grad):
            raise constant_loss(everyone, step.module)
        if sightings.interception.missed(step.trainer.global_step):
            step.made_loss = False  # as far as anybody can say: the mode looks at the next one
        elif not sightings.any_call and everyone:
            raise no_loss_seen(everyone, step.module, by_mixin=sightings.by_mixin)
        elif techniques and not sightings.said_none:
            sightings.said_none = True
            names = ", ".join(type(t).__name__ for t in techniques)
            host.rank_zero_warn(
                f"{names}: the step after global step {step.trainer.global_step} made a loss without a call that could"
                " be seen, unlike steps before it: it went without. This is said once."
            )

    def _join(self, total: Tensor, techniques: list[OnLoss]) -> None:
        """Adds the terms of techniques that need no call to the loss that ``training_step`` has returned."""
        step = self._step
        with step.trainer.precision_plugin.train_step_context():
            for technique in techniques:
                term = technique.term_of_step(step)
                total = total + term
                if step.is_logging:
                    step.log(technique, "term", term)
        if techniques:
            step.output = with_loss(step.output, total)

    def _settle(self, total: Tensor) -> None:
        """Does what could be done only with the loss that ``training_step`` has returned."""
        step, late, last, first = self._step, self._selection.late, self._seen[-1], self._sightings.is_first
        if late:
            with step.trainer.precision_plugin.train_step_context():
                step.output = with_loss(step.output, self._settled_last(total, last, late))
        if first or step.is_logging:
            last.owners += [*late, *(r.technique for r in self._rehearsals if r.takes_last)]
            for seen in self._seen:
                if seen.owners and seen.value is not total:
                    _check_part(total, seen, first=first)

    def _settled_last(self, total: Tensor, last: _Seen, late: list[Member]) -> Tensor:
        """The loss with what the techniques make of the last call, now that it is known."""
        mixer = self._selection.mixer
        if last.call.is_mixed:  # its labels were recognized, so the mixer has had its way already
            late = [technique for technique in late if technique is not mixer]
        before = [technique for technique in last.takers if technique is not mixer]
        for technique in late:
            if before and (technique is mixer or _BEFORE_LOSSES.intersection(phases_of(technique))):
                raise self._selection.too_late(technique, before[0])
        if not late:
            return total
        last.call = self._mixed(last.call, late)
        return swapped(total, last.value, self._work(last, late), last.call)


def _check_part(total: Tensor, seen: _Seen, *, first: bool) -> None:
    counting = [t for t in seen.owners if {"change_losses", "sample_weights"}.intersection(phases_of(t))]
    names, those = (", ".join(dict.fromkeys(type(t).__name__ for t in ts)) for ts in (seen.owners, counting))
    if first:
        check_contributes(total, seen.value, f"{names}: {seen.call}")
    in_place = version_of(seen.value) != seen.version
    check_part(total, seen.value, seen.call, names, those, in_place=in_place)


_BEFORE_LOSSES = frozenset({"change_input", "change_targets"})  # what weights and terms of others see the effect of


def _changed(
    call: LossCall, techniques: list[Member], acting: "Mapping[str, Sequence[OnLoss]]", *, looks: bool
) -> LossCall:
    """The call with other logits, then with other targets, then with other losses."""
    given, changing = call, [technique for technique in acting["change_input"] if technique in techniques]
    for technique in changing:
        call = _with_inputs(call, technique)
    for technique in acting["change_targets"]:
        if technique in techniques and (target := _ask(technique, technique.change_targets, call)) is not None:
            call = call.with_target(target)
    if looks and changing and call.loss_input is not call.input:
        _check_finite(given, call, changing)
    for technique in acting["change_losses"]:
        if technique in techniques:
            call = _with_losses(call, technique)
    return call


def _with_inputs(call: LossCall, technique: OnLoss) -> LossCall:
    copies = call.copies()
    asked = [_ask(technique, technique.change_input, copy) for copy in copies]
    if all(changed is None for changed in asked):
        return call
    inputs = [copy.loss_input if changed is None else changed for copy, changed in zip(copies, asked, strict=True)]
    try:
        return call.with_inputs(inputs)
    except MisconfigurationException as error:
        raise in_the_name_of(technique, error) from error


def _check_finite(given: LossCall, call: LossCall, techniques: Sequence[OnLoss]) -> None:
    """Refuses logits that make losses infinite which were finite; a host sync."""
    lost = ~call.decomposition.elements.detach().isfinite()
    if lost.any() and (lost & given.decomposition.elements.detach().isfinite()).any():
        raise MisconfigurationException(
            f"{', '.join(type(t).__name__ for t in techniques)}: with the changed logits losses of {call} are infinite"
            " that are finite with the given ones. A column that a sample's target counts cannot be masked by -inf:"
            " not its own, and with probabilities as targets or label smoothing none."
        )


def _with_losses(call: LossCall, technique: OnLoss) -> LossCall:
    asked = [_ask(technique, technique.change_losses, copy) for copy in call.copies()]
    of_copies = [losses for losses in asked if losses is not None]
    if not of_copies:
        return call
    losses = of_copies[0] if len(of_copies) == 1 else torch.stack(of_copies).mean(0)
    try:
        changed = call.with_losses(losses)
    except MisconfigurationException as error:
        raise in_the_name_of(technique, error) from error
    if call.step.is_logging:
        call.step.log(technique, "loss", losses.mean())
    return changed


def _ask(technique: OnLoss, phase: Callable[[LossCall], Tensor | None], call: LossCall) -> Tensor | None:
    """What a technique answers; errors name it."""
    if call.step.mixing is not None and not technique.takes_mixed:
        call = call.read_by(technique)
    try:
        return phase(call)
    except MisconfigurationException as error:
        raise in_the_name_of(technique, error) from error
