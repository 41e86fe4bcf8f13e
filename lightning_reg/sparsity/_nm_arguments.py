"""Checks of arguments that depend on one another."""

from collections.abc import Mapping, Sequence

from lightning_reg.engine.errors import check_number

__all__ = ["check_patterns", "check_phases"]


def check_patterns(
    owner: object, n: int, m: int, patterns: Mapping[str, Sequence[int]], recipe: str, geometric_k: int
) -> None:
    """Refuses patterns that are impossible, or that the recipe cannot reach.

    Args:
        owner: The object whose arguments they are.
        n: Weights kept.
        m: Length of a group.
        patterns: N and M by regular expression.
        recipe: The recipe.
        geometric_k: First multiple of the geometric recipe.

    Raises:
        ValueError: Naming class, argument, range and value.

    """
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


def check_phases(owner: object, shares: Mapping[str, float], steps: Mapping[str, int | None]) -> None:
    """Refuses phases that do not fit into a training.

    Args:
        owner: The object whose arguments they are.
        shares: Lengths of phases as shares of the training, by argument.
        steps: Lengths in steps, by argument.

    Raises:
        ValueError: Naming class, argument, range and value.

    """
    for argument, share in shares.items():
        check_number(owner, argument, share, low=0, high=1, high_open=True)
    if sum(shares.values()) >= 1:
        arguments, values = (" and ".join(map(str, x)) for x in ([f"`{k}`" for k in shares], shares.values()))
        raise ValueError(f"{type(owner).__name__}: {arguments} must be less than 1 together, got {values}.")
    for argument, length in steps.items():
        if length is not None:
            check_number(owner, argument, length, low=0, integer=True)
