"""ELR+: two networks, averaged teachers, mixup."""

import copy
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import BackboneFinetuning
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import ELRPlusCallback, Mixup, NMSparsity
from lightning_reg.engine.data.blend import draw_lam, draw_permutation
from lightning_reg.engine.data.order import Reordered
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.networks.first_weights import reset_parameters_
from lightning_reg.functional import elr_plus_decay, elr_plus_loss, elr_plus_targets, refine_labels, sigmoid_rampup
from tests.conformance.by_hand import LEARNING_RATE, MOMENTUM, Hand
from tests.conformance.case import Case
from tests.conformance.problems import make_loader as make_loader_of


class TwoNetworksByHand(Hand):
    """The first network learns from the second one's average; the second trains after each epoch, on its own."""

    def begin(self, loop):
        net = copy.deepcopy(loop.net)
        reset_parameters_(net, self.technique.derived_seed("weights"))
        self.second = {f"net.{name}": p.detach().requires_grad_() for name, p in net.named_parameters()}
        self.optimizer = torch.optim.SGD(list(self.second.values()), LEARNING_RATE, MOMENTUM)
        self.averages = [loop.constants(), {name: w.detach().clone() for name, w in self.second.items()}]
        self.targets, self.steps = [torch.zeros(len(loop.x), 4) for _ in range(2)], [0, 0]
        self.order = Reordered(make_loader_of(loop.problem, 4, len(loop.x), None), self.technique)

    def update_average(self, number, now):
        self.steps[number] += 1
        share = 0.9 * math.exp(-5 * (1 - min(self.steps[number] + 1, 10) / 10) ** 2)
        old = self.averages[number]
        self.averages[number] = {name: share * old[name] + (1 - share) * w.detach() for name, w in now.items()}

    def update_targets(self, number, index, teacher_logits):
        table = self.targets[number]
        table[index] = 0.7 * table[index] + 0.3 * teacher_logits.detach().softmax(1)
        return table[index]

    def regularizer(self, q, probabilities):
        return 3.0 * (1 - (q * probabilities.clamp(1e-4, 1 - 1e-4)).sum(1)).log().mean()

    def observe(self, loop, moment):
        torch.set_rng_state(moment.random)  # dropout is that of the user's own step
        logits = loop.read(drop_out(loop.whole, self.averages[1], moment.x))
        self.q = self.update_targets(0, moment.index, logits)

    def term(self, loop, moment):
        return self.regularizer(self.q, moment.probabilities)

    def after_step(self, loop, moment):
        self.update_average(0, loop.constants())

    def after_epoch(self, loop, epoch):
        for position, index in enumerate(self.order.draws(epoch)):
            outputs = []
            for weights in (self.averages[0], self.second):
                torch.manual_seed(self.technique.derived_seed(f"batch 0 {epoch} {position}"))
                outputs.append(drop_out(loop.whole, weights, loop.x[index]))
            q = self.update_targets(1, index, loop.read(outputs[0]))
            loss = loop.problem.loss(outputs[1], loop.y[index])
            loss = loss + self.regularizer(q, loop.read(outputs[1]).softmax(1))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.update_average(1, self.second)


def drop_out(loop, weights, x):
    """The network in train mode."""
    loop.net.train()
    output, _ = loop.run(weights, x)
    loop.net.eval()
    return output


ANEW = "two networks, the second initialized anew, averages of decay"
CASE = Case(
    make=partial(ELRPlusCallback, mixup_alpha=0.0, decay=0.9, decay_rampup_steps=10),
    neutral=partial(ELRPlusCallback, lam=0.0, mixup_alpha=0.0),
    by_hand=TwoNetworksByHand,
    says=(
        f"lam=3, beta=0.7, no mixup; {ANEW} 0.9 from step 10 on; validates the network",
        "lam=0, mixup_alpha=0: inactive",
        f"lam=3, beta=0.7, mixup 1; {ANEW} 0.997; validates the network",
        f"lam=3, beta=0.7, mixup 1; {ANEW} 0.997 from step 40,000 on; validates the ensemble",
        "lam=3, beta=0.7, mixup 1; one network, no averages; validates the network",
        "lam=3, beta=0.7, mixup 1; two networks, equal at the start, averages of decay 0.997 from step 40,000 on;"
        " validates the network",
    ),
    variants=[
        partial(ELRPlusCallback, mixup_alpha=1.0, lam_rampup_steps=8, decay_rampup_steps=0),
        partial(ELRPlusCallback, refine=True, teacher="eval", validation="ensemble", logits_layer="net"),
        partial(ELRPlusCallback, networks=1, averaging=False, table_dtype="bfloat16", table_device="cpu"),
        partial(ELRPlusCallback, index_key="2", num_samples=30, num_classes=4, peer_init="copy", seed=3),
    ],
    invalid=[
        ({"lam": -0.1}, "lam"),
        ({"beta": -0.1}, "beta"),
        ({"beta": 1.0}, "beta"),
        ({"clamp": 0.0}, "clamp"),
        ({"clamp": 0.5}, "clamp"),
        ({"clamp": 1e-7}, "clamp"),
        ({"mixup_alpha": -1.0}, "mixup_alpha"),
        ({"decay": -0.1}, "decay"),
        ({"decay": 1.0}, "decay"),
        ({"lam_rampup_steps": -1}, "lam_rampup_steps"),
        ({"decay_rampup_steps": -1}, "decay_rampup_steps"),
        ({"num_samples": 0}, "num_samples"),
        ({"num_classes": 0}, "num_classes"),
        ({"networks": 3}, "networks"),
        ({"index_key": "index"}, "num_samples"),
    ],
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]
SIZE, BATCH, CLASSES = 22, 6, 3

# -- the loop by hand -------------------------------------------------------------------------------------------------


class Classifier(LightningModule):
    """What a user has; nothing in it knows of ELR+."""

    def __init__(self, **optimizer):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES))
        self.optimizer = {"lr": 0.2, "momentum": 0.9, "weight_decay": 1e-2, **optimizer}

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), **self.optimizer)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class Wide(Classifier):
    """For digits: no batch statistics, a constant learning rate."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)


def blobs(size=SIZE):
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(size, 6, generator=generator), torch.randint(3, (size,), generator=generator))


def make_loader(data=None, batch_size=BATCH):
    return DataLoader(data or blobs(), batch_size, shuffle=True, generator=torch.Generator().manual_seed(5))


def make_model(**optimizer):
    seed_everything(7, verbose=False)
    return Classifier(**optimizer)


def fit(elr_plus, model=None, loader=None, epochs=2, validate=False, ckpt_path=None, callbacks=(), **options):
    model = model or make_model()
    defaults = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    defaults |= {"enable_model_summary": False, "max_epochs": epochs}
    trainer = Trainer(callbacks=[elr_plus, *callbacks], **(defaults | options))
    val = DataLoader(blobs(), BATCH) if validate else None
    trainer.fit(model, loader or make_loader(), val, ckpt_path=ckpt_path)
    return trainer, model


def order_of_the_first(epochs):
    """Dataset indices of each batch of network 1, by epoch."""
    loader = make_loader(TensorDataset(torch.arange(SIZE)))
    return [[batch[0] for batch in loader] for _ in range(epochs)]


def hand_step(net, teacher, optimizer, table, index, generator, step, given):
    """One step of one network; ``step`` counts from 1."""
    x_all, y_all = blobs().tensors
    x, y = x_all[index], F.one_hot(y_all[index], CLASSES).float()
    share, partner = 1.0, torch.arange(len(x))
    if given["alpha"]:
        share = draw_lam(given["alpha"], generator)
        share, partner = max(share, 1 - share), draw_permutation(x, generator)
    with torch.no_grad():
        seen = teacher(x).softmax(1)
    t = table[index] = given["beta"] * table[index] + (1 - given["beta"]) * seen
    q = share * t + (1 - share) * t[partner]
    z = net(share * x + (1 - share) * x[partner])
    y = share * y + (1 - share) * y[partner]
    if given["refine"]:
        y = y * q / (y * q).sum(1, keepdim=True)
    p = z.softmax(1).clamp(1e-4, 1 - 1e-4)
    coef = given["coef"]
    strength = math.exp(-5 * (1 - min(step, coef) / coef) ** 2) if coef else 1.0
    regularizer = (1 - (q * p).sum(1)).log().mean()
    loss = -(y * z.log_softmax(1)).sum(1).mean() + strength * given["lam"] * regularizer
    optimizer.zero_grad()
    loss.backward()
    if given["clip"]:
        nn.utils.clip_grad_norm_(net.parameters(), given["clip"])
    optimizer.step()


def hand_average(average, net, step, gamma, ramp):
    a = gamma * math.exp(-5 * (1 - min(step + 1, ramp) / ramp) ** 2) if ramp else min(1 - 1 / (step + 1), gamma)
    with torch.no_grad():
        for old, new in zip(average.parameters(), net.parameters(), strict=True):
            old.copy_(a * old + (1 - a) * new)


def by_hand(elr_plus, *, gamma, ramp, two=True, epochs=2, **given):
    """Both networks in plain PyTorch; only random draws are the technique's own."""
    given = {"coef": 0, "refine": False, "clip": 0.0, **given}
    nets = [make_model(), make_model()][: 2 if two else 1]
    if two:
        reset_parameters_(nets[1], elr_plus.derived_seed("weights"))
    averages = [copy.deepcopy(net) for net in nets]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-2) for net in nets]
    tables, steps = [torch.zeros(SIZE, CLASSES) for _ in nets], [0, 0]
    second = Reordered(make_loader(), elr_plus)
    orders = [order_of_the_first(epochs), [[torch.tensor(d) for d in second.draws(e)] for e in range(epochs)]]
    for epoch in range(epochs):
        for k, net in enumerate(nets):
            for index in orders[k][epoch]:
                steps[k] += 1
                draws = elr_plus.generator(SimpleNamespace(batches_so_far=steps[k], stream=" peer" if k else ""))
                teacher = averages[(1 - k) % len(nets)]
                hand_step(net, teacher, optimizers[k], tables[k], index, draws, steps[k], given)
                hand_average(averages[k], net, steps[k], gamma, ramp)
            for group in optimizers[k].param_groups:
                group["lr"] *= 0.5
    return nets, averages, tables


VARIANTS = {
    "paper": ({}, {}, {}),
    "no ramp of the decay": ({"decay_rampup_steps": 0}, {"ramp": 0}, {}),
    "ramp of lambda": ({"lam_rampup_steps": 6}, {"coef": 6}, {}),
    "refined labels": ({"refine": True}, {"refine": True}, {}),
    "no averages": ({"averaging": False}, {"gamma": 0.0}, {}),
    "no mixup": ({"mixup_alpha": 0.0}, {"alpha": 0.0}, {}),
    "one network": ({"networks": 1}, {"two": False}, {}),
    "clipped": ({}, {"clip": 0.05}, {"gradient_clip_val": 0.05}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_networks_train_as_the_loop_by_hand_does(variant):
    arguments, settings, options = VARIANTS[variant]
    given = {"lam": 2.0, "beta": 0.6, "mixup_alpha": 2.0, "decay": 0.9, "decay_rampup_steps": 6, **arguments}
    elr_plus = ELRPlusCallback(**given)
    _, model = fit(elr_plus, **options)
    settings = {"lam": 2.0, "beta": 0.6, "alpha": 2.0, "gamma": 0.9, "ramp": 6, **settings}
    nets, averages, tables = by_hand(elr_plus, **settings)
    state = elr_plus.state_dict()["networks"]
    ours = [dict(model.named_parameters()), *([state["second"]["weights"]] if len(nets) == 2 else [])]
    for one, two in ((ours, nets), (state["averages"], averages)):
        assert len(one) == len(two) == len(nets)
        for weights, net in zip(one, two, strict=True):
            for name, p in net.named_parameters():  # float32, sums in another order, 8 steps
                torch.testing.assert_close(weights[name].detach(), p.detach(), atol=1e-5, rtol=1e-4)
    for table, expected in zip(elr_plus._tables, tables, strict=True):
        torch.testing.assert_close(table.all()[0], expected, atol=1e-5, rtol=1e-4)


# -- the functional core ----------------------------------------------------------------------------------------------


def test_ramps_are_those_of_the_authors_configurations():
    assert sigmoid_rampup(0, 40000) == pytest.approx(math.exp(-5))
    assert sigmoid_rampup(20000, 40000) == pytest.approx(math.exp(-1.25))
    assert sigmoid_rampup(40000, 40000) == sigmoid_rampup(90000, 40000) == sigmoid_rampup(1, 0) == 1.0
    assert elr_plus_decay(1, 0.997, 40000) == pytest.approx(0.0067, abs=5e-5)
    assert elr_plus_decay(19999, 0.997, 40000) == pytest.approx(0.997 * math.exp(-1.25))
    assert elr_plus_decay(39998, 0.997, 40000) < 0.997
    assert elr_plus_decay(39999, 0.997, 40000) == 0.997
    assert [elr_plus_decay(s, 0.9, 0) for s in (1, 3, 9, 99)] == pytest.approx([0.5, 0.75, 0.9, 0.9])
    assert elr_plus_decay(5, 0.0, 0) == elr_plus_decay(5, 0.0, 10) == 0.0


def test_targets_are_not_clamped():
    logits = torch.tensor([[60.0, 0.0, 0.0], [1.0, 2.0, 3.0]], dtype=torch.bfloat16)
    before = torch.tensor([[0.1, 0.2, 0.3], [0.0, 0.0, 0.0]])
    rows = elr_plus_targets(before, logits, beta=0.7)
    second = [0.3 * math.exp(v) / sum(math.exp(w) for w in (1, 2, 3)) for v in (1, 2, 3)]
    assert rows[0].tolist() == pytest.approx([0.07 + 0.3, 0.14, 0.21], abs=1e-7)
    assert rows[1].tolist() == pytest.approx(second, abs=1e-7)
    assert rows.dtype == torch.float32


@pytest.mark.parametrize("ramp", [1.0, 0.25])
def test_loss_against_loops_in_double_precision(ramp):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(4, 3, generator=generator)).requires_grad_()
    labels, targets = (torch.rand(4, 3, generator=generator).softmax(1) for _ in range(2))
    total = 0.0
    for z, y, q in zip(logits.tolist(), labels.tolist(), targets.tolist(), strict=True):
        softmax = [math.exp(v) / sum(math.exp(w) for w in z) for v in z]
        total -= sum(a * math.log(p) for a, p in zip(y, softmax, strict=True))
        clamped = [min(max(p, 1e-2), 1 - 1e-2) for p in softmax]
        total += ramp * 3.0 * math.log(1 - sum(a * p for a, p in zip(q, clamped, strict=True)))
    loss = elr_plus_loss(logits, labels, targets, lam=3.0, clamp=1e-2, ramp=ramp)
    assert loss.item() == pytest.approx(total / 4, rel=1e-5)
    plain = elr_plus_loss(logits, labels, targets, lam=0.0)
    assert torch.equal(plain, F.cross_entropy(logits, labels))


def test_refined_labels_are_weighted_by_the_targets():
    labels = torch.tensor([[0.75, 0.25, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    targets = torch.tensor([[0.1, 0.6, 0.3], [1e-30, 0.5, 0.5], [0.2, 0.3, 0.5]])
    expected = torch.tensor([[0.075 / 0.225, 0.15 / 0.225, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(refine_labels(labels, targets), expected, atol=1e-6, rtol=0)


# -- both networks at once --------------------------------------------------------------------------------------------


def second_weights(elr_plus):
    return elr_plus.state_dict()["networks"]["second"]["weights"]


def test_ensemble_is_the_mean_of_both_networks_from_the_callback_or_its_state():
    elr_plus = ELRPlusCallback()
    _, model = fit(elr_plus, epochs=1)
    x = blobs().tensors[0]
    first, second = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
    second.load_state_dict(second_weights(elr_plus))
    assert not torch.equal(first.net[0].weight, second.net[0].weight)
    expected = 0.5 * (first(x) + second(x))
    assert torch.equal(elr_plus.ensemble(model)(x), expected)
    restored = ELRPlusCallback(logits_layer="net")
    restored.load_state_dict(elr_plus.state_dict())
    pair = restored.ensemble(model)
    assert torch.equal(pair(x), expected)
    assert not any(p is q for p in pair.parameters() for q in model.parameters())
    with pytest.raises(ValueError, match="has the state of 2 networks, this run has networks=1"):
        ELRPlusCallback(networks=1).load_state_dict(elr_plus.state_dict())
    for alone in (ELRPlusCallback(), ELRPlusCallback(networks=1)):
        if alone.networks == 1:
            fit(alone, epochs=1)
        with pytest.raises(RuntimeError, match="ELRPlusCallback: there is no second network"):
            alone.ensemble(model)
    other = ELRPlusCallback(logits_layer="nett")
    other.load_state_dict(elr_plus.state_dict())
    with pytest.raises(MisconfigurationException, match="No layer is named 'nett'"):
        other.ensemble(model)


@pytest.mark.parametrize("missing", ["groups", "settings", "loss"])
def test_a_state_of_another_version_is_refused_when_a_fit_goes_on(missing, tmp_path):
    trainer, _ = fit(ELRPlusCallback(), epochs=1)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    del checkpoint["callbacks"]["ELRPlusCallback"]["networks"]["second"][missing]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    with pytest.raises(MisconfigurationException, match=rf"^ELRPlusCallback: .* it lacks '{missing}'\. It is of"):
        fit(ELRPlusCallback(), epochs=2, ckpt_path=tmp_path / "old.ckpt")


@pytest.mark.parametrize("layer", ["", "net"])
def test_validation_of_both_networks(layer):
    elr_plus = ELRPlusCallback(validation="ensemble", logits_layer=layer)
    trainer, model = fit(elr_plus, epochs=1, validate=True)
    pair = elr_plus.ensemble(model)
    x, y = blobs().tensors
    logits = pair(x)
    logged = trainer.callback_metrics["loss"].item()
    assert logged == pytest.approx(F.cross_entropy(logits, y).item(), abs=1e-5)
    assert logged != pytest.approx(F.cross_entropy(model.eval()(x), y).item(), abs=1e-5)
    assert "forward" not in vars(model)
    assert "forward" not in vars(model.net)
    plain = ELRPlusCallback()
    trainer, other = fit(plain, epochs=1, validate=True)
    assert torch.equal(other.net[0].weight, model.net[0].weight)
    assert trainer.callback_metrics["loss"].item() == pytest.approx(
        F.cross_entropy(other.eval()(x), y).item(), abs=1e-5
    )


def test_validation_that_does_not_call_the_layer_is_refused():
    class Direct(Classifier):
        def validation_step(self, batch, batch_idx):
            self.log("loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    with pytest.raises(MisconfigurationException, match=r"'the module itself', which `validation_step` did not call"):
        fit(ELRPlusCallback(validation="ensemble"), Direct(), validate=True)
    model = make_model()
    model.net = torch.compile(model.net, backend="eager")
    with pytest.raises(MisconfigurationException, match="which compiled code does not notice"):
        fit(ELRPlusCallback(validation="ensemble"), model, validate=True)


@pytest.mark.parametrize("teacher", ["train", "eval"])
def test_teachers_have_the_statistics_that_their_mode_needs(teacher):
    elr_plus = ELRPlusCallback(teacher=teacher)
    _, model = fit(elr_plus)
    averages = [average["net.1.running_mean"] for average in elr_plus.state_dict()["networks"]["averages"]]
    live = [model.net[1].running_mean, second_weights(elr_plus)["net.1.running_mean"]]
    for average, own in zip(averages, live, strict=True):
        assert torch.equal(average, own if teacher == "eval" else torch.zeros(8))


class Freeze(Callback):
    """Freezes batch norm when an epoch starts."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        pl_module.net[1].train(trainer.current_epoch < self.epoch)


@pytest.mark.parametrize("networks", [1, 2])
def test_frozen_batch_norm_is_frozen_in_teachers_and_the_second_network(networks):
    seen = []

    class Seen(Classifier):
        def training_step(self, batch, batch_idx):
            seen.append((self.trainer.current_epoch, self.net[1].training))
            return super().training_step(batch, batch_idx)

    elr_plus, model = ELRPlusCallback(networks=networks, decay=0.5, decay_rampup_steps=0), Seen()
    fit(elr_plus, model, callbacks=[Freeze(1)])
    assert len(seen) == 2 * 4 * 2 * networks  # epochs, batches, a network and a teacher
    assert all(is_training == (epoch == 0) for epoch, is_training in seen)
    state = elr_plus.state_dict()["networks"]
    live = [model.net[1].running_mean, *([second_weights(elr_plus)["net.1.running_mean"]] if networks == 2 else [])]
    for average, own in zip(state["averages"], live, strict=True):
        assert own.any()
        assert torch.equal(average["net.1.running_mean"], own)


def test_backbone_finetuning_unfreezes_both_networks():
    class Parts(Classifier):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = self.net[:3], self.net[3]
            del self.net

        def forward(self, x):
            return self.head(self.backbone(x))

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.2)

    seed_everything(7, verbose=False)
    elr_plus, model = ELRPlusCallback(peer_init="copy", lam=0, mixup_alpha=1), Parts()
    start = model.backbone[0].weight.detach().clone()
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_ratio_lr=0.5, train_bn=False)
    _, model = fit(elr_plus, model, callbacks=[finetuning])
    moved = [w - start for w in (model.backbone[0].weight, second_weights(elr_plus)["backbone.0.weight"])]
    assert all(m.abs().max() > 1e-3 for m in moved)
    optimizer = elr_plus.state_dict()["networks"]["second"]["optimizer"]
    assert [len(group["params"]) for group in optimizer["param_groups"]] == [
        4,
        2,
    ]  # batch norm is trained from the start
    assert [group["lr"] for group in optimizer["param_groups"]] == [0.2, 0.1]


# -- the fit ----------------------------------------------------------------------------------------------------------


def test_an_epoch_cut_short_gives_both_networks_the_same_steps():
    elr_plus = ELRPlusCallback()
    fit(elr_plus, epochs=-1, max_steps=6, accumulate_grad_batches=1)
    networks = elr_plus.state_dict()["networks"]
    assert networks["steps"] == networks["second"]["steps"] == 6
    assert networks["second"]["_position"] == 2
    assert all(table.all()[0].sum(1).max() <= 1 for table in elr_plus._tables)


def test_a_new_training_starts_anew_and_a_continued_one_goes_on():
    elr_plus = ELRPlusCallback(beta=0.5)
    trainer, model = fit(elr_plus, epochs=1)
    first = {name: w.clone() for name, w in second_weights(elr_plus).items()}
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, make_loader())
    assert elr_plus.state_dict()["networks"]["second"]["steps"] == 8
    assert [table.all()[0].sum(1).tolist() for table in elr_plus._tables] == [pytest.approx([0.75] * SIZE)] * 2
    fit(elr_plus, epochs=1)
    again = elr_plus.state_dict()["networks"]["second"]
    assert again["steps"] == 4
    assert all(torch.equal(again["weights"][name], w) for name, w in first.items())


def test_suspects_come_from_both_tables_and_scalars_are_logged():
    elr_plus = ELRPlusCallback(beta=0.0, mixup_alpha=0.0)
    trainer, _ = fit(elr_plus, epochs=2, log_every_n_steps=1, loader=make_loader(batch_size=SIZE))
    targets = sum(table.all()[0] for table in elr_plus._tables)
    labels = blobs().tensors[1]
    assert torch.equal(elr_plus.suspected_label_errors(), targets.argmax(1) != labels)
    assert sorted(elr_plus.label_errors().index.tolist()) == (targets.argmax(1) != labels).nonzero()[:, 0].tolist()
    own = elr_plus._tables[0].all()[0]
    logged = trainer.callback_metrics
    assert logged["reg/elr_plus/suspects"].item() == pytest.approx((own.argmax(1) != labels).float().mean().item())
    agreement = own.gather(1, labels[:, None]).mean().item()
    assert logged["reg/elr_plus/agreement"].item() == pytest.approx(agreement, abs=1e-6)
    assert logged["reg/elr_plus/second_loss"].isfinite()
    assert logged["reg/elr_plus/term"] < 0
    with pytest.raises(RuntimeError, match="no targets yet"):
        ELRPlusCallback().label_errors()


def test_ignored_labels_stay_ignored_under_mixup():
    x, y = blobs().tensors
    y = torch.where(torch.arange(SIZE) % 4 == 0, -100, y)
    for elr_plus in (ELRPlusCallback(), ELRPlusCallback(refine=True, lam=1.0)):
        _, model = fit(elr_plus, loader=make_loader(TensorDataset(x, y)))
        assert all(w.isfinite().all() for w in (*model.state_dict().values(), *second_weights(elr_plus).values()))
        assert not elr_plus.suspected_label_errors()[y < 0].any()


def test_inputs_of_any_batch_are_found_or_named():
    class Keyed(Classifier):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch["x"]), batch["y"])

    class Items(TensorDataset):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return {"x": x, "y": y}

    one, two = ELRPlusCallback(), ELRPlusCallback(input_key="x")
    _, plain = fit(ELRPlusCallback(), epochs=1)
    for elr_plus in (one, two):
        seed_everything(7, verbose=False)
        _, model = fit(elr_plus, Keyed(), make_loader(Items(*blobs().tensors)), epochs=1)
        assert torch.equal(model.net[0].weight, plain.net[0].weight)
    with pytest.raises(
        MisconfigurationException,
        match=r"ELRPlusCallback: .*\(input_key='1'\) cannot be mixed: floating-point .* torch.int64 .*`mixup_alpha=0`",
    ):
        fit(ELRPlusCallback(input_key="1"))


def test_setups_that_cannot_hold_are_refused_by_name():
    class NLL(Classifier):
        def training_step(self, batch, batch_idx):
            return F.nll_loss(self(batch[0]).log_softmax(1), batch[1])

    class Converted(Classifier):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), F.one_hot(batch[1], CLASSES).float())

    class Manual(Classifier):
        automatic_optimization = False

    # It has no `form`, so that choosing the loss is all that helps.
    sentence = r'say so, `ELRPlusCallback\(loss="cross_entropy"\)`; if another loss has the labels, choose that one'
    with pytest.raises(MisconfigurationException, match=sentence):
        fit(ELRPlusCallback(), Converted())

    with pytest.raises(MisconfigurationException, match=r"refine=True\) gives probabilities as labels, which nll_loss"):
        fit(ELRPlusCallback(refine=True), NLL())
    fit(ELRPlusCallback(), NLL(), epochs=1)
    with pytest.raises(MisconfigurationException, match="ELRPlusCallback trains a second network as Lightning trains"):
        fit(ELRPlusCallback(), Manual())
    for other, sentence in (
        (Mixup(prob=0.5), "its teachers see the images that it mixes itself, and Mixup mixes them too"),
        (NMSparsity(), "NMSparsity changes the module's weights in each step"),
    ):
        for order in ([other], []), ([], [other]):
            with pytest.raises(MisconfigurationException, match=sentence):
                _fit_with(*order)


def _fit_with(before, after):
    trainer = Trainer(callbacks=[*before, ELRPlusCallback(), *after], accelerator="cpu", logger=False, max_epochs=1)
    trainer.fit(make_model(), make_loader())


def on_rank():
    """Mixup draws per rank: the ranks mix other shares, and hold the same networks and targets."""
    torch.manual_seed(0)
    elr_plus = ELRPlusCallback(mixup_alpha=1.0)
    data = TensorDataset(*(t[:20] for t in blobs().tensors))
    _, model = fit(elr_plus, make_model(), DataLoader(data, 5, shuffle=True), strategy="ddp", devices=2)
    step = SimpleNamespace(batches_so_far=1, stream="")
    share = draw_lam(1.0, elr_plus.generator(step))
    return elr_plus.state_dict(), share, {n: p.detach() for n, p in model.named_parameters()}


def test_ranks_hold_the_same_networks_and_targets(two_processes):
    (one, share, weights), (two, other, others) = two_processes.run(on_rank)
    assert share != other
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    params = [{n: w for n, w in s["networks"]["second"]["weights"].items() if "running" not in n} for s in (one, two)]
    assert all(torch.equal(params[0][name], params[1][name]) for name in params[0])
    for a, b in zip(one["tables"], two["tables"], strict=True):
        assert torch.equal(a["targets"]["values"], b["targets"]["values"])
        assert (a["targets"]["values"].sum(1) > 0).all()


def test_keeps_digits_from_being_memorised_and_finds_the_wrong_labels():
    digits = load_digits()
    x, clean = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=generator)
    train, test = order[:1200], order[1200:]
    redrawn = torch.rand(1200, generator=generator) < 0.5
    labels = torch.where(redrawn, torch.randint(10, (1200,), generator=generator), clean[train])
    accuracy = {}
    for active in (False, True):
        settings = {"lam": 7.0, "beta": 0.9, "decay_rampup_steps": 200} if active else {"lam": 0.0, "mixup_alpha": 0.0}
        elr_plus = ELRPlusCallback(**settings)
        seed_everything(0, verbose=False)
        _, model = fit(elr_plus, Wide(), make_loader(TensorDataset(x[train], labels), 100), epochs=40)
        predictor = elr_plus.ensemble(model) if active else model.eval()
        accuracy[active] = (predictor(x[test]).argmax(1) == clean[test]).float().mean().item()
    wrong, suspects = labels != clean[train], elr_plus.suspected_label_errors()
    assert accuracy[True] > 0.9
    assert accuracy[True] - accuracy[False] > 0.1
    assert (suspects & wrong).sum() / suspects.sum() > 0.9
    assert (suspects & wrong).sum() / wrong.sum() > 0.9
