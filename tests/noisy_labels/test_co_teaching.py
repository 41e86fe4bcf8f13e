"""Co-teaching: what each network is taught, by whom, with which rate; with nested dropout, and after it."""

import copy
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import CoTeaching, ELRPlusCallback, NestedDropout, NMSparsity
from lightning_reg.engine.data.order import Reordered
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.networks.first_weights import reset_parameters_
from lightning_reg.engine.run.composition import conflict_between
from lightning_reg.functional import (
    estimated_forget_rate,
    forget_rate_at,
    keep_prefix,
    small_loss_mask,
    small_loss_weights,
)
from tests.conformance.by_hand import LEARNING_RATE, MOMENTUM, Hand, Moment
from tests.conformance.case import Case
from tests.conformance.problems import make_loader as make_loader_of
from tests.toys import (
    CLASSES,
    INPUTS,
    QUIET,
    SAMPLES,
    TWO_RANKS,
    Callback,
    Classifier,
    fit,
    make_loader,
    make_tensors,
    make_trainer,
)

pytestmark = QUIET


@dataclass
class PeerMoment(Moment):
    """A step of the second network."""

    def draws(self, technique, stream=" peer"):
        return super().draws(technique, stream)


def smallest(losses, rate):
    """1 for the picked samples and 0 for others, times n / kept; in plain Python."""
    kept = max(1, int((1 - rate) * len(losses) + 1e-9))
    order = sorted(range(len(losses)), key=lambda i: (losses[i], i))[:kept]
    return torch.tensor([len(losses) / kept if i in order else 0.0 for i in range(len(losses))])


class TaughtByHand(Hand):
    """The first network is taught what the second picks; the second trains after each epoch, by the first's picks."""

    def begin(self, loop):
        net = copy.deepcopy(loop.net)
        reset_parameters_(net, self.technique.derived_seed("weights"))
        self.second = {f"net.{name}": p.detach().requires_grad_() for name, p in net.named_parameters()}
        self.optimizer = torch.optim.SGD(list(self.second.values()), LEARNING_RATE, MOMENTUM)
        self.order = Reordered(make_loader_of(loop.problem, 4, len(loop.x), None), self.technique)
        self.count = 0

    def picks(self, loop, weights, x, y):
        """Of layers that nested dropout cuts the first features."""
        cutting = [hand for hand in loop.hands if getattr(hand.technique, "edits_second", False)]

        def edit(name, rows):
            for hand in cutting:
                rows = hand.edit_evaluation(name, rows)
            return rows

        with torch.no_grad():
            output = loop.read(loop.whole.run(weights, x, edit)[0])
            losses = [float(loop.part.loss(o[None], t[None])) for o, t in zip(output, y, strict=True)]
        return smallest(losses, self.technique.forget_rate)

    def observe(self, loop, moment):
        self.chosen = self.picks(loop, self.second, moment.x, moment.y)

    def weights(self, losses):
        return self.chosen

    def after_epoch(self, loop, epoch):
        cutting = [hand for hand in loop.hands if getattr(hand.technique, "edits_second", False)]
        for position, index in enumerate(self.order.draws(epoch)):
            self.count += 1
            x, y = loop.x[index], loop.y[index]
            moment = PeerMoment(x, y, torch.tensor(index), self.count)

            def given(name, rows, moment=moment):
                for hand in cutting:
                    rows = hand.edit_input(name, rows, moment)
                return rows

            torch.manual_seed(self.technique.derived_seed(f"batch 0 {epoch} {position}"))
            loop.net.train()
            output, _ = loop.whole.run(self.second, x, given=given)
            loop.net.eval()
            loss = 0
            for part in loop.parts.values():
                of, to = output[:, part.outputs], part.targets(y)
                if part is loop.part:
                    each = torch.stack([part.loss(o[None], t[None]) for o, t in zip(of, to, strict=True)])
                    loss = loss + (each * self.picks(loop, loop.constants(), x, to)).mean()
                else:
                    loss = loss + part.loss(of, to)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


ANEW = "a second network, initialized anew"
CASE = Case(
    make=partial(CoTeaching, 0.5, gradual_epochs=0),
    neutral=partial(CoTeaching, 0.0),
    by_hand=TaughtByHand,
    says=(
        f"forget_rate=0.5; {ANEW}",
        "forget_rate=0: inactive",
        f"forget rate estimated after 1 epoch; {ANEW}",
        "forget_rate=0.4, reached after 3 epochs; a second network, equal to the first at the start",
    ),
    variants=[
        partial(CoTeaching, gradual_epochs=1),
        partial(CoTeaching, 0.4, 3, exponent=2.0, peer_init="copy", index_key="2", num_samples=30, seed=3),
    ],
    invalid=[
        ({"forget_rate": -0.1}, "forget_rate"),
        ({"forget_rate": 1.0}, "forget_rate"),
        ({"gradual_epochs": -1}, "gradual_epochs"),
        ({"gradual_epochs": 0}, "gradual_epochs"),
        ({"exponent": 0.0}, "exponent"),
        ({"num_samples": 0}, "num_samples"),
        ({"index_key": "index"}, "num_samples"),
    ],
)

OURS = "lightning_reg.noisy_labels.co_teaching.co_teaching"


# -- the core ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "kept", "losses"),
    [
        (0.2, ([0, 1, 2, 3, 4, 5, 8, 9, 10], [1, 2, 3, 4, 6, 7, 8, 10, 11]), (2.319248676, 2.589710236)),
        (0.45, ([0, 2, 4, 8, 9, 10], [1, 2, 4, 6, 7, 11]), (1.940713406, 2.912098646)),
    ],
)
def test_picks_and_losses_are_those_of_the_authors_code(rate, kept, losses):
    # `SampleSelection` and `Classification` on the same tensors, yingyichen-cyy/Nested-Co-teaching 9a2fc40,
    # co_teaching_resnet/loss.py, with linear classifiers and without dropout.
    generator = torch.Generator().manual_seed(3)
    logits = [2 * torch.randn(12, 4, generator=generator) for _ in range(2)]
    labels = [torch.randint(4, (12,), generator=generator) for _ in range(2)]
    x, heads = (
        [torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        for shape, seeds in (((12, 5), (10, 11)), ((4, 5), (12, 13)))
    )
    picks = [F.cross_entropy(z, y, reduction="none") for z, y in zip(logits, labels, strict=True)]
    assert [small_loss_mask(each, rate).nonzero()[:, 0].tolist() for each in picks] == list(kept)
    for own, other in ((0, 1), (1, 0)):  # each is taught by what the other has picked, of the other's batch
        each = F.cross_entropy(x[other] @ heads[own].T, labels[other], reduction="none")
        value = (small_loss_weights(picks[other], rate) * each).mean()
        assert value.item() == pytest.approx(losses[own], abs=1e-6)


def test_a_number_of_samples_is_kept_whatever_their_losses_are():
    equal = torch.ones(10)
    assert small_loss_mask(equal, 0.8).tolist() == [True] * 2 + [False] * 8  # 0.2 of 10, in floating point below 2
    assert small_loss_mask(equal, 0.999).tolist() == [True] + [False] * 9
    assert small_loss_mask(equal, 0.0).all()
    assert small_loss_mask(torch.empty(0), 0.5).shape == (0,)
    assert small_loss_mask(torch.tensor([float("nan"), 5.0, float("inf"), 1.0]), 0.5).tolist() == [False, True] * 2
    assert small_loss_mask(torch.tensor([2.0, 1.0, 2.0, 1.0]), 0.25).tolist() == [True, True, False, True]


def test_samples_that_do_not_count_are_neither_kept_nor_part_of_the_number():
    losses = torch.tensor([0.0, 3.0, 0.0, 1.0, 2.0, 4.0])
    counted = torch.tensor([False, True, False, True, True, True])
    assert small_loss_mask(losses, 0.5, counted).tolist() == [False, False, False, True, True, False]
    assert not small_loss_mask(losses, 0.5, torch.zeros(6, dtype=torch.bool)).any()
    assert small_loss_weights(losses, 0.5, torch.zeros(6)).tolist() == [0.0] * 6
    mass = torch.tensor([0.0, 1.0, 0.0, 2.0, 0.5, 1.0])
    weights = small_loss_weights(losses, 0.5, mass)
    assert weights.tolist() == pytest.approx([0, 0, 0, 4.5 / 2.5, 4.5 / 2.5, 0])
    mean = (weights * mass * losses).sum() / mass.sum()
    assert mean.item() == pytest.approx((2 * 1.0 + 0.5 * 2.0) / 2.5)


def test_the_rate_grows_as_published():
    assert [forget_rate_at(t, 0.4, 4) for t in range(6)] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4])
    assert [forget_rate_at(t, 0.4, 8, 2.0) for t in range(4)] == pytest.approx([0, 0.05, 0.2, 0.4])
    assert forget_rate_at(0, 0.4, 0) == 0.4


def test_the_rate_is_estimated_from_two_groups_of_losses():
    generator = torch.Generator().manual_seed(0)
    for wrong in (200, 400, 600):
        low = 0.3 * torch.rand(1000 - wrong, generator=generator)
        losses = torch.cat([low, 3 + 0.5 * torch.randn(wrong, generator=generator)])
        assert estimated_forget_rate(losses) == pytest.approx(wrong / 1000, abs=0.05)
        spoiled = torch.cat([losses, torch.tensor([float("nan"), float("inf")])])
        assert estimated_forget_rate(spoiled) == estimated_forget_rate(losses)
    assert estimated_forget_rate(torch.ones(5)) == estimated_forget_rate(torch.ones(1)) == 0.0
    assert estimated_forget_rate(torch.cat([torch.zeros(1), torch.full((99,), 9.0)])) == 0.0
    assert estimated_forget_rate(torch.cat([torch.zeros(20), torch.full((80,), 9.0)])) == pytest.approx(0.8)


# -- in training ------------------------------------------------------------------------------------------------------


class Picks:
    """What the other network's losses were in each call, and the weights that came of them."""

    def __init__(self, monkeypatch):
        self.losses, self.weights = [], []
        monkeypatch.setattr(f"{OURS}.small_loss_weights", self)

    def __call__(self, losses, rate, mass=None):
        weights = small_loss_weights(losses, rate, mass)
        self.losses.append(losses.detach())
        self.weights.append(weights)
        return weights


def second_of(technique, module):
    """The second network as it is."""
    return technique.ensemble(module).second


def reset(technique, module):
    """The second network as it was when the training began."""
    again = copy.deepcopy(module)
    reset_parameters_(again, technique.derived_seed("weights"))
    return again


def test_each_network_is_taught_what_the_other_picks(monkeypatch):
    technique, module, picks = CoTeaching(0.5, gradual_epochs=0), Classifier(dropout=0.5), Picks(monkeypatch)
    other, (x, y) = reset(technique, Classifier()), make_tensors()
    before = copy.deepcopy(module.net)
    fit(module, technique, loader=make_loader(batch_size=SAMPLES), max_epochs=1)
    with torch.no_grad():  # no dropout: in eval mode
        first = F.cross_entropy(other.net(x), y, reduction="none")
        order = Reordered(make_loader(batch_size=SAMPLES), technique).draws(0)[0]
        second = F.cross_entropy(module.net.eval()(x[order]), y[order], reduction="none")
    torch.testing.assert_close(picks.losses, [first, second])
    assert [(weights > 0).sum() for weights in picks.weights] == [16, 16]
    assert not torch.equal(before[0].weight, module.net[0].weight)
    assert not torch.equal(second_of(technique, module).net[0].weight, other.net[0].weight)


def test_the_rate_of_an_epoch_is_logged_and_nothing_is_left_out_in_the_first(monkeypatch):
    technique, picks, rates = CoTeaching(0.4, gradual_epochs=2), Picks(monkeypatch), []

    class Rates(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            rates.append(trainer.callback_metrics["reg/co_teaching/forget_rate"].item())

    trainer = fit(Classifier(), technique, Rates(), max_epochs=3)
    assert rates[::4] == pytest.approx([0.0, 0.2, 0.4])
    assert len(picks.losses) == 2 * 2 * 4
    assert trainer.callback_metrics["reg/co_teaching/second_loss"].isfinite()


def noisy_data():
    x, y = make_tensors(64)
    wrong = torch.arange(64) % 4 == 0
    return TensorDataset(x, torch.where(wrong, (y + 1) % CLASSES, y)), wrong


def test_the_rate_is_estimated_once_after_its_epochs(tmp_path):
    technique, (data, _) = CoTeaching(gradual_epochs=2), noisy_data()
    trainer = fit(Classifier(), technique, loader=make_loader(data), max_epochs=1)
    assert technique.estimated_rate is None
    trainer = fit(Classifier(), technique, loader=make_loader(data), max_epochs=3)
    targets, labels = technique._targets_and_labels(None)
    assert labels.tolist() == data.tensors[1].tolist()
    assert targets.sum(1).tolist() == pytest.approx([1] * 64, abs=1e-5)
    assert 0 < technique.estimated_rate < 1
    assert trainer.callback_metrics["reg/co_teaching/forget_rate"].item() == pytest.approx(technique.estimated_rate)
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    again = CoTeaching(gradual_epochs=2)
    make_trainer(callbacks=[again], max_epochs=4).fit(Classifier(), make_loader(data), ckpt_path=tmp_path / "some.ckpt")
    assert again.estimated_rate == technique.estimated_rate


def test_wrong_labels_are_found():
    _, wrong = noisy_data()
    clean = torch.arange(64) // 3 % CLASSES
    x = 4 * F.one_hot(clean, INPUTS).float() + 0.3 * torch.randn(64, INPUTS, generator=torch.Generator().manual_seed(0))
    technique, data = CoTeaching(0.25, 2), TensorDataset(x, torch.where(wrong, (clean + 1) % CLASSES, clean))
    fit(Classifier(lr=0.1), technique, loader=make_loader(data, 16), max_epochs=6)
    assert torch.equal(technique.suspected_label_errors(), wrong)
    assert technique.pred_probs().argmax(1).tolist() == clean.tolist()
    assert technique.label_errors().suggested.tolist() == clean[technique.label_errors().index].tolist()


def test_ignored_labels_are_not_kept(monkeypatch):
    x, y = make_tensors()
    ignored = torch.arange(SAMPLES) % 4 == 0
    data, picks = TensorDataset(x, torch.where(ignored, -100, y)), Picks(monkeypatch)
    fit(Classifier(), CoTeaching(0.5, gradual_epochs=0), loader=make_loader(data, SAMPLES), max_epochs=1)
    assert not picks.weights[0][ignored].any()
    assert (picks.weights[0] > 0).sum() == 12
    assert picks.weights[0].max() == 2


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_without_a_loss_is_left_alone():
    module = Classifier(lambda module, batch: None)
    fit(module, CoTeaching(0.5, gradual_epochs=0))
    assert torch.equal(module.net[0].weight, Classifier().net[0].weight)


# -- with nested dropout ----------------------------------------------------------------------------------------------


def test_nested_dropout_cuts_both_networks_and_what_they_are_asked(monkeypatch):
    technique, nested = CoTeaching(0.5, gradual_epochs=0), NestedDropout("net.3", eta=1e-3, k=1)  # one feature always

    def step(module, batch):  # tanh: no unit is 0 for all samples
        return F.cross_entropy(module.net[3](module.net[0](batch[0]).tanh()), batch[1])

    other, (x, y) = reset(technique, Classifier()), make_tensors()
    module, picks = Classifier(step), Picks(monkeypatch)
    before = module.net[3].weight.detach().clone()
    fit(module, nested, technique, loader=make_loader(batch_size=SAMPLES), max_epochs=1)
    second = second_of(technique, module)
    for after, first in ((module.net[3].weight, before), (second.net[3].weight, other.net[3].weight)):
        assert torch.equal(after[:, 1:], first[:, 1:])
        assert not torch.equal(after[:, 0], first[:, 0])
    with torch.no_grad():
        logits = other.net[3](keep_prefix(other.net[0](x).tanh(), 1))
    torch.testing.assert_close(picks.losses[0], F.cross_entropy(logits, y, reduction="none"))


def test_networks_are_asked_by_the_features_that_were_chosen(monkeypatch):
    class Validated(Classifier):
        def validation_step(self, batch, batch_idx):
            self(batch[0])

    technique, nested, asked = CoTeaching(0.5, gradual_epochs=0), NestedDropout("net.3", eta=2), []
    original = NestedDropout._kept

    def kept(self, call, features):
        asked.append((call.step.stage, self.chosen_k, original(self, call, features)))
        return asked[-1][-1]

    monkeypatch.setattr(NestedDropout, "_kept", kept)
    trainer = make_trainer(callbacks=[technique, nested], num_sanity_val_steps=0)
    trainer.fit(Validated(), make_loader(), make_loader())
    picks = [(chosen, cut) for stage, chosen, cut in asked if stage == "predict"]
    assert len(picks) == 2 * 2 * 4  # networks, epochs, batches
    assert picks[:8] == [(None, None)] * 8
    assert all(chosen is not None and cut == chosen for chosen, cut in picks[8:])
    assert {cut for stage, _, cut in asked if stage == "validate"} == {None}


def test_two_stages_begin_with_two_trained_networks(tmp_path):
    one, two = Classifier(seed=1), Classifier(seed=2)
    for module in (one, two):
        fit(module, NestedDropout("net.3", eta=2, k="all"))
    files = [tmp_path / "two.pt", tmp_path / "two.ckpt"]
    torch.save(two.state_dict(), files[0])
    torch.save({"state_dict": two.state_dict()}, files[1])
    for file in files:
        technique, module = CoTeaching(0.2, gradual_epochs=0, second=str(file)), copy.deepcopy(one)
        module.lr = 0.0
        module.train()
        fit(module, NestedDropout("net.3", eta=2, k=3), technique)
        pair = technique.ensemble(module, {"net.3": 3})
        x = make_tensors()[0]
        each = [net.net[3](keep_prefix(net.net[:3](x), 3)) for net in (one.eval(), two.eval())]
        torch.testing.assert_close(pair(x), (each[0] + each[1]) / 2)
        assert f"a second network, from {file}" in technique.describe()
        whole = technique.ensemble(module)(x)
        torch.testing.assert_close(whole, (one(x) + two(x)) / 2)


def test_a_layer_of_both_networks_answers_for_them():
    technique, module = CoTeaching(0.2, logits_layer="net"), Classifier()
    fit(module, technique)
    second, x = CoTeaching(0.2), make_tensors()[0]
    second.load_state_dict(technique.state_dict())
    torch.testing.assert_close(technique.ensemble(module)(x), second.ensemble(module)(x))


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_files_that_are_no_second_network_are_refused(tmp_path):
    other, none = tmp_path / "other.pt", tmp_path / "none.pt"
    torch.save({"net.0.weight": torch.zeros(8, INPUTS)}, other)
    for file, sentence in (
        (none, "There is no file"),
        (other, r"the file has no net.0.bias, net.3.weight, net.3.bias. It must hold weights of Classifier"),
    ):
        with pytest.raises(MisconfigurationException, match=sentence):
            fit(Classifier(), CoTeaching(0.2, second=str(file)))


def test_what_cannot_stand_beside_it_is_refused():
    for other, sentence in (
        (ELRPlusCallback(mixup_alpha=0.0), "each trains a second network beside the module's"),
        (NMSparsity(), "NMSparsity changes the module's weights in each step, and the second network lacks that"),
    ):
        for pair in ((CoTeaching(), other), (other, CoTeaching())):
            assert sentence in conflict_between(*pair)
        assert conflict_between(CoTeaching(0.0), other) is None
    assert conflict_between(CoTeaching(), ELRPlusCallback(networks=1, mixup_alpha=0.0)) is None


def test_setups_that_cannot_hold_are_refused():
    module = Classifier()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="CoTeaching trains a second network as Lightning trains"):
        fit(module, CoTeaching(0.2))
    with pytest.raises(RuntimeError, match="CoTeaching: there is no second network"):
        CoTeaching().ensemble(Classifier())
    with pytest.raises(RuntimeError, match="no targets yet"):
        CoTeaching().label_errors()


# -- several processes, a network of the field ------------------------------------------------------------------------


def picked_on_rank():
    torch.manual_seed(0)
    seen = []

    class Seen(CoTeaching):
        def sample_weights(self, call):
            weights = super().sample_weights(call)
            seen.append((call.step.notes[self].losses, weights))
            return weights

    technique, module = Seen(0.5, gradual_epochs=0), Classifier()
    loader = DataLoader(TensorDataset(*make_tensors()), 4)
    make_trainer(callbacks=[technique], **TWO_RANKS).fit(module, loader)
    return seen, module.net[0].weight.detach(), second_of(technique, module).net[0].weight.detach()


def test_ranks_pick_together(two_processes):
    (one, *weights), (two, *others) = two_processes.run(picked_on_rank)
    shares = set()
    for (losses, kept), (more, also) in zip(one, two, strict=True):
        torch.testing.assert_close(torch.cat([kept, also]), small_loss_weights(torch.cat([losses, more]), 0.5))
        shares.add(int((kept > 0).sum()))
    assert len(shares) > 1  # not half of each rank's
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


@pytest.mark.filterwarnings("ignore:CoTeaching. the second network starts with the first one's values for net.vit")
def test_a_vision_transformer_beside_nested_dropout():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        num_channels=1, num_labels=CLASSES,
    )  # fmt: skip
    module = Classifier(lambda module, batch: F.cross_entropy(module.net(batch[0]).logits, batch[1]), lr=0.05)
    module.net = transformers.ViTForImageClassification(config)
    data = TensorDataset(torch.randn(16, 1, 8, 8), torch.randint(CLASSES, (16,)))
    technique, nested = CoTeaching(0.25, 1, logits_layer="net.vit"), NestedDropout("net.classifier", eta=4, k=4)
    fit(module, nested, technique, loader=make_loader(data))
    first, second = (dict(m.named_parameters()) for m in (module, second_of(technique, module)))
    assert first.keys() != second.keys()
