"""Which state dicts bring numbers into an average that are not finite, and a word about it."""

import warnings
from collections.abc import Mapping, Sequence

from torch import Tensor

__all__ = ["spoilers", "warn_of_spoiled"]


def spoilers(mixed: Tensor, values: Sequence[Tensor], names: Sequence[str]) -> list[str]:
    """Names of those values that bring something into a mix that is not finite.

    Where all values are the same infinity (a mask before a softmax) it is meant.

    Args:
        mixed: The mix.
        values: What it is made of.
        names: What to call them.

    Returns:
        The names; ``["the mix"]`` if all are finite and their mix is beyond its type.

    """
    bad = ~mixed.isfinite()
    if not bad.any():
        return []
    meant = bad & ~mixed.isnan()
    for value in values:
        meant = meant & (value == mixed).to(meant.device)
    unmeant = bad & ~meant
    if not unmeant.any():
        return []
    found = [
        name
        for name, value in zip(names, values, strict=True)
        if (unmeant & ~value.isfinite().to(unmeant.device)).any()
    ]
    return found or ["the mix"]


def warn_of_spoiled(owner: str, spoiled: Mapping[str, Sequence[str]]) -> None:
    """Warns, if there is anything to warn of.

    Args:
        owner: Who mixes.
        spoiled: By key of what is not finite, who brought it.

    """
    if spoiled:
        key, names = next(iter(spoiled.items()))
        more = f" (and {len(spoiled) - 1} more entries)" if len(spoiled) > 1 else ""
        warnings.warn(
            f"{owner}: {key!r}{more} is not finite (NaN or infinite) in {', '.join(names[:3])}, so the result is not"
            " either there. Leave that one out.",
            stacklevel=3,
        )
