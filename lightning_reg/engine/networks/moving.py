"""References that move: an average of the weights, and the mean of a window of snapshots."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.engine.host.arguments import check_choice, check_number
from lightning_reg.engine.host.names import plain_name
from lightning_reg.engine.networks.peer import update_average_
from lightning_reg.engine.networks.references import Reference, ReferenceTechnique
from lightning_reg.engine.technique import GradientTechnique

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lightning_reg.engine.step import Step

__all__ = ["AverageReference", "AverageReferenceTechnique", "WindowReference"]


class AverageReference(Reference):
    r"""A moving average of the weights, which follows each optimizer step.

    .. math:: \bar\theta \leftarrow d_t\,\bar\theta + (1 - d_t)\,\theta, \qquad d_t \text{ from } d_0 \text{ to } d_T

    It starts as the weights of the first batch, is float32 whatever the module's precision is, and lies on the module's
    device. Buffers are those of the module. Weights that are not all finite leave it as it is. Techniques that ask for
    the same average share it: it moves once a step.

    Args:
        decay: d at the first optimizer step, in [0, 1].
        layers: Layers whose outputs are wanted; without any the loss call is wanted.
        end: d from step ``length`` on, in [0, 1]; ``None``: ``decay`` all along.
        length: Optimizer steps until then, at least 1 where ``end`` is given.
        shape: How d goes there: in a straight line, or by half a cosine, slow at both ends.

    Attributes:
        count: Optimizer steps that it has followed.

    """

    def __init__(
        self,
        decay: float,
        layers: Sequence[str] = (),
        *,
        end: float | None = None,
        length: int = 0,
        shape: Literal["linear", "cosine"] = "cosine",
    ) -> None:
        super().__init__(layers)
        check_number(self, "decay", decay, low=0, high=1)
        check_choice(self, "shape", shape, ("linear", "cosine"))
        check_number(self, "length", length, low=0 if end is None else 1, integer=True)
        check_number(self, "end", end, low=0, high=1, optional=True)
        self.decay, self.end, self.length, self.shape = decay, end, length, shape
        self.count = 0

    @override
    def describe(self) -> str:
        towards = "" if self.end is None else f" to {self.end:g} in {self.length:,} steps"
        return f"average of decay {self.decay:g}{towards}"

    def decay_at(self, count: int) -> float:
        """D of the step that follows ``count`` others."""
        if self.end is None:
            return self.decay
        share = min(count / self.length, 1.0)
        share = share if self.shape == "linear" else (1 - math.cos(math.pi * share)) / 2
        return self.decay + (self.end - self.decay) * share

    @property
    @override
    def written_by(self) -> object:
        return self.decay, self.end, self.length, self.shape, self.count

    @override
    def stored(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        wide = {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
        return _Average(super().stored(wide), count=self.count)

    def after_step(self, module: nn.Module) -> None:
        """Follows an optimizer step.

        Args:
            module: The user's module, with its new weights.

        """
        average = self.weights
        if isinstance(average, _Average) and average.count == self.count:  # else one that shares it was here
            average.follow(module, self.decay_at(self.count))
        self.count += 1

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"weights": super().state_dict(), "count": self.count}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state["weights"])
        self.count = state["count"]


class _Average(dict[str, Tensor]):
    """Averaged weights, and the steps that they have followed."""

    def __init__(self, weights: Mapping[str, Tensor], count: int) -> None:
        super().__init__(weights)
        self.count = count

    @torch.no_grad()
    def follow(self, module: nn.Module, decay: float) -> None:
        named = [(plain_name(name), p.float()) for name, p in module.named_parameters()]
        update_average_([self[name] for name, _ in named], [p for _, p in named], decay)
        for name, buffer in module.named_buffers():
            self[plain_name(name)].copy_(buffer)
        self.count += 1


class AverageReferenceTechnique(ReferenceTechnique, GradientTechnique):
    """A technique with averages among its references; it is active in every step that they are to follow."""

    only_follows: ClassVar[bool] = True

    @override
    def after_step(self, module: Any, optimizer: "Optimizer") -> None:
        for reference in self.references:
            if isinstance(reference, AverageReference):
                reference.after_step(module)


class WindowReference(Reference):
    r"""The mean of the latest snapshots of the weights, newer ones counting more or less.

    A snapshot is taken at the first batch of all, and then when an epoch or ``every`` optimizer steps are over. The
    weights are a moving average over the m + 1 snapshots in the window, which starts at the oldest of them:

    .. math:: \theta = a^m \theta_0 + \sum_{i=1}^m (1 - a)\, a^{m-i}\, \theta_i

    Buffers of whole numbers are the newest's. Snapshots that references of one step take are one memory.

    Args:
        size_at: How many snapshots beside the newest are in the window when so many were taken before it: m.
        largest: The most that it says.
        decay: a, in [0, 1]; 0: the newest alone, 1: the oldest.
        every: Optimizer steps from snapshot to snapshot, at least 1, or ``"epoch"``.
        layers: Layers whose outputs are wanted; without any the loss call is wanted.
        place: Where snapshots and their mean lie, as of :class:`Reference`.

    Attributes:
        snapshots: The latest, oldest first, by the names of the module.
        taken: How many were taken.

    """

    def __init__(
        self,
        size_at: Callable[[int], int],
        largest: int,
        decay: float,
        every: int | Literal["epoch"] = "epoch",
        layers: Sequence[str] = (),
        place: str = "device",
    ) -> None:
        super().__init__(layers, place)
        self._size_at, self.largest, self.decay, self.every = size_at, largest, decay, every
        self.snapshots: list[dict[str, Tensor]] = []
        self.taken, self._last, self._size = 0, -1, 0

    @property
    @override
    def bytes(self) -> int:
        return sum(value.nbytes for held in [*self.snapshots, self.weights or {}] for value in held.values())

    @override
    def describe(self) -> str:
        unit = "epoch" if self.every == "epoch" else f"{self.every} steps"
        return f"up to {self.largest + 1} snapshots, one per {unit}"

    def clear(self) -> None:
        """Another training begins."""
        self.snapshots, self.weights, self.taken, self._last, self._size = [], None, 0, -1, 0

    @override
    def begin_step(self, step: "Step", taken: Callable[[Reference], dict[str, Tensor]]) -> None:
        # When the next step begins, not when the last one ends: a checkpoint lies before or behind both.
        place = step.epoch if self.every == "epoch" else step.global_step // self.every
        if place == self._last:
            return
        self._last, newest = place, taken(self)
        alike = [held for held in self.snapshots if _shapes(held) == _shapes(newest)]  # the module may have grown
        alike = [{name: value.to(newest[name].device) for name, value in held.items()} for held in alike]
        self.snapshots = [*alike, newest][-self.largest - 1 :]
        self._size = min(self._size_at(self.taken), len(self.snapshots) - 1)
        self.weights = _mean(self.snapshots[-self._size - 1 :], self.decay)
        self.taken += 1

    @override
    def state_dict(self) -> dict[str, Any]:
        held = [dict(weights) for weights in self.snapshots]
        return {"snapshots": held, "taken": self.taken, "last": self._last, "size": self._size}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.snapshots = [dict(weights) for weights in state["snapshots"]]
        self.taken, self._last, self._size = state["taken"], state["last"], state["size"]
        self.weights = _mean(self.snapshots[-self._size - 1 :], self.decay) if self.snapshots else None


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in weights.items()}


@torch.no_grad()
def _mean(window: Sequence[Mapping[str, Tensor]], decay: float) -> dict[str, Tensor]:
    newest = window[-1]
    averaged = [name for name, value in newest.items() if value.is_floating_point()]
    mean = {name: window[0][name].to(torch.float32, copy=True) for name in averaged}
    for held in window[1:]:
        update_average_(list(mean.values()), [held[name].float() for name in averaged], decay)
    return {name: mean[name].to(value.dtype) if name in mean else value for name, value in newest.items()}
