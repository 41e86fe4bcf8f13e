"""Find the wrong labels in a data set, first in one where they are known, then in the digits as they are.

Run it with ``python examples/find_wrong_labels.py``; it takes under a minute. It is a notebook too:
``examples/notebooks/find_wrong_labels.ipynb``.
"""

# %% [markdown]
# # Find the wrong labels in your data
#
# A network learns what most samples have in common before it learns single samples by heart. Early-learning
# regularization (ELR) keeps, for each sample, a moving average of what the network predicted, and keeps the network
# near it. At the end a sample whose average disagrees with its label is a suspect.
#
# It takes one line, `callbacks=[ELRCallback()]`, and an ordinary module.

# %%
import logging
import os
import warnings

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import ELRCallback

SHORT = "LIGHTNING_REG_SHORT" in os.environ  # the tests run it in seconds
console = Console()
torch.set_num_threads(1)  # the layers are too small to share among cores
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec)")

# %% [markdown]
# ## An ordinary classifier
#
# Nothing in it knows about the callback.


# %%
class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def train(images: Tensor, labels: Tensor, *callbacks: ELRCallback) -> Classifier:
    torch.manual_seed(0)
    model = Classifier()
    trainer = Trainer(
        max_epochs=8 if SHORT else 40,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True))
    return model


# %% [markdown]
# ## Where the wrong labels are known
#
# 1,797 small images of handwritten digits come with scikit-learn. One label in ten is drawn anew: nine in ten of these
# are wrong now, and which ones is known. Does the callback find them?

# %%
digits = load_digits()
images, true = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
generator = torch.Generator().manual_seed(0)
redrawn = torch.rand(len(true), generator=generator) < 0.1
given = true.clone()
given[redrawn] = torch.randint(10, (int(redrawn.sum()),), generator=generator)
wrong = given != true

elr = ELRCallback(lam=7.0, beta=0.9)
train(images, given, elr)
suspected = elr.suspected_label_errors()
hits = int((suspected & wrong).sum())
precision, recall = hits / max(int(suspected.sum()), 1), hits / int(wrong.sum())
console.print(f"{int(wrong.sum())} labels are wrong, {int(suspected.sum())} are suspected.")
console.print(f"Precision {precision:.0%}: so many of the suspects are wrong. Recall {recall:.0%}: so many are found.")

# %% [markdown]
# The report has the most certain first; `to_csv` writes it for whoever corrects the labels.

# %%
console.print(elr.label_errors())

# %% [markdown]
# ## What the eye says
#
# Each image with the label that it was given, and the one that the callback suggests.


# %%
def show(callback: ELRCallback, title: str, count: int = 16) -> None:
    """The most certain suspects, as pictures."""
    rows = list(callback.label_errors().rows())[:count]
    figure, axes = plt.subplots(2, count // 2, figsize=(8, 2.9), dpi=90, layout="constrained")
    for place in axes.flat:
        place.axis("off")
    for place, (index, label, suggested, confidence) in zip(axes.flat, rows, strict=False):
        place.imshow(images[index].reshape(8, 8).numpy(), cmap="gray_r")
        place.set_title(f"“{label}”\n{suggested}? {confidence:.0%}", fontsize=8)
    figure.suptitle(title, fontsize=10)


show(elr, "given label in quotation marks, suggested label, confidence")
plt.show()

# %% [markdown]
# ## The digits as they are
#
# Now with the labels that the data set comes with. Few are suspected, with less confidence than wrong ones were, and
# one sees why: these are digits on which people could disagree. In a data set of your own look at the most certain
# ones first.

# %%
as_they_are = ELRCallback(lam=7.0, beta=0.9)
train(images, true, as_they_are)
console.print(as_they_are.label_errors())
show(as_they_are, "the labels of the data set itself")
plt.show()

# %% [markdown]
# ## When not to
#
# If one class is often taken for another, always in the same direction, then the network learns the mistake as if it
# were a rule, early too. And a sample that is merely rare looks like a wrong one: look before you delete.
