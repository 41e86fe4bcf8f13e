r"""CutMix and mixup: images made of two, with labels to match."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.augmentation._mixer import Form, Mixer
from lightning_reg.engine.data.blend import draw_lam, draw_permutation, mix_targets, mixup

__all__ = ["CutMix", "Mixup", "cutmix", "cutmix_loss", "mix_targets", "mixup", "paste_box", "rand_box"]

Box = tuple[int, int, int, int]


def rand_box(height: int, width: int, lam: float, generator: torch.Generator | None = None) -> Box:
    r"""A random rectangle with about :math:`1 - \lambda` of an image's area, cut off at the border.

    .. math:: h = \lfloor H \sqrt{1 - \lambda} \rfloor, \quad w = \lfloor W \sqrt{1 - \lambda} \rfloor, \quad
        y_{1, 2} = \text{clip}(c_y \mp \lfloor h / 2 \rfloor, 0, H), \quad c_y \sim U\{0, \dots, H - 1\}

    and the same for x. An odd side loses one pixel, as in the authors' code.

    Args:
        height: H, at least 1. With 1 the box is a span of a signal: its width is :math:`W (1 - \lambda)`.
        width: W, at least 1. With 1 the same, along the height.
        lam: Share of the image to keep, in [0, 1].
        generator: Generator on the CPU; ``None`` for the global one.

    Returns:
        ``(y1, y2, x1, x2)``, ends excluded; may be empty.

    Example:
        >>> rand_box(32, 32, lam=0.75, generator=torch.manual_seed(0))
        (4, 20, 7, 23)

    """
    if height == 1:
        return (0, 1, *_span(width, 1.0 - lam, generator))
    if width == 1:
        return (*_span(height, 1.0 - lam, generator), 0, 1)
    ratio = math.sqrt(1.0 - lam)
    return (*_span(height, ratio, generator), *_span(width, ratio, generator))


def _span(size: int, ratio: float, generator: torch.Generator | None) -> tuple[int, int]:
    half = int(size * ratio) // 2
    centre = int(torch.randint(size, (), generator=generator))
    return max(centre - half, 0), min(centre + half, size)


def paste_box(x: Tensor, permutation: Tensor, box: Box) -> Tensor:
    """A copy of a batch in which every sample has the box of its partner.

    Args:
        x: Inputs ``(B, C, H, W)`` or ``(B, C, L)`` (H is 1 then), any type; not changed.
        permutation: Partner of each sample, ``(B,)``.
        box: ``(y1, y2, x1, x2)``, see :func:`rand_box`.

    Returns:
        As ``x``, memory format included.

    """
    y1, y2, x1, x2 = box
    where = (..., slice(x1, x2)) if x.dim() == 3 else (..., slice(y1, y2), slice(x1, x2))
    mixed = x.clone()
    mixed[where] = x[where][permutation]
    return mixed


def cutmix(
    x: Tensor,
    lam: float | None = None,
    alpha: float = 1.0,
    generator: torch.Generator | None = None,
    *,
    per_sample: bool = False,
    correct_lam: bool = True,
) -> tuple[Tensor, Tensor, float | Tensor]:
    r"""A rectangle of each image replaced by that of another image of the batch.

    .. math:: \lambda \sim \text{Beta}(\alpha, \alpha), \qquad \lambda \leftarrow 1 - \frac{(y_2-y_1)(x_2-x_1)}{H W}

    The box gets its size from the drawn :math:`\lambda`; the labels get their weights from the corrected one, because
    a box that reaches over the border is cut off. For :math:`\alpha = 1` its mean is 0.70.

    Args:
        x: Inputs ``(B, C, H, W)`` or ``(B, C, L)``, any type; not changed.
        lam: Share of the image to keep before the box is cut off, in [0, 1]; ``None`` to draw it.
        alpha: Parameter of the Beta distribution, above 0. Paper: 1.
        generator: Generator on the CPU; ``None`` for the global one.
        per_sample: Whether each sample has a box and a share of its own. Paper: one for the batch.
        correct_lam: Whether the share is corrected to the area that was replaced.

    Returns:
        The mixed inputs, in type and memory format of ``x``; the partners ``(B,)``; the shares for the labels: a
        number, or float32 ``(B,)`` with ``per_sample``.

    Raises:
        ValueError: If ``x`` has neither 3 nor 4 dimensions.

    Example:
        >>> mixed, permutation, lam = cutmix(torch.rand(8, 3, 32, 32), generator=torch.manual_seed(0))
        >>> mixed.shape, 0 <= lam <= 1
        (torch.Size([8, 3, 32, 32]), True)

    """
    if x.dim() not in (3, 4):
        raise ValueError(f"cutmix needs inputs of shape (B, C, H, W) or (B, C, L), got {tuple(x.shape)}.")
    height, width = x.shape[2:] if x.dim() == 4 else (1, x.shape[2])
    permutation = draw_permutation(x, generator)
    drawn = draw_lam(alpha, generator, len(x) if per_sample else None) if lam is None else lam
    if not per_sample:
        kept = float(drawn)
        box = rand_box(height, width, kept, generator)
        return paste_box(x, permutation, box), permutation, _share(box, height, width) if correct_lam else kept
    shares = drawn.tolist() if isinstance(drawn, Tensor) else [drawn] * len(x)
    boxes = [rand_box(height, width, share, generator) for share in shares]
    corrected = [_share(box, height, width) for box in boxes] if correct_lam else shares
    mixed = torch.where(_masks(boxes, x), x[permutation], x)
    return mixed, permutation, torch.tensor(corrected).to(x.device, non_blocking=True)


def _share(box: Box, height: int, width: int) -> float:
    y1, y2, x1, x2 = box
    return 1.0 - (y2 - y1) * (x2 - x1) / (height * width)


def _masks(boxes: list[Box], x: Tensor) -> Tensor:
    """Which pixels lie in the box of their sample: bool ``(B, 1, H, W)`` or ``(B, 1, L)``."""
    ends = torch.tensor(boxes).to(x.device, non_blocking=True)
    y1, y2, x1, x2 = ends.reshape(-1, 4, *[1] * (x.dim() - 1)).unbind(1)
    column = torch.arange(x.shape[-1], device=x.device)
    inside = (x1 <= column) & (column < x2)
    if x.dim() == 4:
        row = torch.arange(x.shape[-2], device=x.device)[:, None]
        inside = inside & (y1 <= row) & (row < y2)
    return inside


def cutmix_loss(
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    logits: Tensor,
    targets: Tensor,
    permutation: Tensor,
    lam: float | Tensor,
) -> Tensor:
    r"""The loss of mixed samples.

    .. math:: \lambda\, \ell(z, y) + (1 - \lambda)\, \ell(z, y_{\pi})

    Args:
        loss_fn: Called as ``loss_fn(logits, targets)``. Class weights, ``ignore_index`` and label smoothing keep their
            meaning, because each term is an ordinary loss.
        logits: Outputs for the mixed inputs, ``(B, ...)``.
        targets: Targets of the batch before mixing, ``(B, ...)``.
        permutation: Partner of each sample, ``(B,)``.
        lam: Share of the sample itself: a number, or one for each sample ``(B,)`` where ``loss_fn`` returns ``(B,)``.

    Returns:
        In the shape that ``loss_fn`` returns.

    Example:
        >>> logits, targets = torch.zeros(2, 4), torch.tensor([0, 1])
        >>> cutmix_loss(torch.nn.functional.cross_entropy, logits, targets, torch.tensor([1, 0]), lam=0.7)
        tensor(1.3863)

    """
    return lam * loss_fn(logits, targets) + (1.0 - lam) * loss_fn(logits, targets[permutation])


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
    ``reduction="none"`` (a weight of the class, a focal factor) see the sample's own label. Targets per pixel are
    weighted by area as a label is; where they should follow the box, paste it into them yourself.

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
        self.correct_lam = correct_lam

    @classmethod
    @override
    def key(cls) -> str:
        return "cutmix"

    @override
    def _problem_with(self, inputs: Tensor) -> str:
        return "" if inputs.dim() in (3, 4) else "images (B, C, H, W) or signals (B, C, L) are needed"

    @override
    def _mix(self, inputs: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, float | Tensor]:
        return cutmix(inputs, None, self.alpha, generator, per_sample=self.per_sample, correct_lam=self.correct_lam)


class Mixup(Mixer):
    r"""Mixup: blends each sample with another one and mixes the labels alike.

    Per training batch, with probability ``prob``: :math:`\lambda \sim \text{Beta}(\alpha, \alpha)`, a permutation
    :math:`\pi`, inputs :math:`\lambda x_i + (1 - \lambda) x_{\pi(i)}`, loss :math:`\lambda L(z, y) + (1 - \lambda)
    L(z, y_\pi)`. What holds for :class:`CutMix` about losses, metrics, several techniques that mix, and DDP holds here.

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

    @classmethod
    @override
    def key(cls) -> str:
        return "mixup"

    @override
    def _problem_with(self, inputs: Tensor) -> str:
        return "" if inputs.is_floating_point() else "floating-point inputs are needed"

    @override
    def _mix(self, inputs: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, float | Tensor]:
        lam = draw_lam(self.alpha, generator, len(inputs) if self.per_sample else None)
        return mixup(inputs, lam, generator=generator)
