"""Errors of setups: what was found, and what to write."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NoReturn

from lightning_reg.engine.host.lightning import MisconfigurationException
from lightning_reg.engine.host.names import Patterns, near_names, unmatched

__all__ = [
    "MisconfigurationException",
    "check_patterns",
    "in_the_name_of",
    "reading_state",
    "reads_state",
    "refuse_layer",
    "refuse_parameter",
]


def in_the_name_of(owner: object, error: MisconfigurationException) -> MisconfigurationException:
    """The error as one of whoever met it: with the name of its class, unless it has that already."""
    name = type(owner).__name__
    return error if name in str(error) else MisconfigurationException(f"{name}: {error}")


@contextmanager
def reading_state(owner: object) -> Iterator[None]:
    """While a checkpoint's state is read: what a state of another kind ends in becomes one sentence.

    Args:
        owner: Whose state it is; its class is named in the message.

    Raises:
        MisconfigurationException: In place of a bare error about what is missing, or is of another type or shape.
        ValueError: As it was raised, with the name of the class.

    """
    name = type(owner).__name__
    try:
        yield
    except ValueError as error:
        if name in str(error):
            raise
        raise ValueError(f"{name}: {error}") from error
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        missing = isinstance(error, KeyError) and error.args
        what = f"it lacks {error.args[0]!r}" if missing else f"it is broken ({type(error).__name__}: {error})"
        raise MisconfigurationException(
            f"{name}: the checkpoint's state cannot be gone on with: {what}. It is of another version of the suite, of"
            " other arguments, or of something else. Go on with what wrote it, or load its weights and train without"
            " `ckpt_path`."
        ) from error


def reads_state(load: Callable[..., None]) -> Callable[..., None]:
    """A method ``load_state_dict`` that reads under :func:`reading_state`."""

    @wraps(load)
    def read(self: object, *args: Any, **kwargs: Any) -> None:
        with reading_state(self):
            load(self, *args, **kwargs)

    return read


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
