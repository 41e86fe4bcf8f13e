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

from lightning_reg import NoiseSchedule
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


class Unet(nn.Module):
    """Of an image, a time and one of 5 labels; or of an image, a time and an embedding."""

    def __init__(self, *, labels=True):
        super().__init__()
        self.inner, self.labels = nn.Conv2d(1, 1, 3, padding=1), nn.Embedding(5, 1) if labels else None

    def forward(self, x, t, condition):
        shift = condition.mean((1, 2)) if self.labels is None else self.labels(condition)[:, 0]
        return self.inner(x) * (1 + shift[:, None, None, None])


class GAN(LightningModule):
    """Two networks, trained in each step."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
        self.discriminator = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))

    def training_step(self, batch, batch_idx):
        judging, generating = self.optimizers()
        fake = self.generator(torch.randn(len(batch[0]), 4))
        real = F.softplus(-self.discriminator(batch[0])) + F.softplus(self.discriminator(fake.detach()))
        self.step(judging, real.mean())
        self.step(generating, F.softplus(-self.discriminator(fake)).mean())

    def step(self, optimizer, loss):
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.discriminator, self.generator)]

    def sample(self, count):
        return self.generator(torch.randn(count, 4)).detach()


class Search(Classifier):
    """Queries and documents of 6 tokens out of 20."""

    def __init__(self):
        super().__init__()
        self.net = nn.EmbeddingBag(20, 20)
        self.queries, self.documents = nn.Identity(), nn.Sequential(self.net, nn.ReLU())

    def training_step(self, batch, batch_idx):
        asked, found = batch
        return F.cross_entropy(self.queries(asked) @ self.documents(found).T, torch.arange(len(asked)))


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
        **names_of_generation(),
        "clean_loader": loader(torch.rand(24, 1, 8, 8)),
        "search_model": Search(),
        "query_loader": loader(torch.randint(1, 20, (24, 6)), torch.randint(1, 20, (24, 6))),
        "task_loaders": [loader(*task) for task in tasks],
        "test_batches": tasks,
    }


def names_of_generation():
    levels = torch.linspace(0.999, 0.001, 1000)
    return {
        "unet": Unet(),
        "unet_of_embeddings": Unet(labels=False),
        "scheduler": NoiseSchedule(levels),
        "images": torch.randn(2, 1, 8, 8),
        "prompts": torch.randn(2, 3, 4),
        "no_prompt": torch.zeros(1, 3, 4),
        "gan": GAN(),
        "is_unwanted": lambda samples: samples[:, 0] > 0,
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
