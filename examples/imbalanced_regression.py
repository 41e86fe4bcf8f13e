"""Regression with rare targets: the error where there are many samples and where there are few, with and without ConR.

Run it with ``python examples/imbalanced_regression.py``; it takes about a minute. It is a notebook too:
``examples/notebooks/imbalanced_regression.ipynb``.
"""

# %% [markdown]
# # Regression with imbalanced targets
#
# Ages, prices, depths: most samples lie in one range, and the network is bad where there are few. `ConR` pulls the
# features of samples with similar targets together, and apart what the network takes for one another.
#
# Here digits are numbers from 0 to 9, and large ones are rare.

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

from lightning_reg import ConR

SHORT = "LIGHTNING_REG_SHORT" in os.environ  # the tests run it in seconds
SEEDS, EPOCHS = (1, 2) if SHORT else (3, 60)
COUNTS = [90, 90, 70, 50, 30, 20, 12, 8, 5, 5]  # training images of each digit
TESTS = 70  # of each
GROUPS = {"all": range(10), "many (0 to 3)": range(4), "some (4 to 6)": range(4, 7), "few (7 to 9)": range(7, 10)}
console = Console()
torch.set_num_threads(1)  # the layers are too small to share among cores
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec|number of training batches)")

# %% [markdown]
# ## Data and network
#
# ConR looks at two augmented views of each batch, so the module has a method that makes one. It must not change the
# target: a small shift and noise do not turn a 3 into a 4.


# %%
class Regressor(LightningModule):
    """An ordinary regression, and an augmentation."""

    def __init__(self) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()]
        self.body = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(512, 64), nn.ReLU())
        self.head = nn.Linear(64, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))[:, 0]

    def augment(self, images: Tensor) -> Tensor:
        down, right = torch.randint(-1, 2, (2,)).tolist()
        return images.roll((down, right), dims=(2, 3)) + 0.1 * torch.randn_like(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, targets = batch
        return F.l1_loss(self(images), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def rare_digits(seed: int) -> tuple[TensorDataset, Tensor, Tensor]:
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
    targets = torch.tensor(digits.target, dtype=torch.float32)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    images, targets = images[order], targets[order]
    places = [(targets == digit).nonzero()[:, 0] for digit in range(10)]
    train = torch.cat([place[TESTS : TESTS + count] for place, count in zip(places, COUNTS, strict=True)])
    test = torch.cat([place[:TESTS] for place in places])
    return TensorDataset(images[train], targets[train]), images[test], targets[test]


# %% [markdown]
# ## With and without
#
# `window` is how far apart two targets may be that count as similar, `beta` the weight of the term.


# %%
def errors_of(callbacks: list[Callback], seed: int) -> Tensor:
    """Mean absolute error of each digit ``(10,)``."""
    train_set, images, targets = rare_digits(seed)
    torch.manual_seed(seed)
    model = Regressor()
    trainer = Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(train_set, batch_size=64, shuffle=True))
    with torch.inference_mode():
        return (model(images) - targets).abs().reshape(10, TESTS).mean(1)


ARMS = {
    "L1 alone": list,
    "with ConR": lambda: [ConR("body", window=0.5, beta=0.2, eta=0.2, augment="augment")],
}
results = {name: torch.stack([errors_of(make(), seed) for seed in range(SEEDS)]) for name, make in ARMS.items()}

# %%
table = Table("mean absolute error", *results, "difference, each seed", title="digits as numbers, large ones rare")
for group, members in GROUPS.items():
    plain, conr = (errors[:, list(members)].mean(1) for errors in results.values())
    cells = [f"{statistics.mean(values.tolist()):.2f}" for values in (plain, conr)]
    table.add_row(group, *cells, ", ".join(f"{value:+.2f}" for value in (conr - plain).tolist()))
console.print(table)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3), dpi=90, layout="constrained")
left.bar(range(10), COUNTS, color="0.6")
left.set(xlabel="target", ylabel="training images")
for (name, errors), color, marker in zip(results.items(), ("#c44e52", "#2a6fbb"), ("o", "s"), strict=True):
    right.plot(range(10), errors.mean(0).tolist(), color=color, marker=marker, markersize=4, label=name)
right.set(xlabel="target", ylabel="mean absolute error")
right.legend(frameon=False)
for axes in (left, right):
    axes.set_xticks(range(10))
    axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## When not to
#
# Look at the differences of the seeds: on so little data the gain is about as large as what a seed changes, and if
# `beta` is large (1, say) it turns into harm (`benchmarks/results/effects_conr.md`). Tune `beta` first. Where
# targets are balanced there is nothing to repair, and where they are no quantities (class numbers) there is no
# distance to speak of.
