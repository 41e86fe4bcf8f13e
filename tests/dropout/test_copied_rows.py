"""What the user's code gets of a value with the rows of several copies."""

import pytest
import torch

from lightning_reg.dropout.multi_sample_dropout._plan import CopyPlan
from lightning_reg.dropout.multi_sample_dropout._rows import CopiedRows

PLACE = ("module", "output", 0)


@pytest.fixture
def made():
    return 1.0 * torch.arange(12.0, requires_grad=True).reshape(6, 2)


def test_the_rows_of_the_first_copy(made):
    rows = CopiedRows(CopyPlan(2, "layer"), "layer", {})
    rows.begin(3, {3}, made)
    given = 2 * made
    assert torch.equal(rows.hand_out(given, PLACE), given[:3])


def test_what_has_no_rows_or_no_dimension_is_handed_out_as_it_is(made):
    rows = CopiedRows(CopyPlan(2, "layer"), "layer", {})
    rows.begin(3, {3}, made)
    for value in (made[:0], made.sum(), None):
        assert rows.hand_out(value, PLACE) is value
        assert not rows.holds_copies(value)
