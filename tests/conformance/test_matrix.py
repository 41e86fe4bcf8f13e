"""The page of compositions is fresh and says what tests say; which pairs are tried."""

import pytest

from tests.conformance import record
from tests.conformance.discovery import case_of, technique_classes
from tests.conformance.matrix import PATH, hand_checked, page
from tests.conformance.record import (
    PARTNERS,
    REFERENCE_PAIRS,
    content_of,
    name_of,
    pairs_to_try,
    reference_pairs,
    reference_pairs_to_try,
    technique_pairs,
)

CASES = [case_of(cls) for cls in technique_classes()]


def test_the_page_is_fresh():
    assert PATH.read_text() == page(), "run `python -m tests.conformance.matrix`"


def test_pairs_checked_by_hand_are_pairs_of_techniques():
    known = {cls.__name__ for cls in technique_classes()}
    assert hand_checked()
    for pair in hand_checked():
        assert len(pair) == 2
        assert pair <= known


def entry(pair):
    return {case.cls.__name__: content_of(case.cls) for case in pair}


CHOICES = [(technique_pairs, pairs_to_try, PARTNERS), (reference_pairs, reference_pairs_to_try, REFERENCE_PAIRS)]


@pytest.mark.parametrize(("pairs_of", "to_try", "share"), CHOICES)
def test_pairs_that_were_tried_are_tried_again_in_a_slice(monkeypatch, pairs_of, to_try, share):
    pairs = pairs_of(CASES)
    monkeypatch.setattr(record, "recorded", lambda: {name_of(pair): entry(pair) for pair in pairs})
    tried = to_try(CASES)
    assert len(tried) == share * len(CASES) < len(pairs)
    assert tried == to_try(CASES)
    monkeypatch.setattr(record, "_digest", lambda files: "another content of the package")
    assert to_try(CASES) != tried


@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.parametrize(("pairs_of", "to_try", "share"), CHOICES)
def test_a_changed_technique_is_tried_with_all(monkeypatch, pairs_of, to_try, share, number):
    pairs, changed = pairs_of(CASES), CASES[number]
    known = {name_of(pair): entry(pair) | {changed.cls.__name__: "as it was"} for pair in pairs if changed in pair}
    monkeypatch.setattr(record, "recorded", lambda: {name_of(pair): entry(pair) for pair in pairs} | known)
    concerned = [pair for pair in pairs if changed in pair]
    tried = to_try(CASES)
    assert tried[: len(concerned)] == concerned
    assert len(tried) == len(concerned) + share * len(CASES)
