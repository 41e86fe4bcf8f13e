"""SoupAverager."""

import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import SoupAverager
from lightning_reg.averaging.model_soups._validation import agreed_score
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import LearnedSoup, ema_decay, load_averaged
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.conformance.kinds.network import NetworkCase


class AverageByHand(Hand):
    """It starts as the weights after the first step."""

    mean = None

    def after_step(self, loop, moment):
        now = loop.constants()
        self.mean = {name: 0.8 * self.mean[name] + 0.2 * w for name, w in now.items()} if self.mean else now

    def end(self, weights):
        return self.mean


def learned_soup(**options):
    """A mix of three small networks."""
    with isolate_rng():
        torch.manual_seed(0)
        networks = [nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)) for _ in range(3)]
    return LearnedSoup(
        **{"module": networks[0], "state_dicts": [network.state_dict() for network in networks], **options}
    )


CASE = (
    Case(
        make=partial(SoupAverager, method="ema", decay=0.8),
        neutral=partial(SoupAverager, method="lawa", last_k=1),
        by_hand=AverageByHand,
        says=(
            "ema: every step, decay 0.8, loaded at the end",
            "lawa: every epoch, latest 1, loaded at the end",
            "greedy: every epoch, by val_loss (min), loaded at the end",
            "greedy: every 3 steps, by val_loss (min), loaded at the end",
            "greedy: every epoch, by val_loss (min), loaded at the end",
            "uniform: every 2 steps, not loaded at the end",
            "lawa: every 3 steps, latest 2, loaded at the end",
            "ema: every step, decay 0.870551, loaded at the end",
            "swa: every step, after step 5, loaded at the end",
            "gaussian: every epoch, around epoch 2 (std 1), loaded at the end",
        ),
        also=["regression"],
        variants=[
            partial(SoupAverager, method="greedy", monitor="val_loss", mode="min"),
            partial(
                SoupAverager, method="greedy", monitor="val_loss", mode="min", greedy_at="snapshot", every_n_steps=3
            ),
            partial(SoupAverager, method="greedy", monitor="val_loss", mode="min", greedy_at="snapshot"),
            partial(SoupAverager, method="uniform", every_n_steps=2, load_at_end=False),
            partial(SoupAverager, method="lawa", last_k=2, every_n_steps=3, include=["net.*"], exclude=["*.bias"]),
            partial(SoupAverager, method="ema", half_life_steps=5.0, warmup_steps=4, swap_for_validation=True),
            partial(SoupAverager, method="swa", start_step=5, swap_for_validation=True),
            partial(SoupAverager, method="gaussian", mean_epoch=2, std_epochs=1.0),
        ],
        invalid=[
            ({"method": "mean"}, "method"),
            ({"mode": "best"}, "mode"),
            ({"every_n_epochs": 0}, "every_n_epochs"),
            ({"every_n_steps": 0}, "every_n_steps"),
            ({"every_n_epochs": 1, "every_n_steps": 1}, "every_n_epochs"),
            ({"start_step": -1}, "start_step"),
            ({"last_k": 0}, "last_k"),
            ({"last_k": 3, "method": "ema"}, "last_k"),
            ({"max_ingredients": 0}, "max_ingredients"),
            ({"min_delta": -0.1}, "min_delta"),
            ({"greedy_at": "start"}, "greedy_at"),
            ({"method": "ema", "decay": 1.0}, "decay"),
            ({"method": "ema", "decay": -0.1}, "decay"),
            ({"method": "uniform", "decay": 0.9}, "decay"),
            ({"method": "ema", "decay": 0.9, "half_life_steps": 3.0}, "half_life_steps"),
            ({"method": "ema", "half_life_steps": 0.0}, "half_life_steps"),
            ({"method": "ema", "half_life_steps": 1e9}, "half_life_steps"),
            ({"method": "ema", "decay": 0.99999999}, "decay"),
            ({"method": "greedy", "half_life_steps": 1.0}, "half_life_steps"),
            ({"method": "ema", "warmup_steps": -1}, "warmup_steps"),
            ({"method": "swa", "warmup_steps": 1}, "warmup_steps"),
            ({"method": "gaussian", "std_epochs": 1.0}, "mean_epoch"),
            ({"method": "gaussian", "mean_epoch": 0.5, "std_epochs": 1.0}, "mean_epoch"),
            ({"method": "gaussian", "mean_epoch": 2.0, "std_epochs": 0.0}, "std_epochs"),
            ({"method": "ema", "std_epochs": 1.0}, "std_epochs"),
            ({"bn_update_batches": -1}, "bn_update_batches"),
            ({"keep": "gpu"}, "keep"),
            ({"method": "greedy", "swap_for_validation": True}, "swap_for_validation"),
            ({"method": "ema", "from_checkpoints": True}, "from_checkpoints"),
            ({"from_checkpoints": True, "every_n_steps": 1}, "from_checkpoints"),
            ({"method": "uniform", "from_checkpoints": True, "swap_for_validation": True}, "swap_for_validation"),
        ],
    ),
    NetworkCase(
        make=partial(learned_soup, per="tensor"),
        inputs=(torch.linspace(-1.0, 1.0, 10).reshape(2, 5),),
        invalid=[({"per": "layer"}, "per"), ({"state_dicts": []}, "state_dicts")],
    ),
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


class User(LightningModule):
    """What a user has: a float mask and a counter in buffers, and tied weights; it knows of no average."""

    def __init__(self, lr=0.2, norm=False, fail_at=None):
        super().__init__()
        self.lr, self.fail_at = lr, fail_at
        self.seen, self.val_losses = [], []
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
            self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
            self.tied = nn.Linear(8, 3)
        self.tied.weight = self.last.weight
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0]))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x):
        hidden = self.norm(self.first(x)).tanh()
        return self.last(hidden) + 0.1 * self.tied(hidden)

    def training_step(self, batch, batch_idx):
        self.steps += 1
        self.mask[:] = torch.tensor([0.0, 1.0, float(self.steps % 2)])
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        if self.fail_at is not None and len(self.val_losses) >= self.fail_at:
            raise KeyboardError("in validation")
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.seen.append(self.first.weight[0, 0].item())
        self.val_losses.append(loss.item())
        self.log("val_loss", loss)
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


class KeyboardError(Exception):
    pass


def data(size=24):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 6, generator=generator)
    return TensorDataset(x, (x[:, :3] + 0.5 * torch.randn(size, 3, generator=generator)).argmax(1))


class Rows(Logger):
    def __init__(self):
        super().__init__()
        self.rows = []

    name, version = "rows", 0

    def log_hyperparams(self, params):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))


class Passing(Callback):
    """Notes the weights after every step and every epoch."""

    def __init__(self):
        self.steps, self.epochs = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if not self.steps or trainer.global_step > len(self.steps):
            self.steps.append(weights_of(pl_module))

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append(weights_of(pl_module))


def weights_of(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def fit(*callbacks, model=None, epochs=3, folder=None, ckpt=None, validate=True, shuffle=True, **options):
    model = model or User()
    fixed = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    if folder is not None:
        fixed["default_root_dir"] = folder
    trainer = Trainer(max_epochs=epochs, callbacks=list(callbacks), **(fixed | options))
    train = DataLoader(data(), 6, shuffle=shuffle, generator=torch.Generator().manual_seed(2))
    trainer.fit(
        model, train, DataLoader(data(), 12) if validate else None, ckpt_path=ckpt, weights_only=True if ckpt else None
    )
    return trainer, model


def near(one, two, keys=None, **tolerance):
    for key in keys or one:
        torch.testing.assert_close(one[key], two[key], check_dtype=False, **(tolerance or {"rtol": 0, "atol": 0}))


PARAMETERS = ["first.weight", "first.bias", "last.weight", "last.bias", "tied.bias"]


# -- the averages against the formula ---------------------------------------------------------------------------------


def ema_by_hand(passed, decay, warmup=0):
    average = {k: passed[0][k].double() for k in PARAMETERS}
    for n, weights in enumerate(passed[1:], 1):
        d = min(decay, n / (n + 1)) if n < warmup else decay
        average = {k: d * average[k] + (1 - d) * weights[k].double() for k in PARAMETERS}
    return average


@pytest.mark.parametrize(
    ("options", "decay", "warmup", "every"),
    [
        ({"decay": 0.8}, 0.8, 0, 1),
        ({"half_life_steps": 4.0}, 0.5 ** (1 / 4), 0, 1),
        ({"decay": 0.9, "warmup_steps": 6}, 0.9, 6, 1),
        ({"decay": 0.5, "every_n_steps": 2}, 0.5, 0, 2),
        ({}, 0.999, 0, 1),
    ],
)
def test_ema_is_the_recursion(options, decay, warmup, every):
    passing, soup = Passing(), SoupAverager(method="ema", **options)
    _, model = fit(passing, soup)
    assert len(passing.steps) == 12
    expected = ema_by_hand(passing.steps[every - 1 :: every], decay, warmup)
    near(weights_of(model), expected, PARAMETERS, rtol=1e-5, atol=1e-7)  # float32 updates
    near(soup.raw_weights, passing.steps[-1], PARAMETERS)


def test_decay_under_warm_up_is_that_of_the_plain_mean():
    assert [ema_decay(n, 0.9, 4) for n in range(6)] == [0.0, 0.5, 2 / 3, 0.75, 0.9, 0.9]
    assert ema_decay(30, 0.9, 100) == 0.9
    assert ema_decay(1, 0.9, 0) == 0.9


@pytest.mark.parametrize(
    ("soup", "pick"),
    [
        (SoupAverager(method="uniform"), lambda p: p.epochs),
        (SoupAverager(method="uniform", every_n_epochs=2), lambda p: p.epochs[1::2]),
        (SoupAverager(method="uniform", every_n_steps=5), lambda p: p.steps[4::5]),
        (SoupAverager(method="lawa", last_k=2), lambda p: p.epochs[-2:]),
        (SoupAverager(method="lawa", last_k=3, every_n_steps=2), lambda p: p.steps[1::2][-3:]),
        (SoupAverager(method="swa", start_step=5), lambda p: p.steps[5:]),
        (SoupAverager(method="uniform", start_step=4), lambda p: p.epochs[1:]),
    ],
)
def test_means_are_means_of_what_was_passed(soup, pick):
    passing = Passing()
    _, model = fit(passing, soup, epochs=4)
    chosen = pick(passing)
    expected = {k: torch.stack([w[k].double() for w in chosen]).mean(0).float() for k in PARAMETERS}
    near(weights_of(model), expected, PARAMETERS)
    assert soup.ingredients == [] or len(soup.ingredients) == len(chosen)


def test_accumulated_batches_are_one_step():
    passing, soup = Passing(), SoupAverager(method="swa")
    fit(passing, soup, accumulate_grad_batches=2)
    assert soup._soup.gathered.taken == 6


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_half_precision_weights_are_averaged_in_float32(precision):
    passing, soup = Passing(), SoupAverager(method="ema", decay=0.99)
    model = User(lr=0.05)
    fit(passing, soup, model=model, precision=precision, validate=False)
    assert {t.dtype for t in soup._soup.gathered.average().values()} == {torch.float32}
    expected = ema_by_hand(passing.steps, 0.99)
    near(soup._soup.gathered.average(), expected, PARAMETERS, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.first.weight, expected["first.weight"].to(model.first.weight.dtype))


def test_only_what_is_asked_for_is_averaged():
    passing = Passing()
    _, model = fit(passing, SoupAverager(method="ema", decay=0.5, include=["first.*"], exclude=["*.bias"]))
    end = passing.steps[-1]
    near(weights_of(model), end, [k for k in end if k != "first.weight"])
    assert not torch.equal(model.first.weight, end["first.weight"])
    with pytest.raises(MisconfigurationException, match="there is nothing to average"):
        fit(SoupAverager(method="ema", include=["nothing"]))


def test_a_string_is_one_pattern_and_every_pattern_matches_something():
    passing = Passing()
    _, model = fit(passing, SoupAverager(method="ema", decay=0.5, include="first.*", exclude="*.bias"))
    end = passing.steps[-1]
    near(weights_of(model), end, [k for k in end if k != "first.weight"])
    assert not torch.equal(model.first.weight, end["first.weight"])
    for options in ({"include": ["first.*", "fist.*"]}, {"exclude": "fist.*"}):
        with pytest.raises(
            MisconfigurationException, match=r"=\['fist.\*'\]\): no parameter .* names: .*'first.weight'"
        ):
            fit(SoupAverager(method="ema", **options))


def test_lawa_keeps_the_latest_whenever_a_greedy_soup_would_decide():
    passing = Passing()
    _, model = fit(passing, SoupAverager(method="lawa", last_k=2, greedy_at="snapshot"), epochs=4)
    near(weights_of(model), mean_of(passing.epochs[-2:]), PARAMETERS)


def test_masks_flags_counters_and_ties_survive_where_lightnings_average_spoils_them():
    passing, soup = Passing(), SoupAverager(method="swa")
    _, model = fit(passing, soup)
    near(weights_of(model), passing.steps[-1], ["mask", "flags", "steps"])
    assert model.tied.weight is model.last.weight
    theirs = User()
    del theirs.flags  # of booleans it can make no mean at all
    fit(WeightAveraging(), model=theirs)
    assert set(theirs.mask.tolist()) - {0.0, 1.0}  # the naive way: a mask of halves


# -- validation -------------------------------------------------------------------------------------------------------


def test_validation_sees_the_average_by_pointers_and_never_before_there_is_one():
    passing, soup = Passing(), SoupAverager(method="ema", decay=0.8, start_step=6, swap_for_validation=True)
    model, pointers = User(), set()
    optimizer_step = model.optimizer_step

    def step(*args, **kwargs):
        pointers.add(model.first.weight.data_ptr())
        return optimizer_step(*args, **kwargs)

    model.optimizer_step = step
    fit(passing, soup, model=model)
    assert len(pointers) == 1
    seen = model.seen[::2]  # the first of two batches of each validation
    assert seen[0] == passing.steps[3]["first.weight"][0, 0].item()  # nothing averaged yet: the weights themselves
    for epoch in (1, 2):
        expected = ema_by_hand(passing.steps[6 : 4 * (epoch + 1)], 0.8)["first.weight"][0, 0].item()
        assert seen[epoch] == pytest.approx(expected, abs=1e-6)
        assert seen[epoch] != passing.steps[4 * epoch + 3]["first.weight"][0, 0].item()
    late = User()
    initial = late.first.weight[0, 0].item()
    fit(EMAWeightAveraging(update_starting_at_step=6), model=late)
    assert late.seen[0] == pytest.approx(initial, abs=1e-7)  # the naive way: initial weights are validated


def test_an_exception_in_validation_leaves_the_raw_weights():
    passing, model = Passing(), User(fail_at=3)
    with pytest.raises(KeyboardError):
        fit(passing, SoupAverager(method="ema", decay=0.8, swap_for_validation=True), model=model)
    near(weights_of(model), passing.steps[-1])
    passing, model = Passing(), User(fail_at=7)  # in the validation of a candidate
    with pytest.raises(KeyboardError):
        fit(passing, SoupAverager(monitor="val_loss", mode="min"), model=model)
    near(weights_of(model), passing.steps[-1])


# -- greedy -----------------------------------------------------------------------------------------------------------


def val_loss(weights):
    model = User()
    model.load_state_dict(weights)
    model.eval()
    losses = [F.cross_entropy(model(x), y).item() for x, y in DataLoader(data(), 12)]
    return sum(losses) / len(losses)


def mean_of(states):
    mean = {k: v.clone() for k, v in states[-1].items()}
    for key in [*PARAMETERS, "tied.weight"]:
        mean[key] = torch.stack([s[key].double() for s in states]).mean(0).float()
    return mean


def greedy_by_hand(states):
    order = sorted(range(len(states)), key=lambda i: val_loss(states[i]))
    kept, best = [order[0]], val_loss(states[order[0]])
    for i in order[1:]:
        score = val_loss(mean_of([states[j] for j in [*kept, i]]))
        if score < best:
            kept.append(i)
            best = score
    return kept, best


@pytest.mark.parametrize("lr", [0.05, 0.5, 2.0])
@pytest.mark.parametrize("keep", ["cpu", "disk"])
def test_greedy_at_the_end_is_recipe_1(lr, keep, tmp_path):
    passing = Passing()
    soup = SoupAverager(monitor="val_loss", mode="min", keep=keep)
    _, model = fit(passing, soup, model=User(lr), epochs=6, folder=tmp_path)
    kept, best = greedy_by_hand(passing.epochs)
    assert soup.ingredients == [f"epoch={i:03d}-step={4 * (i + 1):07d}" for i in kept]
    assert soup.score == pytest.approx(best, abs=1e-6)
    near(weights_of(model), mean_of([passing.epochs[i] for i in kept]), PARAMETERS)
    assert soup.score <= min(val_loss(w) for w in passing.epochs) + 1e-6
    assert val_loss(weights_of(model)) == pytest.approx(soup.score, abs=1e-6)
    assert list(tmp_path.rglob("*.safetensors")) == []
    assert len(model.val_losses) == 2 * (6 + 5)  # six of the run's own, and five candidates


def test_snapshots_without_a_validation_of_their_own_are_validated_at_the_end():
    passing, soup = Passing(), SoupAverager(monitor="val_loss", mode="min", every_n_steps=3, last_k=3)
    fit(passing, soup)
    kept, best = greedy_by_hand(passing.steps[2::3][-3:])
    assert soup.score == pytest.approx(best, abs=1e-6)
    assert len(soup.trace) == 3
    own = {c.name: c.own_score for c in soup.trace}
    assert own["epoch=001-step=0000006"] == pytest.approx(val_loss(passing.steps[5]), abs=1e-6)  # not the epoch's score
    assert len(kept) == len(soup.ingredients)


@pytest.mark.parametrize("every", [{}, {"every_n_steps": 2}])
def test_greedy_at_snapshots_is_never_below_the_best_and_keeps_one_sum(every):
    for lr in (0.05, 0.5, 2.0):
        passing = Passing()
        soup = SoupAverager(monitor="val_loss", mode="min", greedy_at="snapshot", **every)
        _, model = fit(passing, soup, model=User(lr), epochs=5)
        snapshots = passing.steps[1::2] if every else passing.epochs
        assert soup.score <= min(val_loss(w) for w in snapshots) + 1e-6
        assert val_loss(weights_of(model)) == pytest.approx(soup.score, abs=1e-6)
        assert len(soup.trace) == len(snapshots)
        assert soup._soup.gathered.state().keys() == {"count", "sums", "ingredients"}
        kept = [int(name[-7:]) for name in soup.ingredients]
        near(weights_of(model), mean_of([passing.steps[i - 1] for i in kept]), PARAMETERS)


def test_candidates_leave_metrics_logs_random_numbers_and_other_callbacks_alone():
    class Counting(Callback):
        validations = 0

        def on_validation_end(self, trainer, pl_module):
            self.validations += 1

    def run(*soups):
        rows, counting = Rows(), Counting()
        stop = EarlyStopping("val_loss", patience=1, min_delta=10.0, check_on_train_epoch_end=False, strict=True)
        torch.manual_seed(5)
        trainer, _ = fit(counting, stop, *soups, logger=rows, epochs=4)
        metrics = {
            name: value.item() for name, value in trainer.callback_metrics.items() if not name.startswith("reg/")
        }
        users = [(s, {k: v for k, v in r.items() if not k.startswith("reg/")}) for s, r in rows.rows]
        logged = [(s, r) for s, r in users if set(r) - {"epoch"}]
        own = [r for _, r in rows.rows if "reg/model_soups/score" in r]
        return metrics, logged, counting.validations, stop.wait_count, torch.rand(3).tolist(), own

    plain = run()
    for when in ("end", "snapshot"):
        other = run(SoupAverager(monitor="val_loss", mode="min", greedy_at=when))
        assert other[:5] == plain[:5]
        (row,) = other[5]
        assert row["reg/model_soups/ingredients"] >= 1


class LossOnly(User):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


@pytest.mark.parametrize("greedy_at", ["end", "snapshot"])
@pytest.mark.parametrize(("kind", "metric"), [(User, "val_acc"), (LossOnly, "val_loss")])
def test_without_arguments_it_goes_by_what_validation_logs(kind, metric, greedy_at):
    mode = {"val_acc": "max", "val_loss": "min"}[metric]
    by_itself, told = (
        SoupAverager(greedy_at=greedy_at),
        SoupAverager(greedy_at=greedy_at, monitor=metric, mode=mode),
    )
    (_, one), (_, two) = fit(by_itself, model=kind()), fit(told, model=kind())
    assert by_itself.score == told.score
    assert by_itself.trace == told.trace
    near(one.state_dict(), two.state_dict())


def test_metric_that_nobody_logs_and_fits_without_validation_are_refused():
    with pytest.raises(
        MisconfigurationException, match=r"monitor='accuracy'\): validation logged no such metric, but .*val_acc"
    ):
        fit(SoupAverager(monitor="accuracy"))
    with pytest.raises(MisconfigurationException, match="'val_acc', but this fit has no validation"):
        fit(SoupAverager(), validate=False)
    with pytest.raises(MisconfigurationException, match="this fit has no validation"):
        fit(SoupAverager(), limit_val_batches=0)


def test_nothing_gathered_leaves_the_weights_and_says_so():
    passing = Passing()
    with pytest.warns(UserWarning, match=r"ended before the first snapshot \(start_step=100"):
        _, model = fit(passing, SoupAverager(method="swa", start_step=100))
    near(weights_of(model), passing.steps[-1])


def test_checkpoints_that_modelcheckpoint_keeps_are_the_ingredients(tmp_path):
    saver = ModelCheckpoint(tmp_path, "{epoch}", monitor="val_loss", save_top_k=3)
    passing, soup = Passing(), SoupAverager(monitor="val_loss", mode="min", from_checkpoints=True)
    _, model = fit(passing, saver, soup, epochs=6, model=User(0.5))
    best = sorted(range(6), key=lambda i: val_loss(passing.epochs[i]))[:3]
    kept, score = greedy_by_hand([passing.epochs[i] for i in sorted(best)])
    assert soup.ingredients == [f"epoch={sorted(best)[i]}.ckpt" for i in kept]
    assert soup.score == pytest.approx(score, abs=1e-6)
    near(weights_of(model), mean_of([passing.epochs[sorted(best)[i]] for i in kept]), PARAMETERS)
    uniform = SoupAverager(method="uniform", from_checkpoints=True)
    (tmp_path / "more").mkdir()
    saver = ModelCheckpoint(tmp_path / "more", "{epoch}", monitor="val_loss", save_top_k=3)
    _, model = fit(saver, uniform, epochs=6, model=User(0.5))
    near(weights_of(model), mean_of([passing.epochs[i] for i in sorted(best)]), PARAMETERS)
    with pytest.raises(MisconfigurationException, match="there is none among the callbacks"):
        fit(SoupAverager(method="uniform", from_checkpoints=True))


# -- batch norm -------------------------------------------------------------------------------------------------------


def test_batch_statistics_are_those_of_a_pass_over_the_training_data_under_the_average():
    passing, soup = Passing(), SoupAverager(method="uniform", monitor="val_loss")
    trainer, model = fit(passing, soup, model=User(0.5, norm=True), shuffle=False)
    fresh = User(norm=True)
    fresh.load_state_dict(weights_of(model))
    loader = DataLoader(data(), 6)
    with torch.no_grad():
        hidden = [fresh.first(x) for x, _ in loader]
    mean = torch.stack([h.double().mean(0) for h in hidden]).mean(0)
    variance = torch.stack([h.double().var(0) for h in hidden]).mean(0)
    near({"m": model.norm.running_mean}, {"m": mean}, rtol=1e-4, atol=1e-5)
    near({"v": model.norm.running_var}, {"v": variance}, rtol=1e-4, atol=1e-5)
    assert model.norm.num_batches_tracked.item() == 12
    assert model.norm.momentum == 0.1
    loss = trainer.validate(model, DataLoader(data(), 12), verbose=False)[0]["val_loss"]
    assert soup.score == pytest.approx(loss, abs=1e-6)
    for name in ("running_mean", "running_var"):  # averaged, as before the pass
        averaged = torch.stack([w[f"norm.{name}"].double() for w in passing.epochs]).mean(0)
        getattr(model.norm, name).copy_(averaged)
    loss = trainer.validate(model, DataLoader(data(), 12), verbose=False)[0]["val_loss"]
    assert soup.score_before_batch_norm == pytest.approx(loss, abs=1e-6)
    assert abs(soup.score - soup.score_before_batch_norm) > 1e-4


def test_batch_statistics_can_be_left_averaged_and_one_ingredient_keeps_its_own():
    passing = Passing()
    _, model = fit(passing, SoupAverager(method="uniform", bn_update_batches=0), model=User(norm=True))
    expected = torch.stack([w["norm.running_var"].double() for w in passing.epochs]).mean(0).float()
    assert torch.equal(model.norm.running_var, expected)
    passing = Passing()
    _, model = fit(passing, SoupAverager(method="lawa", last_k=1), model=User(norm=True))
    near(weights_of(model), passing.steps[-1])


def test_greedy_with_batch_norm_scores_what_it_ends_with():
    soup = SoupAverager(monitor="val_loss", mode="min")
    trainer, model = fit(soup, model=User(2.0, norm=True), epochs=6)
    assert len(soup.ingredients) > 1
    after = trainer.validate(model, DataLoader(data(), 12), verbose=False)[0]["val_loss"]
    assert after == pytest.approx(soup.score, abs=1e-6)
    assert soup.score_before_batch_norm != soup.score


# -- checkpoints ------------------------------------------------------------------------------------------------------


def run_to(folder, soup, epochs, ckpt=None, **options):
    saver = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer, model = fit(soup, saver, epochs=epochs, ckpt=ckpt, folder=folder, **options)
    trainer.save_checkpoint(folder / "end.ckpt")
    return model


def test_checkpoints_say_what_they_hold_and_give_the_average(tmp_path):
    passing, soup = Passing(), SoupAverager(method="uniform")
    trainer, model = fit(
        passing, soup, ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    )
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    middle, end = (torch.load(tmp_path / f, weights_only=True) for f in ("epoch=1.ckpt", "end.ckpt"))
    record = middle["lightning_reg"]["SoupAverager"]
    assert record["holds"] == "raw weights; 2 snapshots are in the callback's state"
    assert (record["averaged"], len(record["ingredients"])) == (False, 2)
    assert end["lightning_reg"]["SoupAverager"]["holds"] == "uniform average of 3 snapshots"
    near(middle["state_dict"], passing.epochs[1])
    near(load_averaged(tmp_path / "epoch=1.ckpt"), mean_of(passing.epochs[:2]), [*PARAMETERS, "tied.weight", "mask"])
    near(load_averaged(tmp_path / "end.ckpt"), weights_of(model))
    near(end["callbacks"]["SoupAverager"]["raw"], passing.steps[-1], PARAMETERS)
    User().load_state_dict(load_averaged(tmp_path / "epoch=1.ckpt"))
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    near(torch.load(tmp_path / "weights.ckpt", weights_only=True)["state_dict"], weights_of(model))
    with pytest.raises(ValueError, match="says nothing of an average"):
        load_averaged(tmp_path / "weights.ckpt")
    with pytest.raises(ValueError, match=r"has no average 'other', but \['SoupAverager'\]"):
        load_averaged(tmp_path / "end.ckpt", "other")


def test_every_method_gives_its_average_out_of_a_checkpoint(tmp_path):
    passing = Passing()
    soups = {
        "ema": SoupAverager(method="ema", decay=0.5, name="ema", load_at_end=False),
        "lawa": SoupAverager(method="lawa", last_k=2, name="lawa", load_at_end=False),
        "greedy": SoupAverager(monitor="val_loss", mode="min", name="greedy", load_at_end=False),
    }
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer, model = fit(passing, *soups.values(), saver)
    path = tmp_path / "epoch=1.ckpt"
    near(
        load_averaged(path, "SoupAverager[ema]"), ema_by_hand(passing.steps[:8], 0.5), PARAMETERS, rtol=1e-5, atol=1e-6
    )
    near(load_averaged(path, "SoupAverager[lawa]"), mean_of(passing.epochs[:2]), PARAMETERS)
    with pytest.raises(RuntimeError, match="a greedy soup is decided when the fit ends"):
        load_averaged(path, "SoupAverager[greedy]")
    with pytest.raises(ValueError, match="has several averages; give `name`"):
        load_averaged(path)
    near(weights_of(model), passing.steps[-1])  # none was to be loaded
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    kept, _ = greedy_by_hand(passing.epochs)
    expected = mean_of([passing.epochs[i] for i in kept])
    near(load_averaged(tmp_path / "end.ckpt", "SoupAverager[greedy]"), expected, PARAMETERS)
    near(soups["greedy"].averaged_weights(), expected, PARAMETERS)
    near(soups["lawa"].averaged_weights(), mean_of(passing.epochs[-2:]), PARAMETERS)


def test_two_that_load_at_the_end_are_refused():
    with pytest.raises(
        MisconfigurationException, match="SoupAverager and SoupAverager cannot stand together: each puts"
    ):
        fit(SoupAverager(method="ema", name="a"), SoupAverager(method="swa", name="b"))


@pytest.mark.parametrize("method", ["ema", "uniform", "greedy"])
def test_a_run_goes_on_from_its_end_with_the_raw_weights(method, tmp_path):
    def make():
        return SoupAverager(method=method, monitor="val_loss", mode="min")

    # The same batch in every step: what a resumed loader draws is not tested here.
    options = {"limit_train_batches": 1, "shuffle": False}
    whole = run_to(tmp_path / "whole", make(), 4, **options)
    run_to(tmp_path / "first", make(), 2, **options)
    resumed = run_to(tmp_path / "second", make(), 4, tmp_path / "first" / "end.ckpt", **options)
    near(weights_of(resumed), weights_of(whole), PARAMETERS)


def test_swapped_checkpoints_hold_what_was_validated_and_resume_from_the_raw_weights(tmp_path):
    passing = Passing()
    soup = SoupAverager(method="ema", decay=0.8, swap_for_validation=True)
    saver = ModelCheckpoint(tmp_path, "{epoch}", monitor="val_loss", save_top_k=-1)
    fit(passing, soup, saver)
    checkpoint = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    near(checkpoint["state_dict"], ema_by_hand(passing.steps[:8], 0.8), PARAMETERS, rtol=1e-5, atol=1e-6)
    assert torch.equal(checkpoint["state_dict"]["tied.weight"], checkpoint["state_dict"]["last.weight"])
    near(checkpoint["callbacks"]["SoupAverager"]["raw"], passing.steps[7], PARAMETERS)
    assert checkpoint["lightning_reg"]["SoupAverager"]["averaged"]
    again, other = Passing(), SoupAverager(method="ema", decay=0.8, swap_for_validation=True)
    start = []

    class AtStart(Callback):
        def on_train_start(self, trainer, pl_module):
            start.append(weights_of(pl_module))

    fit(other, again, AtStart(), ckpt=tmp_path / "epoch=1.ckpt")
    near(start[0], passing.steps[7], PARAMETERS)
    assert other._soup.gathered.taken == 12


def test_files_of_weights_only_are_warned_of(tmp_path):
    saver = ModelCheckpoint(tmp_path, save_weights_only=True)
    with pytest.warns(UserWarning, match="hold the raw weights, without the average"):
        trainer, model = fit(SoupAverager(method="ema", decay=0.5), saver)
    trainer.save_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    near(torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"], weights_of(model))


def test_the_state_of_another_method_is_refused(tmp_path):
    run_to(tmp_path, SoupAverager(method="uniform"), 2)
    with pytest.raises(MisconfigurationException, match=r"SoupAverager\(method='ema'\): .* method='uniform'"):
        fit(SoupAverager(method="ema"), ckpt=tmp_path / "epoch=0.ckpt")


# -- on disk ----------------------------------------------------------------------------------------------------------


def test_files_are_few_whole_and_gone_at_the_end_and_resume_needs_them(tmp_path):
    def make(**options):
        return SoupAverager(method="lawa", last_k=2, keep="disk", dirpath=str(tmp_path / "soups"), **options)

    (tmp_path / "ck").mkdir()
    counts = []

    class Look(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            counts.append(sorted(p.name for p in (tmp_path / "soups").rglob("*")))

    passing, saver = Passing(), ModelCheckpoint(tmp_path / "ck", "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    _, model = fit(passing, make(), Look(), saver, epochs=4)
    # The folder itself is one; beyond the last two snapshots those stay that the last two checkpoints name.
    assert [len(names) for names in counts] == [2, 3, 4, 5]
    near(weights_of(model), mean_of(passing.epochs[-2:]), PARAMETERS)
    assert list((tmp_path / "soups").iterdir()) == []
    with pytest.raises(MisconfigurationException, match=r"are not in .* any more"):
        fit(make(), ckpt=tmp_path / "ck" / "epoch=1.ckpt", epochs=4)
    with pytest.raises(FileNotFoundError, match=r"are not in .* any more"):
        load_averaged(tmp_path / "ck" / "epoch=1.ckpt")
    fit(make(keep_files=True), saver, epochs=2)
    (kept,) = (tmp_path / "soups").iterdir()
    assert len(list(kept.iterdir())) == 2


def test_two_runs_never_share_a_folder(tmp_path):
    for _ in range(2):
        fit(SoupAverager(method="lawa", keep="disk", keep_files=True), folder=tmp_path)
    assert len(list(tmp_path.glob("soup-*"))) == 2


# -- two processes ----------------------------------------------------------------------------------------------------


def on_two_ranks(greedy_at):
    rank = torch.distributed.get_rank()

    class Shifted(User):
        def validation_step(self, batch, batch_idx):
            loss = F.cross_entropy(self(batch[0]), batch[1])
            # Without sync_dist, and with another value on each rank: alone they would decide differently.
            self.log("val_loss", loss + (1 if rank else -1) * self.first.weight.sum().sin())

    soup = SoupAverager(monitor="val_loss", mode="min", greedy_at=greedy_at)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*sync_dist")
        warnings.filterwarnings("ignore", ".*does not have many workers")
        _, model = fit(soup, model=Shifted(0.5), epochs=4, devices=2, strategy="ddp", num_sanity_val_steps=0)
    return weights_of(model), soup.ingredients, [(c.name, c.own_score, c.score, c.accepted) for c in soup.trace]


def scores_on_two_ranks():
    score = 3.0 if torch.distributed.get_rank() else 1.0
    return agreed_score({"val_loss": torch.tensor(score)}, "val_loss", User())


def test_a_score_that_differs_on_the_ranks_is_their_mean(two_processes):
    assert two_processes.run(scores_on_two_ranks) == [2.0, 2.0]


@pytest.mark.parametrize("greedy_at", ["end", "snapshot"])
def test_ranks_decide_the_same_though_their_metrics_differ(two_processes, greedy_at):
    one, two = two_processes.run(on_two_ranks, greedy_at)
    assert one[1:] == two[1:]
    near(one[0], two[0], PARAMETERS)


def test_strategies_that_split_parameters_into_pieces_are_refused():
    class FSDPStrategy(SingleDeviceStrategy):
        pass

    trainer = Trainer(strategy=FSDPStrategy(torch.device("cpu")), logger=False, enable_checkpointing=False)
    with pytest.raises(MisconfigurationException, match="FSDPStrategy splits parameters into pieces"):
        SoupAverager(method="ema").check(trainer, User())


# -- use --------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LightningCLI, of jsonargparse
def test_yaml_reaches_the_arguments(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    config = tmp_path / "config.yaml"
    config.write_text(
        "trainer:\n  logger: false\n  callbacks:\n    - class_path: lightning_reg.SoupAverager\n"
        "      init_args: {method: ema, decay: 0.9, include: ['net.*']}\n"
    )
    cli = LightningCLI(
        User, args=["--config", str(config)], run=False, save_config_callback=None, seed_everything_default=1
    )
    soup = cli.trainer.callbacks[0]
    assert (type(soup), soup.method, soup.decay, soup.include) == (SoupAverager, "ema", 0.9, ["net.*"])


def test_contradictions_are_said():
    for options, sentence in [
        ({"every_n_epochs": 1, "every_n_steps": 1}, "exclude each other"),
        ({"method": "ema", "decay": 0.9, "half_life_steps": 3.0}, "say the same"),
        ({"swap_for_validation": True}, "would hide the snapshots' own score"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            SoupAverager(**options)


def test_a_second_fit_begins_anew():
    soup = SoupAverager(method="uniform")
    fit(soup)
    assert len(soup.ingredients) == 3
    fit(soup, epochs=2)
    assert len(soup.ingredients) == 2
    with pytest.raises(RuntimeError, match="the module holds the average"):
        soup.averaged_weights()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"method": "uniform", "from_checkpoints": True}, "uniform: checkpoints, loaded at the end"),
        ({"method": "uniform", "every_n_epochs": 2}, "uniform: every 2 epochs, loaded at the end"),
        ({"method": "lawa", "every_n_steps": 1}, "lawa: every step, latest 10, loaded at the end"),
        ({"monitor": "val_acc"}, "greedy: every epoch, by val_acc (max), loaded at the end"),
        ({"monitor": "val_loss"}, "greedy: every epoch, by val_loss (min), loaded at the end"),
        ({"monitor": "top1_error"}, "greedy: every epoch, by top1_error (min), loaded at the end"),
        ({"monitor": "val_loss", "mode": "max"}, "greedy: every epoch, by val_loss (max), loaded at the end"),
        ({}, "greedy: every epoch, by val_acc (max) or val_loss (min), loaded at the end"),
        ({"method": "ema"}, "ema: every step, decay 0.999, loaded at the end"),
    ],
)
def test_what_it_says(arguments, line):
    assert SoupAverager(**arguments).describe() == line
