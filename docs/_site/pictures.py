"""Draws the pictures on the page about them: ``python docs/_site/pictures.py``, half a minute on digits.

That of ``make demo`` is taken along where it lies in the repository's root.
"""

import io
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from typing_extensions import override

from lightning_reg import (
    ContinualMetrics,
    CorruptedModularArithmetic,
    ELRCallback,
    IPRMonitor,
    LossReweighting,
    NMSparsity,
    PredictionDistillation,
    QuadraticMLP,
    SoupAverager,
    plots,
)
from lightning_reg.engine.technique import Technique
from lightning_reg.functional import neuron_participation_ratios

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "docs" / "assets"
sys.path.insert(0, str(ROOT / "examples"))

import noisy_labels  # noqa: E402

TRAIN, TEST, _ = noisy_labels.noisy_digits(0.4, 0)
CLEAN, _, _ = noisy_labels.noisy_digits(0.0, 0)


def keep(figure: Figure, name: str) -> None:
    """Writes a figure with few colours, which is a third of the size."""
    buffer = io.BytesIO()
    figure.savefig(buffer)
    Image.open(buffer).convert("RGB").quantize(64).save(ASSETS / f"{name}.png", optimize=True)


def fit(*techniques: Technique, epochs: int) -> tuple[LightningModule, str]:
    """A model trained on digits with wrong labels, and the folder of its log."""
    seed_everything(0, verbose=False)
    model = noisy_labels.DigitsClassifier()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(techniques),
        logger=CSVLogger(tempfile.mkdtemp()),
        log_every_n_steps=19,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, DataLoader(TRAIN, 64, shuffle=True), DataLoader(TEST, 600))
    return model, str(trainer.log_dir)


def five_tasks() -> ContinualMetrics:
    """Two digits a task, one after the other."""
    seed_everything(0, verbose=False)
    metrics, model, technique = (
        ContinualMetrics([2] * 5),
        noisy_labels.DigitsClassifier(),
        PredictionDistillation(new_classes=[2] * 5),
    )
    labels = CLEAN.tensors[1]
    images, truth = TEST.tensors
    for task in range(5):
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=8,
            callbacks=[technique],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        chosen = (labels // 2 == task).nonzero()[:, 0].tolist()
        trainer.fit(model, DataLoader(Subset(CLEAN, chosen), 32, shuffle=True))
        for earlier in range(task + 1):
            rows = truth // 2 == earlier
            metrics.update(model(images[rows]), truth[rows], after_task=task + 1)
    return metrics


class Sums(LightningModule):
    """The paper's network for sums modulo 59."""

    def __init__(self) -> None:
        super().__init__()
        self.net = QuadraticMLP(59, 300)

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.mse_loss(self.net(batch[0]), F.one_hot(batch[1], 59).float())

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.01, betas=(0.9, 0.98), weight_decay=5.0)


def grokked() -> Figure:
    """A fifth of the training labels is wrong, and weight decay is strong."""
    seed_everything(0, verbose=False)
    model = Sums()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=120,
        callbacks=[IPRMonitor("net.hidden", "net.head", network="net")],
        logger=CSVLogger(tempfile.mkdtemp()),
        log_every_n_steps=3,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=CorruptedModularArithmetic(59, train_fraction=0.75, corruption=0.2))
    ratios = neuron_participation_ratios(model.net.hidden.weight, model.net.head.weight)
    return plots.grokking(str(trainer.log_dir), {"Neurons at the end": ratios})


def main() -> None:
    """Draws all of them."""
    elr = ELRCallback(lam=7.0, beta=0.9)
    _, log = fit(elr, epochs=40)
    keep(plots.memorisation(log, metrics=["test_accuracy"]), "memorisation")
    keep(plots.suspects(elr.label_errors(), TRAIN.tensors[0].view(-1, 8, 8)), "suspects")
    _, log = fit(LossReweighting(warmup_steps=50), epochs=15)
    keep(plots.weights_over_time(log), "weights")
    sparse = NMSparsity(1, 8, layers=["net.0", "net.2"], log_layers=True)
    model, log = fit(sparse, epochs=15)
    keep(plots.masks(sparse.report(model), log), "masks")
    keep(plots.masks_over_time(log), "masks_over_time")
    soup = SoupAverager(method="greedy", monitor="test_accuracy", last_k=8)
    fit(soup, epochs=12)
    keep(plots.soup_ladder(soup.trace, "validation accuracy"), "ladder")
    metrics = five_tasks()
    keep(plots.forgetting(metrics.right / metrics.tested), "forgetting")
    keep(grokked(), "grokking")
    for name in ("noisy_labels",):  # of `make demo`
        if (path := ROOT / f"{name}.png").exists():
            Image.open(path).convert("RGB").quantize(64).save(ASSETS / f"{name}.png", optimize=True)


if __name__ == "__main__":
    with noisy_labels.quiet_lightning(), noisy_labels.one_thread():
        main()
