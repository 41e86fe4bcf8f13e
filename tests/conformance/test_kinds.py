"""Every law of its kind over everything public that is no technique."""

import pytest

from lightning_reg.registry import KINDS
from tests.conformance.discovery import MissingCaseError, case_of_kind, others
from tests.conformance.kinds import LAWS, NEED_TWO_PROCESSES

# Lightning's command line, of jsonargparse
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
OTHERS = [pytest.param(member.value, member.kind, id=member.name) for member in others()]


def every_law():
    for member in others():
        try:
            case = case_of_kind(member.value, member.kind)
        except MissingCaseError:
            continue  # test_every_member_has_a_case tells
        for name, law in LAWS[member.kind].items():
            yield pytest.param(law, case, id=f"{member.name}-{name}")


def test_every_kind_has_laws():
    assert {"technique", *LAWS} == {*KINDS}


@pytest.mark.parametrize(("value", "kind"), OTHERS)
def test_every_member_has_a_case(value, kind):
    assert case_of_kind(value, kind).subject is value


@pytest.mark.parametrize(("law", "case"), list(every_law()))
def test_law(law, case, request):
    pool = [request.getfixturevalue("two_processes")] if law.__name__ in NEED_TWO_PROCESSES else []
    law(case, *pool)
