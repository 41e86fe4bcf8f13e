"""Parameters that are split over processes by rows (``fully_shard``, tensor parallelism): the rows here, and the whole.

Parameters that are not split pass through every function as they are, so that callers need not ask.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

from lightning_reg.engine.host.modules import reshards

__all__ = [
    "Layout",
    "cut_rows",
    "is_split",
    "layout_of",
    "local",
    "own_rows",
    "reshard_",
    "total",
    "whole",
    "whole_like",
]


def is_split(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether a tensor is distributed over processes, be it in equal copies."""
    return type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "placements")


class Layout(NamedTuple):
    """How a tensor is split, without the tensor."""

    device_mesh: Any
    placements: tuple[Any, ...]
    shape: torch.Size


def layout_of(tensor: Tensor | Layout) -> Layout | None:
    """How a tensor is split; ``None`` if it is not."""
    if isinstance(tensor, Layout):
        return tensor
    return Layout(tensor.device_mesh, tuple(tensor.placements), tensor.shape) if is_split(tensor) else None


def cut_rows(parameter: Tensor) -> str:
    """Why the rows of a parameter do not lie whole and in order in one process; "" if they do."""
    if not is_split(parameter):
        return ""
    for placement in parameter.placements:
        if placement.is_replicate():
            continue
        if type(placement).__name__ != "Shard":
            return f"is split in a way that does not leave rows in order ({placement})"
        if not placement.is_shard(0):
            return f"is split as {placement}, which cuts its rows"
    return ""


def local(tensor: Tensor) -> Tensor:
    """The rows of this process, without gradient; what is written into them stands in the parameter."""
    if not is_split(tensor):
        return tensor.detach()
    with torch.no_grad():
        return tensor.to_local()


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """All rows, gathered: a collective if the tensor is split."""
    return tensor.full_tensor() if is_split(tensor) else tensor.detach()


@torch.no_grad()
def whole_like(part: Tensor, like: Tensor | Layout) -> Tensor:
    """The whole of what is split as a parameter is (a mask, an average) from each process's part: a collective."""
    layout = layout_of(like)
    if layout is None:
        return part
    from torch.distributed.tensor import DTensor

    # Collectives of booleans are not everywhere.
    plain = part.to(torch.uint8) if part.dtype is torch.bool else part
    stride = torch.empty(layout.shape, device="meta").stride()
    split = DTensor.from_local(
        plain.contiguous(), layout.device_mesh, layout.placements, shape=layout.shape, stride=stride
    )
    return split.full_tensor().to(part.dtype)


def own_rows(values: Tensor, like: Tensor | Layout) -> Tensor:
    """Of a whole tensor this process's part, usually rows; a view."""
    layout = layout_of(like)
    if layout is None:
        return values
    mesh = layout.device_mesh
    for dim, (placement, place) in enumerate(zip(layout.placements, mesh.get_coordinate() or (), strict=True)):
        if placement.is_shard():
            chunks = values.chunk(mesh.size(dim), placement.dim)  # there may be fewer of them than processes
            values = chunks[place] if place < len(chunks) else values.narrow(placement.dim, 0, 0)
    return values


@torch.no_grad()
def total(values: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Tensor:
    """Sum of what was counted in the rows of this process, over parameters and over the processes that share them.

    Args:
        values: By name of a parameter, tensors of the same shape; at least one.
        parameters: By name; what is not among them was counted in all rows.

    Returns:
        Their sum: one collective for all parameters that are split alike.

    """
    from_here: list[Tensor] = []
    shared: dict[object, list[tuple[Tensor, Tensor]]] = {}
    for name, value in values.items():
        parameter = parameters.get(name)
        if parameter is not None and is_split(parameter):
            shared.setdefault((parameter.device_mesh, parameter.placements), []).append((value, parameter))
        else:
            from_here.append(value)
    for counted in shared.values():
        parameter = counted[0][1]
        from_here.append(_sum_over_shards(torch.stack([value for value, _ in counted]).sum(0), parameter))
    return torch.stack([value.to(from_here[0].device) for value in from_here]).sum(0)


def _sum_over_shards(value: Tensor, parameter: Tensor) -> Tensor:
    if is_split(parameter):
        for dim, placement in enumerate(parameter.placements):
            if placement.is_shard():
                dist.all_reduce(value, group=parameter.device_mesh.get_group(dim))
    return value


def reshard_(module: nn.Module) -> None:
    """Lets ``fully_shard`` forget gathered parameters, so that the next forward pass gathers what the rows are then.

    Until then a module that keeps gathered parameters after its forward pass shows those as its parameters, too.
    """
    for submodule in module.modules():
        if reshards(submodule):
            submodule.reshard()  # type: ignore[operator]  # torch: any attribute is a Tensor or Module
