"""Noise at which a class-conditional model of digits makes another digit: random draws and three searches.

A UNet2DModel of 0.7 million parameters on 8 x 8 digits (``tests/diffusion/digits.py``), 20 steps of DDIM, guidance 1.5;
three small classifiers judge, a fourth is held out; 20 starts for each seed, 25 steps. "Random" draws as many samples
as a search makes. Found: share of starts with a failure. Confirmed: share of found ones that the held-out judge does
not take for the requested digit either. Non-Gaussian: share of found noise that fails a test of normality at 5 %.
Distance: mean distance of found samples to the nearest training digit (held-out digits: 2.1).
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from _shared import Arm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lightning_reg import Denoiser
from lightning_reg.functional import latent_search, non_gaussian, random_failures, to_sphere
from tests.diffusion.digits import class_model, scheduler, training_digits
from tests.diffusion.test_sage import judges

STARTS, STEPS, ITERATIONS = 20, 20, 25
SEARCHES = {
    "around the sampler": {"residual": 1.0},
    "through the sampler": {"sampler_gradient": True, "residual": 0.0},
    "both": {"sampler_gradient": True, "residual": 0.1},
}


def run(seeds: Sequence[int]) -> list[Arm]:
    denoiser, (*three, fourth) = Denoiser(class_model(), scheduler()), judges()
    options = {"null": torch.tensor([10]), "scale": 1.5, "sampler_steps": STEPS}
    digits, labels = training_digits()[0].flatten(1), torch.arange(STARTS) % 10
    results = [Arm(name) for name in ("random", *SEARCHES)]
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        draws = [to_sphere(torch.randn(STARTS, 1, 8, 8, generator=generator)) for _ in range(ITERATIONS + 1)]
        failed = torch.stack([random_failures(denoiser, z, labels, labels, three, **options) for z in draws])
        at_random, wanted = torch.stack(draws)[failed], labels.expand_as(failed)[failed]
        with torch.no_grad():
            samples = denoiser.sample(at_random, wanted, options["null"], options["scale"], STEPS)
        results[0].add(
            found=failed.any(0).double().mean(),
            confirmed=(fourth(samples).argmax(1) != wanted).double().mean(),
            non_gaussian=non_gaussian(at_random).double().mean(),
            distance=torch.cdist(samples.flatten(1), digits).amin(1).mean(),
        )
        for arm in results[1:]:
            made = latent_search(
                denoiser, draws[0], labels, labels, three, iterations=ITERATIONS, held_out=fourth, **SEARCHES[arm.name],
                **options,
            )  # fmt: skip
            found = made.found
            far = torch.cdist(made.samples[found].flatten(1), digits).amin(1).mean()
            arm.add(**made.rates(), non_gaussian=non_gaussian(made.noise[found]).double().mean(), distance=far)
    return results
