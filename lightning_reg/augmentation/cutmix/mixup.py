"""Mixup: samples blended in pairs."""

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.augmentation.cutmix._mixer import Form, Mix, Mixer
from lightning_reg.augmentation.cutmix.core import mixup
from lightning_reg.engine.data.blend import draw_lam

__all__ = ["Mixup"]


class Mixup(Mixer):
    r"""Mixup: blends each sample with another one and mixes the labels alike.

    Per training batch, with probability ``prob``: :math:`\lambda \sim \text{Beta}(\alpha, \alpha)`, a permutation
    :math:`\pi`, inputs :math:`\lambda x_i + (1 - \lambda) x_{\pi(i)}`, loss :math:`\lambda L(z, y) + (1 - \lambda)
    L(z, y_\pi)`. What holds for :class:`CutMix` about losses, metrics, padded signals, several techniques that mix, and
    DDP holds here.

    Use it for floating-point inputs of any shape: images, signals, tables. Leave it for tokens and other indices.

    Source:
        Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018, arXiv 1710.09412, eq. 1-2 and section 3.

    Differs:
        The paper's lambda is one per batch in its code; ``per_sample`` draws one for each sample. Otherwise nothing.

    Memory: a copy of the inputs and a permuted copy while they are blended. Draws are made on the host.

    Args:
        alpha: Parameter of the Beta distribution (alpha), above 0. Paper: 1 (CIFAR), 0.2 to 0.4 (ImageNet).
        prob: Share of the batches that are mixed, in [0, 1]. Paper: 1. Neutral: 0.
        per_sample: Whether each sample has a lambda of its own. Authors' code: one for the batch.
        input_key: Batch entry with the inputs: a key, a position or both, separated by dots (``"image"``, ``"0"``,
            ``"labelled.0"``). ``None``: the first entry of a sequence, the only tensor of at least two dimensions in a
            mapping.
        target_key: Batch entry with the targets, for the form "soft". ``None``: the second entry of a sequence.
        form: How the labels follow: in the loss (``"pair"``), in the batch (``"soft"``), or as fits the module
            (``"auto"``); see :class:`CutMix`.
        num_classes: Number of classes K, for the form "soft" with class indices.
        start_epoch: First epoch in which batches are mixed, from 0.
        stop_epoch: First epoch in which they no longer are, above ``start_epoch``; ``None`` for never.
        loss: Which loss call is mixed if that is not clear, see :class:`CutMix`.
        name: Tells several instances in one Trainer apart.
        seed: Seed of the draws.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_reg import CutMix
        >>> both = [CutMix(prob=0.5), Mixup(prob=1.0)]  # one of the two per batch
        >>> trainer = Trainer(max_epochs=200, callbacks=both, logger=False, enable_checkpointing=False)

    """

    def __init__(
        self,
        alpha: float = 1.0,
        prob: float = 1.0,
        per_sample: bool = False,
        input_key: str | None = None,
        target_key: str | None = None,
        form: Form = "auto",
        num_classes: int | None = None,
        start_epoch: int = 0,
        stop_epoch: int | None = None,
        loss: int | str | None = None,
        name: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            alpha, prob, per_sample, input_key, target_key, form, num_classes, start_epoch, stop_epoch, loss, name, seed
        )

    @override
    def _mix(self, inputs: Tensor, generator: torch.Generator) -> Mix:
        lam = draw_lam(self.alpha, generator, len(inputs) if self.per_sample else None)
        return Mix(*mixup(inputs, lam, generator=generator))
