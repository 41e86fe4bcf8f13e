"""How alike two predictions are, and forecasts of unconditional ones, for any sampler."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["cosine_similarity", "linear_ag_coefficients", "predict_unconditional", "threshold_for"]


def cosine_similarity(one: Tensor, two: Tensor) -> Tensor:
    r"""Cosine of two predictions, over all elements of a sample, in float32 at least.

    .. math:: \gamma = \frac{\langle a, b \rangle}{\|a\| \|b\|}

    Args:
        one: ``(B, ...)``.
        two: Of the same shape.

    Returns:
        ``(B,)``.

    Example:
        >>> cosine_similarity(torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]]))
        tensor([0.9600])

    """
    a, b = (value.flatten(1).to(torch.promote_types(value.dtype, torch.float32)) for value in (one, two))
    return torch.nn.functional.cosine_similarity(a, b, dim=1)


def threshold_for(similarity: Tensor, share: float) -> float:
    """The threshold at which half of the samples would stop being guided after a share of the steps.

    Args:
        similarity: At each step of guided samples, ``(B, S)``.
        share: Of the steps, in (0, 1].

    Returns:
        The median similarity at that step.

    Raises:
        ValueError: If ``share`` is outside its range.

    Example:
        >>> round(threshold_for(torch.tensor([[0.9, 0.95, 0.99, 1.0]]), 0.5), 3)
        0.95

    """
    if not 0 < share <= 1:
        raise ValueError(f"threshold_for: `share` must be in (0, 1], got {share!r}.")
    return float(similarity[:, max(1, round(share * similarity.shape[1])) - 1].double().median())


def linear_ag_coefficients(
    conditional: Tensor, unconditional: Tensor, ridge: float = 0.0, others: Sequence[Tensor] = ()
) -> list[Tensor]:
    r"""Least squares of each unconditional prediction on the predictions before it, numbers shared by all elements.

    .. math:: \hat u_i = \sum_{j \le i} \beta^c_{ij} c_j + \sum_{j < i} \beta^u_{ij} u_j + \sum_k \beta_{ik} z_k

    Args:
        conditional: c of each step of N guided samples, ``(S, N, ...)``.
        unconditional: u, likewise.
        ridge: Weight of the squared coefficients relative to the mean square of a regressor, at least 0.
        others: z, further regressors of every step, ``(N, ...)`` each: the start noise, or ones for an intercept.

    Returns:
        For step i ``(2 i + 1 + K,)`` in float64: of c in order, then of u, then of the others.

    Raises:
        ValueError: If there are fewer numbers than coefficients, or ``ridge`` is below 0.

    """
    steps = len(conditional)
    c, u = (value.detach().double().flatten(1).T for value in (conditional, unconditional))  # (equations, S)
    z = torch.stack([value.detach().double().flatten() for value in others], 1) if others else c[:, :0]
    most = 2 * steps - 1 + len(others)
    if len(c) < most:
        raise ValueError(
            f"linear_ag_coefficients: `conditional` must have at least {most} numbers for each of {steps}"
            f" steps, got {len(c)}. Take more samples."
        )
    if not ridge >= 0:
        raise ValueError(f"linear_ag_coefficients: `ridge` must be at least 0, got {ridge!r}.")
    found = []
    for step in range(steps):
        regressors, wanted = torch.cat([c[:, : step + 1], u[:, :step], z], 1), u[:, step]
        if ridge:
            weight = (ridge * regressors.square().sum(0).mean()).sqrt()
            count = regressors.shape[1]
            regressors = torch.cat([regressors, weight * torch.eye(count).to(regressors)])
            wanted = torch.cat([wanted, wanted.new_zeros(count)])
        # gelsd: regressors of neighbouring steps are nearly the same.
        driver = None if regressors.is_cuda else "gelsd"
        found.append(torch.linalg.lstsq(regressors, wanted[:, None], driver=driver).solution[:, 0])
    return found


def predict_unconditional(
    coefficients: Tensor,
    conditional: Sequence[Tensor],
    unconditional: Sequence[Tensor],
    others: Sequence[Tensor] = (),
) -> Tensor:
    """The forecast of step i from predictions so far.

    Args:
        coefficients: Of that step, ``(2 i + 1 + K,)``.
        conditional: Those of steps 0 to i, ``(B, ...)`` each.
        unconditional: Those of the steps before, true ones or forecasts.
        others: Further regressors, as in :func:`linear_ag_coefficients`.

    Returns:
        ``(B, ...)``.

    Raises:
        ValueError: If there are not as many predictions as coefficients.

    """
    past = [*conditional, *unconditional, *others]
    if len(past) != len(coefficients):
        raise ValueError(
            f"predict_unconditional: `coefficients` must be one for each of {len(past)} predictions, got"
            f" {len(coefficients)}."
        )
    weights = coefficients.to(past[0])
    return torch.stack([weight * value for weight, value in zip(weights, past, strict=True)]).sum(0)
