"""Long training on noisy labels: test accuracy on its way and at the end, with and without LocalMeanTeacher.

A perceptron 64-128-10 is trained on 800 digits of 8 x 8 pixels, 40 % of whose labels are replaced by others, by SGD 0.1
with momentum 0.9 and batches of 32 for 40 epochs; the teacher is compared in the logits. Test: the other 997 digits, in
per cent; "drop" is the best epoch's accuracy less the last one's.
"""

import sys

import torch
import torch.nn.functional as F
from _shared import Arm, fit
from lightning.pytorch import LightningModule, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import LocalMeanTeacher

ARMS = {
    "cross-entropy": None,
    "LocalMeanTeacher, weight 1": {"weight": 1.0},
    "LocalMeanTeacher, weight 10": {"weight": 10.0},
}


class Digits(LightningModule):
    def __init__(self, test):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        self.test, self.curve = test, []

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def on_train_epoch_end(self):
        with torch.no_grad():
            self.curve.append(100 * (self.net(self.test[0]).argmax(1) == self.test[1]).float().mean().item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def run(seeds):
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    arms = [Arm(name) for name in ARMS]
    for seed in seeds:
        seed_everything(seed, verbose=False)
        order = torch.randperm(len(x))
        few, rest = order[:800], order[800:]
        wrong = torch.rand(800) < 0.4
        given = torch.where(wrong, (y[few] + torch.randint(1, 10, (800,))) % 10, y[few])
        for arm in arms:
            seed_everything(seed, verbose=False)
            model, arguments = Digits((x[rest], y[rest])), ARMS[arm.name]
            callbacks = [] if arguments is None else [LocalMeanTeacher("net", **arguments)]
            fit(model, callbacks, DataLoader(TensorDataset(x[few], given), 32, shuffle=True), max_epochs=40)
            arm.add(
                **{
                    "last_(%)": model.curve[-1],
                    "best_(%)": max(model.curve),
                    "drop": max(model.curve) - model.curve[-1],
                }
            )
            print(f"seed {seed}, {arm.name}: {[v[-1] for v in arm.values.values()]}", file=sys.stderr, flush=True)
    return arms
