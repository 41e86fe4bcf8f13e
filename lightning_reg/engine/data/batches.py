"""Batches put together and taken apart by their samples, whatever they are made of; what lies in their memory."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_reg.engine.host.errors import MisconfigurationException

__all__ = [
    "join_batches",
    "join_outputs",
    "lies_across",
    "lies_by_sample",
    "place_of",
    "repeats_by_sample",
    "samples_of",
    "tensors_of",
    "with_attributes",
]


class _Ways(NamedTuple):
    """What becomes of the parts of batches, given as they stand in one batch after the other."""

    tensors: Callable[[Sequence[Tensor]], Tensor]  # with a row per sample
    items: Callable[[Sequence[Sequence[Any]]], list[Any]]  # one item per sample: a name, a path
    others: Callable[[Sequence[Any]], Any]  # what holds no samples that are known


def join_batches(parts: Sequence[Any], size: int) -> Any:
    """Batches of the same structure as one.

    Args:
        parts: The batches. What does not go by samples is taken from the first.
        size: Number of samples of each.

    Returns:
        A batch with the samples of one after those of the other.

    Raises:
        MisconfigurationException: If their tensors have different shapes.

    """
    return _combined(parts, size, _Ways(_join_tensors, lambda lists: [item for one in lists for item in one], _same))


def join_outputs(parts: Sequence[Any], sizes: Sequence[int]) -> Any:
    """What a network made of some samples after the other, as if it were one output.

    Args:
        parts: Its outputs, of the same structure.
        sizes: Number of samples of each.

    Returns:
        An output of the same structure; what does not go by samples (a setting) must be the same in all of them.

    Raises:
        ValueError: If a part of it neither goes by samples nor is the same for all.

    """
    if len(parts) == 1:
        return parts[0]

    def joined(tensors: Sequence[Tensor]) -> Tensor:
        shapes = [tuple(getattr(one, "shape", ())) for one in tensors]
        if [shape[:1] for shape in shapes] != [(size,) for size in sizes] or len({shape[1:] for shape in shapes}) > 1:
            raise ValueError(f"tensors {', '.join(map(str, shapes))}")
        return torch.cat(list(tensors))

    return _combined(parts, sizes[0], _Ways(joined, lambda lists: [item for one in lists for item in one], _agreed))


def _agreed(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        raise ValueError(f"a tensor {tuple(first.shape)}")
    if any(value is not first and not (isinstance(value, _SIMPLE) and value == first) for value in values):
        raise ValueError(f"a {type(first).__name__}")
    return first


_SIMPLE = str, int, float, bool


def samples_of(batch: Any, size: int, chosen: slice) -> Any:
    """Some of the samples of a batch.

    Args:
        batch: The batch.
        size: Its number of samples.
        chosen: Which.

    Returns:
        A batch of the same structure with views of the tensors; ``None`` if it has parts of which it is not known
        whether they go by samples.

    """
    try:
        return _combined([batch], size, _Ways(lambda one: one[0][chosen], lambda one: list(one[0][chosen]), _plain))
    except _UnknownError:
        return None


def tensors_of(batch: Any) -> list[Tensor]:
    """All tensors of a batch, in an order that is the same for batches of the same structure."""
    leaves = tree_leaves(batch)
    # Dataclasses and other objects, mappings that torch does not know.
    leaves += tree_leaves([vars(leaf) for leaf in leaves if hasattr(leaf, "__dict__")])
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def place_of(tensor: Tensor) -> int:
    """Where the memory begins that a tensor and all views of it share."""
    return tensor.untyped_storage().data_ptr()


def lies_by_sample(rows: Tensor, batch: Any, size: int) -> bool:
    """Whether rows certainly lie sample after sample: they are an entry of the batch, flattened without a copy.

    Args:
        rows: ``(n, ...)``.
        batch: The batch.
        size: Its number of samples.

    Returns:
        ``False`` also where it cannot be known: a copy may have been put into any order.

    """
    return rows.is_contiguous() and any(
        entry.shape[:1] == (size,)
        and entry.is_contiguous()
        and (place_of(entry), entry.storage_offset(), entry.numel(), entry.dtype)
        == (place_of(rows), rows.storage_offset(), rows.numel(), rows.dtype)
        for entry in tensors_of(batch)
    )


def lies_across(rows: Tensor, batch: Any, size: int) -> bool:
    """Whether rows are certainly not samples, though there are as many: an entry of the batch with time first.

    Args:
        rows: ``(size, ...)``.
        batch: The batch.
        size: Its number of samples.

    Returns:
        Whether they are a transposed view of an entry.

    """
    if rows.shape[:2] != (size, size):
        return False
    return any(
        entry.shape[:2] == (size, size)
        and (place_of(entry), entry.storage_offset()) == (place_of(rows), rows.storage_offset())
        and rows.stride()[:2] == entry.stride()[1::-1] != entry.stride()[:2]
        for entry in tensors_of(batch)
    )


def repeats_by_sample(rows: Tensor, batch: Any, size: int, ignored: int | None = None) -> bool:
    """Whether rows have the values of an entry of the batch, sample after sample; reads them from the device.

    Args:
        rows: ``(size * T, ...)``.
        batch: The batch.
        size: Its number of samples.
        ignored: A value that may stand for any other.

    Returns:
        Whether they are those of an entry ``(size, T, ...)``, or of one that was shifted by one place in time, and
        would not be as well if they lay with time first.

    """
    length = len(rows) // size
    by_sample = rows.reshape(size, length, *rows.shape[1:])
    by_time = rows.reshape(length, size, *rows.shape[1:]).transpose(0, 1)
    entries = [e for e in tensors_of(batch) if e.shape[:1] == (size,) and e.shape[2:] == rows.shape[1:]]
    entries = [entry.to(rows.device) for entry in entries if entry.dim() == rows.dim() + 1]

    def are_those_of(one: Tensor, entry: Tensor) -> bool:
        return any(_equal(one, entry[:, shift:], ignored) for shift in (0, 1))

    return any(are_those_of(by_sample, e) for e in entries) and not any(are_those_of(by_time, e) for e in entries)


def _equal(one: Tensor, other: Tensor, ignored: int | None) -> bool:
    """Whether two have the same values in time; the last place may be filled up."""
    length = min(one.shape[1], other.shape[1])
    if not length or one.shape[1] - length > 1:
        return False
    one, other = one[:, :length], other[:, :length]
    same = one == other
    return bool((same if ignored is None else same | (one == ignored)).all())


def with_attributes(owner: Any, values: dict[str, Any]) -> Any:
    """A shallow copy of an object with other attributes; nothing of its class runs, and a dataclass may be frozen."""
    changed = copy.copy(owner)
    for name, value in values.items():
        object.__setattr__(changed, name, value)
    return changed


class _UnknownError(Exception):
    """A part of a batch that may hold samples."""


def _same(values: Sequence[Any]) -> Any:
    return values[0]


def _plain(values: Sequence[Any]) -> Any:
    value = values[0]
    if isinstance(value, str | int | float | bool | Tensor | None):
        return value
    raise _UnknownError


def _combined(parts: Sequence[Any], size: int, ways: _Ways) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        return ways.tensors(parts) if first.dim() and len(first) == size else ways.others(parts)
    if isinstance(first, Mapping):
        return _rebuilt(first, {key: _combined([part[key] for part in parts], size, ways) for key in first})
    if isinstance(first, tuple | list):
        if len(first) == size and all(isinstance(item, str | int | float | bool) for item in first):
            return type(first)(ways.items(parts))
        items = [_combined(list(column), size, ways) for column in zip(*parts, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in dataclasses.fields(first)]
        return with_attributes(first, {n: _combined([getattr(part, n) for part in parts], size, ways) for n in names})
    return ways.others(parts)


def _join_tensors(parts: Sequence[Tensor]) -> Tensor:
    try:
        return torch.cat([part.to(parts[0].dtype) for part in parts])
    except RuntimeError as error:
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        raise MisconfigurationException(
            f"The batch and its views have entries of different shapes, {shapes}, so they cannot pass the network"
            " together. An augmentation has to keep the shape of its input."
        ) from error


def _rebuilt(mapping: Any, entries: dict[Any, Any]) -> Any:
    if type(mapping) is dict:
        return entries
    rebuilt = copy.copy(mapping)
    for key, value in entries.items():
        rebuilt[key] = value
    return rebuilt
