"""Factors of low-rank updates (LoRA) among the entries of state dicts: their means give no mean of products."""

import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lightning_reg.averaging._state_dicts import Aligned, accumulated, widest
from lightning_reg.engine.host.names import Patterns, matches

__all__ = ["stacked_factors", "warn_of_factors"]

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
    for key, other in _pairs(members[0]) if len(members) > 1 else ():
        if matches(key, exclude) or matches(other, exclude):
            continue
        gap = _gap([member[other] for member in members], [member[key] for member in members])
        if gap > _LEAST_GAP:
            warnings.warn(
                f"{owner}: {other!r} and {key!r} are the factors of an update (LoRA), and the product of their"
                f" means is {gap:.0%} away from the mean of their products. Merge each update into its base model"
                " and mix those; or put the factors side by side, the one divided by their number, which is that"
                ' mean at a larger rank: `average_state_dicts` and `make_soup` do that with factors="stack".',
                stacklevel=3,
            )
            return True
    return False


def _pairs(member: Aligned) -> Iterator[tuple[str, str]]:
    """Keys of A and B of every update."""
    for key in member:
        for first, second in _PAIRS:
            other = key.replace(first, second)
            if other != key and other in member:
                yield key, other


def stacked_factors(
    members: Sequence[Aligned], shares: Sequence[float], is_mixed: Callable[[str], bool]
) -> dict[str, Tensor]:
    r"""Factors side by side, of which the product is the mean of the members' products: the rank is the sum of theirs.

    .. math:: B = [w_1 B_1, \dots, w_k B_k] \Big/ \sum_i w_i, \quad A = [A_1; \dots; A_k]

    A strength that stands beside them (``alpha``, of which :math:`\alpha/r` scales the product) becomes the rank, so
    that the product is scaled by 1, and goes into the B of each member.

    Args:
        members: What is mixed.
        shares: Weight of each, with a positive sum; one of weight 0 adds no rank.
        is_mixed: Whether a key is mixed.

    Returns:
        By key; those that are left out, or are no factors, are not in it.

    Raises:
        ValueError: If there are no factors, or an update is normed after the product (DoRA).

    """
    dora = next((key for key in members[0] if "lora_magnitude" in key or "dora_scale" in key), None)
    if dora is not None:
        raise ValueError(
            f'factors="stack": {dora!r} norms what its factors change (DoRA), so no product of factors is the mean of'
            " the updates. Merge each into its base model, and average those."
        )
    used, total = [(m, share) for m, share in zip(members, shares, strict=True) if share != 0], sum(shares)
    result: dict[str, Tensor] = {}
    for key, other in _pairs(members[0]):
        if not (is_mixed(key) and is_mixed(other)):
            continue
        dtypes = [widest([member[name].dtype for member, _ in used]) for name in (key, other)]
        firsts = [member[key].detach() for member, _ in used]
        seconds = [accumulated(member[other]) * (share / total) for member, share in used]
        strength = key.partition(".lora_")[0] + ".alpha"
        if strength in members[0] and is_mixed(strength):
            seconds = [b * (float(m[strength]) / len(a)) for b, a, (m, _) in zip(seconds, firsts, used, strict=True)]
            result[strength] = torch.full_like(members[0][strength], sum(len(a) for a in firsts))
        result[key] = torch.cat([a.to(dtypes[0]) for a in firsts], 0)
        result[other] = torch.cat(seconds, 1).to(dtypes[1])
    if not result:
        raise ValueError('factors="stack": there are no factors of low-rank updates (lora_A, lora_B) to mix.')
    return result


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
