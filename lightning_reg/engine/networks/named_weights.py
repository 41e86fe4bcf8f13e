"""Weights of a network by the names that the user knows, copied where a network may have grown."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.names import plain_name

__all__ = ["fill_", "is_grown", "load_weights_", "weights_of"]


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by the names the user knows; the module's own memory, without gradient."""
    named = (*module.named_parameters(), *module.named_buffers())
    return {plain_name(name): tensor.detach() for name, tensor in named}


@torch.no_grad()
def load_weights_(module: nn.Module, weights: Mapping[str, Tensor], owner: object) -> None:
    """Copies weights into a module, by name; where it has grown by rows at the end, these stay as they are.

    Args:
        module: What they are copied into. What it has and ``weights`` have not stays as it is.
        weights: By name, as :func:`weights_of` gives them.
        owner: Whose weights these are; its class is named in the message.

    Raises:
        MisconfigurationException: If the module lacks one of them, or has it in a shape of another kind.

    """
    fill_(weights_of(module), weights, owner)


@torch.no_grad()
def fill_(places: Mapping[str, Tensor], weights: Mapping[str, Tensor], owner: object) -> None:
    """Copies weights into tensors of the same names, as :func:`load_weights_` does; arguments and errors as there."""
    for name, value in weights.items():
        place = places.get(name)
        if place is None or not is_grown(place, value):
            found = "is not there" if place is None else f"has shape {tuple(place.shape)}"
            raise MisconfigurationException(
                f"{type(owner).__name__}: {name!r} had shape {tuple(value.shape)} when it was kept and {found} now."
                " Between fits layers may only come anew, or grow by rows at the end (new classes of a head)."
            )
        (place[: len(value)] if value.dim() else place).copy_(value)


def is_grown(now: Tensor, before: Tensor) -> bool:
    """Whether a tensor has the shape of an earlier one, or more rows and else the same."""
    if not before.dim() or now.dim() != before.dim():
        return now.shape == before.shape
    return now.shape[1:] == before.shape[1:] and now.shape[0] >= before.shape[0]
