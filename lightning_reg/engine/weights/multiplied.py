"""Which parameters of a layer are weights of sums over its inputs, and along which dimension these run.

Of torch's layers that is known. Layers of other libraries (their own ``Linear``, ``Conv1D`` of transformers) are asked:
a copy of the layer runs on zeros, and what its ``weight`` is given to tells. What is left is listed by
:func:`other_matrices`, and :func:`is_router` tells the small layers that choose experts from the others.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_reg.engine.host.generators import isolated_randomness
from lightning_reg.engine.host.modules import Convolution, TransposedConvolution, own_parameters

__all__ = ["is_router", "multiplied_weights", "other_matrices"]

_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def multiplied_weights(layer: nn.Module) -> dict[str, int]:
    """Names of a layer's own weights that multiply its inputs, each with the dimension that is summed over.

    Args:
        layer: Any layer; layers within it do not count. It stays as it is, and so do the global random states.

    Returns:
        1 for ``(out, in)`` and ``(out, in, *kernel)``, 0 for ``(in, out)``. A name may be there whose value is not set,
        or is computed from other parameters. Empty for other layers.

    """
    if isinstance(layer, nn.MultiheadAttention):
        return dict.fromkeys(_ATTENTION, 1)
    if isinstance(layer, TransposedConvolution):
        return {"weight": 0}
    if isinstance(layer, nn.Linear | Convolution):
        return {"weight": 1}
    weight = own_parameters(layer).get("weight")
    if weight is None or isinstance(weight, nn.UninitializedParameter) or type(layer).__module__.startswith("torch."):
        return {}
    dim = _asked(layer) if weight.dim() == 2 and weight.is_floating_point() else None
    return {} if dim is None else {"weight": dim}


_NO_PRODUCTS = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, ParametrizationList)


def other_matrices(layer: nn.Module) -> dict[str, Tensor]:
    """A layer's own parameters of two dimensions and more of which :func:`multiplied_weights` knows nothing.

    Args:
        layer: Any layer; layers within it do not count.

    Returns:
        By name: stacked experts, recurrent weights, tables of positions. Nothing of embeddings and norms, by class.

    """
    kind = type(layer).__name__
    if isinstance(layer, _NO_PRODUCTS) or any(word in kind for word in ("Embedding", "Norm")):
        return {}
    known = multiplied_weights(layer)
    own = {name: p for name, p in own_parameters(layer).items() if p is not None and name not in known}
    return {n: p for n, p in own.items() if not isinstance(p, nn.UninitializedParameter) and p.dim() > 1}


def is_router(name: str, layer: nn.Module) -> bool:
    """Whether a linear layer chooses the experts of a mixture: few outputs that decide over whole blocks.

    Told by names: ``router`` in that of the layer or of its class; ``gate`` with fewer outputs than inputs
    (``mlp.gate``, ``gate.wg``); ``shared_expert_gate`` and its like with one output. ``gate_proj`` is none.

    Args:
        name: As in ``named_modules()``.
        layer: A layer with a weight that multiplies.

    Returns:
        Whether it is one.

    """
    if "router" in name.lower() or "Router" in type(layer).__name__:
        return True
    weight, parts = own_parameters(layer).get("weight"), name.lower().split(".")
    if weight is None or isinstance(weight, nn.UninitializedParameter) or weight.dim() != 2:
        return False
    summed = multiplied_weights(layer).get("weight", 1)
    inputs, outputs = weight.shape[summed], weight.shape[1 - summed]
    return ("gate" in parts and outputs < inputs) or (parts[-1].endswith("_gate") and outputs == 1)


def _asked(layer: nn.Module) -> int | None:
    """The dimension that a layer's ``weight`` is summed over, ``None`` if it does not run or does something else."""
    try:
        twin = copy.deepcopy(layer).eval()
        weight = own_parameters(twin)["weight"]
        if weight is None:
            return None
        for size in dict.fromkeys((weight.shape[1], weight.shape[0])):
            watch = _Watch(weight)
            with isolated_randomness(), torch.no_grad(), watch:
                x = torch.zeros(2, size, dtype=weight.dtype, device=weight.device)
                if _runs(twin, x):
                    return watch.dims.pop() if len(watch.dims) == 1 else None
    except Exception:  # noqa: BLE001 # a layer of anybody's; what cannot be copied cannot be asked
        return None
    return None


def _runs(layer: nn.Module, x: Tensor) -> bool:
    try:
        layer.forward(x)
    except Exception:  # noqa: BLE001 # it takes something else
        return False
    return True


class _Watch(TorchFunctionMode):
    """Notes what a weight, or its transpose, is given to.

    Args:
        weight: The weight.

    Attributes:
        dims: The dimensions that it was summed over.

    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._seen: list[tuple[Tensor, bool]] = [(weight, False)]  # with whether it is the transpose
        self.dims: set[int] = set()

    @override
    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[Any], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given: Mapping[int | str, Any] = dict(enumerate(args)) | (kwargs or {})
        for place, value in given.items():
            transposed = next((is_turned for seen, is_turned in self._seen if seen is value), None)
            if transposed is None:
                continue
            summed = _SUMMED.get(_name(func), {}).get(place)
            if summed is not None:
                self.dims.add(1 - summed if transposed else summed)
            elif place in (0, "input", "self") and _name(func) in _TURNS and isinstance(result, Tensor):
                self._seen.append((result, not transposed))
            elif place in (0, "input", "self") and _name(func) in _KEEPS and isinstance(result, Tensor):
                self._seen.append((result, transposed))
        return result


def _name(func: Callable[..., Any]) -> str:
    if func is F.linear:
        return "linear"
    name: str = getattr(func, "__name__", "")
    return name if name != "__get__" else getattr(getattr(func, "__self__", None), "__name__", "")


_PRODUCT: dict[int | str, int] = {0: 1, "input": 1, 1: 0, "mat2": 0, "other": 0}
_SUMMED: dict[str, dict[int | str, int]] = {
    "linear": {1: 1, "weight": 1},
    "addmm": {1: 1, "mat1": 1, 2: 0, "mat2": 0},
    **dict.fromkeys(("matmul", "mm", "__matmul__"), _PRODUCT),
    "__rmatmul__": {0: 0, 1: 1},
}
_TURNS = {"t", "T", "mT", "transpose", "swapaxes", "permute", "adjoint"}
_KEEPS = {"to", "float", "half", "bfloat16", "double", "type_as", "contiguous", "clone", "detach"}
