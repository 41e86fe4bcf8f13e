"""The first step tells what is wrong for techniques that begin later: after a warm-up, in a later epoch or batch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from lightning_reg import ConR, CutMix, LossMixin, LossReweighting, Mixup
from lightning_reg.engine.host.errors import MisconfigurationException
from tests.toys import (
    CLASSES,
    QUIET,
    Classifier,
    LossRecorder,
    StepLosses,
    Term,
    WeightsByPosition,
    fit,
    make_loader,
)

pytestmark = QUIET


class Images(Classifier):
    """The rows as signals (B, 1, L), for CutMix; counts its steps."""

    def __init__(self, step=None, **kwargs):
        super().__init__(step=step, **kwargs)
        self.steps = 0

    @override
    def forward(self, x):
        return self.net(x.flatten(1))

    @override
    def training_step(self, batch, batch_idx):
        self.steps += 1
        return super().training_step((batch[0][:, None], batch[1]) if batch[0].dim() == 2 else batch, batch_idx)


def signals(form=lambda y: y):
    x, y = make_loader().dataset.tensors
    return make_loader(torch.utils.data.TensorDataset(x[:, None], form(y)))


def plain(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1])


def two_losses(module, batch):
    logits = module(batch[0])
    return F.cross_entropy(logits, batch[1]) + 0.1 * F.mse_loss(logits, torch.zeros_like(logits))


def by_hand(module, batch):
    return -module(batch[0]).log_softmax(1).gather(1, batch[1][:, None]).mean()


def focal(module, batch):
    losses = F.cross_entropy(module(batch[0]), batch[1], reduction="none")
    return ((1 - torch.exp(-losses)) ** 2 * losses).mean()


def not_in_the_loss(module, batch):
    logits = module(batch[0])
    F.cross_entropy(logits, batch[1])
    return logits.square().mean()


def constant(module, batch):
    with torch.no_grad():
        return {"loss": plain(module, batch)}


def of_three_rows_more(module, batch):
    logits = module(batch[0])
    return F.cross_entropy(torch.cat([logits, logits[:3]]), torch.cat([batch[1], batch[1][:3]]))


def of_numbers(module, batch):
    return F.binary_cross_entropy_with_logits(module(batch[0]), F.one_hot(batch[1], CLASSES).float())


class SometimesLater(WeightsByPosition):
    """Waits for the third step."""

    @override
    def is_active(self, step):
        return step.global_step > 2

    @override
    def waits(self, step):
        return step.global_step <= 2


WAITING = {
    "warm-up": lambda **kw: LossReweighting(warmup_steps=5, **kw),
    "own": SometimesLater,
    "epoch": lambda **kw: CutMix(prob=1.0, start_epoch=1, **kw),
    "batch": lambda **kw: Mixup(prob=1e-9, **kw),
}


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        (two_losses, "the training step calls 2 losses and it is not said which one"),
        (by_hand, r"`training_step` at test_first_step.py:\d+ returned a loss, but none of torch's loss functions"),
        (focal, r"the code after F.cross_entropy.*reduction='none'\) at test_first_step.py.* is not linear in it"),
        (not_in_the_loss, r"F.cross_entropy.*does not contribute to the loss that `training_step` returns"),
        (of_three_rows_more, "11 rows"),
        (
            constant,
            r"the loss that `training_step` at test_first_step.py:\d+ returned has no gradient, so it would train",
        ),
    ],
)
@pytest.mark.parametrize("kind", WAITING)
def test_a_wrong_setup_is_told_in_the_first_step(kind, step, sentence):
    technique, module = WAITING[kind](), Images(step)
    with pytest.raises(MisconfigurationException, match=f"^{type(technique).__name__}.*{sentence}"):
        fit(module, technique, loader=signals())
    assert module.steps == 1


@pytest.mark.parametrize("kind", ["warm-up", "own", "epoch", "batch"])
def test_a_wrong_choice_is_told_in_the_first_step(kind):
    module = Images(two_losses)
    with pytest.raises(MisconfigurationException, match=r"\(loss='nll_loss'\) matches 0 of the 2 loss calls"):
        fit(module, WAITING[kind](loss="nll_loss"), loader=signals())
    assert module.steps == 1


@pytest.mark.parametrize("kind", ["warm-up", "own"])
def test_the_last_call_of_a_loss_is_checked_for_those_who_wait_for_it(kind):
    def step(module, batch):
        return two_losses(module, batch).sqrt()

    with pytest.raises(MisconfigurationException, match=r"the code after F.mse_loss.*is not linear in it"):
        fit(Images(step), WAITING[kind](loss="last"), loader=signals())


@pytest.mark.parametrize("kind", ["epoch", "batch"])
def test_mixing_is_rehearsed(kind):
    technique, module = WAITING[kind](), Images(of_numbers)
    name = type(technique).__name__
    with pytest.raises(MisconfigurationException, match=rf"^{name}.*whether the target of .* follows is not certain"):
        fit(module, technique, loader=signals())
    assert module.steps == 1


def test_inputs_and_targets_that_cannot_be_mixed_are_told_in_the_first_step():
    module = Images(plain)
    with pytest.raises(MisconfigurationException, match=r"CutMix: the batch's inputs .* cannot be mixed"):
        fit(module, CutMix(start_epoch=1))  # rows, no images
    with pytest.raises(MisconfigurationException, match=r"Mixup: the targets in the batch are torch.int64 \(8,\)"):
        fit(module, Mixup(start_epoch=1, form="soft"))
    assert module.steps == 0


def test_a_regression_is_asked_for_in_the_first_step_of_a_ramp():
    module = Images(plain)
    with pytest.raises(MisconfigurationException, match=r"^ConR: F.cross_entropy.* is no regression"):
        fit(module, ConR(layer="net.1", window=0.1, views="none", warmup_steps=4), loader=signals())
    assert module.steps == 1


@pytest.mark.parametrize("kind", WAITING)
@pytest.mark.parametrize("step", [plain, lambda m, b: {"loss": 2 * plain(m, b)}])
def test_waiting_changes_nothing(kind, step):
    runs = []
    for techniques in ([WAITING[kind]()], []):
        module, losses = Images(step), StepLosses()
        fit(module, *techniques, losses, loader=signals())
        runs.append(losses.losses)
    assert runs[0][:3] == runs[1][:3]  # afterwards some of them act


def test_a_choice_of_the_labels_needs_none_of_another_loss():
    def step(module, batch):
        logits = module(batch[0])
        return F.cross_entropy(logits, batch[1]) + F.mse_loss(nn.functional.pad(logits, (0, 3)), batch[0].flatten(1))

    for technique in (CutMix(start_epoch=1), Mixup(prob=1e-9)):  # both targets are entries of the batch
        fit(Images(step), technique, loader=signals())


@pytest.mark.parametrize("neutral", [LossReweighting(strategy="uniform"), CutMix(prob=0.0), Mixup(prob=0.0)])
def test_what_never_acts_is_not_checked(neutral):
    module = Images(two_losses)
    fit(module, neutral)
    assert module.steps == 8


def test_what_has_ended_is_not_checked():
    module = Images(plain)
    trainer = fit(module, LossRecorder(), loader=signals(), max_epochs=1)
    module.step = two_losses
    trainer.fit_loop.max_epochs = 2
    trainer.callbacks[:] = [CutMix(stop_epoch=1)]
    trainer.fit(module, signals())
    assert module.steps == 8


def test_only_the_first_step_rehearses(monkeypatch):
    seen = []
    monkeypatch.setattr(SometimesLater, "check_call", lambda self, call: seen.append(call.step.global_step))
    fit(Classifier(), SometimesLater())
    assert seen == [0]


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_skipped_step_is_no_first_one():
    def step(module, batch):
        loss = focal(module, batch)
        return None if module.steps < 3 else loss

    module = Images(step)
    with pytest.raises(MisconfigurationException, match="is not linear in it"):
        fit(module, LossReweighting(warmup_steps=5), loader=signals())
    assert module.steps == 3


def test_by_mixin_the_call_is_waited_for():
    class Forgetful(LossMixin, Images):
        pass

    module = Forgetful(plain)
    with pytest.raises(MisconfigurationException, match="inherits LossMixin but `training_step` did not call"):
        fit(module, LossReweighting(warmup_steps=5), loader=signals())
    assert module.steps == 1


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("begins", [0, 1])
def test_a_loss_in_what_a_checkpoint_runs_again_is_refused_in_the_first_step(reentrant, begins):
    def step(module, batch):
        x, y = batch
        return checkpoint(lambda x: F.cross_entropy(module(x), y), x.requires_grad_(), use_reentrant=reentrant)

    module = Classifier(step=step)
    fit(module)  # torch alone allows it
    sentence = r"^(Term|LossReweighting): `cross_entropy` at test_first_step\.py:\d+ is called in a function that"
    with pytest.raises(MisconfigurationException, match=sentence):
        fit(module, LossReweighting(warmup_steps=4) if begins else Term())
