"""How weights lie as matrices, or as stacks of such."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from lightning_reg.engine.host.modules import Convolution, TransposedConvolution
from lightning_reg.engine.weights.factors import Layout
from lightning_reg.engine.weights.places import Place, layouts_of, places_of

__all__ = ["Matrices", "matrices_in"]


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


def matrices_in(module: nn.Module, names: Sequence[str]) -> dict[str, Matrices]:
    """How weights lie as matrices, by name.

    Args:
        module: Any module.
        names: Names of weights of two dimensions or more.

    Returns:
        By name; a weight that no known layer multiplies by counts as ``(out, in)``, or as a stack of such.

    """
    layouts, places = layouts_of(module), places_of(module)
    return {name: Matrices(layouts.get(name) or _unknown(places[name][0]), _blocks(places[name][0])) for name in names}


def _unknown(place: Place) -> Layout:
    return Layout(stacked=place.layer.get_parameter(place.key).dim() > 2)


def _blocks(place: Place) -> int:
    layer, key, _ = place
    if isinstance(layer, nn.MultiheadAttention):
        return 3 if key == "in_proj_weight" else 1
    return layer.groups if isinstance(layer, Convolution) and not isinstance(layer, TransposedConvolution) else 1
