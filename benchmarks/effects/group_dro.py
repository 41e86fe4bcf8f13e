"""Coloured digits: accuracy of the worst group of label and colour, with and without GroupDRO.

Small images of digits, below 5 or not; a colour (64 pixels more, as bright as the digit) agrees with the label in 95 %
of the training images and in half of the test images. Groups: label and colour, four. A perceptron 128-64-2, Adam 1e-3,
batches of 64, 30 epochs. GroupDRO with eta 0.1; "balanced": batches drawn with the groups alike. In per cent.
"""

import sys

import torch
import torch.nn.functional as F
from _shared import Arm, fit
from lightning.pytorch import LightningModule, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from lightning_reg import GroupDRO, WorstGroupAccuracy

GROUPS = 4
ARMS = {
    "plain": (None, False),
    "GroupDRO": ({"eta": 0.1}, False),
    "GroupDRO, adjusted by 1": ({"eta": 0.1, "generalization_adjustment": 1.0}, False),
    "plain, balanced": (None, True),
    "GroupDRO, balanced": ({"eta": 0.1}, True),
}


class Digits(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 2))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


def coloured(images, labels, agree):
    """Images of both colours, labels and groups."""
    colour = torch.where(torch.rand(len(labels)) < agree, labels, 1 - labels)
    x = torch.zeros(len(labels), 2, 64)
    x[torch.arange(len(labels)), colour] = images
    return x.flatten(1), labels, 2 * labels + colour


def run(seeds):
    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target > 4).long()
    arms = [Arm(name) for name in ARMS]
    for seed in seeds:
        seed_everything(seed, verbose=False)
        order = torch.randperm(len(labels))
        train, test = order[:1200], order[1200:]
        x, y, groups = coloured(images[train], labels[train], 0.95)
        seen = coloured(images[test], labels[test], 0.5)
        counts = groups.bincount(minlength=GROUPS)
        for arm in arms:
            seed_everything(seed, verbose=False)
            options, balanced = ARMS[arm.name]
            sampler = WeightedRandomSampler(1 / counts[groups].double(), len(y)) if balanced else None
            loader = DataLoader(TensorDataset(x, y, groups), 64, shuffle=not balanced, sampler=sampler)
            adjusted = {"group_counts": counts.tolist()} if options and len(options) > 1 else {}
            callbacks = [] if options is None else [GroupDRO(GROUPS, group_key="2", **options, **adjusted)]
            model = Digits()
            fit(model, callbacks, loader, max_epochs=30)
            with torch.no_grad():
                predicted = model.net(seen[0]).argmax(1)
            metric = WorstGroupAccuracy(num_groups=GROUPS)
            metric.update(predicted, seen[1], seen[2])
            arm.add(worst_group=100 * metric.compute(), all=100 * (predicted == seen[1]).float().mean())
            print(f"seed {seed}, {arm.name}", file=sys.stderr, flush=True)
    return arms
