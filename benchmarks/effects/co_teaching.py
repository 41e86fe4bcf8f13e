"""Co-teaching on digits with wrong labels, alone, with nested dropout in one fit, and after it.

scikit-learn's digits: 1,000 for training, whose labels are redrawn over all ten classes with probability 0.4 (36 % are
wrong), 200 with clean labels for validation, and 597 for the test. MLP 64-256-128-10, Adam 1e-3, batch 64, 60 epochs.
Each arm trains two networks, so all cost the same number of training passes: `network` is the test accuracy of the
first one, `both` that of the mean of both networks' logits, after the last epoch and, with nested dropout (eta 10), by
the first K features, K chosen by the validation accuracy of that mean. Forget rate 0.36, reached after 5 epochs, or
estimated after 5 (`rate`). Two stages: 40 epochs of nested dropout for each of two seeds, then 20 of co-teaching from
the two, with 1e-4 and the rate from the start. In one fit the classes that nested dropout has not learned by the fifth
epoch are left out: of seed 1 no sample with label 1 or 2 is picked any more.
"""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from _shared import Arm, fit
from lightning.pytorch import LightningModule, seed_everything
from nested_dropout import BATCH, VALIDATED, data
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import CoTeaching, NestedDropout
from lightning_reg.functional import best_prefix, prefix_logits

EPOCHS, FIRST, WRONG, ETA = 60, 40, 0.36, 10
ARMS = ["plain", "nested", "co-teaching", "co-teaching, rate estimated", "both in one fit", "nested, then co-teaching"]


class Classifier(LightningModule):
    def __init__(self, lr=1e-3):
        super().__init__()
        self.lr = lr
        self.body = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU())
        self.head = nn.Linear(128, 10)

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.lr)


def train(techniques, parts, seed, epochs, model=None):
    seed_everything(seed, verbose=False)
    model = (model or Classifier()).train()
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(TensorDataset(*parts[0]), BATCH, shuffle=True, generator=generator)
    fit(model, techniques, loader, DataLoader(TensorDataset(*parts[1]), VALIDATED), max_epochs=epochs)
    return model.eval()


@torch.no_grad()
def prefixes(model, x):
    return prefix_logits(model.body(x), model.head.weight, model.head.bias)


def accuracies(networks, x, y):
    """Of the mean of the networks' logits, by the first 1, 2, ..., 128 features."""
    logits = torch.stack([prefixes(network, x) for network in networks]).mean(0)
    return (logits.argmax(2) == y[:, None]).double().mean(0)


def two_alone(eta, parts, seed, epochs=EPOCHS):
    """Two networks of other seeds that know nothing of one another."""
    return [train([NestedDropout("head", eta=eta, seed=s)], parts, s, epochs) for s in (seed, seed + 100)]


def trained(arm, parts, seed):
    """Both networks, and the rate."""
    if arm in ("plain", "nested"):
        return two_alone(ETA if arm == "nested" else 0, parts, seed), 0.0
    if arm == "nested, then co-teaching":
        one, two = two_alone(ETA, parts, seed, FIRST)
        k = best_prefix(accuracies([one, two], *parts[1]))
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "two.pt"
            torch.save(two.state_dict(), file)
            technique = CoTeaching(WRONG, gradual_epochs=0, second=str(file), seed=seed)
            one.lr = 1e-4
            model = train([NestedDropout("head", eta=ETA, k=k, seed=seed), technique], parts, seed, EPOCHS - FIRST, one)
    else:
        technique = CoTeaching(None if "estimated" in arm else WRONG, seed=seed)
        nested = [NestedDropout("head", eta=ETA, seed=seed)] if arm == "both in one fit" else []
        model = train([*nested, technique], parts, seed, EPOCHS)
    pair = technique.ensemble(model)
    return [pair.first, pair.second], technique.estimated_rate or WRONG


def run(seeds):
    arms = [Arm(name) for name in ARMS]
    for seed in seeds:
        parts = data(seed)
        for arm in arms:
            networks, rate = trained(arm.name, parts, seed)
            cut = arm.name in ("nested", "both in one fit", "nested, then co-teaching")
            k = best_prefix(accuracies(networks, *parts[1])) if cut else 128
            network, both = (accuracies(some, *parts[2])[k - 1] for some in (networks[:1], networks))
            arm.add(network=network, both=both, K=k, rate=rate)
    return arms
