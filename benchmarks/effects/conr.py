"""Digits as the numbers 0 to 9, of which the large ones are rare: the error of a regression with and without ConR.

Training set: 90, 90, 70, 50, 30, 20, 12, 8, 5, 5 images of the digits 0 to 9; test set: 70 further images of each. A
small convolutional network, L1 loss, Adam 1e-3, batch 64, 60 epochs; window 0.5, temperature 0.07, eta 0.2; views: a
shift by up to a pixel and noise. Mean absolute errors over all digits, and over those with many (0 to 3), some (4 to 6)
and few (7 to 9) training images. The second arm is a control: the views enter the L1 loss and there is no ConR.
"""

import sys

import torch
import torch.nn.functional as F
from _shared import Arm, fit
from lightning.pytorch import LightningModule, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import ConR

COUNTS = (90, 90, 70, 50, 30, 20, 12, 8, 5, 5)
TEST, EPOCHS = 70, 60
GROUPS = {"all": range(10), "many": range(4), "some": range(4, 7), "few": range(7, 10)}
PLAIN = "L1"
ARMS = {
    PLAIN: None,
    "L1 on the batch and two views": None,
    "ConR, beta 0.05": {"beta": 0.05},
    "ConR, beta 0.2": {"beta": 0.2},
    "ConR, beta 1": {"beta": 1.0},
    "ConR, beta 0.2, authors' constant": {"beta": 0.2, "compat": True},
    "ConR, beta 0.2, one view": {"beta": 0.2, "views": "one"},
    "ConR, beta 0.2, no views": {"beta": 0.2, "views": "none", "augment": None},
}


class Regressor(LightningModule):
    def __init__(self, views_in_loss):
        super().__init__()
        self.views_in_loss = views_in_loss
        convolutions = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()]
        self.body = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(512, 64), nn.ReLU())
        self.head = nn.Linear(64, 1)

    def forward(self, x):
        return self.head(self.body(x))[:, 0]

    def augment(self, x):
        down, right = torch.randint(-1, 2, (2,)).tolist()
        return x.roll((down, right), dims=(2, 3)) + 0.1 * torch.randn_like(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        if self.views_in_loss:
            x, y = torch.cat([x, self.augment(x), self.augment(x)]), y.repeat(3)
        return F.l1_loss(self(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


def data(seed):
    digits = load_digits()
    x = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
    y = torch.tensor(digits.target, dtype=torch.float32)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, y = x[order], y[order]
    places = [(y == digit).nonzero()[:, 0] for digit in range(10)]
    train = torch.cat([place[TEST : TEST + count] for place, count in zip(places, COUNTS, strict=True)])
    test = torch.cat([place[:TEST] for place in places])
    return TensorDataset(x[train], y[train]), x[test], y[test]


def errors(name, seed):
    train, x, y = data(seed)
    seed_everything(seed, verbose=False)
    model = Regressor(views_in_loss=name.startswith("L1 on"))
    loader = DataLoader(train, 64, shuffle=True, generator=torch.Generator().manual_seed(seed))
    arguments = ARMS[name]
    fixed = {"layer": "body", "window": 0.5, "eta": 0.2, "augment": "augment"}
    fit(model, [] if arguments is None else [ConR(**(fixed | arguments))], loader, max_epochs=EPOCHS)
    with torch.no_grad():
        error = (model(x) - y).abs().reshape(10, TEST).mean(1)
    return {group: error[list(members)].mean().item() for group, members in GROUPS.items()}


def run(seeds):
    arms = [Arm(name) for name in ARMS]
    for seed in seeds:
        for arm in arms:
            arm.add(**errors(arm.name, seed))
            print(f"seed {seed}, {arm.name}", file=sys.stderr, flush=True)
    return arms
