"""Files with weights: read without running code in them and a tensor at a time, written whole or not at all."""

import ctypes
import json
import mmap
import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import override

__all__ = ["CheckpointFile", "UntrustedFileError", "open_checkpoint", "save_weights", "write_atomically"]

_T = TypeVar("_T")
RECORD = "lightning_reg"  # what a file of ours says about itself stands under this key

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}


class UntrustedFileError(pickle.UnpicklingError):
    """A file holds more than tensors and plain values; nothing in it was run."""


class CheckpointFile(Mapping[str, Any]):
    """The weights in a file, by name; a tensor is mapped to memory when it is asked for.

    Attributes:
        path: Where it lies.
        extra: What else the file holds: the other entries of a Lightning checkpoint, or the metadata.

    """

    def __init__(self, path: Path, extra: Mapping[str, Any]) -> None:
        self.path, self.extra = path, extra

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        known = (self.shape_and_dtype(key) for key in self)
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in filter(None, known))

    def shape_and_dtype(self, key: str) -> tuple[tuple[int, ...], torch.dtype] | None:
        """What is known of a tensor without reading it, ``None`` of an entry that is no tensor."""
        value = self[key]
        return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else None

    def place(self, key: str) -> tuple[Any, ...]:
        """Where in the file an entry lies: tensors of one place are tied."""
        return (key,)

    def release(self, part: Tensor) -> None:
        """Gives the memory under a part of a tensor back; it is read from the file again if it is needed."""
        if _LIBC is not None and part.is_contiguous() and part.numel():
            # The system maps pages around the one that is read. Those before a part were given back already and came
            # again with its first page, so a margin before it goes too; without it they pile up.
            first = max(part.untyped_storage().data_ptr(), part.data_ptr() - _MARGIN)
            start = first // mmap.PAGESIZE * mmap.PAGESIZE
            end = part.data_ptr() + part.numel() * part.itemsize
            _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONTNEED)


# Pages of a file count as memory of the process until they are given back. Only Linux promises to keep the file's
# contents; elsewhere the system takes the pages when it needs them.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_DONTNEED = 4
_MARGIN = 4 << 20


class _TorchFile(CheckpointFile):
    def __init__(self, path: Path, weights: Mapping[str, Any], extra: Mapping[str, Any], *, mapped: bool) -> None:
        super().__init__(path, extra)
        self._weights, self._mapped = weights, mapped

    @override
    def __getitem__(self, key: str) -> Any:
        return self._weights[key]

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    @override
    def __len__(self) -> int:
        return len(self._weights)

    @override
    def place(self, key: str) -> tuple[Any, ...]:
        value = self[key]
        if not isinstance(value, Tensor) or value.numel() == 0:
            return (key,)
        return value.data_ptr(), value.dtype, tuple(value.shape), tuple(value.stride())

    @override
    def release(self, part: Tensor) -> None:
        if self._mapped:  # of memory that is no file's the contents would be lost
            super().release(part)


class _SafetensorsFile(CheckpointFile):
    def __init__(self, path: Path) -> None:
        opened: Any = safe_open  # its stubs are not typed
        self._file = opened(path, framework="pt")
        metadata = dict(self._file.metadata() or {})
        if RECORD in metadata:
            metadata[RECORD] = json.loads(metadata[RECORD])
        super().__init__(path, metadata)
        self._keys = list(self._file.keys())
        self._known = {key: self._file.get_slice(key) for key in self._keys}

    @override
    def __getitem__(self, key: str) -> Any:
        if key not in self._known:
            raise KeyError(key)
        return self._file.get_tensor(key)

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    @override
    def __len__(self) -> int:
        return len(self._keys)

    @override
    def shape_and_dtype(self, key: str) -> tuple[tuple[int, ...], torch.dtype] | None:
        known = self._known[key]
        name = known.get_dtype()
        return tuple(known.get_shape()), _DTYPES.get(name) or self[key].dtype


class _Shards(CheckpointFile):
    def __init__(self, path: Path) -> None:
        index = json.loads(path.read_text())
        if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
            raise ValueError(f"{path}: no index of shards: there is no `weight_map` in it.")
        self._where: dict[str, str] = index["weight_map"]
        outside = sorted(name for name in set(self._where.values()) if Path(name).name != name)
        if outside:
            raise UntrustedFileError(f"{path}: the index names files outside of its folder: {outside[:3]}.")
        super().__init__(path, index.get("metadata") or {})
        self._files = {name: open_checkpoint(path.parent / name) for name in sorted(set(self._where.values()))}

    @override
    def __getitem__(self, key: str) -> Any:
        return self._files[self._where[key]][key]

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    @override
    def __len__(self) -> int:
        return len(self._where)

    @override
    def shape_and_dtype(self, key: str) -> tuple[tuple[int, ...], torch.dtype] | None:
        return self._files[self._where[key]].shape_and_dtype(key)

    @override
    def place(self, key: str) -> tuple[Any, ...]:
        return (self._where[key], *self._files[self._where[key]].place(key))

    @override
    def release(self, part: Tensor) -> None:
        if all(isinstance(file, _SafetensorsFile) for file in self._files.values()):
            super().release(part)


def open_checkpoint(path: str | Path, key: str | None = None) -> CheckpointFile:
    """Opens a Lightning checkpoint, a plain state dict, a safetensors file, or an index of shards (``.index.json``).

    No code in a file is run: pickles are read with ``weights_only=True``, and there is no other way to read them.

    Args:
        path: The file.
        key: Entry that holds the weights, if the file is a mapping of several things; ``None`` for ``"state_dict"``
            if there is one, else the file itself.

    Returns:
        The weights, not read yet.

    Raises:
        FileNotFoundError: If there is no such file.
        UntrustedFileError: If it holds more than tensors and plain values.
        ValueError: If it holds no weights.

    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    if path.suffix == ".json":
        return _Shards(path)
    if path.suffix == ".safetensors":
        try:
            return _settled(path, _SafetensorsFile)
        except SafetensorError as error:
            raise ValueError(f"{path}: no whole safetensors file: {error}") from error
    content, mapped = _settled(path, _load)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds a {type(content).__name__}, no mapping from names to tensors.")
    inner = key or ("state_dict" if isinstance(content.get("state_dict"), Mapping) else None)
    if inner is not None and not isinstance(content.get(inner), Mapping):
        raise ValueError(f"{path}: has no weights under {inner!r}; it has {sorted(map(str, content))[:10]}.")
    weights = content if inner is None else content[inner]
    if not any(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{path}: holds no tensor on its first level; it has {sorted(map(str, content))[:10]}.")
    extra = {} if inner is None else {name: value for name, value in content.items() if name != inner}
    return _TorchFile(path, weights, extra, mapped=mapped)


def _settled(path: Path, read: Callable[[Path], _T]) -> _T:
    """Reads again if the file was replaced meanwhile: both libraries open it twice, which would mix two files."""
    while True:
        before = path.stat()
        result = read(path)
        if os.path.samestat(before, path.stat()):
            return result


def _load(path: Path) -> tuple[Any, bool]:
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True), True
    except pickle.UnpicklingError as error:
        raise _untrusted(path, error) from error
    except (RuntimeError, EOFError):
        pass  # a file of before torch 1.6, which cannot be mapped, or a broken one
    try:
        return torch.load(path, map_location="cpu", weights_only=True), False
    except pickle.UnpicklingError as error:
        raise _untrusted(path, error) from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: no whole file that torch can read: {_first_line(error)}") from error


def _untrusted(path: Path, error: Exception) -> UntrustedFileError:
    return UntrustedFileError(
        f"{path} holds more than tensors and plain values, and reading that would run code from the file:"
        f" {_first_line(error)} Where the file is trusted, save its weights alone:"
        " `torch.save(model.state_dict(), ...)` or `trainer.save_checkpoint(..., weights_only=True)`."
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line]
    return (lines or str(error).strip().splitlines() or [""])[0]


# -- writing ----------------------------------------------------------------------------------------------------------


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Writes a file so that at any moment, killed or not, there is the old one, the new one, or none.

    Args:
        path: Where it shall be.
        write: Writes to the path it is given, in the same folder.

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
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name)


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
