"""Digits, trained on all classes or on a random half of them in each step: accuracy among all and among fewer classes.

A perceptron 64-64-10 is trained on 500 digits of 8 x 8 pixels by SGD 0.1 with momentum 0.9 and batches of 32 for 30
epochs. Test: the other 1297 digits, in per cent, among all ten classes, and among their own class and a few others,
drawn anew for each digit.
"""

import sys

import torch
import torch.nn.functional as F
from _shared import Arm, fit
from lightning.pytorch import LightningModule, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import ClassDropout

KEEP = {"cross-entropy": 1.0, "ClassDropout, keep=0.5": 0.5, "ClassDropout, keep=0.2": 0.2}


class Digits(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def accuracy(logits, y, others, order):
    """In per cent, among the own class and the first others of a random order."""
    place = order.masked_fill(F.one_hot(y, 10).bool(), -1.0)
    asked = place <= place.sort(1).values[:, others : others + 1]
    return 100 * (logits.masked_fill(~asked, -torch.inf).argmax(1) == y).float().mean().item()


def run(seeds):
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    arms = [Arm(name) for name in KEEP]
    for seed in seeds:
        seed_everything(seed, verbose=False)
        few, rest = torch.randperm(len(x)).tensor_split([500])
        order = torch.rand(len(rest), 10)
        for arm in arms:
            seed_everything(seed, verbose=False)
            model, loader = Digits(), DataLoader(TensorDataset(x[few], y[few]), 32, shuffle=True)
            fit(model, [ClassDropout(KEEP[arm.name], seed=seed)] if KEEP[arm.name] < 1 else [], loader, max_epochs=30)
            with torch.no_grad():
                logits = model.net(x[rest])
            among = {f"among_{n + 1}_(%)": accuracy(logits, y[rest], n, order) for n in (9, 4, 1)}
            arm.add(**among)
            print(f"seed {seed}, {arm.name}: {list(among.values())}", file=sys.stderr, flush=True)
    return arms
