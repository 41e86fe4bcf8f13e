"""Outputs and features tied to those of the network of the task before, and what was forgotten."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import (
    EWC,
    ContinualMetrics,
    FeatureDistillation,
    L2ToStart,
    LossMixin,
    PredictionDistillation,
)
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.technique import LossTechnique
from lightning_reg.functional import (
    bce_distillation_loss,
    cross_entropy_shift,
    feature_distillation_loss,
    forgetting,
    softmax_distillation_loss,
)
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.conformance.kinds.metric import MetricCase
from tests.toys import INPUTS, QUIET, Boom, BoomError, Callback, Classifier, fit, make_trainer, same_weights, weights_of

pytestmark = QUIET


OLD_BIAS = torch.tensor([0.5, -0.5, 0.25, 0.0])


def after_one_task(*arguments, **options):
    """As it is when one task is over: its teacher is the network at the start with another bias at the end."""
    distillation = PredictionDistillation(*arguments, **options)
    state = {"finished": 1, "in_task": False, "columns": 2, "teacher": {"net.head.bias": OLD_BIAS.clone()}}
    distillation.load_state_dict(state)
    return distillation


class PredictionsByHand(Hand):
    """Two old classes as the teacher has them, two new ones as they are labelled; each a yes or no."""

    def begin(self, loop):
        self.teacher = loop.constants()
        self.teacher["net.head.bias"][:4] = OLD_BIAS

    def observe(self, loop, moment):
        self.old = loop.run(self.teacher, moment.x)[0].detach().sigmoid()[:, :2]

    def losses(self, output, moment):
        wanted = torch.cat([self.old, F.one_hot(moment.y, 4).float()[:, 2:]], 1)
        return -(wanted * output.sigmoid().log() + (1 - wanted) * (-output).sigmoid().log()).sum(1)


class FeaturesByHand(Hand):
    def begin(self, loop):
        self.teacher = loop.constants()

    def observe(self, loop, moment):
        self.wanted = loop.run(self.teacher, moment.x)[1]["net.body"].detach()

    def term(self, loop, moment):
        return 0.5 * (moment.features["net.body"] - self.wanted).square().sum() / len(moment.x)


def logits(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def after_tasks(after):
    """Logits of test samples after some tasks, their labels, and the number of tasks."""
    seen = [2, 3, 5][after - 1]
    labels = torch.arange(3 * seen) % seen
    return logits(after, len(labels), 5) + 0.5 * F.one_hot(labels, 5), labels, after


def metrics_by_loops(batches):
    """The three numbers over batches of five classes, in tasks of 2, 1 and 2, from the hits of each sample."""
    sizes, owner, hits = [2, 1, 2], [0, 0, 1, 2, 2], {}
    for batch in batches:
        after = batch["after_task"]
        for row, label in zip(batch["logits"].tolist(), batch["labels"].tolist(), strict=True):
            own = [c for c in range(5) if owner[c] == owner[label]]
            told = max(own, key=row.__getitem__) == label
            hit = max(range(sum(sizes[:after])), key=row.__getitem__) == label
            hits.setdefault((after, owner[label] + 1), []).append((hit, told))
    last = max(after for after, _ in hits)

    def share(which, after, task):
        found = [pair[which] for pair in hits.get((after, task), ())]
        return sum(found) / len(found) if found else math.nan

    def lost(which):
        steps = [
            sum(sizes[n - 1] * (share(which, n, n) - share(which, i, n)) for n in range(1, i)) / sum(sizes[:i])
            for i in range(2, last + 1)
        ]
        return sum(steps) / max(len(steps), 1)

    now = [hit for task in range(1, last + 1) for hit, _ in hits[last, task]]
    return {"accuracy": sum(now) / len(now), "forgetting": lost(0), "local_forgetting": lost(1)}


CASE = (
    Case(
        make=partial(after_one_task, new_classes=[2, 2, 0, 0]),
        neutral=partial(PredictionDistillation, loss_form="softmax", weight=0.0),
        by_hand=PredictionsByHand,
        says=(
            "bce; tasks before: 1",
            "weight=0: inactive",
            "bce; no old classes in the first task",
            "softmax, weight=1, temperature=2, your loss over the classes so far; no old classes in the first task",
            "bce; no old classes in the first task",
        ),
        variants=[
            PredictionDistillation,
            partial(PredictionDistillation, "softmax", new_classes=[4, 0], loss="cross_entropy"),
            partial(PredictionDistillation, loss="last"),
        ],
        invalid=[
            ({"weight": -0.1}, "weight"),
            ({"temperature": 0.0}, "temperature"),
            ({"new_classes": [2, -1]}, "new_classes"),
        ],
    ),
    Case(
        make=partial(FeatureDistillation, layer="net.body", weight=0.5, anchor="start_of_fit"),
        by_hand=FeaturesByHand,
        says=(
            "layer net.body, weight=0.5; to the start of fit; tasks before: 0",
            "weight=0: inactive",
            "layer net.act_body, weight=0.1; no teacher in the first task; tasks before: 0",
            "layer net.body, weight=0.1; no teacher in the first task; tasks before: 0",
        ),
        also=["regression"],
        neutral=partial(FeatureDistillation, layer="net.body", weight=0.0),
        variants=[partial(FeatureDistillation, "net.act_body"), partial(FeatureDistillation, "net.body", loss="last")],
        invalid=[({"layer": "net.body", "weight": -0.1}, "weight")],
    ),
    MetricCase(
        make=partial(ContinualMetrics, new_classes=[2, 1, 2]),
        batches=[
            dict(zip(("logits", "labels", "after_task"), after_tasks(n), strict=True)) for n in (1, 2, 3, 1, 2, 3)
        ],
        expected=metrics_by_loops,
        invalid=[({"new_classes": [2, 0]}, "new_classes"), ({"new_classes": []}, "new_classes")],
    ),
)


# -- losses -----------------------------------------------------------------------------------------------------------


def test_bce_by_loops():
    z, old, y = logits(0, 5, 7), logits(1, 5, 3), torch.tensor([3, 4, 2, 0, 4])
    z.requires_grad_()
    loss = bce_distillation_loss(z, old, y, num_old=3, num_seen=5)
    loss.backward()
    total = 0.0
    for b in range(5):
        for c in range(5):
            p = torch.sigmoid(z[b, c].detach().double())
            t = torch.sigmoid(old[b, c].double()) if c < 3 else float(y[b] == c)
            total += float(-(t * p.log() + (1 - t) * (1 - p).log())) / 5
            assert z.grad[b, c].item() == pytest.approx(float(p - t) / 5, abs=1e-7)
    assert loss.item() == pytest.approx(total, rel=1e-6)  # classes summed, samples averaged
    assert (z.grad[:, 5:] == 0).all()
    each = bce_distillation_loss(z, old, y, 3, 5, reduction="none")
    assert each.mean().item() == pytest.approx(loss.item())


def test_bce_of_a_first_task_is_one_vs_all():
    z, y = logits(0, 4, 3), torch.tensor([0, 2, 1, 2])
    plain = F.binary_cross_entropy_with_logits(z, F.one_hot(y, 3).float(), reduction="sum") / 4
    assert bce_distillation_loss(z, None, y, num_old=0).item() == pytest.approx(plain.item())
    ignored = bce_distillation_loss(z, None, torch.tensor([0, 2, 1, -100]), num_old=0, reduction="none")
    assert torch.equal(ignored[:3], bce_distillation_loss(z, None, y, num_old=0, reduction="none")[:3])
    soft = bce_distillation_loss(z, None, F.one_hot(y, 3).float(), num_old=0)
    assert soft.item() == pytest.approx(plain.item())


def test_a_student_that_is_its_teacher_has_no_gradient():
    z = logits(0, 4, 3).requires_grad_()
    bce_distillation_loss(z, z, torch.tensor([0, 1, 2, 0]), num_old=3).backward()
    assert z.grad.abs().max() < 1e-8
    z.grad = None
    softmax_distillation_loss(z, z).backward()
    assert z.grad.abs().max() < 1e-8
    z.grad = None
    feature_distillation_loss(z, z).backward()
    assert z.grad.abs().max() == 0


def test_softmax_by_loops():
    z, old = logits(0, 4, 3).requires_grad_(), logits(1, 4, 3)
    loss = softmax_distillation_loss(z, old, temperature=2.0)
    loss.backward()
    p, t = ((v.detach().double() / 2).exp() for v in (z, old))
    p, t = p / p.sum(1, keepdim=True), t / t.sum(1, keepdim=True)
    assert loss.item() == pytest.approx(float(-(t * p.log()).sum()) / 4, rel=1e-6)
    torch.testing.assert_close(z.grad.double(), (p - t) / 2 / 4, atol=1e-7, rtol=0.0)  # no T^2 makes up for 1 / T


@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.2}, {"weight": torch.tensor([0.5, 2.0, 1.0, 4.0, 3.0])}, {"ignore_index": 2}],
    ids=lambda options: next(iter(options), "plain"),
)
@pytest.mark.parametrize("soft", [False, True])
def test_the_cross_entropy_over_the_classes_so_far_is_that_of_their_logits(options, soft):
    if soft and options.keys() & {"weight", "ignore_index"}:
        return
    z, y = logits(0, 6, 5).requires_grad_(), torch.tensor([0, 2, 1, 2, 0, 1])
    if soft:
        y = F.pad(logits(1, 6, 3).softmax(1), (0, 2))
    each = F.cross_entropy(z, y, reduction="none", **options)
    mass = options["weight"][y] if "weight" in options else (y != options.get("ignore_index", -1)).float()
    mass = torch.ones(6) if soft else mass
    whole = each / torch.where(mass > 0, mass, 1.0) + cross_entropy_shift(z, 3, options.get("label_smoothing", 0.0))
    (mine,) = torch.autograd.grad((whole * mass).sum() / mass.sum(), z)
    cut = {**options, "weight": options["weight"][:3]} if "weight" in options else options
    wanted = F.cross_entropy(z[:, :3], y[:, :3] if soft else y, **cut)
    (theirs,) = torch.autograd.grad(wanted, z)
    assert ((whole * mass).sum() / mass.sum()).item() == pytest.approx(wanted.item(), rel=1e-6)
    torch.testing.assert_close(mine, theirs, rtol=0.0, atol=1e-7)


def test_features_by_loops():
    f, old = logits(0, 3, 2, 4), logits(1, 3, 2, 4)
    total = sum((f[b, i, j] - old[b, i, j]).item() ** 2 for b in range(3) for i in range(2) for j in range(4)) / 3
    assert feature_distillation_loss(f, old).item() == pytest.approx(total, rel=1e-6)
    mean = feature_distillation_loss(f, old, elements="mean")
    assert mean.item() == pytest.approx(total / 8, rel=1e-6)
    assert feature_distillation_loss(f.bfloat16(), old.bfloat16()).dtype == torch.float32


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_forgetting_by_hand():
    r = torch.tensor([[0.9, 9.0, 9.0], [0.5, 0.8, 9.0], [0.3, 0.6, 0.7]])
    first = 2 / 5 * (0.9 - 0.5)
    second = 2 / 9 * (0.9 - 0.3) + 3 / 9 * (0.8 - 0.6)
    assert forgetting(r, [2, 3, 4]).item() == pytest.approx((first + second) / 2)
    assert forgetting(torch.full((4, 4), 0.7), [1, 1, 1, 1]) == 0.0
    assert forgetting(torch.tensor([[0.7]]), [5]) == 0.0


def test_metrics_refuse_a_task_that_is_not_there():
    with pytest.raises(ValueError, match=r"`after_task` must be in \[1, 3\], got 4"):
        ContinualMetrics([2, 1, 2]).update(torch.eye(5), torch.arange(5), after_task=4)


def test_metrics_go_on_in_another_process():
    z = [logits(after, 12, 4) for after in (1, 2)]
    y = [torch.arange(12) % 2, torch.arange(12) % 4]
    whole, first, second = (ContinualMetrics([2, 2]) for _ in range(3))
    whole.update(z[0], y[0], after_task=1)
    first.update(z[0], y[0], after_task=1)
    second.load_state_dict(first.state_dict())
    for metrics in (whole, second):
        metrics.update(z[1], y[1], after_task=2)
    assert second.compute() == whole.compute()
    assert not torch.tensor(list(whole.compute().values())).isnan().any()


def test_metrics_of_tasks_that_were_not_tested_are_nan():
    metrics = ContinualMetrics([2, 2])
    metrics.update(torch.eye(4), torch.arange(4), after_task=2)
    assert metrics.compute()["accuracy"] == 1.0
    assert metrics.compute()["forgetting"].isnan()
    assert metrics.compute()["local_forgetting"].isnan()
    metrics.reset()
    metrics.update(torch.eye(4)[:2], torch.arange(2), after_task=1)
    metrics.update(torch.eye(4)[2:], torch.tensor([2, 3]), after_task=2)
    assert all(value.isnan() for value in metrics.compute().values())


# -- training ---------------------------------------------------------------------------------------------------------

FIXED = [2, 1, 2]


class Net(Classifier):
    """Five outputs, or a head that grows; a loss in the user's own way."""

    def __init__(self, outputs=5, loss=F.cross_entropy, seed=0):
        super().__init__(seed=seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net[3] = nn.Linear(8, outputs)
        self.loss = loss

    def training_step(self, batch, batch_idx):
        return self.loss(self.net(batch[0]), batch[1])

    def grow(self, rows):
        old = self.net[3]
        with torch.random.fork_rng():
            torch.manual_seed(rows)
            self.net[3] = nn.Linear(8, len(old.weight) + rows)
        with torch.no_grad():
            self.net[3].weight[: len(old.weight)] = old.weight
            self.net[3].bias[: len(old.weight)] = old.bias


def task(number, size=24):
    x = logits(number, size, INPUTS)
    return TensorDataset(x, sum(FIXED[:number]) + (x[:, 0] > 0).long() * (FIXED[number] - 1))


def learn(module, number, *callbacks, **options):
    return fit(module, *callbacks, loader=DataLoader(task(number), 8), **options)


def by_hand(module, number, loss, epochs=2):
    optimizer = torch.optim.SGD(module.parameters(), 0.5)
    for _ in range(epochs):
        for x, y in DataLoader(task(number), 8):
            optimizer.zero_grad()
            loss(module, x, y).backward()
            optimizer.step()


def bce_by_hand(teacher, old, seen):
    def loss(module, x, y):
        t = F.one_hot(y, seen).float()
        if teacher is not None:
            with torch.no_grad():
                t[:, :old] = teacher.net(x)[:, :old].sigmoid()
        return F.binary_cross_entropy_with_logits(module.net(x)[:, :seen], t, reduction="sum") / len(y)

    return loss


def softmax_by_hand(teacher, old, seen, mu, temperature):
    def loss(module, x, y):
        z = module.net(x)
        value = F.cross_entropy(z[:, :seen], y)  # over the classes so far, as the authors have it
        if teacher is not None:
            t = (teacher.net(x)[:, :old].detach() / temperature).softmax(1)
            value = value - mu * (t * (z[:, :old] / temperature).log_softmax(1)).sum(1).mean()
        return value

    return loss


@pytest.mark.parametrize("grows", [False, True], ids=["the head has all outputs", "the head grows"])
@pytest.mark.parametrize("form", ["bce", "softmax"])
def test_trains_as_the_loop_by_hand_over_three_tasks(form, grows):
    ours, hand = (Net(2 if grows else 5) for _ in range(2))
    distillation = PredictionDistillation(form, weight=0.7, temperature=1.5, new_classes=None if grows else FIXED)
    teacher, seen = None, 0
    for number, new in enumerate(FIXED):
        if grows and number:
            ours.grow(new)
            hand.grow(new)
        old, seen = seen, seen + new
        learn(ours, number, distillation)
        loss = bce_by_hand(teacher, old, seen) if form == "bce" else softmax_by_hand(teacher, old, seen, 0.7, 1.5)
        by_hand(hand, number, loss)
        teacher = copy.deepcopy(hand)
        assert same_weights(ours, hand, atol=2e-6 * (number + 1))  # float32, 6 steps each
    assert distillation.tasks == 3


def test_features_train_as_the_loop_by_hand():
    ours, hand, distillation = Net(), Net(), FeatureDistillation("net.1", weight=0.3)
    learn(ours, 0, distillation)
    by_hand(hand, 0, lambda module, x, y: F.cross_entropy(module.net(x), y))
    assert same_weights(ours, hand, atol=1e-6)  # float32, 6 steps; no teacher in the first task
    teacher = copy.deepcopy(hand)
    learn(ours, 1, distillation)

    def loss(module, x, y):
        f, old = module.net[:2](x), teacher.net[:2](x).detach()
        return F.cross_entropy(module.net[3](f), y) + 0.3 * ((f - old) ** 2).sum(1).mean()

    by_hand(hand, 1, loss)
    assert same_weights(ours, hand, atol=2e-6)  # float32, 12 steps


class OwnLoss(Net):
    """No loss of torch is called: a library's, a model's own."""

    def __init__(self, wrap=False, **options):
        super().__init__(**options)
        self.wrap = wrap

    def training_step(self, batch, batch_idx):
        z, y = self.net(batch[0]), batch[1]
        loss = (z.logsumexp(1) - z.gather(1, y[:, None])[:, 0]).mean()
        return {"loss": loss, "more": 1} if self.wrap else loss


@pytest.mark.parametrize("elements", ["sum", "mean"])
@pytest.mark.parametrize("make", [Net, OwnLoss, partial(OwnLoss, wrap=True)], ids=["called", "own", "in a mapping"])
def test_features_join_a_loss_with_a_call_or_without(make, elements):
    ours, hand = make(), Net()
    distillation = FeatureDistillation("net.1", weight=0.3, elements=elements)
    learn(ours, 0, distillation)
    by_hand(hand, 0, lambda module, x, y: F.cross_entropy(module.net(x), y))
    teacher = copy.deepcopy(hand)
    trainer = learn(ours, 1, distillation)

    def term(module, x):
        squares = (module.net[:2](x) - teacher.net[:2](x).detach()) ** 2
        return 0.3 * squares.sum() / (len(x) * (8 if elements == "mean" else 1))

    by_hand(hand, 1, lambda module, x, y: F.cross_entropy(module.net(x), y) + term(module, x))
    assert same_weights(ours, hand, atol=2e-6)  # float32, 12 steps
    assert trainer.logged_metrics["reg/feature_distillation/term"] > 0


def test_beside_one_that_needs_a_call_a_loss_without_one_is_refused():
    class First(LossTechnique):
        def loss_term(self, call):
            return None

    features = FeatureDistillation("net.1", anchor="start_of_fit")
    with pytest.raises(MisconfigurationException, match=r"^First: `training_step` at \S+ returned a loss, but none"):
        learn(OwnLoss(), 0, features, First())


def test_features_of_other_rows_without_a_call_are_refused():
    class Folded(OwnLoss):
        def training_step(self, batch, batch_idx):
            return self.net[:2](batch[0].repeat(2, 1)).mean()

    features = FeatureDistillation("net.1", anchor="start_of_fit")
    with pytest.raises(MisconfigurationException, match=r"must be a tensor with the 8 samples .* shape \(16, 8\)"):
        learn(Folded(), 0, features)


def weighted(*weights):
    return partial(F.cross_entropy, weight=torch.tensor(weights))


def nll(z, y, **options):
    return F.nll_loss(z.log_softmax(1), y, **options)


@pytest.mark.parametrize(
    ("whole", "cut"),
    [
        (partial(F.cross_entropy, label_smoothing=0.1), partial(F.cross_entropy, label_smoothing=0.1)),
        (
            partial(F.cross_entropy, weight=torch.arange(1.0, 6.0)),
            partial(F.cross_entropy, weight=torch.arange(1.0, 3.0)),
        ),
        (partial(F.cross_entropy, reduction="sum"), partial(F.cross_entropy, reduction="sum")),
        (partial(F.cross_entropy, ignore_index=1), partial(F.cross_entropy, ignore_index=1)),
        (nll, nll),
        (lambda z, y: F.cross_entropy(z[:, :, None], y[:, None]), F.cross_entropy),
    ],
    ids=["smoothed", "class weights", "sum", "ignored", "nll", "flat"],
)
def test_the_softmax_form_keeps_what_the_users_cross_entropy_is(whole, cut):
    ours, hand = Net(loss=whole), Net()
    learn(ours, 0, PredictionDistillation("softmax", new_classes=FIXED), gradient_clip_val=1.0)
    optimizer = torch.optim.SGD(hand.parameters(), 0.5)
    for _ in range(2):
        for x, y in DataLoader(task(0), 8):
            optimizer.zero_grad()
            cut(hand.net(x)[:, :2], y).backward()
            nn.utils.clip_grad_norm_(hand.parameters(), 1.0)
            optimizer.step()
    assert same_weights(ours, hand, atol=2e-6)  # float32, 6 steps


class HandsOver(LossMixin, Net):
    def training_step(self, batch, batch_idx):
        z = self.net(batch[0])
        return self.reduce_loss(F.cross_entropy(z, batch[1], reduction="none"), logits=z, targets=batch[1])


class WeighFirst(LossTechnique):
    def sample_weights(self, call):
        return torch.linspace(0.0, 2.0, call.batch_size)


def test_the_weights_of_others_act_on_the_loss_over_the_classes_so_far():
    ours, hand = Net(), Net()
    learn(ours, 0, WeighFirst(), PredictionDistillation("softmax", new_classes=FIXED))
    weights = torch.linspace(0.0, 2.0, 8)
    by_hand(hand, 0, lambda m, x, y: (weights * F.cross_entropy(m.net(x)[:, :2], y, reduction="none")).mean())
    assert same_weights(ours, hand, atol=1e-6)  # float32, 6 steps


@pytest.mark.parametrize(
    ("module", "what"),
    [
        (lambda: Net(loss=partial(F.cross_entropy, weight=torch.ones(5), label_smoothing=0.1)), "with class weights"),
        (HandsOver, "computed already"),
    ],
)
def test_a_loss_that_cannot_be_one_over_the_classes_so_far_is_refused(module, what):
    net = module()
    with pytest.raises(MisconfigurationException, match=rf"{what}, so it cannot be .* the 2 classes so far. Hand over"):
        learn(net, 0, PredictionDistillation("softmax", new_classes=FIXED))
    assert net.trainer.global_step == 0


def test_a_label_of_a_class_to_come_is_refused_in_the_softmax_form():
    with pytest.raises(MisconfigurationException, match="there are 2 classes so far, and a label is 2"):
        learn(Net(), 1, PredictionDistillation("softmax", new_classes=FIXED))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_the_users_reduction_is_kept(reduction):
    def loss(z, y):
        value = F.cross_entropy(z, y, reduction=reduction)
        return value / len(y) if reduction == "sum" else value.mean()

    ours, mean = Net(loss=loss), Net()
    for module in (ours, mean):
        distillation = PredictionDistillation(new_classes=FIXED)
        learn(module, 0, distillation)
        learn(module, 1, distillation)
    assert same_weights(ours, mean, atol=1e-6)  # float32, 12 steps


@pytest.mark.parametrize("ignored", [-100, 255])
def test_ignored_samples_take_no_part(ignored):
    ours, hand = Net(loss=partial(F.cross_entropy, ignore_index=ignored)), Net()
    x, y = task(0).tensors
    y = torch.where(torch.arange(24) % 3 == 0, ignored, y)
    fit(ours, PredictionDistillation(), loader=DataLoader(TensorDataset(x, y), 8))
    optimizer = torch.optim.SGD(hand.parameters(), 0.5)
    for _ in range(2):
        for start in range(0, 24, 8):
            kept = y[start : start + 8] != ignored
            optimizer.zero_grad()
            z = hand.net(x[start : start + 8][kept])
            t = F.one_hot(y[start : start + 8][kept], 5).float()
            (F.binary_cross_entropy_with_logits(z, t, reduction="sum") / kept.sum()).backward()
            optimizer.step()
    assert same_weights(ours, hand, atol=1e-6)  # float32, 6 steps


def test_a_loss_by_hand_is_replaced_too():
    ours, plain = HandsOver(), Net()
    for module in (ours, plain):
        distillation = PredictionDistillation(new_classes=FIXED)
        learn(module, 0, distillation)
        learn(module, 1, distillation)
    assert same_weights(ours, plain, atol=1e-6)  # float32, 12 steps


# -- tasks ------------------------------------------------------------------------------------------------------------


class Save(Callback):
    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


MAKES = [
    partial(PredictionDistillation, new_classes=FIXED),
    partial(PredictionDistillation, "softmax", new_classes=FIXED),
    partial(FeatureDistillation, "net.1", 0.3),
    partial(FeatureDistillation, "net.1", 0.3, anchor="start_of_fit"),
]


@pytest.mark.parametrize("make", MAKES)
def test_the_second_task_resumes_exactly(make, tmp_path):
    technique, module = make(), Net()
    learn(module, 0, technique)
    learn(module, 1, technique, Save(tmp_path / "half.ckpt"))
    resumed, other = make(), Net(seed=4)
    trainer = make_trainer(callbacks=[resumed])
    trainer.fit(other, DataLoader(task(1), 8), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert same_weights(other, module)
    assert resumed.tasks == technique.tasks == 2
    assert same_weights(resumed.state_dict()["teacher"], technique.state_dict()["teacher"])


def test_a_resume_without_a_step_left_ends_the_task(tmp_path):
    technique, module = PredictionDistillation(), Net(seed=4)
    learn(module, 0, technique, Save(tmp_path / "last.ckpt"), max_epochs=1)
    resumed, other = PredictionDistillation(), Net(seed=5)
    trainer = make_trainer(callbacks=[resumed], max_epochs=1)
    trainer.fit(other, DataLoader(task(0), 8), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert resumed.tasks == 1
    assert resumed.state_dict()["columns"] == technique.state_dict()["columns"] == 5
    assert same_weights(resumed.state_dict()["teacher"], weights_of(module))


def test_what_is_no_task():
    lines = [
        ("bce; no old classes in the first task", "bce; tasks before: 1"),
        (
            "layer net.1, weight=0.2, mean of elements; no teacher in the first task; tasks before: 0",
            "layer net.1, weight=0.2, mean of elements; to the end of task; tasks before: 1",
        ),
    ]
    techniques = (PredictionDistillation(), FeatureDistillation("net.1", 0.2, elements="mean"))
    for technique, (first, second) in zip(techniques, lines, strict=True):
        with pytest.raises(BoomError):
            fit(Classifier(step=Boom()), technique)
        fit(Classifier(), technique, fast_dev_run=True)
        assert technique.tasks == 0
        assert technique.describe() == first
        fit(Classifier(), technique)
        assert technique.tasks == 1
        assert technique.describe() == second


class Sights(Callback):
    """Notes what the teacher makes of the first batch."""

    features = None

    def on_train_start(self, trainer, pl_module):
        (technique,) = [c for c in trainer.callbacks if isinstance(c, FeatureDistillation)]
        self.own, technique.sight = technique.sight, self.sight

    def sight(self, step, reference):
        seen = self.own(step, reference)
        self.features = seen.features["net.1"] if self.features is None else self.features
        return seen


def test_the_teacher_is_not_the_module_of_today():
    distillation, module = FeatureDistillation("net.1", 1e-3), Net()
    learn(module, 0, distillation)
    teacher = copy.deepcopy(module)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    seen = Sights()
    learn(module, 1, distillation, seen, max_epochs=1)
    x = task(1).tensors[0][:8]
    assert torch.equal(seen.features, teacher.net[:2](x))


@pytest.mark.parametrize(
    ("make", "tasks", "sentence"),
    [
        (PredictionDistillation, [0, 1], "the head has 5 outputs and had 5 in the task before"),
        (lambda: PredictionDistillation(new_classes=[2]), [0, 1], r"new_classes=\[2\]\): this is task 2, .* for 1\."),
        (lambda: PredictionDistillation(new_classes=[6]), [0], r"there are 6 classes by task 1, and the head has 5"),
        (lambda: PredictionDistillation(new_classes=[2, 1]), [1], r"there are 2 classes so far, and a label is 2"),
        (lambda: PredictionDistillation("softmax"), [0, 1], "the head has 5 outputs and had 5"),
    ],
)
def test_classes_that_are_not_known_are_refused(make, tasks, sentence):
    technique, module = make(), Net()
    for number in tasks[:-1]:
        learn(module, number, technique)
    with pytest.raises(MisconfigurationException, match=f"PredictionDistillation.*{sentence}"):
        learn(module, tasks[-1], technique)


class Heads(Classifier):
    """A head of its own for each task."""

    def __init__(self):
        super().__init__()
        self.body, self.heads = self.net[:2], nn.ModuleList()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.heads[-1](self.body(batch[0])), batch[1])


@pytest.mark.parametrize("form", ["bce", "softmax"])
@pytest.mark.parametrize("new_classes", [None, FIXED])
@pytest.mark.parametrize("outputs", [3, 5])
def test_a_head_for_each_task_is_refused(form, new_classes, outputs):
    distillation, module = PredictionDistillation(form, new_classes=new_classes), Heads()
    module.heads.append(nn.Linear(8, 2))
    learn(module, 0, distillation)
    module.heads.append(nn.Linear(8, outputs))
    with pytest.raises(MisconfigurationException, match=r"'heads\.1\.weight' is new .* a head of its own"):
        learn(module, 1, distillation)
    assert distillation.tasks == 1


def test_the_table_says_what_the_softmax_form_makes_of_the_loss():
    assert "your loss over the classes so far" in PredictionDistillation("softmax", new_classes=FIXED).describe()
    assert "your loss" not in PredictionDistillation("softmax").describe()


def test_setups_that_are_refused():
    module = Net()
    module.automatic_optimization = False
    for technique in (PredictionDistillation(), FeatureDistillation("net.1")):
        with pytest.raises(MisconfigurationException, match=r"runs `training_step` on a copy .* would train there"):
            fit(module, technique)
    with pytest.raises(MisconfigurationException, match=r"No layer is named 'net.7'"):
        learn(Net(), 0, FeatureDistillation("net.7"))
    with pytest.raises(MisconfigurationException, match=r"PredictionDistillation: .* has no class logits"):
        learn(Net(loss=lambda z, y: F.mse_loss(z[:, 0], y.float())), 0, PredictionDistillation())

    class Pooled(nn.Module):
        def forward(self, x):
            return (x,)

    odd = Net()
    odd.net[2], odd.net[3] = Pooled(), nn.Sequential(Unpack(), nn.Linear(8, 5))
    with pytest.raises(MisconfigurationException, match=r"FeatureDistillation\(layer='net.2'\): .* got a tuple"):
        learn(odd, 0, FeatureDistillation("net.2", anchor="start_of_fit"))


class Unpack(nn.Module):
    def forward(self, x):
        return x[0]


# -- the effect -------------------------------------------------------------------------------------------------------


class Digits(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


@pytest.mark.parametrize(
    ("callbacks", "low", "high"),
    [
        (list, 0.0, 0.25),
        (lambda: [EWC(100.0)], 0.0, 0.3),
        (lambda: [PredictionDistillation("softmax", new_classes=[2] * 5)], 0.0, 0.25),
        (lambda: [PredictionDistillation(new_classes=[2] * 5), L2ToStart(0.03, anchor="end_of_task")], 0.4, 1.0),
    ],
    ids=["naive", "EWC alone", "softmax form", "BCE form and L2"],
)
def test_only_the_bce_form_remembers_digits(callbacks, low, high):
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    test = torch.arange(len(x)) % 3 == 0
    seed_everything(0, verbose=False)
    module, techniques = Digits(), callbacks()
    for number in range(5):
        now = ~test & (y // 2 == number)
        loader = DataLoader(TensorDataset(x[now], y[now]), 32, shuffle=True)
        make_trainer(callbacks=techniques, max_epochs=6).fit(module, loader)
    accuracy = (module.net(x[test]).argmax(1) == y[test]).float().mean().item()
    assert low <= accuracy <= high
