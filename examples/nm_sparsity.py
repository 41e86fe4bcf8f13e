"""Train networks on digits in which only 1 of up to 32 weights is left, by four recipes, and compare.

Run it with ``python examples/nm_sparsity.py``; it takes about a minute. All runs share the data, the initial weights
and the batch order: the callback in the Trainer is the only difference.
"""

# %% [markdown]
# # N:M sparsity
#
# Of every M consecutive weights N are left, the others are zero. 2:4 runs on sparse tensor cores; 1:16 or 1:32 save
# memory, and are hard to train. One can prune a trained network at once (`one_shot`), or bring the constraint in
# while it trains. `NMSparsity` knows several ways, its *recipes*; the optimizer keeps dense weights, the forward pass
# sees sparse ones, and at the end the zeros are in the module.

# %%
import argparse
import logging
import os
import statistics
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from matplotlib.ticker import PercentFormatter
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import NMSparsity

PATTERNS = [(2, 4), (1, 8), (1, 16), (1, 32)]
COLORS = {"one_shot": "#c44e52", "srste": "#8c8c8c", "mdgf_exp": "#2a6fbb", "sdgf_stepwise": "#55a868"}
# A notebook has no command line; the tests ask for a short run.
NOTEBOOK = ["--epochs", "2", "--patterns", "1"] if "LIGHTNING_REG_SHORT" in os.environ else []

# %% [markdown]
# ## An ordinary module, one callback


# %%
class DigitsClassifier(LightningModule):
    """An ordinary classifier: nothing in it knows about lightning_reg."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=1e-2)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def digits(seed: int) -> tuple[TensorDataset, Tensor, Tensor]:
    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    train_x, test_x, train_y, test_y = train_test_split(images, labels, train_size=1200, random_state=seed)
    return TensorDataset(train_x, train_y), test_x, test_y


def train(sparse: NMSparsity | None, epochs: int, seed: int) -> tuple[DigitsClassifier, float]:
    """Trains once; the network and its test accuracy, with whatever zeros are in it."""
    train_set, test_x, test_y = digits(seed)
    torch.manual_seed(seed)
    model = DigitsClassifier()
    trainer = Trainer(
        accelerator="cpu",  # a network this small is faster there than on a GPU
        max_epochs=epochs,
        callbacks=[sparse] if sparse else [],  # the whole difference
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(train_set, batch_size=64, shuffle=True))
    with torch.inference_mode():
        return model, float((model(test_x).argmax(1) == test_y).float().mean())


def make(recipe: str, n: int, m: int) -> NMSparsity:
    """One-shot prunes a half-trained network; the other recipes bring the constraint in as they do by default."""
    dense = 0.5 if recipe == "one_shot" else 0.05
    return NMSparsity(n, m, recipe=recipe, layers="net.[02]", dense_fraction=dense)


# %% [markdown]
# ## Tables and pictures


# %%
@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Mutes the hints that do not apply to a data set that lies in memory, and the hardware banner of each run."""
    logger = logging.getLogger("lightning.pytorch")
    level, threads = logger.level, torch.get_num_threads()
    logger.setLevel(logging.WARNING)
    torch.set_num_threads(1)  # layers of 128 units are too small to share among cores
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*available but not used.*")
            warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")  # Lightning on a new torch
            yield
    finally:
        logger.setLevel(level)
        torch.set_num_threads(threads)


def results_table(results: dict[str, list[float]], dense: float, patterns: list[tuple[int, int]], title: str) -> Table:
    table = Table("recipe", *(f"{n}:{m}" for n, m in patterns), title=title, caption=f"dense: {100 * dense:.1f} %")
    for recipe, accuracies in results.items():
        table.add_row(recipe, *(f"{100 * accuracy:.1f} %" for accuracy in accuracies))
    return table


def plot(
    results: dict[str, list[float]], dense: float, patterns: list[tuple[int, int]], title: str, path: Path
) -> None:
    figure = plt.figure(figsize=(7.5, 4.5), dpi=90, layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(dense, color="0.4", linewidth=1, linestyle="--", label="dense")
    places = range(len(patterns))
    for recipe, accuracies in results.items():
        axes.plot(places, accuracies, color=COLORS[recipe], marker="o", linewidth=1.6, label=recipe)
    axes.set(xlabel="weights that are zero", ylabel="test accuracy")
    axes.set_xticks(places, [f"{100 * (1 - n / m):.3g} %\n({n}:{m})" for n, m in patterns])
    axes.set_title(title, loc="left", fontsize=11)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", frameon=False)
    figure.savefig(path, dpi=150)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Digits with N:M sparsity: four recipes, four patterns.")
    parser.add_argument("--seeds", type=int, default=1, help="number of runs of each (default: 1)")
    parser.add_argument("--epochs", type=int, default=25, help="epochs of each run (default: 25)")
    parser.add_argument(
        "--patterns", type=int, default=4, help="how many of the patterns, from the sparsest (default: 4)"
    )
    parser.add_argument("--output", type=Path, default=Path("nm_sparsity.png"), help="the plot's file")
    args = parser.parse_args(argv)
    if args.seeds < 1 or args.epochs < 1 or not 1 <= args.patterns <= len(PATTERNS):
        parser.error("--seeds and --epochs must be at least 1, --patterns in [1, 4]")
    return args


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    """Trains every recipe on every pattern, prints table and report, writes the plot; mean accuracies by recipe."""
    args = parse_args(argv)
    console, patterns = Console(), PATTERNS[-args.patterns :]
    seeds = range(args.seeds)
    arms = [(recipe, n, m) for recipe in COLORS for n, m in patterns]
    results: dict[str, list[float]] = {recipe: [] for recipe in COLORS}
    with quiet_lightning(), torch.random.fork_rng(devices=[]):
        dense = statistics.mean(train(None, args.epochs, seed)[1] for seed in seeds)
        for recipe, n, m in track(arms, description="training", console=console, disable=console.is_jupyter):
            results[recipe].append(statistics.mean(train(make(recipe, n, m), args.epochs, seed)[1] for seed in seeds))
        sparse = make("mdgf_exp", *patterns[-1])
        model, _ = train(sparse, args.epochs, seed=0)

    title = f"Digits, hidden layers N:M sparse, {args.epochs} epochs"
    console.print(results_table(results, dense, patterns, title))
    console.print(sparse.report(model))
    violations = sum(count for _, count in sparse.verify(model).values())
    console.print(f"Groups with too many weights: {violations}")
    plot(results, dense, patterns, title, args.output)
    console.print(f"Plot: {args.output}", soft_wrap=True)
    return results


# %% [markdown]
# ## Four recipes, four patterns
#
# The report at the end says of each layer how many weights are left, and `verify` counts groups with too many: none.

# %%
if __name__ == "__main__":
    in_notebook = "__file__" not in globals()
    results = main(NOTEBOOK if in_notebook else None)

# %% [markdown]
# ## When not to
#
# At 2:4 the recipes are within noise of one another: the simplest will do. Training does not become faster; what can is
# inference, of 2:4 in half precision on GPUs with sparse tensor cores.
