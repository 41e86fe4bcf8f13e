"""Digits that training has not seen, told apart by one threshold: OPIS and recall with and without TCM.

Training set: all images of the digits 0 to 5; test set: all images of 6 to 9. A perceptron 64-256-64, supervised
contrastive loss with temperature 0.1 on unit embeddings (written by hand: no loss function of torch), batches of 96
with 16 images of each digit, Adam 1e-3, 250 steps. OPIS (101 thresholds, false accepts from 1 % to 10 %) in
thousandths, lower is better, and recall at 1 in per cent, both of the unseen digits. The last arm is a control: the
weight of the negatives alone.
"""

import sys

import torch
import torch.nn.functional as F
from _shared import Arm
from _unseen_digits import scores
from lightning.pytorch import LightningModule
from torch import nn

from lightning_reg import TCM

TEMPERATURE = 0.1
PLAIN = "contrastive"
ARMS = {
    PLAIN: None,
    "TCM": {},
    "TCM, weights 3": {"lambda_plus": 3.0, "lambda_minus": 3.0},
    "TCM, margins 0.7 and 0.3": {"margin_plus": 0.7, "margin_minus": 0.3},
    "TCM, negatives alone": {"lambda_plus": 0.0},
}


class Embedder(LightningModule):
    def __init__(self):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))

    def training_step(self, batch, batch_idx):
        x, y = batch
        z = F.normalize(self.embed(x))
        oneself = torch.eye(len(z), dtype=torch.bool)
        log_p = (z @ z.T / TEMPERATURE).masked_fill(oneself, -torch.inf).log_softmax(1)
        same = (y[:, None] == y) & ~oneself
        return -(log_p.masked_fill(~same, 0.0).sum(1) / same.sum(1)).mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


def run(seeds):
    arms = [Arm(name) for name in ARMS]
    for seed in seeds:
        for arm in arms:
            arguments = ARMS[arm.name]
            arm.add(**scores(Embedder, [] if arguments is None else [TCM("embed", **arguments)], seed))
            print(f"seed {seed}, {arm.name}", file=sys.stderr, flush=True)
    return arms
