"""What SaRA has trained, as sparse changes: written into small files, put into networks in multiples and sums."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_reg.engine.host.names import plain_name
from lightning_reg.engine.weights.entries import entries_of
from lightning_reg.finetuning._applied import put_back, weights_for
from lightning_reg.finetuning.sara.core import pack_positions, unpack_positions

if TYPE_CHECKING:
    from lightning_reg.finetuning.sara.sara import SaRA

__all__ = ["apply_delta_", "delta_applied", "load_delta", "merged_delta", "save_delta", "sparse_delta"]


def sparse_delta(technique: "SaRA", module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """What was trained: the change of each entry that was chosen, those also that were trained for a part of the time.

    Args:
        technique: After its fit.
        module: That was trained.
        prefix: Name of the network in the module (``"model"``) that the change is for; its names begin behind that.

    Returns:
        By the weight's name a sparse tensor of its shape, float32 at least, on the CPU.

    Raises:
        ValueError: If nothing was trained, or something that is not in the network.

    """
    latents, weights, start = technique.latents, _named(module), f"{prefix}." if prefix else ""
    if not latents.values:
        raise ValueError("sparse_delta: nothing was trained yet. Ask after the fit.")
    found = {}
    for name, before in latents.values.items():
        if name not in weights or not name.startswith(start):
            raise ValueError(f"sparse_delta: {name!r} was trained, and is not in the given network.")
        index, order = latents.index[name].cpu().sort()
        now = entries_of(weights[name].detach().cpu(), index)
        kind = torch.promote_types(before.dtype, torch.float32)
        change = now.to(kind) - before.cpu()[order].to(kind)
        found[name[len(start) :]] = _sparse(index.long(), change, latents.shapes[name])
    return found


def _named(module: nn.Module) -> dict[str, nn.Parameter]:
    return {plain_name(name): parameter for name, parameter in module.named_parameters()}


def _sparse(index: Tensor, values: Tensor, shape: Sequence[int]) -> Tensor:
    places = torch.stack(torch.unravel_index(index, tuple(shape)))
    return torch.sparse_coo_tensor(places, values, tuple(shape), is_coalesced=True, check_invariants=False)


def merged_delta(deltas: Sequence[Mapping[str, Tensor]], alphas: Sequence[float]) -> dict[str, Tensor]:
    r"""The sum of several changes: :math:`\sum_i \alpha_i \Delta P_i`.

    Args:
        deltas: Changes of the same network; a weight may be in some of them only.
        alphas: How much of each. Paper: 0.6 each for two.

    Returns:
        The sum, of the same form.

    """
    total: dict[str, Tensor] = {}
    for delta, alpha in zip(deltas, alphas, strict=True):
        for name, change in delta.items():
            scaled = change * alpha
            total[name] = (total[name] + scaled).coalesce() if name in total else scaled.coalesce()
    return total


@torch.no_grad()
def apply_delta_(module: nn.Module, delta: Mapping[str, Tensor], alpha: float = 1.0) -> None:
    r"""Adds a change to a network's weights: :math:`P + \alpha \Delta P`, rounded once.

    Args:
        module: The network that the change is of.
        delta: As :func:`sparse_delta` gives it.
        alpha: How much of it; 0 adds nothing. Paper: 0 to 2.

    Raises:
        ValueError: If the network has no such weight.

    """
    for name, weight in weights_for(module, delta, "The change").items():
        change = delta[name].to(weight.device) * alpha
        weight.copy_(weight.to(torch.promote_types(weight.dtype, change.dtype)) + change)


@contextmanager
def delta_applied(module: nn.Module, delta: Mapping[str, Tensor], alpha: float = 1.0) -> Iterator[nn.Module]:
    """While a change is in a network's weights; one inside another gives the sum of both.

    Args:
        module: The network that the change is of.
        delta: As :func:`sparse_delta` gives it.
        alpha: How much of it.

    Returns:
        A context that gives the network; its weights are put back to the last bit.

    Raises:
        ValueError: If the network has no such weight.

    """
    with put_back(weights_for(module, delta, "The change")):
        apply_delta_(module, delta, alpha)
        yield module


def save_delta(delta: Mapping[str, Tensor], path: str | Path) -> None:
    """Writes a change into a file of safetensors: of each entry its value (float32) and its place, 6 bytes.

    A place is a step from the one before, in two bytes; where none of 65,535 entries has changed there are two more.

    Args:
        delta: As :func:`sparse_delta` gives it.
        path: Of the file.

    """
    tensors: dict[str, Tensor] = {}
    for name, change in delta.items():
        whole = change.coalesce()
        strides = torch.tensor([prod(change.shape[d + 1 :]) for d in range(change.dim())])
        flat = (whole.indices() * strides[:, None]).sum(0)
        tensors[f"{name}{_STEPS}"], tensors[f"{name}{_VALUES}"] = pack_positions(flat), whole.values().float()
    shapes = {name: list(change.shape) for name, change in delta.items()}
    save_file(tensors, path, metadata={"shapes": json.dumps(shapes)})


def load_delta(path: str | Path) -> dict[str, Tensor]:
    """Reads what :func:`save_delta` has written.

    Args:
        path: Of the file.

    Returns:
        The change, as :func:`sparse_delta` gives it.

    """
    with safe_open(path, framework="pt") as file:
        shapes = json.loads(file.metadata()["shapes"])
        read = file.get_tensor
        return {
            name: _sparse(unpack_positions(read(f"{name}{_STEPS}")), read(f"{name}{_VALUES}"), shape)
            for name, shape in shapes.items()
        }


_STEPS, _VALUES = ".steps", ".values"
