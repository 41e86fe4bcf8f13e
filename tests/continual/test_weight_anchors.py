"""Weights tied to their start, or to the task before by their Fisher information."""

import copy
import math
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_reg import EWC, L2ToStart, PredictionDistillation
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import fisher_diagonal, fisher_losses, quadratic_penalty
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.conformance.harness import difference
from tests.toys import (
    BATCH,
    CLASSES,
    INPUTS,
    QUIET,
    Boom,
    BoomError,
    Callback,
    Classifier,
    fit,
    make_loader,
    same_weights,
)

pytestmark = QUIET


ANCHOR, FISHER = torch.tensor([0.5, -0.5, 0.25, 0.0]), torch.tensor([0.1, 0.2, 0.05, 0.1])


def after_one_task(**arguments):
    """As it is when one task is over. Only what the networks of all the suite's problems share is tied."""
    ewc = EWC(**arguments)
    slot = {"anchors": {"net.head.bias": ANCHOR.clone()}, "weights": {"net.head.bias": FISHER.clone()}}
    ewc.load_state_dict({"finished": 1, "in_task": False, "slots": [slot]})
    return ewc


class TieByHand(Hand):
    def begin(self, loop):
        self.start = loop.constants()

    def penalty(self, weights):
        return 0.5 * sum((w - self.start[name]).square().sum() for name, w in weights.items())


class FirmTieByHand(Hand):
    def penalty(self, weights):
        return 5.0 * (FISHER * (weights["net.head.bias"][:4] - ANCHOR).square()).sum()


CASE = (
    Case(
        make=partial(L2ToStart, weight=0.5),
        by_hand=TieByHand,
        says=(
            "weight=0.5, gradient; to the start of fit; tasks before: 0; free: nothing, not classes to come",
            "weight=0: inactive",
            "weight=0.5, gradient; to the start of fit; tasks before: 0; free: net.head.*",
            "weight=0.5, decoupled; to the start of fit; tasks before: 0; free: nothing, not classes to come",
            "weight=0.1, gradient; nothing to tie to in the first task; tasks before: 0; free: nothing, not classes to"
            " come",
        ),
        also=["regression"],
        neutral=partial(L2ToStart, weight=0.0),
        variants=[
            partial(L2ToStart, weight=0.5, params=["net.*.weight"], exclude=["net.head.*"]),
            partial(L2ToStart, weight=0.5, mode="decoupled"),
            partial(L2ToStart, anchor="end_of_task"),
        ],
        invalid=[({"weight": -0.1}, "weight"), ({"importance": "fisher.pt", "mode": "decoupled"}, "importance")],
    ),
    Case(
        make=partial(after_one_task, weight=5.0),
        neutral=partial(after_one_task, weight=0.0),
        by_hand=FirmTieByHand,
        says=(
            "weight=5, Fisher by samples at argmax labels, separate; tasks before: 1",
            "weight=0: inactive",
            "weight=5, Fisher by samples at sample labels, online; tasks before: 1",
            "weight=5, Fisher by batches at true labels, separate; tasks before: 1",
        ),
        variants=[
            partial(after_one_task, weight=5.0, labels="sample", fisher_batches=2, memory="online"),
            partial(after_one_task, weight=5.0, per_sample=False, labels="true", params=["net.*"]),
        ],
        invalid=[({"weight": -0.1}, "weight"), ({"fisher_batches": 0}, "fisher_batches")],
    ),
)


# -- the penalty ------------------------------------------------------------------------------------------------------


def tensors(seed, *shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_penalty_and_gradient_by_loops(dtype):
    shapes = [(3, 2), (4,), (), (0,)]
    params = [p.to(dtype).requires_grad_() for p in tensors(0, *shapes)]
    anchors, weights = [a.to(dtype) for a in tensors(1, *shapes)], [w.abs() for w in tensors(2, *shapes)]
    value = quadratic_penalty(params, anchors, weights)
    (0.5 * value).backward()
    total = 0.0
    for p, a, w in zip(params, anchors, weights, strict=True):
        for x, y, z, g in zip(*(t.detach().double().flatten().tolist() for t in (p, a, w, p.grad)), strict=True):
            total += z * (x - y) ** 2
            # Half of the value's slope; a bfloat16 gradient has 8 bits.
            assert g == pytest.approx(z * (x - y), rel=2**-8 if dtype == torch.bfloat16 else 1e-6, abs=1e-6)
    assert value.item() == pytest.approx(total, rel=1e-6)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_weights_of_one_are_no_weights():
    params, anchors = (tensors(seed, (5, 5), (5,)) for seed in (0, 1))
    assert quadratic_penalty(params, anchors) == quadratic_penalty(params, anchors, [torch.ones(5, 5), torch.ones(5)])
    assert quadratic_penalty(params, params) == 0.0


# -- Fisher information -----------------------------------------------------------------------------------------------


def test_fisher_of_a_logistic_regression():
    x, w = tensors(0, (50, 3), (3,), dtype=torch.float64)
    w.requires_grad_()
    p = (x @ w).sigmoid().detach()

    def logits():
        return torch.stack([torch.zeros(50, dtype=torch.float64), x @ w], 1)

    closed = ((p * (1 - p))[:, None] * x**2).mean(0)  # E over y of (y - p)^2 x^2
    generator = torch.Generator().manual_seed(0)
    draws = (fisher_losses(logits(), None, "sample", generator) for _ in range(2000))
    (sampled,) = fisher_diagonal([w], draws)
    torch.testing.assert_close(sampled, closed, rtol=0.02, atol=0.0)  # 100,000 draws
    y = (torch.arange(50) % 3 == 0).long()
    (empirical,) = fisher_diagonal([w], [fisher_losses(logits(), y, "true")])
    torch.testing.assert_close(empirical, ((y - p)[:, None] ** 2 * x**2).mean(0), rtol=1e-6, atol=0.0)  # float32 losses
    (probable,) = fisher_diagonal([w], [fisher_losses(logits(), None)])
    torch.testing.assert_close(probable, (((p > 0.5).double() - p)[:, None] ** 2 * x**2).mean(0), rtol=1e-6, atol=0.0)
    with pytest.raises(ValueError, match="`labels` must be given"):
        fisher_losses(logits(), None, "true")


class Unbatchable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return torch.tensor(2 * grad.numpy())


@pytest.mark.parametrize("layer", [torch.tanh, Unbatchable.apply], ids=["batched", "one after the other"])
def test_gradients_sample_by_sample_are_those_of_batches_of_one(layer):
    net, (x,) = nn.Linear(4, 3), tensors(0, (7, 4))
    unused = torch.zeros(2, requires_grad=True)

    def losses(rows):
        return F.cross_entropy(layer(net(rows)), torch.arange(len(rows)) % 3, reduction="none")

    together = fisher_diagonal([*net.parameters(), unused], [losses(x[:4]), losses(x[4:])])
    alone = [torch.zeros_like(p) for p in net.parameters()]
    for batch in (x[:4], x[4:]):
        for i in range(len(batch)):
            net.zero_grad()
            F.cross_entropy(layer(net(batch[i : i + 1])), torch.tensor([i % 3])).backward()
            for total, p in zip(alone, net.parameters(), strict=True):
                total.add_(p.grad**2 / 7)
    for one, two in zip(together[:2], alone, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-8)  # float32 sums in another order
    assert together[2].tolist() == [0.0, 0.0]


def test_gradients_batch_by_batch():
    w = torch.zeros(1, requires_grad=True)
    batches = [torch.tensor([1.0, 3.0]), torch.tensor([5.0])]
    assert fisher_diagonal([w], [b * w for b in batches], per_sample=False)[0].item() == (2 * 2**2 + 5**2) / 2
    ones = (b * w for batch in batches for b in batch.split(1))
    assert fisher_diagonal([w], ones, per_sample=False)[0].item() == pytest.approx((1 + 9 + 25) / 3)
    with pytest.raises(ValueError, match="`batches` must hold a sample"):
        fisher_diagonal([w], [])


# -- training ---------------------------------------------------------------------------------------------------------


def task(number, size=24):
    x = tensors(number, (size, INPUTS))[0]
    return TensorDataset(x, (x[:, :CLASSES] + (number % 2) * x[:, 3 : 3 + CLASSES]).argmax(1))


def learn(module, number, *callbacks, **options):
    return fit(module, *callbacks, loader=DataLoader(task(number), BATCH), **options)


def by_hand(module, number, penalty=None, epochs=2, k=1, lr=0.5):
    optimizer = torch.optim.SGD(module.parameters(), lr)
    batches = list(DataLoader(task(number), BATCH))
    for _ in range(epochs):
        for start in range(0, len(batches), k):
            optimizer.zero_grad()
            for x, y in batches[start : start + k]:
                loss = F.cross_entropy(module(x), y) + (0.0 if penalty is None else penalty(module))
                (loss / k).backward()
            optimizer.step()


def distance(module, anchors, fisher=None):
    tied = [(n, p) for n, p in module.named_parameters() if n in anchors]
    return sum(((1 if fisher is None else fisher[n]) * (p - anchors[n]) ** 2).sum() for n, p in tied)


def values(module, *names):
    return {n: p.detach().clone() for n, p in module.named_parameters() if not names or n in names}


@pytest.mark.parametrize("k", [1, 3])
def test_l2_trains_as_the_loop_by_hand(k):
    ours, hand, plain = Classifier(), Classifier(), Classifier()
    learn(ours, 0, L2ToStart(0.3, exclude=["net.3.*"]), accumulate_grad_batches=k)
    start = values(hand, "net.0.weight", "net.0.bias")
    by_hand(hand, 0, lambda module: 0.3 * distance(module, start), k=k)
    by_hand(plain, 0, k=k)
    assert same_weights(ours, hand, atol=1e-6)  # float32, 6 steps
    assert not same_weights(ours, plain, atol=1e-3)


def decoupled_by_hand(module, pulled):
    """Steps at a learning rate of 0.5 from where the pull has put each parameter."""
    start = values(module)
    for _ in range(2):
        for x, y in DataLoader(task(0), BATCH):
            gradients = torch.autograd.grad(F.cross_entropy(module(x), y), list(module.parameters()))
            with torch.no_grad():
                for (n, p), g in zip(module.named_parameters(), gradients, strict=True):
                    p.copy_(pulled(p, start[n]) - 0.5 * g)


def test_decoupled_pulls_before_the_step():
    ours, hand = Classifier(), Classifier()
    learn(ours, 0, L2ToStart(0.3, mode="decoupled"))
    decoupled_by_hand(hand, lambda p, start: p - 0.5 * 0.3 * (p - start))
    assert same_weights(ours, hand, atol=1e-6)  # float32, 6 steps


def test_a_decoupled_pull_ends_at_the_anchor_and_says_so():
    ours, hand = Classifier(), Classifier()
    with pytest.warns(
        UserWarning, match=r"at the learning rate 0.5 .* 2.5 times the way.* below 1 / learning rate"
    ) as w:
        learn(ours, 0, L2ToStart(5.0, mode="decoupled"))
    assert sum("times the way" in str(warning.message) for warning in w) == 1
    decoupled_by_hand(hand, lambda p, start: start)
    assert same_weights(ours, hand, atol=1e-6)  # float32, 6 steps


def fisher_by_hand(module, number, names):
    """In float64, from batches of one, at the label that is most probable."""
    net = copy.deepcopy(module).double()
    fisher = {n: torch.zeros_like(p) for n, p in net.named_parameters() if n in names}
    for x, _ in task(number):
        z = net(x[None].double())
        F.cross_entropy(z, z.argmax(1)).backward()
        for n in fisher:
            fisher[n] += dict(net.named_parameters())[n].grad ** 2 / len(task(number))
        net.zero_grad()
    return {n: f.float() for n, f in fisher.items()}


@pytest.mark.parametrize("memory", ["separate", "online"])
def test_ewc_over_three_tasks_is_the_loop_by_hand(memory):
    ours, hand, ewc = Classifier(), Classifier(), EWC(4.0, params=["net.*"], exclude=["*.bias"], memory=memory)
    names, slots = ("net.0.weight", "net.3.weight"), []
    for number in range(3):
        learn(ours, number, ewc)
        by_hand(hand, number, lambda module, slots=slots: 4.0 * sum(distance(module, a, f) for a, f in slots))
        anchors, fisher = values(hand, *names), fisher_by_hand(hand, number, names)
        if memory == "online" and slots:
            fisher = {n: f + slots[0][1][n] for n, f in fisher.items()}
            slots = []
        slots.append((anchors, fisher))
    assert ewc.tasks == 3
    assert same_weights(ours, hand, atol=2e-6)  # float32, 18 steps
    plain = Classifier()
    for number in range(3):
        by_hand(plain, number)
    assert not same_weights(ours, plain, atol=1e-2)
    state = ewc.state_dict()["slots"]
    assert len(state) == (3 if memory == "separate" else 1)
    for ours_, (anchors, fisher) in zip(state, slots, strict=True):
        for n in names:
            torch.testing.assert_close(ours_["anchors"][n], anchors[n], rtol=0.0, atol=2e-6)
            torch.testing.assert_close(ours_["weights"][n], fisher[n], rtol=1e-4, atol=1e-7)  # of weights 1e-6 apart


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_a_penalty_beyond_the_bound_of_gradient_descent_is_said_once(optimizer, momentum):
    """In one dimension: `w - a` is multiplied by `1 - 2 lr lambda F` in each step, and F is summed over the tasks."""

    class Chosen(Classifier):
        def configure_optimizers(self):
            options = {"momentum": momentum} if optimizer is torch.optim.SGD else {}
            return optimizer(self.parameters(), lr=0.5, **options)

    fisher = {"net.3.bias": torch.tensor([0.5, 1.5, 2.0])}
    slots = [{"anchors": {"net.3.bias": torch.zeros(3)}, "weights": fisher} for _ in range(2)]
    bound = (1 + momentum) / (0.5 * 4.0)
    for share, warns in ((0.99, False), (1.01, optimizer is torch.optim.SGD)):
        ewc = EWC(bound * share)
        ewc.load_state_dict({"finished": 2, "in_task": False, "slots": copy.deepcopy(slots)})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            learn(Chosen(), 0, ewc, max_epochs=1)
        said = [str(w.message) for w in caught if "largest Fisher information is 4" in str(w.message)]
        assert len(said) == warns
        assert not said or f"`weight` below {bound:.3g}" in said[0]


def test_fisher_of_some_batches_only():
    ewc, module = EWC(fisher_batches=1), Classifier()
    learn(module, 0, ewc)
    net, kept = copy.deepcopy(module), ewc.state_dict()["slots"][0]["weights"]
    z = net(task(0).tensors[0][:BATCH])
    expected = fisher_diagonal(list(net.parameters()), [fisher_losses(z, None)])
    for one, two in zip(kept.values(), expected, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("labels", ["argmax", "sample", "true"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_fisher_without_the_sample_that_is_not_finite(labels, value):
    def step(module, batch):
        x, y = batch
        good = x.isfinite().all(1) if module.training else torch.ones(len(x), dtype=torch.bool)  # EWC sees them all
        return F.cross_entropy(module(x[good]), y[good])

    x, y = task(0).tensors
    x = x.clone()
    x[5, 2] = value
    ewc, module = EWC(labels=labels), Classifier(step=step)
    with pytest.warns(UserWarning, match=f"the gradients of 1 of {len(x)} samples were not finite"):
        fit(module, ewc, loader=DataLoader(TensorDataset(x, y), BATCH))
    net, rows = copy.deepcopy(module).double(), [i for i in range(len(x)) if i != 5]
    kept = ewc.state_dict()["slots"][0]["weights"]
    assert all(fisher.isfinite().all() for fisher in kept.values())
    if labels == "sample":
        return
    fisher = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
    for i in rows:
        z = net(x[i : i + 1].double())
        F.cross_entropy(z, z.argmax(1) if labels == "argmax" else y[i : i + 1]).backward()
        for n, p in net.named_parameters():
            fisher[n] += p.grad**2 / len(rows)
        net.zero_grad()
    for n, one in kept.items():
        torch.testing.assert_close(one, fisher[n].float(), rtol=1e-4, atol=1e-7)  # float32


def test_fisher_leaves_out_gradients_that_are_not_finite():
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    x = torch.tensor([[1.0, 2.0], [math.nan, 0.0], [3.0, 0.0], [1e30, 0.0]])
    with pytest.warns(UserWarning, match="the gradients of 2 of 4 samples were not finite"):
        (fisher,) = fisher_diagonal([w], [x[:1] @ w, x[1:2] @ w, x[2:3] @ w, x[3:] @ w])
    assert fisher.tolist() == [5.0, 2.0]
    with pytest.warns(UserWarning, match="the gradients of 1 of 2 batches were not finite"):
        (fisher,) = fisher_diagonal([w], [x[:1] @ w, x[1:3] @ w], per_sample=False)
    assert fisher.tolist() == [1.0, 4.0]
    with (
        pytest.warns(UserWarning, match="not finite"),
        pytest.raises(ValueError, match="with a finite gradient, got 1 without one"),
    ):
        fisher_diagonal([w], [x[1:2] @ w])


DISTILLATION = partial(PredictionDistillation, new_classes=[3, 0])


@pytest.mark.parametrize("where", ["net.3.bias", "norm.running_var"])
@pytest.mark.parametrize("make", [partial(EWC, 1.0), partial(L2ToStart, anchor="end_of_task"), DISTILLATION])
def test_a_task_that_ends_with_what_is_not_finite_leaves_what_was_kept(make, where):
    class Spoil(Callback):
        def on_train_end(self, trainer, pl_module):
            dict([*pl_module.named_parameters(), *pl_module.named_buffers()])[where].data[0] = math.nan

    technique, module = make(), Classifier()
    module.norm = nn.BatchNorm1d(2)
    learn(module, 0, technique)
    before = copy.deepcopy(technique.state_dict())
    with pytest.warns(UserWarning, match=rf"the fit ended with '{where}' not finite. Nothing is kept of its task"):
        learn(module, 1, technique, Spoil())
    assert technique.tasks == 1
    assert not difference(technique.state_dict(), before)


class Thing:
    """A batch that nobody but its owner can take apart."""

    def __init__(self, samples):
        self.x, self.y = (torch.stack(column) for column in zip(*samples, strict=True))


def test_fisher_of_batches_that_cannot_be_taken_apart():
    def step(module, batch):
        return F.cross_entropy(module(batch.x), batch.y)

    fishers = []
    for module, collate in ((Classifier(), None), (Classifier(step=step), Thing)):
        ewc = EWC()
        fit(module, ewc, loader=DataLoader(task(0), 5, collate_fn=collate))
        fishers.append(ewc.state_dict()["slots"][0]["weights"])
    for name, fisher in fishers[0].items():
        torch.testing.assert_close(fishers[1][name], fisher)


def test_the_fit_does_not_notice_the_fisher_pass():
    class Noisy(Classifier):
        def training_step(self, batch, batch_idx):
            self.calls = [*getattr(self, "calls", []), batch_idx]
            return F.cross_entropy(self.net(batch[0] + torch.rand_like(batch[0])), batch[1])

    ends = []
    for techniques in ([], [EWC(labels="sample")]):
        module, generator = Noisy(dropout=0.5), torch.Generator().manual_seed(0)
        module.net.append(nn.BatchNorm1d(CLASSES, affine=False))
        fit(module, *techniques, loader=DataLoader(task(0), BATCH, shuffle=True, generator=generator))
        ends.append((module, torch.get_rng_state(), generator.get_state()))
    (one, *states), (two, *others) = ends
    assert same_weights(one, two)
    assert one.calls == two.calls
    assert all(torch.equal(a, b) for a, b in zip(states, others, strict=True))


# -- tasks ------------------------------------------------------------------------------------------------------------


class Save(Callback):
    def __init__(self, path, at):
        self.path, self.at = path, at

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.at:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(
    "make",
    [partial(EWC, 4.0), partial(L2ToStart, 0.3), partial(L2ToStart, 0.3, anchor="end_of_task")],
)
def test_the_second_task_resumes_exactly_from_the_end_of_an_epoch(make, tmp_path):
    technique, module = make(), Classifier()
    learn(module, 0, technique)
    fresh = copy.deepcopy(module)
    learn(module, 1, technique, Save(tmp_path / "half.ckpt", 3))
    resumed = make()
    trainer = fit(fresh, resumed, loader=DataLoader(task(1), BATCH), max_epochs=0)
    assert resumed.tasks == 0  # a fit without a step is no task
    other = Classifier(seed=5)
    trainer = make_resumed(other, resumed, tmp_path / "half.ckpt")
    assert trainer.global_step == 6
    assert same_weights(other, module)
    assert resumed.tasks == technique.tasks == 2
    one, two = technique.state_dict(), resumed.state_dict()
    assert one["in_task"] is two["in_task"] is False
    for a, b in zip(one.get("slots", []), two.get("slots", []), strict=True):
        assert same_weights(a["anchors"], b["anchors"])
        assert same_weights(a["weights"], b["weights"])


@pytest.mark.parametrize("make", [partial(EWC, 4.0), partial(L2ToStart, 0.3, anchor="end_of_task")])
def test_a_resume_without_a_step_left_ends_the_task(make, tmp_path):
    technique, module = make(), Classifier()
    learn(module, 0, technique)
    learn(module, 1, technique, Save(tmp_path / "last.ckpt", 6))
    resumed, other = make(), Classifier(seed=5)
    make_resumed(other, resumed, tmp_path / "last.ckpt")
    assert resumed.tasks == technique.tasks == 2
    assert len(resumed.state_dict()["slots"]) == len(technique.state_dict()["slots"])
    for net, tie in ((module, technique), (other, resumed)):
        learn(net, 2, tie)
    assert same_weights(module, other)


def test_start_of_fit_is_that_of_the_fit_after_a_resume_without_a_step_left(tmp_path):
    learn(Classifier(), 0, L2ToStart(0.3), Save(tmp_path / "last.ckpt", 6))
    tie, module = L2ToStart(100.0), Classifier(lr=1e-4)
    make_resumed(module, tie, tmp_path / "last.ckpt")
    assert (tie.tasks, tie.state_dict()["in_task"]) == (1, False)
    before = values(module)
    learn(module, 1, tie)
    assert same_weights(values(module), before, atol=1e-2)  # 6 steps of 1e-4; the start of the first task is farther


def make_resumed(module, technique, path):
    from tests.toys import make_trainer

    trainer = make_trainer(callbacks=[technique])
    trainer.fit(module, DataLoader(task(1), BATCH), ckpt_path=path, weights_only=True)
    return trainer


def test_what_is_no_task():
    ewc, l2 = "weight=4, Fisher by samples at argmax labels, separate", "weight=0.3, gradient"
    lines = [
        (f"{ewc}; nothing to tie to in the first task", f"{ewc}; tasks before: 1"),
        (
            f"{l2}; nothing to tie to in the first task; tasks before: 0; free: nothing, not classes to come",
            f"{l2}; to the end of task; tasks before: 1; free: nothing, not classes to come",
        ),
    ]
    for technique, (first, second) in zip((EWC(4.0), L2ToStart(0.3, anchor="end_of_task")), lines, strict=True):
        with pytest.raises(BoomError):
            fit(Classifier(step=Boom()), technique)
        learn(Classifier(), 0, technique, fast_dev_run=True)
        assert technique.tasks == 0
        assert technique.describe() == first
        learn(Classifier(), 0, technique)
        assert technique.tasks == 1
        assert technique.describe() == second
        kept = copy.deepcopy(technique.state_dict()["slots"])
        with pytest.raises(BoomError):
            fit(Classifier(step=Boom()), technique)
        assert technique.tasks == 1
        assert same_weights(technique.state_dict()["slots"][0]["anchors"], kept[0]["anchors"])


def test_start_of_fit_starts_anew_after_an_exception():
    tie = L2ToStart(100.0)
    with pytest.raises(BoomError):
        fit(Classifier(step=Boom()), tie)
    module = Classifier(seed=3, lr=1e-3)
    before = values(module)
    fit(module, tie)
    for name, p in module.named_parameters():
        assert (p - before[name]).abs().max() < 1e-2


class Grows(Classifier):
    def grow(self, rows=2):
        old, self.net[3] = self.net[3], nn.Linear(8, CLASSES + rows)
        with torch.no_grad():
            self.net[3].weight[:CLASSES] = old.weight
            self.net[3].bias[:CLASSES] = old.bias
        return self


@pytest.mark.parametrize(
    "make",
    [
        partial(EWC, 1e4),
        partial(L2ToStart, 1e4),
        partial(L2ToStart, 1e4, anchor="end_of_task"),
        partial(L2ToStart, 1.5, mode="decoupled"),
    ],
)
def test_new_rows_and_new_parameters_are_free(make):
    technique, module = make(), Grows(lr=1e-5 if make.keywords.get("mode") is None else 0.5)
    learn(module, 0, technique)
    module.grow()
    module.more = nn.Linear(INPUTS, CLASSES + 2)
    module.step = lambda module, batch: F.cross_entropy(module.net(batch[0]) + module.more(batch[0]), batch[1])
    before = values(module)
    learn(module, 1, technique)
    after = values(module)
    moved = {n: (after[n] - before[n]).abs() for n in after}
    assert moved["more.weight"].min() > 0
    assert moved["net.3.weight"][CLASSES:].min() > 0


def test_the_pull_of_a_grown_head_is_that_of_its_old_rows():
    tie, module = L2ToStart(0.3), Grows()
    learn(module, 0, tie)
    hand = copy.deepcopy(module.grow())
    learn(module, 1, tie)
    start = values(hand)

    def penalty(net):
        rows = {n: CLASSES if n.startswith("net.3") else None for n in start}
        return 0.3 * sum(((p - start[n])[: rows[n]] ** 2).sum() for n, p in net.named_parameters())

    by_hand(hand, 1, penalty)
    assert same_weights(module, hand, atol=1e-6)  # float32, 6 steps


def test_shapes_that_cannot_be_matched_are_refused():
    for technique in (EWC(), L2ToStart(anchor="end_of_task")):
        module = Grows()
        learn(module, 0, technique)
        module.net[3] = nn.Linear(8, 2)
        with pytest.raises(MisconfigurationException, match=r"'net.3.weight' had shape \(3, 8\) .* \(2, 8\) now"):
            learn(module, 1, technique)
        module.net[3] = nn.Identity()
        with pytest.raises(MisconfigurationException, match=r"'net.3.weight' had shape .* is not there now"):
            learn(module, 1, technique)


def test_importance_of_a_file(tmp_path):
    """Weights that are in the file are tied, each as firmly as it says; the others are free."""
    path = tmp_path / "fisher.pt"
    importance = dict(
        zip(["net.0.weight", "net.3.bias"], (w.abs() for w in tensors(3, (8, INPUTS), (CLASSES,))), strict=True)
    )
    torch.save(importance, path)
    start = {name: p.detach().clone() for name, p in Classifier().named_parameters()}

    def penalty(module):
        named = dict(module.named_parameters())
        return 0.3 * sum((w * (named[name] - start[name]).square()).sum() for name, w in importance.items())

    ours, theirs, plain = Classifier(), Classifier(), Classifier()
    tie = L2ToStart(0.3, importance=str(path))
    learn(ours, 0, tie)
    by_hand(theirs, 0, penalty)
    by_hand(plain, 0)
    assert same_weights(ours, theirs, atol=1e-6)  # float32, another order of sums
    assert not same_weights(ours, plain, atol=1e-4)
    assert list(tie.state_dict()["rows"]) == list(start)


def test_importance_that_cannot_be_used(tmp_path):
    for options in ({"anchor": "end_of_task"}, {"mode": "decoupled"}):
        with pytest.raises(ValueError, match="L2ToStart: `importance` must be None unless anchor='start_of_fit' and"):
            L2ToStart(importance="fisher.pt", **options)
    path = str(tmp_path / "fisher.pt")
    for found, match in (
        (
            {"1.weight": torch.ones(2)},
            r"none of the parameters that are tied. It has '1.weight', and the module",
        ),
        ({"net.0.bias": torch.ones(3)}, r"'net.0.bias' must be finite numbers of at least 0 in shape \(8,\), got"),
        ({"net.0.bias": -torch.ones(8)}, "from -1 to -1"),
        ({"net.0.bias": torch.full((8,), math.inf)}, "from inf to inf"),
    ):
        torch.save(found, path)
        with pytest.raises(MisconfigurationException, match=match):
            fit(Classifier(), L2ToStart(importance=path))


def test_patterns_that_match_nothing_are_refused():
    for make, kind in ((EWC, "trainable parameter"), (L2ToStart, "parameter")):
        name = make.__name__
        with pytest.raises(
            MisconfigurationException, match=rf"{name}\(params=\['nett.*'\]\): no {kind} .*'net.0.bias'"
        ):
            learn(Classifier(), 0, make(params=["nett.*"]))
        with pytest.raises(MisconfigurationException, match=rf"{name}\(exclude=\['head.*'\]\): no {kind} has"):
            learn(Classifier(), 0, make(exclude=["head.*"]))
        with pytest.raises(MisconfigurationException, match=f"{name}: `params` and `exclude` leave no {kind} to"):
            learn(Classifier(), 0, make(params=["net.0.*"], exclude=["net.*"]))


@pytest.mark.parametrize("make", [EWC, partial(L2ToStart, anchor="end_of_task")])
def test_a_plain_string_is_one_pattern(make):
    for arguments, names in (
        ({"params": "net.0.*"}, {"net.0.weight", "net.0.bias"}),
        ({"exclude": "net.?.bias"}, {"net.0.weight", "net.3.weight"}),
    ):
        technique = make(**arguments)
        learn(Classifier(), 0, technique)
        assert technique.state_dict()["slots"][0]["anchors"].keys() == names


def test_setups_that_are_refused():
    module = Classifier()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match=r"EWC runs `training_step` on a copy .* would train there"):
        fit(module, EWC())

    class FSDPToyStrategy:
        pass

    trainer = type("Trainer", (), {"strategy": FSDPToyStrategy()})
    for technique in (EWC(), L2ToStart()):
        with pytest.raises(MisconfigurationException, match="keeps whole parameters, which FSDPToyStrategy splits"):
            technique.check(trainer, Classifier())

    class SecondOrder(Classifier):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(MisconfigurationException, match=r"L2ToStart\(mode='decoupled'\) pulls once .* LBFGS"):
        fit(SecondOrder(), L2ToStart(mode="decoupled"))
    with pytest.raises(MisconfigurationException, match=r"EWC: F.mse_loss.* is a regression.*labels=\"sample\""):
        fit(Classifier(step=lambda module, batch: F.mse_loss(module(batch[0]), batch[0][:, :CLASSES])), EWC())
    with pytest.raises(MisconfigurationException, match=r"EWC: F.soft_margin_loss.* has no class logits"):
        fit(Classifier(step=lambda module, batch: F.soft_margin_loss(module(batch[0]), batch[0][:, :CLASSES])), EWC())


# -- frozen parameters ------------------------------------------------------------------------------------------------


class Thaw(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.5, initial_denom_lr=1.0)


class OnlyTrained(Classifier):
    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], self.lr)


def by_hand_on(module, number, trained, start, epochs=1):
    optimizer = torch.optim.SGD([p for layer in trained for p in layer.parameters()], 0.5)
    for _ in range(epochs):
        for x, y in DataLoader(task(number), BATCH):
            optimizer.zero_grad()
            (F.cross_entropy(module(x), y) + 0.3 * distance(module, start)).backward()
            optimizer.step()


def test_layers_that_thaw_in_the_fit_are_tied():
    ours, hand = OnlyTrained(), Classifier()
    learn(ours, 0, Thaw(), L2ToStart(0.3))
    start = values(hand)
    by_hand_on(hand, 0, [hand.net[3]], start)
    by_hand_on(hand, 0, [hand.net], start)
    assert same_weights(ours, hand, atol=1e-6)  # float32, 6 steps


@pytest.mark.parametrize("anchor", ["start_of_fit", "end_of_task"])
def test_layers_that_thaw_for_the_next_task_are_tied(anchor):
    ours, tie = OnlyTrained(), L2ToStart(0.3, anchor=anchor)
    ours.net[0].requires_grad_(requires_grad=False)
    learn(ours, 0, tie)
    hand = copy.deepcopy(ours)
    for module in (ours, hand):
        module.net[0].requires_grad_(requires_grad=True)
    learn(ours, 1, tie)
    by_hand_on(hand, 1, [hand.net], values(hand), epochs=2)
    assert same_weights(ours, hand, atol=1e-6)  # float32, 6 steps


def test_nothing_but_frozen_parameters_has_no_penalty():
    ours, plain = Classifier(), Classifier()
    for module, ties in ((ours, [L2ToStart(0.3, params=["net.0.*"])]), (plain, [])):
        module.net[0].requires_grad_(requires_grad=False)
        fit(module, *ties, loader=make_loader())
    assert same_weights(ours, plain)


def test_what_is_known_of_a_layer_outlives_a_task_in_which_it_is_frozen():
    ewc, module = EWC(4.0, memory="online"), Classifier()
    learn(module, 0, ewc)
    (first,) = ewc.state_dict()["slots"]
    module.net[0].requires_grad_(requires_grad=False)
    learn(module, 1, ewc)
    (second,) = ewc.state_dict()["slots"]
    assert second["weights"].keys() == second["anchors"].keys() == first["weights"].keys()
    for name in first["weights"]:
        same = torch.equal(first["weights"][name], second["weights"][name])
        assert same is name.startswith("net.0")
        assert torch.equal(first["anchors"][name], second["anchors"][name]) is same
    module.net[0].requires_grad_(requires_grad=True)
    learn(module, 2, ewc)
    assert ewc.tasks == 3


def test_numbers_are_tied_over_several_tasks():
    class Scaled(Classifier):
        def __init__(self):
            super().__init__(step=lambda module, batch: F.cross_entropy(module.scale * module(batch[0]), batch[1]))
            self.scale = nn.Parameter(torch.tensor(1.0))

    ewc, module, before = EWC(1.0, memory="online", params=["scale"]), Scaled(), 0.0
    for number in range(2):
        learn(module, number, ewc)
        losses = fisher_losses(module.scale * module(task(number).tensors[0]), None)
        before = before + fisher_diagonal([module.scale], [losses])[0]
        (slot,) = ewc.state_dict()["slots"]
        torch.testing.assert_close(slot["weights"]["scale"], before, rtol=1e-5, atol=0.0)  # sums in another order
        assert slot["anchors"]["scale"] == module.scale


# -- streams ----------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    """Samples without end, or of one pass."""

    def __init__(self, end=None):
        self.samples = ((x, y) for _ in range(end or 10**6) for x, y in zip(*task(0).tensors, strict=True))

    def __iter__(self):
        return self.samples


def test_fisher_without_the_samples_that_are_ignored():
    x, y = task(0, 8).tensors
    marked = y.where(torch.arange(8) < 5, 255)

    def step(module, batch):
        return F.cross_entropy(module(batch[0]), batch[1], ignore_index=255)

    fishers = []
    for data in (TensorDataset(x[:5], y[:5]), TensorDataset(x, marked)):
        ewc = EWC(labels="true")
        fit(Classifier(step=step, lr=0.0), ewc, loader=DataLoader(data, 8))
        fishers.append(ewc.state_dict()["slots"][0]["weights"])
    assert same_weights(*fishers, atol=1e-6)  # float32, sums of other parts


def test_fisher_of_the_batches_that_a_limit_leaves():
    fishers = []
    for ewc, options in ((EWC(), {"limit_train_batches": 2}), (EWC(fisher_batches=2), {"limit_train_batches": 2})):
        learn(Classifier(), 0, ewc, **options)
        fishers.append(ewc.state_dict()["slots"][0]["weights"])
    assert same_weights(*fishers)


def test_streams_need_a_number_of_batches():
    ewc = EWC()
    with pytest.raises(MisconfigurationException, match=r"EWC reads the .* Stream has no length.* `fisher_batches`"):
        fit(Classifier(), ewc, loader=DataLoader(Stream(), BATCH), max_steps=4)
    for limited, options in ((EWC(fisher_batches=2), {"max_steps": 4}), (ewc, {"limit_train_batches": 2})):
        fit(Classifier(), limited, loader=DataLoader(Stream(), BATCH), **options)
        assert limited.tasks == 1
    with pytest.raises(MisconfigurationException, match="EWC: the training data gives no batch with a loss when"):
        fit(Classifier(), EWC(fisher_batches=2), loader=DataLoader(Stream(1), BATCH), max_epochs=1)
