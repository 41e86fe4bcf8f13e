"""Every law over every technique of the package."""

import pytest

from tests.conformance.discovery import MissingCaseError, case_of, technique_classes
from tests.conformance.laws import LAWS, NEED_TWO_PROCESSES
from tests.conformance.recomputation import touches_layers

CLASSES = list(technique_classes())
BY_TECHNIQUE = [name for name in LAWS if name != "order"]  # which test_pairs.py tries pair by pair


def every_law():
    for cls in CLASSES:
        try:
            case = case_of(cls)
        except MissingCaseError:
            continue  # test_every_technique_has_a_case tells
        for name in BY_TECHNIQUE:
            if name == "recomputation" and not touches_layers(case):
                continue
            reason = case.exempt.get(name)
            # Strict: an exemption that is no longer needed is red. Only the law's own verdict counts as one.
            marks = () if reason is None else pytest.mark.xfail(reason=reason, strict=True, raises=AssertionError)
            yield pytest.param(cls, name, id=f"{cls.__name__}-{name}", marks=marks)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_technique_has_a_case(cls):
    case = case_of(cls)
    unknown = sorted(case.exempt.keys() - {*BY_TECHNIQUE})
    assert not unknown, f"{cls.__name__}: `exempt` names no law: {unknown}; the laws are {BY_TECHNIQUE}"
    unsaid = sorted(name for name, reason in case.exempt.items() if len(reason.split()) < 3)
    assert not unsaid, f"{cls.__name__}: `exempt` gives no reason for {unsaid}"


@pytest.mark.parametrize(("cls", "law"), list(every_law()))
def test_law(cls, law, request):
    pool = [request.getfixturevalue("two_processes")] if law in NEED_TWO_PROCESSES else []
    LAWS[law](case_of(cls), *pool)
