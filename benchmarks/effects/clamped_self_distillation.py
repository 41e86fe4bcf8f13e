"""Several labels for each digit, of which a share is wrong: accuracy of a network and its average with bent labels.

A perceptron 64-128-10 gives each of 800 digits of 8 x 8 pixels ten labels, one for each class, of which 20 % are turned
over; F.binary_cross_entropy_with_logits, SGD 0.1 with momentum 0.9, batches of 32, 30 epochs. Views add noise of 0.1 to
the pixels. Test: the other 997 digits, in per cent: the largest of the ten scores is right; and the share of the given
labels of the 800 that the network has fitted, wrong ones included. The average is that of the weights with the
technique's momentum (0.992 to 0.998 in 3 epochs): the teacher, and in arms without one the same average of a network
that nobody teaches, kept by hand. So its column tells what bent labels do from what averaging does. The technique adds
a second loss on nearly the same labels; "delta=0" adds it on the very same ones, which is the given loss twice.
"""

import sys

import torch
import torch.nn.functional as F
from _shared import Arm, fit
from lightning.pytorch import Callback, LightningModule, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import ClampedSelfDistillation
from lightning_reg.functional import teacher_momentum

ARMS = {
    "given labels": None,
    "delta=0: given labels twice": {"delta": 0.0},
    "delta=0.15 (paper)": {"delta": 0.15},
    "delta=1": {"delta": 1.0},
    "delta=0.15, 3 views": {"delta": 0.15, "augment": "noisy"},
    "3 views alone": {"weight": 0.0, "augment": "noisy"},
}


class Digits(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def noisy(self, x):
        return x + 0.1 * torch.randn_like(x)

    def training_step(self, batch, batch_idx):
        return F.binary_cross_entropy_with_logits(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


class Average(Callback):
    """The average of the weights that the technique's teacher is, of any network."""

    def on_train_start(self, trainer, module):
        self.weights = {name: value.clone() for name, value in module.state_dict().items()}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        momentum = teacher_momentum(trainer.current_epoch)
        for name, value in module.state_dict().items():
            self.weights[name].lerp_(value, 1 - momentum)


@torch.no_grad()
def right(model, x, y):
    return 100 * (model.net(x).argmax(1) == y).float().mean().item()


def run(seeds):
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    arms = [Arm(name) for name in ARMS]
    for seed in seeds:
        seed_everything(seed, verbose=False)
        few, rest = torch.randperm(len(x)).tensor_split([800])
        labels = F.one_hot(y[few], 10).float()
        labels = (labels - (torch.rand(800, 10) < 0.2).float()).abs()
        for arm in arms:
            seed_everything(seed, verbose=False)
            model, arguments, average = Digits(), ARMS[arm.name], Average()
            bent = [] if arguments is None else [ClampedSelfDistillation(**arguments, seed=seed)]
            fit(model, [*bent, average], DataLoader(TensorDataset(x[few], labels), 32, shuffle=True), max_epochs=30)
            values = {"network_(%)": right(model, x[rest], y[rest])}
            with torch.no_grad():
                fitted = 100 * ((model.net(x[few]) > 0) == labels.bool()).float().mean().item()
            taught = bent[0].teacher_weights if bent else None
            model.load_state_dict(average.weights if taught is None else taught)
            arm.add(**values, **{"average_(%)": right(model, x[rest], y[rest]), "labels_fitted_(%)": fitted})
            print(f"seed {seed}, {arm.name}: {[v[-1] for v in arm.values.values()]}", file=sys.stderr, flush=True)
    return arms
