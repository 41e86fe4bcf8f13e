"""Pruning of the neurons that memorise, and what is left."""

import copy
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_reg.diagnostics.grokking_corrupted._layers import check_shapes, input_view, weight_of
from lightning_reg.diagnostics.grokking_corrupted.core import neuron_participation_ratios, neurons_by_ratio
from lightning_reg.engine.host.procedures import procedure

__all__ = ["PruningTable", "prune_memorising", "without_memorising"]


class PruningTable(NamedTuple):
    """What a network achieves without some of its neurons.

    Args:
        fractions: ``(S,)``, the shares of neurons that were pruned.
        neurons: ``(S,)``, int64, how many that is.
        scores: By name ``(S,)``, float64, what ``evaluate`` gave.

    """

    fractions: Tensor
    neurons: Tensor
    scores: dict[str, Tensor]


@procedure
def prune_memorising(
    module: nn.Module,
    fractions: Tensor,
    evaluate: Callable[[nn.Module], Mapping[str, float]],
    input_layer: str = "hidden",
    output_layer: str = "head",
    blocks: int = 2,
    order: Literal["lowest", "highest", "random"] = "lowest",
    residues: Tensor | None = None,
    seed: int = 0,
) -> PruningTable:
    r"""What a network achieves without the neurons that memorise: those of the lowest inverse participation ratio.

    Of each pruned neuron the weights from the inputs and to the outputs are zero; nothing is trained again. In a
    network that has learned sums modulo p and some wrong labels, the wrong labels go first.

    Source:
        Doshi, Das, He and Gromov, "To Grok or not to Grok: Disentangling Generalization and Memorization on Corrupted
        Algorithmic Datasets", ICLR 2024, arXiv 2310.13061.

    Differs:
        The random order, to compare with, is an addition.

    Args:
        module: A trained network, which is left as it was found.
        fractions: ``(S,)``, in [0, 1], shares of neurons to prune; 0 is the network as it is.
        evaluate: Gives numbers by name for the network, accuracies say; called once for each share, without gradient.
        input_layer: Name of the layer that reads the residues: a Linear, weight ``(N, blocks * p)``, or an Embedding,
            ``(p, N)``.
        output_layer: Name of the last layer, a Linear of weight ``(p, N)``.
        blocks: Numbers that the input layer reads; 1 for an embedding. Paper: 2.
        order: ``"lowest"`` first, ``"highest"`` first, or ``"random"``.
        residues: ``(q,)``, their order, see :func:`discrete_logarithm_order`; ``None``: 0 to p - 1.
        seed: Of the random order.

    Returns:
        The table.

    Raises:
        ValueError: If a share or the order is outside its range, or the layers are not there or do not fit each other.

    """
    if bool((fractions < 0).any()) or bool((fractions > 1).any()):
        raise ValueError(f"prune_memorising: `fractions` must be in [0, 1], got {fractions.tolist()}.")
    if order not in ("lowest", "highest", "random"):
        raise ValueError(f"prune_memorising: `order` must be 'lowest', 'highest' or 'random', got {order!r}.")
    inputs, outputs, ratios = _neurons(module, input_layer, output_layer, blocks, residues, "prune_memorising")
    neurons = neurons_by_ratio(ratios, order, torch.Generator().manual_seed(seed))
    counts = (fractions.double() * len(neurons)).round().long()
    kept, found = (inputs.clone(), outputs.clone()), []
    for count in counts.tolist():
        try:
            _zero_(inputs, outputs, neurons[:count])
            with torch.no_grad():
                found.append(dict(evaluate(module)))
        finally:
            inputs.copy_(kept[0])
            outputs.copy_(kept[1])
    names = list(found[0]) if found else []
    scores = {name: torch.tensor([float(one[name]) for one in found], dtype=torch.float64) for name in names}
    return PruningTable(fractions, counts, scores)


def _neurons(
    module: nn.Module, input_layer: str, output_layer: str, blocks: int, residues: Tensor | None, owner: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Views of both weights, which may be written to, and the ratios."""
    inputs = input_view(*weight_of(module, input_layer, owner))
    outputs = weight_of(module, output_layer, owner)[1]
    check_shapes(owner, (input_layer, output_layer), inputs, outputs, blocks)
    return inputs, outputs, neuron_participation_ratios(inputs, outputs, blocks, residues)


def _zero_(inputs: Tensor, outputs: Tensor, neurons: Tensor) -> None:
    inputs[neurons] = 0.0
    outputs[:, neurons] = 0.0


def without_memorising(
    module: nn.Module,
    fraction: float | None = None,
    below: float | None = None,
    input_layer: str = "hidden",
    output_layer: str = "head",
    blocks: int = 2,
    residues: Tensor | None = None,
) -> nn.Module:
    """A copy of a network without the neurons that memorise.

    Args:
        module: A trained network.
        fraction: Share of neurons to prune, lowest inverse participation ratio first, in [0, 1]; or
        below: the ratio below which they are pruned, in [0, 1]. One of the two.
        input_layer: See :func:`prune_memorising`.
        output_layer: The same.
        blocks: The same.
        residues: The same.

    Returns:
        The copy.

    Raises:
        ValueError: If not just one of the two is given, or it is outside its range.
        ValueError: If the layers are not there, or do not fit each other.

    """
    given = fraction if below is None else below
    if given is None or (fraction is not None and below is not None) or not 0 <= given <= 1:
        raise ValueError(
            f"without_memorising: one of `fraction` and `below` must be in [0, 1], got {fraction!r} and {below!r}."
        )
    pruned = copy.deepcopy(module)
    inputs, outputs, ratios = _neurons(pruned, input_layer, output_layer, blocks, residues, "without_memorising")
    count = round(given * len(ratios)) if below is None else int((ratios < given).sum())
    _zero_(inputs, outputs, neurons_by_ratio(ratios)[:count])
    return pruned
