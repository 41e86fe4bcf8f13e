"""A second network's pass has no more of a graph than tells which loss calls have a gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_reg import LossMixin
from lightning_reg.engine.host.autograd import nearest_leaf
from lightning_reg.engine.networks.peer import Peer
from lightning_reg.engine.networks.places import Places
from lightning_reg.engine.networks.references import Reference, ReferenceTechnique
from lightning_reg.engine.technique import BatchTechnique, LossTechnique
from tests.toys import CLASSES, QUIET, Classifier, _Toy, fit, make_loader

pytestmark = QUIET
BATCHES = len(make_loader())


class Frozen(_Toy, ReferenceTechnique, LossTechnique):
    """Notes the loss call of the first network in each batch."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.reference, self.calls = Reference(), []

    @property
    def references(self):
        return [self.reference]

    def loss_term(self, call):
        self.calls.append((call.name, self.sight(call.step, self.reference).call))


class Moving(_Toy, BatchTechnique, LossTechnique):
    """The same of a network with weights of its own, in train mode."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.peer, self.calls = None, []

    def on_train_start(self, trainer, pl_module):
        self.peer = Peer(pl_module, training=True, owner=self)

    def observe_batch(self, step):
        step.notes[self] = self.peer.see(step, self).call
        assert all(p.requires_grad for p in self.peer.module.parameters())

    def loss_term(self, call):
        self.calls.append((call.name, call.step.notes[self]))


class Noted(Classifier):
    """Notes of the passes of second networks whether features and logits have a gradient."""

    notes: list

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.notes = []

    def __deepcopy__(self, memo):
        copied = type(self)()
        copied.load_state_dict(self.state_dict())
        copied.notes = copied_notes
        return copied

    def both(self, x):
        features = self.net[:-1](x)
        logits = self.net[-1](features)
        self.notes.append((features.requires_grad, logits.requires_grad))
        return features, logits

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.both(batch[0])[1], batch[1])


copied_notes: list = []


@pytest.fixture(autouse=True)
def notes():
    copied_notes.clear()
    return copied_notes


WHOLE, LEAST = (True, True), (False, True)


@pytest.mark.parametrize("kind", [Frozen, Moving])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_after_the_first_pass_the_network_up_to_the_head_has_no_graph(notes, kind, precision):
    technique = kind()
    fit(Noted(), technique, max_epochs=1, precision=precision)
    assert notes == [WHOLE] + [LEAST] * (BATCHES - 1)
    assert all(call is not None and not call.logits.requires_grad for _, call in technique.calls)


class WithMetric(Noted):
    def training_step(self, batch, batch_idx):
        logits = self.both(batch[0])[1]
        F.cross_entropy(logits.detach(), batch[1])
        return F.nll_loss(logits.log_softmax(1), batch[1])


def test_beside_calls_without_a_gradient_there_is_the_whole_graph_in_one_pass(notes):
    technique = Frozen()
    fit(WithMetric(), technique, max_epochs=1)
    assert notes == [WHOLE] * BATCHES
    assert {(name, call.name) for name, call in technique.calls} == {("nll_loss", "nll_loss")}


class WithQuietMetric(Noted):
    def training_step(self, batch, batch_idx):
        logits = self.both(batch[0])[1]
        with torch.no_grad():
            F.cross_entropy(logits, batch[1])
        return F.nll_loss(logits.log_softmax(1), batch[1])


def test_calls_under_no_grad_do_not_count(notes):
    technique = Frozen()
    fit(WithQuietMetric(), technique, max_epochs=1)
    assert notes == [WHOLE] + [LEAST] * (BATCHES - 1)
    assert {call.name for _, call in technique.calls} == {"nll_loss"}


class TwoHeads(Noted):
    """A head that changes from batch to batch."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.other = nn.Linear(*reversed(self.net[-1].weight.shape))

    def training_step(self, batch, batch_idx):
        features = self.net[:-1](batch[0])
        logits = (self.other if batch_idx % 2 else self.net[-1])(features)
        self.notes.append((features.requires_grad, logits.requires_grad))
        return F.cross_entropy(logits, batch[1])


@pytest.mark.parametrize("kind", [Frozen, Moving])
def test_a_head_that_was_not_seen_costs_one_more_pass_once(notes, kind):
    technique = kind()
    fit(TwoHeads(), technique, max_epochs=1)
    assert notes == [WHOLE, (False, False), WHOLE] + [LEAST] * (BATCHES - 2)
    assert all(call is not None for _, call in technique.calls)


class LaterMetric(Noted):
    """A second call from the third batch on; ``gradient``: from which on it has one."""

    gradient = 3

    def training_step(self, batch, batch_idx):
        logits = self.both(batch[0])[1]
        if batch_idx >= 2:
            first = self.net[0](batch[0])[:, :3]
            F.mse_loss(first if batch_idx >= self.gradient else first.detach(), torch.zeros_like(first))
        return F.cross_entropy(logits, batch[1])


class LaterLoss(LaterMetric):
    gradient = 2


@pytest.mark.parametrize(
    ("model", "wanted"),
    [(LaterMetric, [WHOLE, LEAST, LEAST, WHOLE, WHOLE]), (LaterLoss, [WHOLE, LEAST, LEAST, WHOLE, WHOLE])],
)
def test_a_call_that_gets_a_gradient_later_counts_from_then_on(notes, model, wanted):
    technique = Frozen(loss=0)
    fit(model(), technique, max_epochs=1)
    assert notes == wanted
    names = [name for name, _ in technique.calls]
    assert names == [call.name for _, call in technique.calls]
    assert names == ["cross_entropy"] * model.gradient + ["mse_loss"] * (BATCHES - model.gradient)


class Hooked(Noted):
    def training_step(self, batch, batch_idx):
        features, logits = self.both(batch[0])
        features.register_hook(lambda slope: slope)  # torch refuses one where there is no gradient
        return F.cross_entropy(logits, batch[1])


def test_a_step_that_needs_the_whole_graph_keeps_it(notes):
    technique = Frozen()
    fit(Hooked(), technique, max_epochs=1)
    assert notes == [WHOLE, LEAST] + [WHOLE] * (BATCHES - 1)
    assert all(call is not None for _, call in technique.calls)


class Drawing(TwoHeads):
    def training_step(self, batch, batch_idx):
        self.notes.append(torch.rand(()).item())
        return super().training_step(batch, batch_idx)


def test_a_pass_that_is_made_once_more_draws_the_same(notes):
    model = Drawing()
    fit(model, Frozen(), max_epochs=1)
    drawn = [note for note in notes if isinstance(note, float)]
    assert drawn[1] == drawn[2]
    assert [drawn[0], *drawn[2:]] == [note for note in model.notes if isinstance(note, float)]


class Checkpointed(Noted):
    def training_step(self, batch, batch_idx):
        x = batch[0] * self.scale
        features = checkpoint(self.net[:-1], x, use_reentrant=True)
        logits = checkpoint(self.net[-1], features, use_reentrant=True)
        self.notes.append((features.requires_grad, logits.requires_grad))
        return F.cross_entropy(logits, batch[1])

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.scale = nn.Parameter(torch.ones(()))


def test_parameters_that_a_checkpoint_hides_are_no_beginning(notes):
    technique = Frozen()
    fit(Checkpointed(), technique, max_epochs=1)
    assert notes == [WHOLE] * BATCHES
    assert all(call is not None for _, call in technique.calls)


class ByHand(LossMixin, Noted):
    def training_step(self, batch, batch_idx):
        logits = self.both(batch[0])[1]
        losses = -logits.log_softmax(1).gather(1, batch[1][:, None])[:, 0]
        return self.reduce_loss(losses, logits=logits, targets=batch[1])


def test_losses_that_are_handed_over(notes):
    technique = Frozen()
    fit(ByHand(), technique, max_epochs=1)
    assert notes == [WHOLE] + [LEAST] * (BATCHES - 1)
    assert all(call is not None for _, call in technique.calls)


class SometimesNone(Noted):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) if batch_idx else None


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_a_first_step_without_a_loss_teaches_nothing_wrong(notes):
    technique = Frozen()
    fit(SometimesNone(), technique, max_epochs=1)
    assert notes == [(False, False), WHOLE] + [LEAST] * (BATCHES - 2)
    assert len(technique.calls) == BATCHES - 1
    assert all(call is not None for _, call in technique.calls)


class Encoder(Classifier):
    """Torch's transformer, which in evaluation mode has one kernel for a whole layer."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
            self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.layers(x[:, :4, None].expand(-1, -1, 4)).mean(1))


def test_transformer_layers_have_their_fast_way(monkeypatch):
    fast, own = [], torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a, **k: (fast.append(1), own(*a, **k))[1])
    technique, start = Frozen(), Encoder().eval()
    fit(Encoder(), technique, max_epochs=1)
    assert len(fast) == 2 * (BATCHES - 1)
    with torch.no_grad():
        wanted = [start(x) for x, _ in make_loader()]
    for (_, call), logits in zip(technique.calls, wanted, strict=True):
        torch.testing.assert_close(call.logits, logits, atol=1e-5, rtol=1e-5)


def test_others_stand_in_all_places_of_a_tensor_and_leave_again_after_an_error():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    net[2].weight = net[0].weight
    before, places = dict(net.state_dict(keep_vars=True)), Places(net)
    assert {name for name, _ in places} == {n for n, _ in (*net.named_parameters(), *net.named_buffers())}
    others = {"0.weight": torch.eye(2), "1.running_mean": torch.ones(2)}

    def fails():
        with places.taken_by(others):
            assert net[0].weight is net[2].weight is others["0.weight"]
            assert net[1].running_mean is others["1.running_mean"]
            raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        fails()
    assert all(value is before[name] for name, value in net.state_dict(keep_vars=True).items())


def test_the_nearest_leaf():
    near, far = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    assert nearest_leaf((far * 2).exp() + near) is near
    assert nearest_leaf(near) is near
    assert nearest_leaf(near.detach()) is None
