"""Gradients of a second loss beside a map's own, changes of final ones, and the network of a training's beginning."""

import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from typing_extensions import override

from lightning_reg.engine.networks.first_network import FirstNetwork
from lightning_reg.engine.networks.peer import Peer
from lightning_reg.engine.technique import BatchTechnique, LossTechnique, WeightMapTechnique
from lightning_reg.engine.weights.latents import Latents
from lightning_reg.engine.weights.second import second_gradients
from lightning_reg.engine.weights.swap import named_weights
from tests.toys import QUIET, Classifier, fit, make_loader, weights_of

pytestmark = QUIET


class Second(BatchTechnique, LossTechnique, WeightMapTechnique):
    """w = v s with a factor s for each entry, v frozen; notes final gradients, and those of the squared logits."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.latents = Latents(frozen=True, has_second=True)
        self.reference, self.noted, self.said = FirstNetwork(), [], []

    @override
    def is_active(self, step):
        return True

    @override
    def weights_to_map(self, module):
        return ["net.0.weight"]

    @override
    def begin_map(self, weights):
        self.latents.own = {name: {"s": torch.ones_like(w).requires_grad_()} for name, w in weights.items()}
        return {name: weight.clone() for name, weight in weights.items()}

    @override
    def latents_of(self, weights):
        return {name: weight / self.latents.own[name]["s"] for name, weight in weights.items()}

    @override
    def map_weights(self, latents, weights):
        for name, weight in weights.items():
            weight.copy_(latents[name] * self.latents.own[name]["s"])

    @override
    def pull_back(self, latents, weights, gradients):
        for name, gradient in gradients.items():
            self.latents.add_gradients(name, {"s": gradient * latents[name]})

    @override
    def observe_batch(self, step):
        self.reference.observe(step, self, self.latents.values)
        self.said.append(step.notes[self].call.logits.clone())

    @override
    def loss_term(self, call):
        weights = {name: named_weights(call.step.module)[name] for name in self.latents.own}
        found = second_gradients(call.logits.float().square().mean(), weights, call.step.trainer, self)
        for name, gradient in found.items():
            self.latents.add_second_gradients(name, {"s": gradient * self.latents.values[name]})

    @override
    def change_part_gradients(self, names):
        for name in names:
            part = self.latents.own[name]["s"]
            self.noted.append((part.grad.clone(), self.latents.second[name]["s"].clone()))
            part.grad = torch.full_like(part, 3.0)


class Halves(Classifier):
    def __init__(self, fused=False):
        super().__init__(lr=0.1)
        self.fused = fused

    @override
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr, fused=self.fused)


def noted(precision="32-true", fused=False, batch=8, accumulate=1):
    technique, module, options = Second(), Halves(fused), {"precision": precision}
    if precision == "16-mixed":
        options = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]}
    loader = make_loader(batch_size=batch, shuffle=False)
    fit(module, technique, loader=loader, max_steps=2, max_epochs=-1, accumulate_grad_batches=accumulate, **options)
    return module, technique


def test_both_gradients_are_final_and_those_of_one_large_batch():
    module, technique = noted()
    start = Halves()
    x, y = next(iter(make_loader(batch_size=8, shuffle=False)))
    v, logits = start.net[0].weight, start.net(x)
    losses = F.cross_entropy(logits, y), logits.square().mean()
    for found, loss in zip(technique.noted[0], losses, strict=True):
        (gradient,) = torch.autograd.grad(loss, v, retain_graph=True)
        torch.testing.assert_close(found, v.detach() * gradient)
    # What was put in place of the gradient is what the optimizer had, in both steps.
    torch.testing.assert_close(technique.latents.own["net.0.weight"]["s"].detach(), torch.full_like(v, 1 - 2 * 0.1 * 3))
    torch.testing.assert_close(module.net[0].weight.detach(), 0.4 * v.detach())
    assert not technique.latents.second
    for setup in ({"batch": 4, "accumulate": 2}, {"precision": "16-mixed"}, {"precision": "16-mixed", "fused": True}):
        _, other = noted(**setup)
        assert len(other.noted) == 2
        # Half precision rounds to 2^-12; both gradients come unscaled.
        for one, two in zip(technique.noted, other.noted, strict=True):
            for a, b in zip(one, two, strict=True):
                assert (a - b).norm() <= 2e-3 * a.norm(), setup


def test_a_reference_shares_memory_and_stays_as_it_was():
    module, technique = noted()
    start = Classifier().net
    with torch.no_grad():
        for said, (x, _) in zip(technique.said, make_loader(batch_size=8, shuffle=False), strict=False):
            torch.testing.assert_close(said, start(x))
    moved = {name for name, value in weights_of(module).items() if not torch.equal(value, start.state_dict()[name[4:]])}
    assert technique.reference.kept.keys() >= moved - technique.latents.values.keys()
    for name, value in technique.reference.kept.items():
        assert torch.equal(value, start.state_dict()[name[4:]])


def test_a_skeleton_has_the_memory_of_the_module():
    module = Classifier()
    peer = Peer(module, owner=Second())
    assert peer.module.net[0].weight.data_ptr() != module.net[0].weight.data_ptr()
    peer.share_memory_with(module)
    assert peer.module.net[0].weight.data_ptr() == module.net[0].weight.data_ptr()


def test_zeros_stand_for_gradients_that_a_rank_has_not():
    latents = Latents(frozen=True, has_second=True)
    latents.own = {"w": {"A": torch.ones(2, requires_grad=True), "B": torch.ones(3, requires_grad=True)}}
    latents.add_second_gradients("w", {"B": torch.full((3,), 2.0)})
    latents.add_second_gradients("w", {"B": torch.full((3,), 2.0, dtype=torch.float16)})
    found = latents.second_gradients(["w"])
    assert sorted(tensor.tolist() for tensor in found) == [[0.0, 0.0], [4.0, 4.0, 4.0]]
    assert not any(tensor.requires_grad for tensor in found)
    assert Latents(frozen=True).second_gradients(["w"]) == []


def test_no_way_back_where_nothing_needs_a_gradient():
    module = nn.Linear(2, 2).requires_grad_(False)
    found = second_gradients(module(torch.ones(1, 2)).sum(), {"weight": module.weight}, None, Second())
    assert found == {}
