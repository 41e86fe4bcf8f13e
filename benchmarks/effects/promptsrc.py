"""Base-to-novel: accuracy on digits that were trained on and on those that were not, in a new domain.

A perceptron 64-128-32 with a cosine classifier (scale 20, a table of classes) is trained on 900 digits (Adam 3e-3, 40
epochs). The other 897 are shifted by a fixed linear map near the identity, with noise. Then the perceptron alone is
trained on 8 shifted images of each of the digits 0 to 4, among all ten: SGD 5e-3 with momentum 0.9, batches of 8, 30
epochs. Test: the shifted images that are left; digits 0 to 4 (base) are told from one another, and 5 to 9 (novel). The
agreement has weight 10 on features and 1 on logits, the average is around epoch 22 with a deviation of 1.5.
"""

import sys

import torch
import torch.nn.functional as F
from _shared import Arm, fit
from lightning.pytorch import LightningModule, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import BaseToNovelAccuracy, FrozenTwinAgreement, SoupAverager

BASE, SHOTS, SHIFT, NOISE = list(range(5)), 8, 0.5, 0.15


def agreement():
    return FrozenTwinAgreement({"encoder": 10.0}, logit_weight=1.0)


def average():
    return SoupAverager(method="gaussian", mean_epoch=22, std_epochs=1.5)


ARMS = {
    "cross-entropy": list,
    "frozen": None,
    "+ features and logits": lambda: [agreement()],
    "+ average of epochs": lambda: [average()],
    "+ all three": lambda: [agreement(), average()],
}


class Digits(LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
        self.table = nn.Parameter(torch.randn(10, 32))

    def forward(self, x):
        return 20 * F.normalize(self.encoder(x), dim=1) @ F.normalize(self.table, dim=1).T

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.encoder.parameters(), 5e-3, momentum=0.9)


def pretrained(x, y):
    """Weights of a network that knows all ten digits."""
    model = Digits()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(40):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.state_dict()


def scores(start, callbacks, few, rest, seed):
    """Accuracy after training on a few images."""
    seed_everything(seed, verbose=False)
    model = Digits()
    model.load_state_dict(start)
    model.table.requires_grad_(False)
    if callbacks is not None:
        fit(model, callbacks, DataLoader(TensorDataset(*few), 8, shuffle=True), max_epochs=30)
    score = BaseToNovelAccuracy(BASE)
    with torch.no_grad():
        score.update(model(rest[0]), rest[1])
    return score.compute()


def run(seeds):
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    arms = [Arm(name) for name in ARMS]
    for seed in seeds:
        seed_everything(seed, verbose=False)
        order = torch.randperm(len(x))
        start = pretrained(x[order[:900]], y[order[:900]])
        left = order[900:]
        moved = x[left] @ (torch.eye(64) + SHIFT / 8 * torch.randn(64, 64)) + NOISE * torch.randn(len(left), 64)
        labels = y[left]
        few = torch.cat([(labels == digit).nonzero()[:SHOTS, 0] for digit in BASE])
        rest = torch.ones(len(left), dtype=torch.bool).index_fill(0, few, False)
        sets = (moved[few], labels[few]), (moved[rest], labels[rest])
        for arm in arms:
            make = ARMS[arm.name]
            arm.add(**scores(start, None if make is None else make(), *sets, seed))
            print(f"seed {seed}, {arm.name}", file=sys.stderr, flush=True)
    return arms
