"""Checks of arguments, in one voice: class, argument, range, value."""

import math
from collections.abc import Sequence
from numbers import Integral, Real

__all__ = ["check_choice", "check_number"]


def check_number(
    owner: object,
    name: str,
    value: float,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = False,
    integer: bool = False,
) -> None:
    """Raises ``ValueError`` unless ``value`` is a finite number in the interval, of Python or of numpy.

    Args:
        owner: The object whose argument it is; its class is named in the message.
        name: Name of the argument.
        value: What the user gave.
        low: Lower end.
        high: Upper end.
        low_open: Whether the lower end itself is refused.
        high_open: Whether the upper end itself is refused.
        integer: Whether only whole numbers are taken.

    Raises:
        ValueError: If ``value`` is no number, not finite, or outside the interval.

    """
    kinds: tuple[type, ...] = (Integral,) if integer else (Real,)
    fine = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    fine = fine and (value > low if low_open else value >= low) and (value < high if high_open else value <= high)
    if not fine:
        left, right = low_open or low == -math.inf, high_open or high == math.inf
        interval = f"{'(' if left else '['}{low}, {high}{')' if right else ']'}"
        kind = "a whole number" if integer else "a number"
        raise ValueError(f"{type(owner).__name__}: `{name}` must be {kind} in {interval}, got {value!r}.")


def check_choice(owner: object, name: str, value: object, choices: Sequence[object]) -> None:
    """Raises ``ValueError`` unless ``value`` is one of ``choices``.

    Args:
        owner: The object whose argument it is; its class is named in the message.
        name: Name of the argument.
        value: What the user gave.
        choices: What is allowed.

    Raises:
        ValueError: If ``value`` is not among them.

    """
    if value not in choices:
        allowed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{type(owner).__name__}: `{name}` must be one of {allowed}, got {value!r}.")
