"""An average of the weights whose momentum follows the epochs."""

from torch import nn
from typing_extensions import override

from lightning_reg.dropout.gtrs.core import teacher_momentum
from lightning_reg.engine.networks.moving import AverageReference

__all__ = ["EpochAverage"]


class EpochAverage(AverageReference):
    """A moving average that keeps more of itself in later epochs.

    Args:
        start: Momentum of the first epoch.
        end: Momentum from epoch ``epochs`` on.
        epochs: Epochs until then.
        copy_epochs: Epochs before these, in which it is a copy of the network.

    """

    def __init__(self, start: float, end: float, epochs: int, copy_epochs: int) -> None:
        super().__init__(start)
        self.by_epoch = start, end, epochs, copy_epochs
        self.epoch = 0

    @override
    def describe(self) -> str:
        start, end, epochs, copy_epochs = self.by_epoch
        first = f"a copy for {copy_epochs} epochs, then " if copy_epochs else ""
        return f"{first}average of momentum {start:g} to {end:g} in {epochs} epochs"

    @override
    def decay_at(self, count: int) -> float:
        return teacher_momentum(self.epoch, *self.by_epoch)

    def clear(self) -> None:
        """Another training begins."""
        self.weights, self.count = None, 0

    @property
    @override
    def written_by(self) -> object:
        return self.by_epoch, self.count

    @override
    def after_step(self, module: nn.Module) -> None:
        self.epoch = int(module.current_epoch)  # type: ignore[arg-type]  # a LightningModule's
        super().after_step(module)
