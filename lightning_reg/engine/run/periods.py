"""Periods of a fit, as techniques declare them: some weights rest, or a loss is alone."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal

from torch import nn
from typing_extensions import override

from lightning_reg.engine.host.arguments import check_choice, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.modules import BatchNorm
from lightning_reg.engine.host.names import Patterns, as_patterns, matches, near_names, plain_name, unmatched

__all__ = ["Period"]


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
        trained: The same, of what is trained while all other weights are frozen, with those that other techniques train
            of their own; in place of ``frozen``.

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
        check_number(self, "end", self.end, low=self.start, high=high, low_open=True, integer=whole, optional=True)
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
