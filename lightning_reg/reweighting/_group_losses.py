"""The formulas by which groups of samples count by their losses."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_reg.engine.host.distributed import all_reduce_sum

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["group_ascent", "group_draws", "group_losses", "group_sample_weights", "worst_group_weights"]


def group_losses(losses: Tensor, membership: Tensor, group: "ProcessGroup | None" = None) -> tuple[Tensor, Tensor]:
    r"""Mean loss of each group, :math:`L_g = \frac{1}{n_g} \sum_{i \in g} \ell_i`.

    Args:
        losses: Losses of the samples, ``(B,)``.
        membership: ``(B, G)``, 1 where a sample is in a group and 0 elsewhere; groups may overlap.
        group: Ranks whose samples count too, for one collective without gradient; ``None``: these are all.

    Returns:
        Means ``(G,)``, 0 for a group without samples, and numbers of samples ``(G,)``.

    Example:
        >>> group_losses(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
        (tensor([2., 5.]), tensor([2., 1.]))

    """
    sums, counts = losses @ membership, membership.sum(0)
    if group is not None:
        sums, counts = all_reduce_sum(torch.stack([sums, counts]), group)
    return sums / counts.clamp(min=1), counts


def group_ascent(log_weights: Tensor, losses: Tensor, present: Tensor, eta: float) -> Tensor:
    r"""The weights of the groups after a step of exponentiated gradient ascent (algorithm 1).

    .. math:: q_g \leftarrow \frac{q_g \exp(\eta L_g)}{\sum_{g'} q_{g'} \exp(\eta L_{g'})}

    Args:
        log_weights: :math:`\log q`, ``(G,)``.
        losses: Losses of the groups, adjusted or not, ``(G,)``.
        present: bool ``(G,)``; the others keep their weight before all are normalized.
        eta: Step.

    Returns:
        :math:`\log q` afterwards, ``(G,)``.

    Example:
        >>> present = torch.tensor([True, True])
        >>> group_ascent(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.0, 1.0]), present, eta=1.0).exp()
        tensor([0.2689, 0.7311])

    """
    return torch.log_softmax(log_weights + eta * torch.where(present, losses, 0.0), 0)


def worst_group_weights(losses: Tensor, present: Tensor) -> Tensor:
    """Weights ``(G,)``: 1 for the present group with the largest loss, 0 for all others.

    Args:
        losses: Losses of the groups, adjusted or not, ``(G,)``.
        present: bool ``(G,)``, which groups are asked; of equal ones it is the first.

    Returns:
        The weights; all 0 where no group is present.

    """
    weights = torch.zeros_like(losses)
    worst = torch.where(present, losses, -torch.inf).argmax(0, keepdim=True)
    return weights.scatter(0, worst, 1.0) * present


def group_sample_weights(membership: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    r"""What each sample's loss counts in :math:`\sum_g q_g L_g`.

    .. math:: w_i = \sum_{g \ni i} q_g / n_g

    Args:
        membership: ``(B, G)``.
        weights: :math:`q`, ``(G,)``.
        counts: Numbers of samples of the groups, over all ranks, ``(G,)``.

    Returns:
        ``(B,)``.

    """
    return membership @ (weights / counts.clamp(min=1))


def group_draws(membership: Tensor, count: int, generator: torch.Generator) -> Tensor:
    r"""Samples drawn with replacement so that each group comes as often: a group first, then one of its samples.

    A sample is drawn with probability :math:`\frac1G \sum_{g \ni i} 1 / n_g`; for groups that do not overlap that is a
    ``WeightedRandomSampler`` whose weights are :math:`1 / n_g`.

    Args:
        membership: ``(N, G)``, 1 where a sample is in a group and 0 elsewhere.
        count: How many are drawn.
        generator: Draws, on the CPU.

    Returns:
        Positions ``(count,)`` on the CPU; a sample of no group is not drawn.

    Raises:
        ValueError: If a group is empty.

    Example:
        >>> membership = torch.tensor([[1.0, 0.0]] * 98 + [[0.0, 1.0]] * 2)
        >>> drawn = group_draws(membership, 100, torch.Generator().manual_seed(0))
        >>> int((drawn >= 98).sum())
        56

    """
    group, sample = membership.cpu().T.nonzero(as_tuple=True)  # sample by sample within each group
    sizes = group.bincount(minlength=membership.shape[1])
    if not sizes.all():
        raise ValueError(f"group {int((sizes == 0).nonzero()[0])} has no sample to draw")
    drawn = torch.randint(len(sizes), (count,), generator=generator)
    places = (torch.rand(count, generator=generator, dtype=torch.float64) * sizes[drawn]).long()
    starts = sizes.cumsum(0) - sizes
    return sample[starts[drawn] + places]
