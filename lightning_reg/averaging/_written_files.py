"""Files with weights, written whole or not at all, with a record of what they hold."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lightning_reg.averaging._checkpoint_files import RECORD

__all__ = ["save_weights", "write_atomically"]


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Writes a file so that at any moment, killed or not, there is the old one, the new one, or none.

    Args:
        path: Where it shall be.
        write: Writes to the path it is given, in the same folder.

    Raises:
        OSError: If it cannot be written whole, as on a full disk.

    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        write(Path(name))
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        Path(name).chmod(0o666 & ~mask)  # mkstemp's own files are for nobody else
        os.replace(name, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have words of their own for it
        raise OSError(
            f"{path} could not be written, and nothing is left of it ({_free(path.parent)} free on that disk): {error}"
        ) from error
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name)


def _free(folder: Path) -> str:
    return f"{shutil.disk_usage(folder).free / 1e6:,.0f} MB"


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
