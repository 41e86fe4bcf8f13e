"""Nested dropout on digits with wrong labels, beside plain training and ordinary dropout before the classifier.

scikit-learn's digits: 1,000 for training, whose labels are redrawn over all ten classes with probability 0.4 (36 % are
wrong), 200 with clean labels for validation, 597 for the test. MLP 64-256-128-10, Adam 1e-3, batch 64, 100 epochs. Test
accuracies are the last epoch's: by all 128 features, and by the first K, chosen by the last validation. `best` is the
highest accuracy of the validation over the epochs less that of the last one: what was memorised.
"""

import torch
import torch.nn.functional as F
from _shared import Arm, fit
from lightning.pytorch import Callback, LightningModule, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import NestedDropout
from lightning_reg.functional import keep_prefix

EPOCHS, BATCH, TRAINED, VALIDATED, NOISE = 100, 64, 1000, 200, 0.4
ARMS = {"plain": (0.0, 0.0), "dropout 0.5": (0.5, 0.0), "nested, eta 10": (0.0, 10.0), "nested, eta 30": (0.0, 30.0)}


class Classifier(LightningModule):
    def __init__(self, dropout):
        super().__init__()
        hidden = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Dropout(dropout))
        self.body, self.head = hidden, nn.Linear(128, 10)

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


class Curve(Callback):
    def __init__(self):
        self.values = []

    def on_validation_end(self, trainer, pl_module):
        metrics = trainer.callback_metrics
        self.values.append(float(metrics.get("reg/nested_dropout/accuracy", metrics["val_accuracy"])))


def data(seed):
    digits, generator = load_digits(), torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits.target), generator=generator)
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32)[order], torch.tensor(digits.target)[order]
    noisy = y[:TRAINED].clone()
    redrawn = torch.rand(TRAINED, generator=generator) < NOISE
    noisy[redrawn] = torch.randint(10, (int(redrawn.sum()),), generator=generator)
    ends = TRAINED + VALIDATED
    return (x[:TRAINED], noisy), (x[TRAINED:ends], y[TRAINED:ends]), (x[ends:], y[ends:])


def run(seeds):
    arms = [Arm(name) for name in ARMS]
    for seed in seeds:
        train, validation, (x, y) = data(seed)
        for arm in arms:
            dropout, eta = ARMS[arm.name]
            seed_everything(seed, verbose=False)
            model, nested, curve = Classifier(dropout), NestedDropout("head", eta=eta, seed=seed), Curve()
            generator = torch.Generator().manual_seed(seed)
            loader = DataLoader(TensorDataset(*train), BATCH, shuffle=True, generator=generator)
            fit(model, [nested, curve], loader, DataLoader(TensorDataset(*validation), VALIDATED), max_epochs=EPOCHS)
            with torch.no_grad():
                features = model.eval().body(x)
                kept = nested.chosen_k or features.shape[1]
                every, first = (
                    float((model.head(keep_prefix(features, k)).argmax(1) == y).float().mean())
                    for k in (features.shape[1], kept)
                )
            arm.add(all_features=every, first_K=first, K=kept, best=max(curve.values) - curve.values[-1])
    return arms
