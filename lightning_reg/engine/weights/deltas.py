"""Checkpoints without what was not trained: frozen weights, and latents that they began with, are told by a hash."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.modules import checksum
from lightning_reg.engine.weights.entries import entries_of, write_entries_
from lightning_reg.engine.weights.latents import Latents
from lightning_reg.engine.weights.swap import named_weights

__all__ = ["fill_", "frozen_names", "is_delta", "strip_"]

_KEY = "lightning_reg_base"


class Freezing(Protocol):
    """Who lets parameters stay as they are."""

    def weights_to_freeze(self, module: nn.Module) -> Sequence[str]:
        """Names of the parameters that are not trained meanwhile."""


class Saving(Freezing, Protocol):
    """Who trains weights through a map with frozen latents; its class is named in messages."""

    latents: Latents

    @property
    def state_key(self) -> str:
        """Where its state is in a checkpoint."""

    def weights_to_map(self, module: nn.Module) -> Sequence[str]:
        """Names of the parameters that are mapped."""

    def map_weights(self, latents: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Writes f(v) into the weights."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over its state."""


def frozen_names(module: nn.Module, frozen: Sequence[Freezing], mapped: set[str]) -> set[str]:
    """Names of the parameters that are not trained: those that all techniques leave out which leave out any.

    Args:
        module: The user's module.
        frozen: Those whose latents are frozen.
        mapped: Names of the weights that any technique trains through a map.

    Returns:
        Without those that are mapped.

    """
    left = [names for technique in frozen if (names := set(technique.weights_to_freeze(module)))]
    return set.intersection(*left) - mapped if left else set()


def is_delta(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint lacks what was not trained."""
    return _KEY in checkpoint


def strip_(checkpoint: dict[str, Any], module: nn.Module, frozen: Sequence[Saving], others: set[str]) -> None:
    """Takes out of a checkpoint what was not trained, and notes its hash.

    Args:
        checkpoint: As Lightning writes it.
        module: The user's module.
        frozen: The techniques whose latents are frozen.
        others: Names of the weights that other techniques train through a map.

    """
    if is_delta(checkpoint):
        return
    parameters = named_weights(module)
    mapped = {name: technique for technique in frozen for name in technique.weights_to_map(module)}
    names = frozen_names(module, frozen, others | mapped.keys()) | mapped.keys()
    latents = {name: t.latents for name, t in mapped.items() if name in t.latents.values}
    base = {
        name: latents[name].whole(name, p) if name in latents else p.detach()
        for name, p in parameters.items()
        if name in names
    }
    # Of a latent that has some entries alone, all of them as they are now: those also that are trained no more.
    entries = {n: entries_of(parameters[n].detach(), own.index[n]) for n, own in latents.items() if n in own.index}
    of_base = {id(parameters[name]) for name in base}
    keys = [key for key, p in module.named_parameters(remove_duplicate=False) if id(p) in of_base]
    for key in keys:
        checkpoint["state_dict"].pop(key, None)
    for technique in frozen:
        state = checkpoint.get("callbacks", {}).get(technique.state_key)
        if state:
            checkpoint["callbacks"][technique.state_key] = {**state, "values": {}}
    types = {name: str(value.dtype).removeprefix("torch.") for name, value in base.items()}
    checkpoint[_KEY] = {"types": types, "hash": checksum(base), "entries": entries}


def fill_(checkpoint: dict[str, Any], module: nn.Module, frozen: Sequence[Saving], owner: str) -> None:
    """Puts what was not trained back, from the module as it is, and the mapped weights as they were.

    Args:
        checkpoint: What :func:`strip_` made.
        module: The user's module, with the weights that the training began with.
        frozen: The techniques whose latents are frozen.
        owner: Class to name in errors.

    Raises:
        MisconfigurationException: If the module has other weights than those that the training began with.

    """
    note, parameters = checkpoint.pop(_KEY), named_weights(module)
    missing = [name for name in note["types"] if name not in parameters]
    base = {
        name: parameters[name].detach().to(getattr(torch, kind))
        for name, kind in note["types"].items()
        if name in parameters
    }
    if missing or checksum(base) != note["hash"]:
        why = f"it lacks {missing[0]!r}" if missing else "its weights differ"
        raise MisconfigurationException(
            f"{owner}: the checkpoint holds what was trained on top of other weights than the module's: {why}. Make the"
            " module as it was when that training began, pre-trained weights included."
        )
    values = dict(base)
    for technique in frozen:
        state = checkpoint.get("callbacks", {}).get(technique.state_key)
        names = [name for name in technique.weights_to_map(module) if name in base]
        if state and state["own"]:
            index = {name: positions.to(base[name].device) for name, positions in state.get("index", {}).items()}
            state["values"] = {n: entries_of(base[n], index[n]) if n in index else base[n].clone() for n in names}
            values |= _mapped(technique, state) if not index else _with_entries(base, index, note["entries"])
    by_parameter = {id(parameters[name]): value for name, value in values.items()}
    for key, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in by_parameter:
            checkpoint["state_dict"].setdefault(key, by_parameter[id(parameter)])


@torch.no_grad()
def _mapped(technique: Saving, state: dict[str, Any]) -> dict[str, Tensor]:
    technique.load_state_dict(state)
    latents = technique.latents.values
    technique.latents.to({name: value.device for name, value in latents.items()})
    weights = {name: torch.empty_like(value) for name, value in latents.items()}
    technique.map_weights(latents, weights)
    return weights


def _with_entries(
    base: Mapping[str, Tensor], index: Mapping[str, Tensor], entries: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    weights = {name: base[name].clone() for name in index}
    for name, weight in weights.items():
        write_entries_(weight, index[name], entries[name].to(weight.device))
    return weights
