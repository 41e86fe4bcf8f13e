"""Learn ten digits in five tasks, without keeping old samples: what is forgotten, and what helps.

Run it with ``python examples/continual_learning.py``; it takes about a minute. It is a notebook too:
``examples/notebooks/continual_learning.ipynb``.
"""

# %% [markdown]
# # Five tasks, one after the other
#
# First the digits 0 and 1, then 2 and 3, and so on; of earlier tasks no sample is kept, and at the end the network is
# to tell all ten apart. An ordinary network forgets: it puts out the classes that it saw last.
#
# `PredictionDistillation` keeps what the network of the task before said about the old classes; `EWC` holds weights in
# place that mattered for them. **The same objects stand in one `fit` after the other**: they carry what they know.

# %%
import logging
import os
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

from lightning_reg import EWC, ContinualMetrics, PredictionDistillation

SHORT = "LIGHTNING_REG_SHORT" in os.environ  # the tests run it in seconds
EPOCHS = 1 if SHORT else 10
TASKS = [2, 2, 2, 2, 2]  # classes that each task adds
console = Console()
torch.set_num_threads(1)  # the layers are too small to share among cores
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec)")

# %% [markdown]
# ## Network and tasks


# %%
class Classifier(LightningModule):
    """An ordinary classifier with one head for all ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU())
        self.head = nn.Linear(100, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


digits = load_digits()
images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
is_test = torch.rand(len(labels), generator=torch.Generator().manual_seed(0)) < 1 / 3
task_of = labels // 2

# %% [markdown]
# ## One fit per task
#
# After each task the network is tested on all classes so far. `ContinualMetrics` counts; the matrix has the accuracy on
# each earlier task after each task.


# %%
def learn(callbacks: list[Callback]) -> tuple[Tensor, dict[str, Tensor]]:
    """Accuracy on each task (column) after each task (row), and the summary."""
    torch.manual_seed(0)
    model, metrics = Classifier(), ContinualMetrics(TASKS)
    matrix = torch.full((len(TASKS), len(TASKS)), torch.nan)
    for task in range(len(TASKS)):
        now = ~is_test & (task_of == task)
        trainer = Trainer(
            max_epochs=EPOCHS,
            accelerator="cpu",
            callbacks=callbacks,  # the same objects each time
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, DataLoader(TensorDataset(images[now], labels[now]), batch_size=32, shuffle=True))
        with torch.no_grad():
            for earlier in range(task + 1):
                tested = is_test & (task_of == earlier)
                logits = model(images[tested])
                metrics.update(logits, labels[tested], after_task=task + 1)
                right = logits[:, : 2 * task + 2].argmax(1) == labels[tested]
                matrix[task, earlier] = right.float().mean()
    return matrix, metrics.compute()


ARMS = {
    "nothing": list,
    "PredictionDistillation": lambda: [PredictionDistillation(new_classes=TASKS)],
    "and EWC": lambda: [PredictionDistillation(new_classes=TASKS), EWC(100.0, exclude=["head.*"])],
}
results = {name: learn(make()) for name, make in ARMS.items()}

# %%
table = Table("callbacks", "accuracy, all ten classes", "forgetting", title="after five tasks")
for name, (_, summary) in results.items():
    table.add_row(name, f"{100 * summary['accuracy']:.1f} %", f"{summary['forgetting']:.3f}")
console.print(table)

# %% [markdown]
# Forgetting is the mean loss of accuracy on what was known; 0 forgets nothing.

# %%
figure, axes = plt.subplots(1, len(results), figsize=(9, 3.2), dpi=90, layout="constrained", sharey=True)
for place, (name, (matrix, _)) in zip(axes, results.items(), strict=True):
    shown = place.imshow(matrix.numpy(), cmap="viridis", vmin=0, vmax=1)
    for row, values in enumerate(matrix.tolist()):
        for column, value in enumerate(values[: row + 1]):
            color = "white" if value < 0.6 else "black"
            place.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=color, fontsize=8)
    place.set(title=name, xlabel="tested on task")
    place.set_xticks(range(5), range(1, 6))
    place.set_yticks(range(5), range(1, 6))
axes[0].set_ylabel("after task")
figure.colorbar(shown, ax=axes, label="accuracy", shrink=0.8)
plt.show()

# %% [markdown]
# ## When not to
#
# If old samples may be kept, keep some: rehearsal is stronger than anything here. EWC forgets less and learns less;
# on small networks trained from scratch it is no gain beside the distillation
# (`benchmarks/results/effects_rehearsal_free_cl.md`).
