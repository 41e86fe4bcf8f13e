"""Three techniques alone and together on little data with wrong labels, and two that cannot stand together.

Run it with ``python examples/stacking.py``; it takes about a minute. It is a notebook too:
``examples/notebooks/stacking.ipynb``.
"""

# %% [markdown]
# # Stack techniques
#
# Each technique acts on one thing: the batch, the loss, a layer, the weights. So they stand together as the entries
# of a list do, `callbacks=[ELRCallback(), MultiSampleDropout("head.0"), SoupAverager(...)]`, and what cannot work
# together is refused before the training begins, with a reason.

# %%
import logging
import os
import statistics
import warnings

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import CutMix, ELRCallback, MultiSampleDropout, SoupAverager

SHORT = "LIGHTNING_REG_SHORT" in os.environ  # the tests run it in seconds
SEEDS, EPOCHS = (1, 4) if SHORT else (3, 60)
console = Console()
torch.set_num_threads(1)  # the layers are too small to share among cores
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec)")

# %% [markdown]
# ## Little data, a third of the labels wrong
#
# 600 digits to train on; the other 1,197, with their true labels, to test.


# %%
class Classifier(LightningModule):
    """An ordinary classifier with dropout before its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(256, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def noisy_digits(seed: int) -> tuple[TensorDataset, Tensor, Tensor]:
    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    train, test = order[:600], order[600:]
    given = labels[train].clone()
    redrawn = torch.rand(600, generator=generator) < 0.37  # one in ten of these is right by chance
    given[redrawn] = torch.randint(10, (int(redrawn.sum()),), generator=generator)
    return TensorDataset(images[train], given), images[test], labels[test]


def accuracy_of(callbacks: list[Callback], seed: int) -> float:
    train_set, images, labels = noisy_digits(seed)
    torch.manual_seed(seed)
    model = Classifier()
    trainer = Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(train_set, batch_size=32, shuffle=True))
    model.eval()
    with torch.inference_mode():
        return float((model(images).argmax(1) == labels).float().mean())


# %% [markdown]
# ## Alone, and together
#
# All runs of a seed share the data, the wrong labels, the initial weights and the batch order.


# %%
def elr() -> Callback:
    return ELRCallback(lam=7.0, beta=0.9)  # the loss: keeps predictions near what was learned early


def copies() -> Callback:
    return MultiSampleDropout("head.0", num_samples=8)  # a layer: eight masks for each sample


def average() -> Callback:
    return SoupAverager(method="ema", decay=0.99)  # the weights: a moving average, in the module at the end


ARMS = {
    "plain": list,
    "ELR": lambda: [elr()],
    "multi-sample dropout": lambda: [copies()],
    "average of weights": lambda: [average()],
    "all three": lambda: [elr(), copies(), average()],
}
results = {name: [accuracy_of(make(), seed) for seed in range(SEEDS)] for name, make in ARMS.items()}

# %%
table = Table("techniques", "test accuracy", "of each seed", title="Digits, 600 to train on, a third labelled wrongly")
for name, values in results.items():
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    each = ", ".join(f"{100 * value:.1f}" for value in values)
    table.add_row(name, f"{100 * statistics.mean(values):.1f} %{spread}", each)
console.print(table)

# %%
figure, axes = plt.subplots(figsize=(7, 2.8), dpi=90, layout="constrained")
for place, (name, values) in enumerate(reversed(results.items())):
    axes.barh(place, statistics.mean(values), color="#2a6fbb" if name == "all three" else "#9ab8d8", height=0.6)
    axes.plot(values, [place] * len(values), "k.", markersize=5)
axes.set_yticks(range(len(results)), list(reversed(results)))
axes.set(xlabel="test accuracy (bar: mean, points: seeds)", xlim=(0, 1))
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# What acts on the trouble itself, the wrong labels, does most of the work. The two others, which help little alone, add
# to it here. That is no law: add one technique at a time, and keep what your validation shows.

# %% [markdown]
# ## What cannot stand together
#
# ELR learns about single samples, and a mixed image has two owners. If every batch is mixed nothing is left to learn
# from, and the sentence says what to do about it.

# %%
try:
    accuracy_of([CutMix(prob=1.0), elr()], seed=0)
except Exception as error:  # noqa: BLE001 # it is shown
    refusal = str(error)
    console.print(refusal)
