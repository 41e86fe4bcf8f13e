"""Weights of a network that what was learned is put into, and put back to the last bit."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_reg.engine.host.names import plain_name

__all__ = ["put_back", "weights_for"]


def weights_for(module: nn.Module, learned: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """The weights that something learned is for.

    Args:
        module: The network.
        learned: Tensors of the weights' shapes, by their names.
        what: What that is, with an article, for the error.

    Returns:
        The weights by name, without gradient.

    Raises:
        ValueError: If the network has no such weight.

    """
    weights = {plain_name(name): parameter.detach() for name, parameter in module.named_parameters()}
    for name, tensor in learned.items():
        if name not in weights or weights[name].shape != tensor.shape:
            raise ValueError(f"{what} is of {name!r} {tuple(tensor.shape)}, and the network has no such weight.")
    return {name: weights[name] for name in learned}


@contextmanager
def put_back(weights: Mapping[str, Tensor]) -> Iterator[None]:
    """While weights may be written to; then they are as they were."""
    kept = {name: weight.clone() for name, weight in weights.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                weights[name].copy_(value)
