"""Real digits inverted into a diffusion model, and edited by their prompts.

Run it with ``python examples/editing.py``; it takes half a minute and downloads nothing. It is a notebook too:
``examples/notebooks/editing.ipynb``. It needs diffusers: ``pip install -e '.[examples,diffusion]'``.
"""

# %% [markdown]
# # Real images, edited by their prompts
#
# To edit an image that a diffusion model has not drawn, one needs noise from which guided sampling gives that image
# again. Inversion alone finds it without guidance, and guidance then leads elsewhere. `null_text_invert` moves what
# stands for "no prompt", step by step, until guided sampling comes back to the image; weights and prompt stay, so that
# another prompt edits it. `prompt_to_prompt` keeps the layout by the source's maps of attention.

# %%
import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table

import lightning_reg
from lightning_reg import Denoiser, NullTextInversion
from lightning_reg.functional import null_text_invert, null_text_sample, prompt_to_prompt

SHORT = "LIGHTNING_REG_SHORT" in os.environ  # the tests run it in seconds
DIGITS, STEPS, UPDATES = (2, 3, 2) if SHORT else (8, 10, 10)
console = Console()

# %% [markdown]
# ## The model, and digits that it has never seen
#
# A `UNet2DConditionModel` of diffusers with a small CLIP text encoder, trained on 8 x 8 digits in minutes by
# `tests/diffusion/digits.py` of this repository.

# %%
sys.path.insert(0, str(Path(lightning_reg.__file__).resolve().parents[1]))  # the checkout that is installed
from tests.diffusion.digits import held_out, prompt, scheduler, word_model, words  # noqa: E402 # by the line above

network, text = word_model()
denoiser = Denoiser(network, scheduler("v_prediction"))
images, digits = (part[:DIGITS] for part in held_out())


def encoded(*prompts: str) -> torch.Tensor:
    with torch.no_grad():
        return text(words(*prompts)).last_hidden_state


own, none = encoded(*(prompt(n) for n in digits.tolist())), encoded("")

# %% [markdown]
# ## Inverted under guidance
#
# Without updates it is inversion alone. Ten steps need a larger rate of learning than the paper's 0.01 for fifty.

# %%
found = {}
summary = Table("guidance", "inversion alone", "null-text", title="mean squared error of the reconstruction")
for guidance in (3.0, 7.5):
    for name, updates in (("alone", 0), ("null-text", UPDATES)):
        found[name, guidance] = null_text_invert(denoiser, images, own, none, guidance, STEPS, updates, lr=0.15)
    errors = [(found[name, guidance].current - images).square().mean() for name in ("alone", "null-text")]
    summary.add_row(f"{guidance:g}", *(f"{error:.5f}" for error in errors))
console.print(summary)

# %%
rows = {"digits": images, "inversion alone": found["alone", 7.5].current, "null-text": found["null-text", 7.5].current}


def show(lines: dict[str, torch.Tensor]) -> None:
    figure, axes = plt.subplots(len(lines), DIGITS, figsize=(7.5, 1.05 * len(lines)), squeeze=False)
    for line, (name, samples) in enumerate(lines.items()):
        for column in range(DIGITS):
            axes[line, column].imshow(samples[column, 0].numpy(), cmap="gray_r", vmin=-1, vmax=1)
            axes[line, column].set(xticks=(), yticks=())
        axes[line, 0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    figure.tight_layout()
    plt.show()


show(rows)

# %% [markdown]
# ## Edited by another prompt
#
# The inversion is a file; sampling from it under another prompt is an edit. *Inverted* makes dark digits on light.

# %%
found["null-text", 3.0].save("digits.safetensors")
inversion = NullTextInversion.load("digits.safetensors")
style = encoded(*(prompt(n, inverted=True) for n in digits.tolist()))
others = encoded(*(prompt((n + 5) % 10) for n in digits.tolist()))
free = null_text_sample(denoiser, inversion, others)
kept = {share: prompt_to_prompt(denoiser, inversion, own, others, None, None, share, share) for share in (0.4, 1.0)}
edits = {
    "reconstruction": kept[1.0].source,
    "n + 5": free,
    "maps kept, 0.4": kept[0.4].samples,
    "maps kept, 1": kept[1.0].samples,
    "inverted": null_text_sample(denoiser, inversion, style),
}
show(edits)

# %% [markdown]
# How much an edit changes is what the share of the steps with the source's maps decides. With the same prompt the edit
# is the reconstruction, to the last bit.

# %%
same = prompt_to_prompt(denoiser, inversion, own, own.clone())
changes = Table("edit", "mean squared change")
for name, samples in {**edits, "same prompt": same.samples}.items():
    if name != "reconstruction":
        changes.add_row(name, f"{(samples - same.source).square().mean():.5f}")
console.print(changes)

# %% [markdown]
# Adaptive guidance skips passes of the null embedding and is refused on an inversion, whose null embedding moves.
