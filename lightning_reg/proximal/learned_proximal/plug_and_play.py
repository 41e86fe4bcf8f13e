"""Inverse problems solved with a learned proximal operator: gradient steps, or ADMM."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_reg.engine.host.procedures import procedure
from lightning_reg.proximal.learned_proximal.core import largest_eigenvalues, row_dots

__all__ = ["pgd", "pnp_admm"]

Operator = Callable[[Tensor], Tensor]
_BELOW, _ABOVE = 0.9, 1.1  # of the bound: the power method finds it from below


@procedure
def pgd(
    module: nn.Module,
    measurements: Tensor,
    operator: Operator,
    adjoint: Operator,
    step: float | None = None,
    iterations: int = 100,
    check: bool = True,
) -> Tensor:
    r"""Reconstructs what was measured, :math:`y = Ax + n`, by gradient steps and a learned proximal operator in turn.

    .. math:: x \leftarrow f\bigl(x - \eta A^T (A x - y)\bigr), \qquad \eta < 1 / \|A^T A\|

    It starts from :math:`A^T y`. With a strongly convex :class:`LPN` (``alpha`` above 0) and such a step it converges,
    to a stationary point of :math:`\tfrac{\eta}{2} \|Ax - y\|^2 + R(x)`. Operators of deepinv fit: ``physics.A``,
    ``physics.A_adjoint``.

    Source:
        Fang, Buchanan and Sulam, "What's in a Prior? Learned Proximal Networks for Inverse Problems", ICLR 2024, arXiv
        2310.14344.

    Differs:
        The condition on the step is checked, for each row, with the norm found by the power method; the released script
        has a step of 2 for a blur of norm 1, which ``check=False`` allows. Values are not cut to [0, 1].

    Args:
        module: The proximal operator; it runs in evaluation mode.
        measurements: y, ``(B, ...)``.
        operator: A, of a batch of reconstructions; rows are treated alone.
        adjoint: Its transpose, of a batch of measurements.
        step: :math:`\eta`, above 0; ``None``: 0.9 times the bound of each row.
        iterations: At least 1.
        check: Whether a step beyond the bound is refused.

    Returns:
        The reconstructions, in float32 at least.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> pgd(nn.Identity(), torch.ones(1, 2), lambda x: 2 * x, lambda y: 2 * y)
        tensor([[0.5000, 0.5000]])

    """
    _check("pgd", {"iterations": iterations}, {"step": step})
    with torch.no_grad():
        module.eval()
        y = _wide(measurements)
        x = adjoint(y)
        norms = largest_eigenvalues(operator, adjoint, x)
        if step is not None and check and not bool((step * norms < 1).all()):
            raise ValueError(
                f"pgd: `step` must be below 1 / ||A^T A|| = {1 / float(norms.max()):.4g}, got {step!r}: beyond it"
                " iterations need not converge. Write a smaller one, `step=None`, or `check=False`."
            )
        steps = _BELOW / norms.clamp(min=torch.finfo(norms.dtype).tiny) if step is None else step
        for _ in range(iterations):
            x = _prox(module, x - steps * adjoint(operator(x) - y))
        return x


@procedure
def pnp_admm(
    module: nn.Module,
    measurements: Tensor,
    operator: Operator,
    adjoint: Operator,
    penalty: float | None = None,
    iterations: int = 50,
    solver_iterations: int = 30,
    check: bool = True,
) -> Tensor:
    r"""Reconstructs what was measured, :math:`y = Ax + n`, by ADMM with a learned proximal operator.

    .. math:: x \leftarrow \arg\min_x \tfrac12 \|Ax - y\|^2 + \tfrac\rho2 \|x - z + u\|^2, \qquad
              u \leftarrow u + x - z, \qquad z \leftarrow f(x + u), \qquad \rho > \|A^T A\|

    It starts from :math:`z = A^T y` and u = 0; the first step is solved by conjugate gradients. With a strongly convex
    :class:`LPN` (``alpha`` above 0, below 1) and such a penalty it converges to a fixed point, at which x = z.
    Operators of deepinv fit: ``physics.A``, ``physics.A_adjoint``.

    Source:
        Fang, Buchanan and Sulam, "What's in a Prior? Learned Proximal Networks for Inverse Problems", ICLR 2024, arXiv
        2310.14344; order of the steps of the released code.

    Differs:
        The condition on the penalty is checked, for each row, with the norm found by the power method; the released
        settings have smaller ones (0.05), which ``check=False`` allows.

    Args:
        module: The proximal operator; it runs in evaluation mode.
        measurements: y, ``(B, ...)``.
        operator: A, of a batch of reconstructions; rows are treated alone.
        adjoint: Its transpose, of a batch of measurements.
        penalty: :math:`\rho`, above 0; ``None``: 1.1 times the bound of each row.
        iterations: At least 1.
        solver_iterations: Of the conjugate gradients in each, at least 1.
        check: Whether a penalty below the bound is refused.

    Returns:
        The reconstructions x, in float32 at least.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> pnp_admm(nn.Identity(), torch.ones(1, 2), lambda x: 2 * x, lambda y: 2 * y)
        tensor([[0.5000, 0.5000]])

    """
    counts = {"iterations": iterations, "solver_iterations": solver_iterations}
    _check("pnp_admm", counts, {"penalty": penalty})
    with torch.no_grad():
        module.eval()
        y = _wide(measurements)
        back = adjoint(y)
        norms = largest_eigenvalues(operator, adjoint, back)
        if penalty is not None and check and not bool((norms < penalty).all()):
            raise ValueError(
                f"pnp_admm: `penalty` must be above ||A^T A|| = {float(norms.max()):.4g}, got {penalty!r}: below it"
                " iterations need not converge. Write a larger one, `penalty=None`, or `check=False`."
            )
        rho = _ABOVE * norms.clamp(min=torch.finfo(norms.dtype).eps) if penalty is None else penalty
        x, z, u = back, back, torch.zeros_like(back)
        for _ in range(iterations):
            x = _solve(lambda v: adjoint(operator(v)) + rho * v, back + rho * (z - u), x, solver_iterations)
            u = u + x - z
            z = _prox(module, x + u)
        return x


def _check(name: str, counts: dict[str, int], positive: dict[str, float | None]) -> None:
    for argument, count in counts.items():
        if not count >= 1:
            raise ValueError(f"{name}: `{argument}` must be at least 1, got {count!r}.")
    for argument, value in positive.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name}: `{argument}` must be above 0, got {value!r}.")


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _prox(module: nn.Module, x: Tensor) -> Tensor:
    """The module in its own type."""
    param = next(module.parameters(), x)
    result: Tensor = module(x.to(param.dtype))
    return result.to(x.dtype)


def _solve(apply: Operator, right: Tensor, x: Tensor, iterations: int) -> Tensor:
    """Conjugate gradients for a positive definite operator, row by row; a row that is solved stays as it is."""
    residual = right - apply(x)
    direction, size = residual, row_dots(residual, residual)
    for _ in range(iterations):
        applied = apply(direction)
        curvature = row_dots(direction, applied)
        length = torch.where(curvature > 0, size / curvature, 0.0)
        x = x + length * direction
        residual = residual - length * applied
        before, size = size, row_dots(residual, residual)
        direction = residual + torch.where(before > 0, size / before, 0.0) * direction
    return x
