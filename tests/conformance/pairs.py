"""The law of order: any two techniques train together, or are refused by name."""

from contextlib import suppress
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_reg.engine.composition import conflict_between
from lightning_reg.engine.technique import Technique, phases_of
from tests.conformance.case import Case
from tests.conformance.discovery import MissingCaseError, case_of, technique_classes
from tests.conformance.harness import Run, demand, difference, fit
from tests.conformance.problems import Problem

__all__ = ["common_problem", "need_other_layers", "order", "train_pair"]


def order(case: Case) -> None:
    """The technique before every other one, itself included, trains with both at work, or is refused by both names."""
    others = [case]
    for cls in technique_classes():
        with suppress(MissingCaseError):  # a failure of its own
            others.append(case_of(cls))
    alone: dict[int, Any] = {}  # weights after a fit without a second technique, by problem
    for other in others:
        problem = common_problem(case, other)
        if problem is not None and (other is case or other.cls is not case.cls):
            _check_pair(case, other, problem, alone)


def _check_pair(case: Case, other: Case, problem: Problem, alone: dict[int, Any]) -> None:
    run = train_pair(case.make(name="one"), other.make(name="two"), problem)
    names = f"{case.cls.__name__} before {other.cls.__name__}"
    said = conflict_between(case.make(name="one"), other.make(name="two"))
    if run is None:
        assert said or need_other_layers(case, other), (
            f"{names}: refused in the middle of the fit; `conflict_with` must say it when the fit starts"
        )
        return
    assert not said, f"{names}: trains, although it is refused: {said}"
    assert all(bool(torch.isfinite(w).all()) for w in run.weights.values()), f"{names}: the weights are not finite"
    for technique, its_case in zip(run.techniques, (case, other), strict=True):
        at_work = any(key.startswith(f"{technique.log_key}/") for key in run.own_scalars)
        assert at_work or "says_what_it_does" in its_case.exempt, f"{names}: nothing logged under {technique.log_key}/"
    if other.neutral is None or "neutral_is_nothing" in other.exempt:
        return
    with_neutral = train_pair(case.make(name="one"), other.neutral(name="two"), problem)
    if with_neutral is not None:
        if id(problem) not in alone:
            alone[id(problem)] = fit([case.make(name="one")], problem).weights
        found = difference(alone[id(problem)], with_neutral.weights)
        assert not found, f"{names}: at its neutral setting the second changes the weights: {found}"


def need_other_layers(one: Case, two: Case) -> bool:
    """Whether two are of one class that changes weights: where their layers meet is known only in the fit."""
    return one.cls is two.cls and bool({"edit_weights", "map_weights"}.intersection(phases_of(one.cls)))


def train_pair(one: Technique, two: Technique, problem: Problem) -> Run | None:
    """Trains with two techniques.

    Args:
        one: The first among the callbacks.
        two: The second.
        problem: What to train on.

    Returns:
        The run, ``None`` if the two were refused as they may be: by name, with MisconfigurationException.

    """
    names = [type(t).__name__ for t in (one, two)]
    try:
        return fit([one, two], problem)
    except MisconfigurationException as error:
        by_name = all(name in str(error) for name in names)
        demand(by_name, f"{' and '.join(names)} are refused, but not by name: {error}")
        return None
    except Exception as error:
        raise AssertionError(f"{names[0]} before {names[1]}: {type(error).__name__}: {error}") from error


def common_problem(one: Case, two: Case) -> Problem | None:
    """What two techniques can both train on."""
    for case, guest in ((one, two), (two, one)):
        serves: list[Any] = [case.data, *case.problem.serves]
        if any(kind in serves for kind in (guest.data, *guest.also)):
            return case.problem
    return None
