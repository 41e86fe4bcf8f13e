"""Virtual outliers at the border of the data, and what a head is to say of them, for any training loop."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "boundary_points",
    "energy",
    "energy_hinge_loss",
    "neighbour_distances",
    "outlier_candidates",
    "prefix_rows",
    "synthesize_outliers",
    "train_head_on_outliers",
]

_ROWS_AT_ONCE = 1024  # of a matrix of distances


@torch.no_grad()
def neighbour_distances(rows: Tensor, data: Tensor, k: int) -> Tensor:
    r"""Squared distance of each row to its k-th nearest among the data; a row of the data is its own first neighbour.

    Args:
        rows: ``(M, D)``.
        data: ``(N, D)``.
        k: Which neighbour, from 1 on; the farthest where there are fewer than k.

    Returns:
        ``(M,)``, float32 at least.

    Example:
        >>> neighbour_distances(torch.tensor([[0.0], [5.0]]), torch.tensor([[0.0], [2.0], [3.0]]), 2)
        tensor([4., 9.])

    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    k = min(k, len(data))
    with torch.autocast(rows.device.type, enabled=False):
        parts = [
            torch.cdist(part, data.to(wide)).kthvalue(k, dim=1).values.square()
            for part in torch.split(rows.to(wide), _ROWS_AT_ONCE)
        ]
    return torch.cat(parts)


@torch.no_grad()
def boundary_points(features: Tensor, select: int, k: int) -> Tensor:
    r"""The points that are farthest from their k-th nearest neighbour, as directions.

    Args:
        features: ``(N, D)``; their rows are compared at length 1.
        select: How many; all where there are fewer.
        k: Which neighbour, from 1 on; 1 is the point itself.

    Returns:
        Their positions, ``(min(select, N),)`` int64, the farthest first.

    Example:
        >>> cluster = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, -0.1]])
        >>> boundary_points(cluster, select=1, k=2)
        tensor([2])

    """
    directions = F.normalize(features.float(), dim=1)
    return neighbour_distances(directions, directions, k).topk(min(select, len(features))).indices


def outlier_candidates(
    points: Tensor, noise: Tensor, sigma: float | Tensor, candidates: Literal["paper", "released"] = "paper"
) -> Tensor:
    r"""Points around those of the border.

    ``"paper"``: :math:`v = z_b + \sigma \epsilon`, a draw for each point. ``"released"``, as the authors' code does:
    :math:`v = \sigma \epsilon`, the same draws for each point, which itself is left out.

    Args:
        points: The points of the border, ``(S, D)``.
        noise: :math:`\epsilon`, normal: ``(S, M, D)``, or ``(M, D)`` for ``"released"``.
        sigma: A number, or one for each feature ``(D,)``.
        candidates: Which.

    Returns:
        ``(S * M, D)``, those of one point after those of another.

    """
    if candidates == "released":
        return (sigma * noise).repeat(len(points), 1)
    return (points[:, None] + sigma * noise).flatten(0, 1)


@torch.no_grad()
def synthesize_outliers(
    features: Tensor,
    boundary: Tensor,
    noise: Tensor,
    num_kept: int,
    sigma: float = 0.1,
    k: int = 50,
    candidates: Literal["paper", "released"] = "paper",
    feature_noise: Literal["absolute", "relative"] = "absolute",
) -> Tensor:
    r"""Feature vectors outside the data: of the candidates around the border those that are farthest from the data.

    How far a candidate is says its k-th nearest neighbour in the data, both at length 1; the authors' code leaves the
    candidate (``"released"``) at its own length.

    Args:
        features: What the head gets of the data, ``(N, D)``.
        boundary: Positions of the points of the border, ``(S,)``, see :func:`boundary_points`.
        noise: Normal draws, see :func:`outlier_candidates`.
        num_kept: How many outliers are kept, all classes together; the paper keeps 40 for each class.
        sigma: Standard deviation of the noise, above 0.
        k: Which neighbour counts, from 1 on.
        candidates: See :func:`outlier_candidates`.
        feature_noise: Whether sigma is a length (``"absolute"``), or in units of each feature's standard deviation.

    Returns:
        ``(min(num_kept, candidates), D)``, float32, the farthest first.

    """
    data = features.float()
    scale = sigma * data.std(0, correction=0) if feature_noise == "relative" else sigma
    made = outlier_candidates(data[boundary], noise, scale, candidates)
    compared = made if candidates == "released" else F.normalize(made, dim=1)
    distances = neighbour_distances(compared, F.normalize(data, dim=1), k)
    return made[distances.topk(min(num_kept, len(made))).indices]


def energy(logits: Tensor, classes: Tensor | slice | None = None) -> Tensor:
    r"""The energy of each row: the lower, the more the head takes it for one of the classes.

    .. math:: E(z) = -\log \sum_{c \in S} e^{h_c(z)}

    Args:
        logits: h, ``(B, C)``.
        classes: S: positions, a mask ``(C,)``, or a slice. ``None``: all.

    Returns:
        ``(B,)``, float32 at least.

    Example:
        >>> energy(torch.tensor([[0.0, 0.0, 9.0]]), slice(0, 2))
        tensor([-0.6931])

    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if isinstance(classes, Tensor) and classes.dtype == torch.bool:
        return -wide.masked_fill(~classes, -torch.inf).logsumexp(1)  # no count of the classes, so no host sync
    return -(wide if classes is None else wide[:, classes]).logsumexp(1)


def energy_hinge_loss(
    energies: Tensor,
    outlier_energies: Tensor,
    threshold: float | Tensor,
    outlier_threshold: float | Tensor,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    r"""What draws the energy of the data below one threshold, and that of outliers above another.

    .. math:: \overline{\rho\bigl((E(z) - \tau)_+\bigr)} + \overline{\rho\bigl((\tau_o - E(v))_+\bigr)}

    with Huber's :math:`\rho(x) = x^2 / 2` up to 1 and :math:`x - 1/2` beyond.

    Args:
        energies: Of the data, ``(B,)``.
        outlier_energies: Of the outliers, ``(B',)``; an empty one counts 0.
        threshold: :math:`\tau`, which energies of the data are to be below.
        outlier_threshold: :math:`\tau_o`, which energies of outliers are to be above; larger.
        reduction: ``"mean"`` over the data, or ``"none"``. Over the outliers it is always the mean.

    Returns:
        With gradient: a scalar, or ``(B,)``.

    Example:
        >>> energy_hinge_loss(torch.tensor([-14.0]), torch.tensor([-5.0]), threshold=-15.0, outlier_threshold=-3.0)
        tensor(2.)

    """
    inside = F.relu(energies - threshold)
    outside = F.relu(outlier_threshold - outlier_energies)
    loss = F.huber_loss(inside, torch.zeros_like(inside), reduction=reduction)
    return loss + F.huber_loss(outside, torch.zeros_like(outside)) if len(outside) else loss


def train_head_on_outliers(
    head: nn.Module,
    features: Tensor,
    labels: Tensor,
    classes: Tensor | None = None,
    epochs: int = 10,
    batch_size: int = 128,
    lr: float = 1e-3,
    weight: float = 0.1,
    threshold: float = -15.0,
    outlier_threshold: float = -3.0,
    sigma: float = 0.1,
    k: int = 50,
    select: int = 50,
    sample_from: int = 600,
    per_class: int = 40,
    candidates: Literal["paper", "released"] = "paper",
    feature_noise: Literal["absolute", "relative"] = "absolute",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Trains a head after the training of a task, on what it gets of the data and on outliers around that.

    What :class:`VirtualOutliers` does in the last epochs of a fit, for any loop and after it: the cross-entropy over
    the task's classes plus ``weight`` times the hinges of :func:`energy_hinge_loss`, with Adam and a rate that falls
    along a cosine. Outliers are new in each epoch, and each batch has its share of them.

    Args:
        head: Linear layer from ``(B, D)`` to logits ``(B, C)``, on the device of the features; trained in place.
        features: What it gets of the task's data, ``(N, D)``, in evaluation mode.
        labels: ``(N,)``, of ``classes``.
        classes: The task's classes, int64; rows of others get no gradient. ``None``: those of ``labels``.
        epochs: At least 1. Paper: 10 for ImageNet-R, 4 for CIFAR-100.
        batch_size: Paper: 128.
        lr: Learning rate of the first step. Paper: 1e-3.
        weight: Of the hinges, at least 0. Paper: 0.1.
        threshold: See :func:`energy_hinge_loss`. Paper: -15.
        outlier_threshold: Likewise. Paper: -3.
        sigma: See :func:`synthesize_outliers`. Paper: 0.1.
        k: Likewise. Paper: 50.
        select: See :func:`boundary_points`. Paper: 50.
        sample_from: Candidates for each of these points. Paper: 600.
        per_class: Outliers for each class. Paper: 40.
        candidates: See :func:`outlier_candidates`.
        feature_noise: See :func:`synthesize_outliers`.
        generator: On the device of the features. ``None``: the global one.

    Returns:
        The mean loss of each epoch, ``(epochs,)``.

    Example:
        >>> features, labels = torch.randn(20, 4), torch.arange(20) % 2
        >>> train_head_on_outliers(torch.nn.Linear(4, 2), features, labels, epochs=2, k=3, select=4).shape
        torch.Size([2])

    """
    data, device = features.detach(), features.device
    classes = torch.unique(labels) if classes is None else classes.to(device)
    border = boundary_points(data, select, k)
    optimizer = torch.optim.Adam(head.parameters(), lr)
    batches = -(-len(data) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    means = data.new_zeros(epochs, dtype=torch.float32)
    for epoch in range(epochs):
        copies = () if candidates == "released" else (len(border),)
        noise = torch.randn(*copies, sample_from, data.shape[1], generator=generator, device=device)
        kept = per_class * len(classes)
        made = synthesize_outliers(data, border, noise, kept, sigma, k, candidates, feature_noise).to(data.dtype)
        order = torch.randperm(len(data), generator=generator, device=device)
        for rows, outliers in zip(order.tensor_split(batches), made.tensor_split(batches), strict=True):
            logits = head(data[rows])
            others = torch.ones(logits.shape[1], dtype=torch.bool, device=device).index_fill(0, classes, value=False)
            loss = F.cross_entropy(logits.masked_fill(others, -torch.inf), labels[rows])
            energies, outside = energy(logits, classes), energy(head(outliers), classes)
            loss = loss + weight * energy_hinge_loss(energies, outside, threshold, outlier_threshold)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch's
            optimizer.step()
            schedule.step()
            means[epoch] += loss.detach() * len(rows) / len(data)
    return means


def prefix_rows(rows: Tensor, prefix: Tensor) -> Tensor:
    """Puts learned rows in the place of the first ones of each sample: keys or values of a prompt.

    Args:
        rows: ``(B, T, D)``, of which the first are placeholders.
        prefix: ``(P, D)``, the same for all samples; with gradient.

    Returns:
        ``(B, T, D)``, in the precision of ``rows``.

    Example:
        >>> prefix_rows(torch.zeros(1, 3, 1), torch.ones(2, 1))[0, :, 0]
        tensor([1., 1., 0.])

    """
    return torch.cat([prefix.to(rows.dtype).expand(len(rows), -1, -1), rows[:, len(prefix) :]], dim=1)
