"""The formulas of rich feature construction, for any training loop."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["mean_head_", "rich_groups", "round_losses", "synthesis_draws"]


def rich_groups(correct: Tensor) -> Tensor:
    r"""The groups of the next round: what each earlier network got right, and what it got wrong.

    .. math:: G_r^1 = \{i : f_r(x_i) = y_i\}, \qquad G_r^0 = \{i : f_r(x_i) \ne y_i\}

    Args:
        correct: Whether each of R networks classifies each of N samples as labelled, bool ``(R, N)``.

    Returns:
        Membership ``(N, 2 R)`` bool, in the order right, wrong for one network after the other; those of one network
        share all samples among them, and those of different networks overlap.

    Example:
        >>> rich_groups(torch.tensor([[True, True, False]])).T
        tensor([[ True,  True, False],
                [False, False,  True]])

    """
    return torch.stack([correct, ~correct], 1).flatten(0, 1).T


def synthesis_draws(
    correct: Tensor, generator: torch.Generator, balance: Literal["agree", "all_right"] = "agree"
) -> Tensor:
    """Samples on which the networks are distilled: half of them those on which the networks differ.

    Args:
        correct: Whether each network classifies each sample as labelled, bool ``(R, N)``.
        generator: Draws, on the CPU.
        balance: What the other half is of: ``"agree"``, samples that all networks get right or all get wrong;
            ``"all_right"``, those that all get right, so that the first half is of all others.

    Returns:
        Positions ``(2 (N // 2),)`` on the CPU, drawn with replacement, in random order.

    Raises:
        ValueError: If one of the halves has no sample to draw.

    Example:
        >>> correct = torch.tensor([[True] * 9 + [False], [True] * 10])
        >>> drawn = synthesis_draws(correct, torch.Generator().manual_seed(0))
        >>> int((drawn == 9).sum())
        5

    """
    alike = correct.all(0)
    if balance == "agree":
        alike = alike | (~correct).all(0)
    halves = alike.nonzero().flatten().cpu(), (~alike).nonzero().flatten().cpu()
    if not all(len(half) for half in halves):
        raise ValueError(f"the networks {'agree on no sample' if not len(halves[0]) else 'agree on all samples'}")
    count = correct.shape[1] // 2
    drawn = torch.cat([half[torch.randint(len(half), (count,), generator=generator)] for half in halves])
    return drawn[torch.randperm(len(drawn), generator=generator)]


def round_losses(logits: Sequence[Tensor], predictions: Tensor) -> Tensor:
    r"""What the heads of one network lose of what each network predicts.

    .. math:: \frac1R \sum_r \operatorname{CE}(h_r(\varphi(x_i)), \hat y_r(x_i))

    Args:
        logits: What each of R heads makes of the shared features, ``(B, C)``.
        predictions: Class that each network predicts, ``(B, R)`` int64.

    Returns:
        A loss for each sample, ``(B,)``.

    """
    each = [F.cross_entropy(one, predictions[:, r], reduction="none") for r, one in enumerate(logits)]
    return torch.stack(each).mean(0)


@torch.no_grad()
def mean_head_(head: nn.Linear, heads: Sequence[nn.Linear]) -> None:
    """Gives a head the mean of the weights and of the biases of others, in place.

    Args:
        head: The head, with a bias if the others have one.
        heads: The others, of the same size.

    """
    for name in ("weight", "bias"):
        if (given := getattr(head, name)) is not None:
            given.copy_(torch.stack([getattr(one, name) for one in heads]).mean(0))
