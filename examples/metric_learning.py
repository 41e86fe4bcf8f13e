"""Metric learning on digits with TCM and OPIS: one threshold for all classes.

Run it with ``python examples/metric_learning.py``; it takes about a minute and downloads nothing. It is a notebook too:
``examples/notebooks/metric_learning.ipynb``.
"""

# %% [markdown]
# # Metric learning on digits: one threshold for all classes
#
# A verification system accepts a pair of images if their embeddings are near enough, by one threshold for all classes,
# also for those that training has not seen. A metric loss orders pairs; it does not see to it that the same threshold
# fits every class. `TCM` adds two absolute margins on top of any metric loss, and `OPIS` measures what is left: how far
# the classes are apart in what one threshold does to them.

# %%
import logging
import os
import warnings
from typing import Any

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import OPIS, TCM
from lightning_reg.functional import opis, supervised_contrastive_loss

SHORT = "LIGHTNING_REG_SHORT" in os.environ  # the tests run it in seconds
SEEDS, STEPS = (1, 10) if SHORT else (3, 250)
console = Console()
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec|number of training batches)")

# %% [markdown]
# ## The module
#
# It knows nothing of thresholds: a perceptron whose output is the embedding, and the supervised contrastive loss.


# %%
class Embedder(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
        self.opis = OPIS()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return supervised_contrastive_loss(self.embed(x), y, temperature=0.1)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.opis.update(self.embed(x), y)

    def on_test_epoch_end(self) -> None:
        self.log_dict(self.opis.compute())
        self.opis.reset()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-3)


# %% [markdown]
# ## The data
#
# Training sees the digits 0 to 5, in batches with as many images of each. The digits 6 to 9 are for the test: classes
# that the network has never seen.

# %%
SEEN, EACH = 6, 16


def digits() -> tuple[TensorDataset, TensorDataset]:
    found = load_digits()
    x, y = torch.tensor(found.data / 16, dtype=torch.float32), torch.tensor(found.target)
    return TensorDataset(x[y < SEEN], y[y < SEEN]), TensorDataset(x[y >= SEEN], y[y >= SEEN])


def balanced(y: Tensor, steps: int) -> list[list[int]]:
    """Positions of the images of each batch."""
    generator = torch.Generator().manual_seed(0)
    places = [(y == digit).nonzero()[:, 0] for digit in range(SEEN)]
    return [
        torch.cat([place[torch.randperm(len(place), generator=generator)[:EACH]] for place in places]).tolist()
        for _ in range(steps)
    ]


# %% [markdown]
# ## Training, without TCM and with it
#
# One callback is the whole difference: `TCM("embed")`, with the name of the layer whose output is compared. The class
# numbers come from the batch (`label_key`, here its second entry).


# %%
def train(callbacks: list[Callback], steps: int, seed: int) -> tuple[Embedder, dict[str, float]]:
    seen, unseen = digits()
    seed_everything(seed, verbose=False)
    model = Embedder()
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", callbacks=callbacks, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(seen, batch_sampler=balanced(seen.tensors[1], steps)))
    (scores,) = trainer.test(model, DataLoader(unseen, 256), verbose=False)
    return model, scores


# %% [markdown]
# Three seeds, because OPIS varies by a quarter of itself and more between them. On data as small as this it is no
# surprise if the difference is smaller than that; look at the seeds, not at one number.

# %%
kinds: dict[str, list[Any]] = {"contrastive": [], "with TCM": [TCM("embed")]}
results: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
models: dict[str, Embedder] = {}
for seed in range(SEEDS):
    for name, callbacks in kinds.items():
        models[name], scores = train(callbacks, STEPS, seed)
        results[name].append(scores)

summary = Table("loss", "OPIS / 1000, by seed", "recall at 1", title="digits that training has not seen")
for name, found in results.items():
    by_seed = ", ".join(f"{1000 * scores['opis']:.1f}" for scores in found)
    recall = sum(scores["recall_at_1"] for scores in found) / len(found)
    summary.add_row(name, by_seed, f"{recall:.3f}")
console.print(summary)

# %% [markdown]
# ## What one threshold does to each class
#
# For each unseen digit: the share of its own pairs that are accepted (sensitivity) and the share of its pairs with
# others that are rejected (specificity), at one threshold that accepts 5 % of all pairs of two classes.


# %%
def shares(model: Embedder, accepts: float = 0.05) -> dict[int, tuple[float, float]]:
    """Sensitivity and specificity of each digit."""
    x, y = digits()[1].tensors
    with torch.no_grad():
        z = nn.functional.normalize(model.embed(x))
    cosines, same = z @ z.T, y[:, None] == y
    threshold = cosines[~same].quantile(1 - accepts)
    accepted = (cosines >= threshold) & ~torch.eye(len(z), dtype=torch.bool)
    found = {}
    for digit in y.unique().tolist():
        own, size = y == digit, int((y == digit).sum())
        sensitivity = accepted[own][:, own].sum() / (size * (size - 1))
        found[digit] = sensitivity.item(), 1 - accepted[own][:, ~own].float().mean().item()
    return found


def table(models: dict[str, Embedder]) -> Table:
    rows = Table("digit", *(f"{name}: {share}" for name in models for share in ("sensitivity", "specificity")))
    all_shares = {name: shares(model) for name, model in models.items()}
    for digit in next(iter(all_shares.values())):
        rows.add_row(str(digit), *(f"{share:.3f}" for found in all_shares.values() for share in found[digit]))
    return rows


console.print(table(models))


# %% [markdown]
# ## The curves
#
# The utility of a class at a threshold is the harmonic mean of its sensitivity and specificity. OPIS is the mean square
# of these curves about their mean: where they lie on one another, one threshold fits all classes.


# %%
def plot(models: dict[str, Embedder]) -> None:
    x, y = digits()[1].tensors
    figure = plt.figure(figsize=(8, 3.4), layout="constrained")
    for axes, (name, model) in zip(figure.subplots(1, len(models), sharey=True), models.items(), strict=True):
        with torch.no_grad():
            found = opis(model.embed(x), y)
        for digit, curve in zip(found.classes.tolist(), found.utilities, strict=True):
            axes.plot(found.thresholds, curve, label=str(digit))
        axes.set(xlabel="threshold on the distance", title=f"{name}: OPIS {1000 * found.opis:.1f} / 1000")
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, title="digit")
    figure.axes[0].set_ylabel("utility of a class")


plot(models)
plt.savefig("metric_learning.png", dpi=150)
plt.show()
