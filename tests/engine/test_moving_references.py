"""References that move: averages that follow each optimizer step, and means of a window of snapshots."""

import copy
import math

import pytest
import torch
from torch import nn

from lightning_reg.engine.networks.moving import AverageReference, AverageReferenceTechnique, WindowReference
from lightning_reg.engine.networks.peer import Peer
from lightning_reg.engine.technique import LossTechnique
from tests.toys import QUIET, Callback, Classifier, _Toy, fit, make_loader, make_trainer, same_weights, weights_of

pytestmark = QUIET


def two_beside_the_newest(taken):
    return 2


class Compares(_Toy, AverageReferenceTechnique, LossTechnique):
    """Notes what a moving network made of each batch; changes nothing."""

    def __init__(self, reference, **kwargs):
        super().__init__(**kwargs)
        self.reference, self.sights, self.seen = reference, [], []

    @property
    def references(self):
        return [self.reference]

    def loss_term(self, call):
        self.sights.append(self.sight(call.step, self.reference).features["net.3"])
        self.seen.append({name: value.clone() for name, value in self.reference.weights.items()})

    def state_dict(self):
        return {"reference": self.reference.state_dict()}

    def load_state_dict(self, state):
        self.reference.load_state_dict(state["reference"])


class Normed(Classifier):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.net[1] = nn.BatchNorm1d(8)


class Before(Callback):
    """The weights that each batch begins with."""

    def __init__(self):
        self.weights = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.weights.append(weights_of(pl_module))


def average(**options):
    return Compares(AverageReference(0.5, ["net.3"], **options))


def scheduled():
    return average(end=0.9, length=8)


def window(largest=2, decay=0.25, every=2, place="device", **options):
    return Compares(WindowReference(two_beside_the_newest, largest, decay, every, ["net.3"], place), **options)


@pytest.fixture
def passes(monkeypatch):
    """Counts the passes of second networks."""
    counted, own = [], Peer.see
    monkeypatch.setattr(Peer, "see", lambda self, *a, **k: (counted.append(1), own(self, *a, **k))[1])
    return counted


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("make", [average, window])
def test_the_module_does_not_notice_and_the_network_is_that_of_the_weights(make, precision):
    plain, watched, technique = Normed(dropout=0.3), Normed(dropout=0.3), make()
    fit(plain, precision=precision)
    fit(watched, technique, precision=precision)
    assert same_weights(plain, watched)
    assert {*watched.state_dict()} == {*Normed().state_dict()}
    seen_through = Normed().eval()
    for (x, _), sight, weights in zip([*make_loader()] * 2, technique.sights, technique.seen, strict=True):
        seen_through.load_state_dict(weights)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"):
            assert torch.equal(sight, seen_through(x))
    assert not any(sight.requires_grad for sight in technique.sights)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize("every", [1, 2])
def test_an_average_follows_each_optimizer_step_with_its_momentum(every, shape):
    technique, before = average(end=0.9, length=4, shape=shape), Before()
    fit(Normed(), technique, before, accumulate_grad_batches=every)
    mean = {name: value.double() for name, value in before.weights[0].items()}
    for batch, weights in enumerate(before.weights):
        if batch and batch % every == 0:
            share = min((batch // every - 1) / 4, 1)
            share = share if shape == "linear" else (1 - math.cos(math.pi * share)) / 2
            d = 0.5 + 0.4 * share
            for name, value in weights.items():
                is_buffer = "running" in name or "tracked" in name
                mean[name] = value.double() if is_buffer else d * mean[name] + (1 - d) * value.double()
        if batch % every == 0:  # buffers move with every batch, and are taken with the step
            for name, value in technique.seen[batch].items():
                torch.testing.assert_close(value.double(), mean[name], atol=1e-6, rtol=0.0)  # float32, 8 steps
    assert technique.reference.count == 8 // every


def test_an_average_is_float32_where_the_module_is_not():
    technique = average()
    fit(Classifier(), technique, precision="bf16-true")
    assert {value.dtype for value in technique.reference.weights.values()} == {torch.float32}


def test_a_window_is_an_average_that_starts_at_its_oldest_snapshot():
    technique, before = window(), Before()
    fit(Normed(), technique, before)
    taken = before.weights[::2]
    for batch, seen in enumerate(technique.seen):
        held = taken[: batch // 2 + 1][-3:]
        for name, value in seen.items():
            mean = held[0][name].double()
            for snapshot in held[1:]:
                mean = 0.25 * mean + 0.75 * snapshot[name].double()
            mean = held[-1][name].double() if "tracked" in name else mean
            torch.testing.assert_close(value.double(), mean, atol=1e-6, rtol=0.0)  # float32
    assert technique.reference.taken == 4
    assert len(technique.reference.snapshots) == 3
    one = sum(value.nbytes for value in before.weights[0].values())
    assert technique.reference.bytes == 4 * one


def test_snapshots_of_epochs_are_the_weights_that_they_begin_with():
    technique, before = window(every="epoch"), Before()
    fit(Classifier(), technique, before, max_epochs=3)
    starts = before.weights[::4]
    held = technique.reference.snapshots
    assert all(same_weights(one, two) for one, two in zip(held, starts, strict=True))


def test_a_window_of_one_is_the_newest_and_equal_ones_are_themselves():
    newest = window(largest=0)
    before = Before()
    fit(Classifier(), newest, before)
    assert all(same_weights(seen, before.weights[b // 2 * 2]) for b, seen in enumerate(newest.seen))
    still = window()
    fit(Classifier(lr=0.0), still)
    assert all(same_weights(seen, still.seen[0]) for seen in still.seen)


@pytest.mark.parametrize("make", [average, window])
def test_those_that_ask_for_the_same_share_one_pass_and_one_memory(make, passes):
    alone = make()
    fit(Classifier(), alone)
    passes.clear()
    asking = [Compares(copy.deepcopy(make().reference), name=name) for name in "ab"]
    fit(Classifier(), *asking)
    assert len(passes) == 8
    assert asking[0].reference.weights is asking[1].reference.weights
    for one in asking:
        assert all(torch.equal(a, b) for a, b in zip(one.sights, alone.sights, strict=True))
    if make is window:
        for one, two in zip(*(one.reference.snapshots for one in asking), strict=True):
            assert all(value.data_ptr() == two[name].data_ptr() for name, value in one.items())


def test_another_average_has_memory_of_its_own(passes):
    asking = [Compares(AverageReference(d, ["net.3"]), name=f"{d}") for d in (0.5, 0.9)]
    fit(Classifier(), *asking)
    assert len(passes) == 16
    assert not same_weights(*(one.reference.weights for one in asking))


def within_a_period():
    return window(every=3)


@pytest.mark.parametrize("make", [scheduled, within_a_period])
def test_a_resumed_fit_goes_on_to_the_last_bit(make, tmp_path):
    whole, one = make(), Normed()
    fit(one, whole, max_epochs=3)
    half = make()
    fit(Normed(), half, max_epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    resumed, two = make(), Normed(seed=5)
    trainer = make_trainer(callbacks=[resumed], max_epochs=3)
    trainer.fit(two, make_loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert same_weights(one, two)
    assert all(torch.equal(a, b) for a, b in zip(whole.sights[4:], resumed.sights, strict=True))
    assert same_weights(whole.reference.weights, resumed.reference.weights)


def test_snapshots_lie_where_they_are_asked_to():
    technique = window(place="cpu_bfloat16")
    fit(Classifier(), technique)
    assert {value.dtype for held in technique.reference.snapshots for value in held.values()} == {torch.bfloat16}
    assert technique.reference.describe() == "up to 3 snapshots, one per 2 steps"
    assert average(end=0.9, length=4).reference.describe() == "average of decay 0.5 to 0.9 in 4 steps"


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"decay": 1.1}, "decay"),
        ({"decay": 0.5, "end": -0.1, "length": 1}, "end"),
        ({"decay": 0.5, "end": 0.9}, "length"),
        ({"decay": 0.5, "shape": "step"}, "shape"),
    ],
)
def test_bad_arguments(arguments, name):
    with pytest.raises(ValueError, match=f"AverageReference: `{name}` must be"):
        AverageReference(**arguments)
