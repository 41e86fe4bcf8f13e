"""Which techniques can stand together in one Trainer; decided before anything is attached."""

import inspect
from collections.abc import Sequence
from itertools import combinations, product
from typing import TYPE_CHECKING

from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.loss.mixin import LossMixin
from lightning_reg.engine.run.phases import Member, draws_samples, phases_of

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["check_composition", "check_pairs", "conflict_between"]

# Phases that look at single samples, and those in which the work of a second technique would undo that of the first.
_OF_SAMPLES = frozenset({"change_targets", "change_losses", "step_term"})
_EXCLUSIVE = {"change_targets": "replaces the targets of the loss", "change_losses": "replaces the loss"}


def check_composition(techniques: Sequence[Member], trainer: "Trainer", module: "LightningModule") -> None:
    """Refuses what cannot hold together.

    Args:
        techniques: In the order of the Trainer's callbacks.
        trainer: The Trainer that starts to fit.
        module: The user's module.

    Raises:
        MisconfigurationException: Naming the two techniques, or the technique and the setup, and what to do instead.

    """
    check_pairs(techniques)
    fetches_itself = "dataloader_iter" in inspect.signature(module.training_step).parameters
    for technique in techniques:
        if fetches_itself:
            _check_fetching(technique)
        if not module.automatic_optimization:
            _check_manual(technique, module)
        if any(period.loss == "own" for period in technique.periods) and "step_term" not in phases_of(technique):
            raise MisconfigurationException(
                f"{type(technique).__name__} has a period of its own loss alone, and no `step_term` that would be the"
                " loss. Inherit StepTechnique and write one."
            )
        technique.check(trainer, module)


def check_pairs(techniques: Sequence[Member]) -> None:
    """Refuses two techniques that cannot stand in one Trainer.

    Args:
        techniques: In the order of the Trainer's callbacks.

    Raises:
        MisconfigurationException: Naming the two, and what to do instead.

    """
    for one, two in combinations(techniques, 2):
        sentence = conflict_between(one, two)
        if sentence is not None:
            raise MisconfigurationException(f"{type(one).__name__} and {type(two).__name__} {sentence}")


def conflict_between(one: Member, two: Member) -> str | None:
    """Why two techniques cannot stand in one Trainer, in this order.

    Args:
        one: The first among the callbacks.
        two: The second.

    Returns:
        A sentence behind both their names; ``None`` if they can stand together.

    """
    if one.log_key == two.log_key:
        return f'in one Trainer share the log key {one.log_key!r}. Tell them apart by `name="..."`.'
    sentence = one.conflict_with(two) or two.conflict_with(one)
    if sentence is None:
        sentence = _mixing_conflict(one, two) or _views_conflict(one, two) or _periods_conflict(one, two)
        sentence = sentence or _order_conflict(one, two) or _further_pass_conflict(one, two)
        sentence = sentence or _second_network_conflict(one, two) or _draws_conflict(one, two)
    sentence = sentence or _input_conflict(one, two)
    for phase, what in _EXCLUSIVE.items():
        if sentence is None and phase in phases_of(one) and phase in phases_of(two) and one.loss == two.loss:
            sentence = (
                f"each {what}, so only the last would count. Remove one of them, or let them work on different loss"
                " calls with `loss=...`."
            )
    return None if sentence is None else f"cannot stand together: {sentence}"


def _input_conflict(one: Member, two: Member) -> str | None:
    for changes, replaces in ((one, two), (two, one)):
        phases = phases_of(changes), phases_of(replaces)
        if "change_input" in phases[0] and "change_losses" in phases[1] and one.loss == two.loss:
            return (
                f"{type(changes).__name__} changes the logits of the loss, and {type(replaces).__name__} puts losses in"
                " its place that are not computed from them. Remove one of them, or let them work on different loss"
                " calls with `loss=...`."
            )
    return None


def _draws_conflict(one: Member, two: Member) -> str | None:
    if draws_samples(one) and draws_samples(two):
        return "each draws the samples of the epochs, and a batch is drawn once. Remove one of them."
    return None


def _views_conflict(one: Member, two: Member) -> str | None:
    for viewing, other in ((one, two), (two, one)):
        if "extra_views" in phases_of(viewing) and other.mixes != "none":
            return (
                f"{type(viewing).__name__} passes further views of the batch through the network beside it, and"
                f" {type(other).__name__} mixes samples: which rows belong together is then not known. Remove one of"
                " them."
            )
    return None


def _further_pass_conflict(one: Member, two: Member) -> str | None:
    for running, other in ((one, two), (two, one)):
        does = f"{type(running).__name__} runs the step once more on another version of the batch, and"
        if running.runs_again and other.mixes != "none":
            return (
                f"{does} {type(other).__name__} mixes samples: the labels there would not be those of the mixed ones."
                " Remove one of them."
            )
        if running.runs_again and other.copies_rows:
            return f"{does} {type(other).__name__} makes several copies of its rows. Remove one of them."
    return None


def _periods_conflict(one: Member, two: Member) -> str | None:
    alone = [[period for period in technique.periods if period.loss == "own"] for technique in (one, two)]
    both = [f"{first}; {second}" for first, second in product(*alone) if first.meets(second)]
    if not both:
        return None
    return (
        f"each trains by its own loss alone for a time, and the times meet ({both[0]}). Let them follow one another,"
        " counted in the same unit."
    )


def _mixing_conflict(one: Member, two: Member) -> str | None:
    if one.mixes == "all" and two.mixes != "none":
        return (
            "a batch is mixed once, and the first mixes all of them, so the second would never act. Lower the"
            " probability of the first: the second then takes what the first has left alone."
        )
    for mixer, other in ((one, two), (two, one)):
        looks_at_samples = other.needs_indices or _OF_SAMPLES.intersection(phases_of(other))
        if mixer.mixes == "none" or not looks_at_samples:
            continue
        names = type(mixer).__name__, type(other).__name__
        if not other.takes_mixed:
            return f"{names[0]} makes one sample of two, and {names[1]} has no rule for a sample with two owners."
        if mixer.mixes == "all" and other.needs_indices:
            return (
                f"{names[1]} learns about single samples from the batches that are not mixed, and {names[0]} mixes all"
                " of them. Lower its probability (0.5, say)."
            )
    return None


def _order_conflict(one: Member, two: Member) -> str | None:
    for orders, remembers in ((one, two), (two, one)):
        if orders.reorders_channels and remembers.remembers_channels:
            names = type(orders).__name__, type(remembers).__name__
            return (
                f"{names[0]} puts channels in another order when a training begins, and {names[1]} holds values of"
                f" single channels from an earlier one. Let {names[0]} do so in the first fit only; the order stays in"
                " the weights."
            )
    return None


def _second_network_conflict(one: Member, two: Member) -> str | None:
    if not (one.trains_second and two.trains_second):
        return None
    return (
        "each trains a second network beside the module's, and neither would act on that of the other: what the module"
        " learns from one would be trained without the other. Remove one of them."
    )


def _check_fetching(technique: Member) -> None:
    name = type(technique).__name__
    if technique.needs_indices:
        raise MisconfigurationException(
            f"{name} needs the indices of the batch, but `training_step(dataloader_iter)` fetches batches itself, so"
            " they are not known. Write `training_step(batch, batch_idx)`."
        )
    if draws_samples(technique):
        raise MisconfigurationException(
            f"{name} draws the samples of the epochs, but `training_step(dataloader_iter)` fetches batches itself."
            " Write `training_step(batch, batch_idx)`."
        )
    if {"transform_batch", "extra_views"}.intersection(phases_of(technique)):
        raise MisconfigurationException(
            f"{name} changes the batch, but `training_step(dataloader_iter)` fetches batches itself. Write"
            " `training_step(batch, batch_idx)`."
        )


def _check_manual(technique: Member, module: "LightningModule") -> None:
    if "step_term" in phases_of(technique) and not isinstance(module, LossMixin):
        raise MisconfigurationException(
            f"{type(technique).__name__} adds a term to the loss of the step, and with automatic_optimization=False"
            f" {type(module).__name__} takes the gradient itself. Inherit `LossMixin` and hand over the losses of the"
            " samples: `self.manual_backward(self.reduce_loss(per_sample_loss))`."
        )
    if technique.loss == "last":
        raise MisconfigurationException(
            f'{type(technique).__name__}(loss="last") is known only after `training_step` has returned; with'
            " automatic_optimization=False that is too late. Name the call by its position, function or place in the"
            " code."
        )
