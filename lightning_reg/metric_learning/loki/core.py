r"""Loki's rule: the label with the least expected squared distance, in place of the most probable one."""

import torch
from torch import Tensor

__all__ = [
    "embedding_distances",
    "expected_distances",
    "frechet_predict",
    "frechet_scores",
    "is_complete",
    "pairwise_locus",
]


def frechet_predict(probabilities: Tensor, distances: Tensor, power: float = 2.0, chunk: int | None = None) -> Tensor:
    r"""The label in the middle of what is probable, which need not be one that the classifier knows.

    .. math:: \hat y = \arg\min_{y} \sum_i P_i\, d(\lambda_i, y)^2

    Args:
        probabilities: ``(..., K)``, at least 0: of the K classes that the classifier knows. Rows need not sum to 1.
        distances: ``(K, N)``: from each of those classes to each of the N labels, not squared. Scaling them changes
            nothing.
        power: Exponent of the distances, above 0: 2 gives the Fréchet mean, 1 the median.
        chunk: Labels that are computed at a time, at least 1; ``None``: all.

    Returns:
        ``(...)`` int64 in ``[0, N)``; of several that are equally near, within rounding, the one with the least number.

    Example:
        >>> line = (torch.arange(5.0)[:, None] - torch.arange(5.0)).abs()
        >>> frechet_predict(torch.tensor([[0.5, 0.5], [0.9, 0.1]]), line[[0, 4]])  # the two ends of five labels
        tensor([2, 0])

    """
    return frechet_scores(probabilities, distances, power, chunk).argmax(-1)


def frechet_scores(probabilities: Tensor, distances: Tensor, power: float = 2.0, chunk: int | None = None) -> Tensor:
    r"""Scores whose largest is the prediction, and which are logits of a classifier of N labels.

    .. math:: s_y = \min_z \mathbb E\, d(z)^2 - \mathbb E\, d(y)^2

    The constant of each row leaves softmax and cross-entropy as they are, and keeps what decides between close labels
    through a later rounding: the prediction has exactly 0, all others less. Labels that tie within the rounding of the
    sum tie exactly, so that ``argmax`` takes the first of them on every device.

    Args:
        probabilities: See :func:`frechet_predict`; the gradient flows into them.
        distances: See :func:`frechet_predict`.
        power: See :func:`frechet_predict`.
        chunk: See :func:`frechet_predict`.

    Returns:
        ``(..., N)``, at most 0, float32 (float64 for such probabilities).

    Example:
        >>> frechet_scores(torch.tensor([0.5, 0.5]), torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]]))
        tensor([-1.,  0., -1.])

    """
    expected = expected_distances(probabilities, distances, power, chunk)
    fixed = expected.detach()
    best = fixed.amin(-1, keepdim=True)
    # Rounding of a sum of K products, with room for 1000 classes.
    tied = fixed - best <= 32 * torch.finfo(fixed.dtype).eps * fixed.amax(-1, keepdim=True)
    scores = best - expected
    scores = scores - torch.where(tied, scores.detach(), 0.0)
    return scores.to(_result_dtype(probabilities))


def expected_distances(
    probabilities: Tensor, distances: Tensor, power: float = 2.0, chunk: int | None = None
) -> Tensor:
    r"""The sum over classes of probability times distance to a power, for each label.

    .. math:: E_y = \sum_i P_i\, d(\lambda_i, y)^p

    Computed in float64 whatever comes in, and outside autocast: squares of the distances of a large tree are beyond
    float16, and close labels are decided by the last digits. (A device without float64 has float32.)

    Args:
        probabilities: ``(..., K)``.
        distances: ``(K, N)``, of any type: whole numbers in uint8 take the least memory.
        power: Exponent of the distances.
        chunk: Labels that are computed at a time: only so many columns of the distances are there in float64.

    Returns:
        ``(..., N)``.

    Example:
        >>> expected_distances(torch.tensor([0.75, 0.25]), torch.tensor([[0, 2], [2, 0]], dtype=torch.uint8))
        tensor([1., 3.], dtype=torch.float64)

    """
    columns = [distances] if chunk is None else torch.split(distances, chunk, dim=1)
    with torch.autocast(probabilities.device.type, enabled=False):
        wide = probabilities.to(_working_dtype(probabilities))
        return torch.cat([wide @ powered(block, power) for block in columns], dim=-1)


def powered(distances: Tensor, power: float) -> Tensor:
    """Distances to a power, in the type that sums are computed in; the same tensor if nothing is to be done."""
    wide = distances.to(_working_dtype(distances))
    return wide if power == 1 else wide.pow(power)


def _working_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _result_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def embedding_distances(embeddings: Tensor) -> Tensor:
    """Euclidean distances of the classes' embeddings: the metric to take where the labels come with none.

    The embeddings are those of the classes' names (CLIP's text encoder, whose rows are normalised) or the rows of the
    classifier's weight. The row order is the order of the labels.

    Args:
        embeddings: ``(N, D)``.

    Returns:
        ``(N, N)``, not squared; float32 (float64 for such embeddings).

    Example:
        >>> embedding_distances(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
        tensor([[0., 5.],
                [5., 0.]])

    """
    rows = embeddings.to(_result_dtype(embeddings))
    # The way over a matrix product cancels where labels are close.
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")


def is_complete(distances: Tensor) -> bool:
    """Whether all labels are equally far apart, as in a complete graph.

    Then, and if the classifier knows all labels, the rule is ``argmax``; and whatever it knows, no other label is ever
    predicted: only all labels cover the space.

    Args:
        distances: ``(N, N)``.

    Returns:
        Whether all entries beside the diagonal are the same, and those on it 0.

    Example:
        >>> is_complete(1 - torch.eye(4)), is_complete(torch.tensor([[0, 1, 2], [1, 0, 1], [2, 1, 0]]))
        (True, False)

    """
    if distances.dim() != 2 or distances.shape[0] != distances.shape[1]:
        return False
    beside = ~torch.eye(len(distances), dtype=torch.bool, device=distances.device)
    same = distances[beside] == distances.max()
    return bool(same.all() and (distances.diagonal() == 0).all())


def pairwise_locus(distances: Tensor, observed: list[int], power: float = 2.0) -> Tensor:
    r"""The labels that the rule can predict from two classes alone, in any metric space.

    With mass :math:`p` on one class and :math:`1 - p` on the other, :math:`y` is no farther than any :math:`z` on an
    interval of :math:`p`; the label is in the locus if the interval is not empty for one of the pairs. Every such label
    can be predicted. In trees and complete graphs no other can; in other spaces three classes or more may reach more.

    Args:
        distances: ``(N, N)``.
        observed: Numbers of the classes that the classifier knows, K of them.
        power: Exponent of the distances.

    Returns:
        ``(N,)`` bool. Costs K² N² operations.

    Example:
        >>> line = (torch.arange(4.0)[:, None] - torch.arange(4.0)).abs()
        >>> pairwise_locus(line, [0, 2])
        tensor([ True,  True,  True, False])

    """
    squares = powered(distances, power)
    # The slack of :func:`frechet_scores`: a label that only ties counts.
    slack = 32 * torch.finfo(squares.dtype).eps * squares.max()
    found = torch.zeros(len(squares), dtype=torch.bool, device=squares.device)
    for position, one in enumerate(observed):
        for two in observed[position:]:
            found |= _of_pair(squares[one], squares[two], slack)
    return found


def _of_pair(one: Tensor, two: Tensor, slack: Tensor) -> Tensor:
    """Where ``p a + (1 - p) b <= 0`` for some p in [0, 1], with a and b the advantages of all others."""
    a, b = (row[:, None] - row for row in (one, two))  # [y, z]: how much farther y is than z
    slope = a - b
    bound = (slack - b) / torch.where(slope == 0, 1.0, slope)
    high = torch.where(slope > 0, bound, 1.0).amin(1).clamp(max=1.0)
    low = torch.where(slope < 0, bound, 0.0).amax(1).clamp(min=0.0)
    never = ((slope == 0) & (b > slack)).any(1)
    return (low <= high) & ~never
