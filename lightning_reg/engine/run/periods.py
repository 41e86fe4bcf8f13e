"""Periods of a fit: for a time some weights rest, or the loss is a technique's own alone, or the user's."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, isfinite
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import LBFGS
from typing_extensions import override

from lightning_reg.engine.host import distributed
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_choice, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.modules import BatchNorm
from lightning_reg.engine.host.names import Patterns, as_patterns, matches, near_names, plain_name, unmatched
from lightning_reg.engine.run.part import Part
from lightning_reg.engine.weights.strategies import check_editable

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

    from lightning_reg.engine.run.phases import Member
    from lightning_reg.engine.step import Step

__all__ = ["Period", "PeriodPart", "resting"]


@dataclass(frozen=True)
class Period:
    """A part of a fit in which a technique says what is trained, and by which loss.

    Weights that are frozen do not move: neither by gradients, those of penalties included, nor by momentum or weight
    decay; what the optimizer knows of them stays, and they count in no clipping. Batch norm that has nothing to train
    then is in evaluation mode. Between two steps everything is as the user and other callbacks have it.

    Args:
        start: Where it begins, at least 0.
        end: Where it ends, that place excluded, above ``start``. ``None``: with the fit.
        unit: What they count: ``"epochs"`` or optimizer ``"steps"`` since the start of training (under manual
            optimization batches), or the ``"share"`` of the training's optimizer steps, in [0, 1], rounded to steps.
        loss: ``"all"``. ``"own"``: the technique's ``step_term`` alone, in the steps in which it is active; the
            user's loss has gradients of 0 (so weights that nothing else trains have them, under any strategy, and are
            moved by momentum and weight decay unless they are frozen), and what other techniques make of it rests with
            what they train of their own. Penalties, which are no part of the loss, act on. ``"user"``: what the
            technique makes of the loss rests, and what it trains of its own.
        frozen: Shell patterns of names: of a weight, of its layer, or of a module around that.
        trained: The same, of what is trained while all other weights are frozen; in place of ``frozen``.

    Raises:
        ValueError: If an argument is outside its range, or the period changes nothing.

    """

    start: float = 0
    end: float | None = None
    unit: Literal["epochs", "steps", "share"] = "epochs"
    loss: Literal["all", "own", "user"] = "all"
    frozen: str | Sequence[str] = ()
    trained: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        check_choice(self, "unit", self.unit, ("epochs", "steps", "share"))
        check_choice(self, "loss", self.loss, ("all", "own", "user"))
        whole, high = self.unit != "share", 1.0 if self.unit == "share" else inf
        check_number(self, "start", self.start, low=0, high=high, integer=whole)
        if self.end is not None:
            check_number(self, "end", self.end, low=self.start, high=high, low_open=True, integer=whole)
        if self.trained is not None and self.frozen:
            raise ValueError(f"Period: `trained` must be None where `frozen` is given, got {self.trained!r}.")
        if self.loss == "all" and not self.freezes:
            raise ValueError('Period: `loss` must be "own" or "user" where nothing is frozen, got "all".')

    @property
    def freezes(self) -> bool:
        """Whether it freezes weights."""
        return bool(self.frozen) or self.trained is not None

    def meets(self, other: "Period") -> bool:
        """Whether the two may hold at the same time; ``True`` as well where they count differently."""
        ends = [inf if period.end is None else period.end for period in (self, other)]
        return self.unit != other.unit or (self.start < ends[1] and other.start < ends[0])

    def borders(self, length: float) -> tuple[float, float]:
        """Where it begins and ends, in epochs or steps.

        Args:
            length: Optimizer steps of the training.

        Returns:
            First place within it, and first behind it.

        """
        factor = length if self.unit == "share" else 1.0
        return round(self.start * factor), inf if self.end is None else round(self.end * factor)

    def chosen(self, module: nn.Module, owner: str = "Period") -> tuple[list[nn.Parameter], list[nn.Module]]:
        """What it freezes.

        Args:
            module: The user's module.
            owner: Class to name in errors.

        Returns:
            Parameters, and layers of batch norm with nothing left to train.

        Raises:
            MisconfigurationException: If a pattern matches nothing.

        """
        if not self.freezes:
            return [], []
        patterns: Patterns = self.frozen or self.trained
        named = [(plain_name(name), p) for name, p in module.named_parameters(remove_duplicate=False)]
        layers = [(plain_name(f"{name}.")[:-1], layer) for name, layer in module.named_modules() if name]
        strange = unmatched(patterns, [name for name, _ in (*named, *layers)])
        if strange:
            near = near_names(strange[0], [name for name, _ in named])
            raise MisconfigurationException(
                f"{owner}: a period names {strange[0]!r}, which is no weight or layer of {type(module).__name__}."
                f" Names near it: {near}."
            )
        meant = {id(p) for name, p in named if _is_meant(name, patterns)}  # one of the names of a weight is enough
        frozen = {id(p): p for _, p in named if (id(p) in meant) is (self.trained is None)}
        norms = [(name, layer) for name, layer in layers if isinstance(layer, BatchNorm)]
        return list(frozen.values()), [layer for name, layer in norms if self._rests(name, layer, frozen)]

    def _rests(self, name: str, layer: nn.Module, frozen: Collection[int]) -> bool:
        own = list(layer.parameters(recurse=False))
        if own:
            return all(id(p) in frozen for p in own)
        return _is_meant(name, self.frozen or self.trained) is (self.trained is None)

    @override
    def __str__(self) -> str:
        unit = {"epochs": "epoch", "steps": "step", "share": "share"}[self.unit]
        said = [f"{self.loss} loss alone"] if self.loss == "own" else []
        said += ["without its loss"] if self.loss == "user" else []
        said += [f"frozen {', '.join(as_patterns(self.frozen))}"] if self.frozen else []
        said += [f"trained {', '.join(as_patterns(self.trained)) or 'nothing'}"] if self.trained is not None else []
        return f"{unit} {self.start:g} to {'the end' if self.end is None else f'{self.end:g}'}: {', '.join(said)}"


def _is_meant(name: str, patterns: Patterns) -> bool:
    parts = name.split(".")
    return any(matches(".".join(parts[:length]), patterns) for length in range(1, len(parts) + 1))


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
        self._thaw: list[nn.Parameter] = []
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
                self._wake += [layer for layer in layers if layer.training and layer not in self._wake]
        self._frozen = list(frozen.values())
        for layer in self._wake:
            layer.training = False
        if self._may_switch_off(frozen):
            self._thaw = [p for p in self._frozen if p.requires_grad]
            for parameter in self._thaw:
                parameter.requires_grad = False

    def _may_switch_off(self, frozen: Collection[int]) -> bool:
        """Whether gradients need not be computed: where nobody waits for them, and some are left for the loss."""
        if not frozen:
            return False
        trained = any(p.requires_grad and id(p) not in frozen for p in self._module.parameters())
        alone = distributed.world_size() == 1 and not host.reaches_step_through_call(self._trainer, self._module)
        return trained and alone

    def _steps_so_far(self) -> int:
        if self._module.automatic_optimization:
            return self._trainer.global_step
        return host.batches_so_far(self._trainer) - 1  # Lightning's count is of the steps of all optimizers

    @override
    @contextmanager
    def around(self, step: "Step") -> Iterator[None]:
        active = [(technique, period.loss) for technique, period in self._holding if technique in step.active]
        step.resting = [technique for technique, loss in active if loss == "user"]
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
        self._frozen, self._thaw, self._wake = [], [], []

    @override
    def close(self) -> None:
        self.rest()


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
