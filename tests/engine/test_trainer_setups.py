"""The engine under the Trainer's options, compiled modules, loggers and resumes, against the same by hand."""

import contextlib
import io
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.tuner import Tuner
from typing_extensions import override

from lightning_reg import (
    EWC,
    ELRCallback,
    ELRPlusCallback,
    FeatureDistillation,
    L2ToStart,
    PredictionDistillation,
    WeightCompander,
)
from tests.engine.by_hand import CASES
from tests.toys import (
    QUIET,
    BatchShift,
    Boom,
    BoomError,
    Classifier,
    Halve,
    LossRecorder,
    Penalty,
    ShiftTargets,
    StepLosses,
    Term,
    WeightsByLabel,
    WeightsByPosition,
    fit,
    make_loader,
    make_trainer,
    same_weights,
    weights_of,
)

pytestmark = QUIET


@pytest.mark.parametrize("case", ["term", "weights", "penalty", "edited weights", "all"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 4}, {"gradient_clip_val": 0.1}],
    ids=["plain", "accumulation", "clipping"],
)
def test_options_of_the_trainer(case, precision, options):
    kinds, by_hand = CASES[case]
    ours, hand, plain = Classifier(), Classifier(step=by_hand), Classifier()
    our_losses, hand_losses = StepLosses(), StepLosses()
    fit(ours, *(kind() for kind in kinds), our_losses, precision=precision, **options)
    fit(hand, hand_losses, precision=precision, **options)
    fit(plain, precision=precision, **options)
    assert not same_weights(hand, plain, atol=1e-3)
    # float32 rounding over at most 8 steps; where it flips the last bit of a bf16 gradient, that is 2**-8 of it.
    atol = 1e-6 if precision == "32-true" else 2e-3
    assert same_weights(ours, hand, atol=atol)
    assert our_losses.losses == pytest.approx(hand_losses.losses, abs=2 * atol)
    assert all(value.dtype == torch.float32 for value in ours.state_dict().values())


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
@pytest.mark.parametrize("kinds", [[WeightsByLabel], [LossRecorder], [LossRecorder, WeightsByLabel, Term]])
def test_neutral_settings_are_nothing_to_the_last_bit(kinds, precision):
    neutral = {WeightsByLabel: lambda: WeightsByLabel(0.0), LossRecorder: LossRecorder, Term: lambda: Term(0.0)}
    ours, plain = Classifier(), Classifier()
    fit(ours, *(neutral[kind]() for kind in kinds), precision=precision)
    fit(plain, precision=precision)
    assert same_weights(ours, plain)


class SecondOrder(Classifier):
    """LBFGS calls the closure, and so the training step, several times per batch."""

    @override
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


@pytest.mark.parametrize("case", ["term", "edited weights", "all"])
def test_an_optimizer_that_calls_the_step_several_times(case):
    kinds, by_hand = CASES[case]
    ours, hand = SecondOrder(), SecondOrder(step=by_hand)
    fit(ours, *(kind() for kind in kinds), max_epochs=1)
    fit(hand, max_epochs=1)
    assert not same_weights(hand, Classifier(), atol=1e-3)
    assert same_weights(ours, hand, atol=1e-5)  # float32, 12 evaluations with line search directions in between


# -- torch.compile ----------------------------------------------------------------------------------------------------


def compile_net(module):
    module.net = torch.compile(module.net, backend="aot_eager")
    return module


def compile_module(module):
    return torch.compile(module, backend="aot_eager")


def compile_in_place(module):
    module.net.compile(backend="aot_eager")
    return module


class CompiledLoss(Classifier):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.loss = torch.compile(F.cross_entropy, backend="aot_eager")

    @override
    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0]), batch[1])


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Dynamo's own remarks about Lightning's code, and the deprecations that its tracing meets.
@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::DeprecationWarning:torch")
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("compiled", ["net", "module", "in place", "loss"])
def test_compiled_modules_train_like_uncompiled_ones(compiled):
    kinds = [WeightsByLabel, Term, ShiftTargets, Penalty, Halve, BatchShift]
    ways = {"net": compile_net, "module": compile_module, "in place": compile_in_place, "loss": lambda module: module}
    inner, plain = (CompiledLoss() if compiled == "loss" else Classifier()), Classifier()
    ours, hand = StepLosses(), StepLosses()
    recorder = LossRecorder()
    fit(ways[compiled](inner), *(kind() for kind in kinds), recorder, ours)
    fit(plain, *(kind() for kind in kinds), hand)
    assert ours.losses == pytest.approx(hand.losses, abs=1e-6)  # float32: fused kernels may round differently
    trained = {name.replace("_orig_mod.", ""): value for name, value in inner.state_dict().items()}
    assert same_weights(trained, plain.state_dict(), atol=1e-6)
    assert len(recorder.losses) == 8


# -- edited weights outside of training steps -------------------------------------------------------------------------


class Looking(Classifier):
    """Notes the first weight wherever Lightning calls it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen = defaultdict(list)

    def note(self, where):
        self.seen[where].append(self.net[0].weight.detach().clone())

    @override
    def training_step(self, batch, batch_idx):
        self.note("step")
        return super().training_step(batch, batch_idx)

    @override
    def validation_step(self, batch, batch_idx):
        self.note("validation")

    @override
    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.note("batch end")

    @override
    def on_save_checkpoint(self, checkpoint):
        self.note("checkpoint")


def test_validation_sees_the_effective_weights_and_checkpoints_the_dense_ones(tmp_path):
    module = Looking()
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    at_end = ModelCheckpoint(tmp_path, filename="val-{epoch}", every_n_epochs=1, save_top_k=-1)
    trainer = make_trainer(
        callbacks=[Halve(["net.0.weight"]), saving, at_end], enable_checkpointing=True, num_sanity_val_steps=1
    )
    start = weights_of(module)["net.0.weight"]
    trainer.fit(module, make_loader(), make_loader(batch_size=32))
    dense = [start, *module.seen["batch end"]]
    assert len(dense) == 9
    assert all(torch.equal(seen, 0.5 * dense[i]) for i, seen in enumerate(module.seen["step"]))
    validated = [start, dense[4], dense[8]]  # the sanity check, then each epoch's end
    assert len(module.seen["validation"]) == 3
    assert all(torch.equal(seen, 0.5 * w) for seen, w in zip(module.seen["validation"], validated, strict=True))
    for step in range(1, 9):
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["state_dict"]
        assert list(saved) == list(Classifier().state_dict())
        assert torch.equal(saved["net.0.weight"], dense[step])
    for epoch in range(2):
        saved = torch.load(tmp_path / f"val-epoch={epoch}.ckpt", weights_only=True)["state_dict"]
        assert torch.equal(saved["net.0.weight"], dense[4 * epoch + 4])
    assert torch.equal(module.net[0].weight, dense[8])


@pytest.mark.filterwarnings(r"ignore:`.fit\(ckpt_path=None\)` was called without a model", "ignore:.*No checkpoint")
def test_a_checkpoint_written_on_an_exception_holds_dense_weights(tmp_path):
    module = Looking(step=Boom(at=3))
    with pytest.raises(BoomError):
        make_trainer(
            callbacks=[Halve(["net.0.weight"]), OnExceptionCheckpoint(tmp_path)], enable_checkpointing=True
        ).fit(module, make_loader(), make_loader())
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)["state_dict"]["net.0.weight"]
    assert torch.equal(saved, module.seen["batch end"][1])


# -- what is logged ---------------------------------------------------------------------------------------------------


class Notes(Logger):
    """Keeps what Lightning hands to a logger: ``{step: {key: value}}``."""

    name, version = "notes", 0

    def __init__(self):
        super().__init__()
        self.steps = {}

    @override
    def log_metrics(self, metrics, step=None):
        values = {key: value for key, value in metrics.items() if key != "epoch"}
        if values:
            self.steps[step] = values

    @override
    def log_hyperparams(self, params, *args, **kwargs):
        pass


class Logging(Classifier):
    """Logs its own loss, and keeps what it is made of."""

    def __init__(self):
        super().__init__()
        self.base, self.term = [], []

    @override
    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        with torch.no_grad():
            self.base.append(F.cross_entropy(logits, y).item())
            self.term.append(0.1 * logits.square().mean().item())
        loss = F.cross_entropy(logits, y)
        self.log("train_loss", loss)
        return loss


def test_scalars_are_logged_on_logging_steps():
    notes, module, penalty = Notes(), Logging(), Penalty()
    fit(module, Term(), penalty, Term(0.0, name="zero"), logger=notes, log_every_n_steps=3)
    assert list(notes.steps) == [2, 5]
    for step, values in notes.steps.items():
        assert set(values) == {
            "train_loss",
            "reg/loss/base",
            "reg/loss/total",
            "reg/term/term",
            "reg/term_zero/term",
            "reg/penalty/penalty",
        }
        assert values["reg/loss/base"] == pytest.approx(module.base[step], abs=1e-6)
        assert values["reg/term/term"] == pytest.approx(module.term[step], abs=1e-6)
        assert values["reg/term_zero/term"] == 0.0
        assert values["train_loss"] == pytest.approx(module.base[step] + module.term[step], abs=1e-6)
        total = values["train_loss"] + values["reg/penalty/penalty"]
        assert values["reg/loss/total"] == pytest.approx(total, abs=1e-6)


def test_the_users_own_logged_loss_is_the_total():
    notes = Notes()
    fit(Logging(), Term(), WeightsByLabel(), ShiftTargets(), logger=notes)
    assert list(notes.steps) == list(range(8))
    for values in notes.steps.values():
        assert values["train_loss"] == values["reg/loss/total"]
        assert abs(values["reg/loss/total"] - values["reg/loss/base"]) > 0.1


def test_a_penalty_alone_logs_its_loss():
    notes, module = Notes(), Logging()
    fit(module, Penalty(), logger=notes, max_epochs=1)
    for step, values in notes.steps.items():
        assert values["reg/loss/base"] == pytest.approx(module.base[step], abs=1e-6)
        assert values["reg/loss/total"] == pytest.approx(module.base[step] + values["reg/penalty/penalty"], abs=1e-6)


def test_accumulation_does_not_scale_what_is_logged():
    notes, module = Notes(), Logging()
    fit(module, Term(), logger=notes, accumulate_grad_batches=4)
    # Optimizer steps end at batches 4 and 8; Lightning writes what these batches logged.
    assert [values["reg/loss/base"] for values in notes.steps.values()] == pytest.approx(
        [module.base[3], module.base[7]], abs=1e-6
    )
    assert [values["reg/term/term"] for values in notes.steps.values()] == pytest.approx(
        [module.term[3], module.term[7]], abs=1e-6
    )


def test_a_csv_logger_gets_the_scalars(tmp_path):
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    fit(Logging(), Term(), logger=logger, max_epochs=1)
    lines = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    assert set(lines[0].split(",")) == {
        "epoch",
        "step",
        "train_loss",
        "reg/loss/base",
        "reg/loss/total",
        "reg/term/term",
    }
    assert len(lines) == 5


@pytest.mark.parametrize("summary", [True, False])
def test_the_table_is_printed_with_the_model_summary(summary):
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        fit(Classifier(), Term(0.25), WeightsByPosition(name="x"), enable_model_summary=summary)
    start = text.getvalue().partition("lightning_reg, at the end")[0]
    lines = [line for line in start.splitlines() if "Term" in line or "WeightsByPosition" in line]
    if not summary:
        assert "lightning_reg" not in text.getvalue()
        assert lines == []
        return
    assert start.count("lightning_reg") == 1
    term, weights = lines
    assert [cell.strip() for cell in term.split("│")[1:-1]] == ["Term", "the loss", "-", "factor=0.25"]
    cells = [cell.strip() for cell in weights.split("│")[1:-1]]
    assert cells == ["WeightsByPosition [x]", "weights of samples", "-", ""]


# -- random draws -----------------------------------------------------------------------------------------------------


class Drawing(Term):
    """Draws numbers of its own in every step, and adds nothing."""

    def __init__(self, **kwargs):
        super().__init__(0.0, **kwargs)
        self.draws = {}

    @override
    def loss_term(self, call):
        generator = self.generator(call.step)
        self.draws[call.step.global_step] = torch.rand(2, generator=generator).tolist()
        assert self.generator(call.step, same_on_ranks=True).initial_seed() == generator.initial_seed()  # rank 0


def test_draws_do_not_disturb_the_global_random_state():
    ours, plain = Classifier(dropout=0.5), Classifier(dropout=0.5)
    fit(ours, Drawing(), loader=make_loader(shuffle=True))
    fit(plain, loader=make_loader(shuffle=True))
    assert same_weights(ours, plain)


def test_draws_depend_on_step_name_and_seed_only():
    first, again, other, seeded = Drawing(), Drawing(), Drawing(name="other"), Drawing(seed=1, name="seeded")
    fit(Classifier(), first, seed=1)
    fit(Classifier(), again, other, seeded, seed=2)
    assert first.draws == again.draws
    everything = [tuple(draw) for technique in (first, other, seeded) for draw in technique.draws.values()]
    assert len(set(everything)) == 24


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("stop", [3, 4])
def test_a_resumed_run_draws_what_the_uninterrupted_one_draws(stop, tmp_path):
    whole, before, after = Drawing(), Drawing(), Drawing()
    fit(Classifier(), whole)
    saving = {"dirpath": tmp_path, "every_n_train_steps": stop, "filename": "{step}", "save_top_k": -1}
    fit(Classifier(), before, ModelCheckpoint(**saving), max_steps=stop, enable_checkpointing=True)
    resumed = make_trainer(callbacks=[after, ModelCheckpoint(**saving)], enable_checkpointing=True)
    resumed.fit(Classifier(), make_loader(), ckpt_path=tmp_path / f"step={stop}.ckpt")
    assert sorted(after.draws) == list(range(stop, 8))
    assert before.draws | after.draws == whole.draws


def test_batches_are_counted_over_accumulation():
    class Counting(Term):
        counts = ()

        @override
        def loss_term(self, call):
            self.counts += ((call.step.batches_so_far, call.step.global_step, call.step.epoch),)

    counting = Counting()
    fit(Classifier(), counting, accumulate_grad_batches=2)
    assert counting.counts == tuple((n + 1, n // 2, n // 4) for n in range(8))


# -- Lightning's learning-rate finder ---------------------------------------------------------------------------------


def search(trainer, module, how):
    if how == "tuner":
        Tuner(trainer).lr_find(module, make_loader(), num_training=5, update_attr=False)
    trainer.fit(module, make_loader())


@pytest.mark.filterwarnings("ignore:.*suggestion:UserWarning", "ignore:.*`weights_only` was not set")
@pytest.mark.parametrize("how", ["tuner", "first", "last"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: L2ToStart(1.0),
        lambda: EWC(10.0),
        lambda: PredictionDistillation(new_classes=[3, 0]),
        lambda: FeatureDistillation("net.0", anchor="start_of_fit"),
        lambda: WeightCompander(a=0.8, b=0.4),
        lambda: WeightCompander(a=0.8, b=0.4, learn=True),
        ELRCallback,
        ELRPlusCallback,
    ],
    ids=["l2", "ewc", "predictions", "features", "compander", "learned compander", "elr", "elr+"],
)
def test_a_fit_after_a_search_for_the_learning_rate_is_that_without_it(make, how, tmp_path):
    ends = []
    for found in (False, True):
        module, technique = Classifier(lr=0.1), make()
        fit(module, technique)  # the first task
        trainer = make_trainer(callbacks=[technique], default_root_dir=tmp_path)
        if found and how != "tuner":
            finder = LearningRateFinder(num_training_steps=5, update_attr=False)
            trainer.callbacks.insert(0 if how == "first" else 1, finder)
        search(trainer, module, how if found else "not at all")
        ends.append(module)
    assert same_weights(*ends)
