"""Adaptive guidance as a guider of diffusers, for its modular pipelines."""

import importlib
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_reg.diffusion._service import Denoiser, Prediction
from lightning_reg.diffusion.adaptive_guidance.adaptive_guidance import AdaptiveGuidance

__all__ = ["adaptive_guider"]


def adaptive_guider(guidance: AdaptiveGuidance, scheduler: object) -> Any:  # noqa: ANN401 # of diffusers
    """Makes a guider of diffusers that stops guiding once both predictions agree.

    It is a ``ClassifierFreeGuidance`` and takes its place, ``pipeline.update_components(guider=adaptive_guider(...))``.
    A pipeline's passes are whole batches: guidance stops when all samples agree. ``calls`` counts the passes for a
    sample, ``similarity`` has what was found at each guided step.

    Args:
        guidance: The policy.
        scheduler: The pipeline's, from which predicted samples are derived.

    Returns:
        The guider.

    Raises:
        ImportError: If diffusers is not installed, or is too old to have guiders.

    """
    try:
        base = importlib.import_module("diffusers.guiders").ClassifierFreeGuidance
        output = importlib.import_module("diffusers.guiders.guider_utils").GuiderOutput
    except (ImportError, AttributeError) as error:
        raise ImportError(
            "adaptive_guider needs diffusers with guiders: pip install 'lightning-reg[diffusion]'"
        ) from error
    made = _guider_class(base, output)(guidance_scale=guidance.scale, guidance_rescale=guidance.rescale)
    made.begin(guidance, Denoiser(_no_model, scheduler))
    return made


def _no_model(*_: object) -> Tensor:
    raise NotImplementedError("the pipeline runs the model")


def _seen(denoiser: Denoiser, latents: Tensor | None, value: Tensor, timestep: Tensor) -> Prediction:
    x = value if latents is None else latents
    alpha, sigma = (level.to(x) for level in denoiser.levels(timestep.reshape(-1)[:1].cpu()))
    return Prediction(x, value, alpha, sigma, denoiser.prediction)


def _guider_class(base: Any, output: Any) -> Any:  # noqa: ANN401 # of diffusers
    class AdaptiveGuider(base):  # type: ignore[misc]  # of diffusers
        def begin(self, policy: AdaptiveGuidance, denoiser: Denoiser) -> None:
            self.policy, self.denoiser = policy, denoiser
            self.is_done, self.calls = False, 0
            self.similarity: list[Tensor] = []
            self.latents: Tensor | None = None

        def set_state(self, step: int, num_inference_steps: int, timestep: Tensor) -> None:
            super().set_state(step=step, num_inference_steps=num_inference_steps, timestep=timestep)
            if step == 0:
                self.begin(self.policy, self.denoiser)

        def prepare_inputs(self, data: Mapping[str, Any]) -> Any:  # noqa: ANN401 # of diffusers
            latents = data.get("latents")
            self.latents = latents[0] if isinstance(latents, tuple) else latents
            return super().prepare_inputs(data)

        def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> Any:  # noqa: ANN401 # of diffusers
            self.latents = data.latents
            return super().prepare_inputs_from_block_state(data, input_fields)

        @property
        def num_conditions(self) -> int:
            return 1 if vars(self).get("is_done") else int(super().num_conditions)

        def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> Any:  # noqa: ANN401 # of diffusers
            self.calls += 1 if pred_uncond is None else 2
            if pred_uncond is None:
                return output(pred=pred_cond, pred_cond=pred_cond, pred_uncond=None)
            state = self.get_state()
            both = (_seen(self.denoiser, self.latents, value, state["timestep"]) for value in (pred_cond, pred_uncond))
            found = self.policy.compare(*both)
            self.similarity.append(found)
            if state["step"] + 1 >= math.ceil(self.policy.min_guided * state["num_inference_steps"]):
                self.is_done = bool((found >= self.policy.threshold).all())
            return super().forward(pred_cond, pred_uncond)

    return AdaptiveGuider
