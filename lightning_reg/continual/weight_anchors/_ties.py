"""Parameters of a module that are tied to anchors: which ones, what was kept of each, and what pulls them."""

from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.continual.weight_anchors.core import parts_like, pull_, quadratic_penalty
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.networks.named_weights import is_grown
from lightning_reg.engine.weights.swap import named_weights

__all__ = ["Slot", "Ties", "add_earlier_", "free_rows_"]


class Slot(TypedDict):
    """What is kept of a task: anchors by the names of parameters, and their weights, which are none for all 1."""

    anchors: dict[str, Tensor]
    weights: dict[str, Tensor]


def add_earlier_(slot: Slot, earlier: Sequence[Slot]) -> None:
    """Makes one slot of several, in place: with the sum of the weights, and its own anchors.

    Args:
        slot: The last task's.
        earlier: Those of tasks before; a parameter may have had fewer rows then. One that this slot has not, since it
            was frozen, keeps its anchor.

    """
    anchors, weights = slot["anchors"], slot["weights"]
    for one in earlier:
        for name, value in one["weights"].items():
            if name in weights:
                parts_like([weights[name]], [value])[0].add_(value.to(weights[name].device))
            else:
                anchors[name], weights[name] = one["anchors"][name], value


def free_rows_(slot: Slot, head: Sequence[str], free: Tensor) -> None:
    """Lets rows go, in place: their weights become 0.

    Args:
        slot: The last task's, with weights.
        head: Names of the parameters whose rows are meant, those that are not tied included.
        free: Which rows, a mask.

    """
    for name in head:
        if name in slot["weights"]:
            slot["weights"][name][free.to(slot["weights"][name].device)] = 0.0


class _Tie(NamedTuple):
    params: Sequence[nn.Parameter]
    anchors: Sequence[Tensor]
    weights: Sequence[Tensor] | None


class Ties:
    """Parameters of a module tied to the anchors of one task or several, for the time of a fit."""

    def __init__(self) -> None:
        self._ties: list[_Tie] = []
        self._largest: dict[int, float] = {}

    def __bool__(self) -> bool:
        return bool(self._ties)

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {"_ties": [], "_largest": {}}  # the module's parameters; what is kept of them is elsewhere

    def clear(self) -> None:
        """Ties nothing any more."""
        self._ties, self._largest = [], {}

    def tie(self, owner: object, module: nn.Module, slots: Sequence[Slot]) -> None:
        """Ties the module's parameters to what was kept.

        Args:
            owner: Whose it is; its class is named in messages.
            module: The user's module.
            slots: What was kept of each task.

        Raises:
            MisconfigurationException: If a parameter is not there or has another shape.

        """
        self._ties = []
        for slot in slots:
            params = _partners(owner, module, slot["anchors"])
            anchors = [value.to(p.device) for value, p in zip(slot["anchors"].values(), params, strict=True)]
            weights = (
                [slot["weights"][name].to(a.device) for name, a in zip(slot["anchors"], anchors, strict=True)]
                if slot["weights"]
                else None
            )
            self._ties.append(_Tie(params, anchors, weights))
        self._largest = _largest_weights(self._ties)

    def penalty(self) -> Tensor | None:
        """The sum of the quadratic penalties of the parameters that are trained at present; ``None`` without any."""
        values = []
        for params, anchors, weights in self._ties:
            trained = [p.requires_grad for p in params]
            if any(trained):
                near = list(compress(anchors, trained))
                factors = None if weights is None else list(compress(weights, trained))
                values.append(quadratic_penalty(parts_like(list(compress(params, trained)), near), near, factors))
        return torch.stack(values).sum() if values else None

    def largest_weight(self, among: Sequence[Tensor]) -> float:
        """The largest weight of an entry of those parameters that are among the given ones, summed over the tasks."""
        return max((self._largest.get(id(p), 0.0) for p in among), default=0.0)

    def pull_(self, among: Sequence[Tensor], share: float) -> None:
        """Moves those parameters that are among the given ones by a share of the way to their anchors."""
        for params, anchors, _ in self._ties:
            pull_(params, anchors, among, share)


def _largest_weights(ties: Sequence[_Tie]) -> dict[int, float]:
    """The largest weight of each parameter's entries by its `id`; they are read from the device together."""
    sums: dict[int, Tensor] = {}
    for params, _, weights in ties:
        for p, weight in zip(params, weights, strict=True) if weights is not None else ():
            total = sums.setdefault(id(p), torch.zeros_like(p, dtype=weight.dtype, requires_grad=False))
            parts_like([total], [weight])[0].add_(weight)
    sums = {key: total for key, total in sums.items() if total.numel()}
    largest = torch.stack([total.max().float().cpu() for total in sums.values()]).tolist() if sums else []
    return dict(zip(sums, largest, strict=True))


def _partners(owner: object, module: nn.Module, kept: Mapping[str, Tensor]) -> list[nn.Parameter]:
    """The parameters that something was kept of; each may have more rows by now."""
    named = named_weights(module)
    for name, value in kept.items():
        if name not in named or not is_grown(named[name], value):
            found = f"has shape {tuple(named[name].shape)}" if name in named else "is not there"
            raise MisconfigurationException(
                f"{type(owner).__name__}: {name!r} had shape {tuple(value.shape)} when its anchor was taken and"
                f" {found} now. Between fits parameters may only come anew, or grow by rows at the end (new classes of"
                " a head)."
            )
    return [named[name] for name in kept]
