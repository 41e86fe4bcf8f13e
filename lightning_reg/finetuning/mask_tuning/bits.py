"""What mask tuning has learned, as bits: written into small files, put on the network that they are of."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_reg.engine.weights.entries import write_entries_
from lightning_reg.finetuning._applied import put_back, weights_for
from lightning_reg.finetuning.mask_tuning.core import pack_bits, unpack_bits

if TYPE_CHECKING:
    from lightning_reg.finetuning.mask_tuning.mask_tuning import MaskTuning

__all__ = ["apply_bits_", "bits_applied", "load_bits", "mask_bits", "save_bits"]


def mask_bits(technique: "MaskTuning", prefix: str = "") -> dict[str, Tensor]:
    """Which entries of the chosen weights are on; what was trained as it is is not in here.

    Args:
        technique: After its fit.
        prefix: Name of the network in the module (``"model"``) that they are for; its names begin behind that.

    Returns:
        Boolean, by the weight's name and of its shape, on the CPU.

    Raises:
        ValueError: If nothing was trained, or something that is not in the network.

    """
    latents, start = technique.latents, f"{prefix}." if prefix else ""
    if not latents.own:
        raise ValueError("mask_bits: nothing was trained yet. Ask after the fit.")
    found = {}
    for name, shape in latents.shapes.items():
        if not name.startswith(start):
            raise ValueError(f"mask_bits: {name!r} was trained, and is not in {prefix!r}.")
        is_on = (latents.own[name]["mask"].detach() > technique.threshold).cpu()
        if name in latents.index:
            whole = torch.ones(shape, dtype=torch.bool)
            write_entries_(whole, latents.index[name].cpu(), is_on)
            is_on = whole
        found[name[len(start) :]] = is_on
    return found


def save_bits(bits: Mapping[str, Tensor], path: str | Path) -> None:
    """Writes masks into a file of safetensors, with one bit for each weight.

    Args:
        bits: As :func:`mask_bits` gives them.
        path: Of the file.

    """
    shapes = {name: list(mask.shape) for name, mask in bits.items()}
    save_file({name: pack_bits(mask) for name, mask in bits.items()}, path, metadata={"shapes": json.dumps(shapes)})


def load_bits(path: str | Path) -> dict[str, Tensor]:
    """Reads what :func:`save_bits` has written.

    Args:
        path: Of the file.

    Returns:
        The masks, as :func:`mask_bits` gives them.

    """
    with safe_open(path, framework="pt") as file:
        shapes = json.loads(file.metadata()["shapes"])
        return {name: unpack_bits(file.get_tensor(name), shape) for name, shape in shapes.items()}


@torch.no_grad()
def apply_bits_(module: nn.Module, bits: Mapping[str, Tensor]) -> None:
    """Switches weights of a network off, in place; those that are on keep their bits.

    Args:
        module: The network that the masks are of.
        bits: As :func:`mask_bits` gives them.

    Raises:
        ValueError: If the network has no such weight.

    """
    for name, weight in weights_for(module, bits, "The mask").items():
        weight.masked_fill_(~bits[name].to(weight.device), 0)


@contextmanager
def bits_applied(module: nn.Module, bits: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """While weights of a network are off; one inside another leaves on what both do.

    Args:
        module: The network that the masks are of.
        bits: As :func:`mask_bits` gives them.

    Returns:
        A context that gives the network; its weights are put back to the last bit.

    Raises:
        ValueError: If the network has no such weight.

    """
    with put_back(weights_for(module, bits, "The mask")):
        apply_bits_(module, bits)
        yield module
