"""ConR's loss: which rows attract and repel one another, and what follows; weights of rare labels."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_reg.engine.data.numbers import numbers
from lightning_reg.engine.loss.contrastive import contrastive_losses, rows_of_ranks, unit_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["conr_loss", "inverse_density_weights", "label_distance", "pair_masks"]

Distance = Callable[[Tensor, Tensor], Tensor]
Push = Literal["exponential", "linear"]


def label_distance(one: Tensor, two: Tensor, kind: Literal["l1", "l2", "max"] = "l1") -> Tensor:
    r"""Distances of labels, which may be vectors.

    Args:
        one: ``(n,)`` or ``(n, K)``.
        two: ``(m,)`` or ``(m, K)``.
        kind: Sum of the absolute differences, root of the sum of their squares, or the largest; the same for numbers.

    Returns:
        ``(n, m)``.

    Example:
        >>> label_distance(torch.tensor([1.0, 4.0]), torch.tensor([2.0]))
        tensor([[1.],
                [2.]])

    """
    one, two = numbers(one), numbers(two)
    if one.shape[1] == 1:
        return (one - two.T).abs()
    p = {"l1": 1.0, "l2": 2.0, "max": math.inf}[kind]
    # The way over a matrix product cancels where labels are close, which is where the window lies.
    return torch.cdist(one, two, p, compute_mode="donot_use_mm_for_euclid_dist")


def conr_loss(
    features: Tensor,
    targets: Tensor,
    predictions: Tensor,
    window: float,
    temperature: float = 0.07,
    eta: float = 0.01,
    weights: Tensor | None = None,
    compat: bool = False,
    push: Push = "exponential",
    distance: Distance = label_distance,
    group: "ProcessGroup | None" = None,
    capacity: int | None = None,
) -> Tensor:
    r"""The contrastive regularizer, without its weight.

    .. math:: \mathcal{L} = \frac1n \sum_{i:\, Q_i \ne \emptyset} \frac{q_i}{|P_i|} \sum_{p \in P_i} -\log
        \frac{e^{s_{ip}}}{\sum_{p' \in P_i} e^{s_{ip'}} + \sum_{j \in Q_i} S_{ij}\, e^{s_{ij}}}, \qquad
        s_{ij} = \frac{z_i \cdot z_j}{t}, \quad S_{ij} = q_i\, e^{\eta\, d(y_i, y_j)}

    Args:
        features: Rows ``(n, ...)``, flattened and normalised to ``z``; the gradient flows through both ends of a pair.
        targets: Labels ``y``, ``(n,)`` or ``(n, K)``.
        predictions: Predictions of the same shape; no gradient flows into them.
        window: Width ``w`` within which labels count as similar, in units of the label, at least 0.
        temperature: ``t``, above 0.
        eta: How fast the push grows with the distance of the labels (``e``), at least 0.
        weights: ``q``, ``(n,)``, above 0, with mean 1; ``None`` for 1.
        compat: Adds ``n - |P_i|`` to the denominator, as the authors' code does by taking exp(0) of masked entries.
        push: ``"linear"`` is what the authors' code does for depth maps: :math:`S_{ij} = q_i\, \eta\, d(y_i, y_j)`, the
            mean over positives is divided by ``|P_i| + 1``, and ``q_i`` does not multiply the row.
        distance: From ``(n, K)`` and ``(m, K)`` to ``(n, m)``.
        group: Ranks whose rows take part too, each with its own; ``None``: these rows are all there are. With ranks,
            the mean over the ranks is the regularizer of all rows, and so is the mean of the gradients.
        capacity: Most rows that a rank of the group can have, see ``all_gather_rows``.

    Returns:
        A scalar, float32 (float64 for such features); exactly 0 where no row has a positive and a negative.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.9, 0.2]])
        >>> conr_loss(features, torch.tensor([1.0, 1.5, 9.0]), torch.tensor([2.0, 8.0, 2.5]), window=1.0)
        tensor(0.2010)

    """
    options = (window, temperature, eta, weights, compat, push, distance, group, capacity)
    return conr_rows(features, targets, predictions, *options).losses.sum()


class Rows(NamedTuple):
    """What each row adds to the loss, whether it is an anchor, and how many negatives it has: ``(n,)`` each."""

    losses: Tensor
    anchors: Tensor
    negatives: Tensor


def conr_rows(
    features: Tensor,
    targets: Tensor,
    predictions: Tensor,
    window: float,
    temperature: float = 0.07,
    eta: float = 0.01,
    weights: Tensor | None = None,
    compat: bool = False,
    push: Push = "exponential",
    distance: Distance = label_distance,
    group: "ProcessGroup | None" = None,
    capacity: int | None = None,
) -> Rows:
    """The parts of :func:`conr_loss`, row by row; the arguments are the same."""
    with torch.autocast(features.device.type, enabled=False):  # exp(1 / 0.07) is beyond float16
        z = unit_rows(features)
        y, p = (numbers(values).detach().to(z.dtype) for values in (targets, predictions))
        q = z.new_ones(len(z)) if weights is None else weights.detach().reshape(-1).to(z.dtype)
        found = rows_of_ranks(torch.cat([z, y, p], dim=1), group, capacity)
        keys, all_y, all_p = torch.split(found.rows, [z.shape[1], y.shape[1], p.shape[1]], dim=1)
        apart, predicted_apart = distance(y, all_y.detach()), distance(p, all_p.detach())
        positive, negative = _masks(apart, predicted_apart, window, found.others(len(z)))
        positives = positive.sum(1)
        anchors = (positives > 0) & negative.any(1)
        push_of = q.log()[:, None] + (eta * apart if push == "exponential" else (eta * apart).log())
        more = (found.total - positives).to(z.dtype).log() if compat else None
        losses = contrastive_losses(z @ keys.T / temperature, positive, negative, push_of, more, anchors)
        losses = losses * (q if push == "exponential" else positives / (positives + 1))
        return Rows(losses * found.ranks / found.total, anchors, negative.sum(1))


def _masks(apart: Tensor, predicted_apart: Tensor, window: float, others: Tensor) -> tuple[Tensor, Tensor]:
    near = apart <= window
    return near & others, ~near & (predicted_apart <= window) & others


def pair_masks(
    targets: Tensor, predictions: Tensor, window: float, distance: Distance = label_distance
) -> tuple[Tensor, Tensor]:
    r"""Which pairs of rows attract and which repel one another.

    .. math:: P_{ij} = [d(y_i, y_j) \le w,\ i \ne j], \qquad
        Q_{ij} = [d(y_i, y_j) > w \text{ and } d(\hat y_i, \hat y_j) \le w]

    Args:
        targets: Labels ``y``, ``(n,)`` or ``(n, K)``.
        predictions: Predictions of the same shape; no gradient flows into them.
        window: Width ``w`` in units of the label, at least 0.
        distance: From ``(n, K)`` and ``(m, K)`` to ``(n, m)``.

    Returns:
        Positives and negatives, bool ``(n, n)``.

    Example:
        >>> positive, negative = pair_masks(torch.tensor([1.0, 1.5, 9.0]), torch.tensor([2.0, 8.0, 2.5]), window=1.0)
        >>> positive.int().tolist(), negative.int().tolist()
        ([[0, 1, 0], [1, 0, 0], [0, 0, 0]], [[0, 0, 1], [0, 0, 0], [1, 0, 0]])

    """
    y, p = numbers(targets), numbers(predictions).detach()
    oneself = torch.eye(len(y), dtype=torch.bool, device=y.device)
    return _masks(distance(y, y), distance(p, p), window, ~oneself)


def inverse_density_weights(
    targets: Tensor,
    bins: int,
    mode: Literal["inverse", "sqrt_inverse"] = "sqrt_inverse",
    lds_sigma: float | None = None,
    clip: tuple[float, float] | None = None,
    lds_size: int | None = None,
) -> Tensor:
    r"""Weights of samples by how rare their labels are.

    .. math:: q_i \propto 1 / c_{b(i)} \;\text{(inverse)}, \quad 1 / \sqrt{c_{b(i)}} \;\text{(sqrt\_inverse)}

    Args:
        targets: Labels of the data set, ``(N,)`` or ``(N, 1)``.
        bins: Number of bins of equal width between the smallest and the largest label, at least 1.
        mode: ``c`` is the count of the label's bin, or its root.
        lds_sigma: Smooths ``c`` over the bins (label distribution smoothing): standard deviation, in bins, of a
            Gaussian that is cut off at the next whole number of bins (2: five bins, the usual setting). ``None``: none.
        clip: Least and largest count that a bin is taken to have, before anything else. The published code of deep
            imbalanced regression, which the authors' is based on, has (5, 1000) with ``"inverse"``, and none else.
        lds_size: Number of bins of the Gaussian, odd; its tails beyond are folded back, as in that code (5 there, with
            ``lds_sigma=2``: 0.858, 0.946, 1, 0.946, 0.858). ``None``: cut off, without folding.

    Returns:
        ``q``, ``(N,)`` float32 with mean 1.

    Raises:
        ValueError: If ``bins``, ``mode`` or ``lds_sigma`` is none of these.

    Example:
        >>> inverse_density_weights(torch.tensor([0.0, 0.0, 0.0, 1.0]), bins=2, mode="inverse")
        tensor([0.6667, 0.6667, 0.6667, 2.0000])

    """
    if bins < 1 or mode not in ("inverse", "sqrt_inverse") or (lds_sigma is not None and lds_sigma <= 0):
        raise ValueError(
            "inverse_density_weights: `bins` must be at least 1, `mode` 'inverse' or 'sqrt_inverse', `lds_sigma` None"
            f" or above 0, got {bins!r}, {mode!r}, {lds_sigma!r}."
        )
    if (lds_size is not None and (lds_size < 1 or lds_size % 2 == 0)) or (clip and not 0 <= clip[0] <= clip[1]):
        raise ValueError(
            "inverse_density_weights: `clip` must be two numbers in order, at least 0, and `lds_size` odd, got"
            f" {clip!r}, {lds_size!r}."
        )
    values = targets.detach().double().flatten()
    low, high = values.aminmax()
    width = (high - low).clamp(min=torch.finfo(torch.float64).tiny)
    where = ((values - low) / width * bins).long().clamp(max=bins - 1)
    counts = torch.bincount(where, minlength=bins).double()
    if clip is not None:
        counts = counts.clamp(*clip)
    if mode == "sqrt_inverse":
        counts = counts.sqrt()
    if lds_sigma is not None:
        kernel = _smoothing_kernel(lds_sigma, lds_size).to(counts.device)
        reach = len(kernel) // 2
        counts = torch.nn.functional.conv1d(counts[None, None], kernel[None, None], padding=reach)[0, 0]
    weights = 1 / counts[where]
    return (weights / weights.mean()).float()


def _smoothing_kernel(sigma: float, size: int | None) -> Tensor:
    """A Gaussian with the value 1 in its middle; with a size its tails are reflected at the ends, up to 4 sigma."""
    reach = math.ceil(sigma) if size is None else int(4 * sigma + 0.5)
    offsets = torch.arange(-reach, reach + 1, device="cpu")
    kernel = (-0.5 * (offsets.double() / sigma).square()).exp()
    if size is None:
        return kernel
    middle = size // 2
    places = (offsets + middle) % (2 * size)  # reflected: ..., 1, 0, 0, 1, ..., size - 1, size - 1, ...
    folded = kernel.new_zeros(size)
    folded.index_add_(0, torch.where(places < size, places, 2 * size - 1 - places), kernel)
    return folded / folded.max()
