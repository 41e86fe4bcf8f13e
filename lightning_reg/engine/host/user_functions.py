"""Functions of the user's that a technique's argument names, so that arguments stay plain data."""

import importlib
import inspect
import os
import site
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning_reg.engine.host.errors import MisconfigurationException

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["imported", "place_of_code", "user_function"]


def user_function(name: str, trainer: "Trainer", module: "LightningModule", asked_by: str) -> Callable[..., Any]:
    """Finds a function by its name.

    Args:
        name: With a dot, where it can be imported from (``"my_project.transforms.augment"``; ``"__main__.augment"`` for
            one of the running script). Without, a method of the LightningModule or, if it has none, of the datamodule.
        trainer: The Trainer that fits.
        module: The user's module.
        asked_by: Technique and argument, for the error: ``"ConR(augment=...)"``.

    Returns:
        The function.

    Raises:
        MisconfigurationException: If there is none; the message says where it was looked for.

    """
    if "." not in name:
        for owner in (module, getattr(trainer, "datamodule", None)):
            method = getattr(owner, name, None)
            if callable(method):
                return method  # type: ignore[no-any-return]  # checked above
        raise MisconfigurationException(
            _not_found(name, f"neither {type(module).__name__} nor the datamodule has such a method", asked_by)
        )
    try:
        function = imported(name)
    except (ImportError, AttributeError) as error:
        raise MisconfigurationException(_not_found(name, str(error), asked_by)) from error
    if not callable(function):
        raise MisconfigurationException(_not_found(name, f"it is a {type(function).__name__}", asked_by))
    return function  # type: ignore[no-any-return]  # checked above


def imported(path: str) -> Any:  # whatever stands there
    """What stands at an import path.

    Args:
        path: ``"my_project.transforms.augment"``; ``"__main__.augment"`` of the running script.

    Returns:
        The object.

    Raises:
        ImportError: If there is no such module.
        AttributeError: If it has no such name.

    """
    place, _, attribute = path.rpartition(".")
    return getattr(importlib.import_module(place), attribute)


def place_of_code(function: Callable[..., Any]) -> tuple[str, bool]:
    """Where a function is written.

    Args:
        function: The function or method.

    Returns:
        ``file.py:line``, "" if that is not known, and whether it comes with an installed library.

    """
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return "", False
    installed = tuple(path + os.sep for path in (*site.getsitepackages(), site.getusersitepackages()))
    place = f"{os.path.basename(code.co_filename)}:{code.co_firstlineno}"
    return place, code.co_filename.startswith(installed)


def _not_found(name: str, why: str, asked_by: str) -> str:
    return (
        f"{asked_by}: {name!r} names no function: {why}. Write the name of a method of your LightningModule or"
        ' datamodule ("augment"), or a function\'s import path ("my_project.transforms.augment").'
    )
