"""GuidedPredict: samples for the conditions of a prediction loader, under a policy of guidance."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_reg.diffusion._service import Condition, Denoiser, count_of
from lightning_reg.diffusion.adaptive_guidance.guided_sample import Guidance, GuidedSamples, guided_sample
from lightning_reg.engine.host.row_bits import normals

__all__ = ["GuidedPredict"]


class GuidedPredict:
    """A mixin of a LightningModule, beside it in front: ``trainer.predict`` samples for each condition of its batches.

    ``class Mine(GuidedPredict, LightningModule)`` says by three methods what to sample from; batches are conditions, or
    have them first. The noise of a sample depends on the seed and on its place in the data alone, so that batches of
    another size, or two ranks, give the same samples.

    Source:
        Castillo et al., "Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models", AAAI 2025,
        arXiv 2312.12487.

    """

    sampling_steps: int = 20
    sampling_seed: int = 0

    def guided_denoiser(self) -> Denoiser:
        """The denoiser, made of the module's network and scheduler; it is not to be an attribute of the module."""
        raise NotImplementedError("GuidedPredict: define `guided_denoiser(self)`, which returns a Denoiser.")

    def guidance(self) -> Guidance:
        """The policy, ``AdaptiveGuidance(7.5)`` for example."""
        raise NotImplementedError("GuidedPredict: define `guidance(self)`, which returns a policy of guidance.")

    def null_condition(self) -> Condition:
        """What stands for no condition, one row."""
        raise NotImplementedError("GuidedPredict: define `null_condition(self)`, which returns one row.")

    def sample_shape(self) -> Sequence[int]:
        """Of a sample, without the batch."""
        raise NotImplementedError("GuidedPredict: define `sample_shape(self)`, such as (4, 64, 64).")

    def condition_of(self, batch: Any) -> Condition:  # noqa: ANN401 # the user's
        """The condition that a batch is or has first; override it to encode prompts (``self.encode_prompt(batch)``)."""
        condition: Condition = batch[0] if isinstance(batch, list | tuple) else batch
        return condition

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> GuidedSamples:  # noqa: ANN401 # the user's
        """Samples for a batch of conditions."""
        condition = self.condition_of(batch)
        count, trainer = count_of(condition) or 0, self.trainer  # type: ignore[attr-defined]  # of the LightningModule
        first: Any = next(iter(condition.values())) if isinstance(condition, Mapping) else condition
        loader = trainer.predict_dataloaders
        loader = list(loader)[dataloader_idx] if isinstance(loader, list | tuple) else loader
        # Lightning's own loader for predictions knows its size by its sampler alone.
        sizes = (getattr(one, "batch_size", None) for one in (loader, getattr(loader, "batch_sampler", None)))
        places = batch_idx * next(filter(None, sizes), count) + torch.arange(count, device=first.device)
        rows = places * trainer.world_size + trainer.global_rank
        noise: Tensor = normals(self.sampling_seed, rows, self.sample_shape())
        denoiser = self.guided_denoiser().to(first.device)
        return guided_sample(denoiser, noise, condition, self.null_condition(), self.guidance(), self.sampling_steps)
