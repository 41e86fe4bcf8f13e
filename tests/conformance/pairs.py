"""Fits against loops in plain PyTorch: a technique alone, and two of them, unless they are refused by name."""

from collections.abc import Callable
from functools import partial
from typing import Any
from zlib import crc32

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_reg.engine.run.composition import conflict_between
from lightning_reg.engine.run.phases import OnLayers, phases_of
from lightning_reg.engine.technique import Technique
from tests.conformance.by_hand import evaluate_by_hand, train_by_hand
from tests.conformance.case import Case
from tests.conformance.harness import Run, demand, difference, fit, fit_made, once
from tests.conformance.problems import KINDS, Problem
from tests.conformance.references import REFERENCES

__all__ = [
    "as_by_hand",
    "check_pair",
    "common_problem",
    "made_for",
    "need_other_layers",
    "neutral_beside_references",
    "order",
    "pairs_with_references",
    "stages_of",
    "train_pair",
]

# float32, sums in another order, 16 steps; what a technique does is larger by at least 10.
_TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
_EFFECT = {"rtol": 1e-3, "atol": 2e-4}


def as_by_hand(case: Case) -> None:
    """The technique alone trains and is evaluated as a loop in plain PyTorch, in which it makes a difference.

    With ``trains_as_plain`` that loop is the one without it.
    """
    name = case.cls.__name__
    assert case.by_hand is not None, (
        f"{name}: write `by_hand=` into the CASE: the class of a `Hand` (tests/conformance/by_hand.py), the technique's"
        " part of a loop in plain PyTorch. Fits alone and in pairs are compared with it."
    )
    run = once(fit_made, case.problem, case.make)
    hand = train_by_hand(case.problem, [case.by_hand(case.make())], run.watch.random_before)
    found = difference(hand, run.weights, **_TOLERANCE)
    assert not found, f"{name}: the loop by hand and the fit differ: {found}"
    plain = once(fit_made, case.problem).weights
    differs = _is_evaluated_otherwise(case, run) or bool(difference(hand, plain, **_EFFECT))
    assert differs or case.trains_as_plain, f"{name}: the loop by hand trains as one without the technique"
    assert not (differs and case.trains_as_plain), f"{name}: `trains_as_plain`, but the loop by hand makes a difference"


def _is_evaluated_otherwise(case: Case, run: Run) -> bool:
    """Checks the last validation of one that acts there; whether its loss is another than the network's own."""
    assert case.by_hand is not None
    if "validate" not in stages_of(run.techniques[0]):
        return False
    logged = [row["val_loss"] for _, row in run.logged if "val_loss" in row][-1]
    hand = evaluate_by_hand(case.problem, run.weights, case.by_hand(run.techniques[0]))
    found = difference(hand, logged, **_TOLERANCE)
    assert not found, f"{case.cls.__name__}: the validation by hand and that of the fit differ: {found}"
    return bool(difference(hand, evaluate_by_hand(case.problem, run.weights), **_EFFECT))


def order(case: Case) -> None:
    """Beside each reference it trains as a loop of both, or is refused by name; at its neutral setting, as none."""
    for first, second in pairs_with_references(case):
        check_pair(first, second)
    neutral_beside_references(case)


def pairs_with_references(case: Case) -> list[tuple[Case, Case]]:
    """The technique and each reference: in both orders where they share a phase, else in one, by their names."""
    pairs = []
    for reference in REFERENCES:
        if common_problem(case, reference) is None:
            continue
        share = bool(set(phases_of(case.cls)).intersection(phases_of(reference.cls)))
        first = crc32(f"{case.cls.__name__} {reference.cls.__name__}".encode()) % 2
        pairs += [(case, reference)] if share or first else []
        pairs += [(reference, case)] if share or not first else []
    return pairs


def neutral_beside_references(case: Case) -> None:
    """At its neutral setting it changes nothing for a stack of references, as many as stand together with it."""
    if case.neutral is None or "neutral_is_nothing" in case.exempt:
        return
    if not any(common_problem(case, reference) is case.problem for reference in REFERENCES):
        return  # nobody else trains on such data; alone it is law
    stack: list[Technique] = []
    for reference in REFERENCES:
        one = reference.make(name="one")
        fits = common_problem(case, reference) is case.problem
        if fits and not any(conflict_between(other, one) for other in [case.neutral(), *stack]):
            stack.append(one)
    names = ", ".join(type(one).__name__ for one in stack)
    assert stack, f"{case.cls.__name__}: no reference stands together with it at its neutral setting"
    plain = once(_fit_references, case.problem, names=names)
    beside = fit([*stack, case.neutral()], case.problem)
    found = difference(plain.weights, beside.weights)
    assert not found, f"{case.cls.__name__}: at its neutral setting it changes the weights beside {names}: {found}"


def _fit_references(problem: Problem, names: str) -> Run:
    return fit([one.make(name="one") for one in REFERENCES if one.cls.__name__ in names.split(", ")], problem)


def check_pair(case: Case, other: Case) -> str:
    """The first before the second trains as a loop of both, or is refused by both names.

    Args:
        case: The first.
        other: The second.

    Returns:
        What is so: "trains" or "refused"; "-" if there is no kind of data that both take.

    """
    problem = common_problem(case, other)
    if problem is None:
        return "-"
    first, second = partial(made_for, case, "one", problem), partial(made_for, other, "two", problem)
    run = train_pair(first(), second(), problem, log_every_n_steps=3)
    names = f"{case.cls.__name__} before {other.cls.__name__}"
    said = conflict_between(first(), second())
    if run is None:
        assert said or need_other_layers(case, other), (
            f"{names}: refused in the middle of the fit; `conflict_with` must say it when the fit starts"
        )
        return "refused"
    assert not said, f"{names}: trains, although it is refused: {said}"
    assert all(bool(torch.isfinite(w).all()) for w in run.weights.values()), f"{names}: the weights are not finite"
    for technique, its_case in zip(run.techniques, (case, other), strict=True):
        at_work = any(key.startswith(f"{technique.log_key}/") for key in run.own_scalars)
        assert at_work or "says_what_it_does" in its_case.exempt, f"{names}: nothing logged under {technique.log_key}/"
    _check_by_hand(names, case, other, problem, run)
    return "trains"


# An absolute difference to the network's own first weights begins at its kink, where the last digit of a sum over a
# chunk decides on the gradient.
_AT_A_KINK = {"FrozenTwinAgreement", "GradCache"}


def _check_by_hand(names: str, case: Case, other: Case, problem: Problem, run: Run) -> None:
    if case.by_hand is None or other.by_hand is None:
        return  # the law `as_by_hand` asks for it
    if {case.cls.__name__, other.cls.__name__} == _AT_A_KINK:
        return
    random = run.watch.random_before
    both = train_by_hand(problem, [_hand(case, "one", problem), _hand(other, "two", problem)], random)
    found = difference(both, run.weights, **_TOLERANCE)
    assert not found, f"{names}: the loop by hand and the fit differ: {found}"
    for one, name, rest in ((case, "one", other), (other, "two", case)):
        alone = difference(once(_train_alone, one, problem, name=name), both, **_EFFECT)
        assert alone or not _acts_in_training(rest), (
            f"{names}: beside {one.cls.__name__} the loop by hand does nothing for {rest.cls.__name__}"
        )


def _train_alone(case: Case, problem: Problem, name: str) -> dict[str, torch.Tensor]:
    random = once(fit_made, problem).watch.random_before  # by another law they are the same in every fit
    return train_by_hand(problem, [_hand(case, name, problem)], random)


def _hand(case: Case, name: str, problem: Problem) -> Any:
    assert case.by_hand is not None
    hand = case.by_hand(made_for(case, name, problem))
    hand.kind = str(case.data) if problem.parts else ""
    return hand


def stages_of(technique: Technique) -> frozenset[str]:
    """Steps in which a technique acts; one that takes part in no phase says so itself."""
    says = isinstance(technique, OnLayers) or not phases_of(technique)
    return frozenset(technique.stages) if says else frozenset({"train"})


def _acts_in_training(case: Case) -> bool:
    if case.trains_as_plain:  # alone, too, it makes no difference
        return False
    technique = case.make()
    return "train" in stages_of(technique) or not {"edit_inputs", "edit_features"}.issuperset(phases_of(technique))


def need_other_layers(one: Case, two: Case) -> bool:
    """Whether a fit alone knows if they meet: both map or edit weights, or a map is at a layer that runs in chunks."""
    if "GradCache" in {one.cls.__name__, two.cls.__name__}:
        return any("map_weights" in phases_of(case.cls) for case in (one, two))
    if "map_weights" in phases_of(one.cls) and "map_weights" in phases_of(two.cls):
        return True
    both_edit = all("edit_weights" in phases_of(case.cls) for case in (one, two))
    return both_edit and (one.cls is two.cls or any(getattr(case.cls, "maps_steps", False) for case in (one, two)))


def train_pair(one: Technique, two: Technique, problem: Problem, **options: Any) -> Run | None:
    """Trains with two techniques.

    Args:
        one: The first among the callbacks.
        two: The second.
        problem: What to train on.
        options: Of the harness and the Trainer.

    Returns:
        The run, ``None`` if the two were refused as they may be: by name, with MisconfigurationException.

    """
    names = [type(t).__name__ for t in (one, two)]
    try:
        return fit([one, two], problem, **options)
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
    of_one_loss = all(isinstance(case.data, str) and case.data in KINDS["both"].parts for case in (one, two))
    return KINDS["both"] if of_one_loss else None


def made_for(case: Case, name: str, problem: Problem, make: Callable[..., Technique] | None = None) -> Technique:
    """A technique for a pair on a problem; of several losses it works on the one of its own kind.

    Args:
        case: The technique's case.
        name: The instance's name.
        problem: What it is to train on.
        make: How it is made; ``None`` for the case's own way.

    Returns:
        A new instance.

    """
    options = {"name": name}
    if problem.parts:
        options["loss"] = problem.parts[str(case.data)].loss.__name__
    return (make or case.make)(**options)
