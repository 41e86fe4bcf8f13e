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
from _shared import Arm, fit
from lightning.pytorch import LightningModule, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import OPIS, MetricLoss

SEEN, EACH, STEPS = 6, 16, 250
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


def balanced(y, generator):
    """Batches with as many images of each digit."""
    places = [(y == digit).nonzero()[:, 0] for digit in range(SEEN)]
    for _ in range(STEPS):
        yield torch.cat([p[torch.randperm(len(p), generator=generator)[:EACH]] for p in places]).tolist()


def scores(name, seed):
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    seen = y < SEEN
    seed_everything(seed, verbose=False)
    model, arguments = Digits(), ARMS[name]
    batches = list(balanced(y[seen], torch.Generator().manual_seed(seed)))
    loader = DataLoader(TensorDataset(x[seen], y[seen]), batch_sampler=batches)
    fit(model, [] if arguments is None else [MetricLoss("embed", seed=seed, **arguments)], loader, max_epochs=1)
    metric = OPIS()
    with torch.no_grad():
        metric.update(model.embed(x[~seen]), y[~seen])
    found = metric.compute()
    return {"recall_at_1": 100 * found["recall_at_1"], "OPIS": 1000 * found["opis"]}


def run(seeds):
    arms = [Arm(name) for name in ARMS]
    for seed in seeds:
        for arm in arms:
            arm.add(**scores(arm.name, seed))
            print(f"seed {seed}, {arm.name}", file=sys.stderr, flush=True)
    return arms
