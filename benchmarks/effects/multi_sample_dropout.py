"""Digits with 600 training images: dropout samples M = 1 and 8 at drop rates 0.3, 0.5, 0.7, on a small network.

1,197 test images; two convolutions (16, 32 channels), dropout, a head of two linear layers (64 hidden); SGD (0.05,
momentum 0.9), batch 64, 30 epochs. Losses and errors are those of the network without dropout (evaluation mode); errors
in percent. The arms differ by one callback.
"""

import torch
import torch.nn.functional as F
from _shared import Arm, fit
from lightning.pytorch import Callback, LightningModule
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import MultiSampleDropout

TRAIN, BATCH, EPOCHS, EARLY = 600, 64, 30, 10


class Net(LightningModule):
    """The network; nothing in it knows of copies."""

    def __init__(self, p, lr=0.05):
        super().__init__()
        self.lr = lr
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        )
        head = nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(p), *head)

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


class ErrorAfter(Callback):
    """Notes the test error after an early epoch."""

    def __init__(self, epoch, x, y):
        self.epoch, self.x, self.y, self.error = epoch, x, y, float("nan")

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch + 1 == self.epoch:
            self.error = evaluate(pl_module, self.x, self.y)[1]


def digits(seed):
    data = load_digits()
    x, y = torch.tensor(data.images / 16, dtype=torch.float32)[:, None], torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return x[order[:TRAIN]], y[order[:TRAIN]], x[order[TRAIN:]], y[order[TRAIN:]]


@torch.no_grad()
def evaluate(module, x, y):
    """Loss and error in percent without dropout."""
    training = module.training
    module.eval()
    logits = module(x)
    module.train(training)
    return F.cross_entropy(logits, y).item(), 100 * (logits.argmax(1) != y).float().mean().item()


def train(seed, p, num_samples, epochs=EPOCHS, early=EARLY):
    x, y, test_x, test_y = digits(seed)
    torch.manual_seed(seed)
    module = Net(p)
    loader = DataLoader(
        TensorDataset(x, y), BATCH, shuffle=True, generator=torch.Generator().manual_seed(seed), drop_last=True
    )
    noted = ErrorAfter(early, test_x, test_y)
    fit(module, [MultiSampleDropout("head.1", num_samples=num_samples), noted], loader, max_epochs=epochs)
    loss, error = evaluate(module, test_x, test_y)
    return {
        f"p {p}: train loss x 1000": 1000 * evaluate(module, x, y)[0],
        f"p {p}: test loss": loss,
        f"p {p}: test error": error,
        f"p {p}: test error, epoch {early}": noted.error,
    }


def run(seeds):
    arms = [Arm("M = 1"), Arm("M = 8")]
    for arm, num_samples in zip(arms, (1, 8), strict=True):
        for seed in seeds:
            for p in (0.3, 0.5, 0.7):
                arm.add(**train(seed, p, num_samples))
    return arms
