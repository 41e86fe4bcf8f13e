"""Maps with frozen latents: what is trained are the factors, wherever their gradients come from."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.networks.peer import copy_of
from lightning_reg.engine.run.report import techniques_table
from tests.conformance.laws import LAWS, NEED_TWO_PROCESSES
from tests.conformance.references import REFERENCES, TrainsFactors
from tests.toys import (
    QUIET,
    TWO_RANKS,
    Callback,
    Classifier,
    Doubled,
    Halve,
    LowRank,
    Penalty,
    fit,
    make_loader,
    make_trainer,
    same_weights,
    weights_of,
)

pytestmark = QUIET
HEAD, FIRST = "net.3.weight", "net.0.weight"
WAYS = {"at the layer": {}, "released": {"dense": True}}


class Adam(Classifier):
    """Two groups, a schedule, weight decay."""

    def configure_optimizers(self):
        groups = [{"params": [*self.net[0].parameters()], "lr": 0.02}, {"params": [*self.net[3].parameters()]}]
        optimizer = torch.optim.AdamW(groups, lr=0.05, weight_decay=0.3)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


class ByHand(Adam):
    """The same weights made of factors in the user's own code."""

    def __init__(self, technique, names, scale=None, **options):
        super().__init__(**options)
        self.names, self.scale = names, scale
        weights = {name: self.get_parameter(name).detach() for name in names}
        technique.weights_to_map(self)
        technique.latents.clear()
        self.frozen = technique.begin_map(weights)
        self.factors = nn.ModuleList(nn.ParameterDict(technique.latents.own[name]) for name in names)
        technique.latents.clear()

    def made(self):
        return {n: self.frozen[n] + 0.5 * f["B"] @ f["A"] for n, f in zip(self.names, self.factors, strict=True)}

    def forward(self, x):
        return torch.func.functional_call(self.net, {n[4:]: w for n, w in self.made().items()}, x)

    def configure_optimizers(self):
        by_layer = {"net.0": [], "net.3": []}
        for name, parameter in self.net.named_parameters():
            if f"net.{name}" not in self.names:
                by_layer[f"net.{name[0]}"].append(parameter)
        own = {n[:5]: [*f.parameters()] for n, f in zip(self.names, self.factors, strict=True)}
        groups = [
            {"params": by_layer["net.0"], "lr": 0.02},
            {"params": by_layer["net.3"]},
            {"params": own.get("net.0", []), "lr": 0.02, "weight_decay": 0.0},
            {"params": own.get("net.3", []), "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.05, weight_decay=0.3)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


def check(module, technique, hand, atol=1e-6):
    made = hand.made()
    for name, parameter in module.named_parameters():
        want = made[name] if name in made else hand.get_parameter(name)
        torch.testing.assert_close(parameter.detach(), want.detach(), rtol=0, atol=atol)
    for name, factors in zip(hand.names, hand.factors, strict=True):
        for part in "BA":
            own = technique.latents.own[name][part].detach()
            torch.testing.assert_close(own, factors[part].detach(), rtol=0, atol=atol)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.05}], ids=str)
def test_factors_train_as_in_groups_of_the_users_optimizer(way, options):
    module, technique = Adam(), LowRank([FIRST, HEAD], **WAYS[way])
    trainer = fit(module, technique, max_epochs=3, **options)
    hand = ByHand(LowRank([FIRST, HEAD]), [FIRST, HEAD])
    fit(hand, max_epochs=3, **options)
    check(module, technique, hand)
    assert technique.latents.ways[HEAD].startswith(way)
    optimizer = trainer.optimizers[0]
    # The frozen weights have no moments, and the groups are the user's.
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]
    biases = [module.net[0].bias, module.net[3].bias]
    assert {id(p) for p in optimizer.state} == {id(p) for p in biases}
    assert not any(p.grad is not None for p in (module.net[0].weight, module.net[3].weight))
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_factors_are_float32_at_least_in_every_precision(way, precision):
    module, technique, other = Adam(), LowRank([FIRST, HEAD], **WAYS[way]), LowRank([FIRST, HEAD])
    fit(module, technique, precision=precision)
    fit(Adam(), other, precision=precision)
    kind = torch.float64 if precision == "64-true" else torch.float32
    moments = technique.latents.state_dict()["moments"][HEAD]
    for part in "BA":
        own = technique.latents.own[HEAD][part]
        assert own.dtype is moments[part]["exp_avg"].dtype is moments[part]["exp_avg_sq"].dtype is kind
        # bfloat16 rounds products to 2^-8, in another order.
        torch.testing.assert_close(
            own, other.latents.own[HEAD][part], rtol=0, atol=1e-12 if kind == torch.float64 else 0.05
        )
    made = (
        technique.latents.values[HEAD].to(kind)
        + 0.5 * technique.latents.own[HEAD]["B"] @ technique.latents.own[HEAD]["A"]
    )
    close = {"rtol": 2**-8, "atol": 1e-6} if precision == "bf16-true" else {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(module.net[3].weight.detach().to(kind), made.detach(), **close)


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, way):
    whole, kept = Adam(), LowRank([FIRST, HEAD], **WAYS[way])
    fit(whole, kept, max_epochs=4)
    trainer = fit(Adam(), LowRank([FIRST, HEAD], **WAYS[way]), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == Adam().state_dict().keys()
    assert len(saved["optimizer_states"][0]["state"]) == 2
    resumed, technique = Adam(seed=3), LowRank([FIRST, HEAD], **WAYS[way])
    make_trainer(callbacks=[technique], max_epochs=4).fit(resumed, make_loader(), ckpt_path=tmp_path / "half.ckpt")
    assert same_weights(whole, resumed)
    one, two = kept.latents.state_dict(), technique.latents.state_dict()
    for part in "BA":
        assert torch.equal(one["own"][HEAD][part], two["own"][HEAD][part])
        assert torch.equal(one["moments"][HEAD][part]["exp_avg_sq"], two["moments"][HEAD][part]["exp_avg_sq"])


def test_a_learning_rate_for_each_part():
    module, technique = Classifier(lr=0.1), LowRank(lr_factor={"B": 16.0})
    one = fit(module, technique, max_steps=1)
    assert one.optimizers[0].param_groups[0]["lr"] == 0.1
    start = ByHand(LowRank(), [HEAD]).factors[0]
    plain = LowRank()
    fit(Classifier(lr=0.1), plain, max_steps=1)
    moved = {part: technique.latents.own[HEAD][part] - start[part] for part in "BA"}
    usual = {part: plain.latents.own[HEAD][part] - start[part] for part in "BA"}
    torch.testing.assert_close(moved["B"], 16 * usual["B"], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(moved["A"], usual["A"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("way", WAYS)
def test_a_scale_by_rows_of_the_gradient(way):
    technique, names = LowRank(row_scale=3.0, **WAYS[way]), [HEAD]
    module = Classifier(lr=0.1)
    fit(module, technique, max_steps=1)
    factors = ByHand(LowRank(), names).factors[0]
    hand = Classifier(lr=0.1)
    w = (hand.net[3].weight + 0.5 * factors["B"] @ factors["A"]).detach().requires_grad_()
    x, y = next(iter(make_loader()))
    F.cross_entropy(F.linear(hand.net[:3](x), w, hand.net[3].bias), y).backward()
    scaled = torch.linspace(1, 3.0, 3)[:, None] * w.grad
    want = {"B": factors["B"] - 0.05 * scaled @ factors["A"].T, "A": factors["A"] - 0.05 * factors["B"].T @ scaled}
    for part in "BA":
        torch.testing.assert_close(technique.latents.own[HEAD][part], want[part], rtol=1e-5, atol=1e-7)


# -- which way --------------------------------------------------------------------------------------------------------


class Tied(Classifier):
    """One matrix for two layers."""

    def __init__(self, **options):
        super().__init__(**options)
        self.net[0], self.net[3] = nn.Linear(6, 6), nn.Linear(6, 6)
        with torch.no_grad():
            for number, p in enumerate(self.parameters()):
                p.copy_(torch.linspace(-1, 1, p.numel()).reshape(p.shape).roll(number))
        self.net[3].weight = self.net[0].weight


def test_a_shared_weight_gets_its_gradient_from_all_its_layers_and_stays_shared(tmp_path):
    module, technique = Tied(lr=0.1), LowRank([FIRST])
    trainer = fit(module, technique)
    assert technique.latents.ways == {FIRST: "released (several layers share it)"}
    assert module.net[3].weight is module.net[0].weight
    trainer.save_checkpoint(tmp_path / "tied.ckpt")
    state = torch.load(tmp_path / "tied.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(state[FIRST], state[HEAD])
    hand = Tied(lr=0.1)
    start = LowRank([FIRST])
    start.weights_to_map(hand)
    start.begin_map({FIRST: hand.net[0].weight.detach()})
    left, right = (start.latents.own[FIRST][part] for part in "BA")
    v = hand.net[0].weight.detach()
    optimizer = torch.optim.SGD([left, right, hand.net[0].bias, hand.net[3].bias], 0.1)
    for _ in range(2):
        for x, y in make_loader():
            w = v + 0.5 * left @ right
            output = F.linear(torch.relu(F.linear(x, w, hand.net[0].bias)), w, hand.net[3].bias)
            optimizer.zero_grad()
            F.cross_entropy(output, y).backward()
            optimizer.step()
    torch.testing.assert_close(technique.latents.own[FIRST]["B"], left, rtol=0, atol=1e-6)
    torch.testing.assert_close(technique.latents.own[FIRST]["A"], right, rtol=0, atol=1e-6)


def reads_outside(module, batch, sign=1.0):
    """Uses the head's matrix once more, past its layer, and pulls the first layer's to zero."""
    x, y = batch
    hidden = module.net[:3](x)
    logits = module.net[3](hidden) + sign * F.linear(hidden.square(), module.net[3].weight)
    return F.cross_entropy(logits, y) + 0.1 * torch.stack([module.net[0].weight]).square().sum()


@pytest.mark.parametrize("seen", [reads_outside, partial(reads_outside, sign=-2.0)])
def test_a_weight_that_is_read_outside_of_its_layer_is_noticed_before_that(seen):
    module, technique, count = Classifier(seen, lr=0.1), LowRank([FIRST, HEAD]), KeepsCount()
    fit(module, technique, count, max_epochs=1)
    assert count.most == 0
    dense, other = Classifier(seen, lr=0.1), LowRank([FIRST, HEAD], dense=True)
    fit(dense, other, max_epochs=1)
    assert same_weights(module, dense, atol=1e-6)
    assert set(technique.latents.ways.values()) == {"released (it is read outside of its layer)"}
    for name in (FIRST, HEAD):
        assert not torch.equal(technique.latents.own[name]["A"], ByHand(LowRank([name]), [name]).factors[0]["A"])


def flat(module, batch):
    """The loss, and how steep it is in both weights."""
    x, y = batch
    loss = F.cross_entropy(module(x), y)
    slopes = torch.autograd.grad(loss, [module.net[0].weight, module.net[3].weight], create_graph=True)
    module.slopes.append([slope.detach().clone() for slope in slopes])
    return loss + 0.3 * sum(slope.square().sum() for slope in slopes)


def test_gradients_that_a_step_asks_for_are_those_of_the_weights():
    modules = [Classifier(flat, lr=0.1), Classifier(flat, lr=0.1)]
    techniques = [LowRank([FIRST, HEAD]), LowRank([FIRST, HEAD], dense=True)]
    for module, technique in zip(modules, techniques, strict=True):
        module.slopes = []
        fit(module, technique, max_epochs=1)
    assert len(modules[0].slopes) == len(modules[1].slopes) > 1
    for ours, dense in zip(*(module.slopes for module in modules), strict=True):
        for one, two in zip(ours, dense, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)
            assert one.abs().max() > 1e-3
    assert same_weights(*modules, atol=1e-6)


def test_looking_at_a_weight_is_no_reading():
    def looks(module, batch):
        weight = module.net[3].weight
        assert weight.shape == (3, 8)
        assert weight.dim() == 2
        assert weight.device.type == "cpu"
        with torch.no_grad():
            module.log("norm", weight.norm())
        module.log("mean", weight.detach().mean())
        return F.cross_entropy(module(batch[0]), batch[1])

    technique = LowRank()
    fit(Classifier(looks), technique, max_steps=1)
    assert technique.latents.ways == {HEAD: "at the layer"}


def test_penalties_on_weights_reach_the_factors():
    module, technique = Adam(), LowRank([FIRST, HEAD])
    trainer = fit(module, technique, Penalty(0.05))
    held = {id(p) for p in trainer.optimizers[0].state}
    assert held == {id(module.net[0].bias), id(module.net[3].bias)}
    assert technique.latents.ways == dict.fromkeys((FIRST, HEAD), "kept (Penalty acts on it or its gradient)")

    class Penalized(ByHand):
        def training_step(self, batch, batch_idx):
            weights = [*self.made().values(), self.net[0].bias, self.net[3].bias]
            return super().training_step(batch, batch_idx) + 0.05 * sum(w.square().sum() for w in weights)

    hand = Penalized(LowRank([FIRST, HEAD]), [FIRST, HEAD])
    fit(hand)
    check(module, technique, hand)


def test_edited_weights_hand_their_gradient_on():
    module, technique = Adam(), LowRank([HEAD])
    fit(module, technique, Halve([HEAD]))

    class Halved(ByHand):
        def made(self):
            return {n: w - 0.5 * w.detach() if self.inside else w for n, w in super().made().items()}

        inside = False

        def training_step(self, batch, batch_idx):
            self.inside = True
            loss = super().training_step(batch, batch_idx)
            self.inside = False
            return loss

    hand = Halved(LowRank([HEAD]), [HEAD])
    fit(hand)
    check(module, technique, hand)


def test_the_table_says_which_way():
    class Asks(Callback):
        def on_train_start(self, trainer, pl_module):
            self.rows = techniques_table([technique], {}).columns[3]._cells

    technique, asks = LowRank([FIRST]), Asks()
    fit(Tied(), technique, asks, max_steps=1)
    assert asks.rows == ["; gradients of 1 weights released (several layers share it): net.0.weight"]


class KeepsCount(Callback):
    """The numbers of all gradients that lie with the module, before and after each backward pass."""

    def __init__(self):
        self.most = 0

    def on_after_backward(self, trainer, pl_module):
        held = sum(p.grad.numel() for p in pl_module.net.parameters() if p.grad is not None and p.dim() > 1)
        self.most = max(self.most, held)


@pytest.mark.parametrize("way", WAYS)
def test_no_gradient_of_a_weights_size_is_kept(way):
    count, module = KeepsCount(), Adam()
    fit(module, LowRank([FIRST, HEAD], **WAYS[way]), count, accumulate_grad_batches=2)
    assert count.most == 0


def test_two_maps_on_one_weight_are_refused_and_on_two_stand_together():
    with pytest.raises(MisconfigurationException) as raised:
        fit(Classifier(), LowRank(name="one"), LowRank(name="two"))
    assert str(raised.value) == (
        "LowRank and LowRank cannot stand together on 'net.3.weight': a weight is trained through one map only. Choose"
        " other layers for one of them."
    )
    module, technique, doubled = Classifier(lr=0.1), LowRank([FIRST]), Doubled()
    fit(module, technique, doubled)
    assert torch.equal(module.net[3].weight.detach(), 2 * doubled.latents.values[HEAD])
    # With the latents of the other, the gradient of the first comes to the same factors.
    other = LowRank([FIRST], dense=True)
    again = Classifier(lr=0.1)
    fit(again, other, Doubled())
    assert same_weights(module, again, atol=1e-6)


class FreezesAll(LowRank):
    """Leaves nothing else to train."""

    def weights_to_freeze(self, module):
        return [name for name, _ in module.named_parameters()]


def test_what_is_not_trained_needs_no_gradient_for_the_time_of_the_fit():
    needed = []

    class Looks(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            needed.append([p.requires_grad for p in pl_module.parameters()])

    module, start = Classifier(), weights_of(Classifier())
    module.net[0].bias.requires_grad_(False)
    technique = FreezesAll()
    fit(module, technique, Looks(), max_epochs=1)
    assert needed == [[False] * 4] * 4
    assert [p.requires_grad for p in module.parameters()] == [True, False, True, True]
    changed = [name for name, value in weights_of(module).items() if not torch.equal(value, start[name])]
    assert changed == [HEAD]
    module = Classifier().requires_grad_(False)  # whatever the way
    module.net[0].bias.requires_grad_()
    for technique in (LowRank(), LowRank(dense=True)):
        fit(module, technique, Penalty(), max_steps=1)
        fit(module, technique, max_steps=1)
        assert [p.requires_grad for p in module.parameters()] == [False, True, False, False]
    # What another technique maps is not frozen, nor what one of two that freeze leaves.
    module = Classifier()
    fit(module, FreezesAll(), Doubled([FIRST]), max_epochs=1)
    changed = [name for name, value in weights_of(module).items() if not torch.equal(value, start[name])]
    assert changed == [FIRST, HEAD]
    module, other = Classifier(), FreezesAll([FIRST], name="other")
    other.weights_to_freeze = lambda module: ["net.0.bias"]
    fit(module, FreezesAll(), other, max_epochs=1)
    changed = [name for name, value in weights_of(module).items() if not torch.equal(value, start[name])]
    assert changed == [FIRST, HEAD, "net.3.bias"]


# -- around it --------------------------------------------------------------------------------------------------------


class Filtered(Classifier):
    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], self.lr)


class Several(Classifier):
    def configure_optimizers(self):
        return [torch.optim.SGD([p], self.lr) for p in (self.net[0].bias, self.net[3].bias)]

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    automatic_optimization = False


def test_an_optimizer_that_got_trainable_parameters_alone():
    module, whole = Filtered(lr=0.1), Classifier(lr=0.1)
    for one in (module, whole):
        fit(one, FreezesAll())
    assert same_weights(module, whole)
    module = Filtered(lr=0.1)  # by the user's own doing
    module.net[3].weight.requires_grad_(False)
    whole = Classifier(lr=0.1)
    for one in (module, whole):
        trainer = fit(one, LowRank())
    assert same_weights(module, whole)
    assert "setup_optimizers" not in vars(trainer.strategy)
    with pytest.raises(MisconfigurationException) as raised:
        fit(Several(), LowRank())
    assert str(raised.value) == (
        "LowRank trains with the optimizer of the weights, and none of the 2 optimizers has them. Give them to one:"
        " `self.parameters()` has those as well that need no gradient."
    )


class Twice(torch.optim.SGD):
    """Evaluates, moves everything a little, evaluates again and steps from where it was."""

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            closure()
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = [p.clone() for p in params]
        for p in params:
            p.add_(0.1 * p.grad)
        with torch.enable_grad():
            loss = closure()
        for p, kept in zip(params, before, strict=True):
            p.copy_(kept)
        super().step()
        return loss


def _twice(cls):
    class Sharp(cls):
        def configure_optimizers(self):
            return Twice([p for p in self.parameters() if not isinstance(self, ByHand) or p.grad_fn is None], self.lr)

    return Sharp


@pytest.mark.parametrize("way", WAYS)
def test_an_optimizer_that_evaluates_twice_sees_weights_of_changed_factors(way):
    module, technique = _twice(Classifier)(lr=0.1), LowRank([HEAD], **WAYS[way])
    fit(module, technique)
    hand = _twice(ByHand)(LowRank([HEAD]), [HEAD], lr=0.1)
    fit(hand)
    check(module, technique, hand)


class Checkpointed(Classifier):
    reentrant, needed = False, True

    def forward(self, x):
        x = x.requires_grad_() if self.needed else x
        return checkpoint(self.net, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints(reentrant):
    module, plain = Checkpointed(lr=0.1), Classifier(lr=0.1)
    module.reentrant = reentrant
    for one in (module, plain):
        fit(one, FreezesAll([FIRST, HEAD]))
    assert same_weights(module, plain, atol=1e-7)
    assert not same_weights(module, Classifier())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_checkpoints_whose_inputs_need_no_gradient_are_refused():
    module = Checkpointed(lambda self, batch: F.cross_entropy(self(batch[0]) + self.zero, batch[1]))
    module.reentrant, module.needed, module.zero = True, False, nn.Parameter(torch.zeros(3))
    with pytest.raises(MisconfigurationException) as raised:
        fit(module, LowRank())
    assert str(raised.value) == (
        "LowRank: the layer of 'net.3.weight' ran without gradient in the first step, as checkpoints with"
        " use_reentrant=True do whose inputs need none. Write use_reentrant=False, or let the inputs need a gradient:"
        " `model.enable_input_require_grads()`."
    )
    fit(Checkpointed(), LowRank(), max_steps=1)  # others are fine


def test_layers_that_do_not_run_are_refused_if_none_runs():
    module = Classifier(lambda self, batch: F.cross_entropy(self.net[0](batch[0]), batch[1]))
    technique = LowRank([FIRST, HEAD])
    fit(module, technique, max_steps=1)
    with pytest.raises(MisconfigurationException, match="LowRank: no gradient came to what is trained in place of"):
        fit(module, LowRank([HEAD]), max_steps=1)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_first_step_without_a_loss():
    def skips(module, batch):
        module.count = getattr(module, "count", 0) + 1
        return None if module.count == 1 else F.cross_entropy(module(batch[0]), batch[1])

    module = Classifier(skips)
    fit(module, LowRank(), max_epochs=1)
    assert module.count == 4
    assert not torch.equal(module.net[3].weight, Classifier().net[3].weight)


def test_compiled_as_one_graph_and_not_again_after_the_second_step():
    torch.compiler.reset()
    counts = []

    class Counts(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    module, plain = Classifier(lr=0.1), Classifier(lr=0.1)
    net = module.net
    module.net = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=False)
    torch._dynamo.utils.counters.clear()
    names = [FIRST, HEAD]
    fit(module, LowRank(names, row_scale=2.0), Counts())
    fit(plain, LowRank(names, row_scale=2.0))
    module.net = net
    assert same_weights(module, plain, atol=1e-6)
    assert counts[1] == counts[-1] > 0
    torch.compiler.reset()


def test_the_scaler_skips_a_step_of_factors_that_are_not_finite():
    def breaks(module, batch):
        loss = F.cross_entropy(module(batch[0]), batch[1])
        module.count = getattr(module, "count", 0) + 1
        return loss * (float("inf") if module.count == 2 else 1.0)

    seen = []

    class Looks(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(technique.latents.own[HEAD]["B"].detach().clone())

    technique, module = FreezesAll([HEAD]), Classifier(breaks, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    fit(module, technique, Looks(), plugins=MixedPrecision("16-mixed", "cpu", scaler))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert all(value.isfinite().all() for value in weights_of(module).values())


def test_what_others_write_into_a_weight_moves_its_latent():
    class Clamps(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                with torch.no_grad():
                    pl_module.net[3].weight.clamp_(-0.1, 0.1)
            self.seen = pl_module.net[3].weight.detach().clone()

    technique, module, clamps = FreezesAll([HEAD]), Classifier(lr=1e-3), Clamps()
    fit(module, technique, clamps, max_epochs=1)
    assert module.net[3].weight.abs().max() < 0.11
    own = technique.latents.own[HEAD]
    made = technique.latents.values[HEAD] + 0.5 * own["B"] @ own["A"]
    torch.testing.assert_close(module.net[3].weight, made, rtol=0, atol=1e-6)


def test_a_copy_of_the_module_is_trained_as_if_nothing_were_frozen():
    class Copies(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            twin = copy_of(pl_module)
            self.needed = [p.requires_grad for p in twin.parameters()]
            self.hooks = [len(layer._forward_hooks) for layer in twin.modules()]

    module, copies = Classifier(), Copies()
    module.net[0].bias.requires_grad_(False)
    fit(module, FreezesAll([FIRST, HEAD]), copies, max_steps=1)
    assert copies.needed == [True, False, True, True]
    assert not any(copies.hooks)
    assert not any(vars(p) for p in module.parameters())


def test_a_copy_of_the_technique_is_plain_data():
    technique = LowRank()
    fit(Classifier(), technique)
    again = copy.deepcopy(technique)
    assert torch.equal(again.latents.own[HEAD]["B"], technique.latents.own[HEAD]["B"])
    assert again.latents.own[HEAD]["B"].is_leaf


# -- the laws ---------------------------------------------------------------------------------------------------------

CASE = next(case for case in REFERENCES if case.cls.__name__ == "TrainsFactors")
TRIED = ["resume_is_exact", "leaves_no_trace", "ranks_agree", "precision", "works_or_is_refused", "as_by_hand"]


@pytest.mark.parametrize("law", TRIED)
def test_the_least_technique_with_factors_keeps_the_laws(law, request):
    LAWS[law](CASE, *([request.getfixturevalue("two_processes")] if law in NEED_TWO_PROCESSES else []))


class ForgetsMoments(TrainsFactors):
    @classmethod
    def key(cls):
        return "forgetsmoments"

    def state_dict(self):
        return {**super().state_dict(), "moments": {}}


class ForgetsTheFrozen(TrainsFactors):
    """Goes on from the weights that the module has, as if they were those that it began with."""

    @classmethod
    def key(cls):
        return "forgetsthefrozen"

    def state_dict(self):
        return {**super().state_dict(), "values": {}}


class AddsTwice(TrainsFactors):
    """Hands each gradient on twice where it is that of the weight."""

    @classmethod
    def key(cls):
        return "addstwice"

    def __init__(self, name=None):
        super().__init__(name)
        self.is_product = False

    def pull_back(self, latents, weights, gradients):
        super().pull_back(latents, weights, {name: 2 * gradient for name, gradient in gradients.items()})


@pytest.mark.parametrize(
    ("cls", "law"),
    [(ForgetsMoments, "resume_is_exact"), (ForgetsTheFrozen, "resume_is_exact"), (AddsTwice, "as_by_hand")],
)
def test_what_breaks_a_law_is_found(cls, law):
    with pytest.raises(AssertionError):
        LAWS[law](replace(CASE, make=cls))


# -- two processes ----------------------------------------------------------------------------------------------------


class Counted(Callback):
    """How many numbers the ranks send each other in a step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2:
            self.sent, self.original = 0, torch.distributed.all_reduce
            torch.distributed.all_reduce = self.counting

    def counting(self, tensor, *args, **kwargs):
        self.sent += tensor.numel()
        return self.original(tensor, *args, **kwargs)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 2:
            torch.distributed.all_reduce = self.original


def _on_ranks(cls, options, ranks):
    module, technique = Classifier(lr=0.1), cls([FIRST, HEAD], **options)
    counted = Counted() if ranks == 2 else Callback()
    more = {**TWO_RANKS, "use_distributed_sampler": False} if ranks == 2 else {}
    x, y = torch.utils.data.default_collate(list(make_loader().dataset))
    rank = torch.distributed.get_rank() if ranks == 2 else 0
    rows = torch.arange(32).reshape(4, 2, 4)
    mine = (rows[:, rank] if ranks == 2 else rows).flatten()
    data = torch.utils.data.TensorDataset(x[mine], y[mine])
    loader = make_loader(data, batch_size=8 // ranks)
    fit(module, technique, counted, loader=loader, log_every_n_steps=100, **more)
    ddp = [p.requires_grad for p in module.parameters()]
    return {"weights": weights_of(module), "sent": getattr(counted, "sent", 0), "needed": ddp}


@pytest.mark.parametrize(("cls", "way"), [(LowRank, "at the layer"), (FreezesAll, "released")])
def test_two_ranks_average_factors_alone(two_processes, cls, way):
    one = _on_ranks(cls, WAYS[way], 1)
    first, second = two_processes.run(_on_ranks, cls, WAYS[way], 2)
    assert same_weights(first["weights"], second["weights"])
    assert same_weights(first["weights"], one["weights"], atol=1e-6)
    # Factors of both weights; where DDP has nothing else to do, one weight goes by it.
    both, smaller = 2 * (8 + 6) + 2 * (3 + 8), 2 * (3 + 8)
    assert first["sent"] == (both - smaller if cls is FreezesAll else both)
