"""Channel permutations: other groups that keep more magnitude, and a network that computes the same."""

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.layers.named import named_layers
from lightning_reg.sparsity._nm_graph import Chain, find_chain
from lightning_reg.sparsity._nm_layers import Weight
from lightning_reg.sparsity._nm_masks import nm_mask

__all__ = ["Permutation", "best_channel_permutation", "permute_network_"]

_TOLERANCE = 1e-5


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


@dataclass(frozen=True)
class Permutation:
    """What became of the input channels of one weight.

    Args:
        before: Share of the magnitude that the mask kept before.
        after: The same afterwards.
        why_not: Why they were not permuted; "" if they were.
        undo: Puts them back.

    """

    before: float = 1.0
    after: float = 1.0
    why_not: str = ""
    undo: Callable[[], None] = lambda: None

    @override
    def __str__(self) -> str:
        if self.why_not:
            return f"not permuted: {self.why_not}"
        return f"permuted: keeps {100 * self.after:.1f} % of the magnitude, before {100 * self.before:.1f} %"


def permute_network_(
    module: nn.Module, weights: Sequence[Weight], owner: str, unchanged: Callable[[], bool] = lambda: True
) -> dict[str, Permutation]:
    """Permutes the input channels of sparse weights, and with them whatever makes these channels; in place.

    Where that would change what the layers compute, by more than 1e-5 of it on random input, it is undone; and where
    the whole network does not compute the same any more (a layer that is called in another way than its holder's
    ``forward`` says, or has its weights read elsewhere).

    Args:
        module: The module; its function stays the same up to rounding.
        weights: Sparse weights, grouped along their input channels.
        owner: Class to name in errors.
        unchanged: Whether the whole network computes what it did before.

    Returns:
        What became of each weight, by name.

    Raises:
        MisconfigurationException: If there is no weight that can be permuted.

    """
    layers = named_layers(module) | {"": module}
    counts = Counter(id(p) for layer in layers.values() for p in layer._parameters.values() if p is not None)
    found = {weight.name: _permuted_(layers, counts, weight) for weight in weights}
    if not unchanged():
        for permutation in reversed(found.values()):
            permutation.undo()
        found = {weight.name: _tried_alone_(layers, counts, weight, unchanged) for weight in weights}
    if all(permutation.why_not for permutation in found.values()):
        reasons = "".join(f"\n  {name}: {permutation.why_not}" for name, permutation in found.items())
        raise MisconfigurationException(
            f"{owner}(permute=True): of {', '.join(found)} none can be permuted.{reasons}\nA layer can be where its"
            " input comes from another linear layer or convolution in the `forward` of a module that torch.fx can"
            " trace, through activations, dropout, pooling and norms alone. Write permute=False."
        )
    return found


def _tried_alone_(
    layers: Mapping[str, nn.Module], counts: Mapping[int, int], weight: Weight, unchanged: Callable[[], bool]
) -> Permutation:
    permutation = _permuted_(layers, counts, weight)
    if permutation.why_not or unchanged():
        return permutation
    permutation.undo()
    return Permutation(why_not="the training step would compute something else with it")


@torch.no_grad()
def _permuted_(layers: Mapping[str, nn.Module], counts: Mapping[int, int], weight: Weight) -> Permutation:
    layer, _, parameter = weight.name.rpartition(".")
    if parameter != "weight":
        return Permutation(why_not="it is a projection of an attention")
    chain = find_chain(layers, layer)
    if isinstance(chain, str):
        return Permutation(why_not=chain)
    producer, consumer = chain.modules[0], chain.modules[-1]
    # A weight that is used elsewhere too would change there.
    if any(counts[id(end._parameters["weight"])] != 1 for end in (producer, consumer)):
        return Permutation(why_not="it, or the layer before it, shares its weight")
    x, computed = _tried(chain)
    if computed is None:
        return Permutation(why_not="it could not be tried on random input")
    value: Tensor = consumer._parameters["weight"]  # type: ignore[assignment]  # `find_chain` saw it
    order, before = best_channel_permutation(value, weight.n, weight.m), _kept(value, weight)
    _permute_(chain, order)
    difference = (chain.run(x, _twins(chain)) - computed).abs().max()
    if not difference <= _TOLERANCE * computed.abs().max():
        _permute_(chain, order.argsort())
        return Permutation(why_not=f"it would compute something else, by {float(difference):.2g}")
    return Permutation(before, _kept(value, weight), undo=lambda: _permute_(chain, order.argsort()))


@torch.no_grad()
def _tried(chain: Chain) -> tuple[Tensor, Tensor | None]:
    """Random input of the producer, and what the consumer makes of it; in double precision."""
    producer = chain.modules[0]
    weight: Tensor = producer._parameters["weight"]  # type: ignore[assignment]  # as above
    generator, twins = torch.Generator().manual_seed(0), _twins(chain)
    sizes = (1,) if weight.dim() == 2 else (max(weight.shape[2:]), 8, 16, 32, 64)
    x = torch.empty(0)
    for size in sizes:  # pools may need a larger image
        shape = (6, weight.shape[1], *(size for _ in weight.shape[2:]))
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(weight.device)
        try:
            return x, chain.run(x, twins)
        except (RuntimeError, ValueError):
            continue
    return x, None


def _twins(chain: Chain) -> dict[nn.Module, nn.Module]:
    """Copies in double precision, in evaluation mode: rounding is none of the difference then."""
    return {module: copy.deepcopy(module).double().eval() for module in chain.modules}


@torch.no_grad()
def _permute_(chain: Chain, order: Tensor) -> None:
    for owner in (chain.modules[0], *chain.norms):
        for value in (*owner._parameters.values(), *owner._buffers.values()):
            if value is not None and value.dim():
                value.copy_(value[order])
    consumer: Tensor = chain.modules[-1]._parameters["weight"]  # type: ignore[assignment]  # `find_chain` saw it
    consumer.copy_(consumer[:, order])


def _kept(value: Tensor, weight: Weight) -> float:
    magnitudes = value.detach().abs().double()
    return float((magnitudes * nm_mask(value, weight.n, weight.m)).sum() / magnitudes.sum())
