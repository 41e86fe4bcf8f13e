"""A style taken out of prompts: which rows of the undesired prompt carry it, and what goes with it?

A UNet2DConditionModel of 1.0 million parameters and a CLIPTextModel of two layers (``tests/diffusion/digits.py``),
trained on prompts such as "a photo of d3 inverted", in which digits are dark on light. Samples of "a photo of d3
inverted" from the embedding without the directions of rows of "a photo of digit inverted"; guidance 2, 10 steps, 40
samples for each seed. Shares in %: still inverted (light margins), still a 3 (nearest to the mean of the threes among
those of all classes, after an inversion is undone); and the share of the padding's energy and of the words' on the
first axis of the prompt's own embedding.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from _shared import Arm
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lightning_reg import DecorProjection, Denoiser
from lightning_reg.functional import embedding_components, token_rows
from tests.diffusion.digits import prompt, scheduler, training_digits, word_model, words

ALL = ("words", "end", "padding")
ARMS: dict[str, tuple[tuple[str, ...], float]] = {
    "nothing removed": (ALL, 0.0),
    "style word, 1": (("style",), 1.0),
    "words, 1": (("words",), 1.0),
    "end and padding, 0.75": (("end", "padding"), 0.75),
    "end and padding, 1": (("end", "padding"), 1.0),
    "words, end, padding, 0.5": (ALL, 0.5),
    "words, end, padding, 0.75": (ALL, 0.75),
    "words, end, padding, 0.9": (ALL, 0.9),
    "words, end, padding, 1": (ALL, 1.0),
}


def encoded(text: str) -> Tensor:
    states: Tensor = word_model()[1](words(text)).last_hidden_state
    return states


def undesired(kinds: Sequence[str]) -> Tensor:
    ids, text = words(prompt(None, inverted=True)), prompt(None, inverted=True)
    rows = token_rows(ids, end=0, start=1) | {"style": ids == words("inverted")[0, 1]}
    chosen = torch.stack([rows[kind][0] for kind in kinds]).any(0)
    return encoded(text)[0][chosen]


def figures(samples: Tensor) -> dict[str, float]:
    images, labels = training_digits()
    means = torch.stack([images[labels == n].mean(0) for n in range(10)])
    inverted = samples[:, 0, :, [0, 7]].mean((1, 2)) > 0
    upright = torch.where(inverted[:, None, None, None], -samples, samples)
    nearest = (upright[:, None] - means).flatten(2).square().sum(2).argmin(1)
    return {"inverted": 100 * float(inverted.double().mean()), "a_3": 100 * float((nearest == 3).double().mean())}


@torch.no_grad()
def run(seeds: Sequence[int]) -> list[Arm]:
    results = [Arm(name) for name in ARMS]
    denoiser = Denoiser(word_model()[0], scheduler("v_prediction"))
    condition, null = encoded(prompt(3, inverted=True)), encoded("")
    rows = token_rows(words(prompt(3, inverted=True)), end=0, start=1)
    axes = embedding_components(condition[0], rows["words"][0])
    for seed in seeds:
        noise = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        for arm in results:
            kinds, alpha = ARMS[arm.name]
            changed = DecorProjection(undesired(kinds), alpha)(condition)
            made = denoiser.sample(noise, changed, null, 2.0, steps=10)
            arm.add(**figures(made), padding_on_axis_1=100 * axes.padding[0], words_on_axis_1=100 * axes.words[0])
    return results
