"""What a step costs: the plain step, ELR written by hand in ``training_step``, and ELR attached by the engine.

All arms train in one process and take turns step by step (see turns.py); the steps by hand are in by_hand.py.

    python benchmarks/overhead.py --model resnet18 --steps 150
    python benchmarks/overhead.py --model transformer --steps 600

The bars: engine / by hand <= 1.02; all techniques inactive / plain <= 1.01.
"""

import argparse
import logging
import statistics
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from by_hand import ByHand, Plain
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from turns import Turns, fit_in_turns, ratio

from lightning_reg import ELRCallback, LossTechnique
from lightning_reg.functional import elr_loss

CLASSES = 10
ARMS = ("plain", "inactive", "nothing added", "by hand", "core by hand", "engine")


class ResNet18(nn.Sequential):
    """ResNet-18 with the 3x3 stem for 32x32 images."""

    def __init__(self):
        layers = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
        width = 64
        for out, stride in ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)):
            layers.append(BasicBlock(width, out, stride))
            width = out
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, CLASSES))


class BasicBlock(nn.Module):
    def __init__(self, width, out, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        same = stride == 1 and width == out
        self.skip = nn.Identity() if same else nn.Sequential(nn.Conv2d(width, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x):
        return F.relu(self.body(x) + self.skip(x))


class SmallTransformer(nn.Module):
    """Four layers, d = 64, over sequences of 32 tokens, one class per sequence."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(256, 64)
        self.layers = nn.Sequential(*[nn.TransformerEncoderLayer(64, 4, 256, batch_first=True) for _ in range(4)])
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x):
        return self.top(self.body(x))

    def body(self, x):
        return self.layers(self.embedding(x))

    def top(self, features):
        return self.head(features.mean(1))


def data(model, batch, steps):
    size = batch * min(steps, 50)
    x = torch.randn(size, 3, 32, 32) if model == "resnet18" else torch.randint(0, 256, (size, 32))
    return TensorDataset(x, torch.randint(0, CLASSES, (size,)), torch.arange(size))


def in_turns(arms, dataset, batch, steps, **options):
    """Step times in seconds of arms ``name: (module, callbacks)`` that train in turns."""
    turns = Turns(arms, steps)
    return fit_in_turns(arms, lambda: DataLoader(dataset, batch, shuffle=True, drop_last=True), turns, **options)


def measure(model, batch, steps, chosen):
    """Step times of the chosen arms, in seconds."""
    dataset = data(model, batch, steps)
    net = ResNet18 if model == "resnet18" else SmallTransformer
    arms = {
        "plain": (Plain(net()), []),
        "inactive": (Plain(net()), [ELRCallback(lam=0.0)]),
        "nothing added": (Plain(net()), [NothingAdded()]),
        "by hand": (ByHand(net(), len(dataset)), []),
        "core by hand": (Core(net(), len(dataset)), []),
        "engine": (Plain(net()), [ELRCallback(lam=3.0, beta=0.7)]),
    }
    return in_turns({arm: arms[arm] for arm in chosen}, dataset, batch, steps)


class NothingAdded(LossTechnique):
    """Sees every loss call and adds nothing to it: what is left is the engine's own cost."""

    def describe(self):
        return "adds nothing"

    def loss_term(self, call):
        return None


class Core(ByHand):
    """By hand with the suite's functional core."""

    def training_step(self, batch, batch_idx):
        x, y, index = batch
        return elr_loss(self.net(x), y, index, self.targets, lam=3.0, beta=0.7)


def show(times, pairs, title, save=None, skip=10):
    """Prints the ratios of pairs of arms, and appends them to a file."""
    table = Table("ratio", "median", "95 % interval", title=f"{title}, torch {torch.__version__}, CPU")
    for over, under in pairs:
        if over in times and under in times:
            middle, low, high = ratio(times, over, under, skip)
            table.add_row(f"{over} / {under}", f"{middle:.4f}", f"{low:.4f} to {high:.4f}")
    arm = next(iter(times))
    table.caption = f"{arm} step: median {statistics.median(times[arm]) * 1e3:.1f} ms"
    Console().print(table)
    if save:
        with save.open("a") as file:
            Console(file=file, width=120).print(table)


def quiet():
    """Neither warnings nor remarks of Lightning, and one torch thread."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("resnet18", "transformer"), default="transformer")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, default=ARMS, help="fewer arms, more rounds in the same time"
    )
    parser.add_argument("--threads", type=int, default=1, help="torch threads per step")
    parser.add_argument("--save", type=Path, help="append the table to this file")
    options = parser.parse_args(argv)
    quiet()
    torch.set_num_threads(options.threads)
    times = measure(options.model, options.batch, options.steps, options.arms)
    pairs = [("engine", "by hand"), ("engine", "plain"), ("by hand", "plain"), ("core by hand", "by hand")]
    title = f"{options.model}, batch {options.batch}, {options.steps} rounds"
    show(times, [*pairs, ("nothing added", "plain"), ("inactive", "plain")], title, options.save)
    return times


if __name__ == "__main__":
    main()
