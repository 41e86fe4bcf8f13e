"""Words taken out of prompts: which vectors of an embedding carry what, and samples without it.

Run it with ``python examples/projection.py``; it takes half a minute and downloads nothing. It is a notebook too:
``examples/notebooks/projection.ipynb``. It needs diffusers: ``pip install -e '.[examples,diffusion]'``.
"""

# %% [markdown]
# # Directions taken out of a prompt
#
# `DecorProjection` removes from the token vectors of a prompt what lies in the span of an undesired prompt's vectors.
# It costs one small matrix product for each prompt, and nothing in the steps of the sampler.

# %%
import logging
import os
import sys
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

import lightning_reg
from lightning_reg import AdaptiveGuidance, DecorProjection, DecorSampling, Denoiser, GuidedPredict
from lightning_reg.functional import embedding_components, token_rows, undesired_rows

warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec|treespec)")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
SHORT = "LIGHTNING_REG_SHORT" in os.environ  # the tests run it in seconds
SAMPLES, STEPS = (2, 2) if SHORT else (20, 10)
console = Console()

# %% [markdown]
# ## The model
#
# A `UNet2DConditionModel` of diffusers with a small CLIP text encoder, trained on 8 x 8 digits in minutes by
# `tests/diffusion/digits.py` of this repository. It knows prompts such as "a photo of d3 inverted", each with one of
# five styles at its end; one of them is "plain".

# %%
sys.path.insert(0, str(Path(lightning_reg.__file__).resolve().parents[1]))  # the checkout that is installed
from tests.diffusion.digits import scheduler, style_model, styled_words, training_digits  # noqa: E402 # by this line

network, text = style_model()
denoiser = Denoiser(network, scheduler("v_prediction"))
wanted, reference = "a photo of d3 inverted", "a photo of digit inverted"


def encoded(*prompts: str) -> torch.Tensor:
    with torch.no_grad():
        return text(styled_words(*prompts)).last_hidden_state


# %% [markdown]
# ## What the axes of an embedding carry
#
# The embedding's own singular vectors, strongest first: how much of the energy of the words' rows, and of the rows of
# the padding behind them, lies on each.

# %%
kinds = token_rows(styled_words(wanted), end=0, start=1)
axes_of = embedding_components(encoded(wanted)[0], kinds["words"][0])
figure, axes = plt.subplots(figsize=(6, 2.6))
for shift, name, shares in ((-0.2, "words", axes_of.words), (0.2, "end and padding", axes_of.padding)):
    axes.bar([n + shift for n in range(len(shares))], shares.tolist(), 0.4, label=name)
axes.set(xlabel="axis", ylabel="share of energy")
axes.legend()
figure.tight_layout()
plt.show()

# %% [markdown]
# ## What is left of a prompt
#
# Undesired are rows of "a photo of digit inverted": of its words, of the end and the padding behind them, into which a
# causal encoder copies what the words mean, or of all.

# %%
ids = styled_words(reference)
choices = {"words": ["words"], "end and padding": ["end", "padding"], "all": ["words", "end", "padding"]}
noise = torch.randn(SAMPLES, 1, 8, 8, generator=torch.Generator().manual_seed(0))
images, digits = training_digits()
means = torch.stack([images[digits == n].mean(0) for n in range(10)])
made = {}
summary = Table("rows", "strength", "left of the prompt", "dark on light", "a 3", title=f"{SAMPLES} samples")
for name, alpha in (("words", 0.0), *((kind, alpha) for kind in choices for alpha in (0.5, 0.75, 1.0))):
    undesired = undesired_rows(encoded(reference), ids, 0, 1, choices[name])
    changed = DecorProjection(undesired, alpha)(encoded(wanted))
    with torch.no_grad():
        samples = made[name, alpha] = denoiser.sample(noise, changed, encoded(""), 2.0, STEPS)
    dark = samples[:, 0, :, [0, 7]].mean((1, 2)) > 0
    upright = torch.where(dark[:, None, None, None], -samples, samples)
    nearest = (upright[:, None] - means).flatten(2).square().sum(2).argmin(1)
    left = float(changed.norm() / encoded(wanted).norm())
    row = (f"{left:.2f}", f"{dark.double().mean():.2f}", f"{(nearest == 3).double().mean():.2f}")
    summary.add_row(name if alpha else "nothing removed", f"{alpha:g}", *row)
console.print(summary)

# %%
lines = [("words", 0.0), ("words", 0.75), ("end and padding", 0.75), ("all", 0.75)]
count = min(SAMPLES, 8)
figure, axes = plt.subplots(len(lines), count, figsize=(7, 3.8))
for line, (name, alpha) in enumerate(lines):
    for column in range(count):
        axes[line, column].imshow(made[name, alpha][column, 0].numpy(), cmap="gray_r")
        axes[line, column].set(xticks=(), yticks=())
    label = f"{name}, {alpha:g}" if alpha else "as asked for"
    axes[line, 0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
figure.tight_layout()
plt.show()

# %% [markdown]
# The style goes with the rows of the words, all at once above some strength, and most digits stay. The rows behind the
# words alone do nothing. In a model where "plain" has no word, so that plain is what is drawn where no style is named,
# the style stayed (`benchmarks/effects/decor.py`). Try it on the model that you have.
#
# ## In a Trainer
#
# `DecorSampling` does it to what the module's own encoder gives, in validation, test and prediction, and leaves the
# null prompt alone. Below adaptive guidance samples over the projected condition in `trainer.predict`.


# %%
class Drawing(GuidedPredict, LightningModule):
    sampling_steps = STEPS

    def __init__(self):
        super().__init__()
        self.unet, self.text, self.unwanted = network, text, ids

    def encode_prompt(self, numbers):
        return self.text(numbers).last_hidden_state

    def condition_of(self, batch):
        return self.encode_prompt(batch)

    def null_condition(self):
        return self.encode_prompt(styled_words(""))

    def guided_denoiser(self):
        return Denoiser(self.unet, scheduler("v_prediction"))

    def guidance(self):
        return AdaptiveGuidance(2.0, threshold=0.95)

    def sample_shape(self):
        return (1, 8, 8)


clean = DecorSampling("unwanted", alpha=0.75, end=0, start=1)
trainer = Trainer(callbacks=[clean], accelerator="cpu", logger=False, enable_progress_bar=False)
prompts = styled_words(*(f"a photo of d{n % 10} inverted" for n in range(count)))
(found,) = trainer.predict(Drawing(), DataLoader(prompts, batch_size=count))
console.print(f"{found.calls.double().mean():.1f} passes for a sample, of {2 * STEPS} with full guidance")
figure, axes = plt.subplots(1, count, figsize=(7, 1.2))
for column in range(count):
    axes[column].imshow(found.samples[column, 0].numpy(), cmap="gray_r")
    axes[column].set(xticks=(), yticks=())
figure.tight_layout()
plt.show()
