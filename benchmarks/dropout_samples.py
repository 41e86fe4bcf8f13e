"""What M dropout samples cost: the plain step, the callback, the same by hand, and M passes through the whole network.

The network is ResNet-18 or a small transformer with dropout before a head of two layers. Arms take turns step by step
(see overhead.py); the figures are medians over rounds of the ratio within a round, with a 95 % bootstrap interval.

    python benchmarks/dropout_samples.py --model transformer --samples 8 --steps 300
"""

import argparse
from pathlib import Path

import torch.nn.functional as F
from by_hand import Copies, Plain
from overhead import CLASSES, ResNet18, SmallTransformer, data, in_turns, quiet, show
from torch import nn

from lightning_reg import MultiSampleDropout


class Net(nn.Module):
    """A backbone, dropout, and a head of two layers."""

    def __init__(self, model):
        super().__init__()
        network = ResNet18() if model == "resnet18" else SmallTransformer()
        if model == "resnet18":
            self.width, network[-1] = 512, nn.Identity()
        else:
            self.width, network.head = 64, nn.Identity()
        self.body, self.drop = network, nn.Dropout(0.5)
        self.head = nn.Sequential(nn.Linear(self.width, self.width), nn.ReLU(), nn.Linear(self.width, CLASSES))

    def forward(self, x):
        return self.head(self.drop(self.body(x)))


class FullPasses(Copies):
    """M passes through the whole network."""

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        return sum(F.cross_entropy(self.net(x), y) for _ in range(self.samples)) / self.samples


def measure(model, samples, batch, steps):
    """Step times of the arms, in seconds."""
    arms = {
        "plain": (Plain(Net(model)), []),
        "callback": (Plain(Net(model)), [MultiSampleDropout("net.drop", num_samples=samples)]),
        "by hand": (Copies(Net(model), samples), []),
        "full passes": (FullPasses(Net(model), samples), []),
    }
    return in_turns(arms, data(model, batch, steps), batch, steps)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("resnet18", "transformer"), default="transformer")
    parser.add_argument("--samples", type=int, default=8, help="dropout samples M")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--save", type=Path, help="append the table to this file")
    options = parser.parse_args(argv)
    quiet()
    times = measure(options.model, options.samples, options.batch, options.steps)
    pairs = [("callback", "plain"), ("callback", "by hand"), ("callback", "full passes"), ("full passes", "plain")]
    title = f"{options.model}, M = {options.samples}, batch {options.batch}, {options.steps} rounds"
    show(times, pairs, title, options.save, skip=min(10, options.steps // 4))
    return times


if __name__ == "__main__":
    main()
