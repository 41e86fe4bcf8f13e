"""SoupAverager under DDP and sharded parameters, several loaders, metric objects, loaders made anew."""

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchmetrics
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_reg import SoupAverager
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import load_averaged

pytestmark = [pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")]


class Net(LightningModule):
    """A user's module with a metric object in each step."""

    def __init__(self, norm=False):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            middle = nn.BatchNorm1d(8) if norm else nn.Identity()
            self.net = nn.Sequential(nn.Linear(6, 8), middle, nn.Tanh(), nn.Linear(8, 3))
        self.train_acc = torchmetrics.Accuracy("multiclass", num_classes=3)
        self.val_losses = []

    def training_step(self, batch, batch_idx):
        logits = self.net(batch[0])
        self.train_acc(logits, batch[1])
        self.log("train_acc", self.train_acc, on_step=False, on_epoch=True)
        return F.cross_entropy(logits, batch[1])

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.val_losses.append(loss.item())
        self.log("val_loss", loss, sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.3, momentum=0.9)


class Sharded(Net):
    """Its parameters are split over the processes."""

    def configure_model(self):
        if not any(isinstance(p, DTensor) for p in self.parameters()):
            from torch.distributed.fsdp import fully_shard

            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def rows(size=24):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 6, generator=generator)
    return TensorDataset(x, (x[:, :3] + 0.5 * torch.randn(size, 3, generator=generator)).argmax(1))


def fit(module, *callbacks, batch=12, epochs=3, ckpt=None, val=None, **options):
    fixed = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "use_distributed_sampler": False,
    }
    trainer = Trainer(max_epochs=epochs, callbacks=list(callbacks), **(fixed | options))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers")
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")
        # Lightning's own would shuffle. The ranks take turns, so that two batches are one of the single process.
        sampler = DistributedSampler(rows(), shuffle=False) if options.get("devices") == 2 else None
        loaders = DataLoader(rows(), batch, sampler=sampler), val or DataLoader(rows(), 24)
        trainer.fit(module, *loaders, ckpt_path=ckpt, weights_only=True if ckpt else None)
    return trainer


def whole(weights):
    return {n: (w.full_tensor() if isinstance(w, DTensor) else w).detach().clone() for n, w in weights.items()}


# -- sharded ----------------------------------------------------------------------------------------------------------

METHODS = {
    "ema": {"method": "ema", "decay": 0.7},
    "uniform": {"method": "uniform"},
    "lawa": {"method": "lawa", "last_k": 2},
    "greedy": {"method": "greedy", "monitor": "val_loss", "mode": "min"},
    "snapshot": {"method": "greedy", "monitor": "val_loss", "mode": "min", "greedy_at": "snapshot"},
}


def sharded(method, folder):
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)
    module, soup = Sharded(), SoupAverager(**METHODS[method])
    trainer = fit(module, soup, batch=6, devices=2, strategy=strategy)
    split = all(isinstance(p, DTensor) for p in module.parameters())
    path = f"{folder}/{method}.ckpt"
    trainer.save_checkpoint(path)
    dist.barrier()
    state = soup.state_dict()
    return split, whole(dict(module.named_parameters())), soup.ingredients, soup.score, state["raw"], module.val_losses


@pytest.mark.usefixtures("sharded_means")
@pytest.mark.parametrize("method", METHODS)
def test_shards_are_averaged_as_whole_tensors_are(two_processes, tmp_path, method):
    module, soup = Net(), SoupAverager(**METHODS[method])
    fit(module, soup)
    for split, weights, ingredients, score, raw, losses in two_processes.run(sharded, method, str(tmp_path)):
        assert split
        assert ingredients == soup.ingredients
        assert score == pytest.approx(soup.score, abs=1e-5)
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(weights[name], parameter.detach(), atol=2e-6, rtol=1e-5)
            torch.testing.assert_close(raw[name], soup.raw_weights[name], atol=2e-6, rtol=1e-5)
        assert len(losses) == len(module.val_losses)
    averaged = load_averaged(tmp_path / f"{method}.ckpt")
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(averaged[name], parameter.detach(), atol=2e-6, rtol=1e-5)


def training_goes_on_after_validation():
    """Losses of the run with candidates between the steps, and without."""
    results = []
    for soup in ([], [SoupAverager(method="greedy", monitor="val_loss", mode="min", greedy_at="snapshot")]):
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        module = Sharded()
        weights = []
        module.on_train_batch_end = lambda *args, module=module, weights=weights: weights.append(
            whole(dict(module.named_parameters()))
        )
        fit(module, *soup, batch=6, devices=2, strategy=strategy)
        results.append(weights)
    return results


def test_candidates_leave_no_gathered_weights_behind(two_processes):
    for plain, with_candidates in two_processes.run(training_goes_on_after_validation):
        assert len(plain) == len(with_candidates) == 6
        for one, two in zip(plain, with_candidates, strict=True):
            assert all(torch.equal(one[name], two[name]) for name in one)


def resumed(folder):
    path = f"{folder}/last.ckpt"

    def make():
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)

    class Save(SoupAverager):
        """Saves in the middle of the fit."""

        def on_train_epoch_end(self, trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(path)

    fit(Sharded(), Save(method="ema", decay=0.7), batch=6, epochs=1, devices=2, strategy=make())
    dist.barrier()
    module = Sharded()
    fit(module, Save(method="ema", decay=0.7), batch=6, epochs=2, devices=2, strategy=make(), ckpt=path)
    plain = Sharded()
    fit(plain, SoupAverager(method="ema", decay=0.7), batch=6, epochs=2, devices=2, strategy=make())
    return whole(dict(module.named_parameters())), whole(dict(plain.named_parameters()))


def test_a_sharded_run_resumes_its_average(two_processes, tmp_path):
    for one, two in two_processes.run(resumed, str(tmp_path)):
        assert all(torch.equal(one[name], two[name]) for name in two)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": "disk", "method": "lawa"}, 'keep="disk"'),
        ({"from_checkpoints": True, "method": "uniform"}, "from_checkpoints=True"),
        ({"swap_for_validation": True, "method": "ema"}, "swap_for_validation=True"),
    ],
)
def test_files_and_exchanges_of_shards_are_refused(options, words):
    trainer = Trainer(accelerator="cpu", strategy=ModelParallelStrategy(1, 1), logger=False, enable_checkpointing=False)
    with pytest.raises(MisconfigurationException, match=f"SoupAverager\\({words}\\) works on files of whole models"):
        SoupAverager(**options).check(trainer, Net())


# -- DDP --------------------------------------------------------------------------------------------------------------


def batch_norm_on_two_ranks():
    module = Net(norm=True)
    soup = SoupAverager(method="uniform")
    fit(module, soup, batch=6, devices=2, strategy="ddp")
    return {n: v.detach().clone() for n, v in module.state_dict().items()}


def test_batch_statistics_are_the_mean_over_the_ranks_and_the_same_on_all(two_processes):
    one, two = two_processes.run(batch_norm_on_two_ranks)
    assert all(torch.equal(one[name], two[name]) for name in one)
    # Each rank's own half of the data (every second sample, in batches of 6), under the averaged weights.
    x = rows().tensors[0]
    hidden = [F.linear(x[rank::2], one["net.0.weight"], one["net.0.bias"]).split(6) for rank in (0, 1)]
    means = torch.stack([part.mean(0) for parts in hidden for part in parts]).mean(0)
    variances = torch.stack([part.var(0) for parts in hidden for part in parts]).mean(0)
    torch.testing.assert_close(one["net.1.running_mean"], means, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(one["net.1.running_var"], variances, atol=1e-6, rtol=1e-5)


# -- loaders and metrics ----------------------------------------------------------------------------------------------


def test_one_of_several_validation_loaders_decides():
    loaders = [DataLoader(rows(), 24), DataLoader(TensorDataset(*rows()[:6]), 6)]
    soup = SoupAverager(method="greedy", monitor="val_loss/dataloader_idx_1", mode="min")
    module = Net()
    fit(module, soup, val=loaders)
    x, y = rows()[:6]
    assert soup.score == pytest.approx(F.cross_entropy(module.net(x), y).item(), abs=1e-6)
    assert soup.score <= min(candidate.own_score for candidate in soup.trace)
    with pytest.raises(MisconfigurationException, match=r"logged no such metric, but \['val_loss/dataloader_idx_0'"):
        fit(Net(), SoupAverager(method="greedy", monitor="val_loss", mode="min"), val=loaders)


def test_metric_objects_count_the_run_s_own_batches_only():
    seen = []
    for callbacks in ([], [SoupAverager(method="greedy", monitor="val_loss", mode="min")]):
        module = Net(norm=True)  # its statistics are estimated anew by passes through `training_step`
        trainer = fit(module, *callbacks)
        seen.append((trainer.callback_metrics["train_acc"].item(), module.train_acc.update_count))
    assert seen[0] == seen[1]


def test_loaders_made_anew_each_epoch():
    class Makes(Net):
        def train_dataloader(self):
            return DataLoader(rows(), 12)

        def val_dataloader(self):
            return DataLoader(rows(), 24)

    weights = []
    for anew in (0, 1):
        module, soup = Makes(norm=True), SoupAverager(method="greedy", monitor="val_loss", mode="min")
        trainer = Trainer(
            max_epochs=3,
            callbacks=[soup],
            reload_dataloaders_every_n_epochs=anew,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
        )
        trainer.fit(module)
        weights.append(module.state_dict())
        assert len(soup.trace) == 3
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
