"""The Lasso by its path: as lambda falls, the solution is linear from one change of support to the next."""

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["lasso", "lasso_path"]

_TIE, _TOL = 5e-8, 1e-7  # a head that the first leaves out misses less than the second


def lasso(heads: Tensor, target: Tensor, lam: float) -> Tensor:
    r"""The minimum of :math:`\tfrac12 \lVert W \nu - w \rVert_2^2 + \lambda \lVert \nu \rVert_1`.

    Args:
        heads: W, ``(k, M)`` float64.
        target: w, ``(k,)`` float64.
        lam: At least 0; 0 is taken as the limit.

    Returns:
        ``(M,)``, of which no condition of optimality is missed by more than 1e-7 of the largest correlation.

    Raises:
        ValueError: If ``lam`` is below 0, a number is not finite, or rounding keeps it from that.

    """
    if not lam >= 0:
        raise ValueError(f"relevance_l1: `lam` must be a number in [0, inf), got {lam!r}.")
    nu = torch.zeros_like(heads[0])
    for _, fixed, slope in lasso_path(heads, target, lam):
        nu = fixed - lam * slope
    nu = torch.where(nu.abs() > 1e-9 * nu.abs().max(), nu, 0.0)  # some may leave just here
    correlations = heads.T @ target
    slopes = correlations - heads.T @ (heads @ nu)
    missed = torch.where(nu != 0, (slopes - lam * nu.sign()).abs(), slopes.abs() - lam).max()
    if not float(missed) <= _TOL * float(correlations.abs().max()):
        raise ValueError("relevance_l1: heads are too much alike for the Lasso at this `lam`. Raise it.")
    return nu


def lasso_path(heads: Tensor, target: Tensor, least: float) -> Iterator[tuple[float, Tensor, Tensor]]:
    r"""The solutions for all :math:`\lambda`, in pieces, the largest first (the homotopy method, LARS).

    Args:
        heads: W, ``(k, M)`` float64.
        target: w, ``(k,)`` float64.
        least: Where the last piece ends.

    Yields:
        The lower end of a piece, and a and b ``(M,)`` with :math:`\nu = a - \lambda b` in it. No piece where ``least``
        is not below the value at which :math:`\nu = 0`.

    Raises:
        ValueError: If a number is not finite, or equal heads keep it from an end.

    """
    gram, correlations = heads.T @ heads, heads.T @ target
    if not (torch.isfinite(gram).all() and torch.isfinite(correlations).all()):
        raise ValueError("relevance_l1: `heads` and `target` must be finite.")
    present = top = float(correlations.abs().max())
    signs = torch.zeros_like(correlations)
    signs[correlations.abs().argmax()] = correlations[correlations.abs().argmax()].sign()
    for _ in range(20 * len(signs) + 100 if top > least else 0):
        on = signs.nonzero().flatten()
        fixed, slope = torch.zeros_like(signs), torch.zeros_like(signs)
        wanted = torch.stack([correlations[on], signs[on]], 1)
        fixed[on], slope[on] = torch.linalg.solve_ex(gram[on[:, None], on], wanted).result.T
        start, rate = correlations - gram @ fixed, gram @ slope  # the correlations left are start + lam rate
        above = torch.where(1 - rate > _TIE, start / (1 - rate), -torch.inf)
        below = torch.where(1 + rate > _TIE, -start / (1 + rate), -torch.inf)
        leaves = torch.where(signs * slope < 0, fixed / slope, -torch.inf)
        change, m = torch.where(signs == 0, torch.maximum(above, below), leaves).max(0)
        if not float(change) > max(least, _TOL * top):  # what changes nearer to 0 is rounding
            yield least, fixed, slope
            return
        present = min(present, float(change))
        yield present, fixed, slope
        signs[m] = 0.0 if signs[m] else 1.0 if above[m] >= below[m] else -1.0
    if top > least:
        raise ValueError("relevance_l1: heads are too much alike for the Lasso at this `lam`. Raise it.")
