"""References: frozen first weights, one pass a batch for all that ask."""

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.optim import SGD

from lightning_reg.engine.host.modules import checksum as exact_checksum
from lightning_reg.engine.layers.outputs import given_outputs
from lightning_reg.engine.networks.named_weights import weights_of
from lightning_reg.engine.networks.peer import Peer
from lightning_reg.engine.networks.references import PLACES, Reference, ReferenceTechnique
from lightning_reg.engine.technique import LossTechnique
from tests.toys import BATCH, QUIET, Classifier, _Toy, fit, make_loader, make_trainer, same_weights

pytestmark = QUIET


class Compares(_Toy, ReferenceTechnique, LossTechnique):
    """Notes what the first network made of each batch; changes nothing."""

    def __init__(self, layers=("net.3",), place="device", **kwargs):
        super().__init__(**kwargs)
        self.reference, self.sights, self.sums = Reference(layers, place), [], []

    @property
    def references(self):
        return [self.reference]

    def loss_term(self, call):
        sight = self.sight(call.step, self.reference)
        self.sights.append(sight.features.get("net.3") if self.reference.layers else sight.call.logits)
        self.sums.append(checksum(self.reference.weights))

    def state_dict(self):
        return {"reference": self.reference.state_dict()}

    def load_state_dict(self, state):
        self.reference.load_state_dict(state["reference"])


class Normed(Classifier):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.net[1] = nn.BatchNorm1d(8)


@pytest.fixture
def passes(monkeypatch):
    """Counts the passes of second networks."""
    counted, own = [], Peer.see
    monkeypatch.setattr(Peer, "see", lambda self, *a, **k: (counted.append(1), own(self, *a, **k))[1])
    return counted


def checksum(weights):
    return sum(value.double().abs().sum().item() for value in weights.values())


def inputs():
    return [x for x, _ in make_loader()]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_it_is_the_network_of_the_first_batch_and_the_module_does_not_notice(precision):
    plain, watched, untrained = Normed(dropout=0.3), Normed(dropout=0.3), Normed(dropout=0.3).eval()
    fit(plain, precision=precision)
    technique = Compares()
    fit(watched, technique, precision=precision)
    assert same_weights(plain, watched)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"):
        wanted = [untrained(x) for x in inputs() * 2]
    assert all(torch.equal(one, two) for one, two in zip(technique.sights, wanted, strict=True))
    assert len({*technique.sums, checksum(technique.reference.weights)}) == 1
    assert not any(seen.requires_grad for seen in technique.sights)


class SeesMore(Compares):
    """Its reference sees inputs that are shifted."""

    def reference_batch(self, step):
        return [step.batch[0] + 1, *step.batch[1:]]


@pytest.mark.parametrize("layers", [["net.3"], []])
def test_a_technique_says_what_its_references_see(layers, passes):
    module, first, (same, other) = Classifier(), Classifier(), (Compares(layers), SeesMore(layers, name="more"))
    fit(module, same, other, max_epochs=1)
    with torch.no_grad():
        for technique, shift in ((same, 0), (other, 1)):
            wanted = [first(x + shift) for x in inputs()]
            torch.testing.assert_close(technique.sights, wanted, atol=1e-6, rtol=1e-6)  # rows of other products
    assert len(passes) == 2 * len(inputs())
    plain = Classifier()
    fit(plain, max_epochs=1)
    assert same_weights(plain, module)  # the step has its own batch again


def test_all_first_weights_are_taken_at_the_first_batch_after_every_load():
    class Loads(Callback):
        def on_train_start(self, trainer, pl_module):
            with torch.no_grad():
                for p in pl_module.parameters():
                    p.fill_(0.5)

    technique, model = Compares(), Classifier()
    fit(model, technique, Loads(), max_epochs=1)
    assert {*technique.reference.weights} == {*model.state_dict()}
    assert all((value == 0.5).all() for value in technique.reference.weights.values())


def test_however_many_ask_there_is_one_pass_a_batch_and_one_memory(passes):
    asking = [Compares(name="a"), Compares(["net.0"], name="b"), Compares((), name="c"), Compares((), name="d")]
    fit(Classifier(), *asking, max_epochs=1)
    assert len(passes) == len(inputs())
    assert all(torch.equal(asking[0].sights[i], asking[2].sights[i]) for i in range(len(inputs())))
    assert len({id(technique.reference.weights) for technique in asking}) == 1


def test_other_weights_and_another_place_have_a_pass_of_their_own(passes):
    asking = [Compares(name="a"), Compares(place="bfloat16", name="b")]
    fit(Classifier(), *asking, max_epochs=1)
    assert len(passes) == 2 * len(inputs())
    assert asking[1].reference.bytes * 2 == asking[0].reference.bytes
    assert {value.dtype for value in asking[1].reference.weights.values()} == {torch.bfloat16}
    rounded = Classifier().bfloat16().float()
    with torch.no_grad():
        assert torch.equal(asking[1].sights[0], rounded(inputs()[0]))


def test_a_further_fit_has_the_weights_of_the_first_one():
    technique, model = Compares(), Classifier()
    fit(model, technique, max_epochs=1)
    before = checksum(technique.reference.weights)
    fit(model, technique, max_epochs=1)
    assert checksum(technique.reference.weights) == before
    with torch.no_grad():
        assert torch.equal(technique.sights[-1], Classifier()(inputs()[-1]))


def test_a_resumed_fit_has_those_that_were_saved_once_in_the_file(tmp_path):
    whole = [Compares(name="a"), Compares(name="b")]
    one = Classifier()
    fit(one, *whole)
    half = [Compares(name="a"), Compares(name="b")]
    trainer = fit(Classifier(), *half, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    states = torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"].values()
    kept = [state["reference"]["net.0.weight"] for state in states if "reference" in state]
    memories = [value.untyped_storage().data_ptr() for value in kept]
    assert len(memories) == 2
    assert len({*memories}) == 1
    resumed, two = [Compares(name="a"), Compares(name="b")], Classifier(seed=5)
    make_trainer(callbacks=resumed).fit(two, make_loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert same_weights(one, two)
    for technique, other in zip(whole, resumed, strict=True):
        ends = technique.sights[len(inputs()) :]
        assert all(torch.equal(a, b) for a, b in zip(ends, other.sights, strict=True))
    assert resumed[0].reference.weights is resumed[1].reference.weights


def test_it_is_in_no_key_no_optimizer_and_no_average():
    technique, model = Compares(), Classifier()
    trainer = fit(model, technique, max_epochs=1)
    assert {*model.state_dict()} == {*Classifier().state_dict()}
    held = {p.data_ptr() for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert isinstance(trainer.optimizers[0], SGD)
    assert not held & {value.data_ptr() for value in technique.reference.weights.values()}
    assert len(technique.sights[0]) == BATCH


class Gradients(Callback):
    """Keeps what the optimizer gets in each step."""

    def __init__(self):
        self.kept = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.kept.append([p.grad.clone() for p in pl_module.parameters()])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("place", PLACES)
def test_the_users_gradient_is_the_same_to_the_last_bit(precision, place):
    without, beside = Gradients(), Gradients()
    fit(Normed(dropout=0.3), without, precision=precision, max_epochs=1)
    fit(Normed(dropout=0.3), beside, Compares(place=place), Compares((), name="b"), precision=precision, max_epochs=1)
    assert len(without.kept) == len(inputs())
    for one, two in zip(without.kept, beside.kept, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_its_checksum_is_that_of_the_first_weights_during_and_after_a_fit_that_goes_on(tmp_path):
    first = exact_checksum(weights_of(Normed()))

    class Sums(Compares):
        def loss_term(self, call):
            self.sums.append(exact_checksum(self.reference.weights))

    technique = Sums()
    trainer = fit(Normed(), technique, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, model = Sums(), Normed(seed=5)
    make_trainer(callbacks=[resumed]).fit(model, make_loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert technique.sums == resumed.sums == [first] * len(inputs())
    assert exact_checksum(technique.reference.weights) == exact_checksum(resumed.reference.weights) == first
    assert exact_checksum(weights_of(model)) != first


def test_given_outputs_are_where_the_arguments_are_by_position_or_by_name():
    """As of a tower of texts after a resume: they come from the file, on the CPU."""

    class Texts(nn.Module):
        def forward(self, input_ids):
            return input_ids

    model, texts = nn.Sequential(Texts()), torch.zeros(2, 3, device="meta")
    with given_outputs(model, {"0": torch.zeros(2, 3)}, "Owner"):
        assert model[0](texts).device == model[0](input_ids=texts).device == texts.device
