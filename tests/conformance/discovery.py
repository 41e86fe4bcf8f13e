"""Finds every technique of the package and the case that its test file declares."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import lightning_reg
from lightning_reg.engine.technique import Technique
from tests.conformance.case import Case

__all__ = ["MissingCaseError", "case_of", "technique_classes"]

_TESTS = Path(__file__).resolve().parents[1]


class MissingCaseError(Exception):
    """A technique that the laws cannot be run on."""


def technique_classes(package: ModuleType = lightning_reg) -> Iterator[type[Technique]]:
    """Every concrete Technique defined in a purpose folder, listed in its file's ``__all__`` or not."""
    for folder in pkgutil.iter_modules(package.__path__):
        if not folder.ispkg or folder.name == "engine":
            continue
        purpose = importlib.import_module(f"{package.__name__}.{folder.name}")
        for file in pkgutil.walk_packages(purpose.__path__, f"{purpose.__name__}."):
            module = importlib.import_module(file.name)
            for _, value in sorted(vars(module).items()):
                is_technique = inspect.isclass(value) and issubclass(value, Technique)
                if is_technique and value.__module__ == module.__name__ and not inspect.isabstract(value):
                    yield value


def case_of(cls: type[Technique], tests: Path = _TESTS) -> Case:
    """The case of a technique.

    Args:
        cls: The technique.
        tests: Folder of the tests.

    Returns:
        Its case, from ``CASE`` of ``tests/<folder>/test_<file>.py``: one case, or a tuple with one for each technique
        of the file.

    Raises:
        MissingCaseError: If there is no such file, or no fitting case in it; the message says what to write.

    """
    folder, file = cls.__module__.split(".")[1:3]
    path = tests / folder / f"test_{file}.py"
    wanted = (
        f"{cls.__name__}: write `CASE = Case(make=partial({cls.__name__}, ...), neutral=partial({cls.__name__}, ...))`"
        f" in tests/{folder}/test_{file}.py, with `from tests.conformance.case import Case`; its docstring says"
        " what else a case can hold."
    )
    if not path.exists():
        raise MissingCaseError(f"There is no such file. {wanted}")
    case = getattr(importlib.import_module(f"tests.{folder}.test_{file}"), "CASE", None)
    cases = case if isinstance(case, tuple) else (case,)
    if not cases or not all(isinstance(case, Case) for case in cases):
        raise MissingCaseError(f"The file has no `CASE`. {wanted}")
    for case in cases:
        if case.cls is cls:
            return case
    raise MissingCaseError(f"`CASE` is for {', '.join(case.cls.__name__ for case in cases)}. {wanted}")
