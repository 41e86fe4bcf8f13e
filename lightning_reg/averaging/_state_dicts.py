"""State dicts side by side: under the same keys, their differences in a table, read a part of a tensor at a time."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any, TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.averaging._checkpoint_files import load_tied
from lightning_reg.averaging._plain_numbers import fault_of, place_of
from lightning_reg.engine.host.names import Patterns, matches, near_names, plain_name, unmatched

__all__ = [
    "Aligned",
    "Part",
    "StateDict",
    "StateDictMismatchError",
    "accumulated",
    "aligned",
    "check_patterns",
    "is_averaged",
    "is_continuous",
    "is_wrapped",
    "key_of",
    "plain_keys",
    "unique",
    "widest",
    "wrapped_differently",
]

Entry: TypeAlias = Any  # a tensor, or whatever a module's `get_extra_state` gives
StateDict = Mapping[str, Any]
# Elements from a start on: in the given buffer, or a view of what lies in memory anyway.
Part: TypeAlias = Callable[[int, Tensor], Tensor]

_ROWS = 20  # of the table of differences


class StateDictMismatchError(ValueError):
    """State dicts do not hold the same tensors; the message is a table of what differs."""


class Aligned(Mapping[str, Any]):
    """A state dict under other keys; nothing is read before it is asked for."""

    def __init__(self, state_dict: StateDict, originals: Mapping[str, str]) -> None:
        self._state_dict, self._originals = state_dict, originals

    @override
    def __getitem__(self, key: str) -> Entry:
        return self._state_dict[self._originals[key]]

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._originals)

    @override
    def __len__(self) -> int:
        return len(self._originals)

    @override
    def __contains__(self, key: object) -> bool:
        return key in self._originals  # a mapping's own would read the entry

    def load(self) -> dict[str, Any]:
        """All entries; tied tensors are one tensor."""
        return load_tied(self, self.place)

    def part(self, key: str) -> Part:
        """Reads parts of a tensor."""
        read = getattr(self._state_dict, "read", None)
        if read is None:
            flat = self[key].detach().reshape(-1)  # a view, unless the tensor is not contiguous
            return lambda start, buffer: flat[start : start + buffer.numel()]
        original = self._originals[key]
        return lambda start, buffer: read(original, start, buffer)

    def empty(self, key: str, dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of an entry's shape, on its device."""
        known = self.shape_and_dtype(key)
        device = torch.device("cpu") if hasattr(self._state_dict, "read") else self[key].device
        return torch.empty(known[0] if known else (), dtype=dtype, device=device)

    def place(self, key: str) -> tuple[Any, ...]:
        """Where an entry lies: tensors of one place are tied."""
        where = getattr(self._state_dict, "place", None)
        if where is not None:
            return ("file", *where(self._originals[key]))
        value = self[key]
        # Of another mapping's tensors it is not known whether they outlive the call, so an address says nothing.
        if isinstance(self._state_dict, dict) and isinstance(value, Tensor) and value.numel() and not value.is_meta:
            return place_of(value)
        return (key,)

    def fault(self, key: str) -> str:
        """Why an entry cannot be averaged, as the rest of a sentence; "" if it can, or is no tensor."""
        known = getattr(self._state_dict, "fault", None)
        return fault_of(self[key]) if known is None else str(known(self._originals[key]))

    def shape_and_dtype(self, key: str) -> tuple[tuple[int, ...], torch.dtype] | None:
        """What is known of a tensor without reading it, ``None`` of an entry that is no tensor."""
        describe = getattr(self._state_dict, "shape_and_dtype", None)
        if describe is not None:
            known: tuple[tuple[int, ...], torch.dtype] | None = describe(self._originals[key])
            return known
        value = self[key]
        return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else None


def aligned(
    state_dicts: Sequence[StateDict],
    names: Sequence[str] | None = None,
    exclude: Patterns = None,
    *,
    unwrap: bool = False,
) -> list[Aligned]:
    """The state dicts under the same keys, checked to hold the same tensors.

    Args:
        state_dicts: At least one.
        names: What to call them in an error.
        exclude: Patterns of keys that are not looked at; each member has of those what it has.
        unwrap: Whether ``module.`` is taken off where all keys have it; it is anyway if not all state dicts agree.

    Returns:
        Mappings that read through to the given ones.

    Raises:
        StateDictMismatchError: With a table of what differs.
        ValueError: If entries differ that are codes of packed weights or masks of pruned ones, if tensors have no plain
            numbers (sparse, on meta), or keys are ambiguous.

    """
    labels = list(names) if names is not None else [f"state dict {i}" for i in range(len(state_dicts))]
    keys = [plain_keys(state_dict, label) for state_dict, label in zip(state_dicts, labels, strict=True)]
    if unwrap or wrapped_differently(keys):
        keys = [
            {key.removeprefix("module."): original for key, original in k.items()} if is_wrapped(k) else k for k in keys
        ]
    members = [Aligned(state_dict, k) for state_dict, k in zip(state_dicts, keys, strict=True)]
    for member, label in zip(members, labels, strict=True):
        for key in member:
            if not matches(key, exclude) and (fault := member.fault(key)):
                raise ValueError(f"{label}: {key!r} {fault}")
    rows = [
        row
        for member, label in zip(members[1:], labels[1:], strict=True)
        for row in _differences(members[0], member, label, exclude)
    ]
    if rows:
        raise StateDictMismatchError(_table(rows, labels[0]))
    for key in members[0]:
        if not matches(key, exclude):
            _refuse_codes(key, members, labels)
    return members


def wrapped_differently(state_dicts: Iterable[Iterable[str]]) -> bool:
    """Whether some, and not all, have all their keys under ``module.``, as ``DistributedDataParallel`` puts them."""
    return len({is_wrapped(keys) for keys in state_dicts}) > 1


def is_wrapped(keys: Iterable[str]) -> bool:
    """Whether all keys lie under ``module.``."""
    names = [plain_name(str(key)) for key in keys]
    return bool(names) and all(name.startswith("module.") for name in names)


def check_patterns(owner: str, argument: str, patterns: Patterns, state_dicts: Sequence[Iterable[str]]) -> None:
    """Refuses a pattern that matches a key of no state dict.

    Args:
        owner: Whose argument it is.
        argument: Its name.
        patterns: Its value.
        state_dicts: Their keys.

    Raises:
        ValueError: If there is one.

    """
    if patterns is None:
        return
    keys = list(dict.fromkeys(plain_name(str(key)) for state_dict in state_dicts for key in state_dict))
    if wrapped_differently(state_dicts):
        keys = list(dict.fromkeys(key.removeprefix("module.") for key in keys))
    for pattern in unmatched(patterns, keys):
        raise ValueError(
            f"{owner}: `{argument}` has the pattern {pattern!r}, which matches no key. Near keys:"
            f" {near_names(pattern, keys)}."
        )


def plain_keys(keys: Iterable[str], label: str) -> dict[str, str]:
    """Keys by the names the user knows, without the ``_orig_mod.`` of ``torch.compile``.

    Args:
        keys: Of a state dict.
        label: What to call it in an error.

    Returns:
        Plain name to key.

    Raises:
        ValueError: If two keys have one plain name, or one is no text.

    """
    result: dict[str, str] = {}
    for key in keys:
        if not isinstance(key, str):
            raise ValueError(
                f"{label} has an entry under {key!r}, which is no text. Save weights by their names, as"
                " `module.state_dict()` gives them."
            )
        other = result.setdefault(plain_name(key), key)
        if other != key:
            raise ValueError(
                f"{label} has both {other!r} and {key!r}, which are one name with and without torch.compile's"
                " `_orig_mod.`. Save the one or the other."
            )
    return result


def key_of(name: str, keys: Mapping[str, str]) -> str | None:
    """Key of a tensor that pruning may have renamed since (``weight``, ``weight_orig``).

    Args:
        name: Its name when a fit began.
        keys: Plain name to key.

    Returns:
        The key, ``None`` if it is not among them.

    """
    names = (name, f"{name}_orig", name.removesuffix("_orig"))
    return next((keys[known] for known in names if known in keys), None)


# Numbers of these types are codes, not magnitudes; counters and positions are int64, flags bool.
_CODES = (torch.int8, torch.uint8, torch.int16, torch.int32)
_SCALES = (".scale", "_scale", "_scale_inv")


def _refuse_codes(key: str, members: Sequence[Aligned], labels: Sequence[str]) -> None:
    """Refuses entries that differ and have no mean: averaging what stands beside them would change what they mean."""
    known = [member.shape_and_dtype(key) for member in members]
    what = _without_mean(key, members[0], [dtype for _, dtype in filter(None, known)])
    if len(members) == 1 or not what or known[0] is None or math.prod(known[0][0]) <= 1:
        return
    first = members[0][key]
    for member, label in zip(members[1:], labels[1:], strict=True):
        if not torch.equal(first, member[key].to(first.dtype)):
            raise ValueError(f"{key!r}, {_words(known[0])}, differs between {labels[0]} and {label}: {what}")


def _without_mean(key: str, member: Aligned, dtypes: Sequence[torch.dtype]) -> str:
    """Why an entry has no mean, as a sentence, and what to do; "" if it has one."""
    owner = key.rpartition(".")[0]
    if any(dtype in _CODES or str(dtype).endswith("e8m0fnu") for dtype in dtypes):
        return "such numbers are the codes of a quantised or packed weight. Dequantise it before you save it."
    if any(dtype.itemsize == 1 and dtype.is_floating_point for dtype in dtypes):
        beside = [f"{name}{scale}" for name in (key, f"{owner}.weight", owner) for scale in _SCALES]
        if any(name in member for name in beside):
            return "it has a scale beside it, and is no weight without it. Multiply the two before you save them."
    if key.endswith("_mask") and f"{key.removesuffix('_mask')}_orig" in member:
        return "it is the mask of a pruned weight. Call `torch.nn.utils.prune.remove` before you save the weights."
    return ""


def widest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The type that holds numbers of all types; torch promotes no two types of which one has 8 bits."""
    narrow = {dtype for dtype in dtypes if dtype.itemsize == 1}
    wide = [dtype for dtype in dtypes if dtype not in narrow]
    if not wide:
        return dtypes[0] if len(narrow) == 1 else torch.float32
    return reduce(torch.promote_types, wide)


def _differences(first: Aligned, other: Aligned, label: str, exclude: Patterns) -> list[tuple[str, str, str, str]]:
    ours, theirs = ([key for key in member if not matches(key, exclude)] for member in (first, other))
    rows = [(key, "present", "missing", label) for key in ours if key not in other]
    rows += [(key, "missing", "present", label) for key in theirs if key not in first]
    for key in ours:
        if key in other:
            one, two = first.shape_and_dtype(key), other.shape_and_dtype(key)
            if not _alike(one, two):
                rows.append((key, _words(one), _words(two), label))
    return rows


def _alike(one: tuple[Any, torch.dtype] | None, two: tuple[Any, torch.dtype] | None) -> bool:
    if one is None or two is None:
        return one is two
    if one[0] != two[0]:
        return False
    return one[1] == two[1] or (one[1].is_floating_point and two[1].is_floating_point)


def _words(known: tuple[Any, torch.dtype] | None) -> str:
    return "no tensor" if known is None else f"{str(known[1]).removeprefix('torch.')} {tuple(known[0])}"


def _table(rows: list[tuple[str, str, str, str]], first: str) -> str:
    shown = [("key", first, "other", "which"), *rows[:_ROWS]]
    widths = [max(len(row[column]) for row in shown) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown]
    more = f"\n... and {len(rows) - _ROWS} more" if len(rows) > _ROWS else ""
    return (
        f"The state dicts differ in {len(rows)} {'entry' if len(rows) == 1 else 'entries'}; only weights of one"
        " architecture can be averaged:\n" + "\n".join(lines) + more
    )


def is_averaged(value: object) -> bool:
    """Whether a mean of such entries makes sense: integers and booleans are counts, positions and masks."""
    return isinstance(value, Tensor) and is_continuous(value.dtype)


def accumulated(value: Tensor) -> Tensor:
    """A tensor in the type that sums are made in: float64, or complex128 where it is complex."""
    return value.detach().to(torch.complex128 if value.is_complex() else torch.float64)


def is_continuous(dtype: torch.dtype) -> bool:
    """Whether numbers of such a type can be averaged."""
    return dtype.is_floating_point or dtype.is_complex


def unique(names: Iterable[str]) -> list[str]:
    """Names made distinct by a count behind those that occur again."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return result
