"""Which weights are companded, those of sums over inputs, by the names of layers and of their own; and how."""

from torch import nn

from lightning_reg.engine.host.errors import MisconfigurationException, check_patterns
from lightning_reg.engine.host.modules import own_parameters
from lightning_reg.engine.host.names import Patterns, as_patterns, matches, plain_name
from lightning_reg.engine.host.user_functions import imported
from lightning_reg.engine.weights.multiplied import is_router, multiplied_weights, other_matrices
from lightning_reg.engine.weights.swap import named_weights
from lightning_reg.regularization.weight_compander.core import COMPANDINGS, Companding, companding_refusal

__all__ = ["companding", "names_said", "weights_to_compand"]


def companding(owner: object, fn: object, *, tried: bool = False) -> Companding:
    """The function of a name.

    Args:
        owner: Who asks; its class is named in messages.
        fn: One of ours, or the import path of a :class:`Companding`.
        tried: Whether it was asked for before, and is fine.

    Returns:
        The function.

    Raises:
        ValueError: If there is none of this name, or it is no companding.

    """
    if isinstance(fn, str) and fn in COMPANDINGS:
        return COMPANDINGS[fn]
    name = type(owner).__name__
    allowed = ", ".join(repr(choice) for choice in COMPANDINGS)
    wanted = f'must be one of {allowed}, or the import path of a Companding of your own ("my_project.functions.psi")'
    if not (isinstance(fn, str) and "." in fn):
        raise ValueError(f"{name}: `fn` {wanted}, got {fn!r}.")
    try:
        function = imported(fn)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name}: `fn` {wanted}, got {fn!r}: {error}.") from error
    if not isinstance(function, Companding):
        raise ValueError(f"{name}: `fn` {wanted}, got {fn!r}, which is a {type(function).__name__}.")
    wrong = "" if tried else companding_refusal(function)
    if wrong:
        raise ValueError(f"{name}: `fn`, {fn!r}, cannot compand: {wrong}.")
    return function


def weights_to_compand(
    owner: object, module: nn.Module, layers: Patterns, exclude: Patterns
) -> tuple[list[str], dict[str, list[str]]]:
    """Names of the weights to compand, and of those that ``"auto"`` leaves alone although they may multiply.

    Args:
        owner: Who asks; its class is named in messages.
        module: The user's module.
        layers: Patterns of names of layers and of weights, or ``"auto"``.
        exclude: Patterns of names of layers and of weights to leave alone.

    Returns:
        In the order of ``named_parameters()``; and by the reason, the same.

    Raises:
        MisconfigurationException: If a pattern matches nothing, or nothing is left.

    """
    companded, left, names = _weights(module)
    if layers == "auto":
        chosen = companded - left.keys()
    else:
        there = sorted(name for weight in companded for name in names[weight])
        check_patterns(owner, "layers", layers, there, "linear, convolution or attention layer")
        chosen = {weight for weight in companded if any(matches(name, layers) for name in names[weight])}
    check_patterns(owner, "exclude", exclude, sorted(set().union(*names.values())), "layer with parameters")
    excluded = {weight for weight in names if any(matches(name, exclude) for name in names[weight])}
    if not chosen - excluded:
        raise MisconfigurationException(
            f"{type(owner).__name__}: there is no weight to compand; `layers` {layers!r} and `exclude`"
            f" {as_patterns(exclude)} leave none. Linear, convolution and attention layers have some."
        )
    reasons: dict[str, list[str]] = {}
    for weight in names if layers == "auto" else ():
        if left.get(weight) and weight not in excluded:
            reasons.setdefault(left[weight], []).append(weight)
    return [weight for weight in names if weight in chosen - excluded], reasons


def names_said(names: list[str]) -> str:
    """Names for a line: the first three, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _weights(module: nn.Module) -> tuple[set[str], dict[str, str], dict[str, set[str]]]:
    """Weights of sums over inputs; why parameters are left alone; the names of all: own ones, and of their layers."""
    parameters = {id(p): name for name, p in named_weights(module).items()}
    summing: set[str] = set()
    left: dict[str, str] = {}  # "" where nobody would ask
    names: dict[str, set[str]] = {name: set() for name in parameters.values()}
    for path, layer in module.named_modules():
        multiplied, others, place = multiplied_weights(layer), other_matrices(layer), plain_name(f"{path}.")[:-1]
        router = "routers of experts" if multiplied and is_router(place, layer) else None
        for key, p in own_parameters(layer).items():
            if p is not None:
                name, prefix = parameters[id(p)], f"{place}." if path else ""
                names[name] |= {prefix + key} | ({place} if path else set())
                if key in multiplied:
                    summing.add(name)
                    left |= {name: router} if router else {}
                else:
                    left[name] = f"of {type(layer).__name__}, no linear layer known" if key in others else ""
    left |= {name: "shared with another layer" for name, why in left.items() if name in summing and not why}
    return summing, left, names
