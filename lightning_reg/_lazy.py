"""Public names that are imported when they are asked for, so that importing the package stays cheap."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from lightning_reg._deprecated import RENAMED, warn_deprecated

__all__ = ["lazy_attributes"]


def lazy_attributes(
    module: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """A module's ``__getattr__``, ``__dir__`` and ``__all__`` for names that live elsewhere.

    Args:
        module: Name of the module.
        homes: The module that defines each name.

    Returns:
        The three, to be assigned in the module.

    """

    def find(name: str) -> Any:  # noqa: ANN401 # a public object of any kind
        renamed = next((entry for entry in RENAMED if entry.old == name and entry.new in homes), None)
        if renamed is not None:
            warn_deprecated(*renamed)
            return find(renamed.new)
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(homes[name]), name)
        setattr(sys.modules[module], name, value)  # asked for once
        return value

    def listed() -> list[str]:
        return sorted({*vars(sys.modules[module]), *homes})

    return find, listed, list(homes)
