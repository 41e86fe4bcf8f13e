"""Train on digits with wrong labels, once as usual and once with early-learning regularization, and compare.

Run it with ``python examples/noisy_labels.py``; it takes about a minute. Both runs of a seed share the data, the wrong
labels, the initial weights and the batch order: the callback in the Trainer is the only difference.
"""

import argparse
import logging
import statistics
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import ELRCallback

ARMS = {"plain": "plain cross-entropy", "elr": "with ELRCallback"}
COLORS = {"plain": "#c44e52", "elr": "#2a6fbb"}


class DigitsClassifier(LightningModule):
    """An ordinary classifier: nothing in it knows about lightning_reg."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("test_accuracy", (self(images).argmax(dim=1) == labels).float().mean(), batch_size=len(labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


class AccuracyCurve(Callback):
    """Keeps the test accuracy of each epoch and moves the progress bar on."""

    def __init__(self, progress: Progress, task: Any) -> None:
        self.progress = progress
        self.task = task
        self.values: list[float] = []

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.values.append(float(trainer.callback_metrics["test_accuracy"]))
        self.progress.advance(self.task)


def noisy_digits(noise: float, seed: int) -> tuple[TensorDataset, TensorDataset, Tensor]:
    """Training set with wrong labels, test set, and which training labels are wrong ``(N,)``."""
    digits = load_digits()
    train_x, test_x, train_y, test_y = train_test_split(
        torch.tensor(digits.data, dtype=torch.float32) / 16,
        torch.tensor(digits.target, dtype=torch.int64),
        train_size=1200,
        random_state=seed,
    )
    generator = torch.Generator().manual_seed(seed)
    redrawn = torch.rand(len(train_y), generator=generator) < noise
    # Over all ten classes: one redrawn label in ten comes out right again.
    given_y = torch.where(redrawn, torch.randint(10, train_y.shape, generator=generator), train_y)
    return TensorDataset(train_x, given_y), TensorDataset(test_x, test_y), given_y != train_y


def train(
    train_set: TensorDataset, test_set: TensorDataset, callbacks: list[Callback], epochs: int, seed: int
) -> DigitsClassifier:
    torch.manual_seed(seed)
    model = DigitsClassifier()
    trainer = Trainer(
        accelerator="cpu",  # a network this small is faster there than on a GPU
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    test_loader = DataLoader(test_set, batch_size=len(test_set))
    trainer.fit(model, DataLoader(train_set, batch_size=64, shuffle=True), test_loader)
    return model


def detection(suspected: Tensor, wrong: Tensor) -> dict[str, float]:
    hits = int((suspected & wrong).sum())
    return {
        "precision": hits / max(int(suspected.sum()), 1),
        "recall": hits / max(int(wrong.sum()), 1),
    }


def run(arm: str, noise: float, epochs: int, seed: int, progress: Progress, task: Any) -> dict[str, Any]:
    train_set, test_set, wrong = noisy_digits(noise, seed)
    curve = AccuracyCurve(progress, task)
    elr = ELRCallback(lam=7.0, beta=0.9)

    # The whole difference between the two arms:
    callbacks: list[Callback] = [curve, elr] if arm == "elr" else [curve]
    model = train(train_set, test_set, callbacks, epochs, seed)

    images, given = train_set.tensors
    with torch.inference_mode():
        memorised = model(images[wrong]).argmax(dim=1) == given[wrong]
    result: dict[str, Any] = {
        "curve": curve.values,
        "final": curve.values[-1],
        "best": max(curve.values),
        "memorised": int(memorised.sum()) / max(len(memorised), 1),
    }
    if arm == "elr":
        result |= detection(elr.suspected_label_errors(), wrong)
    return result


def mean_sd(runs: list[dict[str, Any]], key: str) -> str:
    if key not in runs[0]:
        return "-"
    values = [100 * run[key] for run in runs]
    return f"{statistics.mean(values):.1f} %" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def results_table(results: dict[str, list[dict[str, Any]]], title: str, caption: str) -> Table:
    table = Table(title=title, title_style="bold", caption=caption)
    table.add_column("")
    for arm in results:
        table.add_column(ARMS[arm], justify="right", header_style=COLORS[arm])
    rows = {
        "final": "Test accuracy, last epoch",
        "best": "Test accuracy, best epoch",
        "memorised": "Wrong labels memorised",
        "precision": "Suspected labels: precision",
        "recall": "Suspected labels: recall",
    }
    for key, name in rows.items():
        cells = [mean_sd(runs, key) for runs in results.values()]
        table.add_row(name, *cells, end_section=key in {"best", "memorised"})
    return table


def plot_curves(results: dict[str, list[dict[str, Any]]], title: str, path: Path) -> None:
    figure = Figure(figsize=(7.5, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    by_final = sorted(results.items(), key=lambda item: statistics.mean(run["final"] for run in item[1]))
    for (arm, runs), side in zip(by_final, ("top", "bottom"), strict=True):
        curves = torch.tensor([run["curve"] for run in runs])
        mean, band = curves.mean(dim=0), curves.std(dim=0, correction=int(len(runs) > 1))
        last = len(mean)
        axes.plot(range(1, last + 1), mean, color=COLORS[arm], linewidth=1.6, label=ARMS[arm])
        axes.fill_between(range(1, last + 1), mean - band, mean + band, color=COLORS[arm], alpha=0.2, linewidth=0)
        # The higher value above its line's end and the lower one below it: they cannot overlap.
        axes.annotate(
            f"{100 * mean[-1]:.1f} %",
            (last, float(mean[-1])),
            xytext=(6, 0),
            textcoords="offset points",
            va=side,
            color=COLORS[arm],
            fontweight="bold",
        )
    axes.set(xlabel="epoch", ylabel="test accuracy", xlim=(1, max(last, 2)))
    axes.set_title(title, loc="left", fontsize=11)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0, symbol=" %"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", frameon=False, reverse=True)
    figure.savefig(path)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Mutes the hints that do not apply to a data set that lies in memory, and the hardware banner of each run."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*available but not used.*")
            warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")  # Lightning on a new torch
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def one_thread() -> Iterator[None]:
    """Layers of 256 units are too small to share among cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Digits with wrong labels: plain training against ELRCallback.")
    parser.add_argument("--seeds", type=int, default=3, help="number of runs of each arm (default: 3)")
    parser.add_argument("--epochs", type=int, default=120, help="epochs of each run (default: 120)")
    parser.add_argument("--noise", type=float, default=0.4, help="share of the labels to redraw (default: 0.4)")
    parser.add_argument("--output", type=Path, default=Path("noisy_labels.png"), help="the plot's file")
    args = parser.parse_args(argv)
    if args.seeds < 1 or args.epochs < 1:
        parser.error("--seeds and --epochs must be at least 1")
    if not 0 <= args.noise <= 1:
        parser.error("--noise must be in [0, 1]")
    return args


def main(argv: list[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    """Trains every arm on every seed, prints the table, writes the plot and returns the runs of each arm."""
    args = parse_args(argv)
    console = Console()
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"))
    with (
        quiet_lightning(),
        one_thread(),
        torch.random.fork_rng(devices=[]),
        Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress,
    ):
        task = progress.add_task("", total=args.seeds * len(ARMS) * args.epochs)
        for seed in range(args.seeds):
            for arm, name in ARMS.items():
                progress.update(task, description=f"seed {seed + 1}/{args.seeds}, {name}")
                results[arm].append(run(arm, args.noise, args.epochs, seed, progress, task))
        progress.update(task, description="trained")

    title = f"Digits, {100 * args.noise:.0f} % of the training labels redrawn at random"
    spread = f"mean ± sd of {args.seeds} seeds" if args.seeds > 1 else "one seed"
    console.print(results_table(results, title, caption=spread))
    plot_curves(results, f"{title}\n({spread})", args.output)
    console.print(f"Plot: {args.output}", soft_wrap=True)
    return results


if __name__ == "__main__":
    main()
