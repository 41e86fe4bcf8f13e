"""Coloured digits: the worst group with six penalties for other domains, from random weights and on rich features.

Data, network and rounds are those of ``rich_features.py``: digits below 5 or not, a quarter of the labels flipped, a
colour that agrees with the label in 90 and in 80 % of two training environments of 600 images and in 10 % of 597 test
images; a perceptron 128-200-200-2, Adam 1e-3 with weight decay 1e-3, full batches; round 0 of 60 steps, round 1 and
their synthesis of 300. Then each arm is a fit of 300 steps: with the plain loss, or with one of InvariancePenalty's
methods on the two environments, in RFC's form: its grid's middle as the weight (1e4, SD: 100) and the sum divided by
it. "From scratch" all weights are random, of the seed alone; "rich" keeps the synthesis' features frozen and trains its
head, from the synthesis' own weights; "frozen" does so with the network of the plain fit, to tell rich features from
frozen ones. Nothing was chosen by results. Groups: label and colour, four. In per cent.
"""

import sys
import tempfile

import torch
import torch.nn.functional as F
from _shared import Arm, fit
from lightning.pytorch import seed_everything
from rich_features import SIZE, Digits, coloured
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import FeatureSynthesis, InvariancePenalty, RichFeatures, WorstGroupAccuracy

METHODS = {"IRMv1": "irm", "V-REx": "vrex", "SD": "sd", "IGA": "iga", "Fishr": "fishr", "CLOvE": "clove"}
STARTS = ("from scratch", "frozen", "rich")
STEPS, SHORT = 300, 60


class Divided(Digits):
    """The mean loss, with what is added to it, divided by the weight of the penalty."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1]) / (self.penalty or 1.0)


def synthesis(loader, seed):
    """One network of two rounds of rich features."""
    with tempfile.TemporaryDirectory() as folder:
        files = [f"{folder}/{r}.pt" for r in range(2)]
        fits = [
            (RichFeatures(record=files[0]), SHORT),
            (RichFeatures(files[:1], files[1], mode="max", draws=None), STEPS),
            (FeatureSynthesis("features", "head", files, weight_decay=1e-3), STEPS),
        ]
        for number, (callback, steps) in enumerate(fits):
            seed_everything(seed + 1000 * number, verbose=False)  # weights of its own for each round
            model = Divided()
            fit(model, [callback], loader, max_epochs=steps)
    return model


def accuracies(model, x, labels, groups):
    with torch.no_grad():
        predicted = model.eval()(x).argmax(1)
    worst = WorstGroupAccuracy(num_groups=4)
    worst.update(predicted, labels, groups)
    return {"worst_group": 100 * worst.compute(), "all": 100 * (predicted == labels).float().mean()}


def run(seeds):
    data = load_digits()
    images, digits = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target < 5).long()
    arms = [Arm(f"{title}, {start}") for start in STARTS for title in ("plain", *METHODS)]
    for seed in seeds:
        seed_everything(seed, verbose=False)
        parts = [
            coloured(images[part], digits[part], agree)
            for part, agree in zip(torch.randperm(len(digits)).split(SIZE), (0.9, 0.8, 0.1), strict=True)
        ]
        x, y, _ = (torch.cat(both) for both in zip(*parts[:2], strict=True))
        loader = DataLoader(TensorDataset(x, y, torch.arange(2 * SIZE) // SIZE), 2 * SIZE)
        starts = {"rich": synthesis(loader, seed)}
        for arm in arms:
            title, start = arm.name.split(", ")
            seed_everything(seed, verbose=False)
            weight = 0.0 if title == "plain" else 100.0 if title == "SD" else 1e4
            penalties = [InvariancePenalty(METHODS[title], 2, weight, group_key="2", form="rfc")] if weight else []
            options = {"start": starts[start], "frozen": True} if start in starts else {}
            model = Divided(penalty=weight, **options)
            fit(model, penalties, loader, max_epochs=STEPS)
            starts.setdefault("frozen", model)  # the first arm: plain, from scratch
            arm.add(**accuracies(model, *parts[2]))
            print(f"seed {seed}, {arm.name}: {arm.values['worst group'][-1]:.1f}", file=sys.stderr, flush=True)
    return arms
