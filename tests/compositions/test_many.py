"""Many techniques in one Trainer, against the plain loop of all of them."""

import pytest

import lightning_reg
from tests.conformance.by_hand import train_by_hand
from tests.conformance.discovery import case_of
from tests.conformance.harness import difference, fit
from tests.toys import QUIET

pytestmark = QUIET

# The data of the first one serve all.
SETS = {
    "images": "CutMix Mixup ELRCallback LossReweighting FeatureDistillation EWC L2ToStart NMSparsity SoupAverager",
    "copies": "MultiSampleDropout CutMix ELRCallback LossReweighting WeightCompander NMSparsity EWC L2ToStart",
    "two networks": "ELRPlusCallback WeightCompander PredictionDistillation FeatureDistillation EWC SoupAverager",
    "views": "ConR LossReweighting FeatureDistillation L2ToStart WeightCompander NMSparsity SoupAverager",
}


@pytest.mark.parametrize("which", SETS)
@pytest.mark.parametrize("order", [1, -1], ids=["forwards", "backwards"])
def test_many_train_as_a_plain_loop_of_all(which, order):
    cases = [case_of(getattr(lightning_reg, name)) for name in SETS[which].split()]
    problem = cases[0].problem
    cases = cases[::order]
    run = fit([case.make() for case in cases], problem)

    def trained(chosen):
        return train_by_hand(problem, [case.by_hand(case.make()) for case in chosen], run.watch.random_before)

    hand = trained(cases)
    found = difference(hand, run.weights, rtol=1e-4, atol=2e-5)  # float32, 16 steps
    assert not found, found
    for left_out in cases:
        without = trained([case for case in cases if case is not left_out])
        assert difference(hand, without, rtol=1e-3, atol=2e-4), f"{left_out.cls.__name__} makes no difference"
