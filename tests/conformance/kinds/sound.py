"""One sound member of each kind, for the laws to pass on."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset
from torchmetrics import Metric

from lightning_reg.engine.host.procedures import procedure
from tests.conformance.kinds.lightning_module import DataModuleCase, LightningModuleCase
from tests.conformance.kinds.metric import MetricCase
from tests.conformance.kinds.network import NetworkCase
from tests.conformance.kinds.procedure import ProcedureCase
from tests.conformance.kinds.sampler import SamplerCase
from tests.conformance.problems import seeded

__all__ = ["SOUND", "Data", "Draws", "Gate", "MeanDistance", "Module", "SpreadLoss", "network", "sensitivity"]


class MeanDistance(Metric):
    """Mean distance of numbers from 0.

    Source:
        Nobody, "A toy for tests", ICML 2031, arXiv 3101.00001.

    Differs:
        Nothing.

    Args:
        power: Above 0.

    """

    def __init__(self, power: float = 2.0) -> None:
        super().__init__()
        if power <= 0:
            raise ValueError(f"MeanDistance: `power` must be above 0, got {power}.")
        self.power = power
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        self.total += values.float().abs().pow(self.power).sum()
        self.count += len(values)

    def compute(self) -> Tensor:
        return self.total / self.count


def mean_distance(batches):
    numbers = [number for batch in batches for number in batch["values"].tolist()]
    return sum(abs(number) ** 2 for number in numbers) / len(numbers)


class Gate(nn.Module):
    """A weighted mean of numbers.

    Source:
        Nobody, "A toy for tests", ICML 2031, arXiv 3101.00001.

    Differs:
        Nothing.

    Args:
        size: Number of weights, at least 1.

    """

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"{type(self).__name__}: `size` must be at least 1, got {size}.")
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, size))

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.2, self.training) * self.weight


class SpreadLoss(Gate):
    """Squared distance of a batch's rows from their mean.

    Source:
        Nobody, "A toy for tests", ICML 2031, arXiv 3101.00001.

    Differs:
        Nothing.

    Args:
        size: Number of weights, at least 1.

    """

    def forward(self, x: Tensor) -> Tensor:
        return ((x - x.mean(0)) * self.weight).square().sum(1).mean()


class Module(LightningModule):
    """A linear network.

    Source:
        Nobody, "A toy for tests", ICML 2031, arXiv 3101.00001.

    Differs:
        Nothing.

    Args:
        lr: Learning rate, above 0.

    """

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        if lr <= 0:
            raise ValueError(f"Module: `lr` must be above 0, got {lr}.")
        self.save_hyperparameters()
        self.net = nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)


def rows():
    return TensorDataset(torch.linspace(-1.0, 1.0, 32).reshape(8, 4))


class Data(LightningDataModule):
    """A few rows.

    Source:
        Nobody, "A toy for tests", ICML 2031, arXiv 3101.00001.

    Differs:
        Nothing.

    Args:
        batch_size: At least 1.

    """

    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"Data: `batch_size` must be at least 1, got {batch_size}.")
        self.batch_size = batch_size

    def setup(self, stage):
        self.rows = rows()

    def train_dataloader(self):
        return DataLoader(self.rows, self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.rows, self.batch_size)


def network():
    with seeded(0):
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 2))


@procedure
def sensitivity(module: nn.Module, x: Tensor, scale: float = 1.0) -> Tensor:
    """Gradient of each row's squared output by its input.

    Source:
        Nobody, "A toy for tests", ICML 2031, arXiv 3101.00001.

    Differs:
        Nothing.

    Args:
        module: The network.
        x: Inputs, ``(B, D)``.
        scale: Factor, above 0.

    Returns:
        ``(B, D)``.

    """
    if scale <= 0:
        raise ValueError(f"sensitivity: `scale` must be above 0, got {scale}.")
    module.eval()
    torch.rand(1)
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(module(x).square().sum(), x)
    return scale * gradient


class Draws(Sampler):
    """A random order.

    Source:
        Nobody, "A toy for tests", ICML 2031, arXiv 3101.00001.

    Differs:
        Nothing.

    Args:
        size: Number of samples, at least 1.
        num_replicas: Number of ranks.
        rank: Of them.

    """

    def __init__(self, size: int = 8, num_replicas: int = 1, rank: int = 0) -> None:
        if size < 1:
            raise ValueError(f"Draws: `size` must be at least 1, got {size}.")
        self.size, self.num_replicas, self.rank, self.epoch = size, num_replicas, rank, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(range(self.rank, self.size, self.num_replicas))

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        return iter(order[self.rank :: self.num_replicas])


INPUT = torch.linspace(-1.0, 1.0, 8).reshape(2, 4)
NUMBERS = [{"values": torch.linspace(-1.0, 2.0, 5) + number} for number in range(4)]
SOUND = {
    "metric": MetricCase(MeanDistance, NUMBERS, mean_distance, [({"power": 0.0}, "power")]),
    "network": NetworkCase(Gate, (INPUT,), [({"size": 0}, "size")]),
    "loss": NetworkCase(SpreadLoss, (INPUT,), [({"size": 0}, "size")]),
    "lightning_module": LightningModuleCase(Module, partial(DataLoader, rows(), 4), {"lr": 0.2}, [({"lr": 0.0}, "lr")]),
    "datamodule": DataModuleCase(Data, {"batch_size": 3}, [({"batch_size": 0}, "batch_size")]),
    "procedure": ProcedureCase(sensitivity, network, (INPUT,), {"scale": 2.0}, [({"scale": 0.0}, "scale")]),
    "sampler": SamplerCase(Draws, [({"size": 0, "num_replicas": 1, "rank": 0}, "size")]),
}
