"""Pretrain a byte-level GPT on the running Python's standard library, with uniform and with loss-based sample weights.

Run it with ``python examples/llm_reweighting.py``; it takes about a minute and needs no download. Both runs of a seed
share the text, the initial weights and the batch order: the callback in the Trainer is the only difference. At this
scale do not expect a gain; what the run shows is how the callback is attached and what it does to the weights.
"""

# %% [markdown]
# # Reweight the samples of a language model
#
# In pretraining many sequences are learned early, and go on taking their share of each batch. `LossReweighting` gives
# each sequence a weight by its present loss: here (`linupper`) those with a small loss count less. Nothing in the
# model or its loss changes.
#
# The text is the standard library of the Python that runs this, the model a small GPT over bytes.

# %%
import argparse
import logging
import os
import statistics
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_reg import LossReweighting

ARMS = {"uniform": "uniform weights", "linupper": "LossReweighting, linupper"}
COLORS = {"uniform": "#c44e52", "linupper": "#2a6fbb"}
# A notebook has no command line; the tests ask for a short run.
SHORT = ["--steps", "10", "--batch", "4", "--length", "16"]
NOTEBOOK = SHORT if "LIGHTNING_REG_SHORT" in os.environ else ["--steps", "100"]

# %% [markdown]
# ## A small GPT


# %%
class Block(nn.Module):
    """Causal self-attention and an MLP, each after a LayerNorm and beside a residual path."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class ByteGPT(nn.Module):
    """A GPT over bytes, ``(B, T)`` int64 to ``(B, T, 256)``."""

    def __init__(self, layers: int, width: int, length: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, width), nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.Sequential(*[Block(width, width // 32) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions)))


# %% [markdown]
# ## An ordinary LightningModule


# %%
class LanguageModel(LightningModule):
    """An ordinary language model: nothing in it knows about lightning_reg."""

    def __init__(self, net: nn.Module, lr: float = 1e-3) -> None:
        super().__init__()
        self.net, self.lr = net, lr

    def loss(self, tokens: Tensor) -> Tensor:
        logits = self.net(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def training_step(self, tokens: Tensor, batch_idx: int) -> Tensor:
        return self.loss(tokens)

    def validation_step(self, tokens: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(tokens), batch_size=len(tokens))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.01)


class Windows(Dataset[Tensor]):
    """Windows of a text at given places."""

    def __init__(self, text: Tensor, starts: Tensor, length: int) -> None:
        self.text, self.starts, self.length = text, starts.tolist(), length

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Tensor:
        return self.text[self.starts[index] :][: self.length + 1].long()


class LossCurve(Callback):
    """Keeps the validation losses and moves the progress bar on."""

    def __init__(self, progress: Progress, task: Any) -> None:
        self.progress, self.task = progress, task
        self.steps: list[int] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.progress.advance(self.task)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.steps.append(trainer.global_step)
        self.losses.append(float(trainer.callback_metrics["val_loss"]))


class WeightCurve(Callback):
    """Keeps the effective sample size that the technique logs."""

    def __init__(self) -> None:
        self.effective: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        logged = trainer.callback_metrics.get("reg/loss_reweighting/effective_samples")
        if logged is not None:
            self.effective.append(float(logged))


def standard_library(size: int) -> Tensor:
    """The modules of the standard library, one after the other, ``(size,)`` uint8."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = b"".join(file.read_bytes() for file in files)[:size]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


# %% [markdown]
# ## Two runs that differ in one callback


# %%
def train(
    loaders: tuple[DataLoader, DataLoader], net: nn.Module, callbacks: list[Callback], steps: int, every: int
) -> None:
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=every,
        check_val_every_n_epoch=None,
        callbacks=callbacks,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(LanguageModel(net), *loaders)


def run(arm: str, args: argparse.Namespace, text: Tensor, seed: int, progress: Progress, task: Any) -> dict[str, Any]:
    torch.manual_seed(seed)
    cut = len(text) * 9 // 10  # the last tenth is held out
    train_starts = torch.randint(cut - args.length - 1, (args.steps * args.batch,))
    val_starts = torch.arange(cut, len(text) - args.length - 1, args.length)[:256]
    loaders = (
        DataLoader(Windows(text, train_starts, args.length), args.batch),
        DataLoader(Windows(text, val_starts, args.length), 64),
    )
    curve, weights = LossCurve(progress, task), WeightCurve()

    # The whole difference between the two arms:
    reweighting = LossReweighting(strategy="linupper", r=0.4, warmup_steps=args.steps // 10)
    callbacks: list[Callback] = [reweighting] if arm == "linupper" else []
    train(loaders, ByteGPT(2, 96, args.length), [*callbacks, curve, weights], args.steps, max(args.steps // 10, 1))
    return {"steps": curve.steps, "losses": curve.losses, "effective": weights.effective}


# %% [markdown]
# ## Tables and pictures


# %%
def results_table(results: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> Table:
    spread = f"mean ± sd of {args.seeds} seeds" if args.seeds > 1 else "one seed"
    table = Table(title="Byte-level GPT on the standard library", title_style="bold", caption=spread)
    table.add_column("")
    for arm in results:
        table.add_column(ARMS[arm], justify="right", header_style=COLORS[arm])
    tokens = args.steps * args.batch * args.length
    table.add_row("Training bytes", *[f"{tokens:,}" for _ in results])
    finals = {arm: [run["losses"][-1] for run in runs] for arm, runs in results.items()}
    table.add_row("Validation loss, nats per byte", *[mean_sd(values) for values in finals.values()])
    sizes = [[statistics.mean(run["effective"]) for run in runs if run["effective"]] for runs in results.values()]
    table.add_row(f"Effective samples of {args.batch}", *[mean_sd(values) if values else "-" for values in sizes])
    return table


def mean_sd(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def plot_curves(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    figure = plt.figure(figsize=(10, 4), dpi=80, layout="constrained")
    left, right = figure.subplots(1, 2)
    for arm, runs in results.items():
        for position, one in enumerate(runs):
            label = ARMS[arm] if position == 0 else None
            left.plot(one["steps"], one["losses"], color=COLORS[arm], linewidth=1.4, label=label)
            right.plot(one["effective"], color=COLORS[arm], linewidth=0.8)
    left.set(xlabel="step", ylabel="validation loss, nats per byte")
    right.set(xlabel="step after the warm-up", ylabel="effective samples, 1 / Σ w²")
    for axes in (left, right):
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    figure.savefig(path, dpi=150)


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


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A byte-level GPT: uniform weights against LossReweighting.")
    parser.add_argument("--seeds", type=int, default=1, help="number of runs of each arm (default: 1)")
    parser.add_argument("--steps", type=int, default=300, help="steps of each run (default: 300)")
    parser.add_argument("--batch", type=int, default=32, help="sequences per step (default: 32)")
    parser.add_argument("--length", type=int, default=64, help="bytes per sequence (default: 64)")
    parser.add_argument("--output", type=Path, default=Path("llm_reweighting.png"), help="the plot's file")
    args = parser.parse_args(argv)
    if min(args.seeds, args.steps, args.length) < 1 or args.batch < 2:
        parser.error("--seeds, --steps and --length must be at least 1, --batch at least 2")
    return args


def main(argv: list[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    """Trains every arm on every seed, prints the table, writes the plot and returns the runs of each arm."""
    args = parse_args(argv)
    console = Console()
    text = standard_library(2_000_000)
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with (
        quiet_lightning(),
        torch.random.fork_rng(devices=[]),
        Progress(*columns, *times, console=console, disable=console.is_jupyter) as progress,
    ):
        task = progress.add_task("", total=args.seeds * len(ARMS) * args.steps)
        for seed in range(args.seeds):
            for arm, name in ARMS.items():
                progress.update(task, description=f"seed {seed + 1}/{args.seeds}, {name}")
                results[arm].append(run(arm, args, text, seed, progress, task))
        progress.update(task, description="trained")
    console.print(results_table(results, args))
    plot_curves(results, args.output)
    console.print(f"Plot: {args.output}", soft_wrap=True)
    return results


# %% [markdown]
# ## The run
#
# Both runs see the same batches in the same order, from the same weights.

# %%
if __name__ == "__main__":
    in_notebook = "__file__" not in globals()
    results = main(NOTEBOOK if in_notebook else None)

# %% [markdown]
# ## When not to
#
# At this scale do not expect a gain: on clean text a small model was slightly worse with it, and on text of which
# four fifths are near duplicates slightly better. The gains that the paper reports are for models from 124 million
# weights on.
