"""Which layer makes the input channels of another one, and what stands between: read off the traced forward pass."""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from typing_extensions import override

from lightning_reg.engine.host.modules import own_parameters

__all__ = ["Chain", "find_chain"]

_CHANNELWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.Softplus,
    nn.Hardswish, nn.Hardsigmoid, nn.Identity, nn.Dropout, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d,
    nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
)  # fmt: skip
_CHANNELWISE_FUNCTIONS = {
    F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.gelu, F.silu, F.mish, F.softplus, F.hardswish, F.hardsigmoid,
    F.dropout, torch.relu, torch.tanh, torch.sigmoid, torch.square,
    operator.mul, operator.add, operator.sub, operator.truediv, operator.pow, operator.neg,
}  # fmt: skip
_CHANNELWISE_METHODS = {"relu", "tanh", "sigmoid", "square", "contiguous", "clone", "mul", "add"}
_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

_NOT_CALLED = "no module around it calls it in its `forward`"
_UNTRACEABLE = "a forward pass around it cannot be traced"

Step = tuple[Callable[..., Any] | str | nn.Module, Callable[[Tensor], tuple[Any, ...]], Callable[[Tensor], Any]]


@dataclass(frozen=True)
class Chain:
    """A layer, the layer that makes its input channels, and all that is computed between them.

    Args:
        steps: From the producer to the consumer: what is called, and its arguments for the value so far.

    """

    steps: Sequence[Step]

    @property
    def modules(self) -> list[nn.Module]:
        """The layers: producer first, consumer last."""
        return [call for call, _, _ in self.steps if isinstance(call, nn.Module)]

    @property
    def norms(self) -> list[nn.Module]:
        """Layers between with a parameter per channel."""
        return [m for m in self.modules[1:-1] if _is_norm(m)]

    def run(self, x: Tensor, twins: Mapping[nn.Module, nn.Module]) -> Tensor:
        """What the consumer makes of an input of the producer, with other layers in place of the chain's own."""
        for call, args, kwargs in self.steps:
            if isinstance(call, str):
                x = getattr(x, call)(*args(x)[1:], **kwargs(x))
            else:
                function = twins[call] if isinstance(call, nn.Module) else call
                x = function(*args(x), **kwargs(x))
        return x


class _Tracer(fx.Tracer):
    def __init__(self, *, deep: bool) -> None:
        super().__init__()
        self._deep = deep

    @override
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) if self._deep else True


def find_chain(layers: Mapping[str, nn.Module], name: str) -> Chain | str:
    """The chain that ends in a layer.

    The modules that hold the layer are traced, from the inside out; a LightningModule is left out, because its
    ``training_step`` need not call its ``forward``.

    Args:
        layers: All layers by name, the outermost module under "".
        name: Name of the layer.

    Returns:
        The chain; or why there is none.

    """
    consumer = layers[name]
    why = _unfit(consumer)
    if why:
        return why
    why = _NOT_CALLED
    parts = name.split(".")
    outermost = 1 if hasattr(layers[""], "training_step") else 0
    for depth in range(len(parts) - 1, outermost - 1, -1):
        holder_name = ".".join(parts[:depth])
        holder = layers[holder_name]
        if isinstance(holder, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            between = (holder.linear1, holder.activation, holder.dropout, holder.linear2)
            if consumer is not holder.linear2:
                return "its input is not another layer's"
            return _unfit(holder.linear1) or Chain([_plain(call) for call in between])
        for deep in (False, True):
            found = _chain_in(holder, consumer, deep=deep)
            if isinstance(found, Chain):
                return found
            if found and (found != _UNTRACEABLE or why == _NOT_CALLED):
                why = f"{found} (in {holder_name!r})" if holder_name else found
    return why


def _plain(call: Callable[..., Any]) -> Step:
    return call, lambda x: (x,), lambda _: {}


def _chain_in(holder: nn.Module, consumer: nn.Module, *, deep: bool) -> Chain | str:
    """The chain, or why there is none; "" if the consumer is not called."""
    with _evaluating(holder):
        try:
            graph = _Tracer(deep=deep).trace(holder)
        except Exception:  # noqa: BLE001 # the user's forward may raise anything when it gets no numbers
            return _UNTRACEABLE if deep else ""
    modules = dict(holder.named_modules())
    called = [modules.get(str(node.target)) if node.op == "call_module" else None for node in graph.nodes]
    ends = [node for node, module in zip(graph.nodes, called, strict=True) if module is consumer]
    if len(ends) != 1:
        return "it is called more than once" if ends else ""
    steps, node = [_step(ends[0], modules)], ends[0]
    while True:
        if len(node.all_input_nodes) != 1:
            return f"{_said(node)} joins several inputs"
        node = node.all_input_nodes[0]
        if node.op == "placeholder":
            return "its input comes from outside"
        if len(node.users) != 1:
            return f"the output of {_said(node)} is used elsewhere, too"
        steps.insert(0, _step(node, modules))
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if module is not None and called.count(module) != 1:
            return f"{_said(node)} is called more than once"
        if isinstance(module, _LINEAR):
            return _unfit(module) or _fitting(Chain(steps))
        if not _is_channelwise(node, module):
            return f"{_said(node)} is not known to work on each channel by itself"


def _fitting(chain: Chain) -> Chain | str:
    producer, consumer = chain.modules[0], chain.modules[-1]
    channels = own_parameters(producer)["weight"].shape[0]  # type: ignore[union-attr]  # `_unfit` saw it
    if own_parameters(consumer)["weight"].shape[1] != channels:  # type: ignore[union-attr]  # as above
        return "its input channels are not those of the layer before it"
    linear = isinstance(producer, nn.Linear) and isinstance(consumer, nn.Linear)
    for norm in chain.norms:
        if isinstance(norm, _BATCH_NORMS):
            fits = norm.num_features == channels
        else:
            fits = linear and tuple(norm.normalized_shape) == (channels,)  # type: ignore[arg-type]  # a tuple
        if not fits:
            return f"{type(norm).__name__} between does not norm these channels"
    return chain


def _unfit(layer: nn.Module) -> str:
    if not isinstance(layer, _LINEAR) or not isinstance(own_parameters(layer).get("weight"), nn.Parameter):
        return "it is no plain linear layer or convolution"
    return "" if getattr(layer, "groups", 1) == 1 else "it is a convolution in groups"


def _is_norm(module: nn.Module | None) -> bool:
    return isinstance(module, (*_BATCH_NORMS, nn.LayerNorm)) or type(module).__name__ == "RMSNorm"


def _is_channelwise(node: fx.Node, module: nn.Module | None) -> bool:
    if module is not None:
        return isinstance(module, (*_CHANNELWISE, nn.Flatten)) or _is_norm(module)
    if node.op == "call_method":
        return node.target in _CHANNELWISE_METHODS or node.target == "flatten"
    return node.op == "call_function" and (node.target in _CHANNELWISE_FUNCTIONS or node.target is torch.flatten)


def _step(node: fx.Node, modules: Mapping[str, nn.Module]) -> Step:
    call = modules[str(node.target)] if node.op == "call_module" else node.target
    return (
        call,
        lambda x: tuple(map_arg(node.args, lambda _: x)),
        lambda x: dict(map_arg(node.kwargs, lambda _: x)),
    )


def _said(node: fx.Node) -> str:
    return repr(node.target) if isinstance(node.target, str) else repr(getattr(node.target, "__name__", node.name))


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode
