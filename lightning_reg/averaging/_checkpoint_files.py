"""Files with weights, read without running code in them, and a tensor or a part of one at a time."""

import json
import os
import pickle
import struct
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from typing_extensions import override

from lightning_reg.averaging._plain_numbers import fault_of, place_of

__all__ = ["RECORD", "CheckpointFile", "UntrustedFileError", "load_tied", "open_checkpoint"]

_T = TypeVar("_T")
# What the readers raise on files that are broken; torch's own unpickler pops from empty stacks.
_BROKEN = (RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError, struct.error)
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
    """The weights in a file, by name; a tensor is read when it is asked for, whole or a part of it.

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
        raise NotImplementedError

    def fault(self, key: str) -> str:
        """Why an entry cannot be averaged, as the rest of a sentence; "" if it can, or is no tensor."""
        return ""

    def place(self, key: str) -> tuple[Any, ...]:
        """Where in the file an entry lies: tensors of one place are tied."""
        return (key,)

    def load(self) -> dict[str, Any]:
        """All entries, those that can be averaged at least; tied tensors are one tensor."""
        for key in self:
            if fault := self.fault(key):
                raise ValueError(f"{self.path}: {key!r} {fault}")
        return load_tied(self, self.place)

    def read(self, key: str, start: int, buffer: Tensor) -> Tensor:
        """A part of a tensor.

        Safe to call from several threads with a buffer each.

        Args:
            key: Its name.
            start: Its first element in the flattened tensor.
            buffer: As many elements as are wanted, of the tensor's dtype, contiguous and on the CPU.

        Returns:
            The elements, in ``buffer`` or not.

        """
        raise NotImplementedError


def load_tied(entries: Mapping[str, Any], place: Callable[[str], tuple[Any, ...]]) -> dict[str, Any]:
    """Reads all entries, those at one place once."""
    loaded: dict[tuple[Any, ...], Any] = {}
    for key in entries:
        if place(key) not in loaded:
            loaded[place(key)] = entries[key]
    return {key: loaded[place(key)] for key in entries}


class _Pieces:
    """Reads bytes of an open file from any place; pages of a mapping would count as memory of the process."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._handle)

    def base_of_mapping(self, address: int) -> int | None:
        """Address of the file's first byte where the file is mapped around ``address``; ``None`` if nobody tells."""
        inode = os.fstat(self._handle).st_ino
        try:
            lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:  # only Linux has it
            return None
        for line in lines:
            span, _, offset, _, number, *_ = line.split(maxsplit=5)
            first, last = (int(end, 16) for end in span.split("-"))
            if first <= address < last and int(number) == inode:
                return first - int(offset, 16)
        return None

    def read_into(self, buffer: Tensor, offset: int) -> Tensor:
        """Fills a contiguous tensor with the bytes from ``offset`` on."""
        view = buffer.view(torch.uint8).numpy().data
        while view:
            count = os.preadv(self._handle, [view], offset)
            if count == 0:
                raise EOFError("The file ends before the tensor does.")
            view, offset = view[count:], offset + count
        return buffer


_CAN_READ_PIECES = hasattr(os, "preadv")


class _TorchFile(CheckpointFile):
    def __init__(
        self, path: Path, weights: Mapping[str, Any], extra: Mapping[str, Any], pieces: _Pieces | None
    ) -> None:
        super().__init__(path, extra)
        self._weights, self._pieces, self._base = weights, pieces, None
        addresses = (v.data_ptr() for v in weights.values() if isinstance(v, Tensor) and not fault_of(v) and v.numel())
        if pieces is not None:
            self._base = pieces.base_of_mapping(next(addresses, 0))

    @override
    def __getitem__(self, key: str) -> Any:
        value = self._weights[key]
        if self._base is None or not isinstance(value, Tensor) or not _lies_as_it_is(value) or not value.numel():
            return value
        return self.read(key, 0, torch.empty(value.numel(), dtype=value.dtype)).view(value.shape)

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    @override
    def __len__(self) -> int:
        return len(self._weights)

    @override
    def shape_and_dtype(self, key: str) -> tuple[tuple[int, ...], torch.dtype] | None:
        value = self._weights[key]
        return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else None

    @override
    def fault(self, key: str) -> str:
        return fault_of(self._weights[key])

    @override
    def place(self, key: str) -> tuple[Any, ...]:
        value = self._weights[key]
        if not isinstance(value, Tensor) or fault_of(value) or value.numel() == 0:
            return (key,)
        return place_of(value)

    @override
    def read(self, key: str, start: int, buffer: Tensor) -> Tensor:
        mapped: Tensor = self._weights[key]
        if self._pieces is None or self._base is None or not _lies_as_it_is(mapped):
            return mapped.reshape(-1)[start : start + buffer.numel()]
        offset = mapped.data_ptr() - self._base + start * mapped.itemsize
        return self._pieces.read_into(buffer, offset)


def _lies_as_it_is(value: Tensor) -> bool:
    return value.is_contiguous() and not value.is_conj() and not value.is_neg()


class _SafetensorsFile(CheckpointFile):
    def __init__(self, path: Path) -> None:
        opened: Any = safe_open  # its stubs are not typed
        self._file = opened(path, framework="pt")
        metadata = dict(self._file.metadata() or {})
        if RECORD in metadata:
            metadata[RECORD] = _json(path, metadata[RECORD].encode(), f"what it says of itself under `{RECORD}`")
        super().__init__(path, metadata)
        self._keys = list(self._file.keys())
        if not self._keys:
            raise ValueError(f"{path}: holds no tensor.")
        self._known = {key: self._file.get_slice(key) for key in self._keys}
        self._pieces = _Pieces(path) if _CAN_READ_PIECES else None
        with open(path, "rb") as file:  # the header, checked by the library already
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        self._offsets = {key: 8 + length + header[key]["data_offsets"][0] for key in self._keys}

    @override
    def __getitem__(self, key: str) -> Any:
        if key not in self._known:
            raise KeyError(key)
        known = self._known[key]
        dtype = _DTYPES.get(known.get_dtype())
        if dtype is None:
            return self._file.get_tensor(key)
        value = torch.empty(known.get_shape(), dtype=dtype)
        return self.read(key, 0, value.view(-1)).view(value.shape) if value.numel() else value

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
        return tuple(known.get_shape()), _DTYPES.get(name) or self._file.get_tensor(key).dtype

    @override
    def fault(self, key: str) -> str:
        dtype = self._known[key].get_dtype()
        if dtype in _DTYPES:
            return ""
        try:
            return fault_of(self._file.get_tensor(key))
        except AttributeError:  # safetensors asks torch for a type that an older one has not
            return f"is quantised or of another type that this version of torch does not know ({dtype}, float4 say)"

    @override
    def read(self, key: str, start: int, buffer: Tensor) -> Tensor:
        if self._pieces is None or self._known[key].get_dtype() not in _DTYPES:
            whole: Tensor = self._file.get_tensor(key)
            return whole.view(-1)[start : start + buffer.numel()]
        return self._pieces.read_into(buffer, self._offsets[key] + start * buffer.itemsize)


class _Shards(CheckpointFile):
    def __init__(self, path: Path) -> None:
        index = _json(path, path.read_bytes(), "an index of shards")
        if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict) or not index["weight_map"]:
            raise ValueError(f"{path}: no index of shards: there is no `weight_map` in it, or nothing in that.")
        self._where: dict[str, str] = index["weight_map"]
        for key, name in self._where.items():
            if not isinstance(name, str) or not name or name.endswith(".json"):
                raise ValueError(f"{path}: the index has {name!r} for {key!r}, which names no file of weights.")
        names = sorted(set(self._where.values()))
        outside = [name for name in names if Path(name).name != name or name == ".."]
        if outside:
            raise UntrustedFileError(f"{path}: the index names files outside of its folder: {outside[:3]}.")
        missing = [name for name in names if not (path.parent / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{path}: the index names files that are not beside it: {missing[:3]}.")
        metadata = index.get("metadata")
        super().__init__(path, metadata if isinstance(metadata, dict) else {})
        self._files = {name: open_checkpoint(path.parent / name) for name in names}
        for key, name in self._where.items():
            if key not in self._files[name]:
                raise ValueError(f"{path}: the index has {key!r} in {name}, and there is no such entry in that.")

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
    def fault(self, key: str) -> str:
        return self._files[self._where[key]].fault(key)

    @override
    def place(self, key: str) -> tuple[Any, ...]:
        return (self._where[key], *self._files[self._where[key]].place(key))

    @override
    def read(self, key: str, start: int, buffer: Tensor) -> Tensor:
        return self._files[self._where[key]].read(key, start, buffer)


def open_checkpoint(path: str | Path, key: str | None = None) -> CheckpointFile:
    """Opens a Lightning checkpoint, a plain state dict, a safetensors file, or an index of shards (``.index.json``).

    No code in a file is run: pickles are read with ``weights_only=True``, and there is no other way to read them.

    Args:
        path: The file.
        key: Entry that holds the weights, if the file is a mapping of several things, with dots where it is an entry
            of an entry (``"state.model"``); ``None`` for ``"state_dict"`` if there is one, else the file itself.

    Returns:
        The weights, not read yet.

    Raises:
        FileNotFoundError: If there is no such file.
        UntrustedFileError: If it holds more than tensors and plain values.
        ValueError: If it holds no weights, or ``key`` has to say which.

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
    content, pieces = _settled(path, _load)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds a {type(content).__name__}, no mapping from names to tensors.")
    inner = key or ("state_dict" if isinstance(content.get("state_dict"), Mapping) else None)
    weights = content if inner is None else _entry(content, inner)
    if not isinstance(weights, Mapping):
        raise ValueError(f"{path}: has no weights under {inner!r}; it has {sorted(map(str, content))[:10]}.")
    nested = {} if key else {name: at for name, value in weights.items() if (at := _tensors_inside(name, value))}
    if nested:
        raise ValueError(
            f"{path}: holds tensors in entries of entries, {', '.join(map(repr, nested.values()))}, so it is not said"
            f" which are the weights. Write `key={next(iter(nested.values()))!r}` (`--key`)."
        )
    if not any(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{path}: holds no tensor on its first level; it has {sorted(map(str, content))[:10]}.")
    extra = {} if inner is None else {name: value for name, value in content.items() if name != inner}
    return _TorchFile(path, weights, extra, pieces)


def _entry(content: Mapping[str, Any], key: str) -> Any:  # noqa: ANN401 # of a file, whatever that is
    """The entry of that name, or of an entry if the name has dots; ``None`` without one."""
    if key in content:
        return content[key]
    first, _, rest = key.partition(".")
    inner = content.get(first)
    return _entry(inner, rest) if rest and isinstance(inner, Mapping) else None


def _tensors_inside(name: object, value: object) -> str:
    """Name of the first mapping in an entry, or that entry itself, which has tensors; "" if there is none."""
    if not isinstance(value, Mapping) or str(name).endswith("_extra_state"):  # a module's own, of `get_extra_state`
        return ""
    if any(isinstance(item, Tensor) for item in value.values()):
        return str(name)
    return next((f"{name}.{at}" for key, item in value.items() if (at := _tensors_inside(key, item))), "")


def _settled(path: Path, read: Callable[[Path], _T]) -> _T:
    """Reads again if the file was replaced meanwhile: both libraries open it twice, which would mix two files."""
    while True:
        before = path.stat()
        result = read(path)
        if os.path.samestat(before, path.stat()):
            return result


def _load(path: Path) -> tuple[Any, _Pieces | None]:
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return content, _Pieces(path) if _CAN_READ_PIECES else None
    except pickle.UnpicklingError as error:
        raise _untrusted(path, error) from error
    except _BROKEN:
        pass  # a file of before torch 1.6, which cannot be mapped, or a broken one
    try:
        return torch.load(path, map_location="cpu", weights_only=True), None
    except pickle.UnpicklingError as error:
        raise _untrusted(path, error) from error
    except _BROKEN as error:
        raise ValueError(f"{path}: no whole file that torch can read: {_first_line(error)}") from error


def _json(path: Path, text: bytes, what: str) -> Any:  # noqa: ANN401 # whatever is in it
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {what} is no JSON that can be read: {error}") from error


def _untrusted(path: Path, error: Exception) -> Exception:
    with open(path, "rb") as file:
        if not file.read(2).startswith((b"PK", b"\x80")):
            return ValueError(f"{path}: no file of torch: it is neither a zip archive nor a pickle.")
    return UntrustedFileError(
        f"{path} holds more than tensors and plain values, and reading that would run code from the file:"
        f" {_first_line(error)} Where the file is trusted, save its weights alone:"
        " `torch.save(model.state_dict(), ...)` or `trainer.save_checkpoint(..., weights_only=True)`."
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line]
    return (lines or str(error).strip().splitlines() or [""])[0]
