"""CutMix: images with a rectangle of another one."""

from functools import partial

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.augmentation.cutmix._mixer import Form, Mix, Mixer
from lightning_reg.augmentation.cutmix.core import box_masks, draw_cut, paste_boxes
from lightning_reg.engine.host.arguments import check_bool

__all__ = ["CutMix"]


class CutMix(Mixer):
    r"""CutMix: pastes a rectangle of another image into each image and mixes the labels by area.

    Per training batch, with probability ``prob``: :math:`\lambda \sim \text{Beta}(\alpha, \alpha)` and a permutation
    :math:`\pi` of the batch are drawn; the same box (see :func:`rand_box`) of image :math:`\pi(i)` replaces that of
    image i; :math:`\lambda \leftarrow 1 - \text{area}`; the loss is :math:`\lambda L(z, y) + (1 - \lambda) L(z,
    y_\pi)`, each term the user's own loss with its reduction, class weights, ``ignore_index`` and label smoothing, from
    one forward pass. Any loss of torch with a target takes part. Nothing changes in validation, test and inference.

    What the module's own code sees: mixed images and, in the form "pair", the labels ``y`` as they were. Metrics of the
    training step are therefore those of mixed images against one of their two labels, and low: watch the validation's,
    and do not stop early on the training loss, which is the mixed one. Factors that your code puts on losses by
    ``reduction="none"`` (a weight of the class, or of the sample) are the sample's own, not its partner's; a loss that
    is not linear in them (focal loss) is refused: hand it over by ``LossMixin``, and the labels are mixed in the batch.

    Targets per pixel, those with the height and width of the images, ``(B, H, W)`` or ``(B, ..., H, W)`` (signals: with
    their length; flattened sample after sample as well), are no labels of the image: they get the partner's values in
    the box, an ``ignore_index`` among them like any other label, and their loss is your own with those. Of several
    losses or targets each follows in its own way, maps by the box, labels by area. Maps of another size are refused.

    Masks and lengths of padded signals in the batch stay each sample's own, which cuts longer partners off there; where
    that matters let ``collate_fn`` give all samples of a batch one length.

    Use it for images (or spectrograms, signals) where a network trains long enough to overfit. Leave it on short
    schedules, and where the label is not proportional to area (counting, small objects, text).

    Source:
        Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", ICCV 2019,
        arXiv 1905.04899, eq. 1-2; the correction of lambda is the authors' code's.

    Differs:
        With a lambda per sample (the authors use one per batch) and class weights, the loss is divided by the mixed
        sum of weights. Signals (B, C, L), which the paper does not have, lose a span of length ``L * (1 - lam)``.
        Otherwise nothing.

    Several techniques that mix: a batch is mixed once, and each takes what the ones before it have left alone.
    ``CutMix(prob=0.5)`` before ``Mixup(prob=1.0)`` switches between the two.

    DDP: each rank mixes within its own batch with draws of its own, so two ranks of batch b do not train as one
    process of batch 2b does: there, samples of both could meet. Memory: a copy of the inputs. Draws are made on the
    host; nothing is read from the device.

    Args:
        alpha: Parameter of the Beta distribution (alpha), above 0. Paper: 1. Sensible: 0.2 to 2.
        prob: Share of the batches that are mixed, in [0, 1]. Paper: 0.5 (CIFAR), 1 (ImageNet). Neutral: 0.
        per_sample: Whether each sample has a box and a lambda of its own. Paper: one for the batch.
        correct_lam: Whether the labels are weighted by the area that was replaced, not by the drawn lambda: they differ
            where the box is cut off at the border. Authors' code: yes.
        input_key: Batch entry with the images (B, C, H, W) or signals (B, C, L): a key, a position or both, separated
            by dots (``"image"``, ``"0"``, ``"labelled.0"``). ``None``: the first entry of a sequence, the only tensor
            of at least two dimensions in a mapping.
        target_key: Batch entry with the targets, for the form "soft". ``None``: the second entry of a sequence.
        form: How the labels follow. ``"pair"``: in the loss, two terms. ``"soft"``: in the batch, as probabilities
            (B, K) or mixed floating-point targets; the module's code then sees those in mixed batches. ``"auto"``:
            "soft" for a module with ``LossMixin``, else "pair".
        num_classes: Number of classes K, for the form "soft" with class indices.
        start_epoch: First epoch in which batches are mixed, from 0.
        stop_epoch: First epoch in which they no longer are, above ``start_epoch``; ``None`` for never.
        loss: Which loss call is mixed if that is not clear: position, ``"last"``, function name or ``"model.py:42"``.
            Calls on an entry of the batch itself need no choice: those on labels follow the mixing, those on the mixed
            inputs (an autoencoder's) do not. A target that is made of an entry follows unasked if it holds class
            indices; of numbers (``y.float()``, one-hot vectors, a teacher's output) it must be said that they are the
            labels, by naming their call.
        name: Tells several instances in one Trainer apart.
        seed: Seed of the draws.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(max_epochs=300, callbacks=[CutMix()], logger=False, enable_checkpointing=False)

    """

    def __init__(
        self,
        alpha: float = 1.0,
        prob: float = 0.5,
        per_sample: bool = False,
        correct_lam: bool = True,
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
        check_bool(self, "correct_lam", correct_lam)
        self.correct_lam = correct_lam

    @override
    def _problem_with(self, inputs: Tensor) -> str:
        if inputs.dim() == 4 and inputs.shape[3] in (1, 3) and min(inputs.shape[1:3]) > 4:  # no box of one or three
            return "images (B, C, H, W) are needed, and these seem to have their channels last: permute them first"
        return "" if inputs.dim() in (3, 4) else "images (B, C, H, W) or signals (B, C, L) are needed"

    @property
    @override
    def _maps(self) -> str:
        return ", maps by the box"

    @override
    def _mix(self, inputs: Tensor, generator: torch.Generator) -> Mix:
        cut = draw_cut(inputs, None, self.alpha, generator, per_sample=self.per_sample, correct_lam=self.correct_lam)
        mixed = paste_boxes(inputs, cut.permutation, cut.boxes)
        return Mix(mixed, cut.permutation, cut.lam, partial(box_masks, cut.boxes, inputs))
