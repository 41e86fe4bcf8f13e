"""Guidance at the same number of passes: stopped by similarity, stopped at a fixed step, forecast, or fewer steps.

A class-conditional UNet2DModel of 0.7 million parameters on 8 x 8 digits (``tests/diffusion/digits.py``), 20 steps of
DDIM, guidance 3, 40 samples for each seed: passes for a sample, 1,000 times the mean squared distance to full guidance
(40 passes), and the least cosine of a sample with its fully guided one. Adaptive guidance compares predicted samples;
``eps`` compares the predicted noise, as the formula of the paper reads. "Fixed stop" is what diffusers' ``stop``
does. LinearAG is fitted to 200 other samples, as in the paper; it forecasts every second unconditional prediction, from
past predictions, the start noise and a constant, or from past predictions alone. "Of that of 15 steps": the squared
distance as a share of that of 15 steps, which cost the same 30 passes as LinearAG.
"""

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from _shared import Arm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lightning_reg import AdaptiveGuidance, Denoiser, GuidancePolicy
from lightning_reg.functional import cosine_similarity, fit_linear_ag, guided_sample
from tests.diffusion.digits import NULL, class_model, scheduler

SCALE, STEPS, NONE = 3.0, 20, torch.tensor([NULL])
LINEAR = {"LinearAG": True, "LinearAG, past predictions alone": False}


def fixed(guided: int) -> GuidancePolicy:
    return GuidancePolicy([SCALE] * guided + [1.0] * (STEPS - guided))


def run(seeds: Sequence[int]) -> list[Arm]:
    denoiser = Denoiser(class_model(), scheduler())
    arms = {f"adaptive, {t:g}": (AdaptiveGuidance(SCALE, t), STEPS) for t in (0.9, 0.95, 0.98, 0.99)}
    arms["adaptive on eps, 0.99"] = (AdaptiveGuidance(SCALE, 0.99, "eps"), STEPS)
    arms |= {f"fixed stop after {k}": (fixed(k), STEPS) for k in (5, 10)}
    arms |= {f"{k} steps": (GuidancePolicy([SCALE] * k), k) for k in (13, 15)}
    results = [Arm(name) for name in ("full guidance", *arms, *LINEAR)]
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        noise, labels = torch.randn(40, 1, 8, 8, generator=generator), torch.arange(40) % 10
        others = torch.randn(200, 1, 8, 8, generator=generator), torch.arange(200) % 10
        fitted = {
            name: (fit_linear_ag(denoiser, *others, NONE, SCALE, STEPS, guided_share=1.0, affine=affine), STEPS)
            for name, affine in LINEAR.items()
        }
        few = guided_sample(denoiser, noise, labels, NONE, arms["15 steps"][0], 15).samples
        full = guided_sample(denoiser, noise, labels, NONE, GuidancePolicy([SCALE] * STEPS), STEPS)
        for arm in results:
            policy, steps = {**arms, **fitted}.get(arm.name, (None, STEPS))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of eps, which is alike from the first step on
                made = full if policy is None else guided_sample(denoiser, noise, labels, NONE, policy, steps)
            off = 1000 * (made.samples - full.samples).square().mean()
            fewer = 1000 * (few - full.samples).square().mean()
            alike = cosine_similarity(made.samples, full.samples).min()
            distances = {"squared_distance_x_1000": off, "of_that_of_15_steps": off / fewer}
            arm.add(passes=made.calls.double().mean(), **distances, least_cosine=alike)
    return results
