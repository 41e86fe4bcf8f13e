"""The engine's own callback: the moments outside ``training_step`` at which the engine has something to do."""

from typing import TYPE_CHECKING, Any

from typing_extensions import override

from lightning_reg.engine.host.lightning import Callback

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

    from lightning_reg.engine.run.engine import Engine

__all__ = ["EngineHooks", "LastHook"]


_NEVER = ("on_train_batch_start", "on_before_backward", "on_after_backward", "on_before_zero_grad")


class EngineHooks(Callback):
    """Stands first among the Trainer's callbacks while the engine is attached, so that all others see dense weights.

    Args:
        engine: Whose hooks these are.
        edits_weights: Whether there are weights to restore.
        penalizes: Whether there are penalties whose gradients to add.

    """

    def __init__(self, engine: "Engine", *, edits_weights: bool, penalizes: bool) -> None:
        self._engine, self.edits_weights = engine, edits_weights
        # Lightning calls the hooks that are callable; nothing to do is not even a call.
        idle = list(_NEVER)
        if not edits_weights:
            idle.append("on_train_batch_end")
        if not (edits_weights or penalizes):
            idle.append("on_before_optimizer_step")
        for hook in idle:
            setattr(self, hook, None)

    @override
    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._engine.prepare_module()

    @override
    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._engine.prepare_data()

    @override
    def on_before_optimizer_step(
        self, trainer: "Trainer", pl_module: "LightningModule", optimizer: "Optimizer"
    ) -> None:
        self._engine.restore_weights(optimizer)
        self._engine.add_penalties(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._engine.restore_weights()

    @override
    def on_validation_epoch_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._engine.restore_weights()

    @override
    def on_exception(self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException) -> None:
        self._engine.detach()

    @override
    def teardown(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        self._engine.detach()


class LastHook(Callback):
    """Stands last among the callbacks while weights are edited or trained through a map.

    So all others change dL/dw; and weights that others put in for validation (averages) are edited as well.

    Args:
        engine: Whose hook this is.

    """

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine

    @override
    def on_before_optimizer_step(
        self, trainer: "Trainer", pl_module: "LightningModule", optimizer: "Optimizer"
    ) -> None:
        self._engine.pull_back(optimizer)

    @override
    def on_validation_epoch_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._engine.apply_weights()
