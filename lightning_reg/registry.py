"""Finds the techniques: every module in a purpose folder, by the names it lists; nothing is registered by hand."""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import lightning_reg
from lightning_reg.engine.technique import Technique, phases_of

__all__ = ["TechniqueFile", "commands", "techniques"]

_NOT_A_PURPOSE = ("engine",)


@dataclass(frozen=True)
class TechniqueFile:
    """One technique's file.

    Args:
        folder: Its purpose, ``noisy_labels`` for example.
        key: Name of the file.
        module: The imported module.

    """

    folder: str
    key: str
    module: ModuleType

    def classes(self) -> list[type[Any]]:
        """Public classes of the file, in the order of its ``__all__``."""
        return [value for value in self._public() if inspect.isclass(value)]

    def functions(self) -> list[str]:
        """Names of the public functions of the file."""
        return [value.__name__ for value in self._public() if inspect.isfunction(value)]

    def cores(self) -> list[str]:
        """Names of what works in any training loop: the functions, and the classes that are no callbacks."""
        return [value.__name__ for value in self._public() if value not in self.techniques()]

    def techniques(self) -> list[type[Technique]]:
        """The callbacks among the classes."""
        return [cls for cls in self.classes() if issubclass(cls, Technique)]

    def _public(self) -> list[Any]:
        return [getattr(self.module, name) for name in self.module.__all__]


def techniques() -> Iterator[TechniqueFile]:
    """All technique files, by folder and key; a file ``_<part>.py`` is a part of the techniques of its folder."""
    for folder, file in _files():
        if not file.startswith("_"):
            yield TechniqueFile(folder, file, importlib.import_module(f"lightning_reg.{folder}.{file}"))


def commands() -> Iterator[ModuleType]:
    """The files ``_command.py``: each adds commands to ``lightning-reg`` by its ``add_command(subparsers)``."""
    for folder, file in _files():
        if file == "_command":
            yield importlib.import_module(f"lightning_reg.{folder}.{file}")


def _files() -> Iterator[tuple[str, str]]:
    for folder in pkgutil.iter_modules(lightning_reg.__path__):
        if folder.ispkg and folder.name not in _NOT_A_PURPOSE:
            package = importlib.import_module(f"lightning_reg.{folder.name}")
            for file in pkgutil.iter_modules(package.__path__):
                yield folder.name, file.name


def summary(cls: type[Any]) -> str:
    """First line of the class's docstring."""
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def section(cls: type[Any], name: str) -> str:
    """A section of the class's docstring (``Source``, ``Differs``), on one line; "" if there is none."""
    match = re.search(rf"^{name}:\n((?:[ ]+.*\n|\n)+)", (inspect.getdoc(cls) or "") + "\n", re.MULTILINE)
    return " ".join(match[1].split()) if match else ""


def acts_on(cls: type[Technique]) -> str:
    """Phases of the step that a technique takes part in."""
    return ", ".join(phases_of(cls)) or "callback hooks"
