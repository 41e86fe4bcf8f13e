"""Checkpoints that hold what was trained alone: written by callbacks, read before the module is restored."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.run.hooks import StandsIn
from lightning_reg.engine.run.phases import Member, ThroughMap, taking_part
from lightning_reg.engine.weights.deltas import fill_, is_delta, strip_

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["ReadsDeltas", "strip_checkpoint_"]


def _mapping(techniques: Sequence[Any]) -> tuple[list[Any], list[ThroughMap]]:
    """Those whose latents are frozen, and the others that map weights."""
    mapping = taking_part([technique for technique in techniques if isinstance(technique, Member)], ThroughMap)
    return [t for t in mapping if t.latents.frozen], [t for t in mapping if not t.latents.frozen]


def strip_checkpoint_(trainer: "Trainer", module: "LightningModule", checkpoint: dict[str, Any]) -> None:
    """Takes out of a checkpoint what the techniques of a Trainer did not train."""
    frozen, others = _mapping(host.callbacks(trainer))
    strip_(checkpoint, module, frozen, {name for technique in others for name in technique.weights_to_map(module)})


class ReadsDeltas(StandsIn):
    """Completes such checkpoints before Lightning restores the module, in every stage, until it is torn down.

    Args:
        trainer: The Trainer.
        module: The user's module.
        frozen: The techniques whose latents are frozen.

    """

    def __init__(self, trainer: "Trainer", module: "LightningModule", frozen: Sequence[Any]) -> None:
        self._module, self._frozen = module, frozen
        self._loading = host.Replacement(trainer.strategy, "load_model_state_dict", self._load)
        super().__init__([self._loading])

    @classmethod
    def attach(cls, trainer: "Trainer", module: "LightningModule", techniques: Sequence[Any]) -> None:
        """Attaches it if a technique may have written such a file, unless it is there."""
        frozen, callbacks = _mapping(techniques)[0], host.callbacks(trainer)
        if frozen and not any(isinstance(callback, cls) for callback in callbacks):
            host.set_callbacks(trainer, [cls(trainer, module, frozen), *callbacks])

    def _load(self, checkpoint: Any, *args: Any, **kwargs: Any) -> None:
        if is_delta(checkpoint):
            fill_(checkpoint, self._module, self._frozen, type(self._frozen[0]).__name__)
        self._loading.original(checkpoint, *args, **kwargs)
