"""What a learned proximal operator says of the prior: its inverse, and the regularizer."""

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_reg.engine.host.procedures import procedure
from lightning_reg.proximal.learned_proximal.core import row_dots

if TYPE_CHECKING:
    from lightning_reg.proximal.learned_proximal.lpn import LPN

__all__ = ["inverse_prox", "learned_regularizer"]

_DOUBLINGS, _HALVINGS = 30, 12  # of a line search: to enclose the minimum, and to narrow it down


@procedure
def inverse_prox(module: "LPN", x: Tensor, iterations: int = 200, tolerance: float = 1e-4) -> Tensor:
    r"""The input that a learned proximal network maps to ``x``.

    .. math:: f^{-1}(x) = \arg\min_y \psi(y) - \langle x, y \rangle

    The function is convex, so its minimum is found by conjugate gradients whatever the start, and a row for which there
    is none is told: x is then outside the range of f, or ``iterations`` are too few.

    Source:
        Fang, Buchanan and Sulam, "What's in a Prior? Learned Proximal Networks for Inverse Problems", ICLR 2024, arXiv
        2310.14344.

    Differs:
        All rows at once, each with a line search of its own; the released code takes them one after the other. That
        code's regression on :math:`\|f(y) - x\|^2`, which is not convex, is not offered.

    Args:
        module: The network; it runs in evaluation mode, in float32 at least.
        x: ``(B, *in_shape)``.
        iterations: The most, at least 1.
        tolerance: Of :math:`\|f(y) - x\|`, as a share of the largest of 1 and :math:`\|x\|`; above 0.

    Returns:
        ``(B, *in_shape)``; NaN in rows that were not found.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning_reg import LPN
        >>> network = LPN([2], alpha=0.5)
        >>> y = inverse_prox(network, torch.tensor([[1.0, -2.0]]))
        >>> bool((network(y) - torch.tensor([[1.0, -2.0]])).norm() < 1e-3)
        True

    """
    return _inverse("inverse_prox", _readable(module), x, iterations, tolerance)


@procedure
def learned_regularizer(module: "LPN", x: Tensor, iterations: int = 200, tolerance: float = 1e-4) -> Tensor:
    r"""The regularizer whose proximal operator a learned proximal network is, up to a constant.

    .. math:: R(x) = \langle x, f^{-1}(x) \rangle - \tfrac12 \|x\|^2 - \psi\bigl(f^{-1}(x)\bigr)

    After proximal matching at noise :math:`\sigma` it is :math:`-\sigma^2 \log p(x)`: small where the data are.

    Source:
        Fang, Buchanan and Sulam, "What's in a Prior? Learned Proximal Networks for Inverse Problems", ICLR 2024, arXiv
        2310.14344.

    Differs:
        Nothing; see :func:`inverse_prox`.

    Args:
        module: The network; it runs in evaluation mode, in float32 at least.
        x: ``(B, *in_shape)``.
        iterations: Of the inversion, at least 1.
        tolerance: Of the inversion, above 0.

    Returns:
        ``(B,)``; NaN for rows whose inverse was not found.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning_reg import LPN
        >>> values = learned_regularizer(LPN([2], alpha=0.25), torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
        >>> bool(values[1] > values[0])
        True

    """
    network = _readable(module)
    y = _inverse("learned_regularizer", network, x, iterations, tolerance)
    with torch.no_grad():
        x = x.to(y.dtype)
        return row_dots(x, y).flatten() - 0.5 * row_dots(x, x).flatten() - network.potential(y)


def _readable(module: "LPN") -> "LPN":
    """The network in evaluation mode; one in half precision as a copy in float32."""
    module.eval()
    dtype = module.last.weight.dtype
    wide = torch.promote_types(dtype, torch.float32)
    return module if wide is dtype else copy.deepcopy(module).to(wide)


def _inverse(name: str, network: "LPN", x: Tensor, iterations: int, tolerance: float) -> Tensor:
    """Nonlinear conjugate gradients (Polak-Ribière, restarted where they do not go down); rows that are found stay."""
    if not iterations >= 1:
        raise ValueError(f"{name}: `iterations` must be at least 1, got {iterations!r}.")
    if not tolerance > 0:
        raise ValueError(f"{name}: `tolerance` must be above 0, got {tolerance!r}.")
    with torch.no_grad():
        x = x.to(network.last.weight.dtype)
        goal = tolerance * row_dots(x, x).sqrt().clamp(min=1.0)
        y, gradient = x, network(x) - x
        direction, length = -gradient, torch.ones_like(goal)
        for _ in range(iterations):
            over = (row_dots(gradient, gradient).sqrt() <= goal) | length.isinf()
            if bool(over.all()):
                break
            length = torch.where(over, length, _minimum(network, x, y, direction, (2 * length).clamp(1e-6, 2.0**20)))
            y = y + torch.where(over | length.isinf(), 0.0, length) * direction
            before, gradient = gradient, network(y) - x
            share = row_dots(gradient, gradient - before) / row_dots(before, before).clamp(min=1e-30)
            direction = share.clamp(min=0) * direction - gradient
            direction = torch.where(row_dots(direction, gradient) < 0, direction, -gradient)
        return torch.where(row_dots(gradient, gradient).sqrt() <= goal, y, torch.nan)


def _minimum(network: "LPN", x: Tensor, y: Tensor, direction: Tensor, high: Tensor) -> Tensor:
    """Length of the step along a direction to where the slope, which increases, is zero; infinite if nowhere."""

    def slope(length: Tensor) -> Tensor:
        return row_dots(network(y + length * direction) - x, direction)

    low, at_low = torch.zeros_like(high), slope(torch.zeros_like(high))
    at_high = slope(high)
    for _ in range(_DOUBLINGS):
        beyond = at_high < 0
        if not bool(beyond.any()):
            break
        low, at_low = torch.where(beyond, high, low), torch.where(beyond, at_high, at_low)
        high = torch.where(beyond, 2 * high, high)
        at_high = slope(high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        at_middle = slope(middle)
        low, at_low = (torch.where(at_middle < 0, a, b) for a, b in ((middle, low), (at_middle, at_low)))
        high, at_high = (torch.where(at_middle < 0, a, b) for a, b in ((high, middle), (at_high, at_middle)))
    rise = at_high - at_low
    length = torch.where(rise > 0, low - at_low * (high - low) / rise, low)
    return torch.where(at_high < 0, torch.inf, length)
