"""How gradients come from weights whose latents are frozen to what is trained in their place.

Three ways with the same result. ``"at the layer"``: within its layer the weight is a constant, and factors get their
gradients from what the layer gets and gives back. ``"released"``: the weight's gradient is turned into that of the
parts as soon as it is there, and let go, layer by layer; so is that of what reads a weight outside of its layer.
``"kept"``: it is kept until the optimizer's step, because others want to see it.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from lightning_reg.engine.weights.layer_products import Use, use_of
from lightning_reg.engine.weights.places import Place, places_of

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Frozen", "Way", "needs_gradient", "ways_of"]


class Way(NamedTuple):
    """How the gradient of a weight comes to its parts.

    Args:
        kind: ``"at the layer"``, ``"released"`` or ``"kept"``.
        why: Why it is not taken at the layer, as a clause.
        place: The layer, where it is taken there.
        use: What the layer does.

    """

    kind: str
    why: str = ""
    place: Place | None = None
    use: Use | None = None


def ways_of(module: nn.Module, names: Sequence[str], seen_by: str, *, has_factors: bool) -> dict[str, Way]:
    """The way of each weight.

    Args:
        module: The user's module.
        names: Names of the weights.
        seen_by: Who wants to see gradients of weights, a class's name; "" for nobody.
        has_factors: Whether the map of these weights is a product of two factors.

    Returns:
        By name.

    """
    places = places_of(module) if has_factors and not seen_by else {}
    return {name: _way(places.get(name, []), seen_by, has_factors) for name in names}


def _way(places: Sequence[Place], seen_by: str, has_factors: bool) -> Way:
    if seen_by:
        return Way("kept", f"{seen_by} acts on it or its gradient")
    if not has_factors:
        return Way("released", "its map is no product of factors")
    if len(places) != 1:
        return Way("released", "several layers share it")
    place = places[0]
    use = None if place.in_attention else use_of(place.layer, place.key)
    if use is None:
        return Way("released", f"{type(place.layer).__name__} is no plain linear, convolution or embedding layer")
    return Way("at the layer", "", place, use)


class Frozen:
    """Parameters that need no gradient for a time.

    Args:
        parameters: Which ones.

    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._were = [(parameter, parameter.requires_grad) for parameter in parameters]
        for parameter, needed in self._were:
            vars(parameter)[_NOTE] = needed
            parameter.requires_grad_(False)

    @property
    def ids(self) -> set[int]:
        """Their identities."""
        return {id(parameter) for parameter, _ in self._were}

    @contextmanager
    def lifted(self) -> "Iterator[None]":
        """While they are as they were."""
        now = [parameter.requires_grad for parameter, _ in self._were]
        for parameter, needed in self._were:
            parameter.requires_grad_(needed)
        yield
        for (parameter, _), needed in zip(self._were, now, strict=True):
            parameter.requires_grad_(needed)

    def undo(self) -> None:
        """Lets them be as they were."""
        for parameter, needed in self._were:
            vars(parameter).pop(_NOTE, None)
            parameter.requires_grad_(needed)
        self._were = []


# A parameter that is frozen for a time has in here whether it needed a gradient before.
_NOTE = "needed_a_gradient"


def needs_gradient(parameter: nn.Parameter) -> bool:
    """Whether a parameter needs a gradient when it is not frozen for a time."""
    needed: bool = vars(parameter).get(_NOTE, parameter.requires_grad)
    return needed
