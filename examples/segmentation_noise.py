"""Digits segmented from masks of which most are wrong: what ADELE makes of the masks.

Run it with ``python examples/segmentation_noise.py``; it takes a minute and downloads nothing. It is a notebook too:
``examples/notebooks/segmentation_noise.ipynb``. It needs scikit-learn: ``pip install -e '.[examples]'``.
"""

# %% [markdown]
# # Masks with errors
#
# A network learns first what most masks have in common, and their errors later. `ADELE` follows the IoU of each class
# between its predictions and the given masks, and when the curve of a class flattens it replaces labels by confident
# predictions. Here the true masks are known, so that one can see what it is worth.

# %%
import logging
import os
import warnings

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import ADELE
from lightning_reg.functional import iou_counts, iou_of_counts

SHORT = "LIGHTNING_REG_SHORT" in os.environ  # the tests run it in seconds
CANVASES, EPOCHS = (20, 6) if SHORT else (100, 20)
console = Console()
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec|number of training batches)")

# %% [markdown]
# ## Canvases with a digit, and wrong masks
#
# A digit is bright or dim, which is its class. 60 % of the masks are dilated by 2 pixels.

# %%
generator = torch.Generator().manual_seed(0)
digits = torch.tensor(load_digits().images / 16, dtype=torch.float32)
digits = digits[torch.randperm(len(digits), generator=generator)[:CANVASES]]
x, truth = torch.zeros(CANVASES, 1, 24, 24), torch.zeros(CANVASES, 24, 24, dtype=torch.long)
for canvas, mask, digit in zip(x, truth, digits, strict=True):
    down, right = torch.randint(2, 15, (2,), generator=generator).tolist()
    kind = int(torch.randint(2, (), generator=generator))
    canvas[0, down : down + 8, right : right + 8] = digit * (1.0, 0.5)[kind]
    mask[down : down + 8, right : right + 8] = (digit > 0.4) * (kind + 1)
x += 0.2 * torch.randn(x.shape, generator=generator)
wide = F.max_pool2d(truth[:, None].float(), 5, 1, 2)[:, 0].long()
given = torch.where((torch.rand(CANVASES, generator=generator) < 0.6)[:, None, None], wide, truth)

# %% [markdown]
# ## A module that knows nothing of it


# %%
class Segmenter(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()),
            *(nn.Conv2d(12, 12, 3, padding=2, dilation=2), nn.BatchNorm2d(12), nn.ReLU()),
            nn.Conv2d(12, 3, 3, padding=1),
        )

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        images, masks = batch
        return F.cross_entropy(self(images), masks)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 3e-3)


adele = ADELE(tau=0.8, scales=[1.0])
seed_everything(0, verbose=False)
trainer = Trainer(
    max_epochs=EPOCHS,
    callbacks=[adele],
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Segmenter(), DataLoader(TensorDataset(x, given), 10, shuffle=True))

# %% [markdown]
# ## The curves, and where they triggered

# %%
times, curves = adele.curves
figure, axes = plt.subplots(figsize=(5, 2.8))
for number, name in ((1, "bright"), (2, "dim")):
    (line,) = axes.plot(times, curves[:, number], label=name)
    if number in adele.triggered:
        axes.axvline(adele.triggered[number], color=line.get_color(), linestyle=":")
axes.set(xlabel="epoch", ylabel="training IoU")
axes.legend()
figure.tight_layout()
plt.show()

# %% [markdown]
# ## What was replaced
#
# Look at it before you train on it. Predictions are a mean of right and wrong masks: a network that saw mostly wide
# masks widens the right ones too.

# %%
corrected = torch.stack([adele.corrected_mask(index, mask) for index, mask in enumerate(given)])
errors = adele.mask_errors(given)
console.print(errors)
table = Table("masks", "background", "bright", "dim", title="IoU with the true masks")
for name, masks in (("given", given), ("corrected", corrected)):
    table.add_row(name, *(f"{value:.3f}" for value in iou_of_counts(iou_counts(masks, truth, 3)).tolist()))
console.print(table)

# %%
most = torch.stack([(before != after).sum() for before, after in zip(given, corrected, strict=True)]).argsort()[-6:]
figure, axes = plt.subplots(3, len(most), figsize=(6.5, 3.4))
for column, index in enumerate(most.tolist()):
    for line, picture in enumerate((x[index, 0], given[index], corrected[index])):
        axes[line, column].imshow(picture.numpy(), cmap="viridis" if line else "gray")
        axes[line, column].set(xticks=(), yticks=())
for line, name in enumerate(("image", "given", "corrected")):
    axes[line, 0].set_ylabel(name)
figure.tight_layout()
plt.show()

# %% [markdown]
# `errors.to_csv("replaced.csv")` keeps the list, and `lightning_reg.plots.corrected_masks` draws the replaced pixels
# too. With a loss that is written by hand (Dice) name the layer with the scores, `ADELE(layer="net.6")`.
