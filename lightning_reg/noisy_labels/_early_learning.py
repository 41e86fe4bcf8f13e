"""The formulas that the early-learning techniques share."""

import torch
from torch import Tensor

__all__ = [
    "agreement_with",
    "clamped_probabilities",
    "elr_targets",
    "finite_targets",
    "log_disagreement",
]


def log_disagreement(probabilities: Tensor, targets_rows: Tensor) -> Tensor:
    """``log(1 - <t, p>)`` of each sample, ``(B,)`` float32."""
    return (1.0 - (targets_rows.float() * probabilities).sum(1)).log()


def clamped_probabilities(logits: Tensor, clamp: float) -> Tensor:
    """Softmax in float32, between ``clamp`` and ``1 - clamp``; an entry at its bound has no gradient."""
    # In float16 and bfloat16 1 - 1e-4 rounds to 1, the clamp is void and log(0) follows. Autocast lowers none of the
    # operations here, so float32 once is float32 throughout.
    return logits.float().softmax(1).clamp(clamp, 1.0 - clamp)


def elr_targets(targets_rows: Tensor, probabilities: Tensor, beta: float) -> Tensor:
    r"""One step of the moving average of a network's predictions.

    .. math:: t \leftarrow \beta\, t + (1 - \beta)\, \hat p, \qquad \hat p_c = p_c / \textstyle\sum_k p_k

    Args:
        targets_rows: Targets of the batch before the step, ``(B, C)`` float32, initially 0.
        probabilities: Softmax outputs ``p``, clamped or not, ``(B, C)``; no gradient flows into them.
        beta: Momentum, in [0, 1).

    Returns:
        The new targets ``(B, C)``, constant. After k visits a row sums to ``1 - beta ** k``: there is no bias
        correction, which is what makes the regularizer weak early on.

    """
    p = probabilities.detach()
    return torch.lerp(p / p.sum(1, keepdim=True), targets_rows, beta)


def finite_targets(targets_rows: Tensor, probabilities: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """As :func:`elr_targets`, but that rows which would not be finite stay as they are.

    Args:
        targets_rows: Targets of the batch before the step, ``(B, C)`` float32, finite.
        probabilities: ``(B, C)``.
        beta: Momentum, in [0, 1).

    Returns:
        The new targets ``(B, C)``, and which predictions were finite, bool ``(B,)``.

    """
    rows = elr_targets(targets_rows, probabilities, beta)
    finite = rows.sum(1).isfinite()
    return torch.where(finite[:, None], rows, targets_rows), finite


def agreement_with(rows: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """To log of the targets of a batch: ``agreement``, their mean share of the given label, and ``suspects``."""
    known = labels.clamp(0, rows.shape[1] - 1)
    # A row of zeros is of a sample that was never predicted in finite numbers.
    on_label = rows.gather(1, known[:, None])[:, 0] / rows.sum(1).clamp(min=torch.finfo(rows.dtype).tiny)
    return {"agreement": on_label.mean(), "suspects": (rows.argmax(1) != labels).float().mean()}
