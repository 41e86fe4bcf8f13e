"""2:4 weights in the compressed form that NVIDIA's sparse tensor cores compute with."""

import statistics
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_reg.engine.host.modules import own_parameters, semi_structured
from lightning_reg.engine.host.names import plain_name
from lightning_reg.engine.weights.multiplied import multiplied_weights, other_matrices
from lightning_reg.sparsity.nm_sparsity.core import check_nm

__all__ = ["semi_structured_refusal", "to_semi_structured"]

# Multiples that rows and columns must be, by backend and type.
_MULTIPLES = {
    ("cusparselt", torch.float16): (16, 16),
    ("cusparselt", torch.bfloat16): (16, 16),
    ("cusparselt", torch.int8): (32, 32),
    ("cusparselt", torch.float8_e4m3fn): (32, 32),
    ("cutlass", torch.float16): (32, 64),
    ("cutlass", torch.bfloat16): (32, 64),
    ("cutlass", torch.float32): (32, 32),
    ("cutlass", torch.int8): (16, 128),
}


@dataclass(frozen=True)
class ExportedLayer:
    """What became of one layer with weights of two dimensions or more.

    Args:
        name: Name of the layer.
        why_dense: Why it stayed dense; "" if it was converted.
        dense_ms: Time of the dense layer in the probe; 0 if there was none.
        sparse_ms: Time of the compressed layer.

    """

    name: str
    why_dense: str
    dense_ms: float = 0.0
    sparse_ms: float = 0.0


def semi_structured_refusal(weight: Tensor, backend: Literal["cusparselt", "cutlass"] = "cusparselt") -> str:
    """Why a weight cannot be compressed without loss.

    Args:
        weight: As it would be converted: with its zeros, in its final type.
        backend: ``"cusparselt"`` takes float16, bfloat16, int8 and float8_e4m3fn; ``"cutlass"`` float16, bfloat16, int8
            and float32 (pattern 1:2).

    Returns:
        The reason; "" if it can be compressed.

    Example:
        >>> semi_structured_refusal(torch.ones(64, 64, dtype=torch.float16))
        'not 2:4: 1024 of 1024 groups have more'

    """
    multiples = _MULTIPLES.get((backend, weight.dtype))
    if multiples is None:
        return f"{backend} does not take {str(weight.dtype).removeprefix('torch.')}"
    if weight.dim() != 2:
        return f"{weight.dim()} dimensions"
    if any(size % multiple or size < multiple for size, multiple in zip(weight.shape, multiples, strict=True)):
        return f"shape {tuple(weight.shape)}: must be multiples of {multiples[0]} and {multiples[1]}"
    n, m = (1, 2) if weight.dtype is torch.float32 else (2, 4)
    violations = check_nm(weight, n, m)
    return f"not {n}:{m}: {violations} of {weight.numel() // m} groups have more" if violations else ""


def to_semi_structured(
    model: nn.Module,
    dtype: Literal["float16", "bfloat16", "float32"] = "bfloat16",
    backend: Literal["cusparselt", "cutlass"] = "cusparselt",
    rows: int = 4096,
    only_faster: bool = True,
) -> list[ExportedLayer]:
    """Compresses the 2:4 weights of a model's plain ``nn.Linear`` layers, in place, for inference on a GPU.

    Every weight is verified first, because torch itself drops what does not fit without a word. Then dense and
    compressed layer are timed on random input. The conversion has not been run on a GPU yet. A model that is not
    converted computes the same everywhere, with zeros in dense weights.

    Args:
        model: On a CUDA device; moved to ``dtype``.
        dtype: Type of weights and inputs.
        backend: Library behind torch's sparse tensors.
        rows: Rows of the input on which the layers are timed.
        only_faster: Whether layers stay dense that are not faster compressed.

    Returns:
        What became of each layer: converted or why not, and the two times. Layers of other classes (``Conv1D`` of
        transformers, attention's own projections, convolutions, stacked experts) stay dense and say so; so does a
        weight that another layer shares, which would need the dense one beside it.

    Raises:
        ValueError: If an argument is not one of its choices.
        RuntimeError: If the model is not on a CUDA device.

    """
    types = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
    if dtype not in types or backend not in ("cusparselt", "cutlass"):
        raise ValueError(f"to_semi_structured: no such `dtype` or `backend`: {dtype!r}, {backend!r}.")
    devices = {parameter.device.type for parameter in model.parameters()}
    if devices != {"cuda"}:
        raise RuntimeError(
            f"to_semi_structured: the model is on {', '.join(sorted(devices)) or 'no device'}; compressed 2:4 weights"
            " exist on CUDA devices only. As it is, with zeros in dense weights, the model computes the same anywhere."
        )
    model.to(types[dtype])
    return [
        ExportedLayer(name, why) if layer is None else _convert(name, layer, backend, rows, only_faster)
        for name, layer, why in layers_and_refusals(model, backend)
    ]


def layers_and_refusals(
    model: nn.Module, backend: Literal["cusparselt", "cutlass"]
) -> list[tuple[str, nn.Linear | None, str]]:
    """Name of each layer with matrices but embeddings and norms; it itself if it can be converted, or why not."""
    users: dict[int, list[str]] = {}
    layers = {plain_name(f"{name}.")[:-1]: layer for name, layer in model.named_modules()}
    for name, layer in layers.items():
        for p in own_parameters(layer).values():
            users.setdefault(id(p), []).append(name)
    found: list[tuple[str, nn.Linear | None, str]] = []
    for name, layer in layers.items():
        own = own_parameters(layer)
        weight, others = own.get("weight"), [user for user in users.get(id(own.get("weight")), []) if user != name]
        if isinstance(layer, nn.Linear) and weight is None:
            found.append((name, None, "computed from other parameters"))
        elif type(layer) is not nn.Linear or weight is None:  # an attention reads its out-projection past that layer
            weights = [own.get(key) for key in multiplied_weights(layer)] + list(other_matrices(layer).values())
            if any(weight is not None for weight in weights):
                found.append((name, None, f"of {type(layer).__name__}: only plain nn.Linear layers are converted"))
        else:
            why = f"shared with {others[0]}" if others else semi_structured_refusal(weight, backend)
            found.append((name, None if why else layer, why))
    return found


def _convert(name: str, layer: nn.Linear, backend: Any, rows: int, only_faster: bool) -> ExportedLayer:  # noqa: ANN401 # a Literal
    dense, x = layer.weight, torch.randn(rows, layer.in_features, device=layer.weight.device, dtype=layer.weight.dtype)
    dense_ms = _milliseconds(layer, x)
    compressed = semi_structured(dense.detach().contiguous(), by_cutlass=backend == "cutlass")
    layer.weight = nn.Parameter(compressed, requires_grad=False)
    sparse_ms = _milliseconds(layer, x)
    if only_faster and sparse_ms >= dense_ms:
        layer.weight = dense
        return ExportedLayer(name, f"slower compressed, on {rows} rows", dense_ms, sparse_ms)
    return ExportedLayer(name, "", dense_ms, sparse_ms)


@torch.inference_mode()
def _milliseconds(layer: nn.Module, x: Tensor, times: int = 20) -> float:
    found = []
    for _ in range(times + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch's
        start.record()
        layer(x)
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end))
    return float(statistics.median(found[3:]))
