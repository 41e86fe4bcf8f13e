"""The part of weights that are trained through a map."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.modules import BatchNorm
from lightning_reg.engine.run.part import Part
from lightning_reg.engine.run.phases import ThroughMap
from lightning_reg.engine.weights.maps import WeightMaps, check_mappable

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["MapPart"]


class MapPart(Part):
    """Weights that are trained through a map.

    Args:
        trainer: The Trainer.
        module: The user's module.
        techniques: Those that take part.
        seen_by: Who else acts on weights or their gradients, a class's name; "" for nobody.

    """

    prepares_first = True  # weights whose gradient is pulled back at once need one again

    def __init__(
        self, trainer: "Trainer", module: "LightningModule", techniques: Sequence[ThroughMap], seen_by: str
    ) -> None:
        self._trainer, self._module, self._techniques, self._seen_by = trainer, module, techniques, seen_by
        self._changing = [
            t for t in techniques if type(t).change_part_gradients is not ThroughMap.change_part_gradients
        ]
        self._maps = WeightMaps(module, ())
        self._making: list[host.Replacement] = []
        self._norms: list[BatchNorm] = []
        self._wake: list[BatchNorm] = []

    @override
    def prepare_model(self) -> None:
        check_mappable(self._techniques[0], self._trainer)
        self._maps = WeightMaps(self._module, self._techniques, self._seen_by)
        self._maps.freeze(needs_one="DDP" in type(self._trainer.strategy).__name__)
        strategy = self._trainer.strategy
        self._making = [host.Replacement(strategy, "setup_optimizers", self._setup_optimizers)]

    def _setup_optimizers(self, trainer: "Trainer") -> None:
        # `configure_optimizers` often takes what needs a gradient: it is to find what it would without us.
        with self._maps.unfrozen():
            self._making[0].original(trainer)

    @override
    def prepare(self) -> None:
        self._maps.attach()
        self._norms = [layer for t in self._techniques if t.norms_rest for layer in self._maps.frozen_norms()]

    def own_writes(self) -> AbstractContextManager[None]:
        """What is written meanwhile is no news."""
        return self._maps.own_writes()

    @override
    def begin_step(self) -> None:
        self._maps.begin(self._trainer.optimizers, fresh=host.batches_so_far(self._trainer) <= 1)

    @override
    def before_network(self) -> None:
        self._maps.show(shown=True)
        # As periods do: a second network takes over before what the user has set.
        self._wake += [layer for layer in self._norms if layer.training]
        for layer in self._wake:
            layer.training = False

    @override
    def rest(self) -> None:
        self._maps.show(shown=False)
        for layer in self._wake:
            layer.training = True
        self._wake = []

    @override
    def after_closure(self) -> None:
        self._maps.average_gradients()

    @override
    def gradients_are_final(self, optimizer: Any) -> None:
        self._maps.open(optimizer, check=host.is_logging_step(self._trainer))
        if self._changing:
            self._maps.change_part_gradients(host.gradient_scale(self._trainer, optimizer))

    @override
    @contextmanager
    def around_optimizer(self, optimizer: Any) -> Iterator[None]:
        self.begin_step()
        with self._maps.stepping(optimizer):
            yield

    @override
    def before_closure(self) -> None:
        self._maps.before_evaluation()

    @override
    def close(self) -> None:
        self.rest()
        for replaced in self._making:
            replaced.undo()
        self._making = []
        self._maps.close()
