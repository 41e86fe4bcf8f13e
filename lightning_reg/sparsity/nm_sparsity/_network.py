"""A network with N:M sparsity: its weights, their masks over the course of training, and what can be asked of it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_reg.engine.host import distributed
from lightning_reg.engine.host.names import plain_name
from lightning_reg.engine.weights import shards
from lightning_reg.engine.weights.swap import named_weights
from lightning_reg.sparsity.nm_sparsity._layers import Choice, Weight, choose_weights
from lightning_reg.sparsity.nm_sparsity.core import apply_mask_, check_nm, nm_mask, pack_mask, unpack_mask
from lightning_reg.sparsity.nm_sparsity.report import SparsityReport, SparsityRow

__all__ = ["SparseNetwork", "change_gradient_", "put_back_pruned_"]


class SparseNetwork:
    """The weights that a technique chose, and their masks.

    Args:
        choice: What the user asked for.
        owner: The technique; its class is named in errors.

    Attributes:
        weights: All candidates of the module in training, dense ones with the reason why.
        masks: Those in force.
        is_hard: Whether the module holds hardened weights for a time.

    """

    def __init__(self, choice: Choice, owner: object) -> None:
        self.weights: list[Weight] = []
        self.is_hard = False
        self._choice, self._owner = choice, owner
        self.forget()

    def forget(self) -> None:
        """Starts a new training."""
        self.masks = _Masks()
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
                mask = nm_mask(value, *pattern, weight.dim) if held is None else held
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
                violations = torch.tensor(check_nm(rows, weight.n, weight.m, weight.dim), device=rows.device)
                counts = _everywhere(torch.stack([rows.count_nonzero(), violations]), parameter).tolist()
                found[weight.name] = counts[0] / parameter.numel(), counts[1]
        return found

    def packed_masks(self, module: nn.Module) -> dict[str, dict[str, Any]]:
        """Shape and packed mask, by name."""
        masks = [(weight, shards.whole_like(mask, p)) for weight, p, mask in self.final_masks(module)]
        return {weight.name: {"shape": list(weight.shape), "bits": pack_mask(mask)} for weight, mask in masks}

    def report(self, module: nn.Module) -> SparsityReport:
        """A row for every weight."""
        parameters = _named_by_all(module)
        masks = {weight.name: mask for weight, _, mask in self.final_masks(module)}
        weights = self._weights_of(module)
        return SparsityReport([self._row(w, parameters.get(w.name), masks.get(w.name)) for w in weights])

    def layer_scalars(self, module: nn.Module) -> dict[str, Tensor]:
        """What is logged of each weight, without asking the device; where rows are split this is a collective.

        Args:
            module: The module.

        Returns:
            ``flipped/<weight>``, the share of its entries whose mask changed when that was last measured, and
            ``kept_magnitude/<weight>``, the share of its sum of magnitudes that the mask in force keeps; nothing of a
            weight that has no mask yet.

        """
        parameters = named_weights(module)
        sums = {}
        for weight in self.sparse:
            rows = shards.local(parameters[weight.name]).detach()
            mask = self.masks.held_any(weight.name, rows)
            if mask is not None:
                magnitudes = rows.abs().float()
                sums[weight.name] = torch.stack([(magnitudes * mask).sum(), magnitudes.sum()])
        flips = self.masks.layer_flips(parameters)
        found = {f"flipped/{name}": count / parameters[name].numel() for name, count in flips.items()}
        for name, (kept, everything) in _by_name(sums, parameters).items():
            found[f"kept_magnitude/{name}"] = torch.where(everything > 0, kept / everything, 1.0)
        return found

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
            state["pruned"] = _prune_state_dict(state_dict, masks, parameters, _aliases(module))
        return state

    def _row(self, weight: Weight, value: Tensor | None, mask: Tensor | None) -> SparsityRow:
        if value is None or not weight.shape:  # computed, or without a shape yet
            return SparsityRow(weight.name, "", "dense", weight.why_dense, 1.0, 0.0, 0, 0)
        nonzero = int(_everywhere(shards.local(value).count_nonzero(), value))
        kept = 1.0 if mask is None else _kept_magnitude(value, mask)
        return SparsityRow(
            name=weight.name,
            shape="x".join(map(str, weight.shape)),
            pattern="dense" if mask is None else f"{weight.n}:{weight.m}",
            why_dense=weight.why_dense,
            kept_magnitude=self._magnitudes.get(weight.name, 1.0) if kept == 1.0 else kept,
            zeros=1.0 - nonzero / value.numel() if value.numel() else 0.0,
            flops_dense=2 * value.numel() * weight.multiplies,
            flops=2 * nonzero * weight.multiplies,
        )

    def _weights_of(self, module: nn.Module) -> list[Weight]:
        """The weights chosen in training, if it is that module or one like it; else those that would be chosen."""
        parameters = _named_by_all(module)
        shapes = [parameters[w.name].shape if w.name in parameters else () for w in self.sparse]
        same = bool(shapes) and all(shape == w.shape for shape, w in zip(shapes, self.sparse, strict=True))
        return [w for w in self.weights if not w.shape or w.name in parameters] if same else self._chosen(module)

    def _chosen(self, module: nn.Module) -> list[Weight]:
        if self._choice.n == self._choice.m and not self._choice.patterns:
            return []
        return choose_weights(module, self._choice, self._owner)


class _Masks:
    """The masks in force, by name of the weight.

    Attributes:
        age: Optimizer steps since they were last chosen.

    """

    def __init__(self) -> None:
        self.age = 0
        self._counts: dict[str, Tensor] = {}  # changed entries of the rows here, when that was last measured
        self._flips: Tensor | None = None  # those of a checkpoint, in all and by name
        self._layer_flips: dict[str, Tensor] = {}
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

    def held_any(self, name: str, weight: Tensor) -> Tensor | None:
        """The same, of whatever pattern is in force."""
        return self.held(name, self._patterns.get(name, (0, 0)), weight)

    def choose(
        self, weights: Mapping[str, Tensor], patterns: Mapping[Weight, tuple[int, int]], *, refresh: bool, measure: bool
    ) -> dict[str, Tensor]:
        """Masks of dense weights: those in force, or new ones where there is none, or of all on a refresh.

        Args:
            weights: Dense values by name.
            patterns: The weights wanted, with N and M of now.
            refresh: Whether all are chosen anew.
            measure: Whether the flips of new masks are counted, those of another pattern included.

        Returns:
            By name.

        """
        counts = {}
        for weight, pattern in patterns.items():
            name = weight.name
            old = self.held(name, pattern, weights[name])
            new = nm_mask(weights[name], *pattern, weight.dim) if refresh or old is None else old
            before = self._masks.get(name)  # of another pattern, perhaps
            if measure and new is not old and before is not None and before.shape == new.shape:
                counts[name] = (before.to(new.device) ^ new).sum()
            self._masks[name], self._patterns[name] = new, pattern
        if refresh:
            self.age = 0
        self._counts = counts or self._counts
        return {weight.name: self._masks[weight.name] for weight in patterns}

    def flips(self, parameters: Mapping[str, Tensor] | None = None) -> Tensor | None:
        """How many entries changed when that was last measured; ``None`` before.

        Args:
            parameters: By name; where they are split this is a collective, and without them only what is here.

        Returns:
            A scalar.

        """
        return shards.total(self._counts, parameters or {}) if self._counts else self._flips

    def layer_flips(self, parameters: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The same for each weight, by name; empty before."""
        return _by_name(self._counts, parameters or {}) if self._counts else self._layer_flips

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
        layer_flips = {name: int(count) for name, count in self.layer_flips(parameters).items()}
        counts = {"flips": None if flips is None else int(flips), "layer_flips": layer_flips}
        return {"age": self.age, **counts, "masks": masks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave."""
        self.age = state["age"]
        self._flips = None if state["flips"] is None else torch.tensor(state["flips"])
        # A file of an older version has them in all only.
        self._layer_flips = {name: torch.tensor(count) for name, count in state.get("layer_flips", {}).items()}
        for name, mask in state["masks"].items():
            self._masks[name] = unpack_mask(mask["bits"], mask["shape"])
            self._patterns[name] = (mask["pattern"][0], mask["pattern"][1])


def _kept_magnitude(weight: Tensor, mask: Tensor) -> float:
    """Share of the sum of magnitudes that a mask keeps; 1 if all are zero."""
    magnitudes = shards.local(weight).abs().double()
    kept, everything = _everywhere(torch.stack([(magnitudes * mask).sum(), magnitudes.sum()]), weight).tolist()
    return float(kept / everything) if everything else 1.0


def _everywhere(counted: Tensor, parameter: Tensor) -> Tensor:
    return shards.total({"": counted}, {"": parameter})


def _by_name(counted: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of tensors of one shape, counted in the rows of this process, each one's total; one collective for all."""
    if not counted:
        return {}
    placed = {}
    for place, (name, value) in enumerate(counted.items()):
        placed[name] = value.new_zeros(len(counted), *value.shape)
        placed[name][place] = value
    return dict(zip(counted, shards.total(placed, parameters).unbind(), strict=True))


def _named_by_all(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by all their names, those of shared ones too."""
    first = named_weights(module)
    return {name: first[names[0]] for names in _aliases(module).values() for name in names}


def _aliases(module: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter, by its first."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(plain_name(name))
    return {group[0]: group for group in names.values()}


@torch.no_grad()
def _prune_state_dict(
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
    pruned, keys = {}, {plain_name(key): key for key in state_dict}
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
        pruned: As from :func:`_prune_state_dict`.
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
