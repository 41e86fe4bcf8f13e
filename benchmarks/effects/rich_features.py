"""Coloured digits whose colour turns about in the test: worst group, with GroupDRO and with RichFeatures.

Small images of digits, below 5 or not, with a quarter of the labels flipped, and a colour (the image is in one of two
channels) that agrees with the given label in 90 and in 80 % of two training environments of 600 images, and in 10 % of
597 test images. So the digit gives 75 % at most, the colour 10 %. Groups of the test: label and colour, four. A
perceptron 128-200-200-2, Adam 1e-3 with weight decay 1e-3, full batches: round 0 of 60 steps, all others of 300.
"GroupDRO, environments" has the two environments as groups, "label and colour" knows the colour of each image. V-REx
(the variance of the environments' losses, times 1e4, in ``training_step``) starts from random weights, from round 0, or
from the synthesis of both rounds, fine-tuned or with frozen features. Each fit has weights of its own. In per cent.
"""

import sys
import tempfile

import torch
import torch.nn.functional as F
from _shared import Arm, fit
from lightning.pytorch import LightningModule, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import FeatureSynthesis, GroupDRO, RichFeatures, WorstGroupAccuracy

SIZE = 600


class Digits(LightningModule):
    def __init__(self, start=None, penalty=0.0, frozen=False):
        super().__init__()
        self.penalty = penalty
        self.features = nn.Sequential(nn.Linear(128, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU())
        self.head = nn.Linear(200, 2)
        if start is not None:
            self.load_state_dict(start.state_dict())
        self.features.requires_grad_(not frozen)

    def forward(self, x):
        return self.head(self.features(x))

    def training_step(self, batch, batch_idx):
        x, y, environment, _ = batch
        if not self.penalty:
            return F.cross_entropy(self(x), y)
        losses = F.cross_entropy(self(x), y, reduction="none")
        means = torch.stack([losses[environment == e].mean() for e in (0, 1)])
        return means.mean() / self.penalty + means.var()

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 1e-3, weight_decay=1e-3)


def coloured(images, digits, agree):
    """Images of both colours, labels, and groups of label and colour."""
    labels = torch.where(torch.rand(len(digits)) < 0.25, 1 - digits, digits)
    colour = torch.where(torch.rand(len(digits)) < agree, labels, 1 - labels)
    x = torch.zeros(len(digits), 2, 64)
    x[torch.arange(len(digits)), colour] = images
    return x.flatten(1), labels, 2 * labels + colour


def run(seeds):
    data = load_digits()
    images, digits = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target < 5).long()
    names = [
        "plain",
        "plain, 60 steps",
        "GroupDRO, environments",
        "GroupDRO, label and colour",
        "RichFeatures, round 1",
    ]
    names += ["RichFeatures, synthesis"]
    names += [f"V-REx from {w}" for w in ("random weights", "round 0", "the synthesis", "the synthesis, frozen")]
    arms = {name: Arm(name) for name in names}
    for seed in seeds:
        seed_everything(seed, verbose=False)
        order = torch.randperm(len(digits))
        parts = [
            coloured(images[part], digits[part], agree)
            for part, agree in zip(order.split(SIZE), (0.9, 0.8, 0.1), strict=True)
        ]
        x, y, groups = (torch.cat(both) for both in zip(*parts[:2], strict=True))
        loader = DataLoader(TensorDataset(x, y, torch.arange(2 * SIZE) // SIZE, groups), 2 * SIZE)

        def train(name, callbacks, steps=300, seed=seed, test=parts[2], loader=loader, **options):
            seed_everything(seed + 1000 * len(name), verbose=False)  # new weights in each fit
            model = Digits(**options)
            fit(model, callbacks, loader, max_epochs=steps)
            with torch.no_grad():
                predicted = model.eval()(test[0]).argmax(1)
            worst = WorstGroupAccuracy(num_groups=4)
            worst.update(predicted, test[1], test[2])
            arms[name].add(worst_group=100 * worst.compute(), all=100 * (predicted == test[1]).float().mean())
            print(f"seed {seed}, {name}", file=sys.stderr, flush=True)
            return model

        with tempfile.TemporaryDirectory() as folder:
            files = [f"{folder}/{r}.pt" for r in range(2)]
            train("plain", [])
            first = train("plain, 60 steps", [RichFeatures(record=files[0])], steps=60)
            train("GroupDRO, environments", [GroupDRO(2, group_key="2", mode="max")])
            train("GroupDRO, label and colour", [GroupDRO(4, group_key="3", mode="max")])
            train("RichFeatures, round 1", [RichFeatures(files[:1], files[1], mode="max", draws=None)])
            synthesis = FeatureSynthesis("features", "head", files, weight_decay=1e-3)
            whole = train("RichFeatures, synthesis", [synthesis])
        starts = {"random weights": {}, "round 0": {"start": first}, "the synthesis": {"start": whole}}
        starts["the synthesis, frozen"] = {"start": whole, "frozen": True}
        for start, options in starts.items():
            train(f"V-REx from {start}", [], penalty=1e4, **options)
    return list(arms.values())
