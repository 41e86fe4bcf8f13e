"""What a step costs: the plain step, ELR written by hand in ``training_step``, and ELR attached by the engine.

All arms train in one process and take turns step by step, so that whatever else the machine does hits them alike. A
round is one step of every arm in a fresh random order; the figures are medians over rounds of the ratio within a round,
with a 95 % bootstrap interval.

    python benchmarks/overhead.py --model resnet18 --steps 150
    python benchmarks/overhead.py --model transformer --steps 600

The bars: engine / by hand <= 1.02; all techniques inactive / plain <= 1.01.
"""

import argparse
import logging
import random
import statistics
import threading
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import ELRCallback
from lightning_reg.functional import elr_loss

CLASSES = 10
ARMS = ("plain", "inactive", "by hand", "core by hand", "engine")


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
        return self.head(self.layers(self.embedding(x)).mean(1))


class Plain(LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


class ByHand(Plain):
    def __init__(self, net, num_samples):
        super().__init__(net)
        self.targets = torch.zeros(num_samples, CLASSES)

    def training_step(self, batch, batch_idx):
        x, y, index = batch
        return by_hand_loss(self.net(x), y, index, self.targets)


def by_hand_loss(logits, labels, index, targets, lam=3.0, beta=0.7):
    """The authors' formulas in five lines, as a user would write them."""
    p = logits.softmax(1).clamp(1e-4, 1 - 1e-4)
    p_hat = p.detach()
    targets[index] = beta * targets[index] + (1 - beta) * p_hat / p_hat.sum(1, keepdim=True)
    return F.cross_entropy(logits, labels) + lam * (1 - (targets[index] * p).sum(1)).log().mean()


class Turns:
    """Lets the arms step one at a time, in a random order per round."""

    def __init__(self, arms, rounds):
        self.go = {arm: threading.Semaphore(0) for arm in arms}
        self.done = threading.Semaphore(0)
        self.times = {arm: [] for arm in arms}
        self.rounds = rounds

    def run(self):
        order = list(self.go)
        for _ in range(self.rounds):
            random.shuffle(order)
            for arm in order:
                self.go[arm].release()
                self.done.acquire()


class TakeTurns(Callback):
    """A step is timed from one batch's end to the next one's, so loading the batch counts."""

    def __init__(self, turns, arm):
        self.turns, self.arm = turns, arm

    def on_train_start(self, trainer, pl_module):
        self.turns.go[self.arm].acquire()
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.turns.times[self.arm].append(time.perf_counter() - self.start)
        self.turns.done.release()
        if not trainer.should_stop and len(self.turns.times[self.arm]) < self.turns.rounds:
            self.turns.go[self.arm].acquire()
        self.start = time.perf_counter()


def data(model, batch, steps):
    size = batch * min(steps, 50)
    x = torch.randn(size, 3, 32, 32) if model == "resnet18" else torch.randint(0, 256, (size, 32))
    return TensorDataset(x, torch.randint(0, CLASSES, (size,)), torch.arange(size))


def in_turns(arms, dataset, batch, steps):
    """Step times in seconds of arms ``name: (module, callbacks)`` that train in turns."""
    turns = Turns(arms, steps)
    threads = []
    for arm, (module, callbacks) in arms.items():
        trainer = Trainer(
            max_steps=steps,
            callbacks=[*callbacks, TakeTurns(turns, arm)],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader = DataLoader(dataset, batch, shuffle=True, drop_last=True)
        threads.append(threading.Thread(target=trainer.fit, args=(module, loader), daemon=True))
    for thread in threads:
        thread.start()
    turns.run()
    for thread in threads:
        thread.join()
    return turns.times


def measure(model, batch, steps, chosen):
    """Step times of the chosen arms, in seconds."""
    dataset = data(model, batch, steps)
    net = ResNet18 if model == "resnet18" else SmallTransformer
    arms = {
        "plain": (Plain(net()), []),
        "inactive": (Plain(net()), [ELRCallback(lam=0.0)]),
        "by hand": (ByHand(net(), len(dataset)), []),
        "core by hand": (Core(net(), len(dataset)), []),
        "engine": (Plain(net()), [ELRCallback(lam=3.0, beta=0.7)]),
    }
    return in_turns({arm: arms[arm] for arm in chosen}, dataset, batch, steps)


class Core(ByHand):
    """By hand with the suite's functional core."""

    def training_step(self, batch, batch_idx):
        x, y, index = batch
        return elr_loss(self.net(x), y, index, self.targets, lam=3.0, beta=0.7)


def ratio(times, over, under, skip=10, draws=2000):
    """Median over rounds of the ratio within a round, and its 95 % bootstrap interval."""
    ratios = [a / b for a, b in zip(times[over][skip:], times[under][skip:], strict=True)]
    medians = sorted(statistics.median(random.choices(ratios, k=len(ratios))) for _ in range(draws))
    return statistics.median(ratios), medians[int(0.025 * draws)], medians[int(0.975 * draws)]


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
    show(times, [*pairs, ("inactive", "plain")], title, options.save)
    return times


if __name__ == "__main__":
    main()
