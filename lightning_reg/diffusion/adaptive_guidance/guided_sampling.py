"""GuidedSampling: in validation, samples of given conditions under a policy of guidance, and what they cost."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.diffusion._in_validation import TriedInValidation
from lightning_reg.diffusion._named import attribute_of, denoiser_of
from lightning_reg.diffusion._service import Condition, rows_of
from lightning_reg.diffusion.adaptive_guidance.adaptive_guidance import AdaptiveGuidance
from lightning_reg.diffusion.adaptive_guidance.guided_sample import Guidance, guided_sample
from lightning_reg.diffusion.adaptive_guidance.linear_ag import GuidancePolicy
from lightning_reg.engine.host.arguments import check_bool, check_choice, check_number
from lightning_reg.engine.host.distributed import all_gather
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.row_bits import normals

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["GuidedSampling"]


class GuidedSampling(TriedInValidation):
    r"""In validations, draws samples of given conditions from the denoiser in training, under a policy of guidance.

    Training is left alone, to the last bit. The noise of a sample is the same in every validation, so that pictures
    show what training has changed; on several ranks each draws a part, and samples are those of one. Logged are
    ``calls``, the passes of the network for a sample, and with ``compare`` the mean squared ``distance`` to full
    guidance. Pictures go to the loggers that take them (TensorBoard's, and those with ``log_image``), and stay in
    ``last_samples``; ``last_calls`` has the passes for each sample. Weights are those that validation runs with,
    averaged ones where a callback puts them in: samples are drawn after the first batch of the first loader.

    Use it to see what a model in training draws, and which ``threshold`` fits it. Leave it where an evaluation of many
    samples is asked for: :class:`GuidedPredict` has that.

    Source:
        Castillo et al., "Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models", AAAI 2025,
        arXiv 2312.12487.

    Differs:
        See :class:`AdaptiveGuidance`; in validation it is ours.

    Args:
        shape: Of a sample without the batch, for example ``[3, 32, 32]``.
        labels: What is drawn, one for each sample: labels, or numbers of rows of ``conditions``. Neutral: none.
        denoiser: Name in the module of the denoiser: a :class:`Denoiser`, a network, or a method of x, t and condition.
        scheduler: Name in the module of the scheduler it is trained with.
        conditions: Name in the module of conditions by row (embeddings of prompts): a tensor, a mapping of tensors, or
            a method that gives one; ``None``: labels.
        null: Name in the module of what stands for no condition, likewise.
        null_label: The label that stands for no condition, where there is no ``null``.
        alphas_cumprod: The noise levels ``(T,)`` where the module has no scheduler.
        prediction: What the model predicts; ``"auto"``: what the scheduler says.
        scale: Of the guidance, at least 0; 1: none.
        threshold: Similarity at which guidance stops; above 1 it never does, see :class:`AdaptiveGuidance`.
        similarity: Of what, see :class:`AdaptiveGuidance`.
        min_guided: Share of the steps that are guided at least, in [0, 1].
        guidance: Name in the module of another policy (:class:`LinearAG`, :class:`GuidancePolicy`); it takes the place
            of ``threshold``, ``similarity`` and ``min_guided``.
        steps: Of the sampler, at least 1.
        compare: Whether full guidance with ``scale`` is drawn besides, for the distance.
        decode: Name in the module of the method that makes pictures of samples (of an autoencoder); ``None``: they are.
        value_range: Values of a picture that are black and white.
        every_n_epochs: In a fit, after every n-th epoch.
        seed: Of the noise.
        name: Tells several instances in one Trainer apart.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> watch = GuidedSampling([1, 8, 8], [0, 1, 2, 3], denoiser="unet", null_label=10, scale=3.0, threshold=0.98)
        >>> trainer = Trainer(callbacks=[watch], logger=False, enable_checkpointing=False)

    """

    done = "sampled"

    def __init__(
        self,
        shape: list[int],
        labels: list[int],
        denoiser: str = "denoiser",
        scheduler: str = "scheduler",
        conditions: str | None = None,
        null: str | None = None,
        null_label: int | None = None,
        alphas_cumprod: Tensor | list[float] | None = None,
        prediction: Literal["auto", "epsilon", "v_prediction", "sample", "flow"] = "auto",
        scale: float = 7.5,
        threshold: float = 0.991,
        similarity: Literal["x0", "eps", "output"] = "x0",
        min_guided: float = 0.25,
        guidance: str | None = None,
        steps: int = 20,
        compare: bool = False,
        decode: str | None = None,
        value_range: tuple[float, float] = (-1.0, 1.0),
        every_n_epochs: int = 1,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(every_n_epochs, name, seed)
        check_number(self, "scale", scale, low=0)
        check_number(self, "threshold", threshold, low=-1)
        check_choice(self, "similarity", similarity, ("x0", "eps", "output"))
        check_number(self, "min_guided", min_guided, low=0, high=1)
        check_number(self, "steps", steps, low=1, integer=True)
        check_choice(self, "prediction", prediction, ("auto", "epsilon", "v_prediction", "sample", "flow"))
        check_bool(self, "compare", compare)
        for argument, numbers, low, fewest in (("shape", shape, 1, 1), ("labels", labels, 0, 0)):
            _check_numbers(argument, numbers, low, fewest)
        check_number(self, "null_label", null_label, low=0, integer=True, optional=True)
        span: Any = value_range
        if not isinstance(span, list | tuple) or len(span) != 2 or not span[0] < span[1]:
            raise ValueError(f"GuidedSampling: `value_range` must be two numbers that rise, got {value_range!r}.")
        if scale != 1 and (null is None) == (null_label is None):
            raise ValueError(
                f"GuidedSampling: `null` or `null_label` must be given where `scale` is not 1, and one of the two, got"
                f" null={null!r}, null_label={null_label!r}."
            )
        self.shape, self.labels, self.conditions, self.null = shape, labels, conditions, null
        self.null_label, self.denoiser, self.scheduler = null_label, denoiser, scheduler
        self.alphas_cumprod, self.prediction, self.scale, self.threshold = alphas_cumprod, prediction, scale, threshold
        self.similarity, self.min_guided, self.guidance, self.steps = similarity, min_guided, guidance, steps
        self.compare, self.decode, self.value_range = compare, decode, value_range
        self._policy = AdaptiveGuidance(scale, threshold, similarity, min_guided)
        self.last_samples: Tensor | None = None
        self.last_calls: Tensor | None = None

    @override
    def describe(self) -> str:
        if not self.labels:
            return "no labels: inactive"
        how = self.guidance or f"guidance {self.scale:g} until {self.threshold:g}"
        return f"{len(self.labels)} samples of {self.denoiser} in {self.steps} steps, {how}"

    @override
    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        super().on_fit_start(trainer, pl_module)
        self.last_samples = self.last_calls = None

    @property
    @override
    def works(self) -> bool:
        return bool(self.labels)

    @override
    @torch.no_grad()
    def work(self, trainer: "Trainer", module: "LightningModule") -> dict[str, float]:
        """Draws this rank's samples, gathers those of all, and shows the pictures."""
        count, ranks, device = len(self.labels), trainer.world_size, module.device
        # Every rank draws as many; what is too many begins anew.
        places = (torch.arange(-(-count // ranks), device=device) * ranks + trainer.global_rank) % count
        labels = torch.tensor(self.labels, device=device)[places]
        condition = labels if self.conditions is None else self._rows(module, labels)
        null: Condition = None if self.null_label is None else torch.tensor([self.null_label], device=device)
        null = null if self.null is None else self._named(module, "null", self.null)
        denoiser = denoiser_of(self, module, self.denoiser, self.scheduler, self.prediction, self.alphas_cumprod)
        policy: Guidance = self._policy
        if self.guidance is not None:
            policy = attribute_of(self, module, "guidance", self.guidance)
        noise = normals(self.seed, places, self.shape)
        found = guided_sample(denoiser, noise, condition, null, policy, self.steps)
        # Rank r has drawn places r, r + W, ...
        self.last_samples = all_gather(found.samples).transpose(0, 1).flatten(0, 1)[:count].cpu()
        self.last_calls = all_gather(found.calls.to(device)).T.flatten()[:count].cpu()
        scalars = {"calls": float(self.last_calls.double().mean())}
        if self.compare:
            full = GuidancePolicy([self.scale] * self.steps)
            wanted = guided_sample(denoiser, noise, condition, null, full, self.steps).samples
            off = (found.samples - wanted).square().flatten(1).mean(1)
            scalars["distance"] = float(all_gather(off).T.flatten()[:count].mean())
        pictures = self.last_samples
        if self.decode is not None:
            pictures = attribute_of(self, module, "decode", self.decode)(pictures.to(device)).cpu()
        if trainer.is_global_zero:
            self._show(trainer, pictures)
        return scalars

    def _named(self, module: "LightningModule", argument: str, name: str) -> Condition:
        """A condition that a name stands for, or that a method of that name gives."""
        found = attribute_of(self, module, argument, name)
        condition: Condition = found() if callable(found) else found
        return condition

    def _rows(self, module: "LightningModule", labels: Tensor) -> Condition:
        rows = self._named(module, "conditions", str(self.conditions))
        parts = list(rows.values()) if isinstance(rows, Mapping) else [rows]
        fewest = min((len(part) if isinstance(part, Tensor) else 0 for part in parts), default=0)
        if fewest <= max(self.labels):
            raise MisconfigurationException(
                f"GuidedSampling: conditions={self.conditions!r} must name a tensor, or a mapping of tensors, with more"
                f" than {max(self.labels)} rows, the greatest of `labels`, found {fewest}."
            )
        return rows_of(rows, labels)

    def _show(self, trainer: "Trainer", pictures: Tensor) -> None:
        """Hands pictures to the loggers that take them."""
        if pictures.dim() != 4 or pictures.shape[1] not in (1, 3):
            return
        low, high = self.value_range
        shown = ((pictures.detach().float() - low) / (high - low)).clamp(0, 1)
        for logger in trainer.loggers:
            board: Any = getattr(logger, "experiment", None)
            if hasattr(logger, "log_image"):  # of Weights and Biases
                logger.log_image(f"{self.log_key}/samples", list(shown), trainer.global_step)
            elif hasattr(board, "add_images"):  # of TensorBoard
                board.add_images(f"{self.log_key}/samples", shown, trainer.global_step)


def _check_numbers(argument: str, numbers: Any, low: int, fewest: int) -> None:  # noqa: ANN401 # what it is, is asked
    is_list = isinstance(numbers, list | tuple) and len(numbers) >= fewest
    if not is_list or not all(type(number) is int and number >= low for number in numbers):
        raise ValueError(
            f"GuidedSampling: `{argument}` must be a list of whole numbers of at least {low}, got {numbers!r}."
        )
