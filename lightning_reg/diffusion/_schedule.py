"""The noise levels of a diffusion process: x_t = alpha x_0 + sigma e, whatever the scheduler calls them."""

import copy
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = ["PREDICTIONS", "Path", "Scheduler", "check_samples_are_not_cut", "flow_levels", "path_of", "prediction_of"]

Scheduler: TypeAlias = Any  # of diffusers, which need not be there
PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow")


@dataclass(frozen=True)
class Path:
    """The steps of a sampler, from noise to a sample.

    Args:
        times: What the model is told at each step, ``(S,)``, falling.
        alphas: Of the signal, where each step starts and where it ends, ``(S, 2)`` in float64.
        sigmas: Of the noise, likewise.

    """

    times: Tensor
    alphas: Tensor
    sigmas: Tensor

    def __len__(self) -> int:
        return len(self.times)


def prediction_of(scheduler: Scheduler, prediction: str) -> str:
    """What the model predicts: as the scheduler says, or as the user does."""
    if not hasattr(scheduler, "config"):
        raise ValueError(
            f"Denoiser: `scheduler` must be a scheduler of diffusers or a NoiseSchedule, got {scheduler!r:.80}."
        )
    if prediction not in (*PREDICTIONS, "auto"):
        allowed = ", ".join(map(repr, ("auto", *PREDICTIONS)))
        raise ValueError(f"Denoiser: `prediction` must be one of {allowed}, got {prediction!r}.")
    is_flow = getattr(scheduler, "alphas_cumprod", None) is None
    if is_flow and not hasattr(scheduler, "sigmas"):
        raise ValueError(
            f"Denoiser: `scheduler` must have `alphas_cumprod` or be a flow-matching one, got"
            f" {type(scheduler).__name__}, which has neither these nor `sigmas`."
        )
    found = "flow" if is_flow else getattr(scheduler.config, "prediction_type", "epsilon")
    chosen: str = found if prediction == "auto" else prediction
    chosen = "flow" if chosen == "flow_prediction" else chosen
    if chosen not in PREDICTIONS:
        raise ValueError(
            f"Denoiser: `scheduler` has prediction_type={chosen!r}, which is none of {', '.join(PREDICTIONS)}."
        )
    if chosen == "epsilon" and not is_flow and bool((scheduler.alphas_cumprod <= 0).any()):
        raise ValueError(
            "Denoiser: `scheduler` ends in pure noise (zero terminal signal), of which a prediction of the noise says"
            " nothing. Write `rescale_betas_zero_snr=False`, or give the prediction that the model was trained for."
        )
    return chosen


def flow_levels(times: Tensor, scheduler: Scheduler) -> tuple[Tensor, Tensor]:
    """Alpha and sigma of a flow at times in [0, T], in float64."""
    sigmas = times.double() / scheduler.config.num_train_timesteps
    return 1 - sigmas, sigmas


def check_samples_are_not_cut(scheduler: Scheduler) -> None:
    """Refuses schedulers that cut samples, which a deterministic step in closed form does not."""
    for name in ("clip_sample", "thresholding"):
        if getattr(scheduler.config, name, False):
            kind = type(scheduler).__name__
            raise ValueError(
                f"Denoiser: `scheduler` has {name}=True, and steps here cut no sample. Write"
                f" `{kind}.from_config(scheduler.config, {name}=False)`."
            )


def path_of(scheduler: Scheduler, steps: int, mu: float | None, *, joined: bool) -> Path:
    """The steps that a scheduler would go; it stays as it is.

    Args:
        scheduler: The scheduler.
        steps: How many.
        mu: Of schedulers with dynamic shift.
        joined: Whether each step ends at the level where the next one starts. DDIM of diffusers goes down by T // steps
            whatever its spacing, so with ``"linspace"``, or where steps do not divide T, it does not.

    Returns:
        The path.

    Raises:
        ValueError: If the scheduler cuts samples, or needs ``mu``.

    """
    check_samples_are_not_cut(scheduler)
    own = copy.deepcopy(scheduler)
    if getattr(own, "alphas_cumprod", None) is None:
        if getattr(own.config, "use_dynamic_shifting", False) and mu is None:
            raise ValueError(
                "Denoiser: `mu` must be given where the scheduler shifts times dynamically (use_dynamic_shifting=True),"
                " got None. It is the shift for the size of image."
            )
        own.set_timesteps(steps, **({} if mu is None else {"mu": mu}))
        sigmas = own.sigmas.double().cpu()
        pairs = torch.stack([sigmas[:-1], sigmas[1:]], 1)
        return Path(own.timesteps.float().cpu(), 1 - pairs, pairs)
    own.set_timesteps(steps)
    times = torch.as_tensor(own.timesteps).double().round().long().cpu()
    times = torch.unique_consecutive(times)  # some repeat the second
    if len(times) != steps:
        raise ValueError(
            f"Denoiser: `scheduler` must have a time for each step, got {len(times)} of {type(own).__name__} for"
            f" {steps} steps. Of Runge-Kutta schedulers leave their warm-up out (`skip_prk_steps=True`)."
        )
    levels = own.alphas_cumprod.double().cpu()
    final = torch.as_tensor(getattr(own, "final_alpha_cumprod", 1.0)).double().cpu()
    after = torch.cat([times[1:], torch.tensor([-1])])
    if not joined and hasattr(own, "final_alpha_cumprod"):
        after = times - own.config.num_train_timesteps // steps
    ends = torch.where(after >= 0, levels[after.clamp(min=0)], final)
    pairs = torch.stack([levels[times], ends], 1)
    return Path(times, pairs.sqrt(), (1 - pairs).sqrt())
