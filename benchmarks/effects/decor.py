"""A style taken out of prompts: which rows of the undesired prompt carry it, and what goes with it?

Two models of a UNet2DConditionModel (1.0 million parameters) and a CLIPTextModel of two layers
(``tests/diffusion/digits.py``). "Five styles" was trained on prompts such as "a photo of d3 inverted" and "a photo of
d3 plain": each style has its word. "One style" knows "a photo of d3 inverted" and "a photo of d3": its absence has no
word. Samples of "a photo of d3 inverted" from the embedding without the directions of rows of "a photo of digit
inverted"; guidance 2, 10 steps, 40 samples for each seed. Shares in %: still inverted (light margins), still a 3
(nearest to the mean of the threes among those of all classes, after an inversion is undone); and the share of the
padding's energy and of the words' on the first axis of the prompt's own embedding. "No condition" hands zeros over in
the prompt's place: what each model draws where nothing is left.
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
from tests.diffusion.digits import (
    scheduler,
    style_model,
    styled_words,
    training_digits,
    word_model,
    words,
)

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


MODELS = {"five styles": (style_model, styled_words), "one style": (word_model, words)}
WANTED, REFERENCE = "a photo of d3 inverted", "a photo of digit inverted"


class Model:
    """One of the two, and what it makes of prompts."""

    def __init__(self, name: str) -> None:
        load, self.ids = MODELS[name]
        network, self.encoder = load()
        self.denoiser = Denoiser(network, scheduler("v_prediction"))
        self.condition, self.null = self.encoded(WANTED), self.encoded("")
        rows = token_rows(self.ids(WANTED), end=0, start=1)["words"][0]
        self.axes = embedding_components(self.condition[0], rows)

    def encoded(self, text: str) -> Tensor:
        states: Tensor = self.encoder(self.ids(text)).last_hidden_state
        return states

    def without(self, kinds: Sequence[str], alpha: float) -> Tensor:
        ids = self.ids(REFERENCE)
        rows = token_rows(ids, end=0, start=1) | {"style": ids == self.ids("inverted")[0, 1]}
        chosen = torch.stack([rows[kind][0] for kind in kinds]).any(0)
        changed: Tensor = DecorProjection(self.encoded(REFERENCE)[0][chosen], alpha)(self.condition)
        return changed


def figures(samples: Tensor) -> dict[str, float]:
    images, labels = training_digits()
    means = torch.stack([images[labels == n].mean(0) for n in range(10)])
    inverted = samples[:, 0, :, [0, 7]].mean((1, 2)) > 0
    upright = torch.where(inverted[:, None, None, None], -samples, samples)
    nearest = (upright[:, None] - means).flatten(2).square().sum(2).argmin(1)
    return {"inverted": 100 * float(inverted.double().mean()), "a_3": 100 * float((nearest == 3).double().mean())}


@torch.no_grad()
def run(seeds: Sequence[int]) -> list[Arm]:
    results = []
    for name in MODELS:
        model = Model(name)
        given = {arm: model.without(*how) for arm, how in ARMS.items()} | {"no condition": 0 * model.condition}
        on_first = {"padding_on_axis_1": model.axes.padding[0], "words_on_axis_1": model.axes.words[0]}
        for arm_name, condition in given.items():
            arm = Arm(f"{name}: {arm_name}")
            for seed in seeds:
                noise = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
                made = model.denoiser.sample(noise, condition, model.null, 2.0, steps=10)
                arm.add(**figures(made), **{key: 100 * float(value) for key, value in on_first.items()})
            results.append(arm)
    return results
