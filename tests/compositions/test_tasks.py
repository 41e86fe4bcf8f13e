"""Techniques that carry something from task to task beside others, against loops written by hand."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from lightning_reg import (
    EWC,
    ELRCallback,
    FeatureDistillation,
    L2ToStart,
    LossReweighting,
    NMSparsity,
    PredictionDistillation,
    SoupAverager,
    VirtualOutliers,
)
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import (
    boundary_points,
    elr_regularizer,
    elr_targets,
    energy,
    energy_hinge_loss,
    nm_mask,
    reweight,
    synthesize_outliers,
)
from tests.compositions.shared import Net, data, train
from tests.toys import QUIET

pytestmark = QUIET


def fisher_by_hand(net):
    """In float64, from batches of one, at the label that is most probable."""
    net = copy.deepcopy(net).double()
    fisher = [torch.zeros_like(p) for p in net.parameters()]
    for x, _ in data():
        z = net(x[None].double())
        gradients = torch.autograd.grad(F.cross_entropy(z, z.argmax(1)), list(net.parameters()))
        fisher = [f + g**2 / len(data()) for f, g in zip(fisher, gradients, strict=True)]
    return [f.float() for f in fisher]


def train_task(net, loss, gradients=lambda net: [0.0] * 6, sparse=False):
    """A task: the weight in the middle is masked in forward and backward if ``sparse``, and for good at the end."""
    middle = net.net[2].weight
    for _ in range(2):
        for start in range(0, 24, 8):
            x, y = (t[start : start + 8] for t in data().tensors)
            dense = middle.detach().clone()
            if sparse:
                middle.data.mul_(nm_mask(dense, 1, 4))
            found = torch.autograd.grad(loss(net, x, y, start), list(net.parameters()))
            middle.data.copy_(dense)
            with torch.no_grad():
                for p, g, more in zip(net.parameters(), found, gradients(net), strict=True):
                    p.sub_(0.2 * (g + more))
    if sparse:
        middle.data.mul_(nm_mask(middle.detach(), 1, 4))


def cross_entropy(net, x, y, start):
    return F.cross_entropy(net(x), y)


@pytest.mark.filterwarnings("ignore:EWC.weight=300")  # 12 steps do not go far
@pytest.mark.by_hand("EWC", "NMSparsity")
@pytest.mark.parametrize("first", [True, False], ids=["EWC first", "sparsity first"])
def test_ewc_ties_dense_weights_to_dense_anchors(first):
    techniques = [EWC(300.0), NMSparsity(1, 4, recipe="ste", dense_fraction=0.0)]
    module, hand = Net(), Net()
    for _ in range(2):
        train(*(techniques if first else techniques[::-1]), module=module)
    train_task(hand, cross_entropy, sparse=True)
    anchors, fisher = [p.detach().clone() for p in hand.parameters()], fisher_by_hand(hand)

    def pull(net):
        return [600.0 * f * (p - a) for p, a, f in zip(net.parameters(), anchors, fisher, strict=True)]

    plain = copy.deepcopy(hand)
    train_task(hand, cross_entropy, pull, sparse=True)
    train_task(plain, cross_entropy, sparse=True)
    for one, two in zip(module.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=2e-6, rtol=1e-5)  # float32, 12 steps
    assert not torch.allclose(plain.net[2].weight, hand.net[2].weight, atol=1e-3)


@pytest.mark.by_hand("EWC", "SoupAverager")
@pytest.mark.parametrize("first", [True, False], ids=["EWC first", "average first"])
def test_ewc_ties_to_the_average_that_the_fit_ends_with(first):
    techniques = [EWC(3.0), SoupAverager(method="uniform")]
    module = train(*(techniques if first else techniques[::-1]))
    (slot,) = techniques[0].state_dict()["slots"]
    for (name, p), fisher in zip(module.named_parameters(), fisher_by_hand(module), strict=True):
        assert torch.equal(slot["anchors"][name], p)
        torch.testing.assert_close(slot["weights"][name], fisher, rtol=1e-4, atol=1e-9)  # float32


def one_vs_all(net, teacher, x):
    """Losses of a task without new classes: the teacher's word alone."""
    with torch.no_grad():
        t = teacher(x).sigmoid()
    return F.binary_cross_entropy_with_logits(net(x), t, reduction="none").sum(1)


def after_a_task(techniques):
    """A module after one task with half its weights, the network that it was, and a copy to train by hand."""
    module = train(*techniques)
    teacher, hand = copy.deepcopy(module), copy.deepcopy(module)
    with torch.no_grad():
        for p in (*module.parameters(), *hand.parameters()):
            p.mul_(0.5)
    return module, teacher, hand


@pytest.mark.by_hand("LossReweighting", "PredictionDistillation")
@pytest.mark.parametrize("first", [True, False], ids=["reweighting first", "distillation first"])
def test_reweighting_reads_the_losses_that_distillation_has_put_in(first):
    techniques = [LossReweighting(warmup_steps=0), PredictionDistillation(new_classes=[3, 0])]
    techniques = techniques if first else techniques[::-1]
    module, teacher, hand = after_a_task(techniques)
    train(*techniques, module=module)

    def loss(net, x, y, start):
        losses = one_vs_all(net, teacher, x)
        return (reweight(losses.detach()) * losses).sum()

    train_task(hand, loss)
    for one, two in zip(module.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)  # float32, 6 steps


@pytest.mark.by_hand("ELRCallback", "PredictionDistillation")
@pytest.mark.parametrize("first", [True, False], ids=["early learning first", "distillation first"])
def test_early_learning_regularization_joins_distillation(first):
    techniques = [ELRCallback(lam=2.0, beta=0.6), PredictionDistillation(new_classes=[3, 0])]
    techniques = techniques if first else techniques[::-1]
    module, teacher, hand = after_a_task(techniques)
    train(*techniques, module=module)
    targets = torch.zeros(24, 3)

    def loss(net, x, y, start):
        z = net(x)
        rows = elr_targets(targets[start : start + 8], z.softmax(1).clamp(1e-4, 1 - 1e-4), 0.6)
        targets[start : start + 8] = rows
        return one_vs_all(net, teacher, x).mean() + 2.0 * elr_regularizer(z, rows)

    train_task(hand, loss)
    for one, two in zip(module.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)  # float32, 6 steps


@pytest.mark.parametrize(
    "tie", [EWC(1.0), L2ToStart(anchor="end_of_task"), FeatureDistillation("net.3")], ids=lambda tie: type(tie).__name__
)
def test_channels_are_put_in_another_order_in_the_first_task_only(tie):
    tie, module = copy.deepcopy(tie), Net()
    permuting = NMSparsity(1, 4, recipe="ste", dense_fraction=0.0, permute=True)
    train(tie, permuting, module=module)
    with pytest.raises(MisconfigurationException, match="NMSparsity puts channels in another order"):
        train(tie, permuting, module=module)
    train(tie, NMSparsity(1, 4, recipe="ste", dense_fraction=0.0), module=module)
    for other in (L2ToStart(), PredictionDistillation(new_classes=[3, 0])):  # they hold nothing of that kind
        again = Net()
        for _ in range(2):
            train(other, permuting, module=again)


def train_with_outliers(net, outliers, loss, pull=lambda p: 0.0):
    """A task by hand: an epoch of all weights, and one of the head on the data and outliers; ``pull`` is of each."""
    x, y = data().tensors
    names = [name for name, _ in net.named_parameters()]
    for step in range(6):
        rows, head = slice(8 * (step % 3), 8 * (step % 3) + 8), step > 2
        value = loss(net, x[rows], y[rows])
        if step == 3:
            features = net.net[:4](x).detach()
            border = boundary_points(features, 4, 3)
            draws = outliers.generator(SimpleNamespace(batches_so_far=4, stream=""), same_on_ranks=True)
            noise = torch.randn(4, 5, 16, generator=draws)
            made = synthesize_outliers(features, border, noise, 12, sigma=0.5, k=3).split(4)
        if head:
            energies = energy(net(x[rows])), energy(net.net[4](made[step - 3]))
            value = value + 0.5 * energy_hinge_loss(*energies, -3.0, -1.0)
        found = torch.autograd.grad(value, list(net.parameters()))
        with torch.no_grad():
            for name, p, g in zip(names, net.parameters(), found, strict=True):
                if not head or name.startswith("net.4"):
                    p.sub_(0.2 * (g + pull(name)))


def one_vs_all_of_labels(net, x, y):
    return F.binary_cross_entropy_with_logits(net(x), F.one_hot(y, 3).float(), reduction="none").sum(1).mean()


class PullsByHand:
    """What ties weights to those of tasks before, and the loss of the next task."""

    def __init__(self, net):
        self.net, self.terms, self.loss = net, [], lambda net, x, y: F.cross_entropy(net(x), y)

    def __call__(self, name):
        now = dict(self.net.named_parameters())[name]
        return sum((factor[name] * (now - anchors[name]) for factor, anchors in self.terms), torch.zeros_like(now))

    def after_task(self):
        """A task is over."""


class ToStart(PullsByHand):
    technique = L2ToStart(0.3, anchor="end_of_task")

    def after_task(self):
        kept = {name: p.detach().clone() for name, p in self.net.named_parameters()}
        self.terms = [({name: torch.full_like(p, 2 * 0.3) for name, p in kept.items()}, kept)]


class ByFisher(PullsByHand):
    technique = EWC(3.0)

    def after_task(self):
        kept = {name: p.detach().clone() for name, p in self.net.named_parameters()}
        fisher = dict(zip(kept, fisher_by_hand(self.net), strict=True))
        self.terms.append(({name: 6.0 * f for name, f in fisher.items()}, kept))


class ByOutputs(PullsByHand):
    technique = PredictionDistillation(new_classes=[3, 0, 0])

    def __init__(self, net):
        super().__init__(net)
        self.loss = one_vs_all_of_labels

    def after_task(self):
        teacher = copy.deepcopy(self.net)
        self.loss = lambda net, x, y: one_vs_all(net, teacher, x).mean()


@pytest.mark.by_hand("L2ToStart", "VirtualOutliers")
@pytest.mark.by_hand("EWC", "VirtualOutliers")
@pytest.mark.by_hand("PredictionDistillation", "VirtualOutliers")
@pytest.mark.parametrize("first", [True, False], ids=["outliers first", "tie first"])
@pytest.mark.parametrize("tie", [ToStart, ByFisher, ByOutputs])
def test_outliers_of_three_tasks_beside_what_remembers_them(tie, first):
    outliers = VirtualOutliers("net.4", 1, 0.5, -3.0, -1.0, 0.5, k=3, select=4, sample_from=5, per_class=4)
    techniques = [outliers, copy.deepcopy(tie.technique)]
    module, hand, without = Net(), Net(), Net()
    by_hand, alone = tie(hand), PullsByHand(without)
    for _ in range(3):
        train(*(techniques if first else techniques[::-1]), module=module)
        train_with_outliers(hand, outliers, by_hand.loss, by_hand)
        by_hand.after_task()
        train_with_outliers(without, outliers, alone.loss, alone)
    assert [technique.tasks for technique in techniques] == [3, 3]
    for one, two in zip(module.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=5e-6, rtol=1e-5)  # float32, 18 steps
    assert not torch.allclose(hand.net[4].weight, without.net[4].weight, atol=1e-3)
