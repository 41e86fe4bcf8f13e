"""Digits, 400 training images with 20 % label noise: what a bounded map does to the weights of a small network.

MLP 64-256-256-10, SGD 0.05 with momentum 0.9 and weight decay 5e-4, batch 50, 80 epochs; tested on the other 1,397
images with their true labels. Of the weights of all three layers: the largest magnitude, the share below 0.01, the
kurtosis. The point is the distribution of the weights; accuracies differ by little more than the seeds do.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from _shared import Arm, fit
from lightning.pytorch import LightningModule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import WeightCompander
from lightning_reg.functional import weight_stats

TRAIN, NOISE, EPOCHS, BATCH = 400, 80, 80, 50
ARMS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "a=0.2, b=0.1": {"a": 0.2, "b": 0.1},
    "a=1, b=0.5": {"a": 1.0, "b": 0.5},
    "a=1, b=1": {"a": 1.0, "b": 1.0},
    "a, b from the weights": {},
    "learned, lr / 100": {"learn": True},
    "learned, same lr": {"learn": True, "shape_lr_factor": 1.0},
}


class Classifier(LightningModule):
    """An ordinary classifier: nothing in it knows about lightning_reg."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


def data(seed: int) -> tuple[TensorDataset, Tensor, Tensor]:
    """Noisy training set, and inputs and labels to test on."""
    generator = torch.Generator().manual_seed(seed)
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=generator)
    chosen, rest = order[:TRAIN], order[TRAIN:]
    labels = y[chosen].clone()
    # Always another class than the true one.
    labels[:NOISE] = (labels[:NOISE] + torch.randint(1, 10, (NOISE,), generator=generator)) % 10
    return TensorDataset(x[chosen], labels), x[rest], y[rest]


def run(seeds: Sequence[int]) -> list[Arm]:
    arms = [Arm(name) for name in ARMS]
    for seed in seeds:
        train, x, y = data(seed)
        for arm in arms:
            torch.manual_seed(seed)
            module, arguments = Classifier(), ARMS[arm.name]
            callbacks = [] if arguments is None else [WeightCompander(**arguments)]
            loader = DataLoader(train, BATCH, shuffle=True)
            fit(module, callbacks, loader, max_epochs=EPOCHS)
            with torch.no_grad():
                accuracy = 100 * (module.net(x).argmax(1) == y).double().mean()
            weights = torch.cat([layer.weight.detach().flatten() for layer in module.net[::2]])
            stats = weight_stats(module)
            arm.add(
                accuracy=float(accuracy),
                largest_weight=stats["max"],
                percent_below_001=100 * float((weights.abs() < 0.01).double().mean()),
                kurtosis=stats["kurtosis"],
            )
    return arms
