"""Batches put together and taken apart by their samples."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch

from lightning_reg.engine.data.batches import join_batches, join_outputs, samples_of


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


@pytest.mark.parametrize("kind", [kind for kind in BATCHES if kind != "constants"])
def test_outputs_of_parts_of_any_sizes_are_those_of_the_whole(kind):
    batch = BATCHES[kind]
    cuts = [slice(0, 1), slice(1, 4), slice(4, 6)]
    joined = join_outputs([samples_of(batch, 6, cut) for cut in cuts], [1, 3, 2])
    assert type(joined) is type(batch)
    assert flat(joined) == flat(batch)
    assert join_outputs([batch], [6]) is batch


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([X[:2].sum(), X[2:].sum()], r"a tensor \(\)"),
        ([X[:2], X[2:5]], r"tensors \(2, 2\), \(3, 2\)"),
        ([X[:2], X[2:, :1]], r"tensors \(2, 2\), \(4, 1\)"),
        ([X[:2], None], r"tensors \(2, 2\), \(\)"),
        ([1, 2], "a int"),
        ([object(), object()], "a object"),
        ([[X[:2]], [X[2:], X[2:]]], "zip"),
    ],
)
def test_outputs_that_are_no_rows_are_not_joined(parts, said):
    with pytest.raises(ValueError, match=said):
        join_outputs(parts, [2, 4])
