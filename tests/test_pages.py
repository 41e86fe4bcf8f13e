"""The Python and YAML on the pages for users: what a page shows runs, from its first block to its last."""

import re
import sys

import lightning.pytorch
import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.structure import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Its files are those of `tests/tutorial`, where a test compares the two.
ELSEWHERE = {"docs/tutorial.md"}


def blocks(page, language="python"):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


class Classifier(LightningModule):
    """What the pages call ``model``."""

    def __init__(self, first=None, outputs=4, loss=None):
        super().__init__()
        self.net = nn.Sequential()
        self.net.add_module("first", nn.Linear(8, 16) if first is None else first)
        for name, layer in (("body", nn.Linear(16, 16)), ("dropout", nn.Dropout()), ("head", nn.Linear(16, outputs))):
            self.net.add_module(name, layer)
        self.loss = loss or F.cross_entropy  # no default of the signature, which jsonargparse 4.39 cannot write

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.loss(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_acc", (self(x).argmax(1) == y).float().mean(), batch_size=len(y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class LanguageModel(Classifier):
    """Logits for each of 7 tokens."""

    def __init__(self):
        super().__init__(nn.Embedding(9, 16), 9)

    def training_step(self, batch, batch_idx):
        (tokens,) = batch
        return F.cross_entropy(self.net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


class Data(LightningDataModule):
    def train_dataloader(self):
        return loader(torch.randn(24, 8), torch.arange(24) % 4)

    def val_dataloader(self):
        return loader(torch.randn(24, 8), torch.arange(24) % 4, shuffle=False)


def loader(*tensors, shuffle=True):
    return DataLoader(TensorDataset(*tensors), 8, shuffle=shuffle)


def names_on_the_pages():
    """What the pages take as given: the user's models and data."""
    x, y = torch.randn(24, 8), torch.arange(24) % 4
    tasks = [(x[y // 2 == task], y[y // 2 == task]) for task in range(2)]
    picture = nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return {
        "__name__": "page",
        "Classifier": Classifier,
        "Data": Data,
        "model": Classifier(),
        "train_loader": Data().train_dataloader(),
        "val_loader": Data().val_dataloader(),
        "image_model": Classifier(picture),
        "image_loader": loader(torch.rand(24, 3, 8, 8), y),
        "language_model": LanguageModel(),
        "token_loader": loader(torch.randint(9, (24, 8))),
        "regression_model": Classifier(outputs=1, loss=lambda output, y: F.mse_loss(output[:, 0], y)),
        "regression_loader": loader(x, x.sum(1)),
        "task_loaders": [loader(*task) for task in tasks],
        "test_batches": tasks,
    }


class ShortTrainer(Trainer):
    """A Trainer that stops early and is quiet."""

    def __init__(self, **kwargs):
        epochs = min(kwargs.pop("max_epochs", 1), 6)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        kwargs = {**quiet, **kwargs, "max_epochs": epochs, "max_steps": min(kwargs.get("max_steps", 12), 12)}
        super().__init__(**kwargs, accelerator="cpu", enable_checkpointing=False)


WITH_CODE = [page for page in PAGES if blocks(page) and str(page.relative_to(ROOT)) not in ELSEWHERE]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.setattr(lightning.pytorch, "Trainer", ShortTrainer)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = names_on_the_pages()
    for settings in blocks(page, "yaml"):
        (tmp_path / "config.yaml").write_text(re.sub(r"max_epochs: \d+", "max_epochs: 2", settings))
        monkeypatch.setattr(sys, "argv", ["cli.py", "fit", "--config", "config.yaml"])
    for number, block in enumerate(blocks(page)):
        exec(compile(block, f"{page.name}, block {number + 1}", "exec"), names)
    if "config.yaml" in {path.name for path in tmp_path.iterdir()}:  # what ran had the callbacks of the page
        given = yaml.safe_load((tmp_path / "config.yaml").read_text())["trainer"]["callbacks"]
        trainer = names["cli"].trainer
        attached = {f"lightning_reg.{type(callback).__name__}" for callback in trainer.callbacks}
        assert {entry["class_path"] for entry in given} <= attached
        assert trainer.global_step == 6
