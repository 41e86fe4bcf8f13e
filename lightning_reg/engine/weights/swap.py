"""Effective weights in place of the dense ones, from the forward pass until the gradients are there.

The optimizer, checkpoints and everything else between steps see the dense parameters under their own names: nothing is
re-parametrized, no key is renamed. The gradient with respect to the effective value arrives at the dense parameter as
it is (straight-through). Where rows of parameters are split over processes each edits its own, and ``fully_shard``
gathers those. Cost: two fused passes over the edited parameters per batch, and one copy of them in memory.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_reg.engine.host.errors import refuse_parameter
from lightning_reg.engine.host.names import plain_name
from lightning_reg.engine.weights import shards
from lightning_reg.engine.weights.guard import StepGuard

__all__ = ["Surgery", "named_weights"]

Edit = Callable[[Mapping[str, Tensor]], None]


def named_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names the user knows, without ``_orig_mod.``; under ``fully_shard`` those of the optimizer."""
    shards.reshard_(module)
    return {plain_name(name): p for name, p in module.named_parameters()}


class Surgery:
    """Swaps parameters of a module for edited values and back.

    Args:
        module: The user's module.
        edits: For each editor the names of its parameters and the function that edits their values in place.
        owner: Class to name in errors.

    Attributes:
        guard: Refuses steps of optimizers while effective values are in.

    Raises:
        MisconfigurationException: If a name matches no parameter.

    """

    def __init__(self, module: nn.Module, edits: Sequence[tuple[Sequence[str], Edit]], owner: str = "") -> None:
        parameters = named_weights(module)
        for name in (name for names, _ in edits for name in names):
            if name not in parameters:
                refuse_parameter(name, parameters)
        self._edits = [({name: parameters[name] for name in names}, edit) for names, edit in edits]
        self._module = module
        self._dense: dict[nn.Parameter, Tensor] = {}
        self._edited: list[nn.Parameter] = []
        held = "the effective weights, which are in the module for the time of the batch, and not the dense ones"
        self.guard = StepGuard(owner, held, lambda: self.in_place)

    @property
    def in_place(self) -> bool:
        """Whether effective values are in."""
        return bool(self._edited)

    @torch.no_grad()
    def apply(self, which: Collection[int] | None = None) -> None:
        """Puts effective values in where they are not.

        Args:
            which: Positions of the editors whose turn it is; ``None`` for all.

        """
        edited = set(self._edited)
        edits = [
            ({name: p for name, p in named.items() if p not in edited}, edit)
            for position, (named, edit) in enumerate(self._edits)
            if which is None or position in which
        ]
        weights = list(dict.fromkeys(p for named, _ in edits for p in named.values()))
        if not weights:
            return
        values = {weight: shards.local(weight) for weight in weights}
        for weight, value in values.items():
            if weight not in self._dense:
                self._dense[weight] = torch.empty_like(value)
        torch._foreach_copy_([self._dense[p] for p in weights], list(values.values()))
        self._edited += weights
        for named, edit in edits:
            if named:
                edit({name: values[p] for name, p in named.items()})
        self._forget_gathered()

    @torch.no_grad()
    def restore(self, optimizer: Any = None) -> None:
        """Puts the dense values back where they are not in already.

        Args:
            optimizer: Of its parameters alone: graphs through others stay valid. ``None``: of all.

        """
        groups = () if optimizer is None else optimizer.param_groups
        among = {id(p) for group in groups for p in group["params"]}
        edited = [p for p in self._edited if optimizer is None or id(p) in among]
        if edited:
            torch._foreach_copy_([shards.local(p) for p in edited], [self._dense[p] for p in edited])
            self._forget_gathered()
            back = {id(p) for p in edited}
            self._edited = [p for p in self._edited if id(p) not in back]

    def close(self) -> None:
        """Puts the dense values back, and lets go of the optimizers."""
        self.restore()
        self.guard.close()

    def _forget_gathered(self) -> None:
        if any(shards.is_split(p) for p in self._edited):
            shards.reshard_(self._module)
