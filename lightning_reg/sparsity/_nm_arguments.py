"""Checks of the arguments."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_reg.engine.host.arguments import check_choice, check_number

__all__ = ["check_arguments"]

_RECIPES = ("mdgf_linear", "mdgf_exp", "sdgf_stepwise", "sdgf_geometric", "srste", "ste", "one_shot")


def check_arguments(owner: Any) -> None:  # noqa: ANN401 # the technique, which imports this module
    """Refuses arguments outside their range.

    Args:
        owner: The technique, with its arguments as attributes.

    Raises:
        ValueError: Naming class, argument, range and value.

    """
    for argument, choices in (
        ("recipe", _RECIPES),
        ("dim", ("in", "out")),
        ("grad", ("ste", "masked")),
        ("on_indivisible", ("error", "skip")),
    ):
        check_choice(owner, argument, getattr(owner, argument), choices)
    if owner.beta is not None:
        check_number(owner, "beta", owner.beta, low=0, low_open=True)
    check_number(owner, "lambda_w", owner.lambda_w, low=0)
    check_number(owner, "refresh_every", owner.refresh_every, low=1, integer=True)
    shares = {name: getattr(owner, name) for name in ("dense_fraction", "finetune_fraction")}
    _check_phases(owner, shares, {name: getattr(owner, name) for name in ("dense_steps", "finetune_steps")})
    _check_patterns(owner, owner.n, owner.m, owner.patterns or {}, owner.recipe, owner.geometric_k)
    if owner.permute and owner.dim == "out":
        raise ValueError(f'{type(owner).__name__}: `permute` must be False with dim="out", got True.')


def _check_patterns(
    owner: object, n: int, m: int, patterns: Mapping[str, Sequence[int]], recipe: str, geometric_k: int
) -> None:
    name = type(owner).__name__
    check_number(owner, "geometric_k", geometric_k, low=1, integer=True)
    if geometric_k & (geometric_k - 1):
        raise ValueError(f"{name}: `geometric_k` must be a power of two, got {geometric_k}.")
    check_number(owner, "m", m, low=1, integer=True)
    check_number(owner, "n", n, low=1, high=m, integer=True)
    for pattern, numbers in patterns.items():
        if len(numbers) != 2:
            raise ValueError(f"{name}: `patterns` must map to [n, m], got {pattern!r}: {numbers!r}.")
        check_number(owner, "patterns", numbers[1], low=1, integer=True)
        check_number(owner, "patterns", numbers[0], low=1, high=numbers[1], integer=True)
    for argument, (kept, group) in (("n", (n, m)), *(("patterns", (a, b)) for a, b in patterns.values())):
        if recipe == "sdgf_stepwise" and (group % kept or (group // kept) & (group // kept - 1)):
            raise ValueError(
                f"{name}: `{argument}` must be m over a power of two for sdgf_stepwise, got n={kept} with m={group}."
            )


def _check_phases(owner: object, shares: Mapping[str, float], steps: Mapping[str, int | None]) -> None:
    for argument, share in shares.items():
        check_number(owner, argument, share, low=0, high=1, high_open=True)
    if sum(shares.values()) >= 1:
        arguments, values = (" and ".join(map(str, x)) for x in ([f"`{k}`" for k in shares], shares.values()))
        raise ValueError(f"{type(owner).__name__}: {arguments} must be less than 1 together, got {values}.")
    for argument, length in steps.items():
        if length is not None:
            check_number(owner, argument, length, low=0, integer=True)
