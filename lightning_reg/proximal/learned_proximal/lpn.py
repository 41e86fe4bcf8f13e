"""A network that is a proximal operator: the gradient of a convex one."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.engine.host.arguments import check_number

__all__ = ["LPN"]

_UNITS = 64  # of the dense layer behind the convolutions
_LOG_MEAN, _LOG_STD = -10.0, 0.1  # of the weights that are not negative, when it is made


class LPN(nn.Module):
    r"""A denoiser that is, for whatever weights, the proximal operator of some regularizer: :math:`f = \nabla \psi`.

    .. math:: z_1 = g(H_1 y + b_1), \quad z_{k+1} = g(W_k z_k + H_{k+1} y + b_{k+1}), \quad
              \psi(y) = w^T z_K + h^T y + \alpha \|y\|^2

    with g the softplus, convex and increasing, and W, w not negative, so that :math:`\psi` is convex. Trained as a
    denoiser by :class:`ProximalMatchingLoss` it tends to the proximal operator of :math:`-\sigma^2 \log p`, which
    :func:`learned_regularizer` reads off it; in :func:`pnp_admm` and :func:`pgd` iterations converge. A negative entry
    of W or w counts as 0, with the gradient that it would have otherwise; :class:`NonNegative` keeps entries where
    they count, and is the projection of the paper: ``NonNegative(["net.inner.*", "net.last.*"])``.

    It gives the same where autograd is off, in Lightning's validation as well, and keeps a graph only where gradients
    are recorded. A pass costs a forward and a backward pass of :math:`\psi`, a step of training some five of those of
    a plain denoiser. Nothing in it is to be replaced by batch norm or attention, which are not convex; weight decay on
    W pulls to zero, where depth is lost. Sizes are fixed, by the layer behind the convolutions. A compiled one must not
    be called in ``torch.inference_mode`` with torch 2.7 and 2.8, whose compiler has zeros for the derivative there:
    ``torch.no_grad`` will do, in Lightning ``Trainer(inference_mode=False)``.

    Source:
        Fang, Buchanan and Sulam, "What's in a Prior? Learned Proximal Networks for Inverse Problems", ICLR 2024, arXiv
        2310.14344; layers of the released code.

    Differs:
        Convex by construction, not by the projection alone. One class for vectors and for images of any size: strides 2
        and 1 in turn, a layer of 64 units behind them; the first layer has a bias. Autocast is off inside, gradients of
        gradients underflow in half precision.

    Args:
        in_shape: Shape of a sample: a number of inputs, or channels, height and width.
        hidden: Units, or channels, of each layer, at least 1. Paper: 50 in one dimension, 64 for 28 x 28, 200 for
            128 x 128.
        layers: Number of the W between two such layers, at least 1. Paper: 4 in one dimension, 3 for 28 x 28, 5 for
            128 x 128.
        beta: Sharpness of the softplus, above 0. Paper: 10; 100 for 128 x 128.
        alpha: Half the strong convexity, at least 0; the iterations need one above 0. Paper: 0.01 for 28 x 28, 1e-6 for
            128 x 128, 0 in one dimension.

    Raises:
        ValueError: If an argument is outside its range, and for inputs of another shape.

    Example:
        >>> network = LPN([1, 28, 28], hidden=8, alpha=0.01)
        >>> y = torch.zeros(2, 1, 28, 28)
        >>> network(y).shape, network.potential(y).shape
        (torch.Size([2, 1, 28, 28]), torch.Size([2]))

    """

    def __init__(
        self, in_shape: Sequence[int], hidden: int = 64, layers: int = 3, beta: float = 10.0, alpha: float = 0.0
    ) -> None:
        super().__init__()
        if len(in_shape) not in (1, 3):
            raise ValueError(f"LPN: `in_shape` must be [inputs] or [channels, height, width], got {in_shape!r}.")
        for size in in_shape:
            check_number(self, "in_shape", size, low=1, integer=True)
        check_number(self, "hidden", hidden, low=1, integer=True)
        check_number(self, "layers", layers, low=1, integer=True)
        check_number(self, "beta", beta, low=0, low_open=True)
        check_number(self, "alpha", alpha, low=0)
        self.in_shape, self.hidden, self.layers = tuple(in_shape), hidden, layers
        self.beta, self.alpha = beta, alpha
        self.inner, self.skips = nn.ModuleList(), nn.ModuleList()
        if len(in_shape) == 1:
            self._add_linear_layers(in_shape[0])
        else:
            self._add_convolutions(*in_shape)
        with torch.no_grad():
            for layer in (*self.inner, self.last):
                layer.get_parameter("weight").normal_(_LOG_MEAN, _LOG_STD).exp_()

    def _add_linear_layers(self, inputs: int) -> None:
        self.first: nn.Module = nn.Linear(inputs, self.hidden)
        for _ in range(self.layers):
            self.inner.append(nn.Linear(self.hidden, self.hidden, bias=False))
            self.skips.append(nn.Linear(inputs, self.hidden))
        self.last = nn.Linear(self.hidden, 1, bias=False)
        self.straight: nn.Module | None = nn.Linear(inputs, 1, bias=False)

    def _add_convolutions(self, channels: int, height: int, width: int) -> None:
        conv: dict[str, Any] = {"kernel_size": 3, "padding": 1}
        self.first = nn.Conv2d(channels, self.hidden, **conv)
        for layer in range(self.layers):
            stride = 1 + (layer + 1) % 2
            self.inner.append(nn.Conv2d(self.hidden, self.hidden, bias=False, stride=stride, **conv))
            self.skips.append(nn.Conv2d(channels, self.hidden, stride=stride, **conv))
            height, width = -(-height // stride), -(-width // stride)
        self.inner.append(nn.Linear(self.hidden * height * width, _UNITS, bias=False))
        self.skips.append(nn.Linear(channels * height * width, _UNITS))
        self.last = nn.Linear(_UNITS, 1, bias=False)
        self.straight = None

    @override
    def forward(self, y: Tensor) -> Tensor:
        """The gradient of :meth:`potential`, of the shape of ``y`` and the type of the weights."""
        # In inference mode the derivative is zero with torch 2.7 and 2.8. A compiler cannot ask for it there.
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            with torch.inference_mode(mode=False), torch.no_grad():
                return self._gradient(y.clone())
        return self._gradient(y)

    def _gradient(self, y: Tensor) -> Tensor:
        def total(inputs: Tensor) -> Tensor:
            return self.potential(inputs).sum()

        # Around the derivative too: its backward pass would be cast.
        with torch.autocast(y.device.type, enabled=False):
            gradient: Tensor = torch.func.grad(total)(y.to(self.last.weight.dtype))
        return gradient

    def potential(self, y: Tensor) -> Tensor:
        r"""The convex function :math:`\psi`.

        Args:
            y: ``(B, *in_shape)``.

        Returns:
            ``(B,)``.

        Raises:
            ValueError: If ``y`` has another shape.

        """
        if y.shape[1:] != self.in_shape:
            wanted = ", ".join(map(str, self.in_shape))
            raise ValueError(f"LPN: `y` must be of shape (B, {wanted}), got {tuple(y.shape)}.")
        with torch.autocast(y.device.type, enabled=False):
            y = y.to(self.last.weight.dtype)
            z = F.softplus(self.first(y), self.beta)
            for inner, skip in zip(self.inner, self.skips, strict=True):
                z = F.softplus(_increasing(inner, z) + _affine(skip, y, z), self.beta)
            psi = _increasing(self.last, z)[:, 0] + self.alpha * y.flatten(1).square().sum(1)
            return psi if self.straight is None else psi + self.straight(y)[:, 0]


def _increasing(layer: nn.Module, z: Tensor) -> Tensor:
    """The layer with weights that are not negative."""
    given = layer.get_parameter("weight")
    weight = given + (given.clamp(min=0) - given).detach()
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(z, weight, stride=layer.stride, padding=layer.padding)
    return F.linear(z.flatten(1), weight)


def _affine(layer: nn.Module, y: Tensor, z: Tensor) -> Tensor:
    """The layer of the input itself, resized to what it joins, which is linear."""
    if y.shape[2:] != z.shape[2:]:
        y = F.interpolate(y, z.shape[2:], mode="bilinear")
    result: Tensor = layer(y if isinstance(layer, nn.Conv2d) else y.flatten(1))
    return result
