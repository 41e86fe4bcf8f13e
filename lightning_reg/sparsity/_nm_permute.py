"""Channel permutations: other groups that keep more magnitude, and a network that computes the same."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from lightning_reg.engine.errors import MisconfigurationException
from lightning_reg.engine.features import named_layers
from lightning_reg.sparsity._nm_layers import Weight
from lightning_reg.sparsity._nm_masks import nm_mask

__all__ = ["best_channel_permutation", "permute_network_"]

_CHANNELWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.Softplus,
    nn.Hardswish, nn.Hardsigmoid, nn.Identity, nn.Dropout, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d,
    nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
)  # fmt: skip
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@torch.no_grad()
def best_channel_permutation(weight: Tensor, n: int = 2, m: int = 4, passes: int = 10) -> Tensor:
    """An order of the input channels in which the N:M mask keeps more magnitude: a local optimum.

    From pair to pair of groups the two channels are exchanged that gain most, until no exchange gains anything. Without
    randomness: the same on all ranks. One pass costs about ``size * in`` multiplications.

    Args:
        weight: ``(out, in)`` or ``(out, in, *kernel)``; ``in`` is a multiple of ``m``.
        n: Weights kept in each group.
        m: Length of a group.
        passes: Most passes over all pairs of groups.

    Returns:
        Permutation ``(in,)`` int64; ``weight[:, permutation]`` is to be pruned.

    Example:
        >>> w = torch.tensor([[9.0, 8.0, 7.0, 6.0, 1.0, 1.0, 1.0, 1.0]])
        >>> permuted = w[:, best_channel_permutation(w)]
        >>> float((permuted * nm_mask(permuted, 2, 4)).sum())
        30.0

    """
    columns = weight.detach().abs().float().movedim(1, 0).flatten(1)  # (in, rows)
    order = torch.arange(len(columns), device=weight.device)
    swaps = torch.tensor([(i, m + j) for i in range(m) for j in range(m)], device=weight.device)
    trials = torch.arange(2 * m, device=weight.device).repeat(1 + len(swaps), 1)
    rows = torch.arange(1, 1 + len(swaps), device=weight.device)
    trials[rows, swaps[:, 0]], trials[rows, swaps[:, 1]] = swaps[:, 1], swaps[:, 0]
    groups = range(0, len(order), m)
    for _ in range(passes):
        improved = False
        for a, b in combinations(groups, 2):
            places = torch.cat([order[a : a + m], order[b : b + m]])
            magnitudes = columns[places][trials].view(len(trials), 2, m, -1)
            kept = magnitudes.topk(n, dim=2).values.double().sum((1, 2, 3))
            best = int(kept.argmax())
            if kept[best] > kept[0] * (1 + 1e-9):
                order[a : a + m], order[b : b + m] = places[trials[best]].view(2, m)
                improved = True
        if not improved:
            break
    return order


def permute_network_(module: nn.Module, weights: Sequence[Weight], owner: str) -> dict[str, tuple[float, float]]:
    """Permutes the input channels of sparse weights, and with them whatever makes these channels; in place.

    Args:
        module: The module; its function stays the same up to rounding.
        weights: Sparse weights, grouped along their input channels.
        owner: Class to name in errors.

    Returns:
        Kept magnitude before and after, by name; only of weights that could be permuted.

    Raises:
        MisconfigurationException: If there is no weight that can be permuted.

    """
    chains, gains = _chains(module), {}
    for weight in weights:
        if weight.name in chains:
            producer, norms, consumer = chains[weight.name]
            value = consumer._parameters["weight"]
            if value is None:
                continue
            order = best_channel_permutation(value, weight.n, weight.m)
            before = _kept(value, weight)
            _permute_(producer, norms, consumer, order)
            gains[weight.name] = before, _kept(value, weight)
    if not gains:
        names = ", ".join(weight.name for weight in weights)
        raise MisconfigurationException(
            f"{owner}(permute=True): of {names} none can be permuted. A layer can be where its input comes from another"
            " linear layer or convolution of the same nn.Sequential, through activations, dropout, pooling or batch"
            " norm alone, or as `linear2` of torch's transformer layers. Write permute=False."
        )
    return gains


Chain = tuple[nn.Module, list[nn.Module], nn.Module]


def _chains(module: nn.Module) -> Mapping[str, Chain]:
    """Producer, norms in between and consumer, by the name of the consumer's weight."""
    layers = named_layers(module) | {"": module}
    counts: dict[int, int] = {}
    for layer in layers.values():
        for parameter in layer._parameters.values():
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    chains = {}
    for name, layer in layers.items():
        prefix = f"{name}." if name else ""
        for key, chain in _chains_in(layer):
            producer, _, consumer = chain
            alone = all(counts[id(end._parameters["weight"])] == 1 for end in (producer, consumer))
            if alone:  # a weight that is used elsewhere too would change there
                chains[f"{prefix}{key}.weight"] = chain
    return chains


def _chains_in(layer: nn.Module) -> Iterator[tuple[str, Chain]]:
    if isinstance(layer, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        yield "linear2", (layer.linear1, [], layer.linear2)
    if not isinstance(layer, nn.Sequential):
        return
    producer: nn.Module | None = None
    norms: list[nn.Module] = []
    for key, child in layer.named_children():
        if isinstance(child, _LINEAR):
            plain = isinstance(child._parameters.get("weight"), nn.Parameter) and getattr(child, "groups", 1) == 1
            if producer is not None and plain:
                yield key, (producer, norms, child)
            producer, norms = (child if plain else None), []
        elif isinstance(child, _NORMS):
            norms = [*norms, child]
        elif not isinstance(child, _CHANNELWISE):
            producer, norms = None, []


@torch.no_grad()
def _permute_(producer: nn.Module, norms: Sequence[nn.Module], consumer: nn.Module, order: Tensor) -> None:
    for owner in (producer, *norms):
        for value in (*owner._parameters.values(), *owner._buffers.values()):
            if value is not None and value.dim():
                value.copy_(value[order])
    consumer.weight.copy_(consumer.weight[:, order])  # type: ignore[operator, index]  # torch: any attribute is a Tensor or Module


def _kept(value: Tensor, weight: Weight) -> float:
    magnitudes = value.detach().abs().double()
    return float((magnitudes * nm_mask(value, weight.n, weight.m)).sum() / magnitudes.sum())
