"""Entries of the user's batch by key, whatever it is made of: mappings, sequences, named tuples, objects."""

import copy
import dataclasses
import difflib
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_reg.engine.data.batches import tensors_of, with_attributes
from lightning_reg.engine.host.errors import MisconfigurationException

__all__ = ["contents", "find_entry", "find_inputs", "replace_entry"]


def find_entry(batch: Any, key: str, argument: str) -> Any:
    """An entry of the batch.

    Args:
        batch: The batch, in any structure.
        key: Names and positions, separated by dots (``"image"``, ``"0"``, ``"labelled.image"``); "" is the batch.
        argument: What the user gave the key as, for the error.

    Returns:
        The entry.

    Raises:
        MisconfigurationException: If there is none; names what there is, and the nearest.

    """
    entry, name = batch, ""
    try:
        for name in key.split(".") if key else ():
            entry = _part(entry, name)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise MisconfigurationException(
            f"{argument}={key!r} names nothing in the batch, which is {contents(batch)}.{_nearest(entry, name)}"
        ) from error
    return entry


def find_inputs(
    batch: Any,
    owner: object,
    key: str | None,
    several: bool,
    problem_with: Callable[[Tensor], str],
    advice: str = "",
) -> tuple[str, Tensor]:
    """The inputs of a batch whose samples are to be mixed.

    Args:
        batch: The batch, in any structure.
        owner: Who asks; its class and its argument ``input_key`` are named in errors.
        key: Which entry it is; ``None`` where the batch's structure says it: a tensor, the first entry of a sequence,
            or the one tensor of at least two dimensions in a mapping.
        several: Whether the batch is put together from several loaders' batches.
        problem_with: What kind of inputs is needed, if these are not of it; else "".
        advice: What else the user may write, for errors; begins with a comma.

    Returns:
        The key, and a tensor ``(B, ...)``.

    Raises:
        MisconfigurationException: If it is not certain which entry is meant, or it cannot be mixed.

    """
    name = type(owner).__name__
    keys = _input_keys(batch, several=several) if key is None else [key]
    inputs = find_entry(batch, keys[0], f"{name}: input_key") if len(keys) == 1 else None
    problem = "it is no tensor with a row per sample"
    if isinstance(inputs, Tensor) and inputs.dim():
        problem = problem_with(inputs)
        if not problem:
            return keys[0], inputs
    tensors = [entry for entry in tensors_of(batch) if entry.dim()]
    if all(map(problem_with, tensors)) and any(map(_are_tokens, tensors)):
        raise MisconfigurationException(
            f"{name}: the batch ({contents(batch)}) has no tensor that could be mixed: {problem_with(tensors[0])}, and"
            f" numbers of tokens or classes cannot be mixed, as what lies between two is a third. Leave {name}"
            f" out{advice}."
        )
    if len(keys) != 1:
        raise MisconfigurationException(
            f"{name}: which entry of the batch holds the inputs is not certain: the batch is {contents(batch)}, and"
            f' {len(keys)} entries could be meant. Name it: `{name}(input_key="...")`, a key, a position or both'
            ' ("labelled.0").'
        )
    shape = f"{inputs.dtype} {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
    raise MisconfigurationException(
        f"{name}: the batch's inputs (input_key={keys[0]!r}) cannot be mixed: {problem}, found {shape}. Name another"
        f" entry with `input_key`{advice}."
    )


def _are_tokens(entry: Tensor) -> bool:
    return entry.dim() == 2 and entry.dtype in (torch.int32, torch.int64)


def _input_keys(batch: Any, *, several: bool) -> list[str]:
    """Keys of the entries that may be the inputs."""
    if isinstance(batch, Tensor):
        return [""]
    if isinstance(batch, Sequence) and not several:
        return ["0"]
    if isinstance(batch, Mapping) and not several:
        return [str(key) for key, entry in batch.items() if isinstance(entry, Tensor) and entry.dim() > 1]
    return []


def replace_entry(batch: Any, key: str, value: Any) -> Any:
    """The batch with another entry; the given one stays as it is.

    Args:
        batch: The batch, in any structure.
        key: Where, as in :func:`find_entry`.
        value: The new entry.

    Returns:
        A shallow copy of every container on the way, of the same class.

    Raises:
        MisconfigurationException: If a container on the way is of a kind that cannot be copied and written to.

    """
    if not key:
        return value
    name, _, rest = key.partition(".")
    value = replace_entry(_part(batch, name), rest, value)
    try:
        return _with_part(batch, name, value)
    except (TypeError, AttributeError, ValueError) as error:
        raise MisconfigurationException(
            f"The entry {name!r} of a {type(batch).__name__} cannot be replaced ({error}). Let the dataset or"
            " `collate_fn` return a tuple, a dict or a dataclass."
        ) from error


def _part(entry: Any, name: str) -> Any:
    if isinstance(entry, Mapping):
        return entry[name] if name in entry else entry[int(name)]
    if isinstance(entry, Sequence) and name not in getattr(entry, "_fields", ()):
        return entry[int(name)]
    return getattr(entry, name)


def _with_part(entry: Any, name: str, value: Any) -> Any:
    if isinstance(entry, MutableMapping):
        changed = copy.copy(entry)
        changed[name if name in entry else int(name)] = value
        return changed
    if isinstance(entry, tuple):
        fields = getattr(entry, "_fields", None)
        position = fields.index(name) if fields and name in fields else int(name)
        items = list(entry)
        items[position] = value
        return type(entry)(*items) if fields else type(entry)(items)
    if isinstance(entry, Sequence):
        copied: Any = copy.copy(entry)
        copied[int(name)] = value
        return copied
    if dataclasses.is_dataclass(entry) and not isinstance(entry, type):
        return with_attributes(entry, {name: value})
    copied = copy.copy(entry)
    setattr(copied, name, value)
    return copied


def _names(entry: Any) -> list[Any]:
    if isinstance(entry, Mapping):
        return list(entry)
    return list(getattr(entry, "_fields", ()) or getattr(entry, "__dict__", ()))


def contents(entry: Any) -> str:
    """What there is to name in a batch, for an error."""
    return f"keys {list(entry)}" if isinstance(entry, Mapping) else f"a {type(entry).__name__}"


def _nearest(entry: Any, name: str) -> str:
    near = difflib.get_close_matches(name, map(str, _names(entry)), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(word) for word in near)}?" if near else ""
