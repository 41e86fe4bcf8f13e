"""What a technique needs of the strategy that keeps the parameters."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.weights import shards

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["check_editable", "check_split", "check_whole"]

# Strategies under which what stands in a parameter is not what is trained.
_OPAQUE = {
    "FSDP": "joins parameters into flat vectors, which are cut in the middle of rows",
    "XLAFSDP": "joins parameters into flat vectors, which are cut in the middle of rows",
    "DeepSpeed": "trains copies of its own",
}


def check_whole(technique: object, trainer: "Trainer", does: str) -> None:
    """Refuses strategies that do not keep parameters whole.

    Args:
        technique: Who needs them whole.
        trainer: The Trainer that starts to fit.
        does: What it does with them, for the message.

    Raises:
        MisconfigurationException: Under FSDP, DeepSpeed and tensor parallelism.

    """
    strategy = type(trainer.strategy).__name__
    if strategy.startswith((*_OPAQUE, "ModelParallel")):
        raise MisconfigurationException(
            f"{type(technique).__name__} {does} whole parameters, which {strategy} splits over the processes. Use DDP."
        )


def check_editable(technique: object, trainer: "Trainer", does: str = "edits") -> None:
    """Refuses strategies that keep parameters in a form of their own.

    Args:
        technique: Who edits weights.
        trainer: The Trainer that starts to fit.
        does: What it does with them, for the message.

    Raises:
        MisconfigurationException: Under FSDP1 and DeepSpeed.

    """
    strategy = type(trainer.strategy).__name__
    why = next((why for prefix, why in _OPAQUE.items() if strategy.startswith(prefix)), None)
    if why is not None:
        raise MisconfigurationException(
            f"{type(technique).__name__} {does} parameters, but {strategy} {why}. Use DDP, or ModelParallelStrategy"
            " with `fully_shard` in `configure_model`."
        )


def check_split(technique: object, parameters: Mapping[str, Tensor], needs_whole: str | None) -> None:
    """Refuses parameters that are split over processes in a way that the technique's edits cannot follow.

    Args:
        technique: Who edits weights.
        parameters: Those it edits, by name.
        needs_whole: Why it needs whole parameters, as a clause; ``None`` if rows are enough.

    Raises:
        MisconfigurationException: If it needs whole parameters, or if rows are cut.

    """
    owner = type(technique).__name__
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
