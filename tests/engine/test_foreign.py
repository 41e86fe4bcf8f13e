"""Foreign frozen networks: made by an import path, asked once a batch, outside of everything."""

import pytest
import torch
from torch import nn

from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.modules import checksum
from lightning_reg.engine.networks.foreign import ForeignNetwork, MadeNetwork
from lightning_reg.engine.networks.references import Reference, ReferenceTechnique
from lightning_reg.engine.technique import LossTechnique
from tests.toys import INPUTS, QUIET, Classifier, _Toy, fit, make_loader, make_trainer, same_weights

pytestmark = QUIET
HERE = "tests.engine.test_foreign"


def teacher(width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(INPUTS, width), nn.BatchNorm1d(width), nn.Dropout(0.5), nn.Linear(width, 2))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return net


def no_module():
    return lambda x: x


class Asks(_Toy, ReferenceTechnique, LossTechnique):
    def __init__(self, *references, **kwargs):
        super().__init__(**kwargs)
        self.asked, self.seen = references, []

    @property
    def references(self):
        return self.asked

    def loss_term(self, call):
        self.seen.append([self.sight(call.step, reference).features for reference in self.asked])

    def state_dict(self):
        return {"asked": [reference.state_dict() for reference in self.asked]}

    def load_state_dict(self, state):
        for reference, one in zip(self.asked, state["asked"], strict=True):
            reference.load_state_dict(one)


@pytest.fixture
def passes(monkeypatch):
    counted, own = [], MadeNetwork.see
    monkeypatch.setattr(MadeNetwork, "see", lambda self, *a: (counted.append(self), own(self, *a))[1])
    return counted


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_it_is_the_network_by_hand_and_the_module_does_not_notice(precision):
    plain, watched, expected = Classifier(dropout=0.3), Classifier(dropout=0.3), teacher().eval()
    fit(plain, precision=precision)
    foreign = ForeignNetwork(f"{HERE}.teacher", layers=["0"])
    technique = Asks(foreign)
    trainer = fit(watched, technique, precision=precision)
    assert same_weights(plain, watched)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"):
        wanted = [(expected(x), expected[0](x)) for x, _ in make_loader()] * 2
    for [found], (output, first) in zip(technique.seen, wanted, strict=True):
        assert torch.equal(found[""], output)
        assert torch.equal(found["0"], first)
        assert not found[""].requires_grad
    assert foreign.hash == checksum(expected.state_dict())  # which has batch norm's statistics
    assert foreign.bytes == sum(value.nbytes for value in expected.state_dict().values())
    assert {*watched.state_dict()} == {*Classifier().state_dict()}
    assert len(trainer.optimizers[0].param_groups[0]["params"]) == len([*watched.parameters()])
    assert foreign.describe() == "teacher, 0.0 MiB"


def test_those_that_mean_the_same_share_one_pass_a_batch(passes):
    path = f"{HERE}.teacher"
    asking = [
        Asks(ForeignNetwork(path), Reference(["net.3"]), name="a"),
        Asks(ForeignNetwork(path), name="b"),
        Asks(ForeignNetwork(path, {"seed": 1}), name="c"),
    ]
    fit(Classifier(), *asking, max_epochs=1)
    batches = len(make_loader())
    assert len(passes) == 2 * batches
    assert len({*passes}) == 2
    assert asking[0].seen[0][0][""] is asking[1].seen[0][0][""]
    assert {*asking[0].seen[0][1]} == {"net.3"}
    assert not torch.equal(asking[2].seen[0][0][""], asking[1].seen[0][0][""])


@pytest.mark.parametrize("place", ["cpu", "bfloat16", "cpu_bfloat16"])
def test_its_weights_lie_where_they_are_told_to(place):
    foreign = ForeignNetwork(f"{HERE}.teacher", place=place)
    technique = Asks(foreign)
    fit(Classifier(), technique, max_epochs=1)
    expected = teacher().eval()
    if "bfloat16" in place:
        expected = expected.bfloat16().float()
    x = next(iter(make_loader()))[0]
    torch.testing.assert_close(technique.seen[0][0][""], expected(x).detach())
    whole = sum(value.nbytes for value in teacher().state_dict().values() if value.is_floating_point())
    assert foreign.bytes == whole // (2 if "bfloat16" in place else 1) + 8  # batch norm's count of batches
    assert ("on the CPU" in foreign.describe(), "in bfloat16" in foreign.describe()) == ("cpu" in place, "16" in place)


def test_a_fit_goes_on_with_the_same_network_only(tmp_path):
    trainer = fit(Classifier(), Asks(ForeignNetwork(f"{HERE}.teacher")), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")

    def go_on(**arguments):
        technique = Asks(ForeignNetwork(f"{HERE}.teacher", arguments))
        trainer = make_trainer(callbacks=[technique])
        trainer.fit(Classifier(), make_loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
        return technique

    assert len(go_on().seen) == len(make_loader())
    with pytest.raises(MisconfigurationException, match="is another one than in the fit that goes on"):
        go_on(seed=1)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        (f"{HERE}.no_module", "must make a torch module, and made a function"),
        (f"{HERE}.nobody", "names no function"),
    ],
)
def test_what_is_no_network_is_refused_in_words(path, says):
    with pytest.raises(MisconfigurationException, match=says):
        fit(Classifier(), Asks(ForeignNetwork(path)))
