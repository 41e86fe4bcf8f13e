"""Whether a tensor's numbers lie in memory one by one, so that they can be averaged, and where."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["fault_of", "place_of"]


def fault_of(value: object) -> str:
    """Why a value cannot be averaged, as the rest of a sentence.

    Args:
        value: An entry of a state dict.

    Returns:
        What it is and what to do; "" for a tensor whose numbers lie in memory, and for what is no tensor.

    """
    if not isinstance(value, Tensor):
        return ""
    if value.is_meta:
        return "has no numbers (it is on the device meta). Save it once it has got its values."
    if value.is_nested or value.layout is not torch.strided:
        what = "a nested tensor" if value.is_nested else f"sparse ({value.layout})"
        return f"is {what}. Save it dense (`.to_dense()`, `.to_padded_tensor(0)`)."
    if value.is_quantized or "float4" in str(value.dtype):
        return f"is quantised ({value.dtype}). Dequantise it before you save it."
    return ""


def place_of(value: Tensor) -> tuple[Any, ...]:
    """Where a tensor's numbers lie, and how they are read from there: tensors of one place are tied."""
    lazily = value.is_conj(), value.is_neg()  # what lies in memory is not what is meant
    return value.data_ptr(), value.dtype, tuple(value.shape), tuple(value.stride()), *lazily
