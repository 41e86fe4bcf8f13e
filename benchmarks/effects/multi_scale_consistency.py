"""Digits on canvases with dilated masks: what a network predicts with and without consistency over scales.

100 canvases of 24 x 24 with a digit of 8 x 8, bright or dim, which is its class (mask: background and two classes),
noise of 0.2; 40 % of the masks are dilated by 2 pixels. Small network with batch norm, Adam 3e-3, batch 10, 15 epochs.
Mean IoU of the three classes at the end: on 100 further canvases against their true masks, and of the predictions for
the training canvases as labels, against the true masks too (those given have the last column's). Disagreement: mean
divergence of the predictions at scales 0.7, 1 and 1.5 on the test canvases, times 100.
"""

import sys

import torch
import torch.nn.functional as F
from _shared import Arm, fit
from lightning.pytorch import LightningModule, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import MultiScaleConsistency
from lightning_reg.functional import multiscale_consistency, resized, scaled_size

TRAIN, TEST, SIDE, EPOCHS, NOISY = 100, 100, 24, 15, 0.4
ARMS = {
    "plain": None,
    "three scales, lam 0": {"lam": 0.0},
    "three scales, lam 1": {"lam": 1.0},
    "lam 1, other scales without labels": {"lam": 1.0, "supervised": 0.0},
}


class Segmenter(LightningModule):
    def __init__(self):
        super().__init__()
        self.first, self.second = self.block(1, 8), self.block(8, 16)
        self.head = nn.Sequential(self.block(24, 8), nn.Conv2d(8, 3, 1))

    def block(self, before, after):
        return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU())

    def forward(self, x):
        fine = self.first(x)
        coarse = F.interpolate(self.second(F.max_pool2d(fine, 2)), fine.shape[-2:], mode="bilinear")
        return self.head(torch.cat([fine, coarse], 1))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 3e-3)


def canvases(digits, count, generator):
    x, y = torch.zeros(count, 1, SIDE, SIDE), torch.zeros(count, SIDE, SIDE, dtype=torch.long)
    chosen = torch.randperm(len(digits), generator=generator)[:count]
    for canvas, mask, digit in zip(x, y, digits[chosen], strict=True):
        down, right = torch.randint(2, SIDE - 9, (2,), generator=generator).tolist()
        kind = int(torch.randint(2, (), generator=generator))
        canvas[0, down : down + 8, right : right + 8] = digit * (1.0, 0.5)[kind]
        mask[down : down + 8, right : right + 8] = (digit > 0.4) * (kind + 1)
    return x + 0.2 * torch.randn(x.shape, generator=generator), y


def dilated(y, generator):
    wide = F.max_pool2d(y[:, None].float(), 5, 1, 2)[:, 0].long()
    return torch.where((torch.rand(len(y), generator=generator) < NOISY)[:, None, None], wide, y)


def mean_iou(found, truth):
    counts = [(((found == c) & (truth == c)).sum(), ((found == c) | (truth == c)).sum()) for c in range(3)]
    return sum((both / either).item() for both, either in counts) / 3


def measured(arguments, seed):
    generator = torch.Generator().manual_seed(seed)
    digits = torch.tensor(load_digits().images / 16, dtype=torch.float32)
    (x, y), (x_test, y_test) = canvases(digits, TRAIN, generator), canvases(digits, TEST, generator)
    given = dilated(y, generator)
    seed_everything(seed, verbose=False)
    model = Segmenter()
    loader = DataLoader(TensorDataset(x, given), 10, shuffle=True, generator=torch.Generator().manual_seed(seed))
    fit(model, [] if arguments is None else [MultiScaleConsistency(**arguments)], loader, max_epochs=EPOCHS)
    model.eval()
    with torch.no_grad():
        scores = model(x_test)
        others = [
            resized(model(resized(x_test, scaled_size((SIDE, SIDE), scale))), (SIDE, SIDE)) for scale in (0.7, 1.5)
        ]
        return {
            "test_IoU": mean_iou(scores.argmax(1), y_test),
            "IoU_of_predicted_labels": mean_iou(model(x).argmax(1), y),
            "disagreement": 100 * multiscale_consistency([scores, *others], rho=0.0).mean().item(),
            "IoU_of_given_labels": mean_iou(given, y),
        }


def run(seeds):
    arms = [Arm(name) for name in ARMS]
    for seed in seeds:
        for arm in arms:
            arm.add(**measured(ARMS[arm.name], seed))
            print(f"seed {seed}, {arm.name}", file=sys.stderr, flush=True)
    return arms
