"""Modules that a technique trains of its own; and the laws over a technique of each new phase."""

import copy
from itertools import product

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from lightning_reg import LossMixin
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.run.report import techniques_table
from lightning_reg.engine.technique import ModuleTechnique, StepTechnique
from lightning_reg.engine.weights.owned import OwnModules
from tests.conformance.laws import LAWS, NEED_TWO_PROCESSES
from tests.conformance.references import REFERENCES
from tests.toys import QUIET, TWO_RANKS, Classifier, fit, make_loader, make_trainer, same_weights, weights_of

pytestmark = QUIET
NEW = ["ShrinksFeatures", "ProjectsFeatures", "BoundsGradients", "ShrinksBias", "StretchesInputs", "RestsAWhile"]
TRIED = [
    "resume_is_exact", "leaves_no_trace", "ranks_agree", "precision", "works_or_is_refused", "instances", "plain_data",
    "own_randomness", "as_by_hand",
]  # fmt: skip


# These laws compare gradients over other numbers of steps: they know no rule that is not linear in the gradient, no
# weight that changes although the learning rate is 0, and none that has no gradient for some steps.
BY_NATURE = [
    ("BoundsGradients", "precision"),
    ("ShrinksBias", "precision"),
    ("ShrinksBias", "works_or_is_refused"),
    ("RestsAWhile", "precision"),
]


@pytest.mark.parametrize(("name", "law"), [pair for pair in product(NEW, TRIED) if pair not in BY_NATURE])
def test_a_technique_of_each_phase_keeps_the_laws(name, law, request):
    pool = [request.getfixturevalue("two_processes")] if law in NEED_TWO_PROCESSES else []
    LAWS[law](next(case for case in REFERENCES if case.cls.__name__ == name), *pool)


class Projects(ModuleTechnique, StepTechnique):
    """A projection of the hidden layer is to be 1."""

    def __init__(self, size=1, own_optimizer=None, **options):
        super().__init__()
        self.size, self.own_optimizer, self.own = size, own_optimizer, OwnModules(**options)

    @property
    def feature_layers(self):
        return ["net.0"]

    def own_modules(self, module):
        return {"projection": nn.Linear(8, self.size)}

    def step_term(self, step):
        return (self.own["projection"](step.features["net.0"].float()) - 1.0).square().mean()


class Adam(Classifier):
    """With a schedule, and weight decay of its own."""

    fused = None

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.3, fused=self.fused)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


class ByHand(Adam):
    """The projection in the user's own code, in a group of its own."""

    def __init__(self, projection, lr_factor, weight_decay):
        super().__init__()
        self.projection, self.factor, self.decay = projection, lr_factor, weight_decay

    def training_step(self, batch, batch_idx):
        hidden = self.net[0](batch[0])
        loss = nn.functional.cross_entropy(self.net[1:](hidden), batch[1])
        return loss + (self.projection(hidden) - 1.0).square().mean()

    def configure_optimizers(self):
        own = {"params": self.projection.parameters(), "lr": 0.05 * self.factor, "weight_decay": self.decay}
        optimizer = torch.optim.AdamW([{"params": self.net.parameters()}, own], lr=0.05, weight_decay=0.3)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


def first_projection():
    technique = Projects()
    fit(Classifier(lr=0.0), technique, max_steps=1)
    with torch.random.fork_rng():
        torch.manual_seed(technique.derived_seed("own modules"))
        return nn.Linear(8, 1)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize(("lr_factor", "weight_decay"), [(1.0, 0.0), (3.0, 0.2)])
def test_they_train_as_in_a_group_of_the_users_optimizer(lr_factor, weight_decay, every):
    options = {"max_epochs": 3, "accumulate_grad_batches": every}
    model, technique = Adam(), Projects(lr_factor=lr_factor, weight_decay=weight_decay)
    trainer = fit(model, technique, **options)
    hand = ByHand(first_projection(), lr_factor, weight_decay)
    fit(hand, **options)
    assert same_weights(model.net, hand.net, atol=1e-6)
    assert same_weights(technique.own["projection"], hand.projection, atol=1e-6)
    assert [len(group["params"]) for group in trainer.optimizers[0].param_groups] == [4]
    assert len(trainer.optimizers[0].state_dict()["state"]) == 4
    assert not any("projection" in name for name in model.state_dict())


LR = torch.optim.lr_scheduler
SCHEDULES = {
    "lambdas": lambda optimizer: LR.LambdaLR(optimizer, [lambda k: 1 / (1 + k), lambda k: 0.9**k]),
    "one cycle": lambda optimizer: LR.OneCycleLR(optimizer, [0.3, 0.2], total_steps=9, cycle_momentum=False),
    "plateau": lambda optimizer: LR.ReduceLROnPlateau(optimizer, patience=0, min_lr=[0.01, 0.02], threshold=1e3),
}


class TwoGroups(Classifier):
    """Two groups with learning rates of their own, and a schedule that knows how many there are."""

    def __init__(self, schedule, **kind):
        super().__init__()
        self.schedule, self.kind = schedule, kind

    def training_step(self, batch, batch_idx):
        self.log("one", 1.0)
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        groups = [{"params": self.net[0].parameters(), "lr": 0.2}, {"params": self.net[3].parameters(), "lr": 0.1}]
        optimizer = torch.optim.SGD(groups, momentum=0.9, **self.kind)
        interval = "epoch" if self.schedule == "plateau" else "step"
        scheduler = {"scheduler": SCHEDULES[self.schedule](optimizer), "interval": interval, "monitor": "one"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


@pytest.mark.parametrize(
    ("schedule", "kind"),
    [*((schedule, {}) for schedule in SCHEDULES), ("lambdas", {"foreach": True}), ("lambdas", {"fused": True})],
)
def test_schedules_are_followed_and_never_meet_their_group(schedule, kind):
    model, technique, hand = TwoGroups(schedule, **kind), Projects(lr_factor=0.5), TwoGroups(schedule)
    fit(model, technique, max_epochs=2)
    configured, projection = hand.configure_optimizers(), first_projection()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    own = torch.optim.SGD(projection.parameters(), lr=1.0, momentum=0.9)
    for _ in range(2):
        for x, y in make_loader():
            own.param_groups[0]["lr"] = 0.5 * optimizer.param_groups[0]["lr"]
            hidden = hand.net[0](x)
            loss = nn.functional.cross_entropy(hand.net[1:](hidden), y) + (projection(hidden) - 1.0).square().mean()
            for one in (optimizer, own):
                one.zero_grad()
            loss.backward()
            for one in (optimizer, own):
                one.step()
            if schedule != "plateau":
                scheduler.step()
        if schedule == "plateau":
            scheduler.step(1.0)
    assert same_weights(model.net, hand.net, atol=1e-5)  # float32
    assert same_weights(technique.own["projection"], projection, atol=1e-5)


@pytest.mark.parametrize("fused", [None, True])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, fused):
    class Model(Adam):
        pass

    Model.fused = fused
    whole, kept = Model(), Projects()
    fit(whole, kept, max_epochs=4)
    trainer = fit(Model(), Projects(), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, technique = Model(seed=3), Projects()
    make_trainer(callbacks=[technique], max_epochs=4).fit(resumed, make_loader(), ckpt_path=tmp_path / "half.ckpt")
    assert same_weights(whole, resumed)
    assert same_weights(technique.own["projection"], kept.own["projection"])
    again = copy.deepcopy(technique)
    assert same_weights(again.own["projection"], kept.own["projection"])


def test_a_second_fit_of_the_trainer_goes_on_and_one_of_another_trainer_begins_anew():
    model, technique = Adam(), Projects()
    trainer = fit(model, technique, max_epochs=2)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(model, make_loader())
    whole, kept = Adam(), Projects()
    fit(whole, kept, max_epochs=4)
    assert technique.own.size == 9
    first = {name: value.clone() for name, value in technique.own["projection"].state_dict().items()}
    fit(Adam(), technique, max_epochs=4)
    assert same_weights(technique.own["projection"], kept.own["projection"])
    assert not same_weights(first, first_projection())


def _on_ranks(infinite):
    class BreaksOwn(Projects):
        def step_term(self, step):
            term = super().step_term(step)
            broken = infinite and torch.distributed.get_rank() == 0 and step.batches_so_far == 2
            return term * float("inf") if broken else term

    model, technique = Adam(), BreaksOwn()
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))
    trainer = make_trainer(callbacks=[technique], max_epochs=2, plugins=[plugin], **TWO_RANKS)
    trainer.fit(model, make_loader(batch_size=4))
    return weights_of(model), weights_of(technique.own["projection"]), trainer.global_step


@pytest.mark.parametrize("infinite", [False, True])
def test_ranks_stay_together_where_one_of_them_is_not_finite(two_processes, infinite):
    (one, own, steps), (two, other, _) = two_processes.run(_on_ranks, infinite)
    assert same_weights(one, two)
    assert same_weights(own, other)
    assert all(value.isfinite().all() for value in own.values())
    assert steps == 8


def _absent_on_one(_):
    class Absent(Projects):
        def step_term(self, step):
            return super().step_term(step) if torch.distributed.get_rank() == 0 else None

    technique = Absent()
    trainer = make_trainer(callbacks=[technique], max_epochs=1, **TWO_RANKS)
    trainer.fit(Adam(), make_loader(batch_size=4))
    return weights_of(technique.own["projection"])


def test_a_rank_without_a_term_counts_as_zero(two_processes):
    one, two = two_processes.run(_absent_on_one, None)
    assert same_weights(one, two)


def test_they_are_float32_in_half_precision():
    technique = Projects()
    fit(Classifier(lr=0.01), technique, max_epochs=1, precision="bf16-true")
    assert {p.dtype for p in technique.own["projection"].parameters()} == {torch.float32}


def test_two_optimizers_need_to_be_told_apart():
    class Two(LossMixin, Classifier):
        automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[at].parameters(), lr=0.1) for at in (0, 3)]

    for position in (None, 2, -1):
        with pytest.raises(MisconfigurationException, match=r"^Projects trains modules .* there are 2\. Say"):
            fit(Two(), Projects(own_optimizer=position), max_epochs=1)


def test_what_takes_no_group_a_state_of_others_and_wrong_arguments_are_refused(tmp_path):
    class Quasi(Classifier):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=1)

    with pytest.raises(MisconfigurationException, match=r"^Projects: LBFGS takes no further group"):
        fit(Quasi(), Projects(), max_epochs=1)
    trainer = fit(Adam(), Projects(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    resuming = make_trainer(callbacks=[Projects(size=2)], max_epochs=2)
    with pytest.raises(MisconfigurationException, match=r"^Projects: the checkpoint holds the state of other modules"):
        resuming.fit(Adam(), make_loader(), ckpt_path=tmp_path / "end.ckpt")
    for wrong in ({"lr_factor": -1.0}, {"weight_decay": -0.1}):
        with pytest.raises(ValueError, match=f"^OwnModules: `{next(iter(wrong))}` must be"):
            OwnModules(**wrong)


def test_one_that_trains_no_modules_asks_nothing_of_the_optimizer():
    class Idle(Projects):
        def own_modules(self, module):
            return {}

        def step_term(self, step):
            return None

    class Quasi(Classifier):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=1)

    technique = Idle(own_optimizer=3)
    fit(Quasi(), technique, max_epochs=1)
    assert technique.state_dict() == {"modules": {}, "moments": {}}


def test_the_table_says_how_much_is_trained():
    technique = Projects()
    fit(Classifier(), technique, max_epochs=1)
    cells = list(techniques_table([technique], {}).columns[3].cells)
    assert cells[0].endswith("; trains 9 numbers of its own")


def test_what_was_trained_or_loaded_is_there_outside_of_training():
    def new():
        made.append(nn.Linear(2, 1))
        return {"one": made[-1]}

    made, own, here = [], OwnModules(), torch.device("cpu")
    with pytest.raises(
        MisconfigurationException, match=r"^Owner: there is none\. Fit with Owner first, or pass `ckpt_path"
    ):
        own.trained("one", new, here, "Owner", "there is none")
    own.begin(new(), here, "Owner")
    again = OwnModules()
    again.load_state_dict(own.state_dict())
    with torch.inference_mode():
        module = again.trained("one", new, here, "Owner", "there is none")
    assert module is made[1]
    assert torch.equal(module.weight, made[0].weight)
    assert not module.weight.is_inference()
    assert again.trained("one", new, here, "Owner", "there is none") is module
    assert len(made) == 2
    assert again.trained("one", new, torch.device("meta"), "Owner", "there is none").weight.device.type == "meta"
