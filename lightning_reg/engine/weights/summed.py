"""Which weights a technique acts on: those of sums over inputs, by the names of layers and of their own."""

from torch import nn

from lightning_reg.engine.host.errors import MisconfigurationException, check_patterns
from lightning_reg.engine.host.modules import own_parameters
from lightning_reg.engine.host.names import Patterns, as_patterns, matches, plain_name
from lightning_reg.engine.weights.multiplied import is_router, multiplied_weights, other_matrices
from lightning_reg.engine.weights.swap import named_weights

__all__ = ["all_names", "names_said", "summed_weights"]


def summed_weights(
    owner: object, module: nn.Module, layers: Patterns, exclude: Patterns, verb: str, *, any_matrix: bool = False
) -> tuple[list[str], dict[str, list[str]]]:
    """Names of the weights to act on, and of those that ``"auto"`` leaves alone although they may multiply.

    Args:
        owner: Who asks, with the arguments ``layers`` and ``exclude``; its class is named in messages.
        module: The user's module.
        layers: Patterns of names of layers and of weights, or ``"auto"``.
        exclude: Patterns of names of layers and of weights to leave alone.
        verb: What is done to the weights, for messages.
        any_matrix: Whether patterns may name any parameter of two dimensions or more: embeddings, stacked experts.

    Returns:
        In the order of ``named_parameters()``; and by the reason, the same.

    Raises:
        MisconfigurationException: If a pattern matches nothing, or nothing is left.

    """
    summing, left, names = _weights(module)
    if layers == "auto":
        chosen = summing - left.keys()
    else:
        among = {n for n, p in named_weights(module).items() if p.dim() > 1} if any_matrix else summing
        there = sorted(name for weight in among for name in names[weight])
        kind = "weight of two dimensions or layer with one" if any_matrix else "linear, convolution or attention layer"
        check_patterns(owner, "layers", layers, there, kind)
        chosen = {weight for weight in among if any(matches(name, layers) for name in names[weight])}
    check_patterns(owner, "exclude", exclude, sorted(set().union(*names.values())), "layer with parameters")
    excluded = {weight for weight in names if any(matches(name, exclude) for name in names[weight])}
    if not chosen - excluded:
        raise MisconfigurationException(
            f"{type(owner).__name__}: there is no weight to {verb}; `layers` {layers!r} and `exclude`"
            f" {as_patterns(exclude)} leave none. Linear, convolution and attention layers have some."
        )
    reasons: dict[str, list[str]] = {}
    for weight in names if layers == "auto" else ():
        if left.get(weight) and weight not in excluded:
            reasons.setdefault(left[weight], []).append(weight)
    return [weight for weight in names if weight in chosen - excluded], reasons


def all_names(module: nn.Module) -> dict[str, set[str]]:
    """All names of each parameter, by that in ``named_parameters()``: its own, and of the layers that hold it."""
    parameters = {id(p): name for name, p in named_weights(module).items()}
    names: dict[str, set[str]] = {name: set() for name in parameters.values()}
    for path, layer in module.named_modules():
        place = plain_name(f"{path}.")[:-1]
        for key, p in own_parameters(layer).items():
            if p is not None:
                names[parameters[id(p)]] |= {f"{place}.{key}", place} if path else {key}
    return names


def names_said(names: list[str]) -> str:
    """Names for a line: the first three, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _weights(module: nn.Module) -> tuple[set[str], dict[str, str], dict[str, set[str]]]:
    """Weights of sums over inputs; why parameters are left alone; the names of all: own ones, and of their layers."""
    parameters = {id(p): name for name, p in named_weights(module).items()}
    summing: set[str] = set()
    left: dict[str, str] = {}  # "" where nobody would ask
    for path, layer in module.named_modules():
        multiplied, others, place = multiplied_weights(layer), other_matrices(layer), plain_name(f"{path}.")[:-1]
        router = "routers of experts" if multiplied and is_router(place, layer) else None
        for key, p in own_parameters(layer).items():
            if p is not None:
                name = parameters[id(p)]
                if key in multiplied:
                    summing.add(name)
                    left |= {name: router} if router else {}
                else:
                    left[name] = f"of {type(layer).__name__}, no linear layer known" if key in others else ""
    left |= {name: "shared with another layer" for name, why in left.items() if name in summing and not why}
    return summing, left, all_names(module)
