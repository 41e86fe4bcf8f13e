"""Which weights are factorized, and how they lie as matrices."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from lightning_reg.engine.host.modules import Convolution, TransposedConvolution
from lightning_reg.engine.weights.factors import Layout
from lightning_reg.engine.weights.places import Place, layouts_of, places_of
from lightning_reg.engine.weights.swap import named_weights
from lightning_reg.engine.weights.ways import needs_gradient
from lightning_reg.finetuning._choice import check_plain

__all__ = ["Matrices", "factorizable", "matrices_in"]


class Matrices(NamedTuple):
    """How a weight lies as a matrix of outputs by inputs, or as a stack of such.

    Args:
        layout: Whether inputs come first, whether it is a stack.
        blocks: As how many matrices its outputs are taken: groups of a convolution, projections of an attention.

    """

    layout: Layout
    blocks: int = 1

    def of(self, weight: Tensor) -> Tensor:
        """The weight as ``(m, n)``, or as a stack ``(blocks, m, n)``."""
        matrix = self.layout.matrix(weight)
        return matrix.reshape(self.blocks, -1, matrix.shape[1]) if self.blocks > 1 else matrix

    def weight(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """The matrix as a weight of this shape."""
        return self.layout.weight(matrix.flatten(0, 1) if self.blocks > 1 else matrix, shape)


def factorizable(
    owner: object, module: nn.Module, names: Sequence[str]
) -> tuple[dict[str, Matrices], dict[str, list[str]]]:
    """Those of the weights that can be trained as a product of factors.

    Args:
        owner: Who asks; its class is named in messages.
        module: The user's module.
        names: Names of the weights.

    Returns:
        How they lie, by name; and by the reason names of the others.

    Raises:
        MisconfigurationException: If a weight is quantised.

    """
    check_plain(owner, module, names)
    weights, left = named_weights(module), dict[str, list[str]]()
    found = matrices_in(module, names)
    for name in names:
        if not needs_gradient(weights[name]):
            left.setdefault("frozen", []).append(name)
        elif min(found[name].of(weights[name]).shape[-2:]) < 2:
            left.setdefault("of rank 1 as they are", []).append(name)
    others = {name for named in left.values() for name in named}
    return {name: matrices for name, matrices in found.items() if name not in others}, left


def matrices_in(module: nn.Module, names: Sequence[str]) -> dict[str, Matrices]:
    """How weights lie as matrices, by name.

    Args:
        module: Any module.
        names: Names of weights of two dimensions or more.

    Returns:
        By name; a weight that no known layer multiplies by counts as ``(out, in)``, or as a stack of such.

    """
    weights, layouts, places = named_weights(module), layouts_of(module), places_of(module)
    return {
        name: Matrices(layouts.get(name, Layout(stacked=weights[name].dim() > 2)), _blocks(places, name))
        for name in names
    }


def _blocks(places: Mapping[str, Sequence[Place]], name: str) -> int:
    layer, key, _ = places[name][0]
    if isinstance(layer, nn.MultiheadAttention):
        return 3 if key == "in_proj_weight" else 1
    return layer.groups if isinstance(layer, Convolution) and not isinstance(layer, TransposedConvolution) else 1
