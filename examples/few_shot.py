"""Tune a small CLIP on eight images a class in eight ways: what becomes of it on these, and on the others.

Run it with ``python examples/few_shot.py`` in a checkout, whose tests hold the CLIP; it takes about two minutes on one
quiet core. It is a notebook too: ``examples/notebooks/few_shot.ipynb``.
"""

# %% [markdown]
# # Few-shot tuning of a CLIP
#
# A CLIP tells images apart by the names of their classes, also of classes that nobody tuned it on. Tuning it on a few
# images of some classes makes it worse on the others, and where they are very few on these too. Each way below is one
# callback; the module stays what it is. The CLIP is small: it knows 8 x 8 digits and their names. Its new images are
# of another domain, their pixels mixed by a fixed matrix, and eight of each of the digits 0 to 4 are there to tune on.

# %%
import logging
import os
import sys
import warnings
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_reg
from lightning_reg import (
    CoreTuning,
    DRTune,
    FrozenTwinAgreement,
    L2ToStart,
    LocalMeanTeacher,
    SyntheticUnknowns,
    WiSEFT,
)

sys.path.insert(0, str(Path(lightning_reg.__file__).resolve().parents[1]))  # the checkout that is installed
from tests.finetuning import digit_clip  # the CLIP that the tests keep

SHORT = "LIGHTNING_REG_SHORT" in os.environ  # the tests run it in seconds
SEEDS, EPOCHS = ([0], 2) if SHORT else ([0, 1, 2], 24)
console = Console()
torch.set_num_threads(1)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
logging.getLogger("lightning_reg").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec|treespec)")

# %% [markdown]
# ## Names as a head
#
# As is usual where a CLIP's image tower is tuned, the features of the known names become the rows of a linear layer,
# which is tuned too. The unknown classes keep theirs as they are.

# %%
clip = digit_clip.hugging_face().eval()
with torch.no_grad():
    texts = digit_clip.tokens(*(digit_clip.TEMPLATES[0].format(name) for name in digit_clip.DIGITS))
    images, labels = digit_clip.unseen()
    names, scale = clip(input_ids=texts, pixel_values=images[:1]).text_embeds, clip.logit_scale.exp().item()
images = digit_clip.shifted(images)
test_images, test_labels = images[200:], labels[200:]


class Features(nn.Module):
    """The image tower, up to features of length 1."""

    def __init__(self) -> None:
        super().__init__()
        whole = digit_clip.hugging_face()
        self.tower, self.projection = whole.vision_model, whole.visual_projection

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.projection(self.tower(pixel_values=x).pooler_output), dim=1)


class Tuned(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.features = Features()
        self.head = nn.Linear(names.shape[1], 5, bias=False)
        self.head.weight.data.copy_(names[:5])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(scale * self.head(self.features(x)), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.003, momentum=0.9)


@torch.no_grad()
def accuracies(model: Tuned) -> dict[str, float]:
    """Of the digits 0 to 4 among each other, by the head; and of 5 to 9, by their names."""
    features, known = model.features(test_images), test_labels < 5
    right = (model.head(features).argmax(1) == test_labels, (features @ names[5:].T).argmax(1) + 5 == test_labels)
    return {"known": right[0][known].float().mean().item(), "unknown": right[1][~known].float().mean().item()}


# %% [markdown]
# ## Eight ways
#
# `L2ToStart` pulls weights back to where they began, `FrozenTwinAgreement` holds features to those of the first
# weights, `CoreTuning` contrasts hard pairs that it mixes, `DRTune` lets the head also classify what the encoder made
# of images before, `SyntheticUnknowns` makes up features of the classes that are known by name alone,
# `LocalMeanTeacher` holds features to those of a mean of snapshots, and `WiSEFT` ends halfway between the first and
# the tuned weights.

# %%
WAYS = {
    "plain": None,
    "L2ToStart": partial(L2ToStart, weight=0.1),
    "FrozenTwinAgreement (PromptSRC)": partial(FrozenTwinAgreement, {"features": 10.0}, logit_weight=1.0),
    "CoreTuning": partial(CoreTuning, "features", "head"),
    "DRTune": partial(DRTune, "features", "head", bank_size=40),
    "SyntheticUnknowns (OGEN)": partial(
        SyntheticUnknowns, "features", known="head.weight", unknown=names[5:], scale=scale
    ),
    "LocalMeanTeacher (OGEN)": partial(LocalMeanTeacher, "features", weight=30.0),
    "WiSEFT, alpha 0.5": partial(WiSEFT, 0.5),
}


def tuned(make: partial | None, seed: int) -> tuple[Tuned, list]:
    seed_everything(seed, verbose=False)
    few = digit_clip.few_shots(labels[:200], 8, range(5), seed)
    loader = DataLoader(TensorDataset(images[few], labels[few]), 8, shuffle=True)
    model, callbacks = Tuned(), [] if make is None else [make()]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=EPOCHS, accelerator="cpu", callbacks=callbacks, enable_model_summary=False, **quiet)
    trainer.fit(model, loader)
    return model, callbacks


results: dict[str, list[dict[str, float]]] = {"first weights": [accuracies(Tuned())] * len(SEEDS)}
curves = []
for way, make in WAYS.items():
    for seed in SEEDS:
        model, callbacks = tuned(make, seed)
        results.setdefault(way, []).append(accuracies(model))
        if way.startswith("WiSEFT"):
            curves.append(callbacks[0].curve(model, partial(accuracies, model)))

# %%
table = Table("way", "known", "unknown", "each seed, unknown", title=f"Accuracy in another domain, {len(SEEDS)} seeds")
for way, rows in results.items():
    means = (sum(row[key] for row in rows) / len(rows) for key in ("known", "unknown"))
    table.add_row(
        way, *(f"{100 * mean:.1f}" for mean in means), " ".join(f"{100 * row['unknown']:.1f}" for row in rows)
    )
console.print(table)

# %% [markdown]
# Compare each way with the first weights and with plain tuning: some keep less than plain tuning at these settings, and
# three seeds of one small model say little of others.

# %% [markdown]
# ## Known against unknown
#
# The line is `WiSEFT.curve`, of the fits above and without training again: each mix of the first and the tuned weights
# is put into the module and scored, and the module's own weights are put back. What lies above the line is worth more
# than a mix of plain tuning with none.

# %%
figure, axes = plt.subplots(figsize=(6, 4), dpi=90, layout="constrained")
mean = {key: torch.tensor([curve[key] for curve in curves]).mean(0) * 100 for key in curves[0]}
axes.plot(mean["known"], mean["unknown"], marker=".", color="0.5", label="mixes, alpha 0 to 1")
for (way, rows), marker in zip(results.items(), "osD^vP*X<", strict=True):
    known, unknown = (100 * sum(row[key] for row in rows) / len(rows) for key in ("known", "unknown"))
    axes.plot(known, unknown, marker, markersize=8, label=way)
axes.set(xlabel="accuracy on the digits tuned on (%)", ylabel="accuracy on the others (%)")
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False, fontsize=8)
plt.show()
