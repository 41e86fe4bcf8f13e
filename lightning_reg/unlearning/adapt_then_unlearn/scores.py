"""Sorting what a generator makes, how much it has unlearned, and what that has cost."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Pool", "frechet_distance", "split_pool", "unlearned_percentage"]


class Pool(NamedTuple):
    """Generated samples, sorted: ``wanted`` and ``unwanted``, rows first, and which ``share`` was unwanted."""

    wanted: Tensor
    unwanted: Tensor
    share: float


@torch.no_grad()
def split_pool(
    sample: Callable[[int], Tensor],
    is_unwanted: Callable[[Tensor], Tensor],
    wanted: int,
    unwanted: int,
    batch: int = 256,
    most: int = 100_000,
) -> Pool:
    """Draws from a generator until there are enough samples without and with what is unwanted.

    These are the data of both stages: the first adapts to the unwanted ones, the second goes on with the wanted ones.

    Args:
        sample: Gives as many samples as asked for, ``(B, ...)``, in evaluation mode if that matters.
        is_unwanted: A mask ``(B,)`` for samples: of a classifier, or what a user said of them.
        wanted: Number of wanted samples, at least 0.
        unwanted: Number of unwanted samples, at least 0.
        batch: Samples to draw at once, at least 1.
        most: Samples to draw at most.

    Returns:
        The first of each in the order in which they were drawn, and the share of unwanted ones among all drawn.

    Raises:
        ValueError: If a number is outside its range, or if there were not enough among ``most`` samples.

    Example:
        >>> numbers = iter(range(100))
        >>> pool = split_pool(lambda n: torch.tensor([next(numbers) for _ in range(n)]), lambda x: x % 5 == 0, 3, 2, 4)
        >>> pool.wanted.tolist(), pool.unwanted.tolist(), pool.share
        ([1, 2, 3], [0, 5], 0.25)

    """
    for name, value, low in (("wanted", wanted, 0), ("unwanted", unwanted, 0), ("batch", batch, 1)):
        if not value >= low:
            raise ValueError(f"split_pool: `{name}` must be at least {low}, got {value!r}.")
    kept: dict[bool, list[Tensor]] = {False: [], True: []}
    found, drawn = {False: 0, True: 0}, 0
    while found[False] < wanted or found[True] < unwanted or not drawn:
        if drawn + batch > most:
            raise ValueError(
                f"split_pool: of {drawn} samples {found[False]} are wanted and {found[True]} unwanted, and {wanted} and"
                f" {unwanted} are asked for. Ask for fewer, or let it draw more (`most`, got {most})."
            )
        samples = sample(batch)
        mask = is_unwanted(samples).bool()
        for which in (False, True):
            rows = samples[mask == which]
            kept[which].append(rows)
            found[which] += len(rows)
        drawn += len(samples)
    return Pool(torch.cat(kept[False])[:wanted], torch.cat(kept[True])[:unwanted], found[True] / drawn)


def unlearned_percentage(before: float, after: float) -> float:
    r"""PUL: by how much the share of unwanted samples has fallen.

    .. math:: 100 \, \frac{\text{before} - \text{after}}{\text{before}}

    Args:
        before: Share (or number) of unwanted samples of the original generator, above 0.
        after: That of the generator that has unlearned, of as many samples.

    Returns:
        100 if there is none any more, 0 if nothing has changed, below 0 if there are more.

    Raises:
        ValueError: If ``before`` is not above 0, or ``after`` below.

    Example:
        >>> unlearned_percentage(0.2, 0.05)
        75.0

    """
    if not before > 0:
        raise ValueError(f"unlearned_percentage: `before` must be above 0, got {before!r}.")
    if not after >= 0:
        raise ValueError(f"unlearned_percentage: `after` must be at least 0, got {after!r}.")
    return 100.0 * (before - after) / before


@torch.no_grad()
def frechet_distance(one: Tensor, two: Tensor) -> Tensor:
    r"""Distance of two sets of features, taken as normal distributions: FID, with features of any network.

    .. math:: \|\mu_1 - \mu_2\|^2 + \operatorname{tr}\bigl(\Sigma_1 + \Sigma_2 - 2 (\Sigma_1 \Sigma_2)^{1/2}\bigr)

    It falls with the number of rows, so that only sets of the same sizes are compared.

    Args:
        one: Features ``(N, ...)``, flattened, of at least 2 rows.
        two: Features ``(M, ...)``, as many for each row.

    Returns:
        A scalar, in float64.

    Raises:
        ValueError: If there are fewer than 2 rows, or other numbers of features.

    Example:
        >>> x = torch.tensor([[0.0], [2.0]])
        >>> frechet_distance(x, 3 * x + 1)
        tensor(17., dtype=torch.float64)

    """
    first, second = (features.flatten(1).double() for features in (one, two))
    if min(len(first), len(second)) < 2 or first.shape[1] != second.shape[1]:
        raise ValueError(
            "frechet_distance: `one` and `two` must be features of at least 2 rows each, with as many numbers per row,"
            f" got shapes {tuple(one.shape)} and {tuple(two.shape)}."
        )
    (mean_1, cov_1), (mean_2, cov_2) = ((f.mean(0), f.T.cov()) for f in (first, second))
    cov_1, cov_2 = (cov.reshape(len(mean_1), len(mean_1)) for cov in (cov_1, cov_2))
    # The root's trace from symmetric matrices alone: S1 S2 has the eigenvalues of R S2 R with R = S1^(1/2).
    values, vectors = torch.linalg.eigh(cov_1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_2 @ root).clamp(min=0).sqrt().sum()
    distance: Tensor = (mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * cross
    return distance
