"""Random subsets of candidates, labels that a teacher bends within bounds, and scores of the best candidates again."""

from collections.abc import Callable, Mapping, Sequence
from math import floor
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "best_candidates",
    "candidate_subset",
    "clamped_soft_labels",
    "masked_classes",
    "positions_in_subset",
    "refinement_loss",
    "subset_size",
    "take",
    "teacher_momentum",
    "top_candidates",
]

Inputs = TypeVar("Inputs")


def candidate_subset(
    size: int, keep: float, generator: torch.Generator | None = None, always: Tensor | None = None
) -> Tensor:
    r"""Positions of the candidates that one training step sees, the first of a random order.

    .. math:: I = \{\pi_1, \dots, \pi_{\lfloor \kappa L \rfloor}\}, \qquad \pi \text{ a random permutation of } L

    Args:
        size: L, number of candidates, at least 1.
        keep: :math:`\kappa`, the share that is kept, in (0, 1].
        generator: Source of the permutation, on the CPU; ``None`` for torch's own.
        always: Positions of candidates that stay whatever is drawn, in any shape, on any device; a candidate may stand
            there several times. Negative ones name none. At most as many as are kept.

    Returns:
        Positions in rising order, ``(floor(keep * L),)`` and never empty, on the device of ``always``, else on the CPU.

    Example:
        >>> candidate_subset(8, 0.5, torch.Generator().manual_seed(0), always=torch.tensor([7])).tolist()
        [0, 3, 4, 7]

    """
    count, order = subset_size(size, keep), torch.randperm(size, generator=generator)
    if always is None:
        return order[:count].sort().values
    place = torch.empty_like(order).scatter_(0, order, torch.arange(size)).to(always.device, non_blocking=True)
    wanted = always.flatten().long()
    # One place more than there are candidates, for what names none.
    place = torch.cat([place, place.new_zeros(1)]).index_fill(0, torch.where(wanted < 0, size, wanted), -1)[:size]
    return place.topk(count, largest=False).indices.sort().values


def clamped_soft_labels(labels: Tensor, predicted: Tensor, delta: float = 0.15) -> Tensor:
    r"""Labels that a teacher's prediction bends, by no more than a bound.

    .. math:: y' = y + \operatorname{clamp}(p_T - y,\ -\delta,\ \delta)

    Args:
        labels: y: probabilities in [0, 1], or targets of a regression.
        predicted: :math:`p_T` in the same shape: the teacher's probabilities, or its predictions.
        delta: :math:`\delta`, at least 0. 0: the labels; 1 or more: the teacher's probabilities. Paper: 0.15 for
            probabilities, 1 for metres and radians.

    Returns:
        Soft labels in the shape of the labels, without gradient.

    Example:
        >>> clamped_soft_labels(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.2, 0.1, 0.9]))
        tensor([0.8500, 0.1000, 0.1500])

    """
    wide = torch.promote_types(labels.dtype, torch.float32)
    y, p = labels.detach().to(wide), predicted.detach().to(wide)
    return y + (p - y).clamp(-delta, delta)


def take(
    entries: Mapping[str, Tensor], axes: Mapping[str, int], indices: Tensor, normalise: Sequence[str] = ()
) -> dict[str, Tensor]:
    """The same candidates of several tensors, each along its own axis.

    Args:
        entries: Tensors by name.
        axes: Which axis of each the candidates lie along; what is not named here stays as it is.
        indices: Positions of the candidates.
        normalise: Names of distributions over the candidates, which sum to 1 again over those that are left. One
            that has nothing left there is even.

    Returns:
        New tensors by the same names.

    Example:
        >>> taken = take({"target": torch.tensor([[0.5, 0.25, 0.25]])}, {"target": 1}, torch.tensor([1, 2]), ["target"])
        >>> taken["target"]
        tensor([[0.5000, 0.5000]])

    """
    taken = dict(entries)
    for name, axis in axes.items():
        kept = taken[name].index_select(axis, indices.to(taken[name].device, non_blocking=True))
        if name in normalise:
            total = kept.sum(axis, keepdim=True)
            kept = torch.where(total > 0, kept / torch.where(total > 0, total, 1), 1 / kept.shape[axis])
        taken[name] = kept
    return taken


def masked_classes(logits: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
    """Logits with the classes left out that were not drawn, but for the one that is asked for.

    Args:
        logits: ``(B, C, ...)``, or ``(C,)`` of one sample.
        labels: Class of each position, ``(B, ...)`` or ``()``; others than 0 to C - 1 ask for none.
        kept: Positions of the classes that stay everywhere.

    Returns:
        In the same shape, minus infinity where a class is left out.

    Example:
        >>> masked_classes(torch.zeros(1, 4), torch.tensor([3]), torch.tensor([0]))
        tensor([[0., -inf, -inf, 0.]])

    """
    axis = min(logits.dim() - 1, 1)
    shape = [1] * logits.dim()
    shape[axis] = classes = logits.shape[axis]
    left_out = torch.ones(classes, dtype=torch.bool, device=logits.device).index_fill(0, kept.to(logits.device), False)
    known = (labels >= 0) & (labels < classes)
    own = labels.clamp(0, classes - 1).unsqueeze(axis)
    left_out = left_out.reshape(shape).expand(logits.shape)
    left_out = left_out.scatter(axis, own, left_out.gather(axis, own) & ~known.unsqueeze(axis))
    return logits.masked_fill(left_out, -torch.inf)


def top_candidates(scores: Tensor, k: int, among: Tensor | None = None) -> Tensor:
    """Positions of the best candidates of each sample, best first.

    Args:
        scores: Coarse scores ``(B, L)``.
        k: How many, from 1 to L.
        among: Where the L candidates stand in a larger set, ``(L,)`` or ``(B, L)``: the indices of a subset that was
            drawn, or of an earlier choice. ``None``: they are the set.

    Returns:
        Positions in the whole set ``(B, k)``, without gradient.

    Example:
        >>> top_candidates(torch.tensor([[0.1, 0.9, 0.5]]), 2, among=torch.tensor([10, 20, 30]))
        tensor([[20, 30]])

    """
    best = scores.detach().topk(k, dim=1).indices
    return best if among is None else among.to(best.device).expand(scores.shape).gather(1, best)


@torch.no_grad()
def best_candidates(
    score: Callable[[Inputs, Tensor], Tensor],
    inputs: Inputs,
    candidates: Tensor,
    proposals: Callable[[Inputs], Tensor] | None = None,
    k: int = 1,
) -> Tensor:
    """The candidates that a scorer likes best, of its set and of further ones that are proposed for each sample.

    Args:
        score: The trained scorer, in evaluation mode: gives scores ``(B, n)`` from the inputs and n candidates,
            ``(n, ...)``, or ``(B, n, ...)`` where there are proposals.
        inputs: What it scores candidates for, of B samples.
        candidates: The set ``(L, ...)``, or another one than that of training.
        proposals: Gives N further candidates for each sample, ``(B, N, ...)``, from the inputs; a diffusion model of
            good ones, such as the paper's of trajectories. ``None``: the set alone.
        k: How many, from 1 to L + N.

    Returns:
        The candidates themselves, ``(B, k, ...)``, best first, without gradient.

    Raises:
        ValueError: If proposals are not of the candidates' shape.

    Example:
        >>> near = lambda goal, candidates: -(candidates - goal).abs()
        >>> best_candidates(near, torch.tensor([[4.0]]), torch.arange(3.0), proposals=lambda goal: goal + 0.5, k=2)
        tensor([[4.5000, 2.0000]])

    """
    if proposals is None:
        return candidates[top_candidates(score(inputs, candidates), k)]
    further = proposals(inputs)
    if further.dim() != candidates.dim() + 1 or further.shape[2:] != candidates.shape[1:]:
        raise ValueError(
            f"best_candidates: `proposals` must give (B, N, ...) for candidates {tuple(candidates.shape)}, got"
            f" {tuple(further.shape)}."
        )
    offered = torch.cat([candidates.expand(len(further), *candidates.shape), further.to(candidates)], 1)
    best = top_candidates(score(inputs, offered), k)
    return offered[torch.arange(len(best), device=best.device)[:, None], best]


def refinement_loss(
    scores: Sequence[Tensor],
    targets: Tensor,
    indices: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor] = F.binary_cross_entropy_with_logits,
) -> Tensor:
    r"""Loss of the chosen candidates' scores, the same one at every layer of a decoder that refines them.

    .. math:: \sum_{l} \ell\bigl(z^l,\ y_{b, I_b}\bigr)

    Args:
        scores: What the layers give the chosen candidates, ``(B, k)`` of each.
        targets: Targets of all candidates ``(B, L)``.
        indices: Which candidates were chosen, ``(B, k)``, as :func:`top_candidates` returns them.
        loss: Value from scores and targets of the chosen.

    Returns:
        Sum over the layers, a scalar.

    Example:
        >>> refinement_loss([torch.zeros(1, 2)] * 3, torch.eye(4)[:1], torch.tensor([[0, 2]]))
        tensor(2.0794)

    """
    chosen = targets.gather(1, indices)
    return torch.stack([loss(layer, chosen.to(layer.dtype)) for layer in scores]).sum()


def positions_in_subset(positions: Tensor, indices: Tensor, size: int) -> Tensor:
    """Positions in the whole set as positions in a subset.

    Args:
        positions: Positions of candidates, in any shape; negative ones are left as they are.
        indices: The subset.
        size: Number of all candidates.

    Returns:
        In the same shape and type; -1 for a candidate that is not in the subset.

    Example:
        >>> positions_in_subset(torch.tensor([7, 3, -100]), torch.tensor([3, 7]), size=8)
        tensor([   1,    0, -100])

    """
    there = indices.to(positions.device)
    place = torch.full((size,), -1, dtype=positions.dtype, device=positions.device)
    place = place.index_copy(0, there, torch.arange(len(there), dtype=positions.dtype, device=positions.device))
    return torch.where(positions < 0, positions, place[positions.clamp(min=0).long()])


def subset_size(size: int, keep: float) -> int:
    """How many of ``size`` candidates are kept: ``floor(keep * size)``, at least 1.

    Args:
        size: L.
        keep: The share, in (0, 1].

    Returns:
        The number, the same in every step.

    Example:
        >>> subset_size(16384, 0.5)
        8192

    """
    return max(floor(keep * size + 1e-9), 1)  # 0.29 * 100 is a little below 29


def teacher_momentum(
    epoch: int, start: float = 0.992, end: float = 0.998, epochs: int = 3, copy_epochs: int = 0
) -> float:
    r"""How much a teacher keeps of itself at the optimizer steps of an epoch.

    .. math:: \bar\theta \leftarrow m_e\,\bar\theta + (1 - m_e)\,\theta, \qquad m_e = m_0 + (m_1 - m_0)\,\min(e / E, 1)

    Args:
        epoch: Epochs finished.
        start: :math:`m_0`, of the first epoch, in [0, 1].
        end: :math:`m_1`, in [0, 1].
        epochs: E, epochs until then, at least 1.
        copy_epochs: Epochs before all of these in which the teacher is a copy of the network, m = 0.

    Returns:
        The momentum.

    Example:
        >>> [round(teacher_momentum(epoch), 3) for epoch in range(5)]
        [0.992, 0.994, 0.996, 0.998, 0.998]

    """
    since = epoch - copy_epochs
    return 0.0 if since < 0 else start + (end - start) * min(since / epochs, 1.0)
