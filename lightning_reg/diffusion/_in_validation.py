"""Callbacks that try a denoiser once in a validation."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_number
from lightning_reg.engine.host.generators import isolated_randomness
from lightning_reg.engine.technique import Technique

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["TriedInValidation"]


class TriedInValidation(Technique, ABC):
    """Does its work behind the first batch, with the weights that validation runs with, and logs numbers of it.

    At the epoch's end, callbacks that average weights have taken them out again.

    Args:
        every_n_epochs: Of a fit, in which it works after every n-th epoch.
        name: Tells several instances in one Trainer apart.
        seed: Of its draws.

    """

    done: ClassVar[str]  # what a fit without it is told of: nothing was ... in it

    def __init__(self, every_n_epochs: int, name: str | None, seed: int) -> None:
        super().__init__(name=name, seed=seed)
        check_number(self, "every_n_epochs", every_n_epochs, low=1, integer=True)
        self.every_n_epochs = every_n_epochs
        self._scalars: dict[str, float] = {}
        self._has_worked = False

    @property
    @abstractmethod
    def works(self) -> bool:
        """Whether there is anything to do, by its arguments."""

    @abstractmethod
    def work(self, trainer: "Trainer", module: "LightningModule") -> dict[str, float]:
        """Does it, on all ranks alike; random states are put back.

        Returns:
            What is logged, by name; the mean over ranks.

        """

    def counts(self, trainer: "Trainer") -> bool:
        """Whether it works in this validation: in one outside of a fit always."""
        return trainer.state.fn != "fit" or (trainer.current_epoch + 1) % self.every_n_epochs == 0

    @override
    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._has_worked = False

    @override
    def on_fit_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        if self.works and not self._has_worked and trainer.limit_val_batches != 0:  # 0: switched off on purpose
            host.rank_zero_warn(
                f"{type(self).__name__}: nothing was {self.done} in this fit, in which no validation ended an epoch"
                f" that `every_n_epochs`={self.every_n_epochs} counts. Give the fit validation data, or lower it."
            )

    @override
    def on_validation_batch_end(
        self,
        trainer: "Trainer",
        pl_module: "LightningModule",
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx or dataloader_idx or trainer.sanity_checking or not self.works or not self.counts(trainer):
            return
        with isolated_randomness():
            self._scalars = self.work(trainer, pl_module)
        self._has_worked = True

    @override
    def on_validation_epoch_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        for name, value in self._scalars.items():
            pl_module.log(f"{self.log_key}/{name}", value, on_step=False, on_epoch=True, sync_dist=True)
        self._scalars = {}
