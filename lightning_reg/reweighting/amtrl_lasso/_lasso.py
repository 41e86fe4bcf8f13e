"""The Lasso, by accelerated proximal gradient steps, and exactly once it is known who takes part."""

import torch
from torch import Tensor

__all__ = ["lasso"]

_STEPS, _BLOCK, _TOL, _LEAST = 20_000, 50, 1e-10, 1e-6


def lasso(heads: Tensor, target: Tensor, lam: float) -> Tensor:
    r"""The minimum of :math:`\tfrac12 \lVert W \nu - w \rVert_2^2 + \lambda \lVert \nu \rVert_1`.

    Args:
        heads: W, ``(k, M)`` float64.
        target: w, ``(k,)`` float64.
        lam: At least 0; 0 is taken as the limit.

    Returns:
        ``(M,)``, of which no condition of optimality is missed by more than 1e-10 of the largest correlation.

    Raises:
        ValueError: If ``lam`` is below 0, a number is not finite, or it does not converge.

    """
    if not lam >= 0:
        raise ValueError(f"relevance_l1: `lam` must be a number in [0, inf), got {lam!r}.")
    gram, correlations = heads.T @ heads, heads.T @ target
    if not (torch.isfinite(gram).all() and torch.isfinite(correlations).all()):
        raise ValueError("relevance_l1: `heads` and `target` must be finite.")
    nu, top = torch.zeros_like(correlations), float(correlations.abs().max())
    present, goal = top, max(lam, _LEAST * top)
    while present > goal:  # from above, each begun with the last: few take part on the way
        present = max(present / 4, goal)
        nu = _solved(gram, correlations, present, nu, _TOL * top)
    limit = _on_support(gram, correlations, nu) if lam < goal else nu
    return limit if bool(((limit != 0) == (nu != 0)).all()) else nu


def _solved(gram: Tensor, correlations: Tensor, lam: float, nu: Tensor, tol: float) -> Tensor:
    step, ahead, weight = 1 / float(torch.linalg.eigvalsh(gram)[-1]), nu, 1.0
    for count in range(_STEPS):
        if count % _BLOCK == 0:
            for candidate in (_on_support(gram, correlations - lam * nu.sign(), nu), nu):
                slopes, on = correlations - gram @ candidate, candidate != 0
                missed = torch.where(on, (slopes - lam * candidate.sign()).abs(), slopes.abs() - lam)
                if float(missed.max()) <= tol:
                    return candidate
        moved = ahead - step * (gram @ ahead - correlations)
        new = moved.sign() * (moved.abs() - step * lam).clamp(min=0)
        if float((ahead - new) @ (new - nu)) > 0:  # uphill: the acceleration begins anew
            weight = 1.0
        next_weight = (1 + (1 + 4 * weight**2) ** 0.5) / 2
        ahead = new + (weight - 1) / next_weight * (new - nu)
        nu, weight = new, next_weight
    raise ValueError("relevance_l1: the Lasso has not converged. Raise `lam`, or scale the heads.")


def _on_support(gram: Tensor, wanted: Tensor, nu: Tensor) -> Tensor:
    """Solves for those that take part; 0 where that turns a sign."""
    part, exact = nu.nonzero().flatten(), torch.zeros_like(nu)
    if len(part):
        square, right = gram[part[:, None], part], wanted[part, None]
        exact[part] = torch.linalg.lstsq(square, right, driver="gelsd").solution[:, 0]
    return torch.where(exact.sign() == nu.sign(), exact, 0.0)
