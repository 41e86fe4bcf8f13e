"""Networks of smaller layers from what Maestro has trained: pairs of plain layers, ranks for a budget, FLOPs."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_reg.engine.host.modules import Convolution, own_parameters
from lightning_reg.engine.host.names import plain_name
from lightning_reg.engine.weights.places import Place, places_of
from lightning_reg.finetuning.maestro._matrices import matrices_in
from lightning_reg.finetuning.maestro.core import low_rank_product

if TYPE_CHECKING:
    from lightning_reg.finetuning.maestro.maestro import MaestroLowRank

__all__ = ["export_low_rank", "forward_flops", "greedy_ranks", "low_rank_layers_"]


def export_low_rank(
    technique: "MaestroLowRank", model: nn.Module, ranks: Mapping[str, int] | None = None, prefix: str = ""
) -> tuple[nn.Module, dict[str, int]]:
    """A copy of a trained network in which layers are pairs of smaller ones, wherever that is less work.

    A linear layer becomes ``nn.Sequential`` of two, the first without a bias; a convolution one of the same kernel,
    stride and padding to r channels (for each group), and one of a single point. Code that reads ``layer.weight`` (its
    type, or all of it) or the sizes of the layer finds those of the whole layer. That is less work for
    ``r < m n / (m + n)``. Other layers stay whole, of the same rank: those of too high a rank, attention's, transposed
    convolutions, embeddings, stacks of experts, layers with a forward pass of their own.

    Args:
        technique: After its fit.
        model: That was trained, or a network in it.
        ranks: A smaller rank of some weights, by the names of ``technique.ranks``; their first columns are left.
            Without any the copy computes what the network does, but for rounding.
        prefix: Name of the network in the module of the fit (``"model"``).

    Returns:
        The copy, of plain layers of torch; and the rank of each layer that became a pair, by its name. With these
        :func:`low_rank_layers_` makes room for the copy's ``state_dict`` in a network as it was.

    Raises:
        ValueError: If nothing was trained, if the network has not what was trained, or if a rank is outside of
            1 to the present one.

    """
    start = f"{prefix}." if prefix else ""
    trained, kept = _trained(technique, model, start), _checked_ranks(technique, ranks or {})
    small = copy.deepcopy(model)
    weights, matrices = _named(small), matrices_in(small, [name.removeprefix(start) for name in trained])
    names = {id(layer): name for name, layer in small.named_modules()}
    layers: dict[str, int] = {}
    pairs: dict[str, str] = {}
    for name, places in places_of(small).items():
        whole = start + name
        if whole in trained and kept[whole] <= _most_columns(technique, whole, places):
            layers |= {names[id(place.layer)]: kept[whole] for place in places}
            pairs[name] = names[id(places[0].layer)]
    low_rank_layers_(small, layers)
    with torch.no_grad():
        for name, matrix in matrices.items():
            left, right = (part[..., : kept[start + name]] for part in trained[start + name])
            if name in pairs:
                first, second = (small.get_submodule(f"{pairs[name]}.{i}").get_parameter("weight") for i in (0, 1))
                # For each group the kernels of its own channels.
                first.copy_(right.mT.reshape(first.shape))
                second.copy_(left.reshape(second.shape))
            else:
                weights[name].copy_(matrix.weight(low_rank_product(left, right), weights[name].shape))
    return small, layers


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    return {plain_name(name): parameter for name, parameter in model.named_parameters()}


def _trained(technique: "MaestroLowRank", model: nn.Module, start: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Both factors of each weight, once it is sure that the network has their product."""
    weights, own = _named(model), technique.latents.own
    if not own:
        raise ValueError("export_low_rank: nothing was trained yet. Export after the fit.")
    missing = [name for name in own if not name.startswith(start) or name.removeprefix(start) not in weights]
    if missing:
        raise ValueError(f"export_low_rank: {missing[0]!r} was trained, and is not in the given network.")
    found = {}
    for name, matrices in matrices_in(model, [name.removeprefix(start) for name in own]).items():
        weight = weights[name].detach()
        left, right = (own[start + name][part].detach().to(weight.device) for part in ("U", "V"))
        product = matrices.weight(low_rank_product(left, right), weight.shape)
        tolerance = 64 * torch.finfo(weight.dtype).eps * float(product.abs().max())
        if not float((weight - product).abs().max()) <= tolerance:
            raise ValueError(
                f"export_low_rank: {name!r} is not what its factors were trained to; an average of weights, say, has a"
                " higher rank. Give the network as it was trained, or train on from this one and export then."
            )
        found[start + name] = left, right
    return found


def _checked_ranks(technique: "MaestroLowRank", ranks: Mapping[str, int]) -> dict[str, int]:
    present = technique.ranks
    for name, rank in ranks.items():
        if not 1 <= rank <= present.get(name, 0):
            what = f"must be from 1 to {present[name]}" if name in present else "is of no weight that was trained"
            raise ValueError(f"export_low_rank: the rank of {name!r} {what}, got {rank}.")
    return present | dict(ranks)


def _most_columns(technique: "MaestroLowRank", name: str, places: Sequence[Place]) -> int:
    """The largest rank at which a pair of layers is less work; 0 where there is no pair."""
    if not all(_is_plain(place) for place in places):
        return 0
    parts = technique.latents.own[name]
    m, n = parts["U"].shape[-2], parts["V"].shape[-2]
    return (m * n - 1) // (m + n)


def _is_plain(place: Place) -> bool:
    layer, forward = place.layer, type(place.layer).forward
    if place.in_attention or place.key != "weight":
        return False
    return forward in _PLAIN or type(layer).__name__ == "Conv1D"  # of transformers


_PLAIN = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
_CONVOLUTIONS: dict[int, type[Any]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def low_rank_layers_(model: nn.Module, layers: Mapping[str, int]) -> None:
    """Replaces layers by pairs of smaller ones, whose weights are then to be loaded, in place.

    ``low_rank_layers_(model, layers)`` and ``model.load_state_dict(saved)`` make of a new network what
    :func:`export_low_rank` gave, in any process. Layers that share a weight share those of the pair.

    Args:
        model: A network as it was before the export.
        layers: The rank of each layer by its name, as in ``named_modules()``.

    Raises:
        ValueError: If there is no such layer, or one that does not become a pair.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 6), nn.Conv2d(4, 4, 3, groups=2))
        >>> low_rank_layers_(model, {"0": 2, "1": 1})
        >>> model[0][0], model[0][1].weight.shape
        (Linear(in_features=8, out_features=2, bias=False), torch.Size([6, 2]))
        >>> model[1][0].weight.shape, model[1][1].weight.shape
        (torch.Size([2, 2, 3, 3]), torch.Size([4, 1, 1, 1]))

    """
    at = dict(model.named_modules(remove_duplicate=False))
    made: dict[int, _Pair] = {}
    for name, rank in layers.items():
        layer = at.get(name)
        if not name or layer is None or not _is_plain(Place(layer, "weight", in_attention=False)):
            raise ValueError(f"low_rank_layers_: {name!r} is no linear layer or convolution within the network.")
        pair = _pair(layer, rank)
        tied = made.setdefault(id(layer.weight), pair)
        for mine, theirs in zip(pair, tied, strict=True):
            mine.weight = theirs.weight
        for path in [path for path, other in at.items() if other is layer]:
            parent, _, key = path.rpartition(".")
            setattr(at[parent], key, pair)


class _Pair(nn.Sequential):
    """Two layers in the place of one, whose weight and sizes other code may read.

    Args:
        first: From the inputs.
        second: To the outputs.
        layer: The one.

    """

    def __init__(self, first: nn.Module, second: nn.Module, layer: nn.Module) -> None:
        super().__init__(first, second)
        sizes = [*getattr(layer, "__constants__", ()), "nx", "nf"]  # those of transformers' Conv1D
        vars(self).update({key: getattr(layer, key) for key in sizes if hasattr(layer, key)})
        self._turned = not isinstance(layer, nn.Linear | Convolution)

    @property
    def weight(self) -> Tensor:
        """The product of both weights, as the one layer had it."""
        first, second = (layer.get_parameter("weight") for layer in self)
        groups = getattr(self, "groups", 1)
        product = second.reshape(groups, -1, second.shape[1]) @ first.reshape(groups, second.shape[1], -1)
        whole = product.reshape(len(second), *first.shape[1:])
        return whole.t() if self._turned else whole

    @property
    def bias(self) -> nn.Parameter | None:
        """Of the second."""
        return own_parameters(self[1])["bias"]


def _pair(layer: nn.Module, rank: int) -> _Pair:
    weight, bias = layer.get_parameter("weight"), own_parameters(layer)["bias"]
    options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    if isinstance(layer, Convolution):
        kind, inner = _CONVOLUTIONS[len(layer.kernel_size)], rank * layer.groups
        shape = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "groups": layer.groups}
        more = {"padding_mode": layer.padding_mode, "bias": False}
        first = kind(layer.in_channels, inner, layer.kernel_size, **shape, **more, **options)
        second = kind(inner, layer.out_channels, 1, groups=layer.groups, bias=bias is not None, **options)
    else:
        outputs, inputs = weight.shape if isinstance(layer, nn.Linear) else weight.shape[::-1]
        first = nn.Linear(inputs, rank, bias=False, **options)
        second = nn.Linear(rank, outputs, bias=bias is not None, **options)
    second.bias = bias
    return _Pair(first, second, layer).train(layer.training)


def greedy_ranks(
    technique: "MaestroLowRank",
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    cost: Callable[[nn.Module], float],
    budget: float,
    share: float = 0.1,
    prefix: str = "",
) -> dict[str, int]:
    """Ranks for a budget without further training: layers lose columns one after the other, where it costs the least.

    Args:
        technique: After its fit.
        model: That was trained, or a network in it.
        evaluate: How good an exported network is, higher being better; statistics of batch norms are to be found anew
            in there. It is asked for each layer in each round.
        cost: What such a network costs: its numbers, :func:`forward_flops`.
        budget: The largest cost, in the same unit.
        share: Of its first rank that a layer loses in a round, in (0, 1]; one column at least. A layer that was whole
            loses as many as make a pair of it.
        prefix: Name of the network in the module of the fit.

    Returns:
        Ranks for :func:`export_low_rank`.

    Raises:
        ValueError: If the budget cannot be reached.

    """
    start = f"{prefix}." if prefix else ""
    places = {f"{start}{name}": found for name, found in places_of(model).items()}
    ranks, full = technique.ranks, technique.ranks
    most = {name: _most_columns(technique, name, places[name]) for name in ranks}
    network = export_low_rank(technique, model, ranks, prefix)[0]
    while (spent := cost(network)) > budget:
        best: tuple[float, dict[str, int], nn.Module] | None = None
        for name, rank in ranks.items():
            fewer = min(max(1, rank - max(1, round(share * full[name]))), most[name])
            if 0 < fewer < rank:
                tried = ranks | {name: fewer}
                small = export_low_rank(technique, model, tried, prefix)[0]
                score = evaluate(small)
                best = (score, tried, small) if best is None or score > best[0] else best
        if best is None:
            raise ValueError(f"greedy_ranks: a cost of {budget:g} cannot be reached, {spent:g} is the least.")
        _, ranks, network = best
    return ranks


def forward_flops(call: Callable[[], object]) -> int:
    """Operations of a forward pass as torch counts them, a multiplication and an addition being two.

    Args:
        call: Runs the network once; no gradient is recorded.

    Returns:
        Those of matrix products and convolutions.

    Example:
        >>> layer = nn.Linear(8, 6)
        >>> forward_flops(lambda: layer(torch.zeros(5, 8)))
        480

    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())
