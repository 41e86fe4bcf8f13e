"""Masks over the course of training; gradients and checkpoints of pruned weights; what is logged of them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_reg.engine.host import distributed
from lightning_reg.engine.weights import shards
from lightning_reg.sparsity._nm_layers import Weight
from lightning_reg.sparsity._nm_masks import apply_mask_, nm_mask, pack_mask, unpack_mask

__all__ = [
    "Masks",
    "change_gradient_",
    "pattern_scalars",
    "prune_state_dict",
    "put_back_pruned_",
]


class Masks:
    """The masks in force, by name of the weight.

    Args:
        dim: Direction of the groups.

    Attributes:
        age: Optimizer steps since they were last chosen.

    """

    def __init__(self, dim: Literal["in", "out"]) -> None:
        self.age = 0
        self._counts: dict[str, Tensor] = {}  # changed entries of the rows here, when that was last measured
        self._flips: Tensor | None = None  # that of a checkpoint
        self._dim = dim
        self._masks: dict[str, Tensor] = {}
        self._patterns: dict[str, tuple[int, int]] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def held(self, name: str, pattern: tuple[int, int], weight: Tensor) -> Tensor | None:
        """The mask in force, on the weight's device; ``None`` if there is none of this pattern and shape."""
        mask = self._masks.get(name)
        if mask is None or mask.shape != weight.shape or self._patterns[name] != pattern:
            return None
        return mask.to(weight.device)

    def choose(
        self, weights: Mapping[str, Tensor], patterns: Mapping[str, tuple[int, int]], *, refresh: bool, measure: bool
    ) -> dict[str, Tensor]:
        """Masks of dense weights: those in force, or new ones where there is none, or of all on a refresh.

        Args:
            weights: Dense values by name.
            patterns: N and M of the weights wanted.
            refresh: Whether all are chosen anew.
            measure: Whether the flips of a refresh are counted.

        Returns:
            By name.

        """
        counts = {}
        for name, pattern in patterns.items():
            old = self.held(name, pattern, weights[name])
            new = nm_mask(weights[name], *pattern, self._dim) if refresh or old is None else old
            if measure and refresh and old is not None:
                counts[name] = (old ^ new).sum()
            self._masks[name], self._patterns[name] = new, pattern
        if refresh:
            self.age = 0
        self._counts = counts or self._counts
        return {name: self._masks[name] for name in patterns}

    def flips(self, parameters: Mapping[str, Tensor] | None = None) -> Tensor | None:
        """How many entries changed when that was last measured; ``None`` before.

        Args:
            parameters: By name; where they are split this is a collective, and without them only what is here.

        Returns:
            A scalar.

        """
        return shards.total(self._counts, parameters or {}) if self._counts else self._flips

    def keep_own_rows(self, parameters: Mapping[str, Tensor]) -> None:
        """Of loaded masks, which are whole, keeps the rows of this process."""
        for name, mask in self._masks.items():
            parameter = parameters.get(name)
            if parameter is not None and mask.shape == parameter.shape:
                self._masks[name] = shards.own_rows(mask, parameter)

    def state_dict(self, parameters: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """One bit per weight, and the counts.

        Args:
            parameters: By name; where they are split this is a collective, and without them only what is here.

        Returns:
            Tensors and plain values.

        """
        masks, flips = {}, self.flips(parameters)
        for name, own in self._masks.items():
            mask = own if parameters is None else shards.whole_like(own, parameters[name])
            masks[name] = {"shape": list(mask.shape), "pattern": list(self._patterns[name]), "bits": pack_mask(mask)}
        return {"age": self.age, "flips": None if flips is None else int(flips), "masks": masks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave."""
        self.age = state["age"]
        self._flips = None if state["flips"] is None else torch.tensor(state["flips"])
        for name, mask in state["masks"].items():
            self._masks[name] = unpack_mask(mask["bits"], mask["shape"])
            self._patterns[name] = (mask["pattern"][0], mask["pattern"][1])


@torch.no_grad()
def prune_state_dict(
    state_dict: dict[str, Tensor],
    masks: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    aliases: Mapping[str, Sequence[str]],
) -> dict[str, dict[str, Any]]:
    """Exchanges dense weights in a state dict for sparse ones; the tensors themselves stay as they are.

    Where parameters are split over processes this is a collective.

    Args:
        state_dict: Of the module, perhaps behind ``_orig_mod.``; entries are exchanged. One that does not hold the
            parameter was put there by another callback (an average, say), which will want it back: it stays. Of split
            parameters there may be the rows of this process, the whole weight, or nothing in this process.
        masks: Which weights are kept, of the rows here, by name of the parameter.
        parameters: By name.
        aliases: All names of each parameter; a state dict has one that is shared under each of them.

    Returns:
        What was left out, of all processes, in the first: by name the packed mask and the pruned values in row order.
        Nothing for weights that were sparse already.

    """
    pruned, keys = {}, {key.replace("_orig_mod.", ""): key for key in state_dict}
    for name, mask in masks.items():
        parameter = parameters[name]
        everything, whole_mask = shards.whole(parameter), shards.whole_like(mask.to(parameter.device), parameter)
        places = [keys[alias] for alias in aliases[name] if alias in keys]
        places = [place for place in places if _holds(state_dict[place], everything, parameter)]
        if not places:
            continue
        value = state_dict[places[0]]
        masked = _masked(value, mask if shards.is_split(value) else whole_mask)
        state_dict.update(dict.fromkeys(places, masked))
        rest = everything[~whole_mask]
        if distributed.rank() == 0 and rest.any():
            pruned[name] = {"bits": pack_mask(whole_mask), "values": rest}
    return pruned


def _holds(value: Tensor, everything: Tensor, parameter: Tensor) -> bool:
    if not shards.is_split(parameter):
        return value.data_ptr() == parameter.data_ptr()
    mine = shards.local(parameter) if shards.is_split(value) else everything
    return torch.equal(shards.local(value).to(mine.device), mine)


def _masked(value: Tensor, mask: Tensor) -> Tensor:
    if not shards.is_split(value):
        return value.detach().masked_fill(~mask.to(value.device), 0.0)
    masked = value.detach().clone()
    rows = shards.local(masked)
    rows.masked_fill_(~mask.to(rows.device), 0.0)
    return masked


@torch.no_grad()
def put_back_pruned_(pruned: Mapping[str, Mapping[str, Any]], parameters: Mapping[str, Tensor]) -> None:
    """Makes sparse weights dense again, in place.

    Args:
        pruned: As from :func:`prune_state_dict`.
        parameters: By name.

    """
    for name, rest in pruned.items():
        parameter = parameters.get(name)
        if parameter is not None:
            mask = unpack_mask(rest["bits"], parameter.shape)
            pruned_values = rest["values"].new_zeros(mask.shape)
            pruned_values[~mask] = rest["values"]
            rows = shards.local(parameter)
            here = shards.own_rows(mask, parameter).to(rows.device)
            rows[~here] = shards.own_rows(pruned_values, parameter).to(rows.device, rows.dtype)[~here]


def pattern_scalars(factor: float, patterns: Mapping[Weight, tuple[int, int]]) -> dict[str, Any]:
    """What is logged of a step.

    Args:
        factor: What pruned weights are multiplied by.
        patterns: N and M now of each sparse weight; at least one.

    Returns:
        ``factor``; ``n`` and ``m`` of the first weight; ``kept``, the share of sparse weights that are not pruned.

    """
    n, m = next(iter(patterns.values()))
    size = sum(math.prod(weight.shape) for weight in patterns)
    kept = sum(math.prod(weight.shape) * a / b for weight, (a, b) in patterns.items()) / size
    return {"factor": factor, "n": float(n), "m": float(m), "kept": kept if factor < 1.0 else 1.0}


@torch.no_grad()
def change_gradient_(parameter: Tensor, mask: Tensor, *, factor: float, pull: float) -> None:
    """Masks the gradient of a parameter, or pulls its pruned entries towards zero, in place.

    Args:
        parameter: The dense weight, with its gradient.
        mask: Which weights are kept, of the rows here.
        factor: What the gradient of pruned weights is multiplied by.
        pull: Weight of the pruned weights themselves in their gradient.

    """
    if parameter.grad is None:
        return
    gradient = shards.local(parameter.grad)
    if factor < 1.0:
        apply_mask_(gradient, mask, factor)
    if pull:
        gradient.add_(shards.local(parameter) * mask.logical_not(), alpha=pull)
