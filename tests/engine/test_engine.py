"""One training step: what each phase changes, against the same written by hand in ``training_step``."""

import types

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from typing_extensions import override

from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.run.phases import phases_of
from lightning_reg.engine.technique import BatchTechnique, Technique, WeightTechnique
from tests.engine.by_hand import CASES, by_hand_all, by_hand_term
from tests.toys import (
    BATCH,
    QUIET,
    BatchShift,
    Classifier,
    Halve,
    LossRecorder,
    Penalty,
    ShiftTargets,
    StepLosses,
    Term,
    Watch,
    WeightsByLabel,
    WeightsByPosition,
    fit,
    make_loader,
    make_tensors,
    make_trainer,
    same_weights,
    weights_of,
)

pytestmark = QUIET


@pytest.mark.parametrize("case", CASES)
def test_each_phase_trains_like_the_same_written_by_hand(case):
    kinds, by_hand = CASES[case]
    ours, hand, plain = Classifier(), Classifier(step=by_hand), Classifier()
    our_losses, hand_losses = StepLosses(), StepLosses()
    fit(ours, *(kind() for kind in kinds), our_losses)
    fit(hand, hand_losses)
    fit(plain)
    assert not same_weights(hand, plain, atol=1e-3)
    # float32, 8 steps: a mean and a sum divided by the count round differently.
    assert same_weights(ours, hand, atol=1e-6)
    assert our_losses.losses == pytest.approx(hand_losses.losses, abs=2e-6)
    assert len(our_losses.losses) == 8


@pytest.mark.parametrize("case", ["term", "targets", "batch", "edited weights", "features"])
def test_the_same_operations_are_the_same_to_the_last_bit(case):
    kinds, by_hand = CASES[case]
    ours, hand = Classifier(), Classifier(step=by_hand)
    fit(ours, *(kind() for kind in kinds))
    fit(hand)
    assert same_weights(ours, hand)


def test_all_phases_against_a_loop_without_lightning():
    ours, theirs = Classifier(), Classifier()
    fit(ours, *(kind() for kind in CASES["all"][0]))
    optimizer = torch.optim.SGD(theirs.parameters(), lr=theirs.lr)
    x, y = make_tensors()
    for _ in range(2):
        for start in range(0, len(x), BATCH):
            optimizer.zero_grad()
            by_hand_all(theirs, (x[start : start + BATCH], y[start : start + BATCH])).backward()
            optimizer.step()
    assert same_weights(ours, theirs, atol=1e-6)  # float32, 8 steps


def test_a_technique_that_only_looks_changes_nothing():
    ours, plain = Classifier(dropout=0.5), Classifier(dropout=0.5)
    recorder = LossRecorder()
    fit(ours, recorder, loader=make_loader(shuffle=True))
    fit(plain, loader=make_loader(shuffle=True))
    assert same_weights(ours, plain)
    assert [losses.shape for losses in recorder.losses] == [(BATCH,)] * 8


def test_an_inactive_technique_is_not_asked():
    class Late(Term):
        @override
        def is_active(self, step):
            return step.global_step >= 4

    class Never(WeightsByLabel):
        @override
        def is_active(self, step):
            return False

    ours = Classifier()
    fit(ours, Late(), Never())
    hand = Classifier(step=lambda m, b: by_hand_term(m, b) if m.global_step >= 4 else F.cross_entropy(m(b[0]), b[1]))
    fit(hand)
    assert same_weights(ours, hand)


def test_an_inactive_editor_does_not_edit():
    class LateHalve(Halve):
        @override
        def is_active(self, step):
            return step.global_step >= 4

    ours, plain, edited = Classifier(), Classifier(), Classifier()
    fit(ours, LateHalve(), Term(), max_epochs=1)
    fit(plain, Term(), max_epochs=1)
    assert same_weights(ours, plain)
    fit(ours, LateHalve(), Term())
    fit(edited, Halve(), Term())
    assert not same_weights(ours, edited, atol=1e-3)


@pytest.mark.parametrize("options", [{"fast_dev_run": 3}, {"log_every_n_steps": 0}, {"detect_anomaly": True}], ids=str)
def test_smaller_options_of_the_trainer(options):
    ours, hand = Classifier(), Classifier(step=by_hand_all)
    fit(ours, *(kind() for kind in CASES["all"][0]), **options)
    fit(hand, **options)
    assert not same_weights(hand, Classifier(), atol=1e-3)
    assert same_weights(ours, hand, atol=1e-6)  # float32, at most 8 steps


def test_phases_are_read_off_the_overridden_methods():
    assert phases_of(Technique()) == ()
    assert phases_of(Halve) == ("edit_weights",)
    assert [phases_of(kind()) for kind in (BatchShift, ShiftTargets, WeightsByLabel, Term, Penalty)] == [
        ("transform_batch",),
        ("change_targets",),
        ("sample_weights",),
        ("loss_term",),
        ("penalty",),
    ]


@pytest.mark.parametrize(
    ("name", "base"),
    [("loss_term", "LossTechnique"), ("feature_layers", "LossTechnique"), ("pull_back", "WeightMapTechnique")],
)
def test_a_phase_without_its_base_class_is_refused(name, base):
    with pytest.raises(TypeError, match=f"Half overrides `{name}` of {base}: inherit from that"):
        type("Half", (Technique,), {name: lambda self, *args: None})


def names(kinds):
    return "+".join(kind.__name__ for kind in kinds)


# -- what training_step returns ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [[Term], [Penalty], [Term, Penalty]], ids=names)
@pytest.mark.parametrize("mapping", [dict, types.MappingProxyType])  # Lightning takes any Mapping
def test_a_returned_mapping_is_trained_on_and_stays_as_it_is(kinds, mapping):
    given = []

    def step(module, batch):
        output = {"loss": F.cross_entropy(module(batch[0]), batch[1]), "note": len(given)}
        given.append((output, output["loss"]))
        return mapping(output) if mapping is not dict else output

    notes = []

    class Notes(Callback):
        @override
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            notes.append(outputs["note"])

    ours, plain = Classifier(step=step), Classifier()
    fit(ours, *(kind() for kind in kinds), Notes())
    fit(plain, *(kind() for kind in kinds))
    assert same_weights(ours, plain)
    assert notes == list(range(8))
    assert all(output["loss"] is loss for output, loss in given)
    assert all(set(output) == {"loss", "note"} for output, _ in given)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("kinds", [[Term], [Penalty], [WeightsByLabel, Penalty], [Halve]], ids=names)
def test_a_skipped_step_is_skipped(kinds):
    class Skipping(Classifier):
        @override
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    ours, hand, losses = Skipping(), Classifier(), StepLosses()
    fit(ours, *(kind() for kind in kinds), losses)
    x, y = make_tensors()
    even = torch.arange(len(x)) // BATCH % 2 == 0
    fit(hand, *(kind() for kind in kinds), loader=make_loader(torch.utils.data.TensorDataset(x[even], y[even])))
    assert same_weights(ours, hand)
    assert [loss is None for loss in losses.losses] == [False, True] * 4


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_fit_of_skipped_steps_leaves_the_weights_alone():
    ours = Classifier(step=lambda module, batch: None)
    before = weights_of(ours)
    fit(ours, Term(), Penalty(), Halve())
    assert same_weights(ours, before)


def test_an_editor_without_a_parameter_to_edit_changes_nothing():
    ours, plain = Classifier(), Classifier()
    fit(ours, Halve(names=()))
    fit(plain)
    assert same_weights(ours, plain)


# -- composition ------------------------------------------------------------------------------------------------------


def test_techniques_of_a_phase_act_in_the_order_of_the_list():
    order = []

    class First(Term, BatchTechnique, WeightTechnique):
        @override
        def transform_batch(self, batch, step):
            order.append(("batch", self.name))
            return batch[0] * 2 + len(order), batch[1]

        @override
        def loss_term(self, call):
            order.append(("term", self.name))

        @override
        def weights_to_edit(self, module):
            return ["net.0.weight"]

        @override
        def edit_weights(self, weights):
            order.append(("edit", self.name))

    class Second(First):
        pass

    fit(Classifier(), Second(name="a"), First(name="b"), Second(name="c"), max_steps=1)
    assert order == [(phase, name) for phase in ("batch", "edit", "term") for name in "abc"]


def test_weights_multiply_and_terms_add():
    ours, hand = (
        Classifier(),
        Classifier(
            step=lambda module, batch: (
                (
                    (1 + 0.5 * batch[1])
                    * (1 + torch.arange(len(batch[1])) / len(batch[1]))
                    * F.cross_entropy(module(batch[0]), batch[1], reduction="none")
                ).mean()
                + (0.3 * module(batch[0]).square().mean(1)).mean()
            )
        ),
    )
    fit(ours, WeightsByLabel(), Term(0.1), WeightsByPosition(), Term(0.2, name="more"))
    fit(hand)
    assert same_weights(ours, hand, atol=1e-6)  # float32, 8 steps


def test_two_that_change_the_targets_are_refused_by_name():
    class OtherTargets(ShiftTargets):
        pass

    text = "ShiftTargets and OtherTargets cannot stand together: each replaces the targets of the loss"
    with pytest.raises(MisconfigurationException, match=text):
        fit(Classifier(), ShiftTargets(), OtherTargets())


def test_the_same_class_twice_needs_a_name():
    text = "Term and Term in one Trainer share the log key 'reg/term'. Tell them apart by `name=\"...\"`."
    with pytest.raises(MisconfigurationException) as caught:
        fit(Classifier(), Term(name="a"), Term(), Term(name="b"), Term())
    assert str(caught.value) == text
    # Lightning itself refuses two callbacks of one state key only where it writes them: names make the keys differ.
    assert (Term(name="a").state_key, Term().state_key) == ("Term[a]", "Term")


@pytest.mark.parametrize("first", [True, False])
def test_a_technique_may_refuse_another(first):
    class Jealous(Term):
        @override
        def conflict_with(self, other):
            return "there can be one only." if isinstance(other, Penalty) else None

    fit(Classifier(), Jealous(), WeightsByLabel(), max_steps=1)
    pair = [Jealous(), Penalty()] if first else [Penalty(), Jealous()]
    with pytest.raises(MisconfigurationException) as caught:
        fit(Classifier(), *pair)
    names = " and ".join(type(t).__name__ for t in pair)
    assert str(caught.value) == f"{names} cannot stand together: there can be one only."


def test_check_refuses_before_anything_is_attached():
    class Picky(Term):
        @override
        def check(self, trainer, module):
            assert "training_step" not in trainer.strategy.__dict__
            raise MisconfigurationException(f"Picky does not like {type(module).__name__}.")

    with pytest.raises(MisconfigurationException, match="Picky does not like Classifier"):
        fit(Classifier(), Picky())


def test_setup_cannot_be_overridden():
    with pytest.raises(TypeError, match="Own must not override `setup`"):

        class Own(Term):
            def setup(self, trainer, pl_module, stage):
                pass


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"loss": -1}, "Term: `loss` must be a whole number in [0, inf), got -1."),
        ({"loss": True}, "Term: `loss` must be a whole number in [0, inf), got True."),
        ({"seed": 0.5}, "Term: `seed` must be a whole number in [0, inf), got 0.5."),
    ],
)
def test_a_bad_argument_is_refused_at_construction(kwargs, text):
    with pytest.raises(ValueError, match="Term") as caught:
        Term(**kwargs)
    assert str(caught.value) == text


def test_a_wrong_layer_or_parameter_lists_near_ones():
    with pytest.raises(MisconfigurationException, match=r"No layer is named 'net.9'. Near names: 'net.\d'"):
        fit(Classifier(), Watch("net.9"))
    with pytest.raises(MisconfigurationException, match=r"No parameter is named 'net.0.wait'. Near names: 'net.0.weig"):
        fit(Classifier(), Halve(["net.0.wait"]))


def test_layers_of_configure_model_are_found():
    class Later(Classifier):
        def __init__(self):
            super().__init__()
            del self.net

        @override
        def configure_model(self):
            if not hasattr(self, "net"):
                self.net = Classifier().net

    ours, hand = Later(), Classifier()
    fit(ours, Watch(), Halve())
    fit(hand, Watch(), Halve())
    assert same_weights(ours, hand)


def test_a_trainer_without_techniques_is_left_alone():
    trainer = make_trainer(callbacks=[StepLosses()])
    trainer.fit(Classifier(), make_loader())
    assert isinstance(trainer.lightning_module, LightningModule)
    assert "training_step" not in trainer.strategy.__dict__
