"""Which techniques can stand together in one Trainer; decided before anything is attached."""

import inspect
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from lightning_reg.engine.errors import MisconfigurationException
from lightning_reg.engine.technique import Technique, phases_of

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["check_composition", "check_whole"]

# Phases in which the work of a second technique would undo that of the first.
_EXCLUSIVE = {"change_targets": "replaces the targets of the loss", "change_losses": "replaces the loss"}


def check_composition(techniques: Sequence[Technique], trainer: "Trainer", module: "LightningModule") -> None:
    """Refuses what cannot hold together.

    Args:
        techniques: In the order of the Trainer's callbacks.
        trainer: The Trainer that starts to fit.
        module: The user's module.

    Raises:
        MisconfigurationException: Naming the two techniques, or the technique and the setup, and what to do instead.

    """
    for one, two in combinations(techniques, 2):
        names = f"{type(one).__name__} and {type(two).__name__}"
        if one.log_key == two.log_key:
            raise MisconfigurationException(
                f'{names} in one Trainer share the log key {one.log_key!r}. Tell them apart by `name="..."`.'
            )
        for phase, what in _EXCLUSIVE.items():
            if phase in phases_of(one) and phase in phases_of(two) and one.loss == two.loss:
                raise MisconfigurationException(
                    f"{names} cannot stand together: each {what}, so only the last would count. Remove one of them, or"
                    " let them work on different loss calls with `loss=...`."
                )
        sentence = one.conflict_with(two) or two.conflict_with(one) or _mixing_conflict(one, two)
        if sentence:
            raise MisconfigurationException(f"{names} cannot stand together: {sentence}")
    fetches_itself = "dataloader_iter" in inspect.signature(module.training_step).parameters
    for technique in techniques:
        if fetches_itself:
            _check_fetching(technique)
        if not module.automatic_optimization:
            _check_manual(technique)
        technique.check(trainer, module)


def check_whole(technique: Technique, trainer: "Trainer", does: str = "edits") -> None:
    """Refuses strategies that do not keep parameters whole.

    Args:
        technique: Who needs them whole.
        trainer: The Trainer that starts to fit.
        does: What it does with them, for the message.

    Raises:
        MisconfigurationException: Under FSDP, DeepSpeed and tensor parallelism.

    """
    strategy = type(trainer.strategy).__name__
    if strategy.startswith(("FSDP", "DeepSpeed", "ModelParallel", "XLAFSDP")):
        raise MisconfigurationException(
            f"{type(technique).__name__} {does} whole parameters, which {strategy} splits over the processes. Use DDP."
        )


def _mixing_conflict(one: Technique, two: Technique) -> str | None:
    if one.mixes == "all" and two.mixes != "none":
        return (
            "a batch is mixed once, and the first mixes all of them, so the second would never act. Lower the"
            " probability of the first: the second then takes what the first has left alone."
        )
    for mixer, other in ((one, two), (two, one)):
        looks_at_samples = other.needs_indices or "change_targets" in phases_of(other)
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


def _check_fetching(technique: Technique) -> None:
    name = type(technique).__name__
    if technique.needs_indices:
        raise MisconfigurationException(
            f"{name} needs the indices of the batch, but `training_step(dataloader_iter)` fetches batches itself, so"
            " they are not known. Write `training_step(batch, batch_idx)`."
        )
    if "transform_batch" in phases_of(technique):
        raise MisconfigurationException(
            f"{name} changes the batch, but `training_step(dataloader_iter)` fetches batches itself. Write"
            " `training_step(batch, batch_idx)`."
        )


def _check_manual(technique: Technique) -> None:
    name = type(technique).__name__
    if technique.loss == "last":
        raise MisconfigurationException(
            f'{name}(loss="last") is known only after `training_step` has returned; with automatic_optimization=False'
            " that is too late. Name the call by its position, function or place in the code."
        )
