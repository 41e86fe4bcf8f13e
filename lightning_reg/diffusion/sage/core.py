"""Failures of a generator: what counts as one, steps on the sphere, the way around the sampler, duplicates."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_OF_TEST = 20  # numbers that the test of normality wants

__all__ = ["ensemble_prob", "failure_groups", "is_failure", "non_gaussian", "residual_path", "sphere_step", "to_sphere"]


def ensemble_prob(logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    r"""The probability that judges give to the requested class, :math:`q = \frac1M \sum_m \mathrm{softmax}(D_m)_y`.

    Args:
        logits: Of each judge, ``(B, C)``.
        labels: The class that was asked for, ``(B,)``.

    Returns:
        q, ``(B,)`` in float32 at least.

    Example:
        >>> ensemble_prob([torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 100.0]])], torch.tensor([1]))
        tensor([0.7500])

    """
    each = [_wide(one).softmax(1).gather(1, labels[:, None])[:, 0] for one in logits]
    return torch.stack(each).mean(0)


def is_failure(logits: Sequence[Tensor], labels: Tensor, threshold: float = 0.5) -> Tensor:
    """Whether samples are not what was asked for: q is below a threshold, or no judge sees the class.

    Args:
        logits: Of each judge, ``(B, C)``.
        labels: ``(B,)``.
        threshold: Of q, in [0, 1].

    Returns:
        bool ``(B,)``.

    """
    unseen = torch.stack([one.argmax(1) != labels for one in logits]).all(0)
    return unseen.logical_or(ensemble_prob(logits, labels) < threshold)


def to_sphere(noise: Tensor) -> Tensor:
    r"""Noise of the norm that almost all Gaussian noise has, :math:`\sqrt d`, each row by itself.

    Args:
        noise: ``(B, ...)`` with d numbers in a row.

    Returns:
        The same directions; a row of zeros stays one.

    Example:
        >>> to_sphere(torch.tensor([[3.0, 4.0]]))
        tensor([[0.8485, 1.1314]])

    """
    rows = noise.flatten(1)
    return (F.normalize(rows, dim=1) * math.sqrt(rows.shape[1])).view_as(noise)


def sphere_step(noise: Tensor, gradient: Tensor, step: float) -> Tensor:
    r"""A step against each row's gradient and back to the sphere, :math:`\Pi(z - a \|z\| \, g / \|g\|)`.

    Args:
        noise: z, ``(B, ...)``.
        gradient: g, of its shape; where it is zero the row stays where it was.
        step: a, in the unit of the norm of z.

    Returns:
        The next z, on the sphere of :func:`to_sphere`.

    """
    rows = noise.flatten(1)
    direction = F.normalize(gradient.flatten(1), dim=1)
    return to_sphere((rows - step * rows.norm(dim=1, keepdim=True) * direction).view_as(noise))


def residual_path(samples: Tensor, noise: Tensor, weight: float) -> Tensor:
    r"""Samples whose gradient reaches the noise past the sampler, :math:`x + \lambda (z - \mathrm{sg}(z))`.

    Args:
        samples: x, with or without a gradient of its own.
        noise: z, of its shape.
        weight: :math:`\lambda`; 0 leaves the gradient as it is.

    Returns:
        The value of x; its derivative by z is that of x plus :math:`\lambda` times the identity.

    """
    return samples + weight * (noise - noise.detach()).to(samples.dtype) if weight else samples


def failure_groups(samples: Tensor, similarity: float = 0.95) -> Tensor:
    """Which samples show the same: those joined by a chain of pairs whose cosine reaches a bound.

    Args:
        samples: ``(B, ...)``.
        similarity: The bound.

    Returns:
        The group of each, ``(B,)`` int64: the position of its first member.

    Example:
        >>> failure_groups(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.1]]))
        tensor([0, 1, 0])

    """
    rows = F.normalize(samples.flatten(1).double(), dim=1)
    near = rows @ rows.T >= similarity
    near |= torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    groups = torch.arange(len(rows), device=rows.device)
    while True:
        joined = torch.where(near, groups, len(rows)).amin(1) if len(rows) else groups
        if torch.equal(joined, groups):
            return groups
        groups = joined


def non_gaussian(noise: Tensor, level: float = 0.05) -> Tensor:
    """Whether noise is not what the model was made for, by D'Agostino and Pearson's test of each row.

    Its mean over found noise is the non-Gaussian rate of the paper (NGR); of Gaussian noise it is ``level``.

    Args:
        noise: ``(B, ...)``, at least 20 numbers in a row.
        level: Of the test.

    Returns:
        bool ``(B,)``; noise that is constant is not Gaussian.

    Raises:
        ValueError: If a row has fewer than 20 numbers.

    """
    rows = noise.detach().flatten(1).double()
    n = rows.shape[1]
    if n < LEAST_OF_TEST:
        raise ValueError(f"non_gaussian: `noise` must have at least {LEAST_OF_TEST} numbers in a row, got {n}.")
    rows = rows - rows.mean(1, keepdim=True)
    second, third, fourth = (rows.pow(power).mean(1) for power in (2, 3, 4))
    statistic = _skewness(third / second**1.5, n).square() + _kurtosis(fourth / second**2, n).square()
    return ~((-statistic / 2).exp() >= level)  # of chi-square with two degrees of freedom


def _skewness(skew: Tensor, n: int) -> Tensor:
    """D'Agostino's normal score of a sample's skewness."""
    scaled = skew * math.sqrt((n + 1) * (n + 3) / (6 * (n - 2)))
    kurtosis = 3 * (n**2 + 27 * n - 70) * (n + 1) * (n + 3) / ((n - 2) * (n + 5) * (n + 7) * (n + 9))
    width = math.sqrt(2 * (kurtosis - 1)) - 1
    return (scaled / math.sqrt(2 / (width - 1))).asinh() / math.sqrt(0.5 * math.log(width))


def _kurtosis(kurtosis: Tensor, n: int) -> Tensor:
    """Anscombe and Glynn's normal score of a sample's kurtosis."""
    variance = 24 * n * (n - 2) * (n - 3) / ((n + 1) ** 2 * (n + 3) * (n + 5))
    scaled = (kurtosis - 3 * (n - 1) / (n + 1)) / math.sqrt(variance)
    skew = 6 * (n**2 - 5 * n + 2) / ((n + 7) * (n + 9)) * math.sqrt(6 * (n + 3) * (n + 5) / (n * (n - 2) * (n - 3)))
    freedom = 6 + 8 / skew * (2 / skew + math.sqrt(1 + 4 / skew**2))
    ratio = (1 - 2 / freedom) / (1 + scaled * math.sqrt(2 / (freedom - 4)))
    root = ratio.sign() * ratio.abs() ** (1 / 3)
    return (1 - 2 / (9 * freedom) - root) / math.sqrt(2 / (9 * freedom))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
