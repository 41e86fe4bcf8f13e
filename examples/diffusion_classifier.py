"""A diffusion model as a classifier, on digits.

Run it with ``python examples/diffusion_classifier.py``; it takes half a minute and downloads nothing. It is a notebook
too: ``examples/notebooks/diffusion_classifier.ipynb``. It needs diffusers: ``pip install -e '.[examples,diffusion]'``.
"""

# %% [markdown]
# # A diffusion model as a classifier
#
# A model that denoises images under a condition says, without any further training, which condition fits an image best:
# the one under which the noise is predicted best. `DiffusionClassifier` adds noise to an image, the same for all
# classes, and compares the errors; classes that are clearly worse drop out early.

# %%
import os
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table

import lightning_reg
from lightning_reg import Denoiser, DiffusionClassifier
from lightning_reg.functional import classify_images

SHORT = "LIGHTNING_REG_SHORT" in os.environ  # the tests run it in seconds
IMAGES, TIMES = (8, (2, 4)) if SHORT else (60, (5, 20))
console = Console()

# %% [markdown]
# ## The model
#
# A `UNet2DModel` of diffusers with 0.7 million parameters, trained on 8 x 8 digits in two minutes by
# `tests/diffusion/digits.py` of this repository. Nothing below is special to it: `Denoiser` takes any UNet or
# transformer of diffusers with its scheduler, and any function of `(x, t, condition)`.

# %%
sys.path.insert(0, str(Path(lightning_reg.__file__).resolve().parents[1]))  # the checkout that is installed
from tests.diffusion.digits import class_model, held_out, scheduler  # noqa: E402 # found by the line above

denoiser = Denoiser(class_model(), scheduler())
images, labels = (part[:IMAGES] for part in held_out())

# %% [markdown]
# ## Classes by their errors
#
# In the first stage all ten classes are compared at a few times; the best three go on to the second.

# %%
summary = Table("times", "kept", "right", "passes for an image", "seconds", title=f"{IMAGES} digits not trained on")
for times, keep in (((TIMES[0],), (1,)), ((TIMES[1],), (1,)), (TIMES, (3, 1))):
    classifier = DiffusionClassifier(denoiser, torch.arange(10), n_samples=times, keep=keep)
    started = time.perf_counter()
    found = classify_images(classifier, images, torch.arange(IMAGES))
    seconds = time.perf_counter() - started
    right = float((found.labels == labels).float().mean())
    summary.add_row(str(list(times)), str(list(keep)), f"{right:.3f}", str(classifier.calls()), f"{seconds:.1f}")
console.print(summary)

# %% [markdown]
# ## What it is sure of
#
# Its logits are minus the mean errors; their softmax is the posterior under equal shares of all classes.

# %%
posterior = classifier(images).softmax(1)
figure, axes = plt.subplots(2, 6, figsize=(7.5, 3.4), gridspec_kw={"height_ratios": [1, 1]})
for column in range(6):
    axes[0, column].imshow(images[column, 0].numpy(), cmap="gray_r")
    axes[0, column].set_title(f"digit {int(labels[column])}", fontsize=9)
    axes[0, column].axis("off")
    axes[1, column].bar(range(10), posterior[column].detach().numpy(), color="#1f4e8c")
    axes[1, column].set(ylim=(0, 1), xticks=(0, 3, 6, 9), yticks=() if column else (0, 0.5, 1))
axes[1, 0].set_ylabel("posterior")
figure.tight_layout()
plt.show()

# %% [markdown]
# In validation the same is one callback, `DiffusionClassifierEval(classes=10, denoiser="unet")`: it logs how often the
# model in training is right, which tells whether it heeds its condition.
