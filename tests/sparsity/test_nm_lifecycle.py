"""N:M sparsity over the life of a module: shared weights, files, trainings one after the other, lengths that change."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import NMSparsity
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import check_nm, nm_mask
from tests.toys import QUIET, Callback, Classifier, make_trainer

pytestmark = QUIET
MIDDLE = "net.2.weight"


def loader():
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), 8)  # 4 steps per epoch


class Net(Classifier):
    """Three layers, of which the one in the middle becomes sparse."""

    def __init__(self, lr=0.1):
        super().__init__(lr=lr)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = (nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
            self.net = nn.Sequential(*layers)


class Validated(Net):
    def validation_step(self, batch, batch_idx):
        self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))


class Tied(Net):
    """Two layers with one weight, and one layer under two names."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.twin = nn.Linear(16, 16)
        self.twin.weight = self.net[2].weight
        self.again = self.net[2]

    def forward(self, x):
        return self.net[4](self.again(self.twin(self.net[0](x).relu()).relu()).relu())


def ste(**kwargs):
    return NMSparsity(1, 4, recipe="ste", layers="net.2", **({"dense_steps": 0} | kwargs))


def fit(module, *callbacks, ckpt=None, **kwargs):
    trainer = make_trainer(callbacks=list(callbacks), **kwargs)
    trainer.fit(module, loader(), ckpt_path=ckpt, weights_only=True if ckpt else None)
    return trainer


def test_weights_under_several_names_are_sparse_in_files(tmp_path):
    module = Tied()
    trainer = fit(module, ste())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    state = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
    for name in (MIDDLE, "twin.weight", "again.weight"):
        assert check_nm(state[name], 1, 4) == 0
        assert torch.equal(state[name], module.net[2].weight)
    loaded = Tied()
    loaded.load_state_dict(state)
    assert ste().verify(loaded) == {MIDDLE: (0.25, 0)}


def test_what_was_pruned_is_not_put_into_another_training(tmp_path):
    fit(Net(), ste(harden_at_end=False)).save_checkpoint(tmp_path / "end.ckpt")
    sparse = ste(harden_at_end=False)
    fit(Net(), sparse, ckpt=tmp_path / "end.ckpt")  # no step is left, so nothing is put back
    module = Net(lr=0.0)
    before = module.net[2].weight.detach().clone()
    fit(module, sparse, max_epochs=1)
    assert torch.equal(module.net[2].weight, before)


def test_a_file_of_the_last_dense_step_is_dense_as_its_validation_was(tmp_path):
    sparse = ste(dense_steps=4)  # as long as an epoch
    checkpoint = ModelCheckpoint(tmp_path, "{epoch}-{loss:.9f}", monitor="loss", save_top_k=-1)
    module = Validated()
    trainer = make_trainer(callbacks=[sparse, checkpoint], max_epochs=2, enable_checkpointing=True)
    trainer.fit(module, loader(), loader())
    for path, score in checkpoint.best_k_models.items():
        saved = Validated()
        saved.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        (found,) = make_trainer().validate(saved, loader(), verbose=False)
        assert found["loss"] == pytest.approx(float(score), abs=1e-6)
        assert (sparse.verify(saved)[MIDDLE][1] == 0) == ("epoch=1" in path)


def test_hardening_at_a_step_that_was_not_hard_is_said():
    sparse = NMSparsity(1, 4, recipe="mdgf_exp", beta=1e-4, layers="net.2", dense_fraction=0.0, finetune_fraction=0.0)
    with pytest.warns(
        UserWarning, match=r"training ended after 8 steps, before the final mask was in force \(D = 0.99"
    ):
        fit(Net(), sparse)


@pytest.mark.parametrize("nothing", [{"max_epochs": 0}, {"limit_train_batches": 0}])
def test_a_fit_without_a_step_leaves_the_weights(nothing):
    module = Net()
    before = module.net[2].weight.detach().clone()
    fit(module, ste(), **nothing)
    assert torch.equal(module.net[2].weight, before)


@pytest.mark.parametrize("recipe", ["mdgf_linear", "sdgf_stepwise"])
def test_a_longer_training_that_goes_back_is_said(tmp_path, recipe):
    def sparse():
        return NMSparsity(1, 4, recipe=recipe, layers="net.2", dense_fraction=0.1, harden_at_end=False)

    class Save(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    fit(Net(), sparse(), Save(), max_epochs=4)
    fit(Net(), sparse(), max_epochs=4, ckpt=tmp_path / "2.ckpt")  # warnings are errors
    with pytest.warns(
        UserWarning, match="the checkpoint was written with pruned weights multiplied by 0, and in this tr"
    ):
        fit(Net(), sparse(), max_epochs=40, ckpt=tmp_path / "3.ckpt")


def test_lengths_that_cannot_be_right_are_said():
    with pytest.warns(
        UserWarning, match="8 optimizer steps, which is not what a training with GradientAccumulationSch"
    ):
        fit(Net(), ste(harden_at_end=False), GradientAccumulationScheduler({1: 2}))
    fit(Net(), ste(), GradientAccumulationScheduler({1: 2}), max_epochs=-1, max_steps=6)  # warnings are errors

    class Two(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self):
            return [torch.optim.SGD(layer.parameters(), 0.1) for layer in (self.net[:3], self.net[3:])]

    with pytest.warns(UserWarning, match="max_steps=8, which counts the steps of all 2 optimizers"):
        fit(Two(), ste(harden_at_end=False), max_epochs=-1, max_steps=8)
    fit(Two(), ste())
    # A recipe with phases: 2 dense steps of 4 are 2 batches, and not one with two optimizers.
    phased = NMSparsity(1, 4, recipe="ste", layers=["net.2"], dense_steps=2, finetune_steps=0, harden_at_end=False)
    seen = []

    class Counts(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append((phased.state_dict()["steps"], phased.state_dict()["factor"]))

    fit(Two(), phased, Counts(), max_epochs=1)
    assert seen == [(1, 1.0), (2, 1.0), (3, 0.0), (4, 0.0)]


@pytest.mark.parametrize("first", [True, False], ids=["average first", "sparsity first"])
def test_lightnings_average_is_validated_sparse(first):
    class Watched(Validated):
        def __init__(self):
            super().__init__()
            self.seen = []

        def validation_step(self, batch, batch_idx):
            weight = self.net[2].weight.detach().clone()
            self.seen.append((check_nm(weight, 1, 4), weight))

    class Dense(Callback):
        def __init__(self):
            self.weights = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.weights.append(pl_module.net[2].weight.detach().clone())

    module, dense, average = Watched(), Dense(), EMAWeightAveraging(decay=0.5)
    callbacks = [average, ste(), dense] if first else [ste(), dense, average]
    trainer = make_trainer(callbacks=callbacks, max_epochs=1, num_sanity_val_steps=0)
    trainer.fit(module, loader(), loader())
    assert {violations for violations, _ in module.seen} == {0}
    # Lightning's average starts as the weights after the first step.
    mean = dense.weights[0]
    for weight in dense.weights[1:]:
        mean = 0.5 * mean + 0.5 * weight
    torch.testing.assert_close(module.seen[0][1], mean * nm_mask(mean, 1, 4))
    torch.testing.assert_close(module.net[2].weight.detach(), mean * nm_mask(mean, 1, 4))


def test_an_optimizer_that_is_stepped_past_lightning_is_refused():
    class Raw(Net):
        def __init__(self, use_pl_optimizer):
            super().__init__()
            self.automatic_optimization, self.use_pl_optimizer = False, use_pl_optimizer

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=self.use_pl_optimizer)
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    with pytest.raises(MisconfigurationException, match="SGD\\.step was called past"):
        fit(Raw(use_pl_optimizer=False), ste())
    module = Raw(use_pl_optimizer=True)
    fit(module, ste())
    assert not torch.equal(module.net[2].weight != 0, Net().net[2].weight != 0)
    fit(Raw(use_pl_optimizer=False))


@pytest.mark.parametrize("sparse", [True, False])
def test_two_networks_with_two_losses_are_stepped_one_after_the_other(sparse):
    class Two(Net):
        def __init__(self):
            super().__init__()
            self.other = Net().net
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            losses = [F.cross_entropy(net(batch[0]), batch[1]) for net in (self.net, self.other)]
            for optimizer, loss in zip(self.optimizers(), losses, strict=True):
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(net.parameters(), 0.1) for net in (self.net, self.other)]

    module, alone = Two(), Net()
    techniques = [NMSparsity(1, 4, recipe="ste", layers="*.2", dense_steps=0)] if sparse else []
    fit(module, *techniques)
    fit(alone, *([ste()] if sparse else []))
    for net in (module.net, module.other):
        for one, two in zip(net.parameters(), alone.net.parameters(), strict=True):
            assert torch.equal(one, two)


@pytest.mark.filterwarnings("ignore:.*Swapping scheduler.*")
@pytest.mark.parametrize("norm", [True, False])
def test_the_epoch_of_statistics_that_lightnings_swa_adds_does_not_count(norm):
    module = Net()
    module.net[3] = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(16) if norm else nn.Identity())
    sparse = NMSparsity(1, 4, recipe="mdgf_linear", layers="net.2", dense_steps=2)
    fit(module, sparse, StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2), max_epochs=5)
    assert sparse.state_dict()["steps"] == 20 + norm  # all of that epoch is accumulated for one step
    assert "final mask from step 17" in sparse.describe()  # of 20, and 0.15 of them fine-tuning
