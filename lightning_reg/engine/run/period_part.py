"""The part that keeps periods: for a time some weights rest, or the loss is a technique's own alone, or the user's."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from math import inf, isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS
from typing_extensions import override

from lightning_reg.engine.host import distributed
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.run.part import Part
from lightning_reg.engine.weights.strategies import check_editable

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

    from lightning_reg.engine.run.periods import Period
    from lightning_reg.engine.run.phases import Member
    from lightning_reg.engine.step import Step

__all__ = ["PeriodPart", "resting"]


class PeriodPart(Part):
    """Periods that techniques have declared.

    What holds is read off the place in the fit when a step begins, and put back when it is over: so a resumed run goes
    on as it would have, at a border as well, and a callback that freezes or unfreezes by itself is never overwritten.

    Args:
        trainer: The Trainer.
        module: The user's module.
        techniques: All of the fit, in order.

    """

    def __init__(self, trainer: "Trainer", module: "LightningModule", techniques: "Sequence[Member]") -> None:
        self._trainer, self._module, self._techniques = trainer, module, techniques
        self._chosen: list[tuple[Member, Period, list[nn.Parameter], list[nn.Module]]] = []
        self._length = inf
        self._holding: list[tuple[Member, Period]] = []
        self._frozen: list[nn.Parameter] = []
        self._trained: list[nn.Parameter] = []  # one of them, or none
        self._thaw: list[nn.Parameter] = []
        self._norms: list[nn.Module] = []
        self._wake: list[nn.Module] = []

    @override
    def prepare(self) -> None:
        for technique in self._techniques:
            for period in technique.periods:
                self._chosen.append((technique, period, *period.chosen(self._module, type(technique).__name__)))
                if period.freezes:
                    check_editable(technique, self._trainer, "freezes")

    @override
    def start(self) -> None:
        freezing = [type(technique).__name__ for technique, period, *_ in self._chosen if period.freezes]
        if freezing and any(isinstance(optimizer, LBFGS) for optimizer in self._trainer.optimizers):
            raise MisconfigurationException(
                f"{freezing[0]} freezes weights for a time, and LBFGS moves all of them by what it remembers. Choose"
                " another optimizer."
            )
        sharing = [type(technique).__name__ for technique, period, *_ in self._chosen if period.unit == "share"]
        if sharing:
            self._length = self._trainer.estimated_stepping_batches
            if not isfinite(self._length) or self._length < 0:
                raise MisconfigurationException(
                    f"{sharing[0]} has periods in shares of the training, whose length is not known. Give the Trainer"
                    " `max_steps`, or count them in steps or epochs."
                )

    @override
    def begin_step(self) -> None:
        self.rest()
        at = {"epochs": self._trainer.current_epoch, "steps": self._steps_so_far()}
        at["share"] = at["steps"] if isfinite(self._length) else -1
        self._holding = []
        frozen: dict[int, nn.Parameter] = {}
        for technique, period, parameters, layers in self._chosen:
            begin, end = period.borders(self._length if isfinite(self._length) else 0.0)
            if begin <= at[period.unit] < end:
                self._holding.append((technique, period))
                frozen |= {id(p): p for p in parameters}
                self._norms += layers
        self._frozen = list(frozen.values())

    @override
    def before_network(self) -> None:
        # Not when the step begins: a second network takes over then what the user has set, and periods are not its own.
        for layer in self._norms:
            if layer.training:
                layer.training = False
                self._wake.append(layer)
        if self._may_switch_off({id(p) for p in self._frozen}):
            thaw = [p for p in self._frozen if p.requires_grad]
            self._thaw += thaw
            for parameter in thaw:
                parameter.requires_grad = False

    def _may_switch_off(self, frozen: Collection[int]) -> bool:
        """Whether gradients need not be computed: where nobody waits for them, and some are left for the loss."""
        if not frozen:
            return False
        if distributed.world_size() > 1 or host.reaches_step_through_call(self._trainer, self._module):
            return False
        # The one that was found last, first: to look at all of them takes long where few are trained.
        candidates = chain(self._trained, self._module.parameters())
        self._trained = list(islice((p for p in candidates if p.requires_grad and id(p) not in frozen), 1))
        return bool(self._trained)

    def _steps_so_far(self) -> int:
        if self._module.automatic_optimization:
            return self._trainer.global_step
        return host.batches_so_far(self._trainer) - 1  # Lightning's count is of the steps of all optimizers

    @override
    @contextmanager
    def around(self, step: "Step") -> Iterator[None]:
        active = [(technique, period.loss) for technique, period in self._holding if technique in step.active]
        step.resting = [technique for technique, loss in active if loss == "user"]
        # Where all but a few weights are frozen, so are those that other techniques train beside the module.
        freezing = [technique for technique, period in self._holding if period.trained is not None]
        step.frozen_own = [t for t in self._techniques if any(t is not technique for technique in freezing)]
        alone = [technique for technique, loss in active if loss == "own"]
        if alone:
            step.alone = True
            step.resting = [technique for technique in self._techniques if technique is not alone[0]]
        yield

    @override
    def after_closure(self) -> None:
        self._drop_gradients()  # before the scaler of half precision looks at them

    @override
    def gradients_are_final(self, optimizer: "Optimizer") -> None:
        self._drop_gradients()  # of penalties, and of others' hooks

    def _drop_gradients(self) -> None:
        for parameter in self._frozen:
            parameter.grad = None

    @override
    def rest(self) -> None:
        for parameter in self._thaw:
            parameter.requires_grad = True
        for layer in self._wake:
            layer.training = True
        self._frozen, self._norms, self._thaw, self._wake = [], [], [], []

    @override
    def close(self) -> None:
        self.rest()
        self._trained = []


class _Rests(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return torch.zeros_like(loss)

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.zeros_like(gradients[0])


def resting(loss: Tensor) -> Tensor:
    """A loss that counts 0 and gives gradients of 0, which DDP waits for."""
    rests: Tensor = _Rests.apply(loss)  # type: ignore[no-untyped-call]  # torch's
    return rests
