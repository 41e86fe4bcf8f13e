"""Digits told by a UNet of diffusers that was trained to make them: accuracy, cost, and what shared noise is worth.

A class-conditional UNet2DModel of 0.7 million parameters (``tests/diffusion/digits.py``; 8 x 8 digits, cosine schedule,
10 % of labels dropped, 900 steps of 128), nothing trained here. 100 of 200 held-out images for each seed, and noise of
its own for each image: accuracy in %, calibration error of the posterior, rows of the denoiser for an image. Then the
standard deviation, over the noise, of the error under the next class less that under the right one, at two times: with
the same noise for both, and with noise of its own for each.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from _shared import Arm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lightning_reg import Denoiser, DiffusionAccuracy, DiffusionClassifier
from lightning_reg.functional import condition_errors
from tests.diffusion.digits import class_model, held_out, scheduler  # from the checkout

ARMS = {"5 times": ((5,), (1,)), "20 times": ((20,), (1,)), "5, then 40 for 2": ((5, 40), (2, 1))}


def spread(denoiser: Denoiser, time: int, seed: int, *, shared: bool) -> float:
    x, y = (rows[:40] for rows in held_out())
    found = []
    for draw in range(8):
        errors = [
            condition_errors(
                denoiser,
                x,
                torch.arange(10),
                label[:, None],
                torch.tensor([time]),
                torch.arange(40),
                seed=1000 * seed + (draw if shared else 2 * draw + side),
            )
            for side, label in enumerate((y, (y + 1) % 10))
        ]
        found.append(errors[1] - errors[0])
    return float(torch.stack(found).var(0).mean().sqrt())


@torch.no_grad()
def run(seeds: Sequence[int]) -> list[Arm]:
    results = [Arm(name) for name in ARMS]
    denoiser = Denoiser(class_model(), scheduler())
    for seed in seeds:
        chosen = torch.randperm(200, generator=torch.Generator().manual_seed(seed))[:100]
        x, y = (rows[chosen] for rows in held_out())
        ratios = {
            f"std at {time}, shared / own": spread(denoiser, time, seed, shared=True)
            / spread(denoiser, time, seed, shared=False)
            for time in (100, 500)
        }
        for arm in results:
            classifier = DiffusionClassifier(denoiser, torch.arange(10), *ARMS[arm.name], seed=seed)
            metric = DiffusionAccuracy(classifier)
            metric.update(x, y, chosen)
            found = metric.compute()
            arm.add(
                **{"accuracy (%)": 100 * found["accuracy"], "calibration error": found["calibration_error"]},
                **{"rows for an image": classifier.calls(), **ratios},
            )
    return results
