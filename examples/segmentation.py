"""Digits segmented by their names, with prototypes of images that a diffusion model has drawn.

Run it with ``python examples/segmentation.py``; it takes half a minute and downloads nothing. It is a notebook too:
``examples/notebooks/segmentation.ipynb``. It needs diffusers: ``pip install -e '.[examples,diffusion]'``.
"""

# %% [markdown]
# # Segmentation without a labelled image
#
# A text-to-image model draws images of each name. Where it has looked at the word while it drew says what of an image
# is the thing, and what the background. `PrototypeSegmenter` keeps means of features of both, and gives each place of a
# new image the name of the prototype that is nearest. Nothing is trained.

# %%
import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table
from torchmetrics import JaccardIndex

import lightning_reg
from lightning_reg import Denoiser, DenoiserFeatures, PrototypeSegmenter
from lightning_reg.functional import attention_masks, sample_support

SHORT = "LIGHTNING_REG_SHORT" in os.environ  # the tests run it in seconds
NAMES, DRAWN, STEPS, SCENES = (range(3), 2, 2, 2) if SHORT else (range(10), 8, 8, 20)
console = Console()

# %% [markdown]
# ## The model
#
# A `UNet2DConditionModel` of diffusers with a small CLIP text encoder, trained on 8 x 8 digits in minutes by
# `tests/diffusion/digits.py` of this repository.

# %%
sys.path.insert(0, str(Path(lightning_reg.__file__).resolve().parents[1]))  # the checkout that is installed
from tests.diffusion.digits import held_out, prompt, scheduler, word_model, words  # noqa: E402 # by the line above

network, text = word_model()
denoiser = Denoiser(network, scheduler("v_prediction"))


def encoded(*prompts: str) -> torch.Tensor:
    with torch.no_grad():
        return text(words(*prompts)).last_hidden_state


# %% [markdown]
# ## Images of each name, and where the model looked at the word
#
# The digit's word is the fifth token of "a photo of d3", after the one that starts a text.

# %%
is_word = torch.tensor([[False] * 4 + [True] + [False] * 3])
generator = torch.Generator().manual_seed(0)
support = {
    f"d{n}": sample_support(
        denoiser, torch.randn(DRAWN, 1, 8, 8, generator=generator), encoded(prompt(n)), encoded(""), is_word, 2.0, STEPS
    )
    for n in NAMES
}
by_attention = {name: attention_masks(one.maps) for name, one in support.items()}

count = min(len(support), 6)
figure, axes = plt.subplots(3, count, figsize=(6.5, 3.4))
for column, (name, one) in enumerate(list(support.items())[:count]):
    for line, picture in enumerate((one.images[0, 0], one.maps[0], by_attention[name].foreground[0])):
        axes[line, column].imshow(picture.numpy(), cmap="gray_r")
        axes[line, column].set(xticks=(), yticks=())
    axes[0, column].set_title(name, fontsize=9)
for line, name in enumerate(("drawn", "attention", "mask")):
    axes[line, 0].set_ylabel(name)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Prototypes, by two kinds of masks
#
# This small model looks at its word all over the image, so that masks of attention are rough. On digits the pixels
# themselves give better ones; for photographs that is a foreground segmenter's work.

# %%
features = DenoiserFeatures(denoiser, ["down_blocks.[01]", "mid_block", "up_blocks.[01]"], 100, encoded(""))
images = {name: one.images for name, one in support.items()}
masks = {
    "attention": (
        {name: one.foreground for name, one in by_attention.items()},
        {name: one.background for name, one in by_attention.items()},
    ),
    "pixels": ({n: x[:, 0] > 0 for n, x in images.items()}, {n: x[:, 0] < -0.4 for n, x in images.items()}),
}
segmenters = {}
for name, (foreground, background) in masks.items():
    segmenters[name] = PrototypeSegmenter([features], parts=2 if SHORT else 8)
    segmenters[name].fit(images, foreground, background)

# %% [markdown]
# ## Scenes of two digits
#
# Held-out digits in opposite corners of 16 x 16 places. Which names occur in a scene is known (`present`), as from a
# caption.

# %%
x, y = held_out()
chosen = torch.isin(y, torch.tensor(list(NAMES)))
x, y = x[chosen], y[chosen]
scenes, truth = torch.full((SCENES, 1, 16, 16), -1.0), torch.zeros(SCENES, 16, 16, dtype=torch.long)
present = torch.zeros(SCENES, len(NAMES), dtype=torch.bool)
for scene in range(SCENES):
    for row, corner in zip(torch.randperm(len(x), generator=generator)[:2].tolist(), (0, 8), strict=True):
        place = (scene, slice(corner, corner + 8), slice(corner, corner + 8))
        scenes[scene, 0, place[1], place[2]] = x[row, 0]
        truth[place] = torch.where(x[row, 0] > 0, y[row] + 1, 0)
        present[scene, y[row]] = True

predicted = {}
summary = Table("masks", "mean intersection over union", title=f"{SCENES} scenes")
for name, segmenter in segmenters.items():
    with torch.no_grad():
        predicted[name] = segmenter.predict(scenes, present)
    index = JaccardIndex("multiclass", num_classes=len(NAMES) + 1)
    index.update(predicted[name], truth)
    summary.add_row(name, f"{index.compute():.3f}")
console.print(summary)

# %%
count = min(SCENES, 6)
rows = {"scene": scenes[:, 0], "truth": truth, "by attention": predicted["attention"], "by pixels": predicted["pixels"]}
figure, axes = plt.subplots(4, count, figsize=(6.5, 4.6))
for line, (name, pictures) in enumerate(rows.items()):
    for column in range(count):
        options = {"cmap": "gray_r"} if line == 0 else {"cmap": "tab20", "vmin": 0, "vmax": 19, "interpolation": "none"}
        axes[line, column].imshow(pictures[column].numpy(), **options)
        axes[line, column].set(xticks=(), yticks=())
    axes[line, 0].set_ylabel(name)
figure.tight_layout()
plt.show()

# %% [markdown]
# In `validation_step` it is a network like another: `self.index.update(self.segmenter.predict(images, present), truth)`
# and `self.log("mIoU", self.index)`. Its prototypes are in the `state_dict`.
