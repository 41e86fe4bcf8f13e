"""Averages of parameters that are split over processes: by shards, and whole in the state."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_reg.engine.weights.shards import Layout, layout_of, local, own_rows, whole_like

__all__ = ["Layouts", "layouts_of", "local_parts", "own_parts", "whole"]

Layouts = dict[str, Layout]


def layouts_of(tensors: Mapping[str, Tensor]) -> Layouts:
    """How those that are split are laid out; empty where nothing is."""
    return {name: layout for name, tensor in tensors.items() if (layout := layout_of(tensor)) is not None}


def local_parts(tensors: Mapping[str, Tensor], layouts: Layouts) -> dict[str, Tensor]:
    """This process's shards, on the memory of the given tensors; tensors that are whole as they are."""
    return {name: local(tensor) if name in layouts else tensor for name, tensor in tensors.items()}


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
            result[name] = whole_like(value.to(layouts[name].device_mesh.device_type), layouts[name]).cpu()
        elif isinstance(value, dict):
            result[name] = whole(value, layouts)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            result[name] = [whole(each, layouts) for each in value]
        else:
            result[name] = value
    return result


def own_parts(values: Mapping[str, Tensor], layouts: Layouts) -> dict[str, Tensor]:
    """This process's shards of whole tensors; others as they are."""
    return {name: own_rows(v, layouts[name]).clone() if name in layouts else v for name, v in values.items()}
