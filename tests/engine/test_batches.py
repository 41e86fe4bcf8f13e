"""Batches put together and taken apart by their samples."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch

from lightning_reg.engine.data.batches import join_batches, samples_of


class Named(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@dataclass(frozen=True)
class Data:
    x: torch.Tensor
    names: list


X, Y = torch.arange(12.0).view(6, 2), torch.arange(6)
NAMES = ["a", "b", "c", "d", "e", "f"]
BATCHES = {
    "tensor": X,
    "list": [X, Y],
    "tuple": (X, Y, NAMES),
    "nested": {"x": [X, {"y": Y}], "scale": 0.5, "who": "all"},
    "ordered": OrderedDict(x=X, y=Y),
    "named": Named(X, Y),
    "dataclass": Data(X, NAMES),
    "constants": {"x": X, "weight": torch.ones(3), "lam": torch.tensor(0.5), "none": None},
}


def flat(batch):
    """Everything in a batch, as plain values."""
    if isinstance(batch, torch.Tensor):
        return batch.tolist()
    if isinstance(batch, dict):
        return {key: flat(value) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [flat(value) for value in batch]
    return flat(vars(batch)) if isinstance(batch, Data) else batch


@pytest.mark.parametrize("kind", BATCHES)
def test_taken_apart_and_put_together(kind):
    batch = BATCHES[kind]
    parts = [samples_of(batch, 6, slice(start, start + 2)) for start in (0, 2, 4)]
    assert all(type(part) is type(batch) for part in parts)
    assert flat(join_batches(parts, 2)) == flat(batch)
    first = {"x": X[:2].tolist(), "names": ["a", "b"]}
    if kind == "dataclass":
        assert flat(parts[0]) == first
        assert batch.names == NAMES
    if kind == "constants":
        assert flat(parts[1]) == {"x": X[2:4].tolist(), "weight": [1.0] * 3, "lam": 0.5, "none": None}


@pytest.mark.parametrize("kind", ["object", "set"])
def test_parts_that_may_hold_samples_are_not_guessed_at(kind):
    class Graphs:
        nodes = X

    assert samples_of([X, Graphs() if kind == "object" else {1, 2}], 6, slice(2)) is None
