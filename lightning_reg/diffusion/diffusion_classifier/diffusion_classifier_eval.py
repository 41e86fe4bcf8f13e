"""DiffusionClassifierEval: in validation, how well a denoiser classifies, as a figure of how it heeds its condition."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.diffusion._named import attribute_of, denoiser_of
from lightning_reg.diffusion.diffusion_classifier.core import LOSSES, ErrorLoss
from lightning_reg.diffusion.diffusion_classifier.diffusion_classifier import DiffusionClassifier, check_stages
from lightning_reg.diffusion.diffusion_classifier.metrics import DiffusionAccuracy
from lightning_reg.engine.data.entries import find_entry
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_choice, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.technique import Technique

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["DiffusionClassifierEval"]


class DiffusionClassifierEval(Technique):
    r"""Classifies validation images with the denoiser that is being trained, and logs how often it is right.

    It says whether the model heeds its condition, which the loss hardly shows. Training is left alone, to the last
    bit. After each validation ``accuracy`` and ``calibration_error`` of :class:`DiffusionAccuracy` are logged, over the
    first images of the first validation loader, on all ranks together. Weights are those that validation runs with,
    averaged ones where a callback puts them in.

    Use it on class-conditional models, or on text-conditional ones with a prompt for each class. Leave it where there
    are many classes: an image costs the rows that :meth:`DiffusionClassifier.calls` says.

    Source:
        Li, Prabhudesai, Duggal, Brown and Pathak, "Your Diffusion Model is Secretly a Zero-Shot Classifier", ICCV
        2023, arXiv 2303.16203.

    Differs:
        The paper classifies with trained models; in validation it is ours. See :class:`DiffusionClassifier`.

    Args:
        classes: Number of classes, at least 2; the conditions are the labels 0 to the last.
        denoiser: Name in the module of the denoiser: a :class:`Denoiser`, a network, or a method of x, t and condition.
        scheduler: Name in the module of the scheduler it is trained with.
        conditions: Name in the module of a tensor with a row for each class (embeddings of prompts); ``None``:
            labels.
        alphas_cumprod: The noise levels ``(T,)`` where the module has no scheduler.
        prediction: What the model predicts; ``"auto"``: what the scheduler says.
        n_samples: Times of each stage, rising.
        keep: Classes that are left after each stage, falling to 1.
        loss: ``"l2"``, ``"l1"`` or ``"huber"``.
        max_images: Images of each validation, on all ranks together. Neutral: 0.
        chunk: Rows that the denoiser gets at once, at least 1.
        input_key: Entry of the batch with the images.
        label_key: Entry of the batch with the labels.
        seed: Of the noise, which is drawn for each image by its place in the validation data.
        name: Tells several instances in one Trainer apart.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> watch = DiffusionClassifierEval(classes=10, denoiser="unet", n_samples=[5, 20], keep=[3, 1])
        >>> trainer = Trainer(callbacks=[watch], logger=False, enable_checkpointing=False)

    """

    def __init__(
        self,
        classes: int,
        denoiser: str = "denoiser",
        scheduler: str = "scheduler",
        conditions: str | None = None,
        alphas_cumprod: Tensor | list[float] | None = None,
        prediction: Literal["auto", "epsilon", "v_prediction", "sample", "flow"] = "auto",
        n_samples: Sequence[int] = (10, 50),
        keep: Sequence[int] = (5, 1),
        loss: ErrorLoss = "l2",
        max_images: int = 256,
        chunk: int = 512,
        input_key: str = "0",
        label_key: str = "1",
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name, seed=seed)
        check_number(self, "classes", classes, low=2, integer=True)
        check_choice(self, "prediction", prediction, ("auto", "epsilon", "v_prediction", "sample", "flow"))
        check_choice(self, "loss", loss, tuple(LOSSES))
        check_number(self, "max_images", max_images, low=0, integer=True)
        check_number(self, "chunk", chunk, low=1, integer=True)
        check_stages(self, n_samples, keep)
        self.classes, self.denoiser, self.scheduler, self.conditions = classes, denoiser, scheduler, conditions
        self.alphas_cumprod, self.prediction, self.n_samples, self.keep = alphas_cumprod, prediction, n_samples, keep
        self.loss, self.max_images, self.chunk = loss, max_images, chunk
        self.input_key, self.label_key = input_key, label_key
        self._metric: DiffusionAccuracy | None = None
        self._seen = 0
        self._has_run = False

    @override
    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_metric": None}

    @override
    def describe(self) -> str:
        if not self.max_images:
            return "no images: inactive"
        return f"{self.denoiser}, {self.classes} classes, {self.max_images} images, times {list(self.n_samples)}"

    @override
    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._has_run = False

    @override
    def on_fit_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        if self.max_images and not self._has_run and trainer.limit_val_batches != 0:  # 0: switched off on purpose
            host.rank_zero_warn(
                "DiffusionClassifierEval: nothing was classified in this fit, in which no validation ran. Give the fit"
                " validation data, or lower `check_val_every_n_epoch` of the Trainer."
            )

    @override
    def on_validation_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._metric, self._seen = None, 0
        if trainer.sanity_checking or not self.max_images:
            return
        classifier = DiffusionClassifier(
            denoiser_of(self, pl_module, self.denoiser, self.scheduler, self.prediction, self.alphas_cumprod),
            self._conditions(pl_module),
            self.n_samples,
            self.keep,
            self.loss,  # type: ignore[arg-type]  # as above
            chunk=self.chunk,
            seed=self.seed,
        )
        self._metric = DiffusionAccuracy(classifier).to(pl_module.device)

    def _conditions(self, module: "LightningModule") -> Tensor:
        if self.conditions is None:
            return torch.arange(self.classes, device=module.device)
        rows = attribute_of(self, module, "conditions", self.conditions)
        if not isinstance(rows, Tensor) or len(rows) != self.classes:
            found = f"{len(rows)} rows" if isinstance(rows, Tensor) else type(rows).__name__
            raise MisconfigurationException(
                f"DiffusionClassifierEval: conditions={self.conditions!r} must name a tensor with a row for each of"
                f" {self.classes} classes, found {found}."
            )
        return rows.detach()

    @override
    def on_validation_batch_end(
        self,
        trainer: "Trainer",
        pl_module: "LightningModule",
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        left = -(-self.max_images // trainer.world_size) - self._seen
        if self._metric is None or dataloader_idx or left <= 0:
            return
        images, labels = (
            find_entry(batch, key, f"DiffusionClassifierEval: {argument}")[:left]
            for argument, key in (("input_key", self.input_key), ("label_key", self.label_key))
        )
        places = self._seen + torch.arange(len(images), device=images.device)
        self._metric.update(images, labels, places * trainer.world_size + trainer.global_rank)
        self._seen += len(images)

    @override
    def on_validation_epoch_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        if self._metric is None:
            return
        self._has_run = True
        for name, value in self._metric.compute().items():
            pl_module.log(f"{self.log_key}/{name}", value, on_step=False, on_epoch=True, sync_dist=True)
        self._metric = None
