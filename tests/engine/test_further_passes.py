"""The user's ``training_step`` once more in a step, on another batch."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_reg import LossMixin, Mixup, MultiSampleDropout
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.networks.further_pass import check_runs_again, run_step
from lightning_reg.engine.technique import LossTechnique
from tests.toys import (
    QUIET,
    TWO_RANKS,
    Classifier,
    LossRecorder,
    fit,
    make_loader,
    make_trainer,
    same_weights,
    weights_of,
)

pytestmark = QUIET


def _shrink(x):
    return 0.9 * x


class Shrunk(LossTechnique):
    """Half of the loss on shrunk inputs, and the squares of what a layer makes of them."""

    def __init__(self, norms_follow=False, change=_shrink, **options):
        super().__init__(**options)
        self.norms_follow, self.change, self.sights = norms_follow, change, []

    feature_layers = ("net.0",)
    runs_again = True

    def check(self, trainer, module):
        check_runs_again(self, trainer, module)

    def loss_term(self, call):
        x, y = call.step.batch
        before = call.step.features["net.0"]
        batch = (self.change(x), y)
        sight = run_step(call.step, self, batch, layers=self.feature_layers, norms_follow=self.norms_follow)
        assert call.step.features["net.0"] is before
        assert len(call.step.passes["net.0"]) == 1
        self.sights.append((sight.made_loss, len(sight.call.losses)))
        return 0.5 * sight.call.learned_losses + sight.features["net.0"].float().square().mean()


def by_hand(module, batch):
    x, y = batch
    hidden = module.net[0](0.9 * x)
    return F.cross_entropy(module(x), y) + 0.5 * F.cross_entropy(module(0.9 * x), y) + hidden.square().mean()


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}], ids=["plain", "accumulated"])
def test_trains_as_a_step_with_both_passes(options):
    ours, theirs, technique = Classifier(), Classifier(by_hand), Shrunk()
    fit(ours, technique, **options)
    fit(theirs, **options)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)  # another order of sums
    assert technique.sights == [(True, 8)] * 8


def test_trains_in_half_precision():
    ours, theirs = Classifier(lr=0.05), Classifier(by_hand, lr=0.05)
    fit(ours, Shrunk(), precision="bf16-mixed")
    fit(theirs, precision="bf16-mixed")
    assert not same_weights(ours, Classifier(), atol=0.05)
    assert same_weights(ours, theirs, atol=5e-3)  # bfloat16 has 8 bits


def _on_ranks(step, *techniques):
    model = Classifier(step)
    fit(model, *techniques, max_epochs=1, loader=make_loader(batch_size=4), **TWO_RANKS)
    return weights_of(model)


def test_two_ranks_agree_on_the_gradients_of_both_passes(two_processes):
    ours = two_processes.run(_on_ranks, None, Shrunk())
    theirs = two_processes.run(_on_ranks, by_hand)
    assert same_weights(*ours)
    assert same_weights(ours[0], theirs[0], atol=1e-6)


class Kept(Classifier):
    """With batch norm, dropout, a metric, a counter, and things that are logged."""

    def __init__(self):
        super().__init__(dropout=0.5)
        self.net[1] = nn.BatchNorm1d(8)
        self.accuracy = MulticlassAccuracy(3, average="micro")
        self.register_buffer("steps", torch.zeros(()))
        self.logged = []

    def log(self, name, *args, **kwargs):
        self.logged.append(name)

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.steps += 1
        logits = self(x)
        self.accuracy.update(logits, y)
        loss = F.cross_entropy(logits, y)
        self.log("loss", loss)
        return loss


class Idle(Shrunk):
    """Makes the pass and nothing of it."""

    def loss_term(self, call):
        super().loss_term(call)


def test_nobody_notices_the_pass():
    plain, watched = Kept(), Kept()
    fit(plain)
    fit(watched, Idle())
    assert same_weights(weights_of(plain), weights_of(watched))  # dropout too: random states are put back
    assert plain.logged == ["loss"] * 8
    assert watched.logged.count("loss") == 8
    assert watched.steps == 8
    assert watched.accuracy.tp == plain.accuracy.tp
    assert torch.equal(watched.net[1].running_mean, plain.net[1].running_mean)


def test_batch_norm_follows_the_pass_if_asked():
    plain, following = Kept(), Kept()
    fit(plain, Idle(norms_follow=False), max_epochs=1)
    fit(following, Idle(norms_follow=True), max_epochs=1)
    assert plain.net[1].num_batches_tracked == 4
    assert following.net[1].num_batches_tracked == 8
    assert following.steps == 4
    assert not torch.equal(plain.net[1].running_mean, following.net[1].running_mean)
    assert torch.equal(plain.net[0].weight, following.net[0].weight)


def test_a_loss_that_is_handed_over_is_seen():
    class HandedOver(LossMixin, Classifier):
        def training_step(self, batch, batch_idx):
            losses = F.cross_entropy(self(batch[0]), batch[1], reduction="none")
            return self.reduce_loss(losses)

    ours, theirs = HandedOver(), Classifier(by_hand)
    fit(ours, Shrunk())
    fit(theirs)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)  # another order of sums


def test_its_loss_is_chosen_like_the_users():
    def step(module, batch):
        logits = module(batch[0])
        return F.mse_loss(logits, torch.zeros_like(logits)) + F.cross_entropy(logits, batch[1])

    technique = Shrunk(loss="cross_entropy")
    fit(Classifier(step), technique, max_epochs=1)
    assert technique.sights == [(True, 8)] * 4
    with pytest.raises(MisconfigurationException, match="calls 2 losses"):
        fit(Classifier(step), Shrunk())


def test_others_do_not_act_on_it():
    recorder = LossRecorder()
    fit(Classifier(), Shrunk(), recorder, max_epochs=1)
    assert len(recorder.losses) == 4


# Dynamo's own remarks about Lightning's code, and the deprecations that its tracing meets.
@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("layer", [False, True], ids=["module", "layer"])
def test_compiled(layer):
    torch._dynamo.reset()
    ours = Classifier()
    if layer:
        ours.net = torch.compile(ours.net, backend="eager")
    trained = ours if layer else torch.compile(ours, backend="eager")
    technique, theirs = Shrunk(), Classifier(by_hand)
    fit(trained, technique)
    fit(theirs)
    torch._dynamo.reset()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def manual():
    module = Classifier()
    module.automatic_optimization = False
    return module


def in_place(module, batch):
    batch[0].mul_(0.5)
    return F.cross_entropy(module(batch[0]), batch[1])


def once(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1]) if batch[0].max() < 2 else None


def elsewhere(module, batch):
    first, x = module.net[0], batch[0]
    hidden = first(x) if x.max() < 2 else F.linear(x, first.weight, first.bias)
    return F.cross_entropy(module.net[1:](hidden), batch[1])


@pytest.mark.parametrize(
    ("module", "technique", "words"),
    [
        (manual, Shrunk, "once more in each step, which would train there under automatic_optimization=False"),
        (lambda: Classifier(in_place), Shrunk, "changes its batch in place, and runs once more"),
        (lambda: Classifier(once), partial(Shrunk, change=lambda x: x + 9), "saw no loss call there"),
        (lambda: Classifier(elsewhere), partial(Shrunk, change=lambda x: x + 9), "the layer 'net.0' did not run there"),
    ],
)
def test_refused_in_words(module, technique, words):
    with pytest.raises(MisconfigurationException, match=words):
        fit(module(), technique())


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (Mixup(alpha=1.0), "Mixup mixes samples: the labels there would not be those of the mixed ones"),
        (MultiSampleDropout("net.2", num_samples=2), "MultiSampleDropout makes several copies of its rows"),
    ],
)
def test_who_cannot_stand_beside_it(other, words):
    for techniques in ([Shrunk(), other], [other, Shrunk()]):
        with pytest.raises(MisconfigurationException, match=words):
            fit(Classifier(), *techniques)


def test_strategies_that_split_parameters_are_refused():
    class FSDPStrategy:
        pass

    trainer = make_trainer()
    trainer._accelerator_connector.strategy = FSDPStrategy()
    with pytest.raises(MisconfigurationException, match="whole parameters, which FSDPStrategy splits"):
        check_runs_again(Shrunk(), trainer, Classifier())
