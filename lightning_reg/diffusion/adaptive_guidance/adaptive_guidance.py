"""AdaptiveGuidance: guidance that stops for each sample once the unconditional pass says nothing new."""

import math
import warnings
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.diffusion._service import Condition, Denoiser, Prediction
from lightning_reg.diffusion.adaptive_guidance._runs import Run
from lightning_reg.diffusion.adaptive_guidance.core import cosine_similarity
from lightning_reg.engine.host.arguments import check_choice, check_number

__all__ = ["AdaptiveGuidance"]


class AdaptiveGuidance:
    r"""Classifier-free guidance that drops the unconditional pass of a sample once both predictions agree.

    .. math:: \gamma_t = \frac{\langle a_c, a_u \rangle}{\|a_c\| \|a_u\|}

    The step at which :math:`\gamma_t` reaches the threshold is still guided; all steps after it are conditional, and
    cost one pass in place of two. Samples of a batch stop each for itself: the unconditional pass runs for the others
    alone. Negative prompts may stand for the unconditional one; the two may then never agree.

    Use it with :func:`guided_sample` where the number of steps is given. On small models fewer steps at the same cost
    may be nearer to full guidance: compare (``benchmarks/effects/adaptive_guidance.py``). Thresholds are those of a
    model: look at the ``similarity`` of a few samples, or take :func:`threshold_for`.

    Source:
        Castillo, Kohler, Pérez, Pérez et al., "Adaptive Guidance: Training-free Acceleration of Conditional Diffusion
        Models", AAAI 2025, arXiv 2312.12487.

    Differs:
        The formula compares the predicted noise, which on real models is alike from the first step on, so that guidance
        would stop at once; predicted samples are compared here unless asked otherwise. Guidance never stops in the
        first quarter of the steps. The paper's body was not read: which threshold is its default is not known.

    Args:
        scale: Of the guidance, at least 0. Paper: 7.5.
        threshold: Similarity at which guidance stops; above 1 never, -1 as soon as allowed. Paper: 0.991 to 0.996.
        similarity: Of what: ``"x0"``, the predicted samples; ``"eps"``, the predicted noise; ``"output"``, what the
            model predicts (the velocity of flows).
        min_guided: Share of the steps that are guided at least, in [0, 1].
        rescale: diffusers' ``guidance_rescale``, in [0, 1].

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> AdaptiveGuidance(3.0, threshold=0.98)
        AdaptiveGuidance(scale=3, threshold=0.98, similarity='x0', min_guided=0.25)

    """

    def __init__(
        self,
        scale: float = 7.5,
        threshold: float = 0.991,
        similarity: Literal["x0", "eps", "output"] = "x0",
        min_guided: float = 0.25,
        rescale: float = 0.0,
    ) -> None:
        check_number(self, "scale", scale, low=0)
        check_number(self, "threshold", threshold, low=-1)
        check_choice(self, "similarity", similarity, ("x0", "eps", "output"))
        check_number(self, "min_guided", min_guided, low=0, high=1)
        check_number(self, "rescale", rescale, low=0, high=1)
        self.scale, self.threshold, self.similarity = scale, threshold, similarity
        self.min_guided, self.rescale = min_guided, rescale

    @override
    def __repr__(self) -> str:
        return (
            f"AdaptiveGuidance(scale={self.scale:g}, threshold={self.threshold:g}, similarity={self.similarity!r},"
            f" min_guided={self.min_guided:g})"
        )

    def start(self, denoiser: Denoiser, condition: Condition, null: Condition, count: int, steps: int) -> Run:
        """One sampling: its ``guide`` goes to :meth:`Denoiser.sample`."""
        return _AdaptiveRun(self, denoiser, condition, null, count, steps)

    def compare(self, one: Prediction, two: Prediction) -> Tensor:
        """The similarity of two predictions, ``(B,)``."""
        if self.similarity == "x0":
            return cosine_similarity(one.clean, two.clean)
        if self.similarity == "eps":
            return cosine_similarity(one.noise, two.noise)
        return cosine_similarity(one.output, two.output)


class _AdaptiveRun(Run):
    def __init__(self, policy: AdaptiveGuidance, *sampling: Any) -> None:  # noqa: ANN401 # what a Run takes
        super().__init__(*sampling)
        self.policy = policy
        self.done = torch.zeros(len(self.calls), dtype=torch.bool)
        self.least = math.ceil(policy.min_guided * self.steps)

    @override
    def guide(self, x: Tensor, time: Tensor, number: int) -> Prediction:
        policy = self.policy
        left = (~self.done).nonzero()[:, 0]
        if policy.scale == 1 or not len(left):
            return self.conditional(x, time)
        rows = left.to(x.device)
        made, with_it, without = self.guided_rows(x, time, rows, policy.scale, policy.rescale)
        found = policy.compare(with_it, without).detach().cpu().float()
        self.similarity[left, number] = found
        alike = found >= policy.threshold
        if number == 0 and policy.threshold > -1 and bool(alike.all()):
            warnings.warn(
                f"AdaptiveGuidance: predictions are alike ({float(found.min()):.4f}) at the first step already, above"
                f" threshold={policy.threshold:g}: it says nothing about this model. Take one from `threshold_for`, or"
                " another `similarity`.",
                stacklevel=2,
            )
        if number + 1 >= self.least:
            self.done[left] = alike
        return made
