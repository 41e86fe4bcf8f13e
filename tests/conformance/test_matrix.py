"""The page of compositions is fresh, and says what tests say."""

from tests.conformance.discovery import technique_classes
from tests.conformance.matrix import PATH, hand_checked, matrix


def test_the_page_is_fresh():
    assert PATH.read_text() == matrix(), "run `python -m tests.conformance.matrix`"


def test_pairs_checked_by_hand_are_pairs_of_techniques():
    known = {cls.__name__ for cls in technique_classes()}
    assert hand_checked()
    for pair in hand_checked():
        assert len(pair) == 2
        assert pair <= known
