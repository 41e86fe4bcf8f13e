"""Whether weights are finite, asked and answered on the device, and what stands in for those that are not."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["all_finite", "chosen_if"]


_LARGE = 1 << 14


@torch.no_grad()
def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether all numbers are finite, and so is the sum of each tensor's squares; no host sync.

    Args:
        tensors: Floating-point or complex ones.

    Returns:
        A boolean scalar on the first tensor's device; true where there is nothing.

    """
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            groups.setdefault(tensor.dtype, []).append(tensor)
    answers = []
    for dtype, group in groups.items():
        device = tensors[0].device
        sizes = [size if size.device == device else size.to(device) for size in _sizes(group, dtype)]
        answers.append(torch.stack(sizes).isfinite().all())
    if not answers:
        return torch.ones((), dtype=torch.bool)
    return answers[0] if len(answers) == 1 else torch.stack(answers).all()


def _sizes(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """A number for each tensor that is finite if the sum of its squares is."""
    sizes, rest = [], tensors
    if dtype in (torch.float32, torch.float64):
        # On the CPU a scalar product takes half of a norm's time, and a call for each tensor, which small ones feel.
        large = [t for t in tensors if t.numel() >= _LARGE and t.device.type == "cpu" and t.is_contiguous()]
        sizes = [torch.dot(flat, flat) for flat in (tensor.view(-1) for tensor in large)]
        rest = [t for t in tensors if t.numel() < _LARGE or t.device.type != "cpu" or not t.is_contiguous()]
    wide = torch.float32 if dtype.itemsize < 4 else None  # in their own type the norms may overflow
    return [*sizes, *torch._foreach_norm(rest, 2, dtype=wide)] if rest else sizes


def chosen_if(condition: Tensor, values: Sequence[Tensor], others: Sequence[Tensor] | None = None) -> list[Tensor]:
    """``values`` to the last bit where the condition holds, else ``others``; a ``torch.where`` over many tensors.

    Args:
        condition: A boolean scalar.
        values: Tensors; what of them is not finite leaves no trace if it is not chosen.
        others: Tensors of the same shapes and types; ``None`` for zeros.

    Returns:
        The chosen ones: given or new tensors.

    """
    if condition.device.type == "cpu" and all(value.device.type == "cpu" for value in values):  # nothing to wait for
        return list(values) if condition else list(others or (torch.zeros_like(value) for value in values))
    return chosen_on_device(condition, values, others)


def chosen_on_device(
    condition: Tensor, values: Sequence[Tensor], others: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """The same without a host sync, in three fused operations for all tensors of a device; new tensors."""
    result = [value.detach() for value in values]
    places: dict[torch.device, list[int]] = {}
    for position, value in enumerate(result):
        places.setdefault(value.device, []).append(position)
    for device, positions in places.items():
        holds = condition.to(device, torch.int8)
        # Of bits, since 0 times NaN is not 0.
        bits = torch._foreach_mul([_bits(result[position]) for position in positions], holds)
        if others is not None:
            torch._foreach_add_(bits, torch._foreach_mul([_bits(others[p].detach()) for p in positions], 1 - holds))
        for position, chosen in zip(positions, bits, strict=True):
            dtype = result[position].dtype
            real = chosen.view(dtype.to_real() if dtype.is_complex else dtype)
            result[position] = torch.view_as_complex(real) if dtype.is_complex else real
    return result


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(value: Tensor) -> Tensor:
    real = torch.view_as_real(value) if value.is_complex() else value
    return real.view(_BITS[real.itemsize])
