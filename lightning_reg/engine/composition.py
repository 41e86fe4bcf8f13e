"""Which techniques can stand together in one Trainer; decided before anything is attached."""

import inspect
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_reg.engine import shards
from lightning_reg.engine.errors import MisconfigurationException
from lightning_reg.engine.technique import Technique, phases_of

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["check_composition", "check_editable", "check_split"]

# Phases in which the work of a second technique would undo that of the first.
_EXCLUSIVE = {"change_targets": "replaces the targets of the loss"}


# Strategies under which what stands in a parameter is not what is trained.
_OPAQUE = {
    "FSDP": "joins parameters into flat vectors, which are cut in the middle of rows",
    "XLAFSDP": "joins parameters into flat vectors, which are cut in the middle of rows",
    "DeepSpeed": "trains copies of its own",
}


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
        sentence = one.conflict_with(two) or two.conflict_with(one)
        if sentence:
            raise MisconfigurationException(f"{names} cannot stand together: {sentence}")
    fetches_itself = "dataloader_iter" in inspect.signature(module.training_step).parameters
    for technique in techniques:
        if fetches_itself and technique.needs_indices:
            raise MisconfigurationException(
                f"{type(technique).__name__} needs the indices of the batch, but `training_step(dataloader_iter)`"
                " fetches batches itself, so they are not known. Write `training_step(batch, batch_idx)`."
            )
        if not module.automatic_optimization:
            _check_manual(technique)
        technique.check(trainer, module)


def check_editable(technique: Technique, trainer: "Trainer") -> None:
    """Refuses strategies that keep parameters in a form of their own.

    Args:
        technique: Who edits weights.
        trainer: The Trainer that starts to fit.

    Raises:
        MisconfigurationException: Under FSDP1 and DeepSpeed.

    """
    strategy = type(trainer.strategy).__name__
    why = next((why for prefix, why in _OPAQUE.items() if strategy.startswith(prefix)), None)
    if why is not None:
        raise MisconfigurationException(
            f"{type(technique).__name__} edits parameters, but {strategy} {why}. Use DDP, or ModelParallelStrategy with"
            " `fully_shard` in `configure_model`."
        )


def check_split(technique: Technique, parameters: Mapping[str, Tensor]) -> None:
    """Refuses parameters that are split over processes in a way that the technique's edits cannot follow.

    Args:
        technique: Who edits weights.
        parameters: Those it edits, by name.

    Raises:
        MisconfigurationException: If it needs whole parameters, or if rows are cut.

    """
    owner, needs_whole = type(technique).__name__, technique.needs_whole_parameters()
    for name, parameter in parameters.items():
        if not shards.is_split(parameter):
            continue
        if needs_whole is not None:
            raise MisconfigurationException(
                f"{owner}: {needs_whole}, but {name!r} is split over the processes. Use DDP."
            )
        cut = shards.cut_rows(parameter)
        if cut:
            raise MisconfigurationException(
                f"{owner} edits whole rows of parameters, but {name!r} {cut}. Split it along dimension 0, as"
                " `fully_shard` does, leave it out, or use DDP."
            )


def _check_manual(technique: Technique) -> None:
    name = type(technique).__name__
    if "penalty" in phases_of(technique):
        raise MisconfigurationException(
            f"{name} adds a penalty to the loss that `training_step` returns; with automatic_optimization=False nothing"
            f" is returned that is trained on. Add `{name}.penalty(self)` to your loss before `manual_backward`."
        )
    if technique.loss == "last":
        raise MisconfigurationException(
            f'{name}(loss="last") is known only after `training_step` has returned; with automatic_optimization=False'
            " that is too late. Name the call by its position, function or place in the code."
        )
