"""Weights gathered while training runs: running averages, and snapshots in host memory or on disk."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.averaging._checkpoint_files import open_checkpoint
from lightning_reg.averaging._written_files import save_weights
from lightning_reg.averaging.model_soups._live_weights import Layouts, Weights, own_parts
from lightning_reg.averaging.model_soups.core import average_state_dicts
from lightning_reg.engine.host.left_out import LeftOut
from lightning_reg.engine.weights.finite import all_finite, chosen_if

__all__ = ["Gathered", "Ingredient", "MovingAverage", "RunningMean", "Shelf", "Snapshots"]


@dataclass
class Ingredient:
    """What was snapshot when.

    Args:
        name: Its name.
        step: Optimizer steps before it, as Lightning counts them.
        score: Of the validation on exactly these weights; ``None`` if there was none yet.
        share: How much it counts in a mean.

    """

    name: str
    step: int
    score: float | None = None
    share: float = 1.0


def are_finite(weights: Weights) -> Tensor:
    """Whether weights are finite; a boolean scalar on their device."""
    return all_finite(_judged(weights))


def _judged(weights: Weights) -> list[Tensor]:
    """Without the statistics of batch norm: one batch may spoil them for good, but the end estimates them anew."""
    return [weight for name, weight in weights.items() if not name.endswith(("running_mean", "running_var"))]


def _new_left_out(what: str) -> LeftOut:
    return LeftOut("SoupAverager", f"{what} of the weights")


class _Fused:
    """A running average whose updates are fused over the tensors.

    Weights that are not finite leave it as it is.

    Attributes:
        left_out: How many of them there were.

    """

    def __init__(self, what: str) -> None:
        self.left_out = _new_left_out(what)
        self.ingredients: list[Ingredient] = []
        self._offered = 0
        self._lists: _Lists | None = None

    @property
    def on_host(self) -> bool:
        """Whether it is in host memory: then weights that are not finite are not to be given to it."""
        return False

    @property
    def taken(self) -> int:
        """How many are in it; costs a host sync where it is not in host memory."""
        return self._offered - (0 if self.on_host else self.left_out.read())

    def counts(self, device: torch.device) -> dict[str, Tensor]:
        """For the log, without a host sync: how many are in it, and how many were left out."""
        left_out = self.left_out.scalar(device)
        taken = torch.full_like(left_out, self._offered) if self.on_host else self._offered - left_out
        return {"ingredients": taken, "not_finite": left_out}

    def _begin(self, weights: Weights) -> bool:
        """Counts the first weights, and says whether they can be taken: a host sync, in the first update alone."""
        begins = bool(are_finite(weights))
        self._count(torch.tensor(begins))
        return begins

    def _count(self, finite: Tensor) -> None:
        self._offered += 1
        self.left_out.add(~finite)

    def _load_counts(self, taken: int, left_out: int) -> None:
        self.left_out.restore(left_out)
        self._offered = taken + (0 if self.on_host else left_out)

    @property
    def names(self) -> list[str]:
        """What was taken in, where that has names."""
        return [ingredient.name for ingredient in self.ingredients]

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lists": None}

    def let_go(self) -> None:
        """Holds on to nothing of the module."""
        self._lists = None


class MovingAverage(_Fused):
    """Exponential moving average in float32 (float64 where the weights are), beside the weights; one fused update.

    Memory: one copy of the weights.
    """

    def __init__(self, decay: float, warmup_steps: int) -> None:
        super().__init__("updates")
        self.decay, self.warmup_steps = decay, warmup_steps
        self._warm_until = warmup_steps
        self._average: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, ingredient: Ingredient, weights: Weights, *, write: bool = True) -> None:
        """Takes the present weights in."""
        if not self._average:
            if self._begin(weights):
                self._average = {name: _widened(w.detach(), torch.float32) for name, w in weights.items()}
            return
        lists = self._lists = _lists(self._lists, self._average, weights)
        finite = all_finite(lists.judged)
        values = chosen_if(finite, lists.values(), lists.own)
        if self._is_warming():
            # As `ema_decay`, but how many updates were made is known on the device alone.
            made = self._offered - self.left_out.scalar(finite.device)
            share = (1.0 / (made + 1.0)).clamp(min=1.0 - self.decay)
            torch._foreach_lerp_(lists.own, values, [share.to(own.device, own.dtype) for own in lists.own])
        else:
            torch._foreach_lerp_(lists.own, values, 1.0 - self.decay)
        self._count(finite)

    def _is_warming(self) -> bool:
        if 0 < self._warm_until <= self._offered:  # asked once, when the warm-up may be over
            until = self.warmup_steps + self.left_out.read()
            self._warm_until = until if self._offered < until else 0
        return self._warm_until > 0

    def average(self) -> dict[str, Tensor]:
        """The average itself, not a copy."""
        return self._average

    def state(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {"count": self.taken, "average": self._average}

    def load(self, state: Mapping[str, Any], left_out: int = 0) -> None:
        """Takes over a state, and how many were left out."""
        self._lists, self._warm_until = None, self.warmup_steps
        self._load_counts(state["count"], left_out)
        self._average = {name: t.clone() for name, t in state["average"].items()}

    def follow(self, live: Weights, layouts: Layouts) -> None:
        """Moves to the device of the weights, and keeps of whole tensors from a checkpoint this process's shards."""
        self._lists = None
        own = own_parts(self._average, layouts)
        self._average = {name: t.to(live[name].device) for name, t in own.items()}


class RunningMean(_Fused):
    """Sum in float64, divided when the mean is asked for; one with names takes each by its share.

    Memory: two copies of float32 weights, on the CPU if ``on_cpu``.

    Args:
        on_cpu: Whether the sum is kept in host memory.
        with_names: Whether to note what was taken in.
        left_out: Of a sum that it replaces.

    """

    def __init__(self, *, on_cpu: bool, with_names: bool, left_out: LeftOut | None = None) -> None:
        super().__init__("snapshots" if on_cpu else "updates")
        self.left_out = left_out or self.left_out
        self.on_cpu, self.with_names = on_cpu, with_names
        self._sums: dict[str, Tensor] = {}

    @property
    @override
    def on_host(self) -> bool:
        return self.on_cpu

    @torch.no_grad()
    def take(self, ingredient: Ingredient, weights: Weights, *, write: bool = True) -> None:
        """Takes the present weights in."""
        if not self._sums:
            if not (self.on_cpu or self._begin(weights)):
                return
            values = [w.detach().cpu() if self.on_cpu else w.detach() for w in weights.values()]
            # Apple's GPUs know no float64.
            least = torch.float32 if values[0].device.type == "mps" else torch.float64
            self._sums = {name: _widened(value, least) for name, value in zip(weights, values, strict=True)}
            if ingredient.share != 1:
                torch._foreach_mul_(list(self._sums.values()), ingredient.share)
        else:
            lists = self._lists = _lists(self._lists, self._sums, weights)
            if self.on_cpu:
                torch._foreach_add_(lists.own, [w.cpu() for w in lists.theirs], alpha=ingredient.share)
            else:
                finite = all_finite(lists.judged)
                torch._foreach_add_(lists.own, chosen_if(finite, lists.theirs))
                self._count(finite)
        self._offered += self.on_cpu
        if self.with_names:
            self.ingredients.append(ingredient)

    def average(self, more: Weights | None = None) -> dict[str, Tensor]:
        """The mean, of one more if there is one, which is not taken in; new tensors."""
        if more is None:
            mass = sum(i.share for i in self.ingredients) if self.with_names else self.taken
            return {name: total / mass for name, total in self._sums.items()}
        return {name: (total + more[name].detach().to(total)) / (self.taken + 1) for name, total in self._sums.items()}

    def state(self) -> dict[str, Any]:
        """Tensors and plain values."""
        names = [asdict(ingredient) for ingredient in self.ingredients]
        return {"count": self.taken, "sums": self._sums, "ingredients": names}

    def load(self, state: Mapping[str, Any], left_out: int = 0) -> None:
        """Takes over a state, and how many were left out."""
        self._lists = None
        self._load_counts(state["count"], left_out)
        self._sums = {name: t.clone() for name, t in state["sums"].items()}
        self.ingredients = [Ingredient(**ingredient) for ingredient in state["ingredients"]]

    def follow(self, live: Weights, layouts: Layouts) -> None:
        """Moves to the device of the weights, unless it stays on the CPU; keeps this process's shards."""
        self._lists = None
        self._sums = own_parts(self._sums, layouts)
        if not self.on_cpu:
            self._sums = {name: t.to(live[name].device) for name, t in self._sums.items()}


def _widened(value: Tensor, least: torch.dtype) -> Tensor:
    """A copy in a type that holds its numbers and those of ``least``; complex ones stay complex."""
    return value.to(torch.promote_types(value.dtype, least), copy=True)


@dataclass
class _Lists:
    """The lists for the fused update, made once: a loop over the tensors in each step would cost more than it."""

    of: Weights
    own: list[Tensor]
    theirs: list[Tensor]
    judged: list[Tensor]
    widen: bool

    def values(self) -> list[Tensor]:
        """The weights, in the average's type."""
        if not self.widen:
            return self.theirs
        return [w.to(a.dtype) for a, w in zip(self.own, self.theirs, strict=True)]


def _lists(known: _Lists | None, own: Weights, weights: Weights) -> _Lists:
    if known is not None and known.of is weights:
        return known
    theirs = [weights[name] for name in own]  # not detached: validation exchanges what lies behind them
    widen = any(a.dtype is not w.dtype for a, w in zip(own.values(), theirs, strict=True))
    return _Lists(weights, list(own.values()), theirs, _judged(weights), widen)


class Snapshots(Sequence[dict[str, Tensor]]):
    """Snapshots one by one, in the order of their names in :attr:`ingredients`."""

    ingredients: list[Ingredient]

    @property
    def taken(self) -> int:
        """How many there are."""
        return len(self.ingredients)

    @property
    def names(self) -> list[str]:
        """Their names."""
        return [ingredient.name for ingredient in self.ingredients]

    @override
    def __len__(self) -> int:
        return len(self.ingredients)

    def average(self) -> dict[str, Tensor]:
        """The mean of all."""
        return average_state_dicts(list(self))  # each is asked for once: that may read a file


class Shelf(Snapshots):
    """Snapshots, in the order of :attr:`ingredients`, in host memory or as safetensors files in a folder.

    Of the files beyond ``last_k`` those stay that one of the last two checkpoints names, so that a run which is killed
    can go on from the last whole one.

    Args:
        folder: Where the files go, ``None`` to keep the snapshots in memory.
        last_k: How many of the latest to keep; ``None`` for all.
        keep_files: Whether no file is ever removed.

    """

    on_host = True  # weights that are not finite are not to be given to it

    def __init__(self, folder: Path | None, last_k: int | None, *, keep_files: bool = False) -> None:
        self.folder, self.last_k, self.keep_files = folder, last_k, keep_files
        self.left_out = _new_left_out("snapshots")
        self.ingredients: list[Ingredient] = []
        self._kept: list[dict[str, Tensor]] = []
        self._beyond: set[str] = set()  # names of files that only checkpoints need
        self._in_checkpoints: list[set[str]] = []

    @override
    def __getitem__(self, position: Any) -> Any:
        if self.folder is None:
            return self._kept[position]
        return open_checkpoint(self._path(self.ingredients[position].name)).load()

    def take(self, ingredient: Ingredient, weights: Weights, *, write: bool = True) -> None:
        """Takes a snapshot; on disk only the rank that is told to writes."""
        if self.folder is None:
            self._kept.append({name: w.detach().to("cpu", copy=True) for name, w in weights.items()})
        elif write:
            copied = {name: w.detach().cpu() for name, w in weights.items()}
            save_weights(self._path(ingredient.name), copied, {"holds": f"snapshot {ingredient.name}"})
        self.ingredients.append(ingredient)
        while self.last_k is not None and len(self.ingredients) > self.last_k:
            self._beyond.add(self.ingredients.pop(0).name)
            if self.folder is None:
                self._kept.pop(0)
        self._remove_beyond(write=write)

    def note_checkpoint(self, *, write: bool) -> None:
        """To be told of each checkpoint before it is written: the one before is whole then."""
        self._in_checkpoints = [*self._in_checkpoints[-1:], set(self.names)]
        self._remove_beyond(write=write)

    def _remove_beyond(self, *, write: bool) -> None:
        removed = self._beyond.difference(*self._in_checkpoints)
        self._beyond -= removed
        if self.folder is not None and write and not self.keep_files:
            for name in removed:
                self._path(name).unlink(missing_ok=True)

    def counts(self, device: torch.device) -> dict[str, Tensor]:
        """For the log: how many there are, and how many were left out."""
        taken = torch.tensor(float(self.taken), device=device)
        return {"ingredients": taken, "not_finite": self.left_out.scalar(device)}

    def follow(self, live: Weights, layouts: Layouts) -> None:
        """Snapshots stay where they are, of whole tensors this process's shards."""
        self._kept = [own_parts(kept, layouts) for kept in self._kept]

    def let_go(self) -> None:
        """Holds on to nothing of the module."""

    def clean_up(self) -> None:
        """Removes the files, unless they are to be kept."""
        if self.folder is not None and not self.keep_files:
            shutil.rmtree(self.folder, ignore_errors=True)

    def state(self) -> dict[str, Any]:
        """Tensors and plain values; of files their folder."""
        return {
            "folder": None if self.folder is None else str(self.folder),
            "ingredients": [asdict(ingredient) for ingredient in self.ingredients],
            "weights": list(self._kept),
        }

    def load(self, state: Mapping[str, Any], left_out: int = 0) -> None:
        """Takes over a state, and how many were left out.

        Raises:
            FileNotFoundError: If files are missing.

        """
        self.folder = None if state["folder"] is None else Path(state["folder"])
        self.ingredients = [Ingredient(**ingredient) for ingredient in state["ingredients"]]
        self.left_out.restore(left_out)
        self._kept = [dict(weights) for weights in state["weights"]]
        self._beyond, self._in_checkpoints = set(), [set(self.names)]
        missing = [] if self.folder is None else [name for name in self.names if not self._path(name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"SoupAverager: the checkpoint's ingredients {missing} are not in {self.folder} any more. A fit"
                " removes them when it ends, and before that those beyond `last_k` that neither of its last two"
                ' checkpoints names. A fit with `keep_files=True` leaves all; with `keep="cpu"` they are in the'
                " checkpoints."
            )

    def _path(self, name: str) -> Path:
        return (self.folder or Path()) / f"{name}.safetensors"


Gathered = MovingAverage | RunningMean | Shelf
