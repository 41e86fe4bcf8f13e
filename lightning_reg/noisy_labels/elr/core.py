"""The formulas of early-learning regularization, for any training loop."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine.data.memory import last_occurrences
from lightning_reg.noisy_labels._early_learning import (
    clamped_probabilities,
    elr_targets,
    finite_targets,
    log_disagreement,
)

__all__ = ["elr_loss", "elr_regularizer", "elr_targets", "elr_update_targets"]


def elr_loss(
    logits: Tensor,
    labels: Tensor,
    index: Tensor,
    targets: Tensor,
    lam: float,
    beta: float,
    clamp: float = 1e-4,
) -> Tensor:
    r"""Cross-entropy with early-learning regularization; updates ``targets`` first.

    .. math:: \frac1B \sum_i \operatorname{CE}(z_i, y_i) + \frac{\lambda}{B} \sum_i \log(1 - \langle t_i, p_i \rangle)

    Args:
        logits: ``(B, C)``.
        labels: ``(B,)`` int64.
        index: Sample index of each row, ``(B,)`` int64.
        targets: All targets ``(N, C)``, initially 0; changed in place.
        lam: Weight of the regularizer.
        beta: Momentum of the targets, in [0, 1).
        clamp: Floor of the probabilities, in (0, 0.5).

    Returns:
        A scalar; values far below zero are normal.

    """
    rows = elr_update_targets(targets, index, logits, beta, clamp)
    return F.cross_entropy(logits, labels) + lam * elr_regularizer(logits, rows, clamp)


def elr_regularizer(
    logits: Tensor, targets_rows: Tensor, clamp: float = 1e-4, reduction: Literal["mean", "none"] = "mean"
) -> Tensor:
    r"""The early-learning regularizer, without its weight.

    .. math:: \frac1B \sum_i \log\bigl(1 - \langle t_i, p_i \rangle\bigr) \le 0, \qquad
        p = \operatorname{clamp}(\operatorname{softmax}(z), c, 1 - c)

    Args:
        logits: ``(B, C)``. The gradient flows through the clamp: an entry at its floor has none.
        targets_rows: Targets of the batch after their update, ``(B, C)``, constant.
        clamp: Floor of the probabilities, in (0, 0.5).
        reduction: ``"mean"`` over the batch, or ``"none"``.

    Returns:
        float32: a scalar, or ``(B,)``.

    Example:
        >>> import torch
        >>> elr_regularizer(torch.zeros(1, 2), torch.tensor([[0.15, 0.15]]))
        tensor(-0.1625)

    """
    term = log_disagreement(clamped_probabilities(logits, clamp), targets_rows)
    return term.mean() if reduction == "mean" else term


def elr_update_targets(targets: Tensor, index: Tensor, logits: Tensor, beta: float, clamp: float = 1e-4) -> Tensor:
    r"""Updates the targets of a batch in place, before its loss is computed.

    .. math:: t_i \leftarrow \beta\, t_i + (1 - \beta)\, \hat p_i, \qquad
        \hat p = p / \textstyle\sum_c p_c, \quad p = \operatorname{clamp}(\operatorname{softmax}(z), c, 1 - c)

    Args:
        targets: All targets, ``(N, C)``, initially 0. The rows in ``index`` are changed, the others are not.
        index: Sample index of each row of the batch, ``(B,)`` int64. Of several rows for one sample the last counts.
        logits: Logits of the batch, ``(B, C)``; no gradient flows into them. A row that is not finite moves nothing.
        beta: Momentum, in [0, 1).
        clamp: Floor of the probabilities, in (0, 0.5).

    Returns:
        The updated rows, ``(B, C)``, constant.

    Example:
        >>> import torch
        >>> targets = torch.zeros(3, 2)
        >>> elr_update_targets(targets, torch.tensor([2]), torch.zeros(1, 2), beta=0.7)
        tensor([[0.1500, 0.1500]])

    """
    rows, finite = finite_targets(targets[index].float(), clamped_probabilities(logits, clamp), beta)
    rows = rows[last_occurrences(index, finite)]
    targets.index_copy_(0, index, rows.to(targets.dtype))
    return rows
