"""The formulas of nested dropout, for any training loop."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["best_prefix", "keep_prefix", "prefix_correct", "prefix_logits", "prefix_probabilities"]

_ELEMENTS = 1 << 24  # of the logits for several lengths that are held at a time


def prefix_probabilities(size: int, eta: float, mu: float = 0.0) -> Tensor:
    r"""How probable it is that the first ``k`` of ``size`` features are kept, k = 1 ... size.

    .. math:: P(k) = \frac{e^{-((k - \mu) / \eta)^2}}{\sum_{i=1}^{D} e^{-((i - \mu) / \eta)^2}}

    There is no factor 1/2 in the exponent, so the standard deviation of the whole bell is :math:`\eta / \sqrt 2`.

    Args:
        size: Number of features D.
        eta: Width, above 0.
        mu: Where the most probable length lies.

    Returns:
        ``(D,)``, float64.

    Example:
        >>> prefix_probabilities(3, 2.0)
        tensor([0.6220, 0.2938, 0.0842], dtype=torch.float64)

    """
    lengths = torch.arange(1, size + 1, dtype=torch.float64)
    return torch.softmax(-(((lengths - mu) / eta) ** 2), 0)


def keep_prefix(features: Tensor, k: int) -> Tensor:
    """Features of which the first ``k`` are as they were and the others 0; nothing is rescaled.

    Args:
        features: ``(..., D)``.
        k: From 1 to D.

    Returns:
        ``(..., D)``; the features themselves where all are kept.

    """
    size = features.shape[-1]
    return features if k >= size else F.pad(features[..., :k], (0, size - k))


def prefix_logits(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What a linear classifier makes of the first 1, 2, ..., D features.

    Args:
        features: ``(B, D)``.
        weight: ``(C, D)``, as ``nn.Linear`` has it.
        bias: ``(C,)``, which counts once.

    Returns:
        ``(B, D, C)``; the last along D are the classifier's own logits.

    """
    logits = (features[:, :, None] * weight.T).cumsum(1)
    return logits if bias is None else logits + bias


def prefix_correct(features: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None) -> Tensor:
    """How many samples are classified correctly by the first 1, 2, ..., D features; in little memory.

    Args:
        features: ``(B, D)``.
        weight: ``(C, D)``.
        labels: ``(B,)`` class indices; samples with a negative one do not count.
        bias: ``(C,)``.

    Returns:
        ``(D,)`` int64.

    """
    features, weight = features.float(), weight.float()
    before = (
        features.new_zeros(len(features), 1, len(weight)) if bias is None else bias.float().expand(len(features), 1, -1)
    )
    counts = []
    size = max(1, _ELEMENTS // max(1, len(features) * len(weight)))
    for start in range(0, features.shape[1], size):
        part = slice(start, start + size)
        logits = before + prefix_logits(features[:, part], weight[:, part])
        counts.append((logits.argmax(2) == labels[:, None]).sum(0))
        before = logits[:, -1:]
    return torch.cat(counts)


def best_prefix(accuracies: Tensor, penalty: float = 1e-5) -> int:
    r"""The number of features to keep: :math:`\arg\max_K\ \text{acc}(K) - \text{penalty} \cdot (K - 1)`.

    Args:
        accuracies: ``(D,)``, by the first 1, 2, ..., D features.
        penalty: What a feature must add, at least 0.

    Returns:
        From 1 to D; the smallest of those that are as good.

    Example:
        >>> best_prefix(torch.tensor([0.5, 0.9, 0.9]))
        2

    """
    accuracies = accuracies.double()
    return 1 + int((accuracies - penalty * torch.arange(len(accuracies), device=accuracies.device)).argmax())
