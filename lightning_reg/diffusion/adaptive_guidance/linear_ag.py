"""LinearAG: unconditional predictions forecast from those before; and policies that are fixed for each step."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typing_extensions import override

from lightning_reg.diffusion._service import Condition, Denoiser, Prediction, guided_prediction
from lightning_reg.diffusion.adaptive_guidance._runs import Run
from lightning_reg.diffusion.adaptive_guidance.core import linear_ag_coefficients, predict_unconditional
from lightning_reg.engine.host.arguments import check_number
from lightning_reg.engine.host.procedures import left_as_found

__all__ = ["GuidancePolicy", "LinearAG", "fit_linear_ag"]


class GuidancePolicy:
    """Guidance of a scale of its own at each step: 1 is the conditional pass alone, 0 the unconditional one.

    ``[s] * k + [1.0] * (S - k)`` is what diffusers' ``stop`` does. :func:`search_guidance_policy` finds one.

    Args:
        scales: Of each step.

    Raises:
        ValueError: If there is none, or one is below 0.

    Example:
        >>> GuidancePolicy([7.5, 7.5, 1.0]).calls
        5

    """

    def __init__(self, scales: Sequence[float]) -> None:
        if not scales:
            raise ValueError("GuidancePolicy: `scales` must have a number for each step, got none.")
        for scale in scales:
            check_number(self, "scales", scale, low=0)
        self.scales = list(scales)

    @property
    def calls(self) -> int:
        """Passes for each sample."""
        return sum(1 if scale in (0, 1) else 2 for scale in self.scales)

    def start(self, denoiser: Denoiser, condition: Condition, null: Condition, count: int, steps: int) -> Run:
        """One sampling."""
        if steps != len(self.scales):
            raise ValueError(f"GuidancePolicy: `steps` must be {len(self.scales)}, as many as scales, got {steps!r}.")
        return _FixedRun(self.scales, denoiser, condition, null, count, steps)


class _FixedRun(Run):
    def __init__(self, scales: list[float], *sampling: Any) -> None:  # noqa: ANN401 # what a Run takes
        super().__init__(*sampling)
        self.scales = scales

    @override
    def guide(self, x: Tensor, time: Tensor, number: int) -> Prediction:
        scale = self.scales[number]
        if scale in (0, 1):
            return self.conditional(x, time) if scale else self.unconditional(x, time)
        return self.guided_rows(x, time, torch.arange(len(x), device=x.device), scale, 0.0)[0]


class LinearAG:
    r"""Guidance whose unconditional prediction is, at some steps, forecast from the predictions before.

    .. math:: \hat u_i = \sum_{j \le i} \beta^c_{ij} c_j + \sum_{j < i} \beta^u_{ij} u_j + \beta^x_i x_S + \beta_i

    :func:`fit_linear_ag` finds the coefficients on samples of full guidance. They belong to the model, the scheduler,
    the steps, the scale and the null condition that they were found with. A forecast takes the place of the true
    prediction in later forecasts.

    The noise that sampling starts from, :math:`x_S`, is among the regressors: with it the forecast sees the present
    sample, which is a sum of it and of past predictions, and it makes no difference whether noise, samples or
    velocities are forecast. Most of the error comes from the first forecast, which knows the least, and from the few
    samples that it turns elsewhere; neither more than 200 samples nor a ridge lowers it
    (``benchmarks/results/linear_ag_fit.txt``).

    Source:
        Castillo et al., "Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models", AAAI 2025,
        arXiv 2312.12487.

    Differs:
        The abstract speaks of affine forecasts from past scores; the paper's body was not read. That the start noise
        is a regressor besides is ours; ``affine=False`` of :func:`fit_linear_ag` leaves it and the constant out. What
        is forecast is the model's output.

    Args:
        coefficients: Of step i ``(2 i + 3,)``: of c, u, the start noise, a constant; or ``(2 i + 1,)`` without the two.
        scale: Of the guidance.
        every: Among guided steps each how-manieth is a true one, the first of them; at least 1. Paper: 2.
        guided_share: Share of the steps that are guided, in (0, 1]; those after are conditional. Paper: 0.5.

    Raises:
        ValueError: If an argument is outside its range.

    """

    def __init__(self, coefficients: Sequence[Tensor], scale: float, every: int = 2, guided_share: float = 0.5) -> None:
        check_number(self, "scale", scale, low=0)
        check_number(self, "every", every, low=1, integer=True)
        check_number(self, "guided_share", guided_share, low=0, high=1, low_open=True)
        extra = {len(row) - 2 * step - 1 for step, row in enumerate(coefficients)}
        if extra not in ({0}, {2}):
            found = [len(row) for row in coefficients]
            raise ValueError(
                f"LinearAG: `coefficients` must be 1, 3, 5, ... numbers for each step, or 3, 5, 7, ..., got {found}."
            )
        self.is_affine = extra == {2}
        self.coefficients, self.scale, self.every, self.guided_share = list(coefficients), scale, every, guided_share

    def start(self, denoiser: Denoiser, condition: Condition, null: Condition, count: int, steps: int) -> Run:
        """One sampling."""
        if steps != len(self.coefficients):
            raise ValueError(
                f"LinearAG: `steps` must be {len(self.coefficients)}, which it was fitted for, got {steps!r}."
            )
        return _LinearRun(self, denoiser, condition, null, count, steps)

    def save(self, path: str | Path) -> None:
        """Writes coefficients and scale to a safetensors file."""
        rows = {f"step_{step}": row.contiguous() for step, row in enumerate(self.coefficients)}
        numbers = torch.tensor([self.scale, self.every, self.guided_share], dtype=torch.float64)
        save_file({**rows, "settings": numbers}, path)

    @classmethod
    def load(cls, path: str | Path) -> "LinearAG":
        """Reads what :meth:`save` has written."""
        rows = load_file(path)
        scale, every, share = rows.pop("settings").tolist()
        return cls([rows[f"step_{step}"] for step in range(len(rows))], scale, int(every), share)


class _LinearRun(Run):
    def __init__(self, policy: LinearAG, *sampling: Any) -> None:  # noqa: ANN401 # what a Run takes
        super().__init__(*sampling)
        self.policy = policy
        self.past: tuple[list[Tensor], list[Tensor]] = [], []
        self.others: list[Tensor] = []

    @override
    def guide(self, x: Tensor, time: Tensor, number: int) -> Prediction:
        policy, (with_it, without) = self.policy, self.past
        if number == 0 and policy.is_affine:
            self.others = [x, torch.ones_like(x)]
        if number >= policy.guided_share * self.steps or policy.scale == 1:
            return self.conditional(x, time)
        if number % policy.every == 0:
            made, one, two = self.guided_rows(x, time, torch.arange(len(x), device=x.device), policy.scale, 0.0)
            with_it.append(one.output)
            without.append(two.output)
            return made
        one = self.conditional(x, time)
        with_it.append(one.output)
        without.append(predict_unconditional(policy.coefficients[number], with_it, without, self.others))
        forecast = Prediction(one.x, without[-1], one.alpha, one.sigma, one.kind)
        return guided_prediction(one, forecast, policy.scale)


def fit_linear_ag(
    module: Denoiser,
    noise: Tensor,
    condition: Condition,
    null: Condition,
    scale: float,
    steps: int = 20,
    ridge: float = 0.0,
    every: int = 2,
    guided_share: float = 0.5,
    *,
    affine: bool = True,
) -> LinearAG:
    """Finds the coefficients of :class:`LinearAG` on samples of full guidance, by least squares in float64.

    Args:
        module: The denoiser.
        noise: Where the samples start, ``(N, ...)``. Paper: 200.
        condition: A row for each.
        null: What stands for no condition.
        scale: Of the guidance.
        steps: Of the sampler.
        ridge: See :func:`linear_ag_coefficients`.
        every: See :class:`LinearAG`.
        guided_share: See :class:`LinearAG`.
        affine: Whether the start noise and a constant are regressors besides.

    Returns:
        The policy.

    """
    kept: tuple[list[Tensor], list[Tensor]] = [], []
    with left_as_found(module), torch.no_grad():
        module.eval()

        def guide(x: Tensor, time: Tensor, number: int) -> Prediction:
            one, two = module.both(x, time, condition, null)
            kept[0].append(one.output)
            kept[1].append(two.output)
            return guided_prediction(one, two, scale)

        module.check_guidable()
        module.sample(noise, steps=steps, guide=guide)
        others = [noise, torch.ones_like(noise)] if affine else []
        coefficients = linear_ag_coefficients(torch.stack(kept[0]), torch.stack(kept[1]), ridge, others)
    return LinearAG(coefficients, scale, every, guided_share)
