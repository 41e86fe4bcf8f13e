"""LabelSmoothing."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.toys import QUIET, Classifier, fit
from tests.tutorial.label_smoothing.core import label_smoothing_term
from tests.tutorial.label_smoothing.label_smoothing import LabelSmoothing

pytestmark = QUIET


class SmoothedByHand(Hand):
    def term(self, loop, moment):
        smooth, plain = (
            sum(F.cross_entropy(output, moment.y, label_smoothing=epsilon) for output in moment.outputs)
            for epsilon in (0.2, 0.0)
        )
        return (smooth - plain) / len(moment.outputs)


CASE = Case(
    make=partial(LabelSmoothing, 0.2),
    neutral=partial(LabelSmoothing, 0.0),
    by_hand=SmoothedByHand,
    says=("epsilon=0.2", "epsilon=0"),
    invalid=[({"epsilon": -0.1}, "epsilon"), ({"epsilon": 1.0}, "epsilon")],
)


def test_term_by_hand():
    p = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64)
    mean = (0.6931471805599453 + 2 * 1.3862943611198906) / 3
    term = label_smoothing_term(p.log(), torch.tensor([1]))
    assert term.item() == pytest.approx(mean - 1.3862943611198906, abs=1e-6)


def test_trains_as_torch_does_with_its_own_argument():
    def step(module, batch):
        return F.cross_entropy(module(batch[0]), batch[1], label_smoothing=0.2)

    ours, torchs = Classifier(), Classifier(step)
    fit(ours, LabelSmoothing(0.2))
    fit(torchs)
    for one, two in zip(ours.parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)  # another order of sums
