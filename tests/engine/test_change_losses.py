"""Losses that a technique puts in place of the call's own: reduced, weighted and joined by terms as these are."""

import pytest
import torch
import torch.nn.functional as F

from lightning_reg import LossMixin, Mixup, MultiSampleDropout
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.technique import LossTechnique
from tests.conformance.by_hand import Hand, train_by_hand
from tests.conformance.discovery import case_of
from tests.conformance.harness import difference
from tests.conformance.harness import fit as fit_quietly
from tests.toys import CLASSES, QUIET, Classifier, Term, WeightsByLabel, _Toy, fit, same_weights

pytestmark = QUIET


class Squares(_Toy, LossTechnique):
    """The squared logit of the label instead of the loss."""

    def change_losses(self, call):
        return self.of(call.logits, call.labels.clamp(min=0))

    @staticmethod
    def of(logits, y):
        return (logits.gather(1, y[:, None])[:, 0] - 1) ** 2


def ignoring(y):
    return torch.where(torch.arange(len(y)) % 3 == 0, -100, y)


CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 1.0])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", ["plain", "ignored", "weighted"])
def test_mass_and_reduction_are_the_users(reduction, options):
    def ours(module, batch):
        x, y = batch
        given = ignoring(y) if options == "ignored" else y
        weight = CLASS_WEIGHTS if options == "weighted" else None
        value = F.cross_entropy(module(x), given, weight=weight, reduction=reduction)
        return value.sum() / 10 if reduction == "none" else value

    def hand(module, batch):
        x, y = batch
        mass = {"plain": torch.ones(len(y)), "ignored": (ignoring(y) >= 0).float(), "weighted": CLASS_WEIGHTS[y]}[
            options
        ]
        total = (mass * Squares.of(module(x), y)).sum()
        return total / mass.sum() if reduction == "mean" else total / 10 if reduction == "none" else total

    one, two = Classifier(step=ours, lr=0.05), Classifier(step=hand, lr=0.05)
    fit(one, Squares())
    fit(two)
    assert same_weights(one, two, atol=1e-6)  # float32, 8 steps
    assert not same_weights(one, Classifier(), atol=1e-3)


@pytest.mark.parametrize("order", [1, -1])
def test_weights_and_terms_join(order):
    def hand(module, batch):
        x, y = batch
        z = module(x)
        return ((1 + 0.5 * y) * Squares.of(z, y)).mean() + 0.1 * z.square().mean()

    one, two = Classifier(lr=0.1), Classifier(step=hand, lr=0.1)
    fit(one, *[Squares(), WeightsByLabel(), Term()][::order])
    fit(two)
    assert same_weights(one, two, atol=1e-6)  # float32, 8 steps


def test_losses_by_hand_and_the_last_call():
    class ByHand(LossMixin, Classifier):
        def training_step(self, batch, batch_idx):
            z = self(batch[0])
            return self.reduce_loss(F.cross_entropy(z, batch[1], reduction="none"), logits=z, targets=batch[1])

    modules = [ByHand(lr=0.1), Classifier(lr=0.1), Classifier(lr=0.1)]
    for module, loss in zip(modules, (None, None, "last"), strict=True):
        fit(module, Squares(loss=loss))
    assert same_weights(modules[0], modules[1], atol=1e-6)  # float32, 8 steps
    assert same_weights(modules[2], modules[1], atol=1e-6)


class Spread(_Toy, LossTechnique):
    """The sum of squares of the logits, whoever owns the sample."""

    takes_mixed = True

    def change_losses(self, call):
        return call.logits.square().sum(1)


class SpreadByHand(Hand):
    def losses(self, output, moment):
        return output.square().sum(1)


@pytest.mark.parametrize("mixed", [False, True])
def test_losses_of_copies_are_those_of_each_copy(mixed):
    dropout = case_of(MultiSampleDropout)
    cases = [*([case_of(Mixup)] if mixed else []), dropout]
    run = fit_quietly([*(case.make() for case in cases), Spread()], dropout.problem)
    hands = [*(case.by_hand(case.make()) for case in cases), SpreadByHand(None)]
    hand = train_by_hand(dropout.problem, hands)
    assert not difference(run.weights, hand, rtol=1e-4, atol=1e-5)  # float32, 16 steps
    # The logits of the mean prediction are other ones.
    assert difference(hand, train_by_hand(dropout.problem, hands[-1:]), rtol=1e-3, atol=1e-4)
    assert {row["reg/spread/loss"] for _, row in run.logged if "reg/spread/loss" in row}


def test_refusals():
    with pytest.raises(
        MisconfigurationException, match="Squares and Squares cannot stand together: each replaces the loss"
    ):
        fit(Classifier(), Squares(name="one"), Squares(name="two"))

    class Maps(_Toy, LossTechnique):
        def change_losses(self, call):
            return call.input.sum(1).flatten()

    def pixels(module, batch):
        z = module(batch[0])[:, :, None].expand(-1, -1, 2)
        return F.cross_entropy(z, batch[1][:, None].expand(-1, 2))

    with pytest.raises(
        MisconfigurationException, match=r"Maps: F.cross_entropy.* has no loss per sample that could be"
    ):
        fit(Classifier(step=pixels), Maps())
    assert len(CLASS_WEIGHTS) == CLASSES
