"""Factors of low-rank updates (LoRA) among the entries of state dicts: their means give no mean of products."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_reg.averaging._state_dicts import Aligned, accumulated
from lightning_reg.engine.host.names import Patterns, matches

__all__ = ["warn_of_factors"]

_PAIRS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"), ("lora_down", "lora_up"))
_LEAST_GAP = 0.01  # below, as between snapshots of one run, it makes no difference


def warn_of_factors(owner: str, members: Sequence[Aligned], exclude: Patterns = None) -> bool:
    """Warns if state dicts hold factors of which the mean of the products is another than the product of the means.

    Args:
        owner: Who mixes.
        members: What is mixed.
        exclude: Patterns of keys that are not.

    Returns:
        Whether it warned.

    """
    for key in members[0] if len(members) > 1 else ():
        for first, second in _PAIRS:
            other = key.replace(first, second)
            if other == key or other not in members[0] or matches(key, exclude) or matches(other, exclude):
                continue
            gap = _gap([member[other] for member in members], [member[key] for member in members])
            if gap > _LEAST_GAP:
                warnings.warn(
                    f"{owner}: {other!r} and {key!r} are the factors of an update (LoRA), and the product of their"
                    f" means is {gap:.0%} away from the mean of their products. Merge each update into its base model"
                    " and mix those; or put the factors side by side, the one divided by their number, which is that"
                    " mean at a larger rank.",
                    stacklevel=3,
                )
                return True
    return False


def _gap(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    r"""Distance of :math:`\bar B \bar A` to :math:`\frac1k \sum_i B_i A_i`, over the norm of that."""
    ours = [accumulated(value).flatten(1) for value in left if value.dim() > 1]
    theirs = [accumulated(value).flatten(1) for value in right if value.dim() > 1]
    if not ours or len(ours) != len(theirs) or ours[0].shape[1] != theirs[0].shape[0]:
        return 0.0
    share = 1 / len(ours)
    sides = torch.cat([share * value for value in ours], 1), torch.cat(theirs, 0)
    means = torch.stack(ours).mean(0), torch.stack(theirs).mean(0)
    apart = _norm(torch.cat([sides[0], -means[0]], 1), torch.cat([sides[1], means[1]], 0))
    return apart / norm if (norm := _norm(*sides)) > 0 else 0.0


def _norm(left: Tensor, right: Tensor) -> float:
    """Norm of a product of two factors, which is not made: it may be large."""
    square = ((left.mH @ left) * (right @ right.mH).mT).sum().real
    return float(square.clamp(min=0).sqrt())
