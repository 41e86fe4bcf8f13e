"""Guidance of a diffusion model: skipped where it says nothing new, forecast, and free of what is not wanted.

Run it with ``python examples/guidance.py``; it takes half a minute and downloads nothing. It is a notebook too:
``examples/notebooks/guidance.ipynb``. It needs diffusers: ``pip install -e '.[examples,diffusion]'``.
"""

# %% [markdown]
# # Guidance at fewer passes
#
# Classifier-free guidance asks the model twice in each step. Towards the end both answers point the same way:
# `AdaptiveGuidance` stops asking for the second one there, row by row. `LinearAG` forecasts every second unconditional
# answer from earlier ones. `DecorProjection` takes directions out of a prompt's embedding.

# %%
import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table

import lightning_reg
from lightning_reg import AdaptiveGuidance, DecorProjection, Denoiser, GuidancePolicy
from lightning_reg.functional import fit_linear_ag, guided_sample

SHORT = "LIGHTNING_REG_SHORT" in os.environ  # the tests run it in seconds
SAMPLES, STEPS = (4, 4) if SHORT else (20, 20)
SCALE = 3.0
console = Console()

# %% [markdown]
# ## The models
#
# Two small UNets of diffusers, trained on 8 x 8 digits in minutes by `tests/diffusion/digits.py` of this repository:
# one with labels, one with prompts in five styles through a small CLIP text encoder.

# %%
sys.path.insert(0, str(Path(lightning_reg.__file__).resolve().parents[1]))  # the checkout that is installed
from tests.diffusion.digits import NULL, class_model, scheduler, style_model, styled_words  # noqa: E402 # by the line above

denoiser, none = Denoiser(class_model(), scheduler()), torch.tensor([NULL])
generator = torch.Generator().manual_seed(0)
noise, labels = torch.randn(SAMPLES, 1, 8, 8, generator=generator), torch.arange(SAMPLES) % 10

# %% [markdown]
# ## Policies, at their price
#
# Distance: to the samples of full guidance from the same noise.

# %%
others = torch.randn(5 * SAMPLES, 1, 8, 8, generator=generator), torch.arange(5 * SAMPLES) % 10
policies = {
    "full guidance": (GuidancePolicy([SCALE] * STEPS), STEPS),
    "adaptive, 0.95": (AdaptiveGuidance(SCALE, 0.95), STEPS),
    "adaptive, 0.99": (AdaptiveGuidance(SCALE, 0.99), STEPS),
    "forecast": (fit_linear_ag(denoiser, *others, none, SCALE, steps=STEPS, guided_share=1.0), STEPS),
    "fewer steps": (GuidancePolicy([SCALE] * (3 * STEPS // 4)), 3 * STEPS // 4),
}
made = {name: guided_sample(denoiser, noise, labels, none, *policy) for name, policy in policies.items()}
summary = Table("policy", "passes for a sample", "mean squared distance")
for name, found in made.items():
    off = (found.samples - made["full guidance"].samples).square().mean()
    summary.add_row(name, f"{found.calls.double().mean():.1f}", f"{off:.5f}")
console.print(summary)

# %% [markdown]
# A forecast is nearly exact here. Skipping the second answer is not: on this small model both answers point apart until
# late, and fewer steps come nearer at the same price. Look at the curve of your own model before you skip.
#
# The similarity of both answers at each step says where the second one can go.

# %%
curves = made["full guidance"].similarity if SHORT else guided_sample(
    denoiser, noise, labels, none, AdaptiveGuidance(SCALE, 2.0), STEPS
).similarity  # fmt: skip
figure, axes = plt.subplots(figsize=(6, 3))
axes.plot(range(1, STEPS + 1), curves.T.numpy(), color="#1f4e8c", alpha=0.3)
axes.set(xlabel="step", ylabel="cosine of both predictions")
figure.tight_layout()
plt.show()

# %% [markdown]
# `lightning_reg.plots.guidance` makes such a picture too, with a threshold in it. In `trainer.validate` and in a fit,
# `GuidedSampling` draws samples under a policy, and logs the passes that they took.

# %% [markdown]
# ## A direction taken out of the prompt
#
# The model knows the word *inverted*. `DecorProjection` takes the directions of "a photo of digit inverted" out of
# prompts. `examples/projection.py` has more of it.

# %%
network, text = style_model()
with torch.no_grad():
    wanted = text(styled_words(*(f"a photo of d{n} inverted" for n in range(4)))).last_hidden_state
    unwanted = text(styled_words("a photo of digit inverted")).last_hidden_state
    nothing = text(styled_words("")).last_hidden_state
sampler = Denoiser(network, scheduler("v_prediction"))
rows = [wanted, DecorProjection(unwanted[0, 1:6], alpha=0.75)(wanted)]
pictures = [
    guided_sample(sampler, noise[:4], row, nothing, GuidancePolicy([2.0] * STEPS), STEPS).samples for row in rows
]
figure, axes = plt.subplots(2, 4, figsize=(6, 3.2))
for line, (name, row) in enumerate(zip(("as asked for", "projected"), pictures, strict=True)):
    for column in range(4):
        axes[line, column].imshow(row[column, 0].numpy(), cmap="gray_r")
        axes[line, column].set(xticks=(), yticks=())
    axes[line, 0].set_ylabel(name)
figure.tight_layout()
plt.show()
