"""The formula of label smoothing, for any training loop."""

import torch
from torch import Tensor

__all__ = ["label_smoothing_term"]


def label_smoothing_term(logits: Tensor, labels: Tensor) -> Tensor:
    r"""What the cross-entropy gains per unit of smoothing.

    .. math:: \frac1C \sum_c -\log p_c + \log p_y

    Args:
        logits: ``(B, C)``.
        labels: ``(B,)`` class indices.

    Returns:
        ``(B,)``, float32.

    Example:
        >>> label_smoothing_term(torch.zeros(1, 4), torch.tensor([2]))
        tensor([0.])

    """
    log_p = torch.log_softmax(logits.float(), 1)
    return log_p.gather(1, labels[:, None])[:, 0] - log_p.mean(1)
