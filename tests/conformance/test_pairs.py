"""Two techniques in one fit; a pair is a test.

What every technique needs is shown at a cost that grows in line with their number: the references, one for each phase,
in all pairs and orders; each technique beside the references, and pairs of techniques: those of which a file has
changed since all were tried (``make matrix``), and a slice that the package's content chooses.
"""

from contextlib import suppress
from itertools import product

import pytest

from tests.conformance.discovery import MissingCaseError, case_of, technique_classes
from tests.conformance.pairs import check_pair, neutral_beside_references
from tests.conformance.record import pairs_to_try, reference_pairs_to_try
from tests.conformance.references import REFERENCES


def named(pairs):
    return [pytest.param(*pair, id=" before ".join(case.cls.__name__ for case in pair)) for pair in pairs]


def all_cases():
    for cls in technique_classes():
        with suppress(MissingCaseError):  # test_every_technique_has_a_case tells
            yield case_of(cls)


CASES = list(all_cases())


# A batch that was mixed has two labels for a sample; the last of two that replace the same would count alone, and so
# would losses that replace those of changed logits; a weight is trained through one map; one technique draws samples.
REFUSED = [
    {"MixesNeighbours", "LowersLabels"},
    {"MixesNeighbours", "RootsOfLosses"},
    {"WidensLogits", "RootsOfLosses"},
    {"LowersLabels"},
    {"RootsOfLosses"},
    {"TrainsHalf"},
    {"TrainsFactors"},
    {"DrawsSome"},
]


@pytest.mark.parametrize(("first", "second"), named(product(REFERENCES, REFERENCES)))
def test_references(first, second):
    names = {first.cls.__name__, second.cls.__name__}
    assert check_pair(first, second) == ("refused" if names in REFUSED else "trains")


@pytest.mark.parametrize(("first", "second"), named(reference_pairs_to_try(CASES)))
def test_beside_a_reference(first, second):
    check_pair(first, second)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.cls.__name__)
def test_neutral_beside_references(case):
    neutral_beside_references(case)


@pytest.mark.parametrize(("first", "second"), named(pairs_to_try(CASES)))
def test_two_techniques(first, second):
    check_pair(first, second)
