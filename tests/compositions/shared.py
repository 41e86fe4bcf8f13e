"""A network, data, and what the tests of compositions watch."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.toys import Callback, Classifier, fit

__all__ = ["Dense", "Net", "data", "train"]


class Net(Classifier):
    """Three layers; the one in the middle can become sparse."""

    def __init__(self):
        super().__init__(lr=0.2)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))


class Dense(Callback):
    """Weights after every step, as the optimizer has them."""

    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append(pl_module.net[2].weight.detach().clone())


def data():
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(24, 6, generator=generator)
    return TensorDataset(x, (x[:, :3] + 0.2 * torch.rand(24, 3, generator=generator)).argmax(1))


def train(*callbacks, module=None):
    module = module or Net()
    fit(module, *callbacks, loader=DataLoader(data(), 8), max_epochs=2)
    return module
