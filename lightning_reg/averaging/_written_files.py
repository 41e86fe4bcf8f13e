"""Files with weights, written whole or not at all, with a record of what they hold."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_reg.averaging._checkpoint_files import RECORD
from lightning_reg.engine.host.written import write_atomically

__all__ = ["save_weights"]


def save_weights(
    path: str | Path, weights: Mapping[str, Any], record: Mapping[str, Any], extra: Mapping[str, Any] | None = None
) -> None:
    """Writes weights, atomically, with a record of what they are.

    Args:
        path: ``.safetensors``, or a torch file in the form of a Lightning checkpoint.
        weights: State dict.
        record: Plain values; under ``lightning_reg`` in the file.
        extra: Further entries of a torch file.

    """

    def write(place: Path) -> None:
        if place.suffix != ".safetensors":
            torch.save({**(extra or {}), "state_dict": dict(weights), RECORD: dict(record)}, place)
            return
        tensors: dict[str, Tensor] = {}
        storages: set[int] = set()
        for key, value in weights.items():
            if not isinstance(value, Tensor):
                continue
            shared = value.untyped_storage().data_ptr() in storages  # the format knows no tied tensors
            storages.add(value.untyped_storage().data_ptr())
            tensors[key] = value.detach().clone().contiguous() if shared else value.detach().contiguous()
        save_file(tensors, place, metadata={RECORD: json.dumps(dict(record)), "format": "pt"})

    write_atomically(path, write)
