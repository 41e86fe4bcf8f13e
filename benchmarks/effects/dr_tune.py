"""Few-shot fine-tuning to new digits: accuracy with and without DR-Tune.

A perceptron 64-256-128 is trained on the digits 0 to 4 (half of their images, 30 epochs of Adam 1e-3), then fine-tuned
with a new head on 2 or 5 images of each of the digits 5 to 9: SGD 0.02, without momentum and with 0.9, batches of 5,
60 epochs; the bank is as large as the set. Test: all other images of the digits 5 to 9, in per cent. The last arm is a
control: the features of the first encoder as they were.
"""

import sys

import torch
import torch.nn.functional as F
from _shared import Arm, fit
from lightning.pytorch import LightningModule, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import DRTune

ARMS = {
    "cross-entropy": None,
    "DR-Tune": {"weight": 1.0},
    "DR-Tune, weight 4": {"weight": 4.0},
    "DR-Tune, weight 4, not calibrated": {"weight": 4.0, "calibration": False},
}


class Digits(LightningModule):
    def __init__(self, momentum=None):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU())
        self.head, self.momentum = nn.Linear(128, 5), momentum

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.head(self.encoder(x)), y)

    def configure_optimizers(self):
        if self.momentum is None:
            return torch.optim.Adam(self.parameters(), 1e-3)
        return torch.optim.SGD(self.parameters(), 0.02, momentum=self.momentum)


def accuracy(start, arguments, few, rest, momentum, seed):
    """Test accuracy after fine-tuning on a few images."""
    seed_everything(seed, verbose=False)
    model = Digits(momentum)
    model.encoder.load_state_dict(start)
    size = len(few[0])
    callbacks = [] if arguments is None else [DRTune("encoder", "head", bank_size=size, **arguments)]
    fit(model, callbacks, DataLoader(TensorDataset(*few), 5, shuffle=True), max_epochs=60)
    with torch.no_grad():
        return 100 * (model.head(model.encoder(rest[0])).argmax(1) == rest[1]).float().mean()


def run(seeds):
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    old, new = (y < 5).nonzero()[:, 0], (y > 4).nonzero()[:, 0]
    arms = [Arm(name) for name in ARMS]
    for seed in seeds:
        seed_everything(seed, verbose=False)
        half = old[torch.randperm(len(old))[: len(old) // 2]]
        model = Digits()
        fit(model, [], DataLoader(TensorDataset(x[half], y[half]), 64, shuffle=True), max_epochs=30)
        order = new[torch.randperm(len(new))]
        sets = {}
        for shots in (2, 5):
            few = torch.cat([order[y[order] == digit][:shots] for digit in range(5, 10)])
            rest = order[~torch.isin(order, few)]
            data = (x[few], y[few] - 5), (x[rest], y[rest] - 5)
            sets |= {f"{shots}_shots": (*data, 0.0), f"{shots}_shots,_momentum": (*data, 0.9)}
        for arm in arms:
            arm.add(**{k: accuracy(model.encoder.state_dict(), ARMS[arm.name], *s, seed) for k, s in sets.items()})
            print(f"seed {seed}, {arm.name}", file=sys.stderr, flush=True)
    return arms
