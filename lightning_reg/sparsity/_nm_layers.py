"""Which weights of a network become sparse, in which pattern, and why the others do not."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.names import near_names
from lightning_reg.engine.layers.named import named_layers
from lightning_reg.engine.weights.swap import named_weights
from lightning_reg.sparsity._nm_masks import patterns_of

__all__ = ["Choice", "Weight", "check_apart", "choose_weights", "weights_table"]

_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_ALL_KEPT = "the pattern keeps all weights"


@dataclass(frozen=True)
class Choice:
    """What the user asked for, see :class:`NMSparsity`.

    Args:
        n: Weights kept.
        m: Length of a group.
        dim: Direction of the groups.
        layers: Patterns, or ``"auto"``.
        exclude: Patterns.
        patterns: N and M by pattern.
        recipe: The recipe.
        geometric_k: First multiple of the geometric recipe.
        on_indivisible: What to do with weights that the groups do not fit.

    """

    n: int
    m: int
    dim: Literal["in", "out"]
    layers: str | list[str]
    exclude: list[str]
    patterns: dict[str, list[int]]
    recipe: str
    geometric_k: int
    on_indivisible: Literal["error", "skip"]


@dataclass(frozen=True)
class Weight:
    """One weight, sparse or not.

    Args:
        name: Name of the parameter.
        shape: Its shape.
        n: Weights kept of the target pattern.
        m: Length of a group of the target pattern.
        k: First multiple of the geometric recipe that fits.
        why_dense: Why it stays dense; "" if it becomes sparse.

    """

    name: str
    shape: tuple[int, ...]
    n: int
    m: int
    k: int = 1
    why_dense: str = ""

    def patterns(self, choice: Choice) -> list[tuple[int, int]]:
        """Patterns that the weight goes through; a geometric frame too long for it is the longest one that fits."""
        frames = patterns_of(choice.recipe, self.n, self.m, choice.geometric_k)
        if choice.recipe != "sdgf_geometric":
            return frames
        return [(min(n, self.k * self.n), min(m, self.k * self.m)) for n, m in frames]


def choose_weights(module: nn.Module, choice: Choice, owner: str) -> list[Weight]:
    """Every weight of a linear, convolution or attention layer, with what becomes of it.

    Args:
        module: The user's module.
        choice: What the user asked for.
        owner: Class to name in errors.

    Returns:
        In the order of the layers.

    Raises:
        MisconfigurationException: If a pattern matches no layer, if nothing becomes sparse, or if groups do not fit
            and that is to be an error.

    """
    candidates = list(_candidates(module))
    _check_patterns(choice, sorted({layer for layer, _, _ in candidates}), owner)
    ends = _ends(module) if choice.layers == "auto" else {}
    users = _users(module)
    parameters = {id(p): name for name, p in named_weights(module).items()}
    weights = []
    for layer, parameter, weight in candidates:
        n, m = _pattern_for(choice, layer, parameter)
        why = _why_dense(choice, layer, parameter, ends)
        why = why or _unusable(weight, layer, users.get(id(weight), []), parameters.get(id(weight), ""), parameter)
        shape = tuple(weight.shape) if isinstance(weight, nn.Parameter) and not _is_lazy(weight) else ()
        length = 0 if why else _length(shape, parameter, choice.dim)
        if not why and (length < m or length % m):
            size = f"{length} {'in' if choice.dim == 'in' else 'out'}"
            why = f"too small: {size} for groups of {m}" if length < m else f"not divisible: {size} by {m}"
            if choice.on_indivisible == "error":
                raise MisconfigurationException(
                    f'{owner}: {parameter!r} of shape {shape} is {why}. Exclude it, or write on_indivisible="skip".'
                )
        why = why or (_ALL_KEPT if n == m else "")
        weights.append(Weight(parameter, shape, n, m, 1 if why else _fitting_k(length, m, choice.geometric_k), why))
    _check_any(weights, owner)
    return weights


def check_apart(owner: str, mine: Sequence[Weight], others: Sequence[Weight]) -> None:
    """Refuses two instances that make the same weight sparse.

    Args:
        owner: Class to name.
        mine: Sparse weights of the one.
        others: Sparse weights of the other.

    Raises:
        MisconfigurationException: If a weight is in both.

    """
    names = {weight.name for weight in others}
    shared = [weight.name for weight in mine if weight.name in names]
    if shared:
        raise MisconfigurationException(
            f"{owner} and {owner} cannot stand together: both make {shared[0]!r} sparse. Give them other layers with"
            " `layers=...` or `exclude=...`."
        )


def weights_table(
    weights: Sequence[Weight], choice: Choice, settings: str, permutations: Mapping[str, object]
) -> Table:
    """The table at the start of the fit: each weight with its pattern, or with the reason why it stays dense.

    Args:
        weights: All weights.
        choice: What the user asked for.
        settings: A line below.
        permutations: What became of the input channels, by name; empty if nothing was to be permuted.

    Returns:
        A rich table.

    """
    sparse = sum(not w.why_dense for w in weights)
    table = Table(title=f"N:M sparsity: {sparse} of {len(weights)} weights", title_justify="left")
    table.caption, table.caption_justify = escape(settings), "left"
    for column in ("weight", "shape", "pattern", *(["input channels"] if permutations else [])):
        table.add_column(column, overflow="fold")
    for weight in weights:
        patterns = dict.fromkeys(f"{n}:{m}" for n, m in weight.patterns(choice))
        said = f"dense ({weight.why_dense})" if weight.why_dense else " > ".join(patterns)
        channels = [escape(str(permutations.get(weight.name, "")))] if permutations else []
        table.add_row(escape(weight.name), "x".join(map(str, weight.shape)), escape(said), *channels)
    return table


def _candidates(module: nn.Module) -> Iterator[tuple[str, str, Tensor | None]]:
    """Layer, name of the parameter and its value, for all that could become sparse."""
    for layer, submodule in named_layers(module).items():
        if isinstance(submodule, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            yield layer, f"{layer}.weight", submodule._parameters.get("weight")
        elif isinstance(submodule, nn.MultiheadAttention):
            for name in _ATTENTION:
                weight = submodule._parameters.get(name)
                if weight is not None:
                    yield layer, f"{layer}.{name}", weight


def _matches(pattern: str, layer: str, parameter: str = "") -> bool:
    return re.search(pattern, layer) is not None or re.search(pattern, parameter) is not None


def _check_patterns(choice: Choice, layers: Sequence[str], owner: str) -> None:
    named = [] if choice.layers == "auto" else _as_list(choice.layers)
    given = {"layers": named, "exclude": choice.exclude, "patterns": list(choice.patterns)}
    for argument, patterns in given.items():
        for pattern in patterns:
            names = [*layers, *(f"{layer}.{weight}" for layer in layers for weight in ("weight", *_ATTENTION))]
            if not any(re.search(pattern, name) for name in names):
                raise MisconfigurationException(
                    f"{owner}: `{argument}` has {pattern!r}, which matches no linear, convolution or attention layer."
                    f" Near names: {near_names(pattern, layers)}. Layers are named as in `module.named_modules()`."
                )


def _pattern_for(choice: Choice, layer: str, parameter: str) -> tuple[int, int]:
    for pattern, (n, m) in choice.patterns.items():
        if _matches(pattern, layer, parameter):
            return n, m
    return choice.n, choice.m


def _why_dense(choice: Choice, layer: str, parameter: str, ends: Mapping[str, str]) -> str:
    if any(_matches(pattern, layer, parameter) for pattern in choice.exclude):
        return "excluded"
    if choice.layers == "auto":
        return ends.get(layer, "")
    named = any(_matches(pattern, layer, parameter) for pattern in _as_list(choice.layers))
    return "" if named else "not in `layers`"


def _unusable(weight: Tensor | None, layer: str, users: Sequence[tuple[str, bool]], name: str, parameter: str) -> str:
    if not isinstance(weight, nn.Parameter):
        return "computed from other parameters"
    if _is_lazy(weight):
        return "has no shape yet"
    if not weight.requires_grad:
        return "frozen"
    others = [user for user, sparsifiable in users if user != layer and not sparsifiable]
    if others:
        return f"shared with {others[0]}"
    return "" if name == parameter else f"same weight as {name}"


def _users(module: nn.Module) -> dict[int, list[tuple[str, bool]]]:
    """Which layers hold each parameter, and whether they are of a kind that could become sparse."""
    kinds = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.MultiheadAttention
    users: dict[int, list[tuple[str, bool]]] = {}
    for layer, submodule in named_layers(module).items():
        for parameter in submodule._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append((layer, isinstance(submodule, kinds)))
    return users


def _ends(module: nn.Module) -> dict[str, str]:
    """The first layer and the head, in the order in which the module registers its layers."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention, nn.Embedding, nn.EmbeddingBag)
    layers = [
        (name, layer)
        for name, layer in named_layers(module).items()
        if isinstance(layer, kinds) and any(p.requires_grad for p in layer.parameters(recurse=False))
    ]
    ends = {name: "first layer" for name, _ in layers[:1]}
    return ends | {name: "head" for name, layer in layers[-1:] if not isinstance(layer, nn.MultiheadAttention)}


def _is_lazy(weight: Tensor) -> bool:
    return isinstance(weight, nn.UninitializedParameter)


def _length(shape: tuple[int, ...], parameter: str, dim: str) -> int:
    # The three projections of an attention lie above one another; a group must not reach from one into the next.
    if dim == "out":
        return shape[0] // 3 if parameter.endswith("in_proj_weight") else shape[0]
    return shape[1]


def _fitting_k(length: int, m: int, k: int) -> int:
    while k > 1 and length % (k * m):
        k //= 2
    return k


def _check_any(weights: Sequence[Weight], owner: str) -> None:
    if any(w.why_dense in ("", _ALL_KEPT) for w in weights):
        return
    reasons = "".join(f"\n  {w.name}: {w.why_dense}" for w in weights) or " There is no linear or convolution layer."
    raise MisconfigurationException(
        f"{owner}: no weight can become sparse.{reasons}\nName layers with `layers=...`, as in"
        " `module.named_modules()`."
    )


def _as_list(patterns: str | list[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else patterns
