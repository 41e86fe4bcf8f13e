"""The laws about words: what a technique prints, logs and refuses, and what its docstrings say."""

import inspect
import io
import re
import sys
import typing
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal

from rich.console import Console

from lightning_reg import registry
from lightning_reg.engine.run.report import techniques_table
from tests.conformance.case import Case
from tests.conformance.harness import demand, fit_made, once

__all__ = ["check_docstring", "check_refused", "cited", "says_what_it_does"]

_VENUES = (
    "AAAI|ACL|AISTATS|BMVC|COLM|COLT|CVPR|ECCV|ECML|EMNLP|ICASSP|ICCV|ICDM|ICLR|ICML|ICPR|IJCAI|IJCV|Interspeech|JMLR|KDD|"
    "MICCAI|MLSys|NAACL|NIPS|Nature|NeurIPS|Neurocomputing|PAMI|PNAS|SIGGRAPH|TMLR|TNNLS|UAI|WACV"
)


def says_what_it_does(case: Case) -> None:
    """The lines of the CASE in the table, scalars under its own key, and errors that name class and argument."""
    _check_lines(case)
    _check_line(case.make(name="one"))
    run = once(fit_made, case.problem, case.make, name="one")
    (technique,) = run.techniques
    _check_line(technique)
    own, shared = f"reg/{case.cls.key()}_one/", "reg/loss/"
    astray = sorted(key for key in run.own_scalars if not key.startswith((own, shared)))
    assert not astray, f"logged {astray}, which is not under {own}"
    assert any(key.startswith(own) for key in run.own_scalars), f"no scalar is logged under {own}"
    for kwargs, argument in (*case.invalid, *_wrong_kinds(case.cls)):
        check_refused(case.cls, _required(case, technique) | dict(kwargs), argument)


def _check_lines(case: Case) -> None:
    made = [make() for make in (case.make, case.neutral, *case.variants) if make is not None]
    for technique in made:
        _check_line(technique)
    lines = [technique.describe() for technique in made]
    name = case.cls.__name__
    demand(lines == list(case.says), f"{name}.describe() says what the CASE does not: write `says={lines}` if it is so")


def _check_line(technique: Any) -> None:
    line = technique.describe()
    assert line.strip(), f"{type(technique).__name__}.describe() is an empty line"
    assert "\n" not in line, f"{type(technique).__name__}.describe() has several lines: {line!r}"
    console = Console(file=io.StringIO(), width=10_000)
    console.print(techniques_table([technique], {}))
    table = console.file.getvalue()
    assert line in table, f"the table swallows a part of {line!r} (square brackets are markup: escape them)"


def _wrong_kinds(cls: type[Any]) -> list[tuple[dict[str, Any], str]]:
    """A value of the wrong kind for every argument that takes numbers, a truth value or one of several words."""
    try:
        hints = typing.get_type_hints(cls.__init__)
    except NameError as error:
        raise AssertionError(
            f"{cls.__name__}: the command line cannot read the constructor's types: {error}"
        ) from error
    wrong: list[tuple[dict[str, Any], str]] = []
    for name, hint in hints.items():
        kinds = typing.get_args(hint) or (hint,)
        if typing.get_origin(hint) is Literal:
            wrong.append(({name: "no such choice"}, name))
        elif bool in kinds:
            wrong += [({name: value}, name) for value in ("False", "", 0)]
        elif int in kinds or float in kinds:
            values = [float("nan"), *([] if str in kinds else ["a word"]), *([] if float in kinds else [1.5])]
            wrong += [({name: value}, name) for value in values]
    return wrong


def _required(case: Case, technique: Any) -> dict[str, Any]:
    """Arguments that the class has no default for, as ``technique`` has them."""
    parameters = list(inspect.signature(case.cls.__init__).parameters.values())[1:]
    return {p.name: getattr(technique, p.name) for p in parameters if p.default is p.empty}


def check_refused(make: Callable[..., Any], kwargs: dict[str, Any], argument: str, name: str = "") -> None:
    """Something made, or called, with such arguments raises a ValueError that names it and the argument."""
    name = name or make.__name__
    call = f"{name}({', '.join(f'{k}={v!r}' for k, v in kwargs.items())})"
    try:
        make(**kwargs)
    except ValueError as error:
        named = name in str(error) and f"`{argument}`" in str(error)
        demand(named, f"{call}: the error does not name class and argument `{argument}`: {error}")
    except Exception as error:
        raise AssertionError(f"{call} raises {type(error).__name__} in place of ValueError: {error}") from error
    else:
        raise AssertionError(f"{call} is not refused")


def cited(case: Case) -> None:
    """The docstring gives paper, year and place, what differs, and every argument; public functions are documented."""
    cls = case.cls
    check_docstring(cls, list(inspect.signature(cls.__init__).parameters)[1:])
    functions = _public_functions(cls)
    assert functions, f"{cls.__name__}: `__all__` of its files lists no function: where is the core in pure PyTorch?"
    for function in functions:
        _check_arguments(function.__name__, function, list(inspect.signature(function).parameters))
        returns = inspect.signature(function).return_annotation not in (None, "None")
        assert not returns or "\nReturns:" in inspect.getdoc(function), f"{function.__name__}: no `Returns:`"


def check_docstring(value: Any, arguments: list[str]) -> None:
    """A public class or function gives paper, year and place, what differs, and every argument."""
    name, source = value.__name__, registry.section(value, "Source")
    assert source, f"{name}: the docstring has no section `Source:`"
    assert re.search(r"\b(19|20)\d\d\b", source), f"{name}: `Source:` gives no year: {source}"
    place = re.search(rf"arXiv[: ]\s*\d{{4}}\.\d{{4,5}}|doi|\b({_VENUES})\b", source)
    assert place, f"{name}: `Source:` gives no arXiv number, DOI or known venue: {source}"
    assert registry.section(value, "Differs"), f"{name}: the docstring has no section `Differs:` (or `nothing`)"
    _check_arguments(name, value, arguments)


def _public_functions(cls: type[Any]) -> list[Callable[..., Any]]:
    module = sys.modules[cls.__module__]
    files = next((unit.modules for unit in registry.units() if module in unit.modules), None) or _files_of(module)
    return [value for file in files for name in file.__all__ if inspect.isfunction(value := getattr(file, name))]


def _files_of(module: ModuleType) -> list[ModuleType]:
    """A file that is in no purpose folder, as the tutorial's is not, and the core beside it."""
    core = f"{module.__package__}.core"
    return [module] if find_spec(core) is None else [import_module(core), module]


def _check_arguments(name: str, owner: Any, arguments: list[str]) -> None:
    text = inspect.getdoc(owner) or ""
    section = re.search(r"^Args:\n((?:[ ]+.*\n|\n)+)", text + "\n", re.MULTILINE)
    documented = re.findall(r"^    \*{0,2}(\w+):", section[1] if section else "", re.MULTILINE)
    missing, ghosts = set(arguments) - set(documented), set(documented) - set(arguments)
    assert not missing, f"{name}: `Args:` does not document {sorted(missing)}"
    assert not ghosts, f"{name}: `Args:` documents {sorted(ghosts)}, which it does not take"
