"""Parameters that are split over processes (FSDP2, tensor parallelism): averaged shard by shard, saved whole."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

__all__ = ["Layouts", "layouts_of", "local_parts", "own_parts", "whole"]

# Of each tensor that is split: the mesh, the placements, the shape and the strides of the whole.
Layouts = dict[str, tuple[Any, tuple[Placement, ...], torch.Size, tuple[int, ...]]]


def layouts_of(tensors: Mapping[str, Tensor]) -> Layouts:
    """How those that are split are laid out; empty where nothing is."""
    return {
        name: (tensor.device_mesh, tuple(tensor.placements), tensor.shape, tensor.stride())
        for name, tensor in tensors.items()
        if isinstance(tensor, DTensor)
    }


def local_parts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This process's shards, on the memory of the given tensors; tensors that are whole as they are."""
    return {name: _local(tensor) if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}


@torch.no_grad()
def _local(tensor: DTensor) -> Tensor:
    return tensor.to_local()


def whole(state: dict[str, Any], layouts: Layouts) -> dict[str, Any]:
    """The same state with whole tensors, on the CPU, in place of shards; all processes must take part.

    Args:
        state: Shards under the names of the layouts, in it or in mappings and lists of mappings in it.
        layouts: How they are laid out.

    Returns:
        A new state, or the given one where nothing is split.

    """
    if not layouts:
        return state
    result: dict[str, Any] = {}
    for name, value in state.items():
        if name in layouts and isinstance(value, Tensor):
            mesh, placements, shape, stride = layouts[name]
            shard = value.to(mesh.device_type)
            split = DTensor.from_local(shard, mesh, placements, run_check=False, shape=shape, stride=stride)
            result[name] = split.full_tensor().cpu()
        elif isinstance(value, dict):
            result[name] = whole(value, layouts)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            result[name] = [whole(each, layouts) for each in value]
        else:
            result[name] = value
    return result


def own_parts(values: Mapping[str, Tensor], layouts: Layouts) -> dict[str, Tensor]:
    """This process's shards of whole tensors, each where it was; all processes must take part."""
    result = dict(values)
    for name in [name for name in layouts if name in values]:  # every process in the same order
        mesh, placements, _, _ = layouts[name]
        split = distribute_tensor(values[name].to(mesh.device_type), mesh, placements)
        result[name] = _local(split).to(values[name].device, copy=True)
    return result
