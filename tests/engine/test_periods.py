"""Periods of a fit: weights that rest, a technique's own loss alone, the user's; own modules without gradient."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DistributedSampler, TensorDataset

from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.run.periods import Period
from lightning_reg.engine.run.report import techniques_table, what_is_trained
from lightning_reg.engine.technique import LossTechnique, ModuleTechnique, StepTechnique, Technique
from lightning_reg.engine.weights.owned import OwnModules
from tests.conformance.problems import Loader, Resumable
from tests.toys import (
    QUIET,
    TWO_RANKS,
    Boom,
    BoomError,
    Callback,
    Classifier,
    Penalty,
    WeightsByLabel,
    fit,
    make_loader,
    make_tensors,
    make_trainer,
    same_weights,
    weights_of,
)

pytestmark = QUIET
OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.3, momentum=0.9, weight_decay=0.1),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.05, weight_decay=0.5),
}


class Freezes(Technique):
    """Has the periods that it is told."""

    def __init__(self, *periods, **options):
        super().__init__(**options)
        self._periods = periods

    @property
    def periods(self):
        return self._periods


class Norms(Freezes, StepTechnique):
    """Half the mean squared norm of the hidden layer's output."""

    takes_mixed = True

    @property
    def feature_layers(self):
        return ["net.0"]

    def step_term(self, step):
        return 0.5 * step.features["net.0"].square().sum(1).mean()


class Normed(Classifier):
    """With batch norm behind the first layer."""

    def __init__(self, kind="sgd", step=None, seed=0):
        super().__init__(step=step, seed=seed)
        self.kind, self.seen = kind, []
        self.net.insert(1, nn.BatchNorm1d(8))

    def forward(self, x):
        modes = self.net[1].training, self.net[2].training
        self.seen.append(([p.requires_grad for p in self.net.parameters()], *modes))
        return self.net(x)

    def configure_optimizers(self):
        return OPTIMIZERS[self.kind](self.parameters())


def by_hand(kind, holds, frozen=("net.0", "net.1"), every=1, clip=None, epochs=2, penalty=None, norm=True):
    """A plain loop: what rests has no gradient when the optimizer steps, and batch norm its running statistics."""
    model = Normed(kind)
    optimizer = model.configure_optimizers()
    rests = [p for name, p in model.named_parameters() if name.startswith(frozen)]
    count = 0
    for epoch in range(epochs):
        for position, (x, y) in enumerate(make_loader()):
            now = holds(epoch, count)
            model.net[1].train(not (now and norm))
            (F.cross_entropy(model.net(x), y) / every).backward()
            if (position + 1) % every:
                continue
            if penalty:
                (penalty * model.net[0].weight.square().sum()).backward()
            for p in rests if now else ():
                p.grad = None
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            count += 1
    return model


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(("every", "clip"), [(1, None), (2, 0.1)])
def test_frozen_weights_rest_in_steps_as_in_a_plain_loop(kind, every, clip):
    model, technique = Normed(kind), Freezes(Period(1, 3, "steps", frozen=["net.[01]"]))
    fit(model, technique, accumulate_grad_batches=every, gradient_clip_val=clip)
    assert same_weights(model, by_hand(kind, lambda epoch, step: 1 <= step < 3, every=every, clip=clip), atol=1e-6)


@pytest.mark.parametrize(
    ("period", "holds"),
    [
        (Period(1, frozen="net.[01]"), lambda epoch, step: epoch >= 1),
        (Period(0, 1, trained="net.4"), lambda epoch, step: epoch < 1),
        (Period(0.1, 0.7, "share", frozen=["net.0", "net.1"]), lambda epoch, step: 1 <= step < 6),
    ],
)
def test_borders_in_epochs_and_shares(period, holds):
    model = Normed("adamw")
    fit(model, Freezes(period))
    assert same_weights(model, by_hand("adamw", holds), atol=1e-6)


def test_batch_norm_of_which_something_is_trained_goes_on():
    model = Normed("adamw")
    fit(model, Freezes(Period(0.3, 0.7, "share", trained=["net.4.weight", "*.bias", "net.0.weight"])))
    hand = by_hand("adamw", lambda epoch, step: 2 <= step < 6, frozen=("net.1.weight",), norm=False)
    assert same_weights(model, hand, atol=1e-6)
    assert [flags[2] for flags, *_ in model.seen] == 2 * [True] + 4 * [False] + 2 * [True]


def test_gradients_are_not_computed_and_between_steps_all_is_as_it_was():
    class Looks(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            flags = [p.requires_grad for p in pl_module.parameters()]
            assert all(flags)
            assert pl_module.net[1].training

    model = Normed()
    fit(model, Freezes(Period(1, 3, "steps", frozen=["net.0", "net.1"])), Looks(), max_epochs=1)
    on, off = ([True] * 6, True, True), ([False] * 4 + [True] * 2, False, True)
    assert model.seen == [on, off, off, on]


def test_penalties_do_not_move_what_rests():
    class Pulls(Penalty):
        def penalty(self, module):
            return 0.3 * module.net[0].weight.square().sum()

    model = Normed("adamw")
    fit(model, Pulls(), Freezes(Period(0, 1, frozen=["net.0", "net.1"])))
    assert same_weights(model, by_hand("adamw", lambda epoch, step: epoch < 1, penalty=0.3), atol=1e-6)


def test_an_exception_puts_everything_back():
    model = Normed(step=Boom(at=3))
    with pytest.raises(BoomError):
        fit(model, Freezes(Period(frozen=["net.0", "net.1"])))
    assert all(p.requires_grad for p in model.parameters())
    assert model.net[1].training


@pytest.mark.parametrize("at", [3, 4, 5, 7, 8, 9])
def test_a_run_resumed_at_a_border_ends_with_the_same_bits(tmp_path, at):
    class Saves(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == at:
                trainer.save_checkpoint(tmp_path / "at.ckpt")

    def made():
        return Norms(Period(4, 8, "steps", frozen=["net.0", "net.1"]), Period(1, 2, loss="own"))

    def loader():
        return Loader(TensorDataset(*make_tensors()), 8, sampler=Resumable(32))

    whole, resumed = Normed("adamw"), Normed("adamw", seed=1)
    full = fit(whole, made(), Saves(), loader=loader(), max_epochs=3)
    trainer = make_trainer(callbacks=[made()], max_epochs=3)
    trainer.fit(resumed, loader(), ckpt_path=tmp_path / "at.ckpt")
    assert same_weights(whole, resumed)
    one, two = (t.optimizers[0].state_dict()["state"] for t in (full, trainer))
    assert all(torch.equal(one[k][name], two[k][name]) for k in one for name in one[k])
    assert resumed.seen == whole.seen[at:]


def test_backbone_finetuning_beside_it_is_respected():
    class Model(Classifier):
        def __init__(self):
            super().__init__()
            self.backbone, self.seen = self.net[0], []

        def training_step(self, batch, batch_idx):
            self.seen.append(self.backbone.weight.requires_grad)
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    model, finetunes = Model(), BackboneFinetuning(unfreeze_backbone_at_epoch=1)
    trainer = fit(model, finetunes, Freezes(Period(0, 2, trained="net.3")), max_epochs=4)
    # The other one unfreezes in the second epoch, in which this one still freezes, and adds its group.
    assert model.seen == 8 * [False] + 8 * [True]
    assert [len(group["params"]) for group in trainer.optimizers[0].param_groups] == [2, 2]


# -- losses -----------------------------------------------------------------------------------------------------------


class Hand(Classifier):
    """The user's loss and the term, each with a factor for each epoch."""

    def __init__(self, factors, terms, weighted=()):
        super().__init__()
        self.factors, self.terms, self.weighted = factors, terms, weighted

    def training_step(self, batch, batch_idx):
        x, y = batch
        hidden = self.net[0](x)
        losses = F.cross_entropy(self.net[1:](hidden), y, reduction="none")
        losses = losses * (1 + 0.5 * y) if self.current_epoch in self.weighted else losses
        own = 0.5 * hidden.square().sum(1).mean()
        return self.factors[self.current_epoch] * losses.mean() + self.terms[self.current_epoch] * own

    def configure_optimizers(self):
        return OPTIMIZERS["adamw"](self.parameters())


def test_own_loss_alone_and_the_users_with_others_beside_it():
    model, hand = Hand([1] * 3, [0] * 3), Hand([0, 1, 1], [1, 1, 0], weighted=(1, 2))
    fit(model, WeightsByLabel(), Norms(Period(0, 1, loss="own"), Period(2, loss="user")), max_epochs=3)
    fit(hand, max_epochs=3)
    assert same_weights(model, hand, atol=1e-6)


def test_its_own_work_on_a_loss_call_rests_too():
    class Both(Norms, LossTechnique):
        epochs = ()

        def loss_term(self, call):
            self.epochs = (*self.epochs, call.step.epoch)
            return call.losses

    technique = Both(Period(1, 2, loss="own"))
    fit(Classifier(), technique, max_epochs=3)
    assert set(technique.epochs) == {0, 2}


class Projects(Freezes, ModuleTechnique, StepTechnique):
    """A projection of the hidden layer is to be 1."""

    def __init__(self, *periods, detached=False):
        super().__init__(*periods)
        self.own, self.detached, self.seen = OwnModules(weight_decay=0.5), detached, []

    @property
    def feature_layers(self):
        return ["net.0"]

    def own_modules(self, module):
        return {"projection": nn.Linear(8, 1), "spare": nn.Linear(1, 1)} if self.detached else {"p": nn.Linear(8, 1)}

    def step_term(self, step):
        made = self.own["projection" if self.detached else "p"]
        return (made(step.features["net.0"]) - 1.0).square().mean()

    def on_train_batch_end(self, *_):
        self.seen.append(weights_of(self.own.modules["p"]) if not self.detached else None)


def test_what_is_trained_of_its_own_rests_where_its_loss_does():
    technique = Projects(Period(1, 2, loss="user"))
    fit(Hand([1] * 3, [0] * 3), technique, max_epochs=3)
    moved = [not same_weights(one, two) for one, two in zip(technique.seen, technique.seen[1:], strict=False)]
    assert moved == 3 * [True] + 4 * [False] + 4 * [True]


@pytest.mark.parametrize("period", [Period(1, 2, trained="net.3"), Period(1, 2, frozen="net.0")], ids=str)
def test_what_others_train_of_their_own_rests_where_all_but_some_weights_do(period):
    technique, rests = Projects(), period.trained is not None
    fit(Hand([1] * 3, [0] * 3), Freezes(period, name="head"), technique, max_epochs=3)
    moved = [not same_weights(one, two) for one, two in zip(technique.seen, technique.seen[1:], strict=False)]
    assert moved == 3 * [True] + 4 * [not rests] + 4 * [True]


def test_own_modules_without_gradient_are_told_once():
    with pytest.warns(UserWarning, match=r"^Projects trains 'spare\.weight', 'spare\.bias' of its own, and in") as told:
        fit(Classifier(), Projects(detached=True))
    assert len([one for one in told if "of its own" in str(one.message)]) == 1


def _on_ranks(strategy):
    ranks = 1 if strategy is None else 2
    model = Normed("adamw")
    model.net[1] = nn.Identity()
    technique = Norms(Period(2, 5, "steps", frozen=["net.0"]), Period(1, loss="own"))
    options, data = {}, TensorDataset(*make_tensors())
    if strategy is not None:
        options = TWO_RANKS | {"strategy": DDPStrategy(**strategy), "use_distributed_sampler": False}
        options["sampler"] = DistributedSampler(data, shuffle=False)
    loader = make_loader(data, batch_size=8 // ranks, sampler=options.pop("sampler", None))
    make_trainer(callbacks=[technique], **options).fit(model, loader)
    return weights_of(model), model.seen


@pytest.mark.parametrize("strategy", [{}, {"static_graph": True}])
def test_two_ranks_are_as_one(two_processes, strategy):
    one, _ = _on_ranks(None)
    (first, flags), (second, _) = two_processes.run(_on_ranks, strategy)
    assert same_weights(first, second)
    assert same_weights(first, one, atol=2e-6)
    assert all(all(on) for on, *_ in flags)  # DDP waits for all gradients


def test_the_scaler_of_half_precision_steps_without_what_rests():
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))
    model = Normed("sgd")
    fit(model, Freezes(Period(2, frozen=["net.0", "net.1"], unit="steps")), plugins=[plugin])
    assert same_weights(model, by_hand("sgd", lambda epoch, step: step >= 2), atol=1e-2)  # float16
    assert not same_weights(model, by_hand("sgd", lambda epoch, step: False), atol=5e-2)


# -- words ------------------------------------------------------------------------------------------------------------


def test_what_is_trained_frozen_and_lent_is_said_in_numbers():
    model, technique = Classifier(), Projects(Period(0, 1, loss="own", frozen="net.0"))
    trainer = fit(model, WeightsByLabel(), technique, max_epochs=1)
    model.net[0].bias.requires_grad = False
    wanted = (
        "trained: 75 of the module's 83 numbers; frozen: 8; frozen by Projects in epoch 0 to 1: 56; lent to the"
        " optimizer: Projects 9"
    )
    both = trainer.callbacks
    assert what_is_trained(model, trainer.optimizers, both) == wanted
    table = techniques_table(both, {}, wanted)
    assert table.caption == wanted
    assert list(table.columns[3].cells)[1].endswith(
        "epoch 0 to 1: own loss alone, frozen net.0 (WeightsByLabel without effect on it)"
    )


def test_periods_are_checked():
    for arguments, named in (
        ({"start": -1, "frozen": "a"}, "start"),
        ({"start": 1, "end": 1, "frozen": "a"}, "end"),
        ({"start": 1.5, "unit": "share", "frozen": "a"}, "start"),
        ({"start": 0.5, "frozen": "a"}, "start"),
        ({"unit": "days", "frozen": "a"}, "unit"),
        ({"loss": "none"}, "loss"),
        ({}, "loss"),
        ({"frozen": "a", "trained": "b"}, "trained"),
    ):
        with pytest.raises(ValueError, match=f"^Period: `{named}` must be"):
            Period(**arguments)


def test_what_cannot_hold_is_refused_in_a_sentence():
    class Quasi(Classifier):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    alone = Period(0, 1, loss="own")
    for model, techniques, sentence in (
        (Classifier(), [Freezes(Period(frozen="net.9"))], r"^Freezes: a period names 'net\.9', .* Names near it: 'net"),
        (Classifier(), [Freezes(alone)], r"^Freezes has a period of its own loss alone, and no `step_term`"),
        (Quasi(), [Freezes(Period(frozen="net.0"))], "^Freezes freezes weights for a time, and LBFGS"),
        (Classifier(), [Norms(alone), Norms(alone, name="b")], r"each trains by its own .* \(epoch 0 to 1: own loss"),
        (
            Classifier(),
            [Norms(alone), Norms(Period(8, loss="own", unit="steps"), name="b")],
            "counted in the same unit",
        ),
    ):
        with pytest.raises(MisconfigurationException, match=sentence):
            fit(model, *techniques)
    twice = Classifier(lambda module, batch: sum(F.cross_entropy(module(batch[0]), batch[1]) for _ in range(2)))
    with pytest.raises(MisconfigurationException, match=r"^WeightsByLabel"):  # in the first step, in which it rests
        fit(twice, WeightsByLabel(), Norms(alone), max_epochs=1)
    fit(Classifier(), Norms(alone), Norms(Period(1, loss="own"), name="b"))
    with pytest.raises(MisconfigurationException, match=r"^Freezes has periods in shares of the training, whose"):
        fit(Classifier(), Freezes(Period(0.5, unit="share", frozen="net.0")), max_epochs=-1)
