"""Weights trained through a map: who sees weights, who sees latents, and when."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import SingleDeviceStrategy
from typing_extensions import override

from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.run.hooks import FirstHooks, LastHooks
from lightning_reg.engine.weights.latents import Latents
from tests.toys import (
    QUIET,
    BoomError,
    Callback,
    Classifier,
    Doubled,
    Halve,
    fit,
    make_loader,
    make_trainer,
    same_weights,
)

pytestmark = QUIET
NAME = "net.3.weight"


class FourTimes(Classifier):
    @override
    def configure_optimizers(self):
        rest = [p for name, p in self.named_parameters() if name != NAME]
        return torch.optim.SGD([{"params": rest}, {"params": [self.net[3].weight], "lr": 4 * self.lr}], self.lr)


def test_the_optimizer_steps_the_latents():
    module, by_hand = Classifier(lr=0.1), FourTimes(lr=0.1)
    fit(module, Doubled())
    fit(by_hand)
    assert same_weights(module, by_hand, atol=1e-6)


def test_beside_an_edit_that_comes_and_goes():
    module, by_hand, technique = Classifier(lr=0.1), FourTimes(lr=0.1), Doubled()
    fit(module, Halve(names=(NAME,)), technique, log_every_n_steps=100)
    fit(by_hand, Halve(names=(NAME,)))
    assert same_weights(module, by_hand, atol=1e-6)
    assert technique.mapped == 1 + 8  # when it begins and after each step: the edits were no news


class TwoByHand(Classifier):
    automatic_optimization = False

    @override
    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[layer].parameters(), self.lr) for layer in (0, 3)]

    @override
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()


def test_an_edit_that_waits_for_another_optimizer_is_no_news_either():
    modules = [TwoByHand(lr=0.1) for _ in range(2)]
    for module, steps in zip(modules, (1, 100), strict=True):  # weights are looked at on logging steps
        fit(module, Halve(names=(NAME,)), Doubled(), log_every_n_steps=steps)
    assert same_weights(*modules)


class Sees(Callback):
    def __init__(self):
        self.seen = []

    @override
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(("callback", pl_module.net[3].weight.detach().clone(), pl_module.net[3].weight.grad.clone()))

    @override
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(("after", pl_module.net[3].weight.detach().clone(), len(trainer.callbacks)))


class SeesToo(Classifier):
    def on_before_optimizer_step(self, optimizer):
        self.latent, self.gradient = self.net[3].weight.detach().clone(), self.net[3].weight.grad.clone()
        self.groups = len(optimizer.param_groups)


def test_callbacks_see_weights_and_clipping_sees_latents():
    sees, module, technique = Sees(), SeesToo(), Doubled()
    start = module.net[3].weight.detach().clone()
    trainer = make_trainer(callbacks=[technique, sees], max_steps=1)
    trainer.fit(module, make_loader())
    (_, weight, gradient), (_, after, callbacks) = sees.seen
    assert callbacks == 4
    assert torch.equal(weight, start)
    assert torch.equal(module.latent, start / 2)
    assert torch.equal(module.gradient, 2 * gradient)
    torch.testing.assert_close(after, start - 4 * 0.5 * gradient)
    assert torch.equal(module.net[3].weight, after)
    assert not any(isinstance(callback, FirstHooks | LastHooks) for callback in trainer.callbacks)


class FailingSGD(torch.optim.SGD):
    @override
    def step(self, closure=None):
        loss = super().step(closure)
        if self.param_groups[0]["lr"] == 0.25:
            raise BoomError
        return loss


class Fails(Classifier):
    @override
    def configure_optimizers(self):
        return FailingSGD(self.parameters(), lr=self.lr)


def test_weights_are_in_after_an_exception_in_the_optimizer():
    module, technique = Fails(lr=0.25), Doubled()
    with pytest.raises(BoomError):
        fit(module, technique)
    assert torch.equal(module.net[3].weight.detach(), 2 * technique.latents.values[NAME])


class Raw(Classifier):
    def __init__(self, past_lightning):
        super().__init__()
        self.automatic_optimization, self.past_lightning = False, past_lightning

    @override
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=not self.past_lightning)
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


def test_a_step_past_lightning_is_refused():
    fit(Raw(past_lightning=False), Doubled())
    module = Raw(past_lightning=True)
    trainer = make_trainer(callbacks=[Doubled()])
    with pytest.raises(MisconfigurationException, match=r"^Doubled: SGD\.step was called past Lightning"):
        trainer.fit(module, make_loader())
    (optimizer,) = trainer.optimizers
    assert not optimizer._optimizer_step_pre_hooks


class Clamps(Callback):
    @override
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.net[3].weight.data.clamp_(-0.05, 0.05)


def test_writing_through_data_is_noticed_on_logging_steps():
    module = Classifier()
    with pytest.warns(UserWarning, match="Doubled: 'net.3.weight' was written through `.data`") as warned:
        fit(module, Doubled(), Clamps())
    assert sum("through `.data`" in str(w.message) for w in warned) == 1
    plain = FourTimes()
    fit(plain, Clamps())
    assert same_weights(module, plain, atol=1e-6)


class Unfreezes(Callback):
    """Hands the mapped weight to the optimizer in the second epoch."""

    @override
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            factor = 4 if isinstance(pl_module, Late) else 1
            trainer.optimizers[0].add_param_group({"params": [pl_module.net[3].weight], "lr": factor * 0.1})


class Early(Classifier):
    @override
    def configure_optimizers(self):
        return torch.optim.SGD([p for name, p in self.named_parameters() if name != NAME], self.lr)


class Late(Early):
    pass


def test_a_weight_that_the_optimizer_gets_later():
    module, by_hand = Early(lr=0.1), Late(lr=0.1)
    fit(module, Doubled(), Unfreezes())
    fit(by_hand, Unfreezes())
    assert same_weights(module, by_hand, atol=1e-6)
    assert not torch.equal(module.net[3].weight, Classifier().net[3].weight)


def test_names_are_checked():
    with pytest.raises(MisconfigurationException) as raised:
        fit(Classifier(), Doubled(names=["net.3.wieght"]))
    assert str(raised.value) == (
        "Doubled: no parameter is named 'net.3.wieght'. Near names: 'net.3.weight', 'net.0.weight', 'net.3.bias',"
        " 'net.0.bias'. Parameters are named as in `module.named_parameters()`."
    )
    with pytest.raises(MisconfigurationException) as raised:
        fit(Classifier(), Doubled(), Doubled(name="two"))
    assert str(raised.value) == (
        "Doubled and Doubled cannot stand together on 'net.3.weight': a weight is trained through one map only. Choose"
        " other layers for one of them."
    )


def test_strategies_that_split_parameters_are_refused():
    class FSDPStrategy(SingleDeviceStrategy):
        pass

    trainer = make_trainer(callbacks=[Doubled()], strategy=FSDPStrategy(torch.device("cpu")))
    with pytest.raises(MisconfigurationException) as raised:
        trainer.fit(Classifier(), make_loader())
    assert str(raised.value) == (
        "Doubled trains whole weights through a map, and FSDPStrategy splits them over the processes. Use DDP."
    )


def test_no_weight_at_all():
    module, plain = Classifier(), Classifier()
    fit(module, Doubled(names=()))
    fit(plain)
    assert same_weights(module, plain)


def test_state_travels_between_devices_but_for_the_count_of_steps():
    latents = Latents()
    latents.values["w"] = torch.ones(2)
    latents.own["w"] = {"shape": torch.zeros(1, requires_grad=True)}
    optimizer = torch.optim.Adam([latents.own["w"]["shape"]])
    latents.add_gradients("w", {"shape": torch.ones(1)})
    optimizer.step()
    latents.take_moments(optimizer, "w")
    assert latents.own["w"]["shape"].grad is None
    assert not optimizer.state
    again = Latents()
    again.load_state_dict(latents.state_dict())
    again.to({"w": torch.device("meta")})
    moments = again.state_dict()["moments"]["w"]["shape"]
    assert {key: value.device.type for key, value in moments.items()} == {
        "step": "cpu",
        "exp_avg": "meta",
        "exp_avg_sq": "meta",
    }
    shape = again.own["w"]["shape"]
    assert shape.requires_grad
    assert shape.is_leaf
    assert again.values["w"].device.type == shape.device.type == "meta"
    again.clear()
    assert again.state_dict() == {"values": {}, "own": {}, "moments": {}}
