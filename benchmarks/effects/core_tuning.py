"""Fine-tuning to noisy digits with few labels: accuracy with and without Core-tuning.

A perceptron 64-256-128 is trained on half of the digits (30 epochs of Adam 1e-3), then fine-tuned with a new head on 20
images of each digit out of the other half, with noise (standard deviation 0.4) and the ghost of another image (half as
bright): SGD 0.01 with momentum 0.9, batches of 64, 40 epochs. Test: the rest of that half, spoilt alike, in per cent.
The second arm is the control: cross-entropy and a plain supervised contrast of the features.
"""

import sys

import torch
import torch.nn.functional as F
from _shared import Arm, fit
from lightning.pytorch import LightningModule, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import CoreTuning, MetricLoss

PLACE = {"layer": "encoder", "head": "head"}
ARMS = {
    "cross-entropy": lambda seed: [],
    "with supervised contrast": lambda seed: [
        MetricLoss("encoder", "lightning_reg.functional.supervised_contrastive_loss", {"temperature": 0.07})
    ],
    "Core-tuning": lambda seed: [CoreTuning(**PLACE, seed=seed)],
    "Core-tuning, eta 0": lambda seed: [CoreTuning(**PLACE, eta=0.0, seed=seed)],
    "Core-tuning as released, eta 0.1": lambda seed: [CoreTuning(**PLACE, eta=0.1, variant="released", seed=seed)],
}


class Digits(LightningModule):
    def __init__(self, tuning=False):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU())
        self.head, self.tuning = nn.Linear(128, 10), tuning

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.head(self.encoder(x)), y)

    def configure_optimizers(self):
        if self.tuning:
            return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)
        return torch.optim.Adam(self.parameters(), 1e-3)


def run(seeds):
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    arms = [Arm(name) for name in ARMS]
    for seed in seeds:
        seed_everything(seed, verbose=False)
        order = torch.randperm(len(x))
        old, new = order[: len(x) // 2], order[len(x) // 2 :]
        start = Digits()
        fit(start, [], DataLoader(TensorDataset(x[old], y[old]), 64, shuffle=True), max_epochs=30)
        spoilt = x[new] + 0.5 * x[new[torch.randperm(len(new))]] + 0.4 * torch.randn(len(new), 64)
        few = torch.cat([(y[new] == digit).nonzero()[:20, 0] for digit in range(10)])
        rest = torch.ones(len(new), dtype=torch.bool).index_fill(0, few, False)
        data = TensorDataset(spoilt[few], y[new][few])
        for arm in arms:
            seed_everything(seed, verbose=False)
            model = Digits(tuning=True)
            model.encoder.load_state_dict(start.encoder.state_dict())
            fit(model, ARMS[arm.name](seed), DataLoader(data, 64, shuffle=True), max_epochs=40)
            with torch.no_grad():
                right = model.head(model.encoder(spoilt[rest])).argmax(1) == y[new][rest]
            arm.add(accuracy=100 * right.float().mean())
            print(f"seed {seed}, {arm.name}", file=sys.stderr, flush=True)
    return arms
