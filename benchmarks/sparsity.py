"""N:M sparsity: accuracy on digits and on CIFAR-10, the time to choose masks, and what a training step costs.

    python benchmarks/sparsity.py digits --journal RESULTS/sparsity_digits.jsonl --save RESULTS/sparsity_digits.md
    python benchmarks/sparsity.py vit --epochs 4 --data FOLDER --journal RESULTS/sparsity_vit.jsonl --save FILE
    python benchmarks/sparsity.py refresh --save RESULTS/sparsity_speed.md
    python benchmarks/sparsity.py step --save RESULTS/sparsity_speed.md

``RESULTS`` is ``benchmarks/results``. ``digits``: MLP 64-128-128-10, both hidden layers sparse. ``vit``: a small vision
transformer on 10,000 images of CIFAR-10 (``FOLDER`` with ``train.parquet`` and ``test.parquet``), both layers of its
feed-forward blocks sparse. Accuracies are of hardened networks, after their pattern was verified. Each run goes to the
journal as it ends, and what stands there is not run again. ``refresh``: choosing the masks of 4096 x 4096 weights
against one pass of ``abs()`` over them, in turns; bar 2.5. ``step``: a training step of a 4-layer transformer, d = 256,
with sparse feed-forward blocks against the dense step, in turns; bar 1.05.
"""

import argparse
import json
import logging
import random
import shlex
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from noisy_labels import load, quiet_lightning
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from turns import Turns, fit_in_turns, ratio

from lightning_reg import NMSparsity
from lightning_reg.functional import nm_mask

PATTERNS = {"2:4": (2, 4), "1:4": (1, 4), "1:8": (1, 8), "1:16": (1, 16), "1:32": (1, 32)}


class Classifier(LightningModule):
    def __init__(self, net, lr, weight_decay, steps):
        super().__init__()
        self.net, self.lr, self.weight_decay, self.steps = net, lr, weight_decay, steps

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Batches:
    """Batches of tensors that lie in memory, shuffled in each epoch, without a call per sample."""

    def __init__(self, x, y, batch, seed, augment=False):
        self.x, self.y, self.batch, self.augment = x, y, batch, augment
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self):
        return len(self.x) // self.batch

    def __iter__(self):
        order = torch.randperm(len(self.x), generator=self.generator)
        for start in range(0, len(self) * self.batch, self.batch):
            index = order[start : start + self.batch]
            x = self.x[index]
            if self.augment:
                flip = torch.rand(len(x), 1, 1, 1, generator=self.generator) < 0.5
                x = torch.where(flip, x.flip(3), x)
            yield x, self.y[index]


def train(net, batches, epochs, lr, weight_decay, sparse):
    """Trains, hardens, verifies; returns the network."""
    steps = epochs * len(batches)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[sparse] if sparse else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Classifier(net, lr, weight_decay, steps)
    trainer.fit(module, batches)
    if sparse is not None and any(violations for _, violations in sparse.verify(module).values()):
        raise SystemExit(f"The pattern is violated: {sparse.verify(module)}")
    return net.eval()


@torch.inference_mode()
def accuracy(net, x, y, batch=1000):
    hits = sum((net(x[i : i + batch]).argmax(1) == y[i : i + batch]).sum().item() for i in range(0, len(x), batch))
    return hits / len(x)


class Journal:
    """Accuracies by recipe, pattern and seed, a line for each in a file; without one they are only kept in memory."""

    def __init__(self, path):
        self.path, self.found = path, {}
        if path is not None and path.exists():
            for line in path.read_text().splitlines():
                arm, pattern, seed, value = json.loads(line)
                self.found[arm, pattern, seed] = value

    def run(self, arm, pattern, seed, measure):
        if (arm, pattern, seed) in self.found:
            return
        start = time.perf_counter()
        value = self.found[arm, pattern, seed] = measure()
        print(f"seed {seed} {pattern} {arm}: {value:.4f} ({time.perf_counter() - start:.1f} s)", flush=True)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps([arm, pattern, seed, value]) + "\n")

    def rows(self, patterns):
        arms = list(dict.fromkeys(arm for arm, _, _ in self.found))
        rows = [["recipe", *patterns]]
        for arm in arms:
            columns = [[v for (a, p, _), v in self.found.items() if a == arm and p in (q, "dense")] for q in patterns]
            rows.append([arm, *map(mean_and_spread, columns)])
        return rows


def mean_and_spread(values):
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


# -- digits -----------------------------------------------------------------------------------------------------------


def digits_arms(n, m, steps):
    """Last tenth with the final mask; "early" decays end where they were best in a first experiment."""
    common = {"n": n, "m": m, "layers": "net.[02]", "finetune_fraction": 0.1}
    early = {"dense_fraction": 0.0, **common}
    return {
        "one-shot at half time": NMSparsity(recipe="one_shot", dense_fraction=0.5, **common),
        "STE": NMSparsity(recipe="ste", **common),
        "SR-STE": NMSparsity(recipe="srste", **common),
        "MdGf linear, zero at 70 %": NMSparsity(recipe="mdgf_linear", **common),
        "MdGf linear, zero at 30 %": NMSparsity(recipe="mdgf_linear", beta=1 / (0.3 * steps), **early),
        "MdGf exp, 1e-3 at 70 %": NMSparsity(recipe="mdgf_exp", **common),
        "MdGf exp, e^-5 at 10 %": NMSparsity(recipe="mdgf_exp", beta=5 / (0.1 * steps), **early),
        "SdGf stepwise": NMSparsity(recipe="sdgf_stepwise", **common),
        "SdGf geometric": NMSparsity(recipe="sdgf_geometric", **common),
    }


def digits(options):
    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float32) / 16
    y = torch.tensor(data.target)
    journal = Journal(options.journal)
    for seed in range(options.seeds):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        train_index, test_index = order[:1200], order[1200:]

        def measure(sparse, seed=seed, train_index=train_index, test_index=test_index):
            torch.manual_seed(seed)
            net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
            batches = Batches(x[train_index], y[train_index], 64, seed)
            return accuracy(train(net, batches, options.epochs, 2e-3, 1e-2, sparse), x[test_index], y[test_index])

        for pattern in ["dense", *options.patterns]:
            steps = options.epochs * (1200 // 64)
            arms = {"dense": None} if pattern == "dense" else digits_arms(*PATTERNS[pattern], steps)
            for arm, sparse in arms.items():
                journal.run(arm, pattern, seed, partial(measure, sparse))
    return journal.rows(options.patterns), f"Digits, test accuracy, {options.seeds} seeds"


# -- vision transformer -----------------------------------------------------------------------------------------------


class SmallViT(nn.Module):
    """Patches of 8 x 8, 4 blocks, d = 64, feed-forward 256, mean over the patches."""

    def __init__(self, width=64):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.places = nn.Parameter(0.02 * torch.randn(1, 16, width))
        block = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(width, 4, 4 * width, **block) for _ in range(4)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def vit_arms(n, m):
    common = {"n": n, "m": m, "layers": "*.linear[12]"}
    return {
        "one-shot at half time": NMSparsity(recipe="one_shot", dense_fraction=0.5, **common),
        "SR-STE": NMSparsity(recipe="srste", **common),
        "MdGf exp, 1e-3 at 70 %": NMSparsity(recipe="mdgf_exp", **common),
        "SdGf stepwise": NMSparsity(recipe="sdgf_stepwise", **common),
    }


def vit(options):
    columns = {name: load(options.data / f"{name}.parquet") for name in ("train", "test")}
    journal = Journal(options.journal)
    for seed in range(options.seeds):
        generator = torch.Generator().manual_seed(seed)
        tensors = []
        for name, size in (("train", options.images), ("test", 10_000)):
            index = torch.randperm(len(columns[name]["image"]), generator=generator)[:size]
            tensors += [
                (columns[name]["image"][index].float() / 255 - 0.47) / 0.25,
                columns[name]["label"][index].long(),
            ]

        def measure(sparse, seed=seed, tensors=tensors):
            train_x, train_y, test_x, test_y = tensors
            torch.manual_seed(seed)
            batches = Batches(train_x, train_y, 128, seed, augment=True)
            net = train(SmallViT(), batches, options.epochs, 1e-3, 0.05, sparse)
            return accuracy(net, test_x, test_y)

        for pattern in ["dense", *options.patterns]:
            arms = {"dense": None} if pattern == "dense" else vit_arms(*PATTERNS[pattern])
            for arm, sparse in arms.items():
                journal.run(arm, pattern, seed, partial(measure, sparse))
    title = f"CIFAR-10, {options.images:,} images, small ViT, {options.epochs} epochs, {options.seeds} seeds"
    return journal.rows(options.patterns), f"{title}: test accuracy"


# -- speed ------------------------------------------------------------------------------------------------------------


def sorted_mask(weight, n, m):
    """The reference way: sort every group."""
    groups = weight.abs().view(-1, m)
    order = groups.argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order[:, :n], True).view(weight.shape)


def refresh(options):
    weight = torch.randn(4096, 4096)
    arms = {"abs": weight.abs}
    for n, m in ((2, 4), (1, 8), (1, 16), (1, 32), (4, 8)):
        arms[f"nm_mask {n}:{m}"] = lambda n=n, m=m: nm_mask(weight, n, m)
    arms["argsort 2:4"] = lambda: sorted_mask(weight, 2, 4)
    arms["topk 2:4"] = lambda: weight.abs().view(-1, 4).topk(2, dim=1)
    times = {arm: [] for arm in arms}
    for _ in range(options.rounds + 1):
        order = list(arms)
        random.shuffle(order)
        for arm in order:
            start = time.perf_counter()
            arms[arm]()
            times[arm].append(time.perf_counter() - start)
    rows = [["16.8 M float32 weights", "median ms", "times abs()", "95 % interval"]]
    for arm in arms:
        middle, low, high = ratio(times, arm, "abs", skip=1)
        milliseconds = 1e3 * statistics.median(times[arm][1:])
        rows.append([arm, f"{milliseconds:.1f}", f"{middle:.2f}", f"{low:.2f} to {high:.2f}"])
    return rows, f"Choosing masks, {options.rounds} rounds, {options.threads} threads, CPU"


class Tokens(nn.Module):
    """Four layers, d = 256, one class per sequence."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(256, 256)
        self.layers = nn.Sequential(*[nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True) for _ in range(4)])
        self.head = nn.Linear(256, 10)

    def forward(self, x):
        return self.head(self.layers(self.embedding(x)).mean(1))


def step(options):
    rows = [["feed-forward blocks sparse", "times the dense step", "95 % interval"]]
    arms = {
        "dense": [],
        "2:4 MdGf exp, decaying": [NMSparsity(2, 4, layers="*.linear[12]", dense_steps=0)],
        "1:8 SR-STE": [NMSparsity(1, 8, recipe="srste", layers="*.linear[12]", dense_steps=0)],
        "1:8 STE": [NMSparsity(1, 8, recipe="ste", layers="*.linear[12]", dense_steps=0)],
    }
    dataset = TensorDataset(
        torch.randint(0, 256, (options.batch * 50, 64)), torch.randint(0, 10, (options.batch * 50,))
    )
    modules = {}
    for arm, callbacks in arms.items():
        torch.manual_seed(0)
        modules[arm] = (Classifier(Tokens(), 1e-4, 0.01, options.rounds), callbacks)
    loader_of = partial(DataLoader, dataset, options.batch, shuffle=True, drop_last=True)
    times = fit_in_turns(modules, loader_of, Turns(arms, options.rounds))
    for arm in list(arms)[1:]:
        middle, low, high = ratio(times, arm, "dense")
        rows.append([arm, f"{middle:.3f}", f"{low:.3f} to {high:.3f}"])
    dense = 1e3 * statistics.median(times["dense"])
    title = f"Transformer, 4 layers, d = 256, batch {options.batch} x 64 tokens, dense step {dense:.0f} ms, CPU"
    return rows, title


def show(rows, title, command, path):
    facts = f"`{command}`, torch {torch.__version__}, {torch.get_num_threads()} thread(s)"
    table = Table(*rows[0], title=title, caption=facts)
    for row in rows[1:]:
        table.add_row(*row)
    Console(width=120).print(table)
    if path is not None:
        lines = [f"| {' | '.join(row)} |" for row in rows]
        lines.insert(1, "|" + "---|" * len(rows[0]))
        with path.open("a") as file:
            file.write("\n".join([f"**{title}**", "", *lines, "", facts, "", ""]))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("digits", "vit", "refresh", "step"))
    parser.add_argument("--patterns", nargs="+", choices=list(PATTERNS), help="all on digits; 1:16 and 1:32 for vit")
    parser.add_argument("--seeds", type=int, help="4 on digits, 3 for vit")
    parser.add_argument("--journal", type=Path, help="for digits and vit: file of finished runs, to go on from")
    parser.add_argument("--epochs", type=int, help="60 on digits, 8 for vit")
    parser.add_argument("--data", type=Path, help="for vit: folder with train.parquet and test.parquet")
    parser.add_argument("--images", type=int, default=10_000, help="for vit: training images")
    parser.add_argument("--rounds", type=int, help="20 for refresh, 60 for step")
    parser.add_argument("--batch", type=int, default=16, help="for step: sequences")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", type=Path, help="append the table to this file")
    options = parser.parse_args(argv)
    on_digits = options.what == "digits"
    options.patterns = options.patterns or (list(PATTERNS) if on_digits else ["1:16", "1:32"])
    options.seeds = options.seeds or (4 if on_digits else 3)
    options.epochs = options.epochs or (60 if on_digits else 8)
    options.rounds = options.rounds or (20 if options.what == "refresh" else 60)
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with quiet_lightning():
        rows, title = {"digits": digits, "vit": vit, "refresh": refresh, "step": step}[options.what](options)
    words = sys.argv[1:] if argv is None else argv
    show(rows, title, f"python benchmarks/sparsity.py {shlex.join(words)}", options.save)
    return rows


if __name__ == "__main__":
    main()
