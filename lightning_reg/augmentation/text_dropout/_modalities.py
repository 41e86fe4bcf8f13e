"""Modalities by name, and the learned state that stands for an absent one."""

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

__all__ = ["by_name", "names_of", "new_state"]

Value = TypeVar("Value")


def names_of(given: str | list[str] | None) -> list[str]:
    """One name or several as a list."""
    return [given] if isinstance(given, str) else list(given or ())


def by_name(value: Value | Mapping[str, Value], names: Sequence[str]) -> dict[str, Value]:
    """One value for all names, or what each has."""
    return {name: value[name] if isinstance(value, Mapping) else value for name in names}


def new_state(shape: Sequence[int], seed: int) -> nn.Module:
    """A module with a parameter ``state`` of a shape, drawn from a seed."""
    # Not 0, where a normalisation that may follow has no gradient that is of use.
    first = 0.02 * torch.randn(math.prod(shape), generator=torch.Generator().manual_seed(seed)).reshape(*shape)
    module = nn.Module()
    module.state = nn.Parameter(first)
    return module
