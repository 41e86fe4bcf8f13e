"""Digits reconstructed under guidance, and edited: null-text inversion against inversion alone.

A UNet2DConditionModel of 1.0 million parameters on 8 x 8 digits with prompts, and an SD3Transformer2DModel of 0.6
million trained with flow matching (``tests/diffusion/digits.py``). 4 held-out digits for each seed are inverted under
"a photo of d3", and sampled again: 1,000 times the mean squared error of the reconstruction, passes for a sample, and
the share in % that becomes the digit of another prompt (nearest to the mean of a class). "Inversion alone" is guided
sampling from the noise that DDIM (Euler for flows) inversion gives; "guidance 1" is its floor. Ten steps need a larger
rate of learning than the paper's 0.01 for fifty.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from _shared import Arm
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lightning_reg import Denoiser
from lightning_reg.functional import null_text_invert, null_text_sample
from tests.diffusion.digits import (
    flow_condition,
    flow_model,
    flow_scheduler,
    held_out,
    prompt,
    scheduler,
    training_digits,
    word_model,
)

STEPS = 10
RATE = 0.15


def nearest(samples: Tensor) -> Tensor:
    images, labels = training_digits()
    means = torch.stack([images[labels == n].mean(0) for n in range(10)])
    return (samples[:, None] - means).flatten(2).square().sum(2).argmin(1)


def run(seeds: Sequence[int]) -> list[Arm]:
    models = {
        "UNet": (Denoiser(word_model()[0], scheduler("v_prediction")), lambda c: c["encoder_hidden_states"]),
        "flow transformer": (Denoiser(flow_model(), flow_scheduler()), dict),
    }
    arms: list[Arm] = []
    for name, (denoiser, take) in models.items():
        arms += [Arm(f"{name}, guidance 1")]
        for guidance in (3.0, 7.5):
            arms += [Arm(f"{name}, guidance {guidance:g}, {how}") for how in ("inversion alone", "null-text")]
        for seed in seeds:
            images, labels = held_out()
            rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:4]
            x, others = images[rows], (labels[rows] + 5) % 10
            own, edited = (take(flow_condition(*map(prompt, one.tolist()))) for one in (labels[rows], others))
            null, found = take(flow_condition("")), iter(arms[-5:])
            for guidance, updates in ((1.0, 0), (3.0, 0), (3.0, 10), (7.5, 0), (7.5, 10)):
                made = null_text_invert(denoiser, x, own, null, guidance, STEPS, updates, lr=RATE)
                error = (made.current - x).square().mean()
                becomes = nearest(null_text_sample(denoiser, made, edited)) == others
                passes = STEPS * 3 + 2 * float(made.updates.sum(1).mean())  # of each update forward and backward
                next(found).add(
                    error_x_1000=1000 * error, passes=passes, becomes_the_other=100 * becomes.double().mean()
                )
    return arms
