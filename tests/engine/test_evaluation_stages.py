"""Techniques outside training: layers edited in validation, test and prediction; the module prepared for a fit."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.technique import BatchTechnique, LayerTechnique, Technique
from tests.toys import QUIET, Boom, BoomError, Classifier, fit, make_loader, make_tensors, make_trainer, same_weights

pytestmark = QUIET
ALL = ("train", "validate", "test", "predict")


class Seen(Classifier):
    """Notes what its network returns in each kind of step."""

    def __init__(self, **options):
        super().__init__(**options)
        self.outputs = {stage: [] for stage in ALL}

    def note(self, stage, x):
        self.outputs[stage].append(self(x).detach().clone())
        return self.outputs[stage][-1]

    def training_step(self, batch, batch_idx):
        x, y = batch
        output = self(x)
        self.outputs["train"].append(output.detach().clone())
        return F.cross_entropy(output, y)

    def validation_step(self, batch, batch_idx):
        self.note("validate", batch[0])

    def test_step(self, batch, batch_idx):
        self.note("test", batch[0])

    def predict_step(self, batch, batch_idx):
        return self.note("predict", batch[0])


class Shifts(LayerTechnique):
    """Adds one to what the last layer returns, in the stages that it is told."""

    def __init__(self, *stages, layers=("net.3",)):
        super().__init__()
        self.stages, self.layers, self.draws = frozenset(stages), layers, []

    def features_to_edit(self, module):
        return list(self.layers)

    def edit_features(self, call):
        assert call.step.stage in self.stages
        self.draws.append(torch.rand(2, generator=self.generator(call.step)))
        return call.output + 1.0


def run(technique, model=None, entry="fit"):
    model, trainer = model or Seen(lr=0.0), make_trainer(callbacks=[technique] if technique else [], max_epochs=1)
    if entry == "fit":
        trainer.fit(model, make_loader(), make_loader())
    else:
        getattr(trainer, entry)(model, make_loader(), **({} if entry == "predict" else {"verbose": False}))
    return model, trainer


def expected():
    return Seen().net(make_tensors()[0]).detach()


@pytest.mark.parametrize("stage", ["train", "validate"])
def test_a_fit_is_edited_in_its_stages_alone(stage):
    model, _ = run(Shifts(stage))
    for other in ("train", "validate"):
        shift = 1.0 if other == stage else 0.0
        got = torch.cat(model.outputs[other])
        torch.testing.assert_close(got[-32:], expected() + shift)
        torch.testing.assert_close(got[:16], expected()[:16] + shift)  # the sanity check is a validation too


@pytest.mark.parametrize("entry", ["validate", "test", "predict"])
def test_without_a_fit_each_stage_is_edited_if_it_is_named(entry):
    for stages, shift in (((entry,), 1.0), (ALL, 1.0), ({"validate", "test", "predict"} - {entry}, 0.0)):
        model, trainer = run(Shifts(*stages), entry=entry)
        torch.testing.assert_close(torch.cat(model.outputs[entry]), expected() + shift)
        assert "validation_step" not in vars(trainer.strategy)
        assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())
        assert [type(callback) for callback in trainer.callbacks if "lightning_reg" in type(callback).__module__] == []


def test_two_of_them_act_in_order_each_in_its_stages():
    class Doubles(Shifts):
        def __init__(self, *stages):
            super().__init__(*stages)
            self.name = "doubles"

        def edit_features(self, call):
            return 2.0 * call.output

    model, trainer = Seen(), make_trainer(callbacks=[Shifts("test"), Doubles("test", "predict")])
    trainer.test(model, make_loader(), verbose=False)
    trainer.predict(model, make_loader())
    torch.testing.assert_close(torch.cat(model.outputs["test"]), 2.0 * (expected() + 1.0))
    torch.testing.assert_close(torch.cat(model.outputs["predict"]), 2.0 * expected())


def test_draws_differ_by_batch_and_stage_and_are_the_same_again():
    one, two = Shifts("test"), Shifts("test")
    run(one, entry="test")
    run(two, entry="test")
    assert len({tuple(draw.tolist()) for draw in one.draws}) == 4
    torch.testing.assert_close(torch.stack(one.draws), torch.stack(two.draws), rtol=0, atol=0)
    other = Shifts("predict")
    run(other, entry="predict")
    assert not torch.equal(other.draws[0], one.draws[0])


def test_a_step_and_its_batch_are_let_go_when_it_is_over():
    class Watches(Shifts):
        def edit_features(self, call):
            self.step = weakref.ref(call.step)

        def on_test_batch_end(self, *_):
            self.draws.append(self.step())

    technique = Watches("test")
    run(technique, entry="test")
    assert technique.draws == [None] * 4


def test_an_inactive_one_leaves_evaluation_alone():
    class Off(Shifts):
        def is_active(self, step):
            return step.stage != "test"

    model, _ = run(Off("test", "predict"), entry="test")
    torch.testing.assert_close(torch.cat(model.outputs["test"]), expected())


def test_an_exception_in_a_test_takes_all_of_it_off():
    class Fails(Seen):
        def test_step(self, batch, batch_idx):
            super().test_step(batch, batch_idx)
            raise BoomError

    model, trainer = Fails(), make_trainer(callbacks=[Shifts("test")])
    with pytest.raises(BoomError):
        trainer.test(model, make_loader(), verbose=False)
    assert "test_step" not in vars(trainer.strategy)
    assert not any(layer._forward_hooks for layer in model.modules())
    assert len(trainer.callbacks) == len([c for c in trainer.callbacks if type(c).__name__ != "AroundEvaluation"])


class Counts(Shifts):
    """Logs the size of each batch that it edits."""

    def edit_features(self, call):
        call.step.log(self, "rows", torch.tensor(float(len(call.output))))
        return super().edit_features(call)


@pytest.mark.parametrize("entry", ["validate", "test"])
def test_what_is_logged_in_evaluation_is_the_mean_over_its_samples(entry):
    _, trainer = run(Counts(entry), entry=entry)
    x, _ = make_tensors()
    sizes = [len(batch[0]) for batch in make_loader()]
    mean = sum(size * size for size in sizes) / len(x)
    assert {name: value.item() for name, value in trainer.callback_metrics.items()} == {
        f"{Counts().log_key}/{entry}_rows": pytest.approx(mean)
    }


def test_a_prediction_has_no_log_and_a_fit_logs_its_validation_apart():
    run(Counts("predict"), entry="predict")
    _, trainer = run(Counts("train", "validate"))
    logged = {name for name in trainer.callback_metrics if name.endswith("rows")}
    assert logged == {f"{Counts().log_key}/rows", f"{Counts().log_key}/validate_rows"}


def test_two_that_cannot_stand_together_are_refused_without_a_fit_as_well():
    class Alone(Shifts):
        def conflict_with(self, other):
            return "one is enough."

    one, two = Alone("test"), Shifts("test")
    one.name = "one"
    trainer = make_trainer(callbacks=[one, two])
    with pytest.raises(MisconfigurationException, match=r"^Alone and Shifts cannot stand together: one is enough"):
        trainer.test(Seen(), make_loader(), verbose=False)


@pytest.mark.parametrize(("stage", "entry"), [("train", "fit"), ("test", "test")])
def test_a_layer_that_does_not_run_is_told_in_the_first_step(stage, entry):
    class Unused(Seen):
        def __init__(self):
            super().__init__()
            self.spare = torch.nn.Linear(2, 2)

    with pytest.raises(
        MisconfigurationException,
        match=rf"^Shifts changes what 'spare' returns, and none of them ran in the first {stage}",
    ):
        run(Shifts(stage, layers=["spare"]), Unused(), entry)
    run(Shifts(stage, layers=["spare", "net.3"]), Unused(), entry)  # one of them ran
    with pytest.raises(MisconfigurationException, match=r"net\.33"):
        run(Shifts(stage, layers=["net.33"]), entry=entry)


@pytest.mark.parametrize("stage", ["train", "test"])
def test_a_network_that_was_compiled_before_is_refused_and_a_new_one_edited(stage):
    torch.compiler.reset()
    model, entry = Seen(lr=0.0), "fit" if stage == "train" else stage
    model.net = torch.compile(model.net, backend="eager")
    run(None, model, entry)
    with pytest.raises(MisconfigurationException, match=r"call `torch\.compiler\.reset\(\)` first"):
        run(Shifts(stage), model, entry)
    torch.compiler.reset()
    model.outputs[stage].clear()
    run(Shifts(stage), model, entry)
    torch.testing.assert_close(torch.cat(model.outputs[stage]), expected() + 1.0)


class Adds(BatchTechnique):
    """Adds one to the inputs, in the stages that it is told."""

    def __init__(self, *stages):
        super().__init__()
        self.stages = frozenset(stages)

    def transform_batch(self, batch, step):
        assert step.stage in self.stages
        return batch[0] + 1.0, batch[1]


@pytest.mark.parametrize("entry", ["validate", "test", "predict"])
def test_a_batch_is_changed_in_the_stages_that_are_named(entry):
    x = make_tensors()[0]
    for stages, shift in (((entry,), 1.0), ({"train", "validate", "test", "predict"} - {entry}, 0.0)):
        model, trainer = run(Adds(*stages), entry=entry)
        torch.testing.assert_close(torch.cat(model.outputs[entry]), Seen().net(x + shift).detach())
        assert "validation_step" not in vars(trainer.strategy)


def test_a_batch_of_training_is_left_alone_by_one_that_names_others():
    model, _ = run(Adds("validate"))
    x = make_tensors()[0]
    torch.testing.assert_close(torch.cat(model.outputs["train"]), Seen().net(x).detach())
    torch.testing.assert_close(torch.cat(model.outputs["validate"])[-32:], Seen().net(x + 1.0).detach())


# -- layers that run again in the backward pass, and what they are given ----------------------------------------------


class Noise(LayerTechnique):
    """Multiplies what the first layer returns by draws of its own; nothing of it needs to be kept."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def features_to_edit(self, module):
        return ["net.0"]

    def edit_features(self, call):
        self.calls.append((call.step.batches_so_far, call.number, call.input.shape))
        return call.output * torch.rand(call.output.shape, generator=self.generator(call.step))


def through(how, manual=False):
    def step(module, batch):
        loss = F.cross_entropy(module.net[1:](how(module.net[0], batch[0])), batch[1])
        if manual:
            module.optimizers().zero_grad()
            module.manual_backward(loss)
            module.optimizers().step()
        return loss

    model = Classifier(step)
    model.automatic_optimization = not manual
    return model


@pytest.mark.parametrize("manual", [False, True])
def test_a_checkpointed_layer_is_changed_in_the_same_way_when_it_runs_again(manual):
    plain, again, techniques = through(lambda f, x: f(x), manual), through(checkpointed, manual), (Noise(), Noise())
    for model, technique in zip((plain, again), techniques, strict=True):
        fit(model, technique)
    assert same_weights(plain, again)
    assert techniques[1].calls == [call for call in techniques[0].calls for _ in range(2)]


def checkpointed(layer, x):
    return checkpoint(layer, x, use_reentrant=False)


def test_a_reentrant_checkpoint_is_refused():
    model = through(lambda f, x: checkpoint(f, x.requires_grad_(), use_reentrant=True))
    with pytest.raises(MisconfigurationException, match=r"^Noise changes what 'net\.0' returns.*`use_reentrant=False`"):
        fit(model, Noise())


def test_a_layer_that_is_called_with_names_alone_is_changed():
    plain, named, techniques = through(lambda f, x: f(x)), through(lambda f, x: f(input=x)), (Noise(), Noise())
    for model, technique in zip((plain, named), techniques, strict=True):
        fit(model, technique)
    assert same_weights(plain, named)
    assert techniques[0].calls == techniques[1].calls


# -- the module before a fit ------------------------------------------------------------------------------------------


class Freezes(Technique):
    """Freezes the first layer for the fit."""

    def __init__(self):
        super().__init__()
        self.found = []

    def prepare_model(self, module):
        self.found.append(module.net[0].weight.detach().clone())
        module.net[0].requires_grad_(False)

    def teardown(self, trainer, pl_module, stage):
        pl_module.net[0].requires_grad_(True)


class Chooses(Classifier):
    """Hands the optimizer what is to be trained."""

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def test_the_model_is_prepared_before_its_optimizers_are_made():
    model = Chooses()
    first = model.net[0].weight.detach().clone()
    trainer = fit(model, Freezes(), max_epochs=1)
    assert [len(group["params"]) for group in trainer.optimizers[0].param_groups] == [2]
    assert torch.equal(model.net[0].weight, first)
    assert model.net[0].weight.requires_grad
    assert "setup" not in vars(trainer.strategy)


def test_the_model_is_prepared_with_the_weights_of_the_checkpoint(tmp_path):
    trainer = fit(Chooses(), Freezes(), max_epochs=1)
    trained = trainer.lightning_module.net[0].weight.detach() + 1.0
    trainer.lightning_module.net[0].weight.data.copy_(trained)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    resumed = Freezes()
    make_trainer(callbacks=[resumed], max_epochs=2).fit(Chooses(seed=1), make_loader(), ckpt_path=tmp_path / "end.ckpt")
    assert torch.equal(resumed.found[0], trained)


def test_after_a_failed_fit_the_strategy_is_as_it_was():
    trainer = make_trainer(callbacks=[Freezes()])
    with pytest.raises(BoomError):
        trainer.fit(Chooses(step=Boom()), make_loader())
    assert "setup" not in vars(trainer.strategy)
