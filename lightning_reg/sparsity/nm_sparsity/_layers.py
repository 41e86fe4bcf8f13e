"""Which weights of a network become sparse, in which pattern, and why the others do not.

Patterns of names are matched with the name of a weight, of its layer and of every module around that: ``"net.head"``
takes all the weights in there.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from lightning_reg.engine.host.arguments import check_choice, check_number
from lightning_reg.engine.host.errors import MisconfigurationException, check_patterns
from lightning_reg.engine.host.modules import TransposedConvolution, own_parameters
from lightning_reg.engine.host.names import Patterns, matches
from lightning_reg.engine.layers.named import named_layers
from lightning_reg.engine.weights.multiplied import is_router, multiplied_weights, other_matrices
from lightning_reg.engine.weights.swap import named_weights
from lightning_reg.sparsity.nm_sparsity.core import patterns_of

__all__ = ["Choice", "Weight", "check_apart", "check_groups", "choose_weights", "weights_table"]

_RECIPES = ("mdgf_linear", "mdgf_exp", "sdgf_stepwise", "sdgf_geometric", "srste", "ste", "one_shot")
_ALL_KEPT = "the pattern keeps all weights"
_OTHER: dict[str, Literal["in", "out"]] = {"in": "out", "out": "in"}


@dataclass(frozen=True)
class Choice:
    """What the user asked for, see :class:`NMSparsity`.

    Args:
        n: Weights kept.
        m: Length of a group.
        dim: Direction of the groups.
        layers: Patterns of names, or ``"auto"``.
        exclude: Patterns of names.
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
        patterns: N and M of all patterns that it goes through, the target last.
        why_dense: Why it stays dense; "" if it becomes sparse.
        dim: Direction of the groups in a weight ``(out, in)``: the other one than asked for where it is ``(in, out)``.
        multiplies: Whether it is known to multiply inputs.

    """

    name: str
    shape: tuple[int, ...]
    n: int
    m: int
    patterns: tuple[tuple[int, int], ...]
    why_dense: str = ""
    dim: Literal["in", "out"] = "in"
    multiplies: bool = True


def check_groups(owner: object, choice: Choice) -> None:
    """Refuses arguments outside their range.

    Args:
        owner: Whose they are; its class is named in messages.
        choice: The arguments.

    Raises:
        ValueError: Naming class, argument, range and value.

    """
    name = type(owner).__name__
    check_choice(owner, "recipe", choice.recipe, _RECIPES)
    check_choice(owner, "dim", choice.dim, ("in", "out"))
    check_choice(owner, "on_indivisible", choice.on_indivisible, ("error", "skip"))
    check_number(owner, "geometric_k", choice.geometric_k, low=1, integer=True)
    if choice.geometric_k & (choice.geometric_k - 1):
        raise ValueError(f"{name}: `geometric_k` must be a power of two, got {choice.geometric_k}.")
    for pattern, numbers in choice.patterns.items():
        if len(numbers) != 2:
            raise ValueError(f"{name}: `patterns` must map to [n, m], got {pattern!r}: {numbers!r}.")
    others = [("patterns", "patterns", n, m) for n, m in choice.patterns.values()]
    for of_n, of_m, n, m in [("n", "m", choice.n, choice.m), *others]:
        check_number(owner, of_m, m, low=1, integer=True)
        check_number(owner, of_n, n, low=1, high=m, integer=True)
        if choice.recipe == "sdgf_stepwise" and (m % n or (m // n) & (m // n - 1)):
            raise ValueError(f"{name}: `{of_n}` must be m over a power of two for sdgf_stepwise, got n={n} with m={m}.")


def choose_weights(module: nn.Module, choice: Choice, owner: object) -> list[Weight]:
    """Every weight of a linear, convolution or attention layer, with what becomes of it, and others that stay dense.

    Args:
        module: The user's module.
        choice: What the user asked for.
        owner: Who asks; its class is named in errors.

    Returns:
        In the order of the layers.

    Raises:
        MisconfigurationException: If a pattern matches no layer, if nothing becomes sparse, or if groups do not fit
            and that is to be an error.

    """
    summed = {layer: _summed(submodule) for layer, submodule in named_layers(module).items()}
    candidates = list(_candidates(module, summed))
    _check_names(choice, [parameter for _, parameter, *_ in candidates], owner)
    ends = _ends(module, summed) if choice.layers == "auto" else {}
    users = _users(module, summed)
    parameters = {id(p): name for name, p in named_weights(module).items()}
    weights = []
    for layer, parameter, weight, left_out in candidates:
        n, m = _pattern_for(choice, parameter)
        why = left_out or _why_dense(choice, layer, parameter, ends)
        why = why or _unusable(weight, layer, users.get(id(weight), []), parameters.get(id(weight), ""), parameter)
        shape = tuple(weight.shape) if isinstance(weight, nn.Parameter) and not _is_lazy(weight) else ()
        dim = choice.dim if summed[layer].get(parameter.rpartition(".")[2], 1) else _OTHER[choice.dim]
        length = 0 if why else _length(shape, parameter, dim)
        if not why and (length < m or length % m):
            size = f"{length} {'in' if choice.dim == 'in' else 'out'}"
            why = f"too small: {size} for groups of {m}" if length < m else f"not divisible: {size} by {m}"
            if choice.on_indivisible == "error":
                raise MisconfigurationException(
                    f"{type(owner).__name__}: {parameter!r} of shape {shape} is {why}. Exclude it, or write"
                    ' on_indivisible="skip".'
                )
        why = why or (_ALL_KEPT if n == m else "")
        patterns = () if why else _patterns(choice, n, m, length)
        weights.append(Weight(parameter, shape, n, m, patterns, why, dim, multiplies=not left_out))
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


def weights_table(weights: Sequence[Weight], settings: str, permutations: Mapping[str, object]) -> Table:
    """The table at the start of the fit: each weight with its pattern, or with the reason why it stays dense.

    Args:
        weights: All weights.
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
        patterns = dict.fromkeys(f"{n}:{m}" for n, m in weight.patterns)
        said = f"dense ({weight.why_dense})" if weight.why_dense else " > ".join(patterns)
        channels = [escape(str(permutations.get(weight.name, "")))] if permutations else []
        table.add_row(escape(weight.name), "x".join(map(str, weight.shape)), escape(said), *channels)
    return table


def _candidates(
    module: nn.Module, summed: Mapping[str, Mapping[str, int]]
) -> Iterator[tuple[str, str, Tensor | None, str]]:
    """Layer, name of the parameter, its value, and why it is left out, for all that could become sparse or seem to."""
    for layer, submodule in named_layers(module).items():
        own = own_parameters(submodule)
        for name in summed[layer]:
            if name == "weight" or own.get(name) is not None:
                yield layer, f"{layer}.{name}", own.get(name), ""
        others = {n: p for n, p in own.items() if n == "weight" and isinstance(submodule, TransposedConvolution)}
        for name, p in (others or other_matrices(submodule)).items():
            yield layer, f"{layer}.{name}", p, f"of {type(submodule).__name__}, which is no linear layer known"


def _summed(layer: nn.Module) -> dict[str, int]:
    return {} if isinstance(layer, TransposedConvolution) else multiplied_weights(layer)


def _matches(patterns: Patterns, parameter: str) -> bool:
    return any(matches(name, patterns) for name in _names(parameter))


def _names(parameter: str) -> list[str]:
    """Names of the modules around a parameter, from the outside in, and its own."""
    parts = parameter.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]


def _check_names(choice: Choice, parameters: Sequence[str], owner: object) -> None:
    names = dict.fromkeys(name for parameter in parameters for name in _names(parameter))
    given = {"layers": None if choice.layers == "auto" else choice.layers, "exclude": choice.exclude}
    for argument, patterns in {**given, "patterns": list(choice.patterns)}.items():
        check_patterns(owner, argument, patterns, names, "linear, convolution or attention layer")


def _pattern_for(choice: Choice, parameter: str) -> tuple[int, int]:
    for pattern, (n, m) in choice.patterns.items():
        if _matches(pattern, parameter):
            return n, m
    return choice.n, choice.m


def _why_dense(choice: Choice, layer: str, parameter: str, ends: Mapping[str, str]) -> str:
    if _matches(choice.exclude, parameter):
        return "excluded"
    if choice.layers == "auto":
        return ends.get(layer, "")
    return "" if _matches(choice.layers, parameter) else "not in `layers`"


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


def _users(module: nn.Module, summed: Mapping[str, Mapping[str, int]]) -> dict[int, list[tuple[str, bool]]]:
    """Which layers hold each parameter, and whether they are of a kind that could become sparse."""
    users: dict[int, list[tuple[str, bool]]] = {}
    for layer, submodule in named_layers(module).items():
        for parameter in own_parameters(submodule).values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append((layer, bool(summed[layer])))
    return users


def _ends(module: nn.Module, summed: Mapping[str, Mapping[str, int]]) -> dict[str, str]:
    """The first layer and the head, in the order in which the module registers its layers, and routers of experts."""
    routers = {n: "router" for n, layer in named_layers(module).items() if summed[n] and is_router(n, layer)}
    layers = [
        (name, layer)
        for name, layer in named_layers(module).items()
        if (summed[name] or isinstance(layer, nn.Embedding | nn.EmbeddingBag))
        and any(p.requires_grad for p in layer.parameters(recurse=False))
        and name not in routers
    ]
    ends = routers | {name: "first layer" for name, _ in layers[:1]}
    return ends | {name: "head" for name, layer in layers[-1:] if not isinstance(layer, nn.MultiheadAttention)}


def _is_lazy(weight: Tensor) -> bool:
    return isinstance(weight, nn.UninitializedParameter)


def _length(shape: tuple[int, ...], parameter: str, dim: str) -> int:
    # The three projections of an attention lie above one another; a group must not reach from one into the next.
    if dim == "out":
        return shape[0] // 3 if parameter.endswith("in_proj_weight") else shape[0]
    return shape[1]


def _patterns(choice: Choice, n: int, m: int, length: int) -> tuple[tuple[int, int], ...]:
    """A geometric frame that is too long for the weight is the longest one that fits."""
    patterns, k = patterns_of(choice.recipe, n, m, choice.geometric_k), choice.geometric_k
    if choice.recipe != "sdgf_geometric":
        return tuple(patterns)
    while k > 1 and length % (k * m):
        k //= 2
    return tuple((min(a, k * n), min(b, k * m)) for a, b in patterns)


def _check_any(weights: Sequence[Weight], owner: object) -> None:
    if any(w.why_dense in ("", _ALL_KEPT) for w in weights):
        return
    reasons = "".join(f"\n  {w.name}: {w.why_dense}" for w in weights) or " There is no linear or convolution layer."
    raise MisconfigurationException(
        f"{type(owner).__name__}: no weight can become sparse.{reasons}\nName layers with `layers=...`, as in"
        " `module.named_modules()`."
    )
