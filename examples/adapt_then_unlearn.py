"""Make a GAN forget a digit: adapt a copy to it, then train the original away from the copy.

Run it with ``python examples/adapt_then_unlearn.py``; it takes about a minute. The GAN is an ordinary LightningModule
with manual optimization and two optimizers, and no training data are used but to train it in the first place. The
picture shows what the same noise becomes before and after. It is a notebook too:
``examples/notebooks/adapt_then_unlearn.ipynb``.
"""

# %% [markdown]
# # Adapt, then unlearn
#
# A generator of handwritten digits is to make no sevens any more, without its training data. A classifier sorts what it
# makes (a user's clicks would do as well). **Stage 1** teaches a copy to make sevens; its weights minus the original
# ones are a direction that means "more sevens". **Stage 2** trains the original on wanted samples, with a term that
# rewards the distance from the copy, while the discriminator keeps the quality.

# %%
import copy
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
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lightning_reg import L2ToStart, WeightRepulsion
from lightning_reg.functional import frechet_distance, generator_fisher, split_pool, unlearned_percentage

UNWANTED = 7
SHORT = "LIGHTNING_REG_SHORT" in os.environ  # the tests run it in seconds
STEPS, ADAPT_STEPS, UNLEARN_STEPS = (60, 15, 8) if SHORT else (1_500, 400, 150)
SORT_STEPS = 60 if SHORT else 500  # of the classifier
SAMPLES = 30 if SHORT else 400  # unwanted ones, for stage 1
FOLDER = Path(tempfile.mkdtemp())
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec|number of training batches)")

# %% [markdown]
# ## The GAN and the classifier
#
# Nothing in them knows about unlearning.


# %%
class GAN(LightningModule):
    """A small DCGAN for 8 x 8 pixels; both networks are trained in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Unflatten(1, (16, 1, 1)),
            *(nn.ConvTranspose2d(16, 64, 2), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.ConvTranspose2d(32, 1, 4, 2, 1), nn.Sigmoid()),
        )
        self.discriminator = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, 1, 1), nn.LeakyReLU(0.2)),
            *(nn.Conv2d(32, 64, 4, 2, 1), nn.LeakyReLU(0.2)),
            *(nn.Flatten(), nn.Linear(1024, 1)),
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        generating, judging = self.optimizers()
        real = batch[0].requires_grad_(batch_idx % 8 == 0)
        fake = self.generator(torch.randn(len(real), 16))
        verdict = self.discriminator(real)
        loss = F.softplus(-verdict).mean() + F.softplus(self.discriminator(fake.detach())).mean()
        if real.requires_grad:
            (slope,) = torch.autograd.grad(verdict.sum(), real, create_graph=True)
            loss = loss + 4 * slope.square().flatten(1).sum(1).mean()
        self.step(judging, loss)
        self.step(generating, F.softplus(-self.discriminator(fake)).mean())

    def step(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        networks = (self.generator, self.discriminator)
        return [torch.optim.Adam(network.parameters(), lr=1e-3, betas=(0.0, 0.99)) for network in networks]

    @torch.no_grad()
    def sample(self, count: int) -> Tensor:
        self.eval()
        images: Tensor = self.generator(torch.randn(count, 16))
        return images


class Classifier(LightningModule):
    """Sorts samples; what its last layer sees are the features in which samples are compared."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 32), nn.Tanh()),
        )
        self.head = nn.Linear(32, 10)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.features(batch[0])), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=2e-3)

    @torch.no_grad()
    def is_unwanted(self, images: Tensor) -> Tensor:
        mask: Tensor = self.head(self.features(images)).argmax(1) == UNWANTED
        return mask


def train(module: LightningModule, steps: int, *data: Tensor, callbacks: tuple[Any, ...] = ()) -> None:
    dataset = TensorDataset(*data)
    sampler = RandomSampler(dataset, replacement=True, num_samples=64 * steps)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module.train()
    trainer.fit(module, DataLoader(dataset, 64, sampler=sampler))


# %% [markdown]
# ## Stage 1: a copy learns more of it
#
# `generator_fisher` says how much each weight matters to the discriminator, and `L2ToStart` holds the copy by it: few
# sevens would otherwise be learned by heart.


# %%
def adapt(original: GAN, sevens: Tensor, steps: int) -> GAN:
    adapted = copy.deepcopy(original)
    torch.save(generator_fisher(original, torch.randn(32, 16)), FOLDER / "fisher.pt")
    tie = L2ToStart(2.0, params="generator.*", importance=str(FOLDER / "fisher.pt"))
    train(adapted, steps, sevens, callbacks=(tie,))
    torch.save(adapted.state_dict(), FOLDER / "adapted.pt")
    return adapted


# %% [markdown]
# ## Stage 2: the original goes the other way
#
# One callback. `params` says that the term is the generator's; the discriminator's steps are as they were.


# %%
def unlearn(original: GAN, others: Tensor, steps: int, repelled: bool = True) -> GAN:
    unlearned = copy.deepcopy(original)
    away = WeightRepulsion(str(FOLDER / "adapted.pt"), weight=100.0, params="generator.*")
    train(unlearned, steps, others, callbacks=(away,) if repelled else ())
    return unlearned


# %% [markdown]
# ## Both stages, and what came of it

# %%
seed_everything(0, verbose=False)
digits = load_digits()
x, y = torch.tensor(digits.data / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(digits.target)
classifier, original = Classifier(), GAN()
train(classifier, SORT_STEPS, x, y)
train(original, STEPS, x)
classifier.eval()

pool = split_pool(original.sample, classifier.is_unwanted, wanted=3_000, unwanted=SAMPLES)
gans = {
    "original": original,
    "adapted copy": adapt(original, pool.unwanted, ADAPT_STEPS),
    "wanted samples alone": unlearn(original, pool.wanted, UNLEARN_STEPS, repelled=False),
    "away from the copy": unlearn(original, pool.wanted, UNLEARN_STEPS),
}

# %% [markdown]
# The share of sevens, how much of it was unlearned, and how far the samples are from real digits other than seven, in
# the features of the classifier (a Fréchet distance).

# %%
reals = x[y != UNWANTED]
results: dict[str, dict[str, float]] = {}
table = Table("generator", f"share of {UNWANTED}s", "unlearned (PUL)", "Fréchet distance, features")
for name, gan in gans.items():
    torch.manual_seed(1)
    images = gan.sample(3_000)
    share = float(classifier.is_unwanted(images).float().mean())
    with torch.no_grad():
        distance = float(frechet_distance(classifier.features(images[: len(reals)]), classifier.features(reals)))
    unlearned = unlearned_percentage(results.get("original", {"share": share})["share"], share)
    results[name] = {"share": share, "PUL": unlearned, "Fréchet": distance}
    table.add_row(name, f"{share:.1%}", f"{unlearned:.0f} %" if unlearned >= 0 else "-", f"{distance:.2f}")
Console().print(table)

# %% [markdown]
# The same noise through each generator.

# %%
figure = plt.figure(figsize=(6, 3.4), layout="constrained")
for axes, (name, gan) in zip(figure.subplots(2, 2).flat, gans.items(), strict=True):
    torch.manual_seed(2)
    grid = F.pad(gan.sample(48), (1, 1, 1, 1)).view(4, 12, 10, 10).permute(0, 2, 1, 3).reshape(40, 120)
    axes.imshow(grid.numpy(), cmap="gray_r", vmin=0, vmax=1)
    axes.set_title(name, fontsize=9)
    axes.axis("off")
plt.savefig("adapt_then_unlearn.png", dpi=150)
plt.show()
