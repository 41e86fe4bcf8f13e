"""Finds what is public: every module in a purpose folder, by the names it lists; nothing is registered by hand."""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import Sampler
from torchmetrics import Metric

import lightning_reg
from lightning_reg.engine.host.procedures import is_procedure
from lightning_reg.engine.run.phases import phases_of
from lightning_reg.engine.technique import Technique

__all__ = [
    "KINDS",
    "Public",
    "Unit",
    "arguments",
    "commands",
    "kind_of",
    "paragraphs",
    "purposes",
    "section",
    "summary",
    "units",
]

KINDS = ("technique", "metric", "loss", "network", "lightning_module", "datamodule", "procedure", "sampler")
_NOT_A_PURPOSE = ("engine",)
# The first that fits: a metric and a LightningModule are networks too.
_BASES: tuple[tuple[str, type[Any]], ...] = (
    ("technique", Technique),
    ("metric", Metric),
    ("lightning_module", LightningModule),
    ("datamodule", LightningDataModule),
    ("sampler", Sampler),
    ("network", nn.Module),
)


def kind_of(value: Any) -> str | None:  # noqa: ANN401 # a public object of any kind
    """What a public class or function is.

    Nothing is registered: a class is what it inherits from, a network whose name ends in ``Loss`` is a loss, and a
    function is a procedure if it was declared one.

    Args:
        value: The class or function.

    Returns:
        One of ``KINDS``; ``None`` for plain functions, results and reports.

    """
    if not inspect.isclass(value):
        return "procedure" if is_procedure(value) else None
    kind = next((kind for kind, base in _BASES if issubclass(value, base)), None)
    return "loss" if kind == "network" and value.__name__.endswith("Loss") else kind


@dataclass(frozen=True)
class Public:
    """A public name.

    Args:
        home: The module that lists it in its ``__all__``.
        name: The name.
        value: The class or function.

    """

    home: str
    name: str
    value: Any

    @property
    def is_core(self) -> bool:
        """Whether it works in any training loop: a function, or part of a file ``core.py``."""
        return inspect.isfunction(self.value) or self.home.endswith(".core")

    @property
    def kind(self) -> str | None:
        """What it is, see :func:`kind_of`."""
        return kind_of(self.value)

    @property
    def acts_on(self) -> str:
        """Phases of the step that a technique takes part in; of others, their kind."""
        if self.kind == "technique":
            return ", ".join(phases_of(self.value)) or "callback hooks"
        return (self.kind or "").replace("_", " ")


@dataclass(frozen=True)
class Unit:
    """A file or folder of one purpose, with one technique or several that share a core.

    Args:
        folder: Its purpose, ``noisy_labels`` for example.
        key: Name of the file or folder.
        modules: The imported modules, its core first.

    """

    folder: str
    key: str
    modules: Sequence[ModuleType]

    def public(self) -> list[Public]:
        """Public names, in the order of the files and of their ``__all__``."""
        return [Public(m.__name__, name, getattr(m, name)) for m in self.modules for name in m.__all__]

    def techniques(self) -> list[type[Technique]]:
        """The callbacks among the classes."""
        return [public.value for public in self.members() if public.kind == "technique"]

    def members(self) -> list[Public]:
        """What is of a kind: techniques, metrics, networks, procedures."""
        return [public for public in self.public() if public.kind is not None]

    def cores(self) -> list[Public]:
        """What works in any training loop."""
        return [public for public in self.public() if public.is_core]


def units() -> Iterator[Unit]:
    """All units, by folder and key; what begins with an underscore is a part of the techniques of its folder."""
    for folder in purposes():
        for file in _files(f"lightning_reg.{folder}"):
            if file.name.startswith("_"):
                continue
            path = f"lightning_reg.{folder}.{file.name}"
            inner = [f.name for f in _files(path) if not f.name.startswith("_")] if file.ispkg else []
            paths = [f"{path}.{name}" for name in sorted(inner, key=lambda name: name != "core")] or [path]
            yield Unit(folder, file.name, [importlib.import_module(one) for one in paths])


def commands() -> Iterator[ModuleType]:
    """The files ``_command.py``: each adds commands to ``lightning-reg`` by its ``add_command(commands)``."""
    for folder in purposes():
        for file in _files(f"lightning_reg.{folder}"):
            path = f"lightning_reg.{folder}.{file.name}"
            if file.ispkg and any(inner.name == "_command" for inner in _files(path)):
                yield importlib.import_module(f"{path}._command")


def purposes() -> list[str]:
    """The folders of techniques, by name."""
    found = pkgutil.iter_modules(lightning_reg.__path__)
    return [folder.name for folder in found if folder.ispkg and folder.name not in _NOT_A_PURPOSE]


def _files(package: str) -> list[pkgutil.ModuleInfo]:
    return list(pkgutil.iter_modules(importlib.import_module(package).__path__))


def summary(value: Any) -> str:  # noqa: ANN401 # a class or function
    """First line of a docstring."""
    return (inspect.getdoc(value) or "").partition("\n")[0]


def section(value: Any, name: str) -> str:  # noqa: ANN401 # a class or function
    """A section of a docstring (``Source``, ``Differs``), on one line; "" if there is none."""
    match = re.search(rf"^{name}:\n((?:[ ]+.*\n|\n)+)", (inspect.getdoc(value) or "") + "\n", re.MULTILINE)
    return " ".join(match[1].split()) if match else ""


def paragraphs(value: Any) -> list[str]:  # noqa: ANN401 # a class or function
    """What a docstring says between its first line and its first section, one line for each paragraph."""
    text = (inspect.getdoc(value) or "").partition("\n")[2]
    before = re.split(r"^\w+:\n", text, maxsplit=1, flags=re.MULTILINE)[0]
    return [" ".join(one.split()) for one in re.split(r"\n\s*\n", before) if one.strip()]


def arguments(value: Any) -> dict[str, str]:  # noqa: ANN401 # a class or function
    """What a docstring says of each argument, on one line, by name."""
    match = re.search(r"^Args:\n((?:[ ]+.*\n|\n)+)", (inspect.getdoc(value) or "") + "\n", re.MULTILINE)
    entries = re.split(r"^ {4}(\w+):", match[1] if match else "", flags=re.MULTILINE)[1:]
    return {name: " ".join(text.split()) for name, text in zip(entries[::2], entries[1::2], strict=True)}
