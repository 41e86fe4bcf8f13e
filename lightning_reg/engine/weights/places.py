"""Where parameters are, and how the layers there multiply by them."""

from typing import NamedTuple

from torch import nn

from lightning_reg.engine.host.modules import own_parameters
from lightning_reg.engine.host.names import plain_name
from lightning_reg.engine.weights.factors import Layout
from lightning_reg.engine.weights.multiplied import multiplied_weights

__all__ = ["Place", "layout_in", "layouts_of", "places_of"]


def layout_in(layer: nn.Module, key: str) -> Layout | None:
    """How a layer's own parameter lies as a matrix of outputs by inputs.

    Args:
        layer: Any layer.
        key: Name of its own parameter.

    Returns:
        The layout; ``None`` if the layer is not known to multiply by it.

    """
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and key == "weight":
        return Layout(turned=True)
    summed = multiplied_weights(layer).get(key)
    return None if summed is None else Layout(turned=summed == 0)


class Place(NamedTuple):
    """Where a parameter is: a layer, and its name there."""

    layer: nn.Module
    key: str
    in_attention: bool


def places_of(module: nn.Module) -> dict[str, list[Place]]:
    """All places of each parameter, by its name as in ``named_parameters()``."""
    names = {id(p): plain_name(name) for name, p in module.named_parameters()}
    places: dict[str, list[Place]] = {name: [] for name in names.values()}
    inside = {id(child) for layer in module.modules() if _reads_its_children(layer) for child in layer.children()}
    for layer in module.modules():
        for key, parameter in own_parameters(layer).items():
            if parameter is not None:
                places[names[id(parameter)]].append(Place(layer, key, id(layer) in inside))
    return places


def _reads_its_children(layer: nn.Module) -> bool:
    return isinstance(layer, nn.MultiheadAttention)  # it gives the weight of its last layer to a function


def layouts_of(module: nn.Module) -> dict[str, Layout]:
    """How each weight that a known layer multiplies by lies, by name; a shared one as in a layer that sums over it."""
    found: dict[str, Layout] = {}
    for name, places in places_of(module).items():
        layouts = [layout for place in places if (layout := layout_in(place.layer, place.key)) is not None]
        tables = [isinstance(place.layer, nn.Embedding | nn.EmbeddingBag) for place in places]
        if layouts:
            found[name] = layouts[0] if all(tables) else next((at for at in layouts if not at.turned), layouts[0])
    return found
