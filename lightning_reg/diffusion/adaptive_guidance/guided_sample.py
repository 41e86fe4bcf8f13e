"""Procedures: sampling under a policy of guidance, and the search for one."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_reg.diffusion._service import Condition, Denoiser, Prediction, guided_prediction
from lightning_reg.diffusion.adaptive_guidance._runs import Run
from lightning_reg.diffusion.adaptive_guidance.linear_ag import GuidancePolicy
from lightning_reg.engine.host.procedures import left_as_found, procedure

__all__ = ["Guidance", "GuidedSamples", "guided_sample", "search_guidance_policy"]


class Guidance(Protocol):
    """A policy: :class:`AdaptiveGuidance`, :class:`LinearAG` or :class:`GuidancePolicy`."""

    def start(self, denoiser: Denoiser, condition: Condition, null: Condition, count: int, steps: int) -> Run:
        """One sampling."""


class GuidedSamples(NamedTuple):
    """What was sampled, and what it cost.

    Args:
        samples: ``(B, ...)``.
        calls: Passes of the denoiser for each, ``(B,)``.
        similarity: Of both predictions at each step, ``(B, S)``; NaN where it was not asked for.

    """

    samples: Tensor
    calls: Tensor
    similarity: Tensor

    def curve(self) -> str:
        """The median similarity of each step, in print."""
        rows = [
            f"step {step:3d}: {'-' if bool(column.isnan().all()) else format(float(column.nanmedian()), '.4f')}"
            for step, column in enumerate(self.similarity.T, 1)
        ]
        return "\n".join(rows)


@procedure
def guided_sample(
    module: Denoiser,
    noise: Tensor,
    condition: Condition,
    null: Condition,
    guidance: Guidance,
    steps: int = 20,
) -> GuidedSamples:
    """Samples by deterministic steps under a policy of guidance, in evaluation mode, without gradients.

    Source:
        Castillo et al., "Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models", AAAI 2025,
        arXiv 2312.12487.

    Differs:
        Steps are those of DDIM (of Euler for flows); the paper samples with DPM-Solver++ in 20 steps.

    Args:
        module: The denoiser.
        noise: Where samples start, ``(B, ...)``.
        condition: A row for each sample.
        null: What stands for no condition, or a negative prompt; a row for each or one.
        guidance: The policy.
        steps: Of the sampler, at least 1.

    Returns:
        Samples, passes for each, similarities.

    Raises:
        ValueError: If ``steps`` is below 1, or not what the policy was made for.

    Example:
        >>> from lightning_reg import AdaptiveGuidance, NoiseSchedule
        >>> denoiser = Denoiser(lambda x, t, c: x - c, NoiseSchedule(torch.linspace(0.99, 0.01, 100)))
        >>> policy = AdaptiveGuidance(3.0, threshold=2.0)
        >>> guided_sample(denoiser, torch.ones(1, 2), torch.ones(1, 1), torch.zeros(1, 1), policy, steps=4).calls
        tensor([8])

    """
    if not steps >= 1:
        raise ValueError(f"guided_sample: `steps` must be at least 1, got {steps!r}.")
    module.eval()
    with torch.no_grad():
        run = guidance.start(module, condition, null, len(noise), steps)
        samples = module.sample(noise, steps=steps, guide=run.guide)
        return GuidedSamples(samples, run.calls, run.similarity)


def search_guidance_policy(
    module: Denoiser,
    noise: Tensor,
    condition: Condition,
    null: Condition,
    scale: float,
    others: Sequence[float] = (),
    steps: int = 20,
    cost_weight: float = 0.1,
    updates: int = 50,
    lr: float = 0.3,
) -> GuidancePolicy:
    r"""Searches, by gradient, which steps need guidance.

    At each step a mixture of the conditional pass, the unconditional one and guidance of some scales is taken; its
    weights are a softmax, and Adam lowers

    .. math:: \operatorname{mean} \|x(\alpha) - x_{\text{guided}}\|^2 + \lambda \frac{\text{expected passes}}{2 S}

    Source:
        Castillo et al., "Adaptive Guidance", AAAI 2025, arXiv 2312.12487, the search behind the policy.

    Differs:
        The paper's weights, rates and number of images were not read (10,000 pairs of CC3M are reported).

    Args:
        module: The denoiser.
        noise: Where samples start, ``(B, ...)``.
        condition: A row for each.
        null: What stands for no condition.
        scale: Of the guidance that is to be met.
        others: Further scales to choose from.
        steps: Of the sampler.
        cost_weight: :math:`\lambda`, at least 0.
        updates: Steps of Adam, at least 1.
        lr: Of Adam.

    Returns:
        The option of the largest weight at each step.

    Raises:
        ValueError: If an argument is outside its range.

    """
    if not cost_weight >= 0 or not updates >= 1:
        raise ValueError(
            "search_guidance_policy: `cost_weight` must be at least 0 and `updates` at least 1, got"
            f" {cost_weight!r} and {updates!r}."
        )
    module.check_guidable()
    options = torch.tensor([1.0, 0.0, scale, *others], device=noise.device)
    passes = torch.tensor([1.0, 1.0] + [2.0] * (1 + len(others)), device=noise.device)
    with left_as_found(module):
        module.eval()
        module.requires_grad_(requires_grad=False)
        with torch.no_grad():
            wanted = module.sample(noise, condition, null, scale, steps)
        logits = torch.zeros(steps, len(options), device=noise.device, requires_grad=True)
        optimizer = torch.optim.Adam([logits], lr)

        def guide(x: Tensor, time: Tensor, number: int) -> Prediction:
            mixed = (logits[number].softmax(0) * options).sum()
            return guided_prediction(*module.both(x, time, condition, null), scale=mixed)

        for _ in range(updates):
            made = module.sample(noise, steps=steps, guide=guide, checkpoint=True)
            cost = (logits.softmax(1) * passes).sum() / (2 * steps)
            loss = (made - wanted).square().mean() + cost_weight * cost
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch's
            optimizer.step()
        return GuidancePolicy(options[logits.argmax(1)].tolist())
