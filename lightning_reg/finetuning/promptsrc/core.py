"""How far a network is from the frozen one it began as, in features and in logits, and the mean over phrasings."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["class_template_mean", "feature_l1", "harmonic_mean", "logit_agreement", "prompted_tokens"]


def feature_l1(features: Tensor, frozen: Tensor, normalize: bool = True) -> Tensor:
    r"""Mean absolute difference of features from those of the frozen network.

    .. math:: \frac{1}{B D} \sum_{b,d} \lvert \hat f_{bd} - \hat f^0_{bd} \rvert

    The mean goes over the D numbers of a row too: of unit rows it becomes smaller as :math:`1 / \sqrt D`.

    Args:
        features: ``(B, ..., D)``.
        frozen: Those of the frozen network, the same shape; no gradient flows into them.
        normalize: Whether rows are brought to length 1 first, as the paper has them.

    Returns:
        A scalar, float32 (float64 for such features).

    Example:
        >>> feature_l1(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor(1.)

    """
    one, other = (rows.to(torch.promote_types(rows.dtype, torch.float32)) for rows in (features, frozen.detach()))
    if normalize:
        one, other = F.normalize(one, dim=-1), F.normalize(other, dim=-1)
    return (one - other).abs().mean()


def logit_agreement(
    logits: Tensor, frozen_logits: Tensor, reduction: Literal["numel", "batchmean"] = "numel"
) -> Tensor:
    r"""Kullback-Leibler divergence of the predicted probabilities from those of the frozen network.

    .. math:: \frac{1}{B C} \sum_b \operatorname{KL}\bigl(\operatorname{softmax}(l^0_b)
        \,\Vert\, \operatorname{softmax}(l_b)\bigr)

    The frozen network's distribution is the target.

    Args:
        logits: ``(B, C)``.
        frozen_logits: ``(B, C)``; no gradient flows into them.
        reduction: ``"numel"`` divides by B C, as the authors' code does; ``"batchmean"`` by B.

    Returns:
        A scalar, float32 (float64 for such logits).

    Example:
        >>> logit_agreement(torch.zeros(1, 2), torch.tensor([[100.0, 0.0]]))
        tensor(0.3466)

    """
    ours, theirs = (
        rows.to(torch.promote_types(rows.dtype, torch.float32)).log_softmax(1)
        for rows in (logits, frozen_logits.detach())
    )
    total = F.kl_div(ours, theirs, reduction="sum", log_target=True)
    return total / max(logits.numel() if reduction == "numel" else len(logits), 1)


def class_template_mean(features: Tensor) -> Tensor:
    r"""The text feature of each class as the mean over several phrasings of its name.

    .. math:: g_c = \frac{m_c}{\lVert m_c \rVert}, \qquad m_c = \frac1N \sum_n e_{nc}

    Features are averaged as the text tower gives them and brought to length 1 afterwards, once.

    Args:
        features: :math:`e`, ``(N, C, D)``: N phrasings of C names.

    Returns:
        ``(C, D)``, rows of length 1, float32 (float64 for such features).

    Example:
        >>> class_template_mean(torch.tensor([[[3.0, 0.0]], [[0.0, 1.0]]]))
        tensor([[0.9487, 0.3162]])

    """
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)).mean(0), dim=-1)


def prompted_tokens(tokens: Tensor, prompts: Tensor, start: int | None = None, dim: int = 1) -> Tensor:
    """Tokens of which some are prompts, the same ones in every row.

    Args:
        tokens: ``(B, T, D)``, or ``(T, B, D)`` with ``dim=0``.
        prompts: ``(n, D)``, cast to the type of ``tokens``.
        start: Position of the token that the first prompt takes the place of, counted from the end if negative;
            ``None`` to append the prompts.
        dim: The dimension of the tokens.

    Returns:
        With T tokens, or T + n where they are appended; a new tensor.

    Example:
        >>> prompted_tokens(torch.zeros(1, 4, 1), torch.ones(2, 1), start=1)[0, :, 0]
        tensor([0., 1., 1., 0.])

    """
    count, length = len(prompts), tokens.shape[dim]
    own = prompts.to(tokens).unsqueeze(1 - dim)
    own = own.expand(*(count if d == dim else size for d, size in enumerate(tokens.shape)))
    if start is None:
        return torch.cat([tokens, own], dim)
    first = start if start >= 0 else length + start
    after = first + count
    return torch.cat([tokens.narrow(dim, 0, first), own, tokens.narrow(dim, after, length - after)], dim)


def harmonic_mean(base: Tensor, novel: Tensor) -> Tensor:
    r"""Harmonic mean of two accuracies, :math:`2 b n / (b + n)`; 0 where one is 0.

    Args:
        base: At least 0.
        novel: At least 0, of a shape that broadcasts.

    Returns:
        In the same units.

    Example:
        >>> harmonic_mean(torch.tensor(0.5), torch.tensor(1.0))
        tensor(0.6667)

    """
    both = base + novel
    return torch.where(both == 0, both, 2 * base * novel / torch.where(both == 0, 1.0, both))
