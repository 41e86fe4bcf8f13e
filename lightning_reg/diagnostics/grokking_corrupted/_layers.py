"""The layers whose weights are sequences over residues."""

from torch import Tensor, nn

from lightning_reg.engine.host.modules import own_parameters

__all__ = ["input_view", "weight_of"]


def weight_of(module: nn.Module, name: str, owner: str) -> tuple[nn.Module, Tensor]:
    """A linear layer or an embedding, and its weight.

    Args:
        module: The network.
        name: The layer's name in ``module.named_modules()``.
        owner: Who asks, for errors.

    Returns:
        The layer and its own weight, detached.

    Raises:
        ValueError: If there is no such layer, or it is of another kind.

    """
    layers = dict(module.named_modules())
    if name not in layers:
        raise ValueError(f"{owner}: there is no layer {name!r}; there are {', '.join(filter(None, layers))}.")
    weight = own_parameters(layers[name]).get("weight")
    if not isinstance(layers[name], nn.Linear | nn.Embedding) or weight is None:
        raise ValueError(
            f"{owner}: layer {name!r} must be a Linear or an Embedding with a weight of its own, got"
            f" {type(layers[name]).__name__}. Name the layer that reads the residues, or the last one."
        )
    return layers[name], weight.detach()


def input_view(layer: nn.Module, weight: Tensor) -> Tensor:
    """The input weights with a row for each neuron; an embedding has a column for each. A view."""
    return weight.T if isinstance(layer, nn.Embedding) else weight
