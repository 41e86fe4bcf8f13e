"""ELR+ and its parts on digits with wrong labels.

scikit-learn's digits, 1,200 for training and 597 for the test. With the given probability a training label is redrawn
uniformly over all classes, so "40 %" means 36 % wrong. MLP 64-256-256-10, SGD of lr 0.05, momentum 0.9, weight decay
1e-3, batch 64, 60 epochs; ELR and ELR+ with the paper's lambda 3 and beta 0.7 (CIFAR-10, symmetric noise), ELR+ with
mixup 1 and averages of decay 0.997, reached half-way. Test accuracies are the last epoch's; `predictor` is the mean of
both networks' logits where there are two, `network 1` is the module itself. `found` is F1 of the wrong labels among
those that the targets (for CE: the network) contradict. What is left out of ELR+ is what the paper's ablation leaves
out.
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

from lightning_reg import ELRCallback, ELRPlusCallback

NOISES, EPOCHS, BATCH, TRAIN = (0.4, 0.6), 60, 64, 1200
STEPS = EPOCHS * (-(-TRAIN // BATCH))
SETTINGS: dict[str, Any] = {"lam": 3.0, "beta": 0.7}
PLUS = {**SETTINGS, "decay_rampup_steps": STEPS // 2}
METHODS: dict[str, Any] = {
    "CE": None,
    "ELR": lambda seed: ELRCallback(**SETTINGS),
    "ELR+": lambda seed: ELRPlusCallback(**PLUS, seed=seed),
    "ELR+ without averages": lambda seed: ELRPlusCallback(**PLUS, seed=seed, averaging=False),
    "ELR+ without mixup": lambda seed: ELRPlusCallback(**PLUS, seed=seed, mixup_alpha=0.0),
    "ELR+ with one network": lambda seed: ELRPlusCallback(**PLUS, seed=seed, networks=1),
    "ELR+ without the three": lambda seed: ELRPlusCallback(
        **PLUS, seed=seed, averaging=False, mixup_alpha=0.0, networks=1
    ),
}


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)


def data(seed: int, noise: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    digits = load_digits()
    x, clean = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    train, test = order[:TRAIN], order[TRAIN:]
    redrawn = torch.rand(TRAIN, generator=generator) < noise
    given = torch.where(redrawn, torch.randint(10, (TRAIN,), generator=generator), clean[train])
    return x[train], given, given != clean[train], x[test], clean[test]


def f1(suspects: Tensor, wrong: Tensor) -> float:
    return float(2 * (suspects & wrong).sum() / (suspects.sum() + wrong.sum()).clamp(min=1))


def one(technique: Any, seed: int, noise: float) -> dict[str, float]:
    x, given, wrong, x_test, y_test = data(seed, noise)
    torch.manual_seed(seed)
    module = Classifier()
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(TensorDataset(x, given), BATCH, shuffle=True, generator=generator)
    fit(module, [] if technique is None else [technique], loader, max_epochs=EPOCHS)
    module.eval()
    pair = getattr(technique, "networks", 1) == 2
    predictor = technique.ensemble(module) if pair else module
    with torch.no_grad():
        suspects = module(x).argmax(1) != given if technique is None else technique.suspected_label_errors()
        return {
            "predictor": float((predictor(x_test).argmax(1) == y_test).float().mean()),
            "network_1": float((module(x_test).argmax(1) == y_test).float().mean()),
            "found": f1(suspects, wrong),
        }


def run(seeds: Sequence[int]) -> list[Arm]:
    arms = [Arm(name) for name in METHODS]
    for arm in arms:
        make = METHODS[arm.name]
        for seed in seeds:
            for noise in NOISES:
                found = one(None if make is None else make(seed), seed, noise)
                arm.add(**{f"{metric}_{noise:.0%}": value for metric, value in found.items()})
    return arms
