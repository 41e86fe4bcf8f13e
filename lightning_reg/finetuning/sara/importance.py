"""How much a network's smallest weights matter to it."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_reg.engine.host.modules import own_parameters
from lightning_reg.engine.host.procedures import procedure
from lightning_reg.engine.weights.multiplied import multiplied_weights
from lightning_reg.finetuning.sara.core import magnitude_threshold, small_masks

__all__ = ["importance_curve"]


@procedure
def importance_curve(
    module: nn.Module,
    evaluate: Callable[[nn.Module], float],
    shares: Tensor,
    select: Literal["smallest", "largest", "random"] = "smallest",
    seed: int = 0,
) -> Tensor:
    r"""What a network achieves without a share of its weights: the measurement that SaRA stands on.

    For each share the entries of all weights of linear, convolution and attention layers that are smallest by
    magnitude, over all together, are set to zero, and the network is evaluated. Where the curve of the smallest stays
    level, up to 0.1 or 0.2 in the paper, their capacity is free for a new task.

    Source:
        Hu, Zhang et al., "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank
        Adaptation", ICLR 2025, arXiv 2409.06633.

    Differs:
        The paper measures generated images, here it is whatever ``evaluate`` gives. The largest and random entries are
        additions, to compare with.

    Args:
        module: A trained network, which is left as it was found.
        evaluate: Gives a number for the network, an accuracy say. It is called once for each share,
            without gradient.
        shares: ``(S,)``, in [0, 1]; 0 is the network as it is.
        select: ``"smallest"``, ``"largest"`` or ``"random"`` entries.
        seed: Of random entries.

    Returns:
        The numbers, ``(S,)``, float64.

    Raises:
        ValueError: If a share is outside its range, the choice unknown, or no weight of such a layer is there.

    Example:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> importance_curve(layer, lambda layer: float(layer.weight.sum()), torch.tensor([0.0, 0.5]))
        tensor([10.,  7.], dtype=torch.float64)

    """
    if bool((shares < 0).any()) or bool((shares > 1).any()):
        raise ValueError(f"importance_curve: `shares` must be in [0, 1], got {shares.tolist()}.")
    if select not in ("smallest", "largest", "random"):
        raise ValueError(f"importance_curve: `select` must be 'smallest', 'largest' or 'random', got {select!r}.")
    weights = _weights(module)
    if not weights:
        raise ValueError("importance_curve: `module` has no linear, convolution or attention layer.")
    kept = {name: weight.clone() for name, weight in weights.items()}
    scores = _scores(kept, select, seed)
    found, largest = [], select == "largest"
    for share in shares.tolist():
        small = small_masks(scores, magnitude_threshold(list(scores.values()), 1 - share if largest else share))
        try:
            for name, weight in weights.items():
                weight.masked_fill_(~small[name] if largest else small[name], 0.0)
            with torch.no_grad():
                found.append(float(evaluate(module)))
        finally:
            for name, weight in weights.items():
                weight.copy_(kept[name])
    return torch.tensor(found, dtype=torch.float64)


def _weights(module: nn.Module) -> dict[str, Tensor]:
    found: dict[int, tuple[str, Tensor]] = {}
    for path, layer in module.named_modules():
        own = own_parameters(layer)
        for key in multiplied_weights(layer):
            weight = own[key]
            if weight is not None:
                found.setdefault(id(weight), (f"{path}.{key}", weight.detach()))
    return dict(found.values())


def _scores(weights: dict[str, Tensor], select: str, seed: int) -> dict[str, Tensor]:
    """Numbers of which the smallest go first, or the largest."""
    if select != "random":
        return weights
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.rand(w.shape, generator=draw).to(w.device) for name, w in weights.items()}
