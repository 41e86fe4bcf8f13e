"""Private names of torch's modules: own tensors, hooks, what ``torch.compile`` puts around a network."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.conv import _ConvNd as Convolution
from torch.nn.modules.conv import _ConvTransposeNd as TransposedConvolution
from torch.nn.modules.dropout import _DropoutNd as Dropout

from lightning_reg.engine.host.names import plain_name

__all__ = [
    "BatchNorm",
    "Convolution",
    "Dropout",
    "TransposedConvolution",
    "checksum",
    "forget_compiled_call",
    "is_compiled",
    "own_buffers",
    "own_hooks",
    "own_parameters",
    "reset_of",
    "reshards",
    "semi_structured",
    "uncompiled",
]


def own_parameters(layer: nn.Module) -> dict[str, nn.Parameter | None]:
    """The layer's own parameters, without those of layers within it; the very dictionary."""
    return layer._parameters


def own_buffers(layer: nn.Module) -> dict[str, Tensor | None]:
    """The layer's own buffers, without those of layers within it; the very dictionary."""
    return layer._buffers


def own_hooks(layer: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    """The layer's own hooks after and before its forward pass; the very dictionaries."""
    return layer._forward_hooks, layer._forward_pre_hooks


def uncompiled(layer: nn.Module) -> nn.Module | None:
    """The network that ``torch.compile(layer)`` was called on, ``None`` for a layer that does not come from there."""
    inner = getattr(layer, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else None


def is_compiled(layer: nn.Module) -> bool:
    """Whether a layer went through ``torch.compile`` or ``layer.compile()``."""
    return uncompiled(layer) is not None or layer._compiled_call_impl is not None


def forget_compiled_call(layer: nn.Module) -> None:
    """Undoes ``layer.compile()``."""
    layer._compiled_call_impl = None


def reset_of(layer: nn.Module) -> Any:
    """What draws the layer's initial weights anew, under either of torch's names; ``None`` if it cannot."""
    return getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)


def reshards(layer: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on the layer: torch's FSDPModule, which older versions do not have."""
    return hasattr(type(layer), "_get_fsdp_state")


def semi_structured(weight: Tensor, *, by_cutlass: bool) -> Tensor:
    """A 2:4 sparse matrix in torch's compressed form, for one of its two libraries of kernels."""
    from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

    forced = SparseSemiStructuredTensor._FORCE_CUTLASS
    SparseSemiStructuredTensor._FORCE_CUTLASS = by_cutlass
    try:
        return to_sparse_semi_structured(weight)
    finally:
        SparseSemiStructuredTensor._FORCE_CUTLASS = forced


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """A hash of tensors, of their names, types and shapes, in any order; reads them to the last bit."""
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        found.update(f"{plain_name(name)} {value.dtype} {tuple(value.shape)} ".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
