"""Pairs of techniques that were tried, with the content they had; which of them a run of the tests tries again."""

import hashlib
import inspect
import json
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import product
from pathlib import Path

import lightning_reg
from lightning_reg.engine.technique import Technique
from tests.conformance.case import Case
from tests.conformance.pairs import common_problem, pairs_with_references

__all__ = [
    "PARTNERS",
    "RECORD",
    "REFERENCE_PAIRS",
    "Pair",
    "all_pairs",
    "content_of",
    "is_stale",
    "name_of",
    "pairs_to_try",
    "recorded",
    "reference_pairs",
    "reference_pairs_to_try",
    "technique_pairs",
]

RECORD = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "compositions.json"
Pair = tuple[Case, Case]
# Of the pairs that have not changed, as many for each technique: of techniques, and with references.
PARTNERS, REFERENCE_PAIRS = 1, 7


def technique_pairs(cases: Sequence[Case]) -> list[Pair]:
    """All ordered pairs that have data in common, each technique with itself included."""
    return [pair for pair in product(cases, cases) if common_problem(*pair) is not None]


def reference_pairs(cases: Sequence[Case]) -> list[Pair]:
    """Each technique beside the references, in one order or in both."""
    return [pair for case in cases for pair in pairs_with_references(case)]


def all_pairs(cases: Sequence[Case]) -> list[Pair]:
    """What ``make matrix`` tries."""
    return [*technique_pairs(cases), *reference_pairs(cases)]


def name_of(pair: Pair) -> str:
    """The pair's name in the record."""
    return " before ".join(case.cls.__name__ for case in pair)


@cache
def content_of(cls: type[Technique]) -> str:
    """What identifies a technique's code: a digest of the files of its unit and of the file with its case.

    That of a reference is the file of all of them.
    """
    if not cls.__module__.startswith(f"{lightning_reg.__name__}."):
        return _digest([Path(inspect.getfile(cls))])
    unit = Path(inspect.getfile(cls)).parent
    purpose, key = cls.__module__.split(".")[1:3]
    test = Path(__file__).resolve().parents[1] / purpose / f"test_{key}.py"
    return _digest([*unit.rglob("*.py"), *unit.parent.glob("*.py"), test])


def recorded() -> dict[str, dict[str, str]]:
    """What was tried, by the pair's name."""
    return json.loads(RECORD.read_text())["pairs"] if RECORD.exists() else {}


def pairs_to_try(cases: Sequence[Case]) -> list[Pair]:
    """Pairs with changed files, and a slice of the others that the package's content chooses.

    The same content chooses the same pairs, and each change of the package others.
    """
    return _changed_and_a_slice(technique_pairs(cases), PARTNERS * len(cases))


def reference_pairs_to_try(cases: Sequence[Case]) -> list[Pair]:
    """The same of techniques beside references: about a third of those that have not changed."""
    return _changed_and_a_slice(reference_pairs(cases), REFERENCE_PAIRS * len(cases))


def _changed_and_a_slice(pairs: Sequence[Pair], size: int) -> list[Pair]:
    known = recorded()
    changed = [pair for pair in pairs if is_stale(pair, known)]
    package = _digest(Path(lightning_reg.__file__).parent.rglob("*.py"))
    rest = sorted(
        (pair for pair in pairs if pair not in changed),
        key=lambda pair: hashlib.sha256(f"{package} {name_of(pair)}".encode()).digest(),
    )
    return [*changed, *rest[:size]]


def is_stale(pair: Pair, known: dict[str, dict[str, str]]) -> bool:
    """Whether a file of one of the two has changed since the pair was tried."""
    entry = known.get(name_of(pair), {})
    return any(entry.get(case.cls.__name__) != content_of(case.cls) for case in pair)


def _digest(files: Iterable[Path]) -> str:
    texts = sorted((file.name, file.read_text()) for file in files)
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]
