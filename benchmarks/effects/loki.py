"""Labels with distances, of which all or a few have training samples: argmax and Loki on the same networks.

Diabetes (scikit-learn): the progression of 442 patients cut into 12 steps of equal counts, distance |i - j|; a linear
classifier trained on 300 patients, of those with 2, 4 or all 12 of the steps (AdamW 1e-2, batch 32, 40 epochs), tested
on the other 142, of all steps. CIFAR-10: 2,000 training images, 1,000 for the test, a tree of animals (mammals: cat,
dog, deer, horse; bird; frog) and vehicles (on roads: automobile, truck; airplane; ship), distance in edges between the
leaves; three convolutions of stride 2 with batch norm (AdamW 2e-3, batch 64, 12 epochs), trained on all classes or
without deer, dog, ship and truck, tested on all ten. Every network has a column for each label. Mean squared distance
between the predicted and the true label, and accuracy in percent. All arms but the last test one network, as it was
trained; the last is trained through the rule (modes "train" and "test").
"""

import sys

import torch
import torch.nn.functional as F
from _shared import Arm, cifar10, fit, quiet
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_diabetes
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_reg import Loki, MeanSquaredDistance
from lightning_reg.functional import tree_distances

STEPS, PATIENTS, TRAIN, TEST = 12, 300, 2_000, 1_000
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
TREE = [
    ("thing", "animal"), ("thing", "vehicle"), ("animal", "mammal"), ("animal", "bird"), ("animal", "frog"),
    ("mammal", "cat"), ("mammal", "dog"), ("mammal", "deer"), ("mammal", "horse"), ("vehicle", "road"),
    ("vehicle", "airplane"), ("vehicle", "ship"), ("road", "automobile"), ("road", "truck"),
]  # fmt: skip
LINE = (torch.arange(STEPS)[:, None] - torch.arange(STEPS)).abs().float()
ARMS = {
    "argmax": None,
    "Loki": {},
    "Loki, power 1 (median)": {"power": 1.0},
    "Loki, temperature 0.5": {"temperature": 0.5},
    "Loki, temperature 2": {"temperature": 2.0},
    "Loki, fine-tuning form": {"modes": ["train", "test"]},
}
SETS = {
    "diabetes 2 of 12": ("diabetes", [0, 11]),
    "diabetes 4 of 12": ("diabetes", [0, 4, 7, 11]),
    "diabetes 12 of 12": ("diabetes", list(range(STEPS))),
    "CIFAR-10 6 of 10": ("cifar", [0, 1, 2, 3, 6, 7]),
    "CIFAR-10 10 of 10": ("cifar", list(range(10))),
}


class Classifier(LightningModule):
    """An ordinary classifier with its own metrics: nothing in it knows about the rule."""

    def __init__(self, net, lr, distances):
        super().__init__()
        self.net, self.lr = net, lr
        self.distance, self.accuracy = (
            MeanSquaredDistance(distances),
            MulticlassAccuracy(len(distances), average="micro"),
        )

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        logits = self.net(batch[0])
        self.distance(logits, batch[1])
        self.accuracy(logits, batch[1])
        self.log_dict({"distance": self.distance, "accuracy": self.accuracy})

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.lr)


def diabetes(seed):
    x, value = (torch.tensor(part, dtype=torch.float32) for part in load_diabetes(return_X_y=True))
    ends = torch.quantile(value, torch.linspace(0, 1, STEPS + 1))[1:-1]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, y = 20 * x[order], torch.bucketize(value, ends)[order]
    return (x[:PATIENTS], y[:PATIENTS]), (x[PATIENTS:], y[PATIENTS:])


def cifar(seed):
    parts = []
    for split, count in (("train", TRAIN), ("test", TEST)):
        columns = cifar10(split)
        rows = torch.randperm(len(columns["label"]), generator=torch.Generator().manual_seed(seed))[:count]
        parts.append((columns["image"][rows].float() / 128 - 1, columns["label"][rows].long()))
    return parts


def network(kind):
    if kind == "diabetes":
        return nn.Sequential(nn.Linear(10, STEPS))
    layers = []
    for before, width in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def trained(kind, distances, data, seed, callbacks):
    seed_everything(seed, verbose=False)
    model = Classifier(network(kind), 1e-2 if kind == "diabetes" else 2e-3, distances)
    batch, epochs = (32, 40) if kind == "diabetes" else (64, 12)
    loader = DataLoader(TensorDataset(*data), batch, shuffle=True, generator=torch.Generator().manual_seed(seed))
    fit(model, callbacks, loader, max_epochs=epochs)
    return model


def tested(model, callbacks, data):
    fixed = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    with quiet():
        trainer = Trainer(callbacks=callbacks, enable_progress_bar=False, enable_model_summary=False, **fixed)
        (row,) = trainer.test(model, DataLoader(TensorDataset(*data), 500), verbose=False)
    return row


def run(seeds):
    arms = {name: Arm(name) for name in ARMS}
    for seed in seeds:
        for name, (kind, known) in SETS.items():
            (x, y), test = diabetes(seed) if kind == "diabetes" else cifar(seed)
            seen = torch.isin(y, torch.tensor(known))
            train, distances = (x[seen], y[seen]), LINE if kind == "diabetes" else tree_distances(TREE, CLASSES)
            layer = "net.0" if kind == "diabetes" else "net.11"
            plain = trained(kind, distances, train, seed, [])
            for arm, options in ARMS.items():
                loki = [] if options is None else [Loki(layer, distances, known, **options)]
                model = trained(kind, distances, train, seed, loki) if "fine-tuning" in arm else plain
                row = tested(model, loki, test)
                values = {f"{name}: distance²": row["distance"], f"{name}: accuracy": 100 * row["accuracy"]}
                arms[arm].add(**values)
            print(f"seed {seed}, {name}", file=sys.stderr, flush=True)
    return list(arms.values())
