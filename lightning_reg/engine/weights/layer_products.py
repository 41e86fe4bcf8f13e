"""Gradients of factors taken at the layer that multiplies by the weight: from its input and the gradient of its output.

For ``y = x M'`` with ``M = V + c B A`` and the gradient G of y,

    dB = c diag(s) G' (x A'),    dA = c (G diag(s) B)' x,

so that the weight needs no gradient, and nothing of its size is made. The layer runs as it is, on the weight as it is;
only what its output gets back is looked at. The gradient of x is the layer's own.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import grad as convolution_gradients
from typing_extensions import override

from lightning_reg.engine.host.autograd import is_wanted
from lightning_reg.engine.host.generators import isolated_randomness
from lightning_reg.engine.host.modules import Convolution, TransposedConvolution, own_hooks, own_parameters
from lightning_reg.engine.layers.named import LayerHook
from lightning_reg.engine.weights.factors import Factors
from lightning_reg.engine.weights.multiplied import multiplied_weights

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

__all__ = ["LayerTap", "Use", "hides_weight", "layer_gradients", "use_of"]


class Use(NamedTuple):
    """What a layer does with its weight.

    Args:
        kind: ``"linear"``, ``"embedding"`` or ``"convolution"``.
        dims: Dimensions of a convolution.
        shape: ``(in / groups, *kernel)`` of a convolution.
        stride: Of a convolution.
        padding: Of a convolution.
        dilation: Of a convolution.
        groups: Of a convolution.
        padding_row: The row of an embedding that gets no gradient, -1 for none.
        turned: Whether the weight of a linear layer is ``(in, out)``.

    """

    kind: str
    dims: int = 0
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_row: int = -1
    turned: bool = False


def use_of(layer: nn.Module, key: str) -> Use | None:
    """What a layer does with a parameter of its own, where gradients of factors can be taken at it.

    Args:
        layer: Any layer.
        key: Name of its own parameter.

    Returns:
        The use; ``None`` if the layer is another one, or has a forward pass of its own.

    """
    if key != "weight" or isinstance(layer, TransposedConvolution):
        return None
    forward = type(layer).forward
    if forward is nn.Linear.forward:
        return Use("linear")
    if isinstance(layer, nn.Embedding):
        plain = forward is nn.Embedding.forward and layer.max_norm is None
        if not plain or layer.sparse or layer.scale_grad_by_freq:
            return None
        return Use("embedding", padding_row=-1 if layer.padding_idx is None else layer.padding_idx)
    if isinstance(layer, Convolution):
        return _convolution(layer) if forward in _CONVOLUTIONS else None
    summed = multiplied_weights(layer).get("weight")
    return Use("linear", turned=summed == 0) if summed is not None and _is_affine(layer) else None


_CONVOLUTIONS = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


def _convolution(layer: Convolution) -> Use | None:
    padding = (0,) * len(layer.kernel_size) if layer.padding == "valid" else layer.padding
    if layer.padding_mode != "zeros" or isinstance(padding, str):
        return None
    return Use(
        "convolution",
        len(layer.kernel_size),
        (layer.in_channels // layer.groups, *layer.kernel_size),
        tuple(layer.stride),
        tuple(padding),
        tuple(layer.dilation),
        layer.groups,
    )


@torch.no_grad()
def _is_affine(layer: nn.Module) -> bool:
    """Whether a layer of another library puts out the product of input and weight, and what does not go by it."""
    weight, summed = own_parameters(layer)["weight"], multiplied_weights(layer)["weight"]
    if weight is None or next(layer.children(), None) is not None:
        return False
    kept = weight.detach().clone()
    with isolated_randomness():
        x = torch.randn(3, weight.shape[summed], dtype=weight.dtype, device=weight.device)
        try:
            with_weight = layer.forward(x)
            weight.zero_()
            difference = with_weight - layer.forward(x)
        except Exception:  # noqa: BLE001 # a layer of anybody's
            return False
        finally:
            weight.copy_(kept)
    wanted = x @ (kept if summed == 0 else kept.t())
    tolerance = 64 * torch.finfo(weight.dtype).eps * float(wanted.abs().max() + with_weight.abs().max())
    return difference.shape == wanted.shape and bool((difference - wanted).abs().max() <= tolerance)


class LayerTap(LayerHook):
    """Lets factors have their gradients where a layer puts out; a hook behind its forward pass.

    Args:
        use: What the layer does with its weight.
        weight: The weight that is made of the factors. Where the layer runs on another one (``functional_call``), they
            get nothing of it here; ``None`` for whatever the layer has.

    Attributes:
        factors: The factors; ``None`` while there are none.
        ran: How the layer ran so far: with gradient recorded, without. Not kept in compiled code.

    """

    def __init__(self, use: Use, weight: nn.Parameter | None = None) -> None:
        self.use, self.weight = use, weight
        self.factors: Factors | None = None
        self.ran: set[bool] = set()
        self._hidden = False

    def attach(self, layer: nn.Module) -> "list[RemovableHandle]":
        """Puts hooks around a layer: within them its weight is a constant, whatever else reads it has its gradient."""
        before = layer.register_forward_pre_hook(_Hide(self))
        # The first one behind the layer: whatever others make of its output is past that. A checkpoint may end its
        # second pass in the middle of the layer.
        return [before, layer.register_forward_hook(self, with_kwargs=True, prepend=True, always_call=True)]

    def hide(self, layer: nn.Module) -> None:
        """The layer is about to run: it gets a constant in place of its weight, if that is made of the factors."""
        weight = self.weight
        if self.factors is not None and weight is not None and layer.weight is weight and weight.requires_grad:
            own_parameters(layer)["weight"] = weight.detach()  # type: ignore[assignment]  # for a moment
            self._hidden = True

    def _show(self, layer: nn.Module) -> bool:
        """Undoes that, and says whether the layer ran on a constant that is the weight."""
        if self._hidden:
            own_parameters(layer)["weight"], self._hidden = self.weight, False
            return True
        return not layer.weight.requires_grad and (self.weight is None or layer.weight is self.weight)

    def __call__(self, layer: nn.Module, args: Any, kwargs: Any, output: Tensor | None) -> Tensor | None:
        """Returns the output, through which the factors get their gradients; there is none if the layer has failed."""
        is_constant, factors = self._show(layer), self.factors
        if factors is None or not is_constant or output is None:
            return None
        compiled, recorded = torch.compiler.is_compiling(), torch.is_grad_enabled()
        if not compiled:
            self.ran.add(recorded)
        if not recorded:
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        left, right, factor, scale = factors
        if compiled:
            return _Compiled.apply(output, x, left, right, scale, factor, self.use)  # type: ignore[no-any-return,no-untyped-call]  # torch's
        return _Eager.apply(output, x, left, right, scale, factor, self.use, self.weight)  # type: ignore[no-any-return,no-untyped-call]


def hides_weight(layer: nn.Module) -> bool:
    """Whether the layer runs on a constant in place of its weight, whose gradient is made behind it."""
    return any(isinstance(hook, _Hide) for hook in own_hooks(layer)[1].values())


class _Hide(LayerHook):
    def __init__(self, tap: LayerTap) -> None:
        self.tap = tap

    def __call__(self, layer: nn.Module, args: Any) -> None:
        self.tap.hide(layer)


class _Compiled(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, output: Any, x: Any, left: Any, right: Any, scale: Any, factor: Any, use: Any) -> Any:
        ctx.save_for_backward(x, left, right, scale)
        ctx.factor, ctx.use = factor, use
        return output.clone()  # the compiler leaves the copy out

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None, *_at_factors(ctx, gradients[0]), None, None, None


class _Eager(torch.autograd.Function):
    @staticmethod
    @override
    def forward(
        ctx: Any, output: Any, x: Any, left: Any, right: Any, scale: Any, factor: Any, use: Any, weight: Any
    ) -> Any:
        ctx.save_for_backward(x, left, right, scale)
        ctx.factor, ctx.use, ctx.weight = factor, use, weight
        ctx.mark_dirty(output)  # it is the very output, which the network may change in place
        return output

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Any) -> Any:
        at_input, at_weight = None, None
        at_factors: tuple[Tensor | None, Tensor | None] = None, None
        # A gradient that is itself differentiated: that of the input, which the layer has given with its weight as a
        # constant, goes by the weight.
        if torch.is_grad_enabled() and ctx.needs_input_grad[1] and ctx.weight is not None:
            at_input = _at_input(ctx.use, ctx.saved_tensors[0], gradients[0], ctx.weight - ctx.weight.detach())
        # In the order of the tensors that were given: the output, the input, the factors, and the weight as the last.
        nodes = [node for node, _ in ctx.next_functions]
        if is_wanted(nodes[2]):
            at_factors = _at_factors(ctx, gradients[0])
        elif ctx.needs_input_grad[7] and is_wanted(nodes[-1]):  # `torch.autograd.grad` by the weight itself
            at_weight = _at_weight(ctx.use, ctx.saved_tensors[0], gradients[0], ctx.weight)
        return gradients[0], at_input, *at_factors, None, None, None, at_weight


def _at_factors(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    x, left, right, scale = ctx.saved_tensors
    at_left, at_right = layer_gradients(ctx.use, x, gradient, Factors(left, right, ctx.factor, scale))
    return at_left.to(left.dtype), at_right.to(right.dtype)


def _at_weight(use: Use, x: Tensor, gradient: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the weight, of its shape and type; differentiable in both."""
    kind, g = gradient.dtype, gradient.reshape(-1, gradient.shape[-1])
    if use.kind == "linear":
        dense = g.t() @ x.reshape(-1, x.shape[-1]).to(kind)
        dense = dense.t() if use.turned else dense
    elif use.kind == "embedding":
        index = x.reshape(-1)
        dense = torch.zeros_like(weight, dtype=kind).index_add(0, index, _without_padding(use, index, g))
    else:
        rows = x.to(kind) if x.dim() == use.dims + 2 else x.to(kind).unsqueeze(0)
        of_weight: Callable[..., Tensor] = _WEIGHT_GRADIENT[use.dims]
        whole = gradient.reshape(len(rows), -1, *gradient.shape[-use.dims :])
        dense = of_weight(rows, weight.shape, whole, use.stride, use.padding, use.dilation, use.groups)
    return dense.to(weight.dtype)


def _at_input(use: Use, x: Tensor, gradient: Tensor, weight: Tensor) -> Tensor:
    """The gradient of a layer's input, differentiable in the weight."""
    weight = weight.to(gradient.dtype)
    if use.kind == "linear":
        return (gradient @ (weight.t() if use.turned else weight)).to(x.dtype)
    of_input: Callable[..., Tensor] = _INPUT_GRADIENT[use.dims]
    shape = x.shape if x.dim() == use.dims + 2 else (1, *x.shape)
    g = gradient.reshape(shape[0], -1, *gradient.shape[-use.dims :])
    return of_input(shape, weight, g, use.stride, use.padding, use.dilation, use.groups).reshape(x.shape).to(x.dtype)


def layer_gradients(use: Use, x: Tensor, gradient: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
    """Gradients of both factors, from a layer's input and the gradient of its output.

    Args:
        use: What the layer does with its weight.
        x: Its input, of any leading dimensions; indices of an embedding.
        gradient: That of its output; products are taken in its type.
        factors: The factors, of the weight as a matrix of outputs by inputs.

    Returns:
        ``dB`` and ``dA``.

    """
    kind = gradient.dtype
    left, right = factors.scaled_left().to(kind), factors.right.to(kind)
    if use.kind == "linear":
        rows, g = x.reshape(-1, x.shape[-1]).to(kind), gradient.reshape(-1, gradient.shape[-1])
        at_left, at_right = g.t() @ (rows @ right.t()), (g @ left).t() @ rows
    elif use.kind == "embedding":
        at_left, at_right = _of_embedding(use, x.reshape(-1), gradient.reshape(-1, gradient.shape[-1]), left, right)
    else:
        at_left, at_right = _of_convolution(use, x.to(kind), gradient, left, right)
    return factors.scale_left_gradient(at_left.to(factors.left.dtype)), at_right


def _of_embedding(use: Use, index: Tensor, g: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    g, table = _without_padding(use, index, g), right.t()
    at_rows = torch.zeros(table.shape, dtype=torch.promote_types(g.dtype, torch.float32), device=g.device)
    return g.t() @ table[index], at_rows.index_add(0, index, (g @ left).to(at_rows.dtype)).t()


def _without_padding(use: Use, index: Tensor, g: Tensor) -> Tensor:
    return g * (index != use.padding_row).unsqueeze(1) if use.padding_row >= 0 else g


def _of_convolution(use: Use, x: Tensor, g: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    if x.dim() == use.dims + 1:
        x, g = x.unsqueeze(0), g.unsqueeze(0)
    rank, groups, rows = len(right), use.groups, len(x)
    kernels = right.reshape(1, rank, *use.shape).expand(groups, rank, *use.shape).reshape(-1, *use.shape)
    options = use.stride, use.padding, use.dilation, groups
    u = _FORWARD[use.dims](x, kernels, None, *options).reshape(rows, groups, rank, -1)
    split = g.reshape(rows, groups, -1, u.shape[-1])
    at_left = torch.einsum("ngol,ngrl->gor", split, u).reshape(-1, rank)
    h = torch.einsum("ngol,gor->ngrl", split, left.reshape(groups, -1, rank))
    h = h.reshape(rows, groups * rank, *g.shape[2:])
    of_kernels: Callable[..., Tensor] = _WEIGHT_GRADIENT[use.dims]
    at_kernels = of_kernels(x, kernels.shape, h, *options)
    return at_left, at_kernels.reshape(groups, rank, -1).sum(0)


_FORWARD = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_WEIGHT_GRADIENT = {
    1: convolution_gradients.conv1d_weight,
    2: convolution_gradients.conv2d_weight,
    3: convolution_gradients.conv3d_weight,
}
_INPUT_GRADIENT = {
    1: convolution_gradients.conv1d_input,
    2: convolution_gradients.conv2d_input,
    3: convolution_gradients.conv3d_input,
}
