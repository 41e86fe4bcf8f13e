"""Files of weights and checkpoints, read without running code that is in them."""

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

__all__ = ["read_checkpoint"]


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint of Lightning's, a state dict saved by torch, or a file of safetensors.

    Args:
        path: The file.

    Returns:
        What is in it, on the CPU.

    Raises:
        ValueError: If there is no such file, or nothing in it that can be read safely.

    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors and plain values, or is no checkpoint: not read.") from error
    except (SafetensorError, RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no dictionary, but {type(content).__name__}.")
    return content
