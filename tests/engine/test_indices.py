"""Indices of the batches that leave a DataLoader, and the loader itself left as it is."""

import copy
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass, make_dataclass

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
    Subset,
    WeightedRandomSampler,
)

from lightning_reg.engine.data.indices import BatchIndices, IndexSource, entry_of_batch
from lightning_reg.engine.host.errors import MisconfigurationException


class Squares(Dataset):
    """A sample from which its position can be told."""

    def __init__(self, size: int = 10) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int | list[int]) -> Tensor:
        return torch.as_tensor(index) ** 2


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def weighted(num_samples: int, high: float) -> WeightedRandomSampler:
    return WeightedRandomSampler([1.0] * 9 + [high], num_samples, generator=seeded())


LOADERS = {
    "in order": lambda: DataLoader(Squares(), batch_size=4),
    "drop_last": lambda: DataLoader(Squares(), batch_size=4, drop_last=True),
    "shuffle": lambda: DataLoader(Squares(), batch_size=4, shuffle=True, generator=seeded()),
    "subset": lambda: DataLoader(Subset(Squares(), [9, 3, 7]), batch_size=2),
    "repeats": lambda: DataLoader(Squares(), batch_size=4, sampler=weighted(12, 9.0)),
    "batch_sampler": lambda: DataLoader(Squares(), batch_sampler=[[3, 1], [2], [0, 9, 8]]),
    "sampler of lists": lambda: DataLoader(Squares(), batch_size=None, sampler=[[3, 1], [2], [0, 9, 8]]),
    "sampler of indices": lambda: DataLoader(Squares(), batch_size=None, sampler=[3, 1, 2]),
    "numpy": lambda: DataLoader(Squares(), batch_size=2, sampler=np.array([3, 1, 2])),
    "tensor": lambda: DataLoader(Squares(), batch_size=2, sampler=torch.tensor([3, 1, 2])),
}


def follow(source: IndexSource, twin: DataLoader) -> Iterator[tuple[list[int], list[int]]]:
    """Each batch of a pass with the indices that the source gives for it."""
    for batch in twin:
        yield batch.reshape(-1).tolist(), source.advance().host.tolist()


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_indices_are_those_of_the_batch(make):
    source, loader = IndexSource(), make()
    twin, dataset = source.attach(loader), loader.dataset
    for _ in range(2):
        passed = list(follow(source, twin))
        assert len(passed) == len(loader)
        for batch, indices in passed:
            assert batch == [dataset[i].item() for i in indices]
        assert source.advance() is None


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_the_batches_are_those_of_the_users_loader(make):
    twin, loader = IndexSource().attach(make()), make()
    for _ in range(2):
        assert [batch.tolist() for batch in twin] == [batch.tolist() for batch in loader]


def test_the_global_random_state_is_used_as_ever():
    loader = DataLoader(Squares(), batch_size=4, shuffle=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        expected, state = [batch.tolist() for batch in loader], torch.get_rng_state()
        torch.manual_seed(5)
        assert [batch.tolist() for batch in IndexSource().attach(loader)] == expected
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_indices_of_other_types_without_batching(kind):
    source = IndexSource()
    twin = source.attach(DataLoader(Squares(), batch_size=None, sampler=kind([3, 1])))
    assert list(follow(source, twin)) == [([9], [3]), ([1], [1])]


@pytest.mark.parametrize(("indices", "distinct"), [([3, 1, 2], True), ([3, 1, 3], False), ([], True)])
def test_distinct_indices(indices, distinct):
    batch = BatchIndices(indices)
    assert (batch.host.tolist(), batch.host.dtype, batch.distinct) == (indices, torch.int64, distinct)


def test_repeats_within_a_batch_are_told():
    source = IndexSource()
    twin = source.attach(DataLoader(Squares(), batch_size=8, sampler=weighted(8, 1e9)))
    next(iter(twin))
    assert source.advance().distinct is False


@pytest.mark.parametrize(
    ("make", "size", "capacity"),
    [
        (LOADERS["drop_last"], 10, 4),
        (LOADERS["subset"], 3, 2),
        (LOADERS["batch_sampler"], 10, None),
        (LOADERS["sampler of lists"], 10, None),
        (lambda: DataLoader(Squares(), batch_sampler=BatchSampler(SequentialSampler(range(10)), 3, False)), 10, 3),
    ],
)
def test_size_and_capacity(make, size, capacity):
    source = IndexSource()
    source.attach(make())
    assert (source.size, source.capacity) == (size, capacity)


# -- workers ----------------------------------------------------------------------------------------------------------


class Uneven(Squares):
    """The first sample takes longest, so the second worker is done before the first."""

    def __getitem__(self, index: int) -> Tensor:
        if index == 0:
            torch.randn(1000, 1000).sort()
        return super().__getitem__(index)


def test_two_workers_keep_the_order():
    source = IndexSource()
    twin = source.attach(DataLoader(Uneven(), batch_size=2, num_workers=2))
    assert [indices for _, indices in follow(source, twin)] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


def test_persistent_workers_over_epochs_one_of_them_abandoned():
    source = IndexSource()
    loader = DataLoader(Squares(), 2, shuffle=True, num_workers=2, persistent_workers=True, generator=seeded())
    next(iter(loader))
    own_workers = loader._iterator
    twin, orders = source.attach(loader), []
    for length in (5, 1, 5):
        passed = [step for step, _ in zip(follow(source, twin), range(length), strict=False)]
        assert all(batch == [i**2 for i in indices] for batch, indices in passed)
        orders.append([i for _, indices in passed for i in indices])
    assert sorted(orders[0]) == sorted(orders[2]) == list(range(10))
    assert orders[0] != orders[2]
    assert loader._iterator is own_workers
    assert twin._iterator is not own_workers


# -- passes -----------------------------------------------------------------------------------------------------------


def none_where_odd(samples: list[Tensor]) -> Tensor | None:
    return None if samples[0] % 2 else torch.stack(samples)


def test_batches_of_none_reach_no_step():
    source = IndexSource()
    twin = source.attach(DataLoader(Squares(5), batch_size=1, collate_fn=none_where_odd))
    found = [(batch.tolist(), source.advance().host.tolist()) for batch in twin if batch is not None]
    assert found == [([0], [0]), ([4], [2]), ([16], [4])]
    assert source.advance() is None


def test_what_an_abandoned_pass_left_over_is_dropped():
    source = IndexSource()
    twin = source.attach(DataLoader(Squares(), batch_size=4))
    abandoned = iter(twin)
    next(abandoned), next(abandoned)
    assert [indices for _, indices in follow(source, twin)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert source.advance() is None


def test_what_a_finished_pass_left_over_is_kept():
    source = IndexSource()
    twin = source.attach(DataLoader(Squares(4), batch_size=2))
    assert len(list(twin)) == 2  # fetched ahead
    next(iter(twin))
    assert [source.advance().host.tolist() for _ in range(3)] == [[0, 1], [2, 3], [0, 1]]


def test_two_passes_at_once_do_not_mix():
    source = IndexSource()
    twin = source.attach(DataLoader(Squares(), batch_size=2))
    one = iter(twin)
    next(one)
    two = iter(twin)
    for batch in (next(two), next(one), next(two), next(one)):
        assert batch.tolist() == [i**2 for i in source.advance().host.tolist()]


def test_attaching_again_forgets_what_is_pending():
    source = IndexSource()
    next(iter(source.attach(DataLoader(Squares(), batch_size=2))))
    source.attach(DataLoader(Squares(3), batch_size=3))
    assert source.advance() is None
    assert (source.size, source.capacity) == (3, 3)


def test_a_batch_from_elsewhere():
    with pytest.raises(MisconfigurationException) as raised:
        IndexSource().missing()
    assert str(raised.value) == (
        "The training step got a batch that did not come from the training DataLoader, so its sample indices are"
        " unknown. Fetch batches through the loader, or let the dataset put its index into the batch and name that"
        ' entry with `index_key="..."` (a key, or a position such as "2").'
    )


# -- the user's loader ------------------------------------------------------------------------------------------------


class Named(DataLoader):
    """A user's own loader."""


@pytest.mark.parametrize("options", [{"batch_size": 4}, {"batch_size": None, "sampler": [[3, 1], [2]]}])
def test_the_users_loader_is_untouched(options):
    loader, source = Named(Squares(), **options), IndexSource()
    before = dict(loader.__dict__)
    batches = [batch.tolist() for batch in loader]
    twin = source.attach(loader)
    assert [batch.tolist() for batch in twin] == batches
    assert len(source.pending) == len(batches)
    assert loader.__dict__ == before
    assert type(loader) is Named
    assert [batch.tolist() for batch in loader] == batches
    assert len(source.pending) == len(batches)  # nobody follows the user's own


def test_the_twin_passes_for_the_loader():
    loader = Named(Squares(), batch_size=4)
    twin = IndexSource().attach(loader)
    assert isinstance(twin, Named)
    assert type(twin).__name__ == "Named"
    assert twin.dataset is loader.dataset
    assert (len(twin), twin.batch_size, twin.batch_sampler.drop_last) == (3, 4, False)


@pytest.mark.parametrize("batched", [True, False])
def test_the_epoch_reaches_the_distributed_sampler(batched):
    sampler = DistributedSampler(Squares(), num_replicas=2, rank=1, shuffle=True, seed=6)
    loader = DataLoader(Squares(), batch_size=5 if batched else None, sampler=sampler)
    source = IndexSource()
    twin, orders = source.attach(loader), []
    for epoch in range(2):
        (twin.batch_sampler.sampler if batched else twin.sampler).set_epoch(epoch)
        assert sampler.epoch == epoch
        expected = list(sampler)
        assert [i for _, indices in follow(source, twin) for i in indices] == expected
        orders.append(expected)
    assert orders[0] != orders[1]


def test_the_tap_can_be_copied_and_has_no_attributes_of_its_own():
    tap = IndexSource().attach(DataLoader(Squares(), batch_size=4)).batch_sampler
    assert list(copy.deepcopy(tap)) == list(copy.copy(tap)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    with pytest.raises(AttributeError, match="set_epoch"):
        tap.set_epoch(1)
    with pytest.raises(AttributeError, match="_sampler"):  # not a recursion without end, while it is unpickled
        type(tap).__new__(type(tap)).set_epoch(1)


# -- refusals ---------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    """Samples without positions."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(4))


class Twice(DataLoader):
    """A loader with an order of its own."""

    def __iter__(self) -> Iterator[Tensor]:
        for batch in super().__iter__():
            yield from (batch, batch)


def out_of_order() -> DataLoader:
    loader = DataLoader(Squares())
    loader.in_order = False  # an argument from torch 2.6 on
    return loader


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: [1, 2], "a list is no torch DataLoader, so sample indices cannot be followed"),
        (lambda: DataLoader(Stream()), "Stream is an IterableDataset and has no sample indices"),
        (
            out_of_order,
            "the DataLoader has in_order=False, so its batches cannot be told apart; set in_order=True",
        ),
        (
            lambda: Twice(Squares()),
            "Twice iterates in its own way (it overrides __iter__), so the order of its batches is not known to be that"
            " of its sampler",
        ),
    ],
)
def test_loaders_without_indices_are_refused(make, problem):
    with pytest.raises(MisconfigurationException) as raised:
        IndexSource().attach(make())
    assert str(raised.value) == (
        f"Sample indices are needed, but {problem}; or let the dataset put its index into the batch and name that entry"
        ' with `index_key="..."` (a key, or a position such as "2").'
    )


# -- indices in the batch ---------------------------------------------------------------------------------------------

INDEX = torch.tensor([5, 2, 9])
Pair = namedtuple("Pair", ["x", "index"])
Record = make_dataclass("Record", ["x", "index"])


@dataclass
class Outer:
    """A batch with a batch in it."""

    parts: list


@pytest.mark.parametrize(
    ("batch", "key"),
    [
        ({"x": 1, "index": INDEX}, "index"),
        ((0, 1, INDEX), "2"),
        ([0, INDEX], "-1"),
        (Record(0, INDEX), "index"),
        ({"labelled": {"index": INDEX}}, "labelled.index"),
        ({"a": [0, Record(0, (INDEX,))]}, "a.1.index.0"),
        (Outer([{"i": INDEX}]), "parts.0.i"),
        (Pair(0, INDEX), "1"),
        ({"index": INDEX.int()}, "index"),
        pytest.param(Pair(0, INDEX), "index"),
        pytest.param({2: INDEX}, "2"),
    ],
)
def test_entry_of_batch(batch, key):
    entry = entry_of_batch(batch, key)
    assert (entry.tolist(), entry.dtype) == ([5, 2, 9], torch.int64)


@pytest.mark.parametrize(
    ("batch", "key", "found"),
    [
        ({"x": 1, "y": 2}, "index", "keys ['x', 'y']"),
        ({"x": [1]}, "x.y", "keys ['x']"),
        ((0, 1), "2", "a tuple"),
        ((0, 1), "index", "a tuple"),
        (Record(0, 1), "rows", "a Record"),
        (Record(0, 1), "indices", "a Record. Did you mean 'index'?"),
        ({"x": {"label": 1, "level": 2}}, "x.labels", "keys ['x']. Did you mean 'label' or 'level'?"),
        (INDEX, "0", "a Tensor"),
        (None, "0", "a NoneType"),
    ],
)
def test_an_entry_that_is_not_there(batch, key, found):
    with pytest.raises(MisconfigurationException) as raised:
        entry_of_batch(batch, key)
    assert (
        str(raised.value)
        == f"index_key={key!r} names nothing in the batch, which is {found}."[: -1 if "?" in found else None]
    )


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        (INDEX.float(), "a tensor of torch.float32, (3,)"),
        (INDEX[:, None], "a tensor of torch.int64, (3, 1)"),
        (INDEX[0], "a tensor of torch.int64, ()"),
        ([5, 2, 9], "list"),
        pytest.param(
            INDEX > 4,
            "a tensor of torch.bool, (3,)",
        ),
    ],
)
def test_an_entry_that_is_no_index(entry, found):
    with pytest.raises(MisconfigurationException) as raised:
        entry_of_batch({"index": entry}, "index")
    assert str(raised.value) == f"index_key='index' must name a tensor of whole numbers (B,), found {found}."


def test_a_sampler_that_fills_the_same_list_again():
    def again():
        batch = [0, 0]
        for start in (0, 2, 4):
            batch[:] = [start, start + 1]
            yield batch

    class Again:
        def __iter__(self):
            return again()

    source = IndexSource()
    assert len(list(source.attach(DataLoader(range(6), batch_sampler=Again())))) == 3  # all fetched ahead of the steps
    assert [source.advance().list for _ in range(3)] == [[0, 1], [2, 3], [4, 5]]
