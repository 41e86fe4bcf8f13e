"""A network with N:M sparsity: its weights, their masks, and what can be asked of it in training and afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_reg.engine.weights import shards
from lightning_reg.engine.weights.swap import named_weights
from lightning_reg.sparsity._nm_layers import Choice, Weight, choose_weights
from lightning_reg.sparsity._nm_masks import check_nm, nm_mask, pack_mask
from lightning_reg.sparsity._nm_report import SparsityReport, SparsityRow
from lightning_reg.sparsity._nm_weights import Masks, prune_state_dict

__all__ = ["SparseNetwork"]


class SparseNetwork:
    """The weights that a technique chose, and their masks.

    Args:
        choice: What the user asked for.
        owner: Class to name in errors.

    Attributes:
        weights: All candidates of the module in training, dense ones with the reason why.
        masks: Those in force.
        is_hard: Whether the module holds hardened weights for a time.

    """

    def __init__(self, choice: Choice, owner: str) -> None:
        self.weights: list[Weight] = []
        self.is_hard = False
        self._choice, self._owner = choice, owner
        self.forget()

    def forget(self) -> None:
        """Starts a new training."""
        self.masks = Masks(self._choice.dim)
        self._magnitudes: dict[str, float] = {}

    @property
    def sparse(self) -> list[Weight]:
        """The weights that become sparse."""
        return [weight for weight in self.weights if not weight.why_dense]

    def choose(self, module: nn.Module) -> list[str]:
        """Chooses the weights of a module and returns the names of those that become sparse."""
        self.weights = self._chosen(module)
        return [weight.name for weight in self.sparse]

    def final_masks(self, module: nn.Module) -> list[tuple[Weight, nn.Parameter, Tensor]]:
        """Masks of the target pattern, from the module's weights; of one-shot pruning the one chosen once.

        Of weights that are split over processes the rows of this process, here and in what follows; what is counted is
        counted in all of them, so that every process must ask.

        Args:
            module: The module.

        Returns:
            Weight, parameter and mask.

        """
        parameters, masks = named_weights(module), []
        self.masks.keep_own_rows(parameters)
        for weight in self._weights_of(module):
            if not weight.why_dense:
                value, pattern = shards.local(parameters[weight.name]), (weight.n, weight.m)
                held = self.masks.held(weight.name, pattern, value) if self._choice.recipe == "one_shot" else None
                mask = nm_mask(value, *pattern, self._choice.dim) if held is None else held
                masks.append((weight, parameters[weight.name], mask))
        return masks

    @contextmanager
    def hardened(self, module: nn.Module) -> Iterator[None]:
        """Hardened weights for a time; training goes on as if nothing had been."""
        edited = [(shards.local(parameter), mask) for _, parameter, mask in self.final_masks(module)]
        dense = [rows.clone() for rows, _ in edited]
        self.is_hard = True
        try:
            for rows, mask in edited:
                rows.masked_fill_(~mask, 0.0)
            yield
        finally:
            for (rows, _), values in zip(edited, dense, strict=True):
                rows.copy_(values)
            shards.reshard_(module)
            self.is_hard = False

    @torch.no_grad()
    def harden_(self, module: nn.Module) -> None:
        """Sets pruned weights to zero."""
        for weight, parameter, mask in self.final_masks(module):
            kept = _kept_magnitude(parameter, mask)
            if kept < 1.0:  # what was pruned before says nothing about how much it was
                self._magnitudes[weight.name] = kept
            shards.local(parameter).masked_fill_(~mask, 0.0)

    def verify(self, module: nn.Module) -> dict[str, tuple[float, int]]:
        """Share of weights that are not zero and number of violations, by name."""
        parameters, found = named_weights(module), {}
        for weight in self._weights_of(module):
            if not weight.why_dense:
                parameter = parameters[weight.name]
                rows = shards.local(parameter)
                violations = torch.tensor(check_nm(rows, weight.n, weight.m, self._choice.dim), device=rows.device)
                counts = _everywhere(torch.stack([rows.count_nonzero(), violations]), parameter).tolist()
                found[weight.name] = counts[0] / parameter.numel(), counts[1]
        return found

    def packed_masks(self, module: nn.Module) -> dict[str, dict[str, Any]]:
        """Shape and packed mask, by name."""
        masks = [(weight, shards.whole_like(mask, p)) for weight, p, mask in self.final_masks(module)]
        return {weight.name: {"shape": list(weight.shape), "bits": pack_mask(mask)} for weight, mask in masks}

    def report(self, module: nn.Module) -> SparsityReport:
        """A row for every weight."""
        parameters = named_weights(module)
        masks = {weight.name: mask for weight, _, mask in self.final_masks(module)}
        weights = [weight for weight in self._weights_of(module) if weight.shape]
        return SparsityReport([self._row(w, parameters[w.name], masks.get(w.name)) for w in weights])

    def state_of(self, module: nn.Module, state_dict: dict[str, Tensor], *, prune: bool) -> dict[str, Any]:
        """State for a checkpoint: whole masks, also of weights that are split, and what is pruned from its weights.

        Args:
            module: The module.
            state_dict: Of the module, in the checkpoint.
            prune: Whether its weights become sparse.

        Returns:
            Tensors and plain values.

        """
        parameters = named_weights(module)
        state = self.masks.state_dict(parameters)
        if prune:
            masks = {weight.name: mask for weight, _, mask in self.final_masks(module)}
            state["pruned"] = prune_state_dict(state_dict, masks, parameters, _aliases(module))
        return state

    def _row(self, weight: Weight, value: Tensor, mask: Tensor | None) -> SparsityRow:
        nonzero = int(_everywhere(shards.local(value).count_nonzero(), value))
        kept = 1.0 if mask is None else _kept_magnitude(value, mask)
        return SparsityRow(
            name=weight.name,
            shape="x".join(map(str, weight.shape)),
            pattern="dense" if mask is None else f"{weight.n}:{weight.m}",
            why_dense=weight.why_dense,
            kept_magnitude=self._magnitudes.get(weight.name, 1.0) if kept == 1.0 else kept,
            zeros=1.0 - nonzero / value.numel() if value.numel() else 0.0,
            flops_dense=2 * value.numel(),
            flops=2 * nonzero,
        )

    def _weights_of(self, module: nn.Module) -> list[Weight]:
        """The weights chosen in training, if it is that module or one like it; else those that would be chosen."""
        parameters = named_weights(module)
        shapes = [parameters[w.name].shape if w.name in parameters else () for w in self.sparse]
        same = bool(shapes) and all(shape == w.shape for shape, w in zip(shapes, self.sparse, strict=True))
        return [w for w in self.weights if not w.shape or w.name in parameters] if same else self._chosen(module)

    def _chosen(self, module: nn.Module) -> list[Weight]:
        if self._choice.n == self._choice.m and not self._choice.patterns:
            return []
        return choose_weights(module, self._choice, self._owner)


def _aliases(module: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter, by its first."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name.replace("_orig_mod.", ""))
    return {group[0]: group for group in names.values()}


def _kept_magnitude(weight: Tensor, mask: Tensor) -> float:
    """Share of the sum of magnitudes that a mask keeps; 1 if all are zero."""
    magnitudes = shards.local(weight).abs().double()
    kept, everything = _everywhere(torch.stack([(magnitudes * mask).sum(), magnitudes.sum()]), weight).tolist()
    return float(kept / everything) if everything else 1.0


def _everywhere(counted: Tensor, parameter: Tensor) -> Tensor:
    return shards.total({"": counted}, {"": parameter})
