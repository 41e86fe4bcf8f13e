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
from lightning_reg.averaging.model_soups.core import average_state_dicts, ema_decay

__all__ = ["Gathered", "Ingredient", "MovingAverage", "RunningMean", "Shelf", "Snapshots"]


@dataclass
class Ingredient:
    """What was snapshot when.

    Args:
        name: Its name.
        step: Optimizer steps before it, as Lightning counts them.
        score: Of the validation on exactly these weights; ``None`` if there was none yet.

    """

    name: str
    step: int
    score: float | None = None


class _Fused:
    """A running average whose updates are fused over the tensors."""

    def __init__(self) -> None:
        self.taken = 0
        self.ingredients: list[Ingredient] = []
        self._lists: _Lists | None = None

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
        super().__init__()
        self.decay, self.warmup_steps = decay, warmup_steps
        self._average: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, ingredient: Ingredient, weights: Weights, *, write: bool = True) -> None:
        """Takes the present weights in."""
        if not self._average:
            self._average = {name: _widened(w.detach(), torch.float32) for name, w in weights.items()}
        else:
            lists = self._lists = _lists(self._lists, self._average, weights)
            weight = 1.0 - ema_decay(self.taken, self.decay, self.warmup_steps)
            torch._foreach_lerp_(lists.own, lists.values(), weight)
        self.taken += 1

    def average(self) -> dict[str, Tensor]:
        """The average itself, not a copy."""
        return self._average

    def state(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {"count": self.taken, "average": self._average}

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes over a state."""
        self._lists = None
        self.taken, self._average = state["count"], {name: t.clone() for name, t in state["average"].items()}

    def follow(self, live: Weights, layouts: Layouts) -> None:
        """Moves to the device of the weights, and keeps of whole tensors from a checkpoint this process's shards."""
        self._lists = None
        own = own_parts(self._average, layouts)
        self._average = {name: t.to(live[name].device) for name, t in own.items()}


class RunningMean(_Fused):
    """Sum in float64, divided when the mean is asked for.

    Memory: two copies of float32 weights, on the CPU if ``on_cpu``.

    Args:
        on_cpu: Whether the sum is kept in host memory.
        with_names: Whether to note what was taken in.

    """

    def __init__(self, *, on_cpu: bool, with_names: bool) -> None:
        super().__init__()
        self.on_cpu, self.with_names = on_cpu, with_names
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, ingredient: Ingredient, weights: Weights, *, write: bool = True) -> None:
        """Takes the present weights in."""
        if not self._sums:
            values = [w.detach().cpu() if self.on_cpu else w.detach() for w in weights.values()]
            # Apple's GPUs know no float64.
            self._sums = {
                name: value.to(torch.float32 if value.device.type == "mps" else torch.float64, copy=True)
                for name, value in zip(weights, values, strict=True)
            }
        else:
            lists = self._lists = _lists(self._lists, self._sums, weights)
            torch._foreach_add_(lists.own, [w.cpu() for w in lists.theirs] if self.on_cpu else lists.theirs)
        self.taken += 1
        if self.with_names:
            self.ingredients.append(ingredient)

    def average(self, more: Weights | None = None) -> dict[str, Tensor]:
        """The mean, of one more if there is one, which is not taken in; new tensors."""
        if more is None:
            return {name: total / self.taken for name, total in self._sums.items()}
        return {name: (total + more[name].detach().to(total)) / (self.taken + 1) for name, total in self._sums.items()}

    def state(self) -> dict[str, Any]:
        """Tensors and plain values."""
        names = [asdict(ingredient) for ingredient in self.ingredients]
        return {"count": self.taken, "sums": self._sums, "ingredients": names}

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes over a state."""
        self._lists = None
        self.taken, self._sums = state["count"], {name: t.clone() for name, t in state["sums"].items()}
        self.ingredients = [Ingredient(**ingredient) for ingredient in state["ingredients"]]

    def follow(self, live: Weights, layouts: Layouts) -> None:
        """Moves to the device of the weights, unless it stays on the CPU; keeps this process's shards."""
        self._lists = None
        self._sums = own_parts(self._sums, layouts)
        if not self.on_cpu:
            self._sums = {name: t.to(live[name].device) for name, t in self._sums.items()}


def _widened(value: Tensor, least: torch.dtype) -> Tensor:
    return value.to(torch.promote_types(value.dtype, least), copy=True)


@dataclass
class _Lists:
    """The lists for the fused update, made once: a loop over the tensors in each step would cost more than it."""

    of: Weights
    own: list[Tensor]
    theirs: list[Tensor]
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
    return _Lists(weights, list(own.values()), theirs, widen)


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

    Args:
        folder: Where the files go, ``None`` to keep the snapshots in memory.
        last_k: How many of the latest to keep; ``None`` for all.

    """

    def __init__(self, folder: Path | None, last_k: int | None) -> None:
        self.folder, self.last_k = folder, last_k
        self.ingredients: list[Ingredient] = []
        self._kept: list[dict[str, Tensor]] = []

    @override
    def __getitem__(self, position: Any) -> Any:
        if self.folder is None:
            return self._kept[position]
        return open_checkpoint(self._path(self.ingredients[position])).load()

    def take(self, ingredient: Ingredient, weights: Weights, *, write: bool = True) -> None:
        """Takes a snapshot; on disk only the rank that is told to writes."""
        if self.folder is None:
            self._kept.append({name: w.detach().to("cpu", copy=True) for name, w in weights.items()})
        elif write:
            copied = {name: w.detach().cpu() for name, w in weights.items()}
            save_weights(self._path(ingredient), copied, {"holds": f"snapshot {ingredient.name}"})
        self.ingredients.append(ingredient)
        while self.last_k is not None and len(self.ingredients) > self.last_k:
            dropped = self.ingredients.pop(0)
            if self.folder is None:
                self._kept.pop(0)
            elif write:
                self._path(dropped).unlink(missing_ok=True)

    def follow(self, live: Weights, layouts: Layouts) -> None:
        """Snapshots stay where they are, of whole tensors this process's shards."""
        self._kept = [own_parts(kept, layouts) for kept in self._kept]

    def let_go(self) -> None:
        """Holds on to nothing of the module."""

    def clean_up(self) -> None:
        """Removes the files."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def state(self) -> dict[str, Any]:
        """Tensors and plain values; of files their folder."""
        return {
            "folder": None if self.folder is None else str(self.folder),
            "ingredients": [asdict(ingredient) for ingredient in self.ingredients],
            "weights": list(self._kept),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes over a state.

        Raises:
            FileNotFoundError: If files are missing.

        """
        self.folder = None if state["folder"] is None else Path(state["folder"])
        self.ingredients = [Ingredient(**ingredient) for ingredient in state["ingredients"]]
        self._kept = [dict(weights) for weights in state["weights"]]
        missing = [] if self.folder is None else [i.name for i in self.ingredients if not self._path(i).is_file()]
        if missing:
            raise FileNotFoundError(
                f"SoupAverager: the checkpoint's ingredients {missing} are not in {self.folder} any more. A fit"
                " removes them when it ends, and those beyond `last_k` before. `keep_files=True` leaves them;"
                ' `keep="cpu"` has them in the checkpoints.'
            )

    def _path(self, ingredient: Ingredient) -> Path:
        return (self.folder or Path()) / f"{ingredient.name}.safetensors"


Gathered = MovingAverage | RunningMean | Shelf
