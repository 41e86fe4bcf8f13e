"""The engine's own callbacks: the moments outside ``training_step`` at which its parts have something to do."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

from typing_extensions import override

from lightning_reg.engine.host.lightning import STEP_HOOKS, Callback, Replacement, callbacks, set_callbacks
from lightning_reg.engine.run import report
from lightning_reg.engine.run.part import overriding

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

    from lightning_reg.engine.run.part import Part
    from lightning_reg.engine.run.phases import Member
    from lightning_reg.engine.run.watching import Watch

__all__ = ["FirstHooks", "LastHooks", "StandsIn"]


class HasParts(Protocol):
    """What is attached to the Trainer."""

    parts: "list[Part]"
    watch: "Watch"
    techniques: "list[Member]"

    def prepare(self) -> None:
        """The module is configured."""

    def start(self) -> None:
        """The loaders and optimizers are there."""

    def detach(self) -> None:
        """Takes everything off."""


class FirstHooks(Callback):
    """Stands first among the Trainer's callbacks while the engine is attached, so that all others see dense weights.

    Args:
        engine: Whose hooks these are.

    """

    def __init__(self, engine: HasParts) -> None:
        self._engine = engine
        self._before_optimizer = overriding(engine.parts[::-1], "before_optimizer")
        self._rest = overriding(engine.parts[::-1], "rest")
        self._begin_epoch = overriding(engine.parts, "begin_epoch")
        # Lightning calls the hooks that are callable; nothing to do is not even a call.
        idle = [hook for hook in STEP_HOOKS if hook not in vars(type(self))]
        idle += [] if self._rest else ["on_train_batch_end"]
        for hook in [*idle, *([] if self._before_optimizer else ["on_before_optimizer_step"])]:
            setattr(self, hook, None)

    @override
    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._engine.prepare()

    @override
    def on_save_checkpoint(self, trainer: "Trainer", pl_module: "LightningModule", checkpoint: dict[str, Any]) -> None:
        report.note_empty_states(self._engine.techniques, checkpoint)

    @override
    def on_load_checkpoint(self, trainer: "Trainer", pl_module: "LightningModule", checkpoint: dict[str, Any]) -> None:
        report.warn_of_missing_states(self._engine.techniques, checkpoint)

    @override
    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._engine.start()

    @override
    def on_train_epoch_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        for begin in self._begin_epoch:
            begin()

    @override
    def on_before_optimizer_step(
        self, trainer: "Trainer", pl_module: "LightningModule", optimizer: "Optimizer"
    ) -> None:
        for before in self._before_optimizer:
            before(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for rest in self._rest:
            rest()

    @override
    def on_validation_epoch_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        for rest in self._rest:
            rest()

    @override
    def on_fit_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._engine.watch.show()

    @override
    def on_exception(self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException) -> None:
        self._engine.detach()

    @override
    def teardown(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        self._engine.detach()


class LastHooks(Callback):
    """Stands last among the callbacks if parts want the last word.

    So all others change dL/dw; and weights that others put in for validation (averages) are edited as well.

    Args:
        engine: Whose hooks these are.

    """

    def __init__(self, engine: HasParts) -> None:
        self._final = overriding(engine.parts[::-1], "gradients_are_final")
        self._begin_validation = overriding(engine.parts, "begin_validation")

    @property
    def have_something_to_do(self) -> bool:
        """Whether a part wants it."""
        return bool(self._final or self._begin_validation)

    @override
    def on_before_optimizer_step(
        self, trainer: "Trainer", pl_module: "LightningModule", optimizer: "Optimizer"
    ) -> None:
        for final in self._final:
            final(optimizer)

    @override
    def on_validation_epoch_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        for begin in self._begin_validation:
            begin()


class StandsIn(Callback):
    """Stands in for methods of Lightning's, in every stage, until that is torn down; then it leaves the callbacks.

    Args:
        replaced: The methods.

    """

    def __init__(self, replaced: Iterable[Replacement]) -> None:
        self._replaced = list(replaced)

    def let_go(self) -> None:
        """Puts back what was there; may be called twice."""
        for replacement in reversed(self._replaced):
            replacement.undo()
        self._replaced.clear()

    @override
    def on_exception(self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException) -> None:
        self._leave(trainer)

    @override
    def teardown(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        self._leave(trainer)

    def _leave(self, trainer: "Trainer") -> None:
        self.let_go()
        set_callbacks(trainer, [callback for callback in callbacks(trainer) if callback is not self])
