"""Finds every technique of the package and the case that its test file declares."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning_reg
from lightning_reg import registry
from lightning_reg.engine.technique import Technique
from tests.conformance.case import Case
from tests.conformance.kinds import CASES, AnyCase

__all__ = ["MissingCaseError", "case_of", "case_of_kind", "others", "technique_classes"]

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


def others() -> Iterator[registry.Public]:
    """What is public and of a kind, but no technique."""
    for unit in registry.units():
        yield from (member for member in unit.members() if member.kind != "technique")


def case_of(cls: type[Technique], tests: Path = _TESTS) -> Case:
    """The case of a technique.

    Args:
        cls: The technique.
        tests: Folder of the tests.

    Returns:
        Its case, from ``CASE`` of ``tests/<folder>/test_<file>.py``: one case, or a tuple with one for each technique
        of the file, and for what else is of a kind.

    Raises:
        MissingCaseError: If there is no such file, or no fitting case in it; the message says what to write.

    """
    arguments = f"make=partial({cls.__name__}, ...), neutral=partial({cls.__name__}, ...)"
    case: Case = _find(cls, Case, arguments, "tests.conformance.case", tests)
    return case


def case_of_kind(value: Any, kind: str, tests: Path = _TESTS) -> AnyCase:
    """The case of something public that is no technique, see :func:`case_of`.

    Args:
        value: The class or function.
        kind: Its kind.
        tests: Folder of the tests.

    Returns:
        Its case.

    """
    wanted = CASES[kind]
    case: AnyCase = _find(value, wanted, "...", wanted.__module__, tests)
    return case


def _find(value: Any, wanted: type[Any], arguments: str, home: str, tests: Path) -> Any:
    folder, file = value.__module__.split(".")[1:3]
    path = tests / folder / f"test_{file}.py"
    sentence = (
        f"{value.__name__}: write `CASE = {wanted.__name__}({arguments})` in tests/{folder}/test_{file}.py, with `from"
        f" {home} import {wanted.__name__}`; its docstring says what else a case can hold."
    )
    if not path.exists():
        raise MissingCaseError(f"There is no such file. {sentence}")
    case = getattr(importlib.import_module(f"tests.{folder}.test_{file}"), "CASE", None)
    cases = case if isinstance(case, tuple) else (case,)
    if not cases or not all(isinstance(case, Case | AnyCase) for case in cases):
        raise MissingCaseError(f"The file has no `CASE`. {sentence}")
    found = [case for case in cases if isinstance(case, wanted) and case.subject is value]
    if not found:
        raise MissingCaseError(f"`CASE` is for {', '.join(case.subject.__name__ for case in cases)}. {sentence}")
    return found[0]
