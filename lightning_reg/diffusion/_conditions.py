"""Conditions of a denoiser, a row for each sample: a tensor, several by the model's own argument names, or none."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Condition", "can_join", "count_of", "joined", "repeated", "rows_of", "spread"]

Condition: TypeAlias = Tensor | Mapping[str, Tensor] | None


def count_of(condition: Condition) -> int | None:
    """How many rows there are; ``None`` where there is no condition, or one number for all."""
    first = next(iter(condition.values()), None) if isinstance(condition, Mapping) else condition
    return None if first is None or first.dim() == 0 else len(first)


def spread(condition: Condition, count: int) -> Condition:
    """One row for each sample: a single row, or a number, stands for all."""
    if isinstance(condition, Mapping):
        return {name: _spread(value, count) for name, value in condition.items()}
    return None if condition is None else _spread(condition, count)


def _spread(value: Tensor, count: int) -> Tensor:
    value = value[None] if value.dim() == 0 else value
    if len(value) not in (1, count):
        raise ValueError(f"Denoiser: `condition` must have a row for each of {count} samples or one, got {len(value)}.")
    return value.expand(count, *value.shape[1:])


def rows_of(condition: Condition, index: Tensor) -> Condition:
    """Some rows, in the order of ``index``."""
    if isinstance(condition, Mapping):
        return {name: value[index] for name, value in condition.items()}
    return None if condition is None else condition[index]


def repeated(condition: Condition, times: int) -> Condition:
    """Each row several times, one after the other."""
    if isinstance(condition, Mapping):
        return {name: value.repeat_interleave(times, 0) for name, value in condition.items()}
    return None if condition is None else condition.repeat_interleave(times, 0)


def can_join(one: Condition, two: Condition) -> bool:
    """Whether rows of both fit into one batch; prompts of other lengths do not."""
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        return one.keys() == two.keys() and all(can_join(one[name], two[name]) for name in one)
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.shape[1:] == two.shape[1:]
    return one is None and two is None


def joined(conditions: Sequence[Condition]) -> Condition:
    """The rows of all, one after the other."""
    first = conditions[0]
    if isinstance(first, Mapping):
        return {name: torch.cat([c[name] for c in conditions if isinstance(c, Mapping)]) for name in first}
    return None if first is None else torch.cat([c for c in conditions if isinstance(c, Tensor)])
