"""Digits on canvases, bright or dim, which are segmented: for experiments on wrong masks."""

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn

__all__ = ["SIDE", "Segmenter", "canvases", "mean_iou"]

SIDE = 24


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


def mean_iou(found, truth):
    counts = [(((found == c) & (truth == c)).sum(), ((found == c) | (truth == c)).sum()) for c in range(3)]
    return sum((both / either).item() for both, either in counts) / 3
