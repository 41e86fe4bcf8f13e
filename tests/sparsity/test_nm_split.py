"""N:M sparsity of weights whose rows are split over processes: `fully_shard` and tensor parallelism, on two ranks."""

from functools import cache, partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, Sampler, TensorDataset

from lightning_reg import NMSparsity
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.weights import shards
from lightning_reg.engine.weights.strategies import check_editable
from lightning_reg.functional import check_nm, unpack_mask
from tests.toys import QUIET, make_trainer

pytestmark = QUIET

STEPS, SIZE = 8, 256  # an epoch: 8 steps of 32 digits in all
SPARSE = ("net.2.weight", "net.4.weight")


class Digits(LightningModule):
    """Two sparse layers, one with a number of rows that two ranks cannot halve."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = (nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 33), nn.ReLU())
            self.net = nn.Sequential(*layers, nn.Linear(33, 10))
        self.validated, self.logged = [], []

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("loss", F.cross_entropy(self.net(x), y), sync_dist=True)

    def on_validation_end(self):
        metrics = self.trainer.callback_metrics
        self.validated += [float(metrics[key]) for key in ("loss", "reg/nm_sparsity/hard/loss") if key in metrics]

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=1e-2, eps=1e-4)


class Sharded(Digits):
    """``how``: every layer gathers by itself, or all at once and keep it after the forward pass, or tensor parallel."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def configure_model(self):
        if any(isinstance(p, DTensor) for p in self.parameters()):
            return
        if self.how in ("columns", "rows"):
            plan = {"2": ColwiseParallel(), "4": RowwiseParallel()}
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)
            return
        if self.how == "both":
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], {"2": ColwiseParallel()})
        mesh = self.device_mesh["data_parallel"]
        if self.how == "hybrid":  # copies of shards
            mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "shards"))
        if self.how in ("layers", "hybrid"):
            for layer in self.net[::2]:
                fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


class Logged(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        metrics = trainer.logged_metrics
        pl_module.logged.append({k: float(v) for k, v in metrics.items() if k.startswith("reg/nm_sparsity/")})


class InTurns(Sampler):
    """Every rank takes its turn, so that batches of the same number are one batch of a single process."""

    def __init__(self, ranks):
        self.order = range(dist.get_rank() if ranks > 1 else 0, SIZE, ranks)
        self.position = self.start = 0

    def __len__(self):
        return len(self.order)

    def __iter__(self):
        self.position, self.start = self.start, 0
        for index in self.order[self.position :]:
            self.position += 1
            yield index


class Loader(DataLoader):
    """Goes on in the middle of an epoch, on another number of ranks too."""

    def state_dict(self):
        return {"batches": self.sampler.position % len(self.sampler) // self.batch_size}

    def load_state_dict(self, state):
        self.sampler.start = state["batches"] * self.batch_size


@cache
def digits():
    data = load_digits()
    x = torch.tensor(data.data[:SIZE], dtype=torch.float32) / 16
    return TensorDataset(x, torch.tensor(data.target[:SIZE]))


def loader(batch, ranks):
    return Loader(digits(), batch // ranks, sampler=InTurns(ranks))


def train(module, sparse, ranks=1, ckpt=None, epochs=3, saves=(), **kwargs):
    seed_everything(0, verbose=False)
    trainer = make_trainer(
        max_epochs=epochs,
        callbacks=[sparse, Logged(), *saves],
        num_sanity_val_steps=1,
        use_distributed_sampler=False,
        **kwargs,
    )
    trainer.fit(module, loader(32, ranks), loader(64, ranks), ckpt_path=ckpt)
    return module


def found(module, sparse):
    """What can be asked of a trained network, in plain values."""
    weights = {name: shards.whole(p) for name, p in module.named_parameters()}
    masks = {name: unpack_mask(m["bits"], m["shape"]) for name, m in sparse.packed_masks(module).items()}
    rows = [(row.name, row.kept_magnitude, row.zeros, row.flops) for row in sparse.report(module).rows]
    return weights, masks, rows, sparse.verify(module), module.validated, module.logged


def mesh(how="layers", **kwargs):
    parallel = 1 if how in ("columns", "rows", "both") else 2
    return ModelParallelStrategy(data_parallel_size=parallel, tensor_parallel_size=2 // parallel, **kwargs)


def on_rank(how, kwargs):
    sparse = NMSparsity(1, 4, layers=["net.2", "net.4"], **kwargs)
    # Ranks of one row of the mesh hold the same samples.
    ranks = 1 if how == "columns" else 2
    whole = how == "copies"
    strategy = "ddp" if whole else mesh(how)
    module = train(Digits() if whole else Sharded(how), sparse, ranks, strategy=strategy, devices=2)
    split = [name for name, p in module.named_parameters() if isinstance(p, DTensor)]
    return split, found(module, sparse)


RECIPES = {
    "srste": {"recipe": "srste", "lambda_w": 0.1, "dense_steps": 3, "validate_hard_mask": True},
    "mdgf": {"recipe": "mdgf_linear", "dense_steps": 2, "finetune_steps": 6, "grad": "masked", "log_layers": True},
    "one shot": {"recipe": "one_shot", "dense_steps": 5},
    "frames": {"recipe": "sdgf_stepwise", "refresh_every": 2, "harden_at_end": False, "log_layers": True},
}


@pytest.mark.usefixtures("sharded_means")
@pytest.mark.parametrize(
    ("how", "recipe"),
    [
        ("layers", "srste"),
        ("at once", "mdgf"),
        ("layers", "one shot"),
        ("at once", "frames"),
        ("columns", "mdgf"),
        ("hybrid", "srste"),
        ("copies", "srste"),
        ("copies", "mdgf"),
    ],
)
def test_several_processes_train_as_one(two_processes, how, recipe):
    kwargs = RECIPES[recipe] | ({"validate_hard_mask": True} if recipe == "mdgf" else {})
    if how == "columns":
        kwargs = {**kwargs, "exclude": ["net.4"]}
    sparse = NMSparsity(1, 4, layers=["net.2", "net.4"], **kwargs)
    weights, masks, rows, verified, validated, logged = found(train(Digits(), sparse), sparse)
    for split, answer in two_processes.run(on_rank, how, kwargs):
        assert ("net.2.weight" in split) == (how != "copies")
        for name, weight in weights.items():
            torch.testing.assert_close(answer[0][name], weight, atol=2e-6, rtol=1e-5)
        assert list(answer[1]) == list(masks)
        assert all(torch.equal(answer[1][name], mask) for name, mask in masks.items())
        for mine, other in zip(rows, answer[2], strict=True):
            assert other[0] == mine[0]
            assert other[1:] == pytest.approx(mine[1:], abs=1e-6)
        assert answer[3] == verified
        assert answer[4] == pytest.approx(validated, rel=1e-5)
        for mine, other in zip(logged, answer[5], strict=True):
            assert other == pytest.approx(mine)
    if sparse.harden_at_end:
        assert verified == dict.fromkeys(masks, (0.25, 0))
    if sparse.validate_hard_mask:
        # In the sanity check none; else what the module sees in the second validation, and both at its own end.
        seen, soft, hard = validated[1::3], validated[2::3], validated[3::3]
        assert len(soft) == 3
        assert seen == hard
        assert (soft[0] != hard[0]) == (recipe == "mdgf")  # SR-STE is hard by then
        assert soft[-1] == hard[-1]


class Save(Callback):
    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def stopped_and_resumed(folder, kwargs, step, whole_files):
    make = partial(NMSparsity, 1, 4, layers=["net.2", "net.4"], **kwargs)
    strategy = partial(mesh, save_distributed_checkpoint=not whole_files)
    save = Save(f"{folder}/at.ckpt", step)
    whole = train(Sharded("layers"), make(), 2, saves=[save], strategy=strategy(), devices=2)
    resumed = train(Sharded("layers"), make(), 2, ckpt=save.path, strategy=strategy(), devices=2)
    results = [{n: shards.whole(p) for n, p in module.named_parameters()} for module in (whole, resumed)]
    return *results, whole.logged, resumed.logged


@pytest.mark.usefixtures("sharded_means")
@pytest.mark.parametrize("whole_files", [True, False], ids=["one file", "a file per rank"])
@pytest.mark.parametrize(("recipe", "step"), [("one shot", 11), ("frames", 9), ("mdgf", 20)])
def test_resume_of_split_rows_is_exact(two_processes, tmp_path, recipe, step, whole_files):
    answers = two_processes.run(stopped_and_resumed, str(tmp_path), RECIPES[recipe], step, whole_files)
    for whole, resumed, logged, logged_after in answers:
        assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())
        assert logged_after == logged[step:]
    if whole_files:
        state = torch.load(tmp_path / "at.ckpt", weights_only=True)
        Digits().load_state_dict(state["state_dict"], strict=True)
        violations = [check_nm(state["state_dict"][name], 1, 4) for name in SPARSE]
        assert all(v == 0 for v in violations) is (recipe != "frames")
        # The file goes on in one process as well.
        sparse = NMSparsity(1, 4, layers=["net.2", "net.4"], **RECIPES[recipe])
        module = train(Digits(), sparse, ckpt=tmp_path / "at.ckpt")
        for name, weight in module.named_parameters():
            torch.testing.assert_close(answers[0][0][name], weight.detach(), atol=2e-6, rtol=1e-5)


def refused(how, kwargs):
    train(Sharded(how), NMSparsity(1, 4, **kwargs), 2, strategy=mesh(how), devices=2)


@pytest.mark.parametrize(
    ("how", "kwargs", "sentence"),
    [
        ("layers", {"dim": "out", "layers": "net.2"}, 'NMSparsity: groups along dim="out" reach over many rows, but'),
        ("layers", {"permute": True, "layers": "net.2"}, "NMSparsity: permute=True exchanges rows, but 'net.2.weight'"),
        ("rows", {"layers": "net.4"}, "'net.4.weight' is split as S(1), which cuts its rows. Split it along"),
        ("both", {"layers": "net.2"}, "'net.2.weight' is split in a way that does not leave rows in order"),
    ],
)
def test_what_rows_do_not_suffice_for_is_refused(two_processes, how, kwargs, sentence):
    with pytest.raises(MisconfigurationException) as raised:
        two_processes.run(refused, how, kwargs)
    assert sentence in str(raised.value)


@pytest.mark.parametrize(
    ("name", "why"), [("FSDPStrategy", "flat vectors"), ("DeepSpeedStrategy", "copies of its own")]
)
def test_strategies_with_parameters_of_their_own_are_refused(name, why):
    trainer = make_trainer(strategy=type(name, (SingleDeviceStrategy,), {})(torch.device("cpu")))
    with pytest.raises(MisconfigurationException, match=rf"NMSparsity edits parameters, but {name} .*{why}"):
        check_editable(NMSparsity(), trainer)
