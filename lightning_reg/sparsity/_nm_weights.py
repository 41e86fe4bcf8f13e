"""Masks over the course of training; gradients and checkpoints of pruned weights; what is logged of them."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

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
        flips: How many entries changed when that was last measured, a scalar; ``None`` before.

    """

    def __init__(self, dim: Literal["in", "out"]) -> None:
        self.age = 0
        self.flips: Tensor | None = None
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
        flips: Tensor | None = None
        for name, pattern in patterns.items():
            old = self.held(name, pattern, weights[name])
            new = nm_mask(weights[name], *pattern, self._dim) if refresh or old is None else old
            if measure and refresh and old is not None:
                changed = (old ^ new).sum()
                flips = changed if flips is None else flips + changed
            self._masks[name], self._patterns[name] = new, pattern
        if refresh:
            self.age = 0
        self.flips = self.flips if flips is None else flips
        return {name: self._masks[name] for name in patterns}

    def state_dict(self) -> dict[str, Any]:
        """One bit per weight, and the counts."""
        masks = {
            name: {"shape": list(mask.shape), "pattern": list(self._patterns[name]), "bits": pack_mask(mask)}
            for name, mask in self._masks.items()
        }
        return {"age": self.age, "flips": None if self.flips is None else int(self.flips), "masks": masks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave."""
        self.age = state["age"]
        self.flips = None if state["flips"] is None else torch.tensor(state["flips"])
        for name, mask in state["masks"].items():
            self._masks[name] = unpack_mask(mask["bits"], mask["shape"])
            self._patterns[name] = (mask["pattern"][0], mask["pattern"][1])


def prune_state_dict(
    state_dict: dict[str, Tensor], masks: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> dict[str, dict[str, Any]]:
    """Exchanges dense weights in a state dict for sparse ones; the tensors themselves stay as they are.

    Args:
        state_dict: Of the module, perhaps behind ``_orig_mod.``; entries are exchanged. One that is not the parameter
            itself was put there by another callback (an average, say), which will want it back: it stays.
        masks: Which weights are kept, by name of the parameter.
        parameters: By name.

    Returns:
        What was left out: by name the packed mask and the pruned values in row order. Nothing for weights that were
        sparse already.

    """
    pruned = {}
    for key, value in list(state_dict.items()):
        name = key.replace("_orig_mod.", "")
        if name not in masks or value.data_ptr() != parameters[name].data_ptr():
            continue
        mask = masks[name].to(value.device)
        rest = value.detach()[~mask]
        if rest.any():
            pruned[name] = {"bits": pack_mask(mask), "values": rest}
        state_dict[key] = value.detach().masked_fill(~mask, 0.0)
    return pruned


@torch.no_grad()
def put_back_pruned_(pruned: Mapping[str, Mapping[str, Any]], parameters: Mapping[str, Tensor]) -> None:
    """Makes sparse weights dense again, in place.

    Args:
        pruned: As from :func:`prune_state_dict`.
        parameters: By name.

    """
    for name, rest in pruned.items():
        weight = parameters.get(name)
        if weight is not None:
            mask = unpack_mask(rest["bits"], weight.shape).to(weight.device)
            weight[~mask] = rest["values"].to(weight.device, weight.dtype)


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
        mask: Which weights are kept.
        factor: What the gradient of pruned weights is multiplied by.
        pull: Weight of the pruned weights themselves in their gradient.

    """
    if parameter.grad is None:
        return
    if factor < 1.0:
        apply_mask_(parameter.grad, mask, factor)
    if pull:
        parameter.grad.add_(parameter * mask.logical_not(), alpha=pull)
