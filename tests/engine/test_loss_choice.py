"""Which loss call of the step a technique works on; manual optimization; the mixin."""

import inspect
import re

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn
from typing_extensions import override

from lightning_reg import LossMixin
from lightning_reg.engine.host.errors import MisconfigurationException
from tests.toys import (
    CLASSES,
    INPUTS,
    QUIET,
    Classifier,
    Halve,
    LossRecorder,
    Penalty,
    ShiftTargets,
    Term,
    WeightsByLabel,
    WeightsByPosition,
    fit,
    make_loader,
    make_tensors,
    same_weights,
    weights_of,
)

pytestmark = QUIET


def line_of(function, part):
    """``file.py:line`` of the line of a function that has ``part`` in it."""
    lines, start = inspect.getsourcelines(function)
    (offset,) = [n for n, line in enumerate(lines) if part in line]
    return f"test_loss_choice.py:{start + offset}"


def two_losses(module, batch):
    x, y = batch
    logits = module(x)
    main = F.cross_entropy(logits, y)
    side = F.nll_loss(logits.log_softmax(1), 2 - y)
    return main + 0.25 * side


MAIN, SIDE = line_of(two_losses, "main = "), line_of(two_losses, "side = ")


def weighted(losses):
    return (losses * (1 + torch.arange(len(losses)) / len(losses))).mean()


def by_hand(on_main, on_side):
    def step(module, batch):
        x, y = batch
        logits = module(x)
        main = F.cross_entropy(logits, y, reduction="none")
        side = F.nll_loss(logits.log_softmax(1), 2 - y, reduction="none")
        return on_main(main) + 0.25 * on_side(side)

    return step


@pytest.mark.parametrize("choice", [0, "cross_entropy", MAIN])
def test_the_first_call_can_be_chosen(choice):
    ours, hand = Classifier(step=two_losses), Classifier(step=by_hand(weighted, torch.mean))
    fit(ours, WeightsByPosition(loss=choice))
    fit(hand)
    assert same_weights(ours, hand, atol=1e-6)  # float32, 8 steps


@pytest.mark.parametrize("choice", [1, "nll_loss", SIDE, "last"])
def test_the_second_call_can_be_chosen(choice):
    ours, hand = Classifier(step=two_losses), Classifier(step=by_hand(torch.mean, weighted))
    fit(ours, WeightsByPosition(loss=choice))
    fit(hand)
    assert same_weights(ours, hand, atol=1e-6)  # float32, 8 steps


def test_what_was_done_to_a_call_before_it_was_the_last_stays():
    def hand_step(module, batch):
        x, y = batch
        logits = module(x)
        losses = (1 + 0.5 * y) * F.cross_entropy(logits, y, reduction="none")
        return weighted(losses) + (0.1 * logits.square().mean(1)).mean() + (0.2 * logits.square().mean(1)).mean()

    ours, hand = Classifier(), Classifier(step=hand_step)
    late = [WeightsByPosition(loss="last"), Term(factor=0.2, loss="last", name="late")]
    fit(ours, *late, WeightsByLabel(), Term())
    fit(hand)
    assert same_weights(ours, hand, atol=1e-6)  # float32, 8 steps


def test_two_techniques_work_on_two_calls():
    ours, hand = Classifier(step=two_losses), Classifier(step=by_hand(weighted, lambda s: weighted(s) + 0.3))
    recorder = LossRecorder(loss=SIDE)

    class Shift(Term):
        @override
        def loss_term(self, call):
            return torch.tensor(0.3)

    other = WeightsByPosition(loss="last", name="other")
    fit(ours, WeightsByPosition(loss=0), other, Shift(loss="nll_loss"), recorder)
    fit(hand)
    assert same_weights(ours, hand, atol=1e-6)  # float32, 8 steps
    assert recorder.names == ["nll_loss"] * 8
    assert recorder.sites == [SIDE] * 8


@pytest.mark.parametrize("factor", [1.0, 0.5, -2.0])
@pytest.mark.parametrize("form", ["tensor", "dict"])
def test_the_last_call_is_exact_in_a_scaled_total(factor, form):
    def step(module, batch):
        x, y = batch
        total = F.mse_loss(module(x), x[:, :CLASSES]) + factor * F.cross_entropy(module(x), y)
        return {"loss": total} if form == "dict" else total

    def hand_step(module, batch):
        x, y = batch
        logits = module(x)
        main = weighted(F.cross_entropy(logits, y, reduction="none")) + (0.1 * logits.square().mean(1)).mean()
        return F.mse_loss(logits, x[:, :CLASSES]) + factor * main

    ours, hand = Classifier(step=step, lr=0.1), Classifier(step=hand_step, lr=0.1)
    fit(ours, WeightsByPosition(loss="last"), Term(loss="last"))
    fit(hand)
    assert same_weights(ours, hand, atol=1e-6)  # float32, 8 steps


def test_the_last_call_must_be_part_of_the_total():
    def step(module, batch):
        total = F.cross_entropy(module(batch[0]), batch[1])
        F.mse_loss(module(batch[0]), batch[0][:, :CLASSES])
        return total

    with pytest.raises(MisconfigurationException, match=r"the last loss call, F.mse_loss.* does not contribute"):
        fit(Classifier(step=step), WeightsByPosition(loss="last"))


@pytest.mark.parametrize("form", [two_losses, lambda m, b: {"loss": two_losses(m, b)}])
def test_several_calls_and_no_choice_is_an_error_that_lists_them(form):
    with pytest.raises(MisconfigurationException) as caught:
        fit(Classifier(step=form), WeightsByPosition())
    text = str(caught.value)
    assert text.startswith("WeightsByPosition: the training step calls 2 losses")
    assert f"loss=0: F.cross_entropy((8, 3), (8,), reduction='mean') at {MAIN}" in text
    assert f"loss=1: F.nll_loss((8, 3), (8,), reduction='mean') at {SIDE}" in text
    assert "Choose with `WeightsByPosition(loss=...)`" in text


@pytest.mark.parametrize(
    ("choice", "matches"), [(2, 0), ("mse_loss", 0), ("test_loss_choice.py:1", 0), ("test_loss_choice.py", 0)]
)
def test_a_choice_that_matches_none_is_an_error(choice, matches):
    with pytest.raises(MisconfigurationException) as caught:
        fit(Classifier(step=two_losses), Term(loss=choice))
    text = str(caught.value)
    assert text.startswith(f"Term(loss={choice!r}) matches {matches} of the 2 loss calls")
    assert MAIN in text
    assert SIDE in text


def test_a_choice_that_matches_two_is_an_error():
    def step(module, batch):
        return F.cross_entropy(module(batch[0]), batch[1]) + F.cross_entropy(module(batch[0]), 2 - batch[1])

    with pytest.raises(MisconfigurationException, match=r"Term\(loss='cross_entropy'\) matches 2 of the 2 loss calls"):
        fit(Classifier(step=step), Term(loss="cross_entropy"))


def test_calls_without_a_gradient_are_no_candidates():
    def step(module, batch):
        x, y = batch
        logits = module(x)
        with torch.no_grad():
            F.cross_entropy(module(x), y)
            F.cross_entropy(logits, y)
        F.mse_loss(logits.detach(), x[:, :CLASSES])
        return F.cross_entropy(logits, y)

    ours, plain = Classifier(step=step), Classifier()
    fit(ours, Term())
    fit(plain, Term())
    assert same_weights(ours, plain)


@pytest.mark.parametrize("kinds", [[Term], [WeightsByLabel, ShiftTargets]])
def test_no_call_is_an_error_that_shows_the_mixin(kinds):
    def step(module, batch):
        return -module(batch[0]).log_softmax(1).gather(1, batch[1][:, None]).mean()

    ours = Classifier(step=step)
    before = weights_of(ours)
    with pytest.raises(MisconfigurationException) as caught:
        fit(ours, *(kind() for kind in kinds))
    text = str(caught.value)
    names = ", ".join(kind.__name__ for kind in kinds)
    assert re.match(rf"{names}: `training_step` at toys\.py:\d+ returned a loss, but none of torch's", text)
    assert "class MyModel(LossMixin, LightningModule):" in text
    assert "return self.reduce_loss(per_sample_loss, logits=logits, targets=targets)" in text
    assert same_weights(ours, before)


def test_a_later_step_without_a_call_warns():
    def step(module, batch):
        logits = module(batch[0])
        if module.trainer.global_step == 3:
            return logits.square().mean()
        return F.cross_entropy(logits, batch[1])

    def hand_step(module, batch):
        logits = module(batch[0])
        if module.trainer.global_step == 3:
            return logits.square().mean()
        return F.cross_entropy(logits, batch[1]) + (0.1 * logits.square().mean(1)).mean()

    ours, hand = Classifier(step=step), Classifier(step=hand_step)
    with pytest.warns(UserWarning, match="seen until now was not seen in the step after global step 3"):
        fit(ours, Term())
    fit(hand)
    assert same_weights(ours, hand)


# -- the mixin --------------------------------------------------------------------------------------------------------


class HandWritten(LossMixin, Classifier):
    @override
    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        per_sample = -logits.log_softmax(1).gather(1, y[:, None])[:, 0]
        F.mse_loss(logits, x[:, :CLASSES])  # not watched in a module with the mixin
        return self.reduce_loss(per_sample, logits=logits, targets=y)


def test_reduce_loss_trains_like_the_function():
    ours, plain = HandWritten(), Classifier()
    techniques = (WeightsByLabel, Term, Penalty, Halve)
    fit(ours, *(kind() for kind in techniques))
    fit(plain, *(kind() for kind in techniques))
    assert same_weights(ours, plain, atol=1e-6)  # float32, 8 steps


def test_reduce_loss_without_techniques_is_the_mean():
    ours, plain = HandWritten(), Classifier()
    losses = torch.arange(4.0)
    assert ours.reduce_loss(losses) == 1.5
    fit(ours)
    fit(plain)
    assert same_weights(ours, plain, atol=1e-6)  # float32, 8 steps
    assert ours.reduce_loss(losses) == 1.5
    with pytest.raises(ValueError, match=r"`per_sample_loss` must have shape \(B,\), got \(2, 2\)"):
        ours.reduce_loss(torch.ones(2, 2))


def test_the_mixin_without_reduce_loss_is_an_error():
    class Forgetful(LossMixin, Classifier):
        pass

    with pytest.raises(MisconfigurationException, match=r"inherits LossMixin but `training_step` did not call"):
        fit(Forgetful(), Term())


def test_reduce_loss_has_no_targets_to_replace():
    with pytest.raises(MisconfigurationException, match="`reduce_loss` gets losses that are already computed"):
        fit(HandWritten(), ShiftTargets())


def test_reduce_loss_without_logits_says_what_is_missing():
    class NoLogits(LossMixin, Classifier):
        @override
        def training_step(self, batch, batch_idx):
            return self.reduce_loss(F.cross_entropy(self(batch[0]), batch[1], reduction="none"))

    with pytest.raises(MisconfigurationException, match=r"needs logits of shape \(8, C\), `reduce_loss` got None"):
        fit(NoLogits(), Term())


# -- manual optimization ----------------------------------------------------------------------------------------------


class Players(LightningModule):
    """Two networks with an optimizer each, stepped in turn; the second loss is computed after the first step."""

    def __init__(self, on_first=torch.mean, on_second=torch.mean, edit=1.0):
        super().__init__()
        self.automatic_optimization = False
        self.by_hand = on_first is not torch.mean or on_second is not torch.mean
        self.on_first, self.on_second, self.edit = on_first, on_second, edit
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.one, self.two = nn.Linear(INPUTS, CLASSES), nn.Linear(INPUTS, 1)
        self.seen = []

    @override
    def training_step(self, batch, batch_idx):
        x, y = batch
        first, second = self.optimizers()
        reduction = "none" if self.by_hand else "mean"
        self.seen.append((self.one.weight.detach().clone(), self.one.weight.detach().clone()))
        loss = F.cross_entropy(self.one(x), y, reduction=reduction)
        self._update(first, self.on_first(loss))
        self.seen[-1] += (self.two.weight.detach().clone(),)
        loss = F.binary_cross_entropy_with_logits(self.two(x)[:, 0], (y == 0).float(), reduction=reduction)
        self._update(second, self.on_second(loss))

    def _update(self, optimizer, loss):
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    @override
    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.5) for net in (self.one, self.two)]


FIRST = line_of(Players.training_step, "F.cross_entropy")
SECOND = line_of(Players.training_step, "F.binary_cross_entropy_with_logits")


@pytest.mark.parametrize("choice", [0, "cross_entropy", FIRST])
def test_manual_optimization_with_the_first_call(choice):
    ours, hand, plain = Players(), Players(on_first=weighted), Players()
    fit(ours, WeightsByPosition(loss=choice))
    fit(hand)
    fit(plain)
    assert same_weights(ours, hand, atol=1e-6)  # float32, 8 steps
    assert same_weights(ours.two, plain.two)
    assert not same_weights(ours.one, plain.one, atol=1e-3)


@pytest.mark.parametrize("choice", [1, "binary_cross_entropy_with_logits", SECOND])
def test_manual_optimization_with_the_second_call(choice):
    ours, hand = Players(), Players(on_second=weighted)
    fit(ours, WeightsByPosition(loss=choice))
    fit(hand)
    assert same_weights(ours, hand, atol=1e-6)  # float32, 8 steps


def test_manual_optimization_must_choose():
    with pytest.raises(MisconfigurationException) as caught:
        fit(Players(), Term())
    assert FIRST in str(caught.value)
    assert SECOND in str(caught.value)


def test_manual_optimization_refuses_what_comes_after_the_step():
    with pytest.raises(MisconfigurationException, match=r'Term\(loss="last"\) is known only after'):
        fit(Players(), Term(loss="last"))


def test_manual_optimization_without_a_call_is_an_error():
    class NoCall(Players):
        @override
        def training_step(self, batch, batch_idx):
            self._update(self.optimizers()[0], self.one(batch[0]).square().mean())

    with pytest.raises(MisconfigurationException, match=r"class MyModel\(LossMixin, LightningModule\)"):
        fit(NoCall(), Term())


def test_manual_optimization_edits_the_weights_of_every_forward_pass():
    ours = Players()
    dense = weights_of(ours)
    fit(ours, Halve(["one.weight", "two.weight"]), max_steps=2)
    one, _, two = ours.seen[0]
    assert torch.equal(one, 0.5 * dense["one.weight"])
    assert torch.equal(two, 0.5 * dense["two.weight"])  # its forward pass comes after the first optimizer's step


def test_reduce_loss_in_manual_optimization():
    class HandWrittenPlayers(LossMixin, Players):
        @override
        def training_step(self, batch, batch_idx):
            x, y = batch
            first, second = self.optimizers()
            self._update(first, self.reduce_loss(F.cross_entropy(self.one(x), y, reduction="none")))
            self._update(second, F.binary_cross_entropy_with_logits(self.two(x)[:, 0], (y == 0).float()))

    ours, hand = HandWrittenPlayers(), Players(on_first=weighted)
    fit(ours, WeightsByPosition())
    fit(hand)
    assert same_weights(ours, hand, atol=1e-6)  # float32, 8 steps


def test_a_smaller_last_batch_has_its_own_size():
    recorder = LossRecorder()
    dataset = torch.utils.data.TensorDataset(*make_tensors(19))
    fit(Classifier(), recorder, loader=make_loader(dataset), max_epochs=1)
    assert [len(losses) for losses in recorder.losses] == [8, 8, 3]


class Ranks(Classifier):
    """Queries are to find their documents among several times as many; most tensors of the batch are of these."""

    def training_step(self, batch, batch_idx):
        scores = self.net(batch["queries"]) @ self.net(batch["documents"]).T
        return F.cross_entropy(scores, torch.arange(len(scores)))


def retrieval(queries, documents):
    x = make_tensors(documents)[0]
    batch = {"queries": x[:queries], "documents": x, "masks": x > 0, "ids": torch.arange(documents)}
    return torch.utils.data.DataLoader([batch], batch_size=None)


def test_a_loss_of_fewer_rows_than_most_tensors_have_is_one_of_samples_if_a_tensor_has_as_many():
    recorder = LossRecorder()
    fit(Ranks(), recorder, loader=retrieval(4, 10), max_epochs=1)
    assert [len(losses) for losses in recorder.losses] == [4]


def test_it_is_refused_if_no_tensor_has_as_many():
    class Fewer(Ranks):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch | {"queries": batch["queries"][:3]}, batch_idx)

    with pytest.raises(MisconfigurationException, match="has 3 rows, which is no multiple of the batch size 10"):
        fit(Fewer(), LossRecorder(), loader=retrieval(4, 10), max_epochs=1)
