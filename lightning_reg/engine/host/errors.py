"""Errors of setups: what was found, and what to write."""

from collections.abc import Iterable
from typing import NoReturn

from lightning_reg.engine.host.lightning import MisconfigurationException
from lightning_reg.engine.host.names import Patterns, near_names, unmatched

__all__ = ["MisconfigurationException", "check_patterns", "in_the_name_of", "refuse_layer", "refuse_parameter"]


def in_the_name_of(owner: object, error: MisconfigurationException) -> MisconfigurationException:
    """The error as one of whoever met it: with the name of its class, unless it has that already."""
    name = type(owner).__name__
    return error if name in str(error) else MisconfigurationException(f"{name}: {error}")


def refuse_layer(name: str, names: Iterable[str], owner: str = "") -> NoReturn:
    """Raises the error for a name that no layer has; it lists near names.

    Args:
        name: What the user wrote.
        names: Names of the layers.
        owner: Who asks, a class's name; "" for nobody.

    Raises:
        MisconfigurationException: Always.

    """
    raise MisconfigurationException(_unknown("layer", "module.named_modules()", name, names, owner))


def refuse_parameter(name: str, names: Iterable[str], owner: str = "") -> NoReturn:
    """Raises the error for a name that no parameter has; as :func:`refuse_layer`.

    Raises:
        MisconfigurationException: Always.

    """
    raise MisconfigurationException(_unknown("parameter", "module.named_parameters()", name, names, owner))


def check_patterns(owner: object, argument: str, patterns: Patterns, names: Iterable[str], kind: str) -> None:
    """Refuses patterns that match nothing.

    Args:
        owner: Whose argument it is; its class is named in the message.
        argument: Name of the argument.
        patterns: Patterns of names, see :mod:`lightning_reg.engine.host.names`.
        names: What there is.
        kind: What has these names: ``"layer"``, ``"trainable parameter"``.

    Raises:
        MisconfigurationException: If a pattern matches none of the names.

    """
    names = list(names)
    for pattern in unmatched(patterns, names):
        raise MisconfigurationException(
            f"{type(owner).__name__}({argument}=[{pattern!r}]): no {kind} has such a name. Near"
            f" names: {near_names(pattern, names)}."
        )


def _unknown(kind: str, where: str, name: str, names: Iterable[str], owner: str) -> str:
    sentence = f"o {kind} is named {name!r}. Near names: {near_names(name, names)}. {kind.capitalize()}s are named"
    return (f"{owner}: n" if owner else "N") + sentence + f" as in `{where}`."
