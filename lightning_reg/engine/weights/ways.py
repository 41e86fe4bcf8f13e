"""How gradients come from weights whose latents are frozen to what is trained in their place.

Three ways with the same result. ``"at the layer"``: the weight needs no gradient, and factors get theirs from what the
layer gets and gives back. ``"released"``: the weight's gradient is turned into that of the parts as soon as it is
there, and let go, layer by layer. ``"kept"``: it is kept until the optimizer's step, because others want to see it.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_reg.engine.layers.named import LayerHook
from lightning_reg.engine.weights.layer_products import Use, use_of
from lightning_reg.engine.weights.places import Place, places_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.utils.hooks import RemovableHandle

__all__ = ["Frozen", "Way", "needs_gradient", "outside_readings", "ways_of"]


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


@contextmanager
def outside_readings(
    weights: Mapping[str, nn.Parameter], layers: Mapping[str, nn.Module], found: Callable[[str], None]
) -> "Iterator[None]":
    """Tells of weights that are read with gradient by something else than their layer, just before that happens.

    Code that is compiled runs as written meanwhile.

    Args:
        weights: By name.
        layers: The layer of each.
        found: Is given the name, at most once for each.

    """
    watch = _Watch({id(weight): name for name, weight in weights.items()}, found)
    handles: list[RemovableHandle] = []
    for name, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(_Enter(watch, name)))
        handles.append(layer.register_forward_hook(_Leave(watch, name), always_call=True))
    try:
        with torch.compiler.set_stance("force_eager"), watch:
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Watch(TorchFunctionMode):
    def __init__(self, names: Mapping[int, str], found: Callable[[str], None]) -> None:
        super().__init__()
        self._names, self._found = dict(names), found
        self.inside: set[str] = set()

    @override
    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[Any], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        named = getattr(func, "__name__", "")
        if torch.is_grad_enabled() and named not in _NO_READING and not _is_plain_attribute(func, named):
            for value in (*args, *kwargs.values()):
                for tensor in value if isinstance(value, list | tuple) else (value,):
                    name = self._names.get(id(tensor)) if isinstance(tensor, Tensor) else None
                    if name is not None and name not in self.inside:
                        del self._names[id(tensor)]
                        self._found(name)
        return func(*args, **kwargs)


_NO_READING = frozenset(
    {"detach", "detach_", "requires_grad_", "size", "dim", "numel", "stride", "is_floating_point", "is_contiguous",
     "element_size", "data_ptr", "is_complex", "__set__", "__delete__", "storage_offset", "get_device", "__len__",
     "nelement", "ndimension", "register_hook", "register_post_accumulate_grad_hook", "retain_grad", "__format__",
     "__repr__", "__hash__", "is_set_to", "is_same_size", "backward", "untyped_storage", "is_pinned", "has_names"}
)  # fmt: skip


def _is_plain_attribute(func: Callable[..., Any], named: str) -> bool:
    owner = getattr(func, "__self__", None)
    return named == "__get__" and getattr(owner, "__name__", "") not in ("T", "mT", "H", "mH", "real")


class _Enter(LayerHook):
    def __init__(self, watch: _Watch, name: str) -> None:
        self.watch, self.name = watch, name

    def __call__(self, layer: nn.Module, args: Any) -> None:
        self.watch.inside.add(self.name)


class _Leave(LayerHook):
    def __init__(self, watch: _Watch, name: str) -> None:
        self.watch, self.name = watch, name

    def __call__(self, layer: nn.Module, args: Any, output: Any) -> None:
        self.watch.inside.discard(self.name)
