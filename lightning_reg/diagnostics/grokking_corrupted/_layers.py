"""The layers whose weights are sequences over residues."""

from torch import Tensor, nn

from lightning_reg.engine.host.modules import own_parameters
from lightning_reg.engine.host.names import plain_name

__all__ = ["check_shapes", "input_view", "weight_of"]


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
    layers = {plain_name(path): layer for path, layer in module.named_modules()}
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


def check_shapes(
    owner: str, names: tuple[str, str | None], inputs: Tensor, outputs: Tensor | None, blocks: int
) -> None:
    """Refuses weights that are not those of neurons between residues.

    Args:
        owner: Who asks, for errors.
        names: Of the input and the output layer.
        inputs: What :func:`input_view` gives, ``(N, blocks * p)``.
        outputs: ``(p, N)``; ``None`` where they are not read.
        blocks: Numbers that the input layer reads.

    Raises:
        ValueError: If they do not fit each other.

    """
    if outputs is None:
        fits, other, wanted = inputs.shape[1] % blocks == 0, "does", "N neurons of blocks * p inputs"
    else:
        fits = inputs.shape[0] == outputs.shape[1] and inputs.shape[1] == blocks * outputs.shape[0]
        other = f"and {names[1]!r} of weight {tuple(outputs.shape)} do"
        wanted = "N neurons of blocks * p inputs, and (p, N)"
    if not fits:
        raise ValueError(
            f"{owner}: {names[0]!r} with {inputs.shape[0]} neurons of {inputs.shape[1]} inputs {other} not fit:"
            f" {wanted}, with blocks={blocks}."
        )
