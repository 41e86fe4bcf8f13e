"""How often a denoiser's class is the right one, and whether its posterior means what it says."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_reg.diffusion.diffusion_classifier.classify import classify_images
from lightning_reg.diffusion.diffusion_classifier.diffusion_classifier import DiffusionClassifier
from lightning_reg.engine.host.arguments import check_number

__all__ = ["DiffusionAccuracy"]


class DiffusionAccuracy(Metric):
    r"""Accuracy of a conditional denoiser as a classifier, with the calibration error of its posterior.

    It says whether the model heeds its condition. ``compute`` gives ``accuracy`` and ``calibration_error``,
    :math:`\sum_b \frac{n_b}{n} |\text{accuracy}_b - \text{confidence}_b|` over bins of the confidence. The classifier
    is no part of the metric's ``state_dict``.

    Source:
        Li et al., "Your Diffusion Model is Secretly a Zero-Shot Classifier", ICCV 2023, arXiv 2303.16203; calibration:
        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv 1706.04599, equation 5.

    Differs:
        The paper reports accuracies alone.

    Args:
        classifier: The classifier.
        bins: Of equal width over [0, 1], at least 1. Guo et al.: 15.
        **kwargs: torchmetrics' own.

    Raises:
        ValueError: If ``bins`` is outside its range.

    Example:
        >>> from lightning_reg import Denoiser, DiffusionClassifier, NoiseSchedule
        >>> denoiser = Denoiser(lambda x, t, c: c[:, None] * x, NoiseSchedule(torch.linspace(0.99, 0.01, 100)))
        >>> metric = DiffusionAccuracy(DiffusionClassifier(denoiser, torch.arange(2), n_samples=[10], keep=[1]))
        >>> metric.update(torch.zeros(2, 3), torch.tensor([1, 0]))
        >>> metric.compute()["accuracy"]
        tensor(0.5000)

    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    counts: Tensor

    def __init__(self, classifier: DiffusionClassifier, bins: int = 15, **kwargs: Any) -> None:  # noqa: ANN401 # torchmetrics' own
        super().__init__(**kwargs)
        check_number(self, "bins", bins, low=1, integer=True)
        self.bins = bins
        self._held = (classifier,)  # in a tuple: no submodule, so no key of a state_dict
        # Of each bin: samples, right ones, sum of confidences.
        self.add_state("counts", torch.zeros(3, bins, dtype=torch.float64), dist_reduce_fx="sum")

    @property
    def classifier(self) -> DiffusionClassifier:
        """The classifier."""
        return self._held[0]

    @override
    def update(self, images: Tensor, labels: Tensor, indices: Tensor | None = None) -> None:
        """Classifies images ``(B, ...)`` of labels ``(B,)``; see :meth:`DiffusionClassifier.errors` for indices."""
        found = classify_images(self.classifier, images.float(), indices)
        self.count(found.labels, found.probabilities, labels)

    def count(self, predicted: Tensor, probabilities: Tensor, labels: Tensor) -> None:
        """Counts classes ``(B,)`` and a posterior ``(B, C)`` that were found already."""
        confidence = probabilities.amax(1).double()
        at = (confidence * self.bins).long().clamp(max=self.bins - 1)
        seen = torch.stack([torch.ones_like(confidence), (predicted == labels.to(predicted)).double(), confidence])
        self.counts += torch.zeros_like(self.counts).index_add(1, at.to(self.counts.device), seen.to(self.counts))

    @override
    def compute(self) -> dict[str, Tensor]:
        """``accuracy`` and ``calibration_error``, ``()`` each."""
        seen, right, confidence = self.counts
        total = seen.sum()
        return {
            "accuracy": (right.sum() / total).float(),
            "calibration_error": ((right - confidence).abs().sum() / total).float(),
        }
