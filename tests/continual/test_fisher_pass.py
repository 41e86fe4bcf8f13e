"""The pass over the training data that EWC makes: on networks where samples meet, on regressions, on losses by hand."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import EWC, L2ToStart, LossMixin
from lightning_reg.engine.host.autograd import rows_of_output
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import fisher_diagonal, fisher_losses
from tests.toys import CLASSES, INPUTS, QUIET, Classifier, fit, make_tensors

pytestmark = QUIET


def learn(module, ewc, size, batch_size, **options):
    fit(module, ewc, loader=DataLoader(TensorDataset(*make_tensors(size)), batch_size), max_epochs=1, **options)
    return ewc.state_dict()["slots"][0]["weights"]


def by_hand(module, batches, losses):
    """Squared gradients of each sample's loss in its batch, in float64."""
    net = copy.deepcopy(module).double().eval()
    sums, count = {n: torch.zeros_like(p) for n, p in net.named_parameters()}, 0
    for batch in batches:
        for i in range(len(batch[0])):
            net.zero_grad()
            losses(net, batch)[i].backward()
            count += 1
            for n, p in net.named_parameters():
                sums[n] += p.grad**2
    return {n: s.float() / count for n, s in sums.items()}


def assert_close(kept, expected):
    for n, one in kept.items():
        torch.testing.assert_close(one, expected[n], rtol=2e-4, atol=1e-7)  # float32


def cut(x, y, size):
    return [(x[i : i + size].double(), y[i : i + size]) for i in range(0, len(x), size)]


def with_norm(**options):
    module = Classifier(lr=0.05)
    module.net.insert(1, nn.BatchNorm1d(8, **options))
    return module


def at_true_labels(net, batch):
    return F.cross_entropy(net(batch[0]), batch[1], reduction="none")


@pytest.mark.parametrize("size", [13, 9, 5, 3, 2])
def test_parts_of_a_batch_are_of_two_samples_at_least(size):
    """Batch norm over a batch of one is refused by torch, with the statistics of a batch even in eval mode."""
    seen = []

    class Noted(Classifier):
        def training_step(self, batch, batch_idx):
            if not self.training:
                seen.append(len(batch[0]))
            return super().training_step(batch, batch_idx)

    module = Noted(lr=0.05)
    kept = learn(module, EWC(labels="true"), size, size)
    in_the_pass = seen[2 if size > 2 else 1 :]
    assert sum(in_the_pass) == size
    assert 2 <= min(in_the_pass) <= max(in_the_pass) <= (4 if size > 2 else 2)
    expected = by_hand(module, cut(*make_tensors(size), size), at_true_labels)
    for name in ("net.3.weight", "net.3.bias"):  # a few samples are not of all classes
        expected[name][torch.bincount(make_tensors(size)[1], minlength=CLASSES) == 0] = 0.0
    assert_close(kept, expected)


@pytest.mark.parametrize("batch_size", [15, 16, 17])
def test_samples_that_meet_in_batch_norm_stay_in_their_batch(batch_size):
    module = with_norm(track_running_stats=False)
    kept = learn(module, EWC(labels="true"), 45, batch_size)
    assert_close(kept, by_hand(module, cut(*make_tensors(45), batch_size), at_true_labels))


def test_batch_norm_with_running_statistics_goes_by_samples():
    module = with_norm()
    kept = learn(module, EWC(labels="true"), 44, 11)
    assert_close(kept, by_hand(module, cut(*make_tensors(44), 44), at_true_labels))


@pytest.mark.parametrize("labels", ["argmax", "true"])
def test_a_batch_with_a_part_that_cannot_be_cut(labels):
    """Graphs: the nodes of all of them in one tensor, a label for each."""
    generator = torch.Generator().manual_seed(0)
    nodes = torch.tensor([1, 3, 2, 5, 1, 2, 4, 3])
    owner = torch.arange(8).repeat_interleave(nodes)
    graphs = {"x": torch.rand(len(owner), INPUTS, generator=generator), "owner": owner, "y": torch.arange(8) % CLASSES}
    graphs |= {"nodes": nodes, "charges": torch.zeros(8)}

    def logits(net, batch):
        sums = torch.zeros(8, INPUTS, dtype=batch["x"].dtype).index_add(0, batch["owner"], batch["x"])
        return net(sums)

    module = Classifier(step=lambda module, batch: F.cross_entropy(logits(module, batch), batch["y"]), lr=0.05)
    ewc = EWC(labels=labels)
    fit(module, ewc, loader=DataLoader([graphs], batch_size=None), max_epochs=1)

    def losses(net, batch):
        z = logits(net, {**graphs, "x": graphs["x"].double()})
        return F.cross_entropy(z, z.argmax(1) if labels == "argmax" else graphs["y"], reduction="none")

    assert_close(ewc.state_dict()["slots"][0]["weights"], by_hand(module, [(range(8),)], losses))


# -- what cannot work is told in the first step -----------------------------------------------------------------------


def steps_before(module, sentence, **arguments):
    with pytest.raises(MisconfigurationException, match=sentence):
        learn(module, EWC(**arguments), 24, 8)
    return module.trainer.global_step


@pytest.mark.parametrize("after_a_layer", [True, False])  # torch refuses the one, and gives no gradients of the other
@pytest.mark.parametrize("per_sample", [True, False])
def test_reentrant_checkpoints_are_refused_in_the_first_step(per_sample, after_a_layer):
    def step(module, batch, reentrant):
        first = module.net[0](batch[0]) if after_a_layer else batch[0].clone().requires_grad_()
        hidden = checkpoint(module.net[1 if after_a_layer else 0 :], first, use_reentrant=reentrant)
        return F.cross_entropy(hidden, batch[1])

    sentence = r"^EWC: gradients of single samples.*`use_reentrant=False`\.$"
    assert steps_before(Classifier(step=partial(step, reentrant=True)), sentence, per_sample=per_sample) == 0
    module = Classifier(step=partial(step, reentrant=False), lr=0.05)
    kept = learn(module, EWC(labels="true"), 24, 8)
    assert_close(kept, by_hand(module, cut(*make_tensors(24), 8), at_true_labels))


def test_a_loss_by_hand_is_refused_in_the_first_step_with_the_reason():
    def step(module, batch):
        return -module(batch[0]).log_softmax(1).gather(1, batch[1][:, None]).mean()

    sentence = r"^EWC: `training_step` at toys.py:\d+ returned a loss, but none of (?s:.*)reduce_loss"
    assert steps_before(Classifier(step=step), sentence) == 0

    class HandsOver(LossMixin, Classifier):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

    assert steps_before(HandsOver(), r"^EWC: the module inherits LossMixin but .* did not call") == 0


def test_a_network_without_a_loss_in_eval_mode_is_refused_in_the_first_step():
    def step(module, batch):
        made = {"a": F.cross_entropy(module(batch[0]), batch[1])} if module.training else [0]
        return sum(made.values())

    sentence = r"^EWC runs `training_step` on a copy .* in eval mode, where it raises AttributeError: 'list'.*detector"
    assert steps_before(Classifier(step=step), sentence) == 0


# -- regressions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("function", [F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss])
def test_a_regression_at_its_targets(function, swapped):
    def step(module, batch):
        pair = module(batch[0]), batch[0][:, :CLASSES]
        return function(*(pair[::-1] if swapped else pair))

    module = Classifier(step=step, lr=0.05)
    kept = learn(module, EWC(labels="true"), 24, 8)

    def losses(net, batch):
        return 0.5 * ((net(batch[0]) - batch[0][:, :CLASSES]) ** 2).sum(1)

    assert_close(kept, by_hand(module, cut(*make_tensors(24), 8), losses))


def test_a_regression_at_drawn_targets_has_the_fisher_information_of_a_gaussian():
    x = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w, generator = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True), torch.Generator().manual_seed(1)
    draws = (fisher_losses(x @ w, None, "sample", generator, "numbers") for _ in range(2000))
    (fisher,) = fisher_diagonal([w], draws)
    closed = (x**2).mean(0)[:, None].expand(3, 2)  # E over y of (y - mu)^2 x^2, the variance is 1
    torch.testing.assert_close(fisher, closed, rtol=0.03, atol=0.0)  # 80,000 draws
    with pytest.raises(ValueError, match="`which` must be 'sample' or 'true' for numbers"):
        fisher_losses(x @ w, None, "argmax", outputs="numbers")
    module = Classifier(step=lambda module, batch: F.mse_loss(module(batch[0]), batch[0][:, :CLASSES]), lr=0.0)
    kept = learn(module, EWC(labels="sample"), 24, 8)
    assert all(value.max() > 0 for value in kept.values())


def test_a_regression_of_other_shapes_is_refused():
    def step(module, batch):
        return F.mse_loss(module(batch[0])[:, :1], batch[1][:1].float()[None])

    with pytest.warns(UserWarning, match="target size"):
        assert steps_before(Classifier(step=step), r"^EWC: F.mse_loss.* of different shapes", labels="true") == 0


# -- classes to come --------------------------------------------------------------------------------------------------


class Shaped(Classifier):
    """Five outputs from the start on, of which the tasks have the first three."""

    def __init__(self, shape="linear", **options):
        super().__init__(lr=0.05, **options)
        head = nn.Conv1d(8, 5, 1) if shape == "convolution" else nn.Linear(8, 5, bias=shape != "no bias")
        self.net[3] = nn.utils.parametrizations.weight_norm(head) if shape == "not found" else head
        self.shape = shape

    def logits(self, x):
        hidden = self.net[:3](x)
        if self.shape == "convolution":
            return self.net[3](hidden[:, :, None])[:, :, 0]
        return self.net[3](hidden) / (0.5 if self.shape == "scaled" else 1.0)

    def training_step(self, batch, batch_idx):
        x, y = batch
        z = self.logits(x)
        return F.nll_loss(z.log_softmax(1), y) if self.shape == "nll" else F.cross_entropy(z, y)


@pytest.mark.parametrize("memory", ["separate", "online"])
@pytest.mark.parametrize("shape", ["linear", "no bias", "scaled", "nll", "convolution"])
def test_rows_of_classes_to_come_are_free(shape, memory):
    ewc, module, first = EWC(4.0, memory=memory), Shaped(shape), {}
    x, y = make_tensors(24)
    rows = [(0, 1), (2,)]
    for number, classes in enumerate(rows):
        chosen = torch.isin(y, torch.tensor(classes))
        data = TensorDataset(x[chosen], y[chosen])
        fit(module, ewc, loader=DataLoader(data, 8), max_epochs=1)
        net = copy.deepcopy(module)
        z = net.logits(x[chosen])
        each = F.cross_entropy(z, z.argmax(1), reduction="none")
        plain = fisher_diagonal(list(net.parameters()), [each])
        slot = ewc.state_dict()["slots"][-1]["weights"]
        free = torch.arange(5) >= (2 if number == 0 else 3)
        assert torch.equal(ewc.state_dict()["seen"], ~free)
        for (name, p), whole in zip(net.named_parameters(), plain, strict=True):
            wanted = whole.clone()
            if name.startswith("net.3"):
                assert p.shape[0] == 5
                assert (wanted[free] > 0).any()
                wanted[free] = 0.0
            if memory == "online" and number:
                wanted += first[name]
            torch.testing.assert_close(slot[name], wanted, rtol=1e-4, atol=1e-7)  # float32, other parts
        first = {name: value.clone() for name, value in slot.items()}
        assert f"free: the head's rows of {3 - number} of 5 classes" in ewc.describe()


def test_a_head_that_is_not_found_is_said():
    ewc = EWC(1.0)
    with pytest.warns(UserWarning, match=r"EWC: 2 of 5 classes were no target so far, and the layer .* not found"):
        fit(Shaped("not found"), ewc, loader=DataLoader(TensorDataset(*make_tensors(24)), 8), max_epochs=1)
    excluded = EWC(exclude=["net.3.*"])
    fit(
        Shaped("not found"), excluded, loader=DataLoader(TensorDataset(*make_tensors(24)), 8), max_epochs=1
    )  # says nothing


def test_a_square_matrix_that_is_multiplied_as_it_is_has_no_rows_of_classes():
    x, square = torch.randn(2, 5), torch.zeros(5, 5, requires_grad=True)
    assert rows_of_output(x @ square, 5) == []
    assert rows_of_output(x @ square.T, 5)[0] is square
    assert rows_of_output(x, 5) == []
    sums = [
        torch.zeros(5, requires_grad=True),
        torch.zeros(5, 4, requires_grad=True),
        torch.zeros(6, requires_grad=True),
    ]
    both = rows_of_output(2 * (x @ square.T) + x[:, :4] @ sums[1].T + sums[0] + sums[2].sum(), 5)
    assert {id(p) for p in both} == {id(p) for p in (square, *sums[:2])}


def test_the_table_says_what_l2_leaves_free():
    assert "free: nothing, not classes to come" in L2ToStart().describe()
    assert L2ToStart(exclude=["head.*", "norm.*"]).describe().endswith("; free: head.*, norm.*")


# -- several labels, variances, counts --------------------------------------------------------------------------------


def targets_of(x):
    return (x[:, :CLASSES] * 4).floor()


def spread(net, x, shape=None):
    values = 0.2 + net(x).square()[:, : 1 if shape == "one for all" else CLASSES]
    return values[:, 0] if shape == "one for all" else values


NEW_LOSSES = {
    "several": (
        lambda net, x: F.binary_cross_entropy_with_logits(net(x), (targets_of(x) > 1).to(x.dtype)),
        lambda z, x: z.exp().add(1).log() - (targets_of(x) > 1) * z,
    ),
    "a label each": (
        lambda net, x: F.binary_cross_entropy_with_logits(net(x)[:, 0], (targets_of(x)[:, 0] > 1).to(x.dtype)),
        lambda z, x: (z.exp().add(1).log() - (targets_of(x) > 1) * z)[:, :1],
    ),
    "counts": (
        lambda net, x: F.poisson_nll_loss(net(x), targets_of(x)),
        lambda z, x: z.exp() - targets_of(x) * z,
    ),
    "counts by their rates": (
        lambda net, x: F.poisson_nll_loss(net(x).exp(), targets_of(x), log_input=False, eps=1e-3),
        lambda z, x: z.exp() - targets_of(x) * (z.exp() + 1e-3).log(),
    ),
    "variances": (
        lambda net, x: F.gaussian_nll_loss(net(x), targets_of(x), spread(net, x)),
        lambda z, x: 0.5 * ((0.2 + z**2).log() + (z - targets_of(x)) ** 2 / (0.2 + z**2)),
    ),
    "one variance for all": (
        lambda net, x: F.gaussian_nll_loss(net(x), targets_of(x), spread(net, x, "one for all")),
        lambda z, x: 0.5 * ((0.2 + z[:, :1] ** 2).log() + (z - targets_of(x)) ** 2 / (0.2 + z[:, :1] ** 2)),
    ),
    "a number as variance": (
        lambda net, x: F.gaussian_nll_loss(net(x), targets_of(x), 0.25),
        lambda z, x: 2.0 * (z - targets_of(x)) ** 2,
    ),
    "variances that are bounded": (
        lambda net, x: F.gaussian_nll_loss(net(x), targets_of(x), 0.1 * spread(net, x), eps=0.5),
        # The values are 0.5 (all are below), their gradients go on.
        lambda z, x: (
            0.5 * ((z - targets_of(x)) ** 2 / 0.5 + (1 / 0.5 - (z - targets_of(x)).detach() ** 2 / 0.25) * z**2 / 10)
        ),
    ),
}


@pytest.mark.parametrize("name", NEW_LOSSES)
def test_the_empirical_fisher_of_other_losses(name):
    called, each = NEW_LOSSES[name]
    module = Classifier(step=lambda module, batch: called(module.net, batch[0]), lr=0.01)
    kept = learn(module, EWC(labels="true"), 24, 8)
    batches = cut(*make_tensors(24), 8)
    assert_close(kept, by_hand(module, batches, lambda net, batch: each(net(batch[0]), batch[0]).sum(1)))


@pytest.mark.parametrize("name", NEW_LOSSES)
def test_the_fisher_of_other_losses_at_drawn_or_probable_labels(name):
    called, _ = NEW_LOSSES[name]
    module = Classifier(step=lambda module, batch: called(module.net, batch[0]), lr=0.01)
    kept = learn(module, EWC(labels="sample"), 24, 8)
    assert all(value.isfinite().all() and value.max() > 0 for value in kept.values())
    if name not in ("several", "a label each"):
        assert steps_before(module, r"^EWC: F\.(poisson|gaussian)_nll_loss.* is a regression.*labels=\"sample\"") == 0
        return
    kept, outputs = learn(module, EWC(), 24, 8), slice(0, None if name == "several" else 1)

    def losses(net, batch):
        z = net(batch[0])[:, outputs]
        return (z.exp().add(1).log() - (z > 0) * z).sum(1)

    assert_close(kept, by_hand(module, cut(*make_tensors(24), 8), losses))


@pytest.mark.parametrize("outputs", ["several", "counts", "numbers"])
def test_drawn_labels_have_the_fisher_information_of_their_distribution(outputs):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, dtype=torch.float64, generator=generator)
    w = (0.3 * torch.randn(3, 2, dtype=torch.float64, generator=generator)).requires_grad_()
    v = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    spreads = v.expand(40, 2) if outputs == "numbers" else None
    draws = (fisher_losses(x @ w, None, "sample", generator, outputs, spreads) for _ in range(2000))
    fisher = fisher_diagonal([w, v], draws)
    z = (x @ w).detach()
    factor = {"several": z.sigmoid() * (1 - z.sigmoid()), "counts": z.exp(), "numbers": (1 / v).detach().expand(40, 2)}
    closed = (x[:, :, None] ** 2 * factor[outputs][:, None, :]).mean(0)
    torch.testing.assert_close(fisher[0], closed, rtol=0.05, atol=0.0)  # 80,000 draws
    if outputs == "numbers":
        torch.testing.assert_close(fisher[1], (0.5 / v**2).detach(), rtol=0.05, atol=0.0)
