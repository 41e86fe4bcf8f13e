"""Which weights are trained as products of factors."""

from collections.abc import Sequence

from torch import nn

from lightning_reg.engine.weights.swap import named_weights
from lightning_reg.engine.weights.ways import needs_gradient
from lightning_reg.finetuning._choice import check_plain
from lightning_reg.finetuning.maestro._matrices import Matrices, matrices_in

__all__ = ["factorizable"]


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
