"""Embeddings of a digit classifier compared for digits that it has not seen, with and without a metric loss.

Training set: all images of the digits 0 to 5; test set: all images of 6 to 9. A perceptron 64-256-64 with a linear
classifier behind it, cross-entropy, batches of 96 with 16 images of each digit, Adam 1e-3, 250 steps. The metric losses
are those of pytorch-metric-learning on the 64 numbers before the classifier, with weight 1: ArcFace (margin 28.6
degrees, scale 64), whose class centres are the technique's own, and ProxyNCA. Recall at 1 in per cent and OPIS in
thousandths (lower is better), both of the unseen digits. The last arm is a control: centres that are not trained.
"""

import sys

import torch
import torch.nn.functional as F
from _shared import Arm
from _unseen_digits import SEEN, scores
from lightning.pytorch import LightningModule
from torch import nn

from lightning_reg import MetricLoss

SIZE = {"num_classes": SEEN, "embedding_size": 64}
LIBRARY = "pytorch_metric_learning.losses"
ARMS = {
    "classifier": None,
    "ArcFace": {"criterion": f"{LIBRARY}.ArcFaceLoss", "criterion_args": SIZE},
    "ArcFace, centres 10 times faster": {
        "criterion": f"{LIBRARY}.ArcFaceLoss",
        "criterion_args": SIZE,
        "lr_factor": 10.0,
    },
    "ProxyNCA, proxies 10 times faster": {
        "criterion": f"{LIBRARY}.ProxyNCALoss",
        "criterion_args": SIZE,
        "lr_factor": 10.0,
    },
    "ArcFace, centres as drawn": {"criterion": f"{LIBRARY}.ArcFaceLoss", "criterion_args": SIZE, "lr_factor": 0.0},
}


class Digits(LightningModule):
    def __init__(self):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
        self.head = nn.Linear(64, SEEN)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(self.embed(batch[0])), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


def run(seeds):
    arms = [Arm(name) for name in ARMS]
    for seed in seeds:
        for arm in arms:
            arguments = ARMS[arm.name]
            callbacks = [] if arguments is None else [MetricLoss("embed", seed=seed, **arguments)]
            found = scores(Digits, callbacks, seed)
            arm.add(recall_at_1=found["recall_at_1"], OPIS=found["OPIS"])
            print(f"seed {seed}, {arm.name}", file=sys.stderr, flush=True)
    return arms
