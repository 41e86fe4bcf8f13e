"""Two views of an item, each with a part of its features, and the loss by which they are to find each other."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_reg.engine.loss.contrastive import info_nce, unit_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "complementary_views",
    "correlated_features",
    "item_ssl_loss",
    "mutual_information",
    "popularity_slices",
]


def item_ssl_loss(
    views: Tensor,
    others: Tensor,
    temperature: float = 0.1,
    *,
    ids: Tensor | None = None,
    group: "ProcessGroup | None" = None,
    capacity: int | None = None,
) -> Tensor:
    r"""Each item is to be found by its second view among the second views of all items.

    .. math:: -\frac1N \sum_i \log \frac{e^{\hat z_i \cdot \hat z'_i / \tau}}{\sum_j e^{\hat z_i \cdot \hat z'_j /
        \tau}}

    Args:
        views: z, embeddings of the first views ``(N, D)``.
        others: z', those of the second views of the same items, ``(N, D)``.
        temperature: :math:`\tau`, above 0.
        ids: Whole numbers ``(N,)``: items with the same are not to be told apart, and the sum over j leaves them out.
            ``None``: all are different.
        group: Ranks whose second views take part; the mean over the ranks is the loss of all items.
        capacity: Most items that a rank can have.

    Returns:
        A scalar, float32 at least. With both views the same it spreads the items out.

    Example:
        >>> rows = torch.eye(4)
        >>> bool(torch.isclose(item_ssl_loss(rows, rows, 1.0), torch.tensor(1 + 3 * torch.e**-1).log()))
        True

    """
    wide = torch.promote_types(views.dtype, torch.float32)
    with torch.autocast(views.device.type, enabled=False):  # exp(1 / 0.07) is beyond float16
        return info_nce(unit_rows(views.to(wide)), unit_rows(others.to(wide)), temperature, group, capacity, ids)


def mutual_information(features: Tensor, fields: Tensor | None = None) -> Tensor:
    r"""How much one feature says about another, over a table of items.

    .. math:: I(V_i, V_j) = \sum_{a,b} p(a, b) \log \frac{p(a, b)}{p(a)\, p(b)}

    Args:
        features: Category numbers ``(N, columns)``.
        fields: The field of each column, from 0 without gaps, ``(columns,)``: the columns of a field with several
            values count as one joint category, whatever their order. ``None``: each column is a field.

    Returns:
        Nats, float64, ``(k, k)``; on the diagonal the entropy.

    Example:
        >>> mutual_information(torch.tensor([[0, 0, 0], [1, 1, 0], [0, 0, 1], [1, 1, 1]]))[0].round(decimals=3).tolist()
        [0.693, 0.693, 0.0]

    """
    fields = torch.arange(features.shape[1]) if fields is None else fields
    groups = [features[:, fields == k] for k in range(int(fields.max()) + 1)]
    columns = [torch.unique(group.sort(1).values, dim=0, return_inverse=True)[1] for group in groups]
    counts = [int(column.max()) + 1 for column in columns]
    found = torch.zeros(len(columns), len(columns), dtype=torch.float64)
    for i, one in enumerate(columns):
        for j, two in enumerate(columns[: i + 1]):
            # Of pairs that occur: a table of all, as of two columns of ids, may be larger than the data.
            pairs, joint = torch.unique(one * counts[j] + two, return_counts=True)
            p = joint.double() / len(features)
            p_one = one.bincount().double()[pairs // counts[j]] / len(features)
            p_two = two.bincount().double()[pairs % counts[j]] / len(features)
            found[i, j] = found[j, i] = (p * (p / (p_one * p_two)).log()).sum()
    return found


def correlated_features(information: Tensor, seed: int, count: int) -> Tensor:
    """A feature and those that say most about it.

    Args:
        information: ``(k, k)``, as by :func:`mutual_information`.
        seed: The feature.
        count: How many others, below k - 1, so that one is left.

    Returns:
        Which are masked in the first view, and kept in the second, bool ``(k,)``.

    Example:
        >>> correlated_features(torch.tensor([[1.0, 0.2, 0.9], [0.2, 1.0, 0.1], [0.9, 0.1, 1.0]]), 0, 1)
        tensor([ True, False,  True])

    """
    others = information[seed].clone()
    others[seed] = -torch.inf
    masked = torch.zeros(len(others), dtype=torch.bool)
    masked[others.topk(count).indices] = True
    masked[seed] = True
    return masked


def complementary_views(features: Tensor, masked: Tensor, missing: Tensor) -> tuple[Tensor, Tensor]:
    """Two views of each item without common features.

    Args:
        features: Category numbers ``(N, columns)``.
        masked: Which columns the first view lacks, and the second has alone, bool ``(columns,)`` or as ``features``.
        missing: The category that stands for a masked one, ``(columns,)`` or a scalar.

    Returns:
        The views, each as ``features``.

    Example:
        >>> complementary_views(torch.tensor([[3, 4]]), torch.tensor([True, False]), torch.tensor(0))
        (tensor([[0, 4]]), tensor([[3, 0]]))

    """
    return torch.where(masked, missing, features), torch.where(masked, features, missing)


def popularity_slices(counts: Tensor, share: float = 0.5) -> Tensor:
    """Which items are popular: the fewest that have a share of all interactions; the others are the tail.

    Args:
        counts: Interactions of each item ``(N,)``.
        share: Of all interactions, in (0, 1].

    Returns:
        Bool ``(N,)``.

    Example:
        >>> popularity_slices(torch.tensor([1, 8, 1, 5]), share=0.6)
        tensor([False,  True, False,  True])

    """
    order = counts.argsort(descending=True, stable=True)
    before = counts[order].double().cumsum(0) - counts[order].double()
    popular = torch.zeros(len(counts), dtype=torch.bool, device=counts.device)
    popular[order] = before < share * counts.sum().double()
    return popular
