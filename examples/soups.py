"""Fine-tune a digits classifier eight times from one start, then make soups of the eight checkpoints.

Run it with ``python examples/soups.py``; it takes about a minute. Some runs use a learning rate that is too high: the
greedy soup leaves them out, the uniform one suffers. The plot shows the test accuracy along the straight line between
two fine-tuned models, once for two that share a basin and once for two that do not.
"""

# %% [markdown]
# # Model soups
#
# Fine-tune one start several times, with other seeds and learning rates, and average the weights: often the mean is
# better than the best of them, at the cost of one. The **uniform** soup is the mean of all. The **greedy** soup takes
# one after the other, the best first, and keeps each only if the held-out score of the mean improves: bad runs stay
# out.
#
# `SoupAverager` does the same within one run, over its epochs. `make_soup` and the command `lightning-reg soup` work on
# checkpoint files.

# %%
import argparse
import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import SoupAverager, TrainerEvaluation
from lightning_reg.functional import make_soup, wise_ft

RATES = [0.01, 0.01, 0.01, 0.02, 0.02, 0.02, 0.3, 0.5]
# A notebook has no command line; the tests ask for a short run.
NOTEBOOK = ["--epochs", "2"] if "LIGHTNING_REG_SHORT" in os.environ else []

# %% [markdown]
# ## An ordinary module
#
# It logs the validation score that the soups are chosen by.


# %%
class Digits(LightningModule):
    """An ordinary classifier: nothing in it knows about averages."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(256, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        accuracy = (self.net(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("val_acc", accuracy, batch_size=len(batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


def splits() -> dict[str, TensorDataset]:
    """Clean digits to start from; shifted and noisy ones to fine-tune, choose and test on."""
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=generator)
    hard = torch.roll(x, 1, dims=3) + 0.3 * torch.randn(x.shape, generator=generator)
    parts = {"start": (x, 0, 600), "tune": (hard, 600, 750), "choose": (hard, 750, 1100), "test": (hard, 1100, len(x))}
    return {name: TensorDataset(images[order[a:b]], y[order[a:b]]) for name, (images, a, b) in parts.items()}


def trainer(epochs: int, *callbacks: Any) -> Trainer:
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def accuracy(state: dict[str, Any], data: TensorDataset) -> float:
    model = Digits().eval()
    model.load_state_dict(state)
    with torch.no_grad():
        images, labels = data.tensors
        return (model.net(images).argmax(1) == labels).float().mean().item()


# %% [markdown]
# ## Eight fine-tunings, three soups
#
# The candidates go through the module's own validation loop, by `TrainerEvaluation`.


# %%
def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15, help="of each fine-tuning")
    parser.add_argument("--output", type=Path, default=Path("soups.png"), help="where the plot goes")
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers")
        warnings.filterwarnings("ignore", ".*but have no `val_dataloader`")
        warnings.filterwarnings("ignore", ".*LeafSpec")  # Lightning on new torch
        warnings.filterwarnings("ignore", ".*number of training batches")
        warnings.filterwarnings("ignore", ".*may not share a basin")  # that is the point here
        with tempfile.TemporaryDirectory() as folder:
            return run(options, Path(folder))


def run(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    data, console = splits(), Console()
    choose = DataLoader(data["choose"], 350)
    seed_everything(0, verbose=False)
    start = Digits()
    trainer(20).fit(start, DataLoader(data["start"], 32, shuffle=True))

    paths = []
    for seed, rate in enumerate(RATES):
        seed_everything(seed + 1, verbose=False)
        model = Digits(rate)
        model.load_state_dict(start.state_dict())
        fitting = trainer(options.epochs)
        fitting.fit(model, DataLoader(data["tune"], 25, shuffle=True))
        paths.append(folder / f"run{seed} lr={rate:g}.ckpt")
        fitting.save_checkpoint(paths[-1])

    evaluate = TrainerEvaluation(
        trainer(1), Digits(), "val_acc", dataloaders=choose, train_batches=DataLoader(data["tune"], 25)
    )
    uniform = make_soup(paths, "uniform", evaluate)
    greedy = make_soup(paths, "greedy", evaluate, out=folder / "soup.ckpt")
    best = max(greedy.trace, key=lambda candidate: candidate.own_score)

    seed_everything(1, verbose=False)
    one_run = Digits(0.01)
    one_run.load_state_dict(start.state_dict())
    within = SoupAverager(method="greedy", monitor="val_acc")
    trainer(options.epochs, within).fit(one_run, DataLoader(data["tune"], 25, shuffle=True), choose)

    members = {path.name: torch.load(path, weights_only=True)["state_dict"] for path in paths}
    table = Table("greedy soup: candidate", "own score", "with it", "", title="in the order of their scores")
    for candidate in greedy.trace:
        with_it = "-" if candidate.score is None else f"{candidate.score:.3f}"
        verdict = "[green]in[/]" if candidate.accepted else "[red]out[/]"
        table.add_row(Path(candidate.name).name, f"{candidate.own_score:.3f}", with_it, verdict)
    console.print(table)

    results = {
        "before fine-tuning": accuracy(start.state_dict(), data["test"]),
        "mean of the eight": sum(accuracy(m, data["test"]) for m in members.values()) / len(members),
        "best of the eight, by validation": accuracy(members[Path(best.name).name], data["test"]),
        "uniform soup": accuracy(uniform.state_dict, data["test"]),
        f"greedy soup ({len(greedy.ingredients)} in)": accuracy(greedy.state_dict, data["test"]),
        f"SoupAverager in one run ({len(within.ingredients)} in)": accuracy(one_run.state_dict(), data["test"]),
    }
    summary = Table("weights", "test accuracy")
    for name, value in results.items():
        summary.add_row(name, f"{value:.3f}")
    console.print(summary)

    states = list(members.values())
    plot({"two gentle runs": (states[0], states[1]), "two rough runs": (states[-2], states[-1])}, data["test"], options)
    console.print(f"Plot: {options.output}")
    return results


# %% [markdown]
# ## Why it works, and when not
#
# Two runs from one start mostly end in one basin: along the straight line between their weights the accuracy does not
# fall, so their mean is as good. Runs with too high a learning rate have left it, and their mean is worse than both.


# %%
def plot(pairs: dict[str, tuple[dict[str, Any], dict[str, Any]]], test: TensorDataset, options: Any) -> None:
    figure = plt.figure(figsize=(6, 3.6), dpi=90, layout="constrained")
    axes = figure.subplots()
    alphas = [i / 20 for i in range(21)]
    for name, (one, two) in pairs.items():
        axes.plot(alphas, [accuracy(wise_ft(one, two, alpha), test) for alpha in alphas], marker=".", label=name)
    axes.set(xlabel="position between the two models", ylabel="test accuracy", title="along the line of weights")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(options.output, dpi=150)


# %% [markdown]
# ## The run

# %%
if __name__ == "__main__":
    in_notebook = "__file__" not in globals()
    results = main(NOTEBOOK if in_notebook else None)

# %% [markdown]
# Chosen by validation, judged by test: a greedy soup is never worse than its best member on the validation set. On the
# test set the gain is small, and where the members are one run's neighbouring epochs smaller still.
