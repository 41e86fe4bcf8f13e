"""Consistency of predictions at several scales, for any training loop, and what resizes images, masks and scores."""

from collections.abc import Sequence
from math import log
from typing import Literal

import torch
from torch import Tensor

from lightning_reg.noisy_labels._scales import resized, scaled_size

__all__ = ["multiscale_consistency", "resized", "scaled_size"]


def multiscale_consistency(
    logits: Sequence[Tensor], rho: float = 0.8, valid: Tensor | None = None, mask: Literal["pixel", "image"] = "pixel"
) -> Tensor:
    r"""How far the predictions at K scales are from their mean q, where that is confident.

    .. math:: \frac{1}{|V_i|} \sum_{n \in V_i} [\max_c q_{nc} \ge \rho] \sum_k \mathrm{KL}(p^k_n \,\|\, q_n),
        \qquad q = \frac1K \sum_k p^k

    The inner sum is K times the Jensen-Shannon divergence of the predictions. Gradient flows through all of them, and
    through q.

    Args:
        logits: Class scores at each scale, resized to one size: K of ``(B, C, ...)``.
        rho: Confidence from which a position counts, in [0, 1]; 0: all.
        valid: bool ``(B, ...)``, which positions count; ``None`` for all.
        mask: What is confident or not: each ``"pixel"``, as the paper says, or the whole ``"image"`` by its surest
            pixel, as the authors' code has it.

    Returns:
        Mean over the counted positions V of each sample, ``(B,)`` float32; 0 where there are none.

    Example:
        >>> one, other = torch.tensor([[99.0, 0.0]]), torch.tensor([[0.0, 99.0]])
        >>> multiscale_consistency([one, other], rho=0.0)
        tensor([1.3863])

    """
    size = len(logits[0])
    log_p = torch.stack([each.float().log_softmax(1) for each in logits])
    log_q = log_p.logsumexp(0) - log(len(logits))
    # Where both are minus infinity there is nothing of either.
    divergence = (log_p.exp() * (log_p - log_q).nan_to_num(nan=0.0)).sum((0, 2)).reshape(size, -1)
    sure = log_q.detach().exp().amax(1).reshape(size, -1)
    counted = torch.ones_like(sure) if valid is None else valid.reshape(size, -1).to(sure.dtype)
    surest = sure if mask == "pixel" else (sure * counted).amax(1, keepdim=True)
    return (divergence * counted * (surest >= rho)).sum(1) / counted.sum(1).clamp(min=1)
