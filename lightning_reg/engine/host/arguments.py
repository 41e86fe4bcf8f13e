"""Checks of arguments, in one voice: class, argument, range, value."""

import ctypes
import math
from collections.abc import Sequence
from numbers import Integral, Real

__all__ = ["check_bool", "check_choice", "check_list", "check_number"]


def check_number(
    owner: object,
    name: str,
    value: float | None,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = False,
    integer: bool = False,
    optional: bool = False,
) -> None:
    """Raises ``ValueError`` unless ``value``, of Python or numpy, is finite and in the interval, for float32 as well.

    Args:
        owner: The object whose argument it is; its class is named in the message.
        name: Name of the argument.
        value: What the user gave.
        low: Lower end.
        high: Upper end.
        low_open: Whether the lower end itself is refused.
        high_open: Whether the upper end itself is refused.
        integer: Whether only whole numbers are taken.
        optional: Whether ``None`` is taken too.

    Raises:
        ValueError: If ``value`` is no number, not finite, or outside the interval; or if float32, which it meets in
            formulas, holds it as infinite or as an end that is refused.

    """
    if optional and value is None:
        return
    number: float = value  # type: ignore[assignment]  # `None` is refused as what is no number
    kinds: tuple[type, ...] = (Integral,) if integer else (Real,)
    fine = isinstance(number, kinds) and not isinstance(number, bool) and math.isfinite(number)
    fine = fine and (number > low if low_open else number >= low) and (number < high if high_open else number <= high)
    narrow = _in_float32(number) if fine and not integer else number
    holds = fine and math.isfinite(narrow) and not (low_open and narrow == low) and not (high_open and narrow == high)
    if not holds:
        left, right = low_open or low == -math.inf, high_open or high == math.inf
        interval = f"{'(' if left else '['}{low}, {high}{')' if right else ']'}"
        kind = "a whole number" if integer else "a number"
        what = f", which counts as {narrow:g} in float32" if fine else ""
        raise ValueError(f"{type(owner).__name__}: `{name}` must be {kind} in {interval}, got {value!r}{what}.")


_LARGE = 2.0**126  # numbers up to here and their inverses, and twice of both, are finite in float32


def _in_float32(value: float) -> float:
    if abs(value) > _LARGE:
        return math.copysign(math.inf, value)
    return 0.0 if abs(value) < 1 / _LARGE else ctypes.c_float(value).value


def check_bool(owner: object, name: str, value: object) -> None:
    """Raises ``ValueError`` unless ``value`` is ``True`` or ``False``: the text "False" would count as true.

    Args:
        owner: The object whose argument it is; its class is named in the message.
        name: Name of the argument.
        value: What the user gave.

    Raises:
        ValueError: If ``value`` is something else.

    """
    if not isinstance(value, bool):
        raise ValueError(f"{type(owner).__name__}: `{name}` must be True or False, got {value!r}.")


def check_list(owner: object, name: str, value: object) -> None:
    """Raises ``ValueError`` unless ``value`` is a sequence: a text, which is one of letters, is none here.

    Args:
        owner: The object whose argument it is; its class is named in the message.
        name: Name of the argument.
        value: What the user gave.

    Raises:
        ValueError: If ``value`` is something else.

    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"{type(owner).__name__}: `{name}` must be a list, got {value!r}.")


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
