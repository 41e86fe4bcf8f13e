"""The formulas of ELR+, for any training loop."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.noisy_labels._early_learning import clamped_probabilities, elr_targets, log_disagreement

__all__ = ["elr_plus_decay", "elr_plus_loss", "elr_plus_targets", "refine_labels", "sigmoid_rampup"]


def elr_plus_loss(
    logits: Tensor, labels: Tensor, targets: Tensor, lam: float, clamp: float = 1e-4, ramp: float = 1.0
) -> Tensor:
    r"""The loss of one network on a mixed batch.

    .. math:: \frac1B \sum_i -\langle y_i, \log\operatorname{softmax}(z_i) \rangle
        + r\,\frac{\lambda}{B} \sum_i \log\bigl(1 - \langle q_i, p_i \rangle\bigr)

    Args:
        logits: z, of the mixed inputs, ``(B, C)``.
        labels: y, mixed one-hot labels ``(B, C)``; for 100 classes those of :func:`refine_labels`.
        targets: q, targets mixed in the same way, ``(B, C)``, constant.
        lam: :math:`\lambda`, weight of the regularizer.
        clamp: Floor of the probabilities p, in (0, 0.5).
        ramp: r, see :func:`sigmoid_rampup`.

    Returns:
        A scalar; values far below zero are normal.

    """
    term = log_disagreement(clamped_probabilities(logits, clamp), targets).mean()
    return F.cross_entropy(logits, labels) + ramp * lam * term


def elr_plus_targets(targets_rows: Tensor, teacher_logits: Tensor, beta: float) -> Tensor:
    r"""One step of the moving average of the teacher's predictions.

    .. math:: t \leftarrow \beta\, t + (1 - \beta) \operatorname{softmax}(z^\text{teacher})

    Args:
        targets_rows: Targets of the batch before the step, ``(B, C)`` float32, initially 0.
        teacher_logits: Logits of the teacher for the images before they are mixed, ``(B, C)``. Nothing is clamped.
        beta: Momentum, in [0, 1).

    Returns:
        The new targets ``(B, C)``, constant.

    """
    return elr_targets(targets_rows, teacher_logits.float().softmax(1), beta)


def refine_labels(labels: Tensor, targets: Tensor) -> Tensor:
    r"""Labels re-weighted by the targets, as the authors' code does for 100 classes.

    .. math:: y_c \leftarrow y_c\, q_c / \textstyle\sum_k y_k q_k

    Args:
        labels: y, mixed one-hot labels ``(B, C)``.
        targets: q, mixed targets ``(B, C)``.

    Returns:
        ``(B, C)`` float32; each row sums to 1, or is 0 where it was.

    Example:
        >>> refine_labels(torch.tensor([[0.75, 0.25]]), torch.tensor([[0.1, 0.3]]))
        tensor([[0.5000, 0.5000]])

    """
    weighted = labels.float() * targets.float()
    return weighted / weighted.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def one_hot_labels(labels: Tensor, num_classes: int) -> Tensor:
    """One-hot vectors ``(B, C)`` float32 of class indices ``(B,)``; 0 for a negative one, which is ignored."""
    return F.one_hot(labels.clamp(min=0), num_classes).float() * (labels >= 0)[:, None]


def elr_plus_decay(step: int, decay: float, rampup_steps: int) -> float:
    r"""Decay of the teacher's weights after an optimizer step.

    .. math:: a = \gamma \exp\bigl(-5\,(1 - \min(s + 1, L) / L)^2\bigr) \quad (L > 0), \qquad
        a = \min(1 - 1 / (s + 1), \gamma) \quad (L = 0)

    Args:
        step: s, optimizer steps of the network, this one included.
        decay: :math:`\gamma`, in [0, 1).
        rampup_steps: L, at least 0.

    Returns:
        The decay, in [0, 1).

    Example:
        >>> elr_plus_decay(1, 0.997, 0), round(elr_plus_decay(1, 0.997, 40000), 4)
        (0.5, 0.0067)

    """
    if rampup_steps:
        return decay * sigmoid_rampup(step + 1, rampup_steps)
    return min(1.0 - 1.0 / (step + 1), decay)


def sigmoid_rampup(step: int, length: int) -> float:
    r"""A weight that grows from :math:`e^{-5}` to 1.

    .. math:: \exp\bigl(-5\,(1 - \min(s, L) / L)^2\bigr)

    Args:
        step: s, at least 0.
        length: L, at least 0; with 0 the weight is 1.

    Returns:
        A number in (0, 1].

    Example:
        >>> sigmoid_rampup(20000, 40000)
        0.2865047968601901

    """
    return math.exp(-5.0 * (1.0 - min(step, length) / length) ** 2) if length else 1.0
