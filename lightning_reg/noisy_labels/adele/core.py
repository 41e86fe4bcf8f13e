"""Adaptive early-learning correction (ADELE) of masks, for any training loop: curves, their fit, what is replaced."""

from collections.abc import Sequence
from math import exp, inf

import torch
from torch import Tensor

__all__ = [
    "confident_classes",
    "corrected_masks",
    "fit_early_learning",
    "flat_start",
    "iou_counts",
    "iou_of_counts",
    "slope_drop",
    "trigger_epoch",
]


def iou_counts(predicted: Tensor, masks: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """Pixels by class: rightly predicted, predicted, and in the masks; their sums over batches give the IoU.

    Args:
        predicted: Classes ``(B, ...)`` int64.
        masks: Classes of the same shape.
        num_classes: C.
        ignore_index: Of pixels that do not count.

    Returns:
        int64 ``(3, C)``.

    Example:
        >>> iou_counts(torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 0, 1, 255]]), 2)
        tensor([[1, 1],
                [1, 2],
                [2, 1]])

    """
    counted = masks != ignore_index
    # What does not count goes to a further place: no length depends on data, so that a device does not wait.
    both, p, t = (
        torch.where(where, classes, num_classes).flatten()
        for where, classes in ((counted & (predicted == masks), masks), (counted, predicted), (counted, masks))
    )
    zeros = torch.zeros(3, num_classes + 1, dtype=torch.int64, device=masks.device)
    places = torch.stack([both, p, t]).long()
    return zeros.scatter_add_(1, places, torch.ones_like(places))[:, :num_classes]


def iou_of_counts(counts: Tensor) -> Tensor:
    """Intersection over union of each class.

    Args:
        counts: Of :func:`iou_counts`, or sums of them, ``(..., 3, C)``.

    Returns:
        ``(..., C)`` float64; 0 for a class that is neither predicted nor given.

    """
    both, predicted, given = counts.double().unbind(-2)
    return both / (predicted + given - both).clamp(min=1)


def flat_start(iou: Sequence[float], rise: float) -> int:
    """How many points a curve stays flat at its beginning, each less than ``rise`` below the next one.

    Args:
        iou: The curve.
        rise: Least increment of a curve that has begun; SegTHOR in the authors' code: 0.1.

    Returns:
        How many points to leave out, at most all but one.

    """
    for start in range(len(iou) - 1):
        if iou[start + 1] - iou[start] >= rise:
            return start
    return max(len(iou) - 1, 0)


def fit_early_learning(times: Sequence[float], iou: Sequence[float]) -> tuple[float, float, float]:
    r"""Fits :math:`f(t) = a\,(1 - e^{-t^b / c})` to a curve, with 0 <= a, b <= 1 and c >= 0.

    Least squares by SciPy (``pip install scipy``, the extra ``analysis``); the last point weighs a hundred times as
    much as the first.

    Args:
        times: In epochs, at least three, at least 0.
        iou: Of one class at these times.

    Returns:
        a, b, c.

    Raises:
        RuntimeError: If there is no fit.
        ValueError: If there are fewer than three points, or a value is not finite.

    """
    import numpy as np
    from scipy.optimize import curve_fit  # type: ignore[import-untyped,unused-ignore]  # SciPy has no types

    if len(times) < 3 or len(times) != len(iou):
        raise ValueError(f"Three parameters need at least three points, got {len(times)} times, {len(iou)} values.")

    def curve(t: "np.ndarray[tuple[int], np.dtype[np.float64]]", a: float, b: float, c: float) -> object:
        return a * (1 - np.exp(-1 / c * t**b))

    with np.errstate(all="ignore"):
        found, _ = curve_fit(
            curve,
            np.asarray(times, dtype=np.float64),
            np.asarray(iou, dtype=np.float64),
            p0=(1, 1, 1),
            method="trf",
            sigma=np.geomspace(1, 0.1, len(times)),
            absolute_sigma=True,
            bounds=([0, 0, 0], [1, 1, np.inf]),
        )
    a, b, c = found.tolist()
    return a, b, c


def slope_drop(fitted: tuple[float, float, float], epoch: float) -> float:
    """By which share the slope of a fitted curve has fallen since the first epoch: ``|f'(t) - f'(1)| / |f'(1)|``.

    Args:
        fitted: a, b, c of :func:`fit_early_learning`.
        epoch: t, at least 1.

    Returns:
        In [0, 1), as slopes only fall where b is at most 1; 0 for a curve without slope.

    """
    first = _slope(fitted, 1.0)
    return abs(_slope(fitted, epoch) - first) / first if 0 < first < inf else 0.0


def _slope(fitted: tuple[float, float, float], t: float) -> float:
    a, b, c = fitted
    t += 1e-6  # as in the authors' code
    return a * b / c * exp(-(t**b) / c) * t ** (b - 1) if c > 0 else 0.0


def trigger_epoch(fitted: tuple[float, float, float], horizon: int, r: float = 0.9) -> int | None:
    """The first epoch in which the slope has fallen by more than the share r: early learning is over.

    Args:
        fitted: a, b, c of :func:`fit_early_learning`.
        horizon: Last epoch that is looked at.
        r: In (0, 1).

    Returns:
        The epoch, counted from 1; ``None`` if it is none up to the horizon.

    Example:
        >>> trigger_epoch((0.8, 0.9, 2.0), 30)
        7

    """
    return next((epoch for epoch in range(1, horizon + 1) if slope_drop(fitted, epoch) > r), None)


def confident_classes(
    probabilities: Tensor, tau: float = 0.8, tau_background: float | None = None, background: int | None = 0
) -> Tensor:
    """The predicted class of each pixel, and C where the prediction is not confident.

    Args:
        probabilities: ``(B, C, H, W)``.
        tau: What the largest has to exceed.
        tau_background: The same where the background is predicted; ``None`` for the same.
        background: Class of the background, ``None`` for none.

    Returns:
        int64 ``(B, H, W)``.

    """
    largest, predicted = probabilities.max(1)
    sure = largest > tau
    if tau_background is not None and background is not None:
        sure = torch.where(predicted == background, largest > tau_background, sure)
    return torch.where(sure, predicted, probabilities.shape[1])


def corrected_masks(
    confident: Tensor,
    masks: Tensor,
    triggered: Tensor,
    background: int | None = 0,
    ignore_index: int = 255,
    class_constraint: bool = True,
    both: bool = False,
    shrink_guard: bool = True,
) -> Tensor:
    """Masks in which confident predictions of triggered classes stand in place of the labels.

    Args:
        confident: What :func:`confident_classes` gives, ``(B, H, W)``.
        masks: Present labels ``(B, H, W)`` int64.
        triggered: bool ``(C,)``; the background is always allowed.
        background: Class of the background, ``None`` for none.
        ignore_index: Label that is never replaced.
        class_constraint: Whether a mask gets no class that it has not. A mask of background alone may get any triggered
            class; with ``both`` none, and every mask may get background.
        both: Whether the label that is replaced has to be of a triggered class (or background) as well.
        shrink_guard: Whether a mask stays as it is whose foreground would shrink to less than half, and whose
            background would be more than 95 %.

    Returns:
        New masks, ``(B, H, W)``.

    """
    num_classes = len(triggered)
    rows = len(masks)
    labelled = torch.where(masks == ignore_index, num_classes, masks)
    present = torch.zeros(rows, num_classes + 1, dtype=torch.bool, device=masks.device)
    present.scatter_(1, labelled.flatten(1), True)
    present[:, num_classes] = False
    concerned = (present & _padded(triggered)).any(1)
    allowed, foreground = _padded(triggered), present.clone()
    if background is not None:
        allowed[background], foreground[:, background] = True, False
    empty = ~foreground.any(1)
    concerned = concerned if both else concerned | empty
    permitted = allowed.expand(rows, -1)
    if class_constraint:
        own = present.clone()
        if both and background is not None:
            own[:, background] = True
        permitted = permitted & (own if both else own | empty[:, None])
    permitted = permitted & concerned[:, None]
    replaced = permitted.gather(1, confident.flatten(1)).reshape(masks.shape) & (masks != ignore_index)
    if both:
        replaced = replaced & allowed[labelled]
    new = torch.where(replaced, confident, masks)
    if shrink_guard and background is not None:
        before, after = ((m != background).flatten(1).sum(1) for m in (masks, new))
        spoiled = (after < 0.5 * before) & (after < 0.05 * masks[0].numel())
        new = torch.where(spoiled[:, None, None], masks, new)
    return new


def _padded(triggered: Tensor) -> Tensor:
    """With a further class that is never allowed: that of an unsure prediction, and of a label that is ignored."""
    return torch.cat([triggered, triggered.new_zeros(1)])
