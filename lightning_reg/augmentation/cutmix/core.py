"""The formulas of CutMix and mixup, for any training loop."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_reg.engine.data.blend import draw_lam, draw_permutation, mix_targets, mixup

__all__ = ["cutmix", "cutmix_loss", "mix_targets", "mixup", "paste_box", "rand_box"]

Box = tuple[int, int, int, int]


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
    cut = draw_cut(x, lam, alpha, generator, per_sample=per_sample, correct_lam=correct_lam)
    return paste_boxes(x, cut.permutation, cut.boxes), cut.permutation, cut.lam


class Cut(NamedTuple):
    """What is cut out of which image.

    Attributes:
        permutation: Partner of each sample, ``(B,)``.
        boxes: One for the batch, or one for each sample.
        lam: Shares for the labels: a number, or float32 ``(B,)``.

    """

    permutation: Tensor
    boxes: list[Box]
    lam: float | Tensor


def draw_cut(
    x: Tensor,
    lam: float | None = None,
    alpha: float = 1.0,
    generator: torch.Generator | None = None,
    *,
    per_sample: bool = False,
    correct_lam: bool = True,
) -> Cut:
    """The draws of :func:`cutmix`.

    Args:
        x: As there.
        lam: As there.
        alpha: As there.
        generator: As there.
        per_sample: As there.
        correct_lam: As there.

    Returns:
        Partners, boxes and shares.

    Raises:
        ValueError: If ``x`` has neither 3 nor 4 dimensions.

    """
    if x.dim() not in (3, 4):
        raise ValueError(f"cutmix needs inputs of shape (B, C, H, W) or (B, C, L), got {tuple(x.shape)}.")
    height, width = x.shape[2:] if x.dim() == 4 else (1, x.shape[2])
    permutation = draw_permutation(x, generator)
    drawn = draw_lam(alpha, generator, len(x) if per_sample else None) if lam is None else lam
    if not per_sample:
        kept = float(drawn)
        box = rand_box(height, width, kept, generator)
        return Cut(permutation, [box], _share(box, height, width) if correct_lam else kept)
    shares = drawn.tolist() if isinstance(drawn, Tensor) else [drawn] * len(x)
    boxes = [rand_box(height, width, share, generator) for share in shares]
    corrected = [_share(box, height, width) for box in boxes] if correct_lam else shares
    return Cut(permutation, boxes, torch.tensor(corrected, device="cpu").to(x.device, non_blocking=True))


def _share(box: Box, height: int, width: int) -> float:
    y1, y2, x1, x2 = box
    return 1.0 - (y2 - y1) * (x2 - x1) / (height * width)


def box_masks(boxes: Sequence[Box], x: Tensor) -> Tensor:
    """Which pixels lie in the box of their sample.

    Args:
        boxes: Boxes ``(y1, y2, x1, x2)``, ends excluded: one for the batch, or one for each sample.
        x: Inputs ``(B, C, H, W)`` or ``(B, C, L)``.

    Returns:
        bool ``(B, H, W)`` or ``(B, L)``; of one box ``(1, H, W)`` or ``(1, L)``.

    """
    ends = torch.tensor(boxes, device="cpu").to(x.device, non_blocking=True)
    y1, y2, x1, x2 = ends.reshape(-1, 4, *[1] * (x.dim() - 2)).unbind(1)
    column = torch.arange(x.shape[-1], device=x.device)
    inside = (x1 <= column) & (column < x2)
    if x.dim() == 4:
        row = torch.arange(x.shape[-2], device=x.device)[:, None]
        inside = inside & (y1 <= row) & (row < y2)
    return inside


def paste_boxes(x: Tensor, permutation: Tensor, boxes: Sequence[Box]) -> Tensor:
    """A copy of a batch in which every sample has a box of its partner.

    Args:
        x: Inputs ``(B, C, H, W)`` or ``(B, C, L)``, any type; not changed.
        permutation: Partner of each sample, ``(B,)``.
        boxes: One for the batch, or one for each sample.

    Returns:
        As ``x``, memory format included.

    """
    if len(boxes) == 1:
        return paste_box(x, permutation, boxes[0])
    return torch.where(box_masks(boxes, x).unsqueeze(1), x[permutation], x)


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
    centre = int(torch.randint(size, (), generator=generator, device="cpu"))
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
