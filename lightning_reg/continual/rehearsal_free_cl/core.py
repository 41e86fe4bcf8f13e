"""Losses that tie outputs and features to those of an earlier network, and how much was forgotten."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "bce_distillation_loss",
    "cross_entropy_shift",
    "feature_distillation_loss",
    "forgetting",
    "softmax_distillation_loss",
]


def bce_distillation_loss(
    logits: Tensor,
    teacher_logits: Tensor | None,
    targets: Tensor,
    num_old: int,
    num_seen: int | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    r"""One-vs-all loss whose targets are the teacher's probabilities on old classes and the labels on new ones.

    .. math:: \frac1B \sum_b \sum_{c < v} \operatorname{BCE}\bigl(\sigma(z_{bc}), t_{bc}\bigr), \qquad
        t_{bc} = \sigma(z^\text{old}_{bc}) \;(c < o), \quad t_{bc} = [y_b = c] \;(o \le c < v)

    The classes are summed, not averaged: the learning rate means the same for every number of classes.

    Args:
        logits: ``(B, C)``. Columns from ``num_seen`` on take no part.
        teacher_logits: Logits of the earlier network, ``(B, at least num_old)``; no gradient flows into them. ``None``
            if there are no old classes.
        targets: Labels ``(B,)`` int64, or class probabilities ``(B, C)``. A label below ``num_old`` is no target: there
            the teacher's word counts.
        num_old: Number of old classes o; they come first. With 0 this is plain one-vs-all.
        num_seen: Number of classes so far v; ``None`` for C.
        reduction: ``"mean"`` over the batch, or ``"none"``.

    Returns:
        float32: a scalar, or ``(B,)``.

    Example:
        >>> bce_distillation_loss(torch.zeros(1, 3), None, torch.tensor([2]), num_old=0)
        tensor(2.0794)

    """
    seen = logits[:, :num_seen].float()
    if targets.is_floating_point():
        wanted = targets[:, :num_seen].float().clone()
    else:
        wanted = (targets[:, None] == torch.arange(seen.shape[1], device=seen.device)).float()
    if teacher_logits is not None and num_old:
        wanted[:, :num_old] = teacher_logits[:, :num_old].detach().float().sigmoid()
    losses = F.binary_cross_entropy_with_logits(seen, wanted, reduction="none").sum(1)
    return losses.mean() if reduction == "mean" else losses


def softmax_distillation_loss(
    logits: Tensor, teacher_logits: Tensor, temperature: float = 2.0, reduction: Literal["mean", "none"] = "mean"
) -> Tensor:
    r"""Cross-entropy with the teacher's softened probabilities over the old classes.

    .. math:: -\frac1B \sum_b \sum_{c<o} \operatorname{softmax}(z^\text{old}_b / T)_c
        \log \operatorname{softmax}(z_b / T)_c

    There is no factor :math:`T^2`.

    Args:
        logits: Logits of the old classes alone, ``(B, o)``.
        teacher_logits: The earlier network's, ``(B, o)``; no gradient flows into them.
        temperature: T, above 0.
        reduction: ``"mean"`` over the batch, or ``"none"``.

    Returns:
        float32: a scalar, or ``(B,)``.

    Example:
        >>> softmax_distillation_loss(torch.zeros(1, 4), torch.tensor([[3.0, 0.0, 0.0, 0.0]]))
        tensor(1.3863)

    """
    wanted = (teacher_logits.detach().float() / temperature).softmax(1)
    losses = -(wanted * (logits.float() / temperature).log_softmax(1)).sum(1)
    return losses.mean() if reduction == "mean" else losses


def cross_entropy_shift(logits: Tensor, num_seen: int, label_smoothing: float = 0.0) -> Tensor:
    r"""What turns a cross-entropy over all classes into that over the classes so far.

    .. math:: \log \sum_{c<v} e^{z_c} - \log \sum_c e^{z_c}
        + \varepsilon \Bigl(\frac1C \sum_c z_c - \frac1v \sum_{c<v} z_c\Bigr)

    The label has no part in it, so it holds for soft targets as well.

    Args:
        logits: ``(B, C)`` with gradient, or log-probabilities.
        num_seen: Number of classes so far v; the labels are among these.
        label_smoothing: :math:`\varepsilon` of the cross-entropy.

    Returns:
        float32 ``(B,)`` with gradient, to be added to the loss of each sample.

    Example:
        >>> cross_entropy_shift(torch.zeros(1, 4), num_seen=2)
        tensor([-0.6931])

    """
    every = logits.float()
    seen = every[:, :num_seen]
    return seen.logsumexp(1) - every.logsumexp(1) + label_smoothing * (every.mean(1) - seen.mean(1))


def feature_distillation_loss(
    features: Tensor,
    teacher_features: Tensor,
    reduction: Literal["mean", "none"] = "mean",
    elements: Literal["sum", "mean"] = "sum",
) -> Tensor:
    r"""Squared distance of a layer's outputs from those of an earlier network.

    .. math:: \frac1B \sum_b \lVert f_b - f^\text{old}_b \rVert_2^2

    Args:
        features: ``(B, ...)``.
        teacher_features: The same shape; no gradient flows into them.
        reduction: ``"mean"`` over the batch, or ``"none"``.
        elements: Whether the squares of a sample are summed, or their mean is taken.

    Returns:
        float32: a scalar, or ``(B,)``.

    Example:
        >>> feature_distillation_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]]))
        tensor(5.)

    """
    losses = (features.float() - teacher_features.detach().float()).square().flatten(1)
    losses = losses.sum(1) if elements == "sum" else losses.mean(1)
    return losses.mean() if reduction == "mean" else losses


def forgetting(accuracies: Tensor, sizes: Sequence[int] | Tensor) -> Tensor:
    r"""Mean loss of accuracy on earlier tasks, weighted by their sizes.

    .. math:: \frac{1}{N-1} \sum_{i=2}^{N} \sum_{n<i} \frac{|T_n|}{|T_{1:i}|} (R_{n,n} - R_{i,n})

    Args:
        accuracies: R, ``(N, N)``: row i is after task i, column n on task n. What lies above the diagonal is not read.
        sizes: Size of each task, ``(N,)``.

    Returns:
        A scalar in the units of ``accuracies``; negative if earlier tasks got better. 0 for one task.

    Example:
        >>> forgetting(torch.tensor([[1.0, 0.0], [0.4, 1.0]]), [2, 2])
        tensor(0.3000)

    """
    weights = torch.as_tensor(sizes, dtype=accuracies.dtype, device=accuracies.device)
    lost = (accuracies.diagonal() - accuracies).tril(-1)
    each = (lost * weights).sum(1) / weights.cumsum(0)
    return each.sum() / max(len(each) - 1, 1)
