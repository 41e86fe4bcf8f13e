"""Inputs of named layers, changed: by position, by name, nested; in every stage; where a layer runs again."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.technique import LayerTechnique
from tests.toys import QUIET, Classifier, fit, make_loader, make_tensors, make_trainer, same_weights

pytestmark = QUIET


class Adds(LayerTechnique):
    """Adds to the first argument of a layer."""

    def __init__(self, value=1.0, layer="net.3", stages=("train",), factor=1.0, name=None):
        super().__init__(name=name)
        self.value, self.layer, self.stages, self.factor = value, layer, frozenset(stages), factor
        self.numbers = []

    def inputs_to_edit(self, module):
        return [self.layer]

    def edit_inputs(self, call):
        assert call.step.stage in self.stages
        self.numbers.append(call.number)
        return call.with_input(self.factor * call.input + self.value)


def added(value, factor=1.0, **options):
    """The same in the user's own code."""

    def step(module, batch):
        return F.cross_entropy(module.net[3](factor * module.net[:3](batch[0]) + value), batch[1])

    return Classifier(step, **options)


def test_two_act_in_the_order_of_the_callbacks():
    for first, second, hand in (
        (Adds(1.0, name="one"), Adds(0.0, factor=2.0), added(2.0, 2.0)),
        (Adds(0.0, factor=2.0), Adds(1.0, name="one"), added(1.0, 2.0)),
    ):
        model = Classifier()
        fit(model, first, second)
        fit(hand)
        assert same_weights(model, hand)


def test_an_input_and_an_output_of_one_layer():
    class Both(Adds):
        def features_to_edit(self, module):
            return ["net.3"]

        def edit_features(self, call):
            self.numbers.append((call.number, call.input.clone()))
            return 0.5 * call.output

    model, technique, seen = Classifier(), Both(), []
    model.net[3].register_forward_pre_hook(lambda layer, args: seen.append(args[0].clone()))
    fit(model, technique, max_epochs=1)
    assert technique.numbers[0] == 0
    assert technique.numbers[1][0] == 1
    assert torch.equal(technique.numbers[1][1], seen[0] + 1.0)  # the output's edit sees what the layer was given


class Takes(nn.Module):
    """A layer with nested arguments."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, state, *, scale=1.0, extra=None):
        return scale * self.linear(state["rows"][0]) + (0.0 if extra is None else extra)


class Nested(Classifier):
    """Hands its layer a dictionary with a list, by position or by name, and further arguments by name."""

    def __init__(self, by_name=False, value=0.0, scale=1.0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.takes = Takes()
        self.by_name, self.value, self.scale, self.given = by_name, value, scale, []

    def training_step(self, batch, batch_idx):
        rows = self.net[0](batch[0])
        state = {"rows": [rows + self.value, "kept"]}
        self.given.append((state, state["rows"][0].detach().clone()))
        logits = self.takes(state=state, scale=self.scale) if self.by_name else self.takes(state, scale=self.scale)
        return F.cross_entropy(logits, batch[1])


class ChangesNested(Adds):
    def edit_inputs(self, call):
        args, named = call.with_input({"rows": [call.input["rows"][0] + self.value, *call.input["rows"][1:]]})
        return args, {**named, "scale": 2.0 * named["scale"]}


@pytest.mark.parametrize("by_name", [False, True])
def test_arguments_by_position_by_name_and_nested(by_name):
    model, hand = Nested(by_name), Nested(value=1.0, scale=2.0)
    fit(model, ChangesNested(layer="takes"))
    fit(hand)
    assert same_weights(model, hand)
    assert all(torch.equal(state["rows"][0], kept) for state, kept in model.given)  # what was given stays as it was


def test_a_layer_without_arguments_gets_one():
    class Constant(nn.Module):
        def forward(self, value=0.0):
            return torch.zeros(()) + value

    class Model(Classifier):
        def __init__(self):
            super().__init__()
            self.constant, self.values = Constant(), []

        def training_step(self, batch, batch_idx):
            self.values.append(float(self.constant()))
            return super().training_step(batch, batch_idx)

    class Gives(Adds):
        def edit_inputs(self, call):
            assert call.input is None
            return call.with_input(3.0)

    model = Model()
    fit(model, Gives(layer="constant"), max_epochs=1)
    assert model.values == [3.0] * 4


@pytest.mark.parametrize("entry", ["validate", "test", "predict"])
def test_without_a_fit_each_stage_is_edited_if_it_is_named(entry):
    class Model(Classifier):
        def __init__(self):
            super().__init__()
            self.outputs = []

        def validation_step(self, batch, batch_idx):
            self.outputs.append(self(batch[0]))
            return self.outputs[-1].mean()

        test_step = predict_step = validation_step

    for stages, shift in (((entry,), 1.0), ({"train", "validate", "test", "predict"} - {entry}, 0.0)):
        model, technique = Model(), Adds(stages=stages)
        trainer = make_trainer(callbacks=[technique])
        getattr(trainer, entry)(model, make_loader(), **({} if entry == "predict" else {"verbose": False}))
        wanted = model.net[3](model.net[:3](make_tensors()[0]) + shift)
        torch.testing.assert_close(torch.cat(model.outputs), wanted)
        assert not any(layer._forward_pre_hooks for layer in model.modules())


class Noise(Adds):
    """Multiplies the input by draws of its own."""

    def edit_inputs(self, call):
        self.numbers.append((call.step.batches_so_far, call.number))
        return call.with_input(call.input * torch.rand(call.input.shape, generator=self.generator(call.step)))


def through(how):
    def step(module, batch):
        return F.cross_entropy(module.net[3](how(module.net[2], module.net[:2](batch[0]))), batch[1])

    return Classifier(step)


def test_a_checkpointed_layer_is_given_the_same_when_it_runs_again():
    plain, again = through(lambda f, x: f(x)), through(lambda f, x: checkpoint(f, x, use_reentrant=False))
    techniques = [(Noise(layer="net.2"), Adds(layer="net.3", name="adds")) for _ in range(2)]
    for model, (noise, adds) in zip((plain, again), techniques, strict=True):
        fit(model, noise, adds)
    assert same_weights(plain, again)
    assert techniques[1][0].numbers == [call for call in techniques[0][0].numbers for _ in range(2)]
    assert techniques[1][1].numbers == techniques[0][1].numbers == [1] * 8


def test_a_reentrant_checkpoint_is_refused():
    model = through(lambda f, x: checkpoint(f, x, use_reentrant=True))
    with pytest.raises(MisconfigurationException, match=r"^Noise changes what 'net\.2' is given, .*`use_reentrant=F"):
        fit(model, Noise(layer="net.2"))


def test_a_layer_that_does_not_run_or_is_not_there_is_refused():
    model = Classifier()
    model.spare = nn.Linear(2, 2)
    with pytest.raises(MisconfigurationException, match=r"^Adds changes what 'spare' is given, and none of them ran"):
        fit(model, Adds(layer="spare"))
    with pytest.raises(MisconfigurationException, match=r"net\.33"):
        fit(Classifier(), Adds(layer="net.33"))
