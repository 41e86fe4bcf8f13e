"""State dicts side by side: their keys made equal, their differences in a table, their weighted mean."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import reduce
from typing import Any, TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.averaging._checkpoint_files import load_tied
from lightning_reg.averaging._mean import Part, Workspace, mean_of_parts, part_of

__all__ = [
    "Aligned",
    "StateDict",
    "StateDictMismatchError",
    "aligned",
    "average_state_dicts",
    "combine",
    "is_averaged",
    "selects",
    "unique",
]

Entry: TypeAlias = Any  # a tensor, or whatever a module's `get_extra_state` gives
StateDict = Mapping[str, Any]

_ROWS = 20  # of the table of differences


class StateDictMismatchError(ValueError):
    """State dicts do not hold the same tensors; the message is a table of what differs."""


def average_state_dicts(
    state_dicts: Sequence[StateDict],
    weights: Sequence[float] | None = None,
    accumulate_dtype: torch.dtype = torch.float64,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    r"""Weighted mean of state dicts, tensor by tensor.

    .. math:: \theta = \sum_i w_i \theta_i \Big/ \sum_i w_i

    Floating-point and complex tensors are averaged; integers, booleans and entries that are no tensors are those of the
    first state dict. Tensors that share their memory in every state dict (tied weights) are averaged once and share
    it in the result. ``_orig_mod.`` and, where the state dicts disagree about it, ``module.`` are taken off the keys.

    Args:
        state_dicts: At least one, with the same keys and shapes. Any mapping will do: one that reads a file when it is
            asked keeps one tensor of each in memory.
        weights: One finite number per state dict with a positive sum, ``None`` for equal ones. They are divided by
            their sum.
        accumulate_dtype: Type of the sums, ``torch.float32`` or ``torch.float64``. The mean goes back to the tensor's
            own type (to the widest, where the state dicts differ).
        include: Patterns (``"net.*"``) of keys to average; ``None`` for all. Others are the first state dict's.
        exclude: Patterns of keys to leave as the first state dict has them.
        names: What to call the state dicts in an error; ``None`` for their positions.

    Returns:
        A new state dict with the keys of the first, on the CPU or wherever the first one's tensors are.

    Raises:
        StateDictMismatchError: If keys, shapes or kinds of tensors differ; it is a ``ValueError``.
        ValueError: If there is nothing to average, or ``weights`` or ``accumulate_dtype`` are not as said.

    Example:
        >>> one = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(3)}
        >>> two = {"w": torch.zeros(2), "n": torch.tensor(5)}
        >>> average_state_dicts([one, two])
        {'w': tensor([0.5000, 1.0000]), 'n': tensor(3)}

    """
    shares = _shares(len(state_dicts), weights)
    if accumulate_dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"average_state_dicts: `accumulate_dtype` must be torch.float32 or torch.float64, got {accumulate_dtype!r}."
        )
    members = aligned(state_dicts, names)
    result: dict[str, Any] = {}
    done: dict[tuple[Any, ...], Tensor] = {}
    with Workspace() as workspace:
        for key in members[0]:
            known = [member.shape_and_dtype(key) for member in members]
            dtypes = [dtype for _, dtype in filter(None, known)]
            if not (dtypes and _is_continuous(dtypes[0]) and selects(key, include, exclude)):
                first = members[0][key]
                result[key] = first.detach().clone() if isinstance(first, Tensor) else first
                continue
            places = tuple(member.place(key) for member in members)
            if places not in done:
                out = members[0].empty(key, reduce(torch.promote_types, dtypes))
                parts = [member.part(key) for member in members]
                done[places] = mean_of_parts(out, parts, dtypes, shares, accumulate_dtype, workspace)
            result[key] = done[places]
    return result


def _shares(count: int, weights: Sequence[float] | None) -> list[float]:
    if count == 0:
        raise ValueError("average_state_dicts: `state_dicts` must hold at least one state dict, got none.")
    if weights is None:
        return [1.0] * count
    if len(weights) != count:
        raise ValueError(
            f"average_state_dicts: `weights` must have one number per state dict ({count}), got {weights}."
        )
    total = sum(weights)
    if not 0 < total < float("inf"):  # NaN is refused too
        raise ValueError(f"average_state_dicts: `weights` must be finite with a positive sum, got {list(weights)}.")
    return list(weights)


def is_averaged(value: object) -> bool:
    """Whether a mean of such entries makes sense: integers and booleans are counts, positions and masks."""
    return isinstance(value, Tensor) and _is_continuous(value.dtype)


def _is_continuous(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def selects(key: str, include: Sequence[str] | None, exclude: Sequence[str] | None) -> bool:
    """Whether a key is asked for by ``include`` (all without it) and not taken out by ``exclude``."""
    wanted = include is None or any(fnmatchcase(key, pattern) for pattern in include)
    return wanted and not any(fnmatchcase(key, pattern) for pattern in exclude or ())


# -- keys -------------------------------------------------------------------------------------------------------------


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

    def load(self) -> dict[str, Any]:
        """All entries; tied tensors are one tensor."""
        return load_tied(self, self.place)

    def part(self, key: str) -> Part:
        """Reads parts of a tensor."""
        read = getattr(self._state_dict, "read", None)
        if read is None:
            return part_of(self[key])
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
            return value.data_ptr(), value.dtype, tuple(value.shape), tuple(value.stride())
        return (key,)

    def shape_and_dtype(self, key: str) -> tuple[tuple[int, ...], torch.dtype] | None:
        """What is known of a tensor without reading it, ``None`` of an entry that is no tensor."""
        describe = getattr(self._state_dict, "shape_and_dtype", None)
        if describe is not None:
            known: tuple[tuple[int, ...], torch.dtype] | None = describe(self._originals[key])
            return known
        value = self[key]
        return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else None


def aligned(state_dicts: Sequence[StateDict], names: Sequence[str] | None = None) -> list[Aligned]:
    """The state dicts under the same keys, checked to hold the same tensors.

    Args:
        state_dicts: At least one.
        names: What to call them in an error.

    Returns:
        Mappings that read through to the given ones.

    Raises:
        StateDictMismatchError: With a table of what differs.

    """
    keys = [{_without_wrappers(key): key for key in state_dict} for state_dict in state_dicts]
    in_module = [bool(k) and all(key.startswith("module.") for key in k) for k in keys]
    if any(in_module) and not all(in_module):
        keys = [
            {key.removeprefix("module."): original for key, original in k.items()} if wrapped else k
            for k, wrapped in zip(keys, in_module, strict=True)
        ]
    members = [Aligned(state_dict, k) for state_dict, k in zip(state_dicts, keys, strict=True)]
    labels = list(names) if names is not None else [f"state dict {i}" for i in range(len(members))]
    rows = [
        row
        for member, label in zip(members[1:], labels[1:], strict=True)
        for row in _differences(members[0], member, label)
    ]
    if rows:
        raise StateDictMismatchError(_table(rows, labels[0]))
    return members


def _without_wrappers(key: str) -> str:
    return key.replace("_orig_mod.", "")


def _differences(first: Aligned, other: Aligned, label: str) -> list[tuple[str, str, str, str]]:
    rows = [(key, "present", "missing", label) for key in first if key not in other._originals]
    rows += [(key, "missing", "present", label) for key in other if key not in first._originals]
    for key in first:
        if key in other._originals:
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


def combine(
    state_dicts: Sequence[StateDict], names: Sequence[str], mix: Callable[..., Tensor], others: int = 0
) -> dict[str, Any]:
    """Applies ``mix`` to the float64 versions of every float tensor; other entries are those of member ``others``."""
    members = aligned(state_dicts, names)
    result: dict[str, Any] = {}
    for key in members[0]:
        values = [member[key] for member in members]
        if is_averaged(values[0]):
            result[key] = mix(*(value.detach().double() for value in values)).to(values[0].dtype)
        else:
            chosen = values[others]
            result[key] = chosen.detach().clone() if isinstance(chosen, Tensor) else chosen
    return result


def unique(names: Iterable[str]) -> list[str]:
    """Names made distinct by a count behind those that occur again."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return result
