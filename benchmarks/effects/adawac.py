"""Digits on noisy canvases of which most are empty: segmentation with and without AdaWAC, and which weights it gives.

60 canvases of 16 x 16 with a digit of 8 x 8 and 240 without, noise of 0.3; the mask is where a digit is bright. Tests:
200 canvases with a digit. A small network with an encoder and a decoder, half cross-entropy and half batch Dice, SGD
0.1 with momentum 0.9, batch 24, 25 epochs. Dice of the digits; mean weight b of the canvases with a digit and of the
empty ones, and the area under the curve of b for "has a digit" (1 and 1/2 where there are no weights).
"""

import sys

import torch
import torch.nn.functional as F
from _shared import Arm, fit
from lightning.pytorch import LightningModule, seed_everything
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import AdaWAC
from lightning_reg.functional import batch_dice_loss

WITH, WITHOUT, TEST, SIDE, EPOCHS = 60, 240, 200, 16, 25
ARMS = {
    "plain": None,
    "AdaWAC, eta 0 (no weights)": {"eta": 0.0},
    "AdaWAC, eta 2": {"eta": 2.0},
    "AdaWAC, eta 2, as it is": {"eta": 2.0, "align": None},
    "AdaWAC, eta 8": {"eta": 8.0},
}


class Segmenter(LightningModule):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU())
        self.encoder = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU())
        self.head = nn.Conv2d(48, 2, 3, padding=1)

    def forward(self, x):
        fine = self.first(x)
        coarse = F.interpolate(self.encoder(fine), scale_factor=2.0, mode="bilinear", align_corners=False)
        return self.head(torch.cat([fine, coarse], 1))

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        return 0.5 * F.cross_entropy(logits, batch[1]) + 0.5 * batch_dice_loss(logits, batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def canvases(digits, count, empty, generator):
    x = torch.zeros(count + empty, 1, SIDE, SIDE)
    chosen = torch.randperm(len(digits), generator=generator)[:count]
    for canvas, digit in zip(x, digits[chosen], strict=False):
        down, right = torch.randint(SIDE - 7, (2,), generator=generator).tolist()
        canvas[0, down : down + 8, right : right + 8] = digit
    return x + 0.3 * torch.randn(x.shape, generator=generator), (x[:, 0] > 0.4).long()


def measured(arguments, seed):
    generator = torch.Generator().manual_seed(seed)
    digits = torch.tensor(load_digits().images / 16, dtype=torch.float32)
    train, (x, y) = canvases(digits, WITH, WITHOUT, generator), canvases(digits, TEST, 0, generator)
    seed_everything(seed, verbose=False)
    model, adawac = Segmenter(), None if arguments is None else AdaWAC("encoder", lam=2.0, **arguments)
    loader = DataLoader(TensorDataset(*train), 24, shuffle=True, generator=torch.Generator().manual_seed(seed))
    fit(model, [] if adawac is None else [adawac], loader, max_epochs=EPOCHS)
    with torch.no_grad():
        found = model(x).argmax(1)
    dice = (2 * (found * y).sum() / (found.sum() + y.sum())).item()
    if adawac is None:
        return {"dice": dice, "weight_with": 1.0, "weight_empty": 1.0, "area": 0.5}
    weights = adawac.sample_report().weight
    area = roc_auc_score([1] * WITH + [0] * WITHOUT, weights.tolist())
    means = weights[:WITH].mean().item(), weights[WITH:].mean().item()
    return {"dice": dice, "weight_with": means[0], "weight_empty": means[1], "area": float(area)}


def run(seeds):
    arms = [Arm(name) for name in ARMS]
    for seed in seeds:
        for arm in arms:
            arm.add(**measured(ARMS[arm.name], seed))
            print(
                f"seed {seed}, {arm.name}: { ({k: v[-1] for k, v in arm.values.items()}) }", file=sys.stderr, flush=True
            )
    return arms
