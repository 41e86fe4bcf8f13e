"""What techniques do outside training: batches and layers changed in validation, test and prediction."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.layers.edits import LayerEdits
from lightning_reg.engine.run import report
from lightning_reg.engine.run.composition import check_pairs
from lightning_reg.engine.run.hooks import StandsIn
from lightning_reg.engine.run.layer_parts import edits_of
from lightning_reg.engine.run.phases import Member, OnBatch, OnLayers, phases_of, taking_part
from lightning_reg.engine.step import EvaluationStep, Stage

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["AroundEvaluation"]

_STEPS: dict[str, Stage] = {"validation_step": "validate", "test_step": "test", "predict_step": "predict"}
_PHASES = frozenset({"edit_inputs", "edit_features", "transform_batch"})


class AroundEvaluation(StandsIn):
    """Stands around the steps of validation, test and prediction while a Trainer runs, first among its callbacks.

    Layers are looked up in the first of these steps, when ``configure_model`` has made them.

    Args:
        trainer: The Trainer.
        module: The user's module.
        techniques: Those that act outside training.

    """

    def __init__(self, trainer: "Trainer", module: "LightningModule", techniques: Sequence[Member]) -> None:
        self._module, self._techniques = module, techniques
        self._on_layers = taking_part(techniques, OnLayers)
        self._on_batch = taking_part(techniques, OnBatch, "transform_batch")
        self._edits: LayerEdits | None = None
        super().__init__(
            host.Replacement(
                trainer.strategy, method, partial(self._run, trainer, getattr(trainer.strategy, method), stage)
            )
            for method, stage in _STEPS.items()
            if any(stage in technique.stages for technique in techniques)
        )

    @classmethod
    def attach(cls, trainer: "Trainer", module: "LightningModule", techniques: Sequence[Member]) -> None:
        """Attaches it if a technique acts outside training, unless it is there.

        Raises:
            MisconfigurationException: If two of them cannot stand together.

        """
        acting = [t for t in techniques if t.stages - {"train"} and _PHASES.intersection(phases_of(t))]
        callbacks = host.callbacks(trainer)
        if acting and not any(isinstance(callback, cls) for callback in callbacks):
            check_pairs(acting)
            host.set_callbacks(trainer, [cls(trainer, module, acting), *callbacks])

    def _run(self, trainer: "Trainer", original: Callable[..., Any], stage: Stage, *args: Any, **kwargs: Any) -> Any:
        step = EvaluationStep(trainer, self._module, args, stage)
        step.active = [t for t in self._techniques if stage in t.stages and t.is_active(step)]
        if not step.active:
            return original(*args, **kwargs)
        for technique in [technique for technique in self._on_batch if technique in step.active]:
            step.batch = technique.transform_batch(step.batch, step)
        args = (step.batch, *args[1:]) if args else args
        if self._edits is None:
            self._edits = LayerEdits(self._module, edits_of(self._on_layers, self._module), training=False)
        self._edits.open(step)
        try:
            output = original(*args, **kwargs)
        finally:
            self._edits.shut()
            self._edits.rest()  # no backward pass follows, and the step holds its batch
        self._edits.check(step)
        if step.scalars:
            report.log_scalars(self._module, step.scalars, sum(step.batch_sizes), by_epoch=True)
        return output

    @override
    def let_go(self) -> None:
        if self._edits is not None:
            self._edits.close()
        super().let_go()
