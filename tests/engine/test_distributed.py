"""Collectives: the numbers on two ranks, and nothing on one."""

import copy
import pickle

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import ELRCallback
from lightning_reg.engine.host.distributed import (
    RowExchange,
    all_gather,
    all_gather_padded,
    all_gather_rows,
    all_reduce_max,
    all_reduce_mean,
    all_reduce_sum,
    rank,
    rows_of_other_ranks,
    world_size,
)
from tests.toys import QUIET, TWO_RANKS, Classifier, fit

pytestmark = QUIET


def test_one_process_is_a_no_op():
    tensor = torch.tensor([1.0, 2.0], requires_grad=True)
    assert (world_size(), rank()) == (1, 0)
    assert all_gather(tensor).tolist() == [[1.0, 2.0]]
    assert not all_gather(tensor).requires_grad
    for reduce in (all_reduce_mean, all_reduce_max, all_reduce_sum):
        reduced = reduce(tensor)
        assert not reduced.requires_grad
        reduced += 1
    values, real = all_gather_padded(tensor)
    assert (values.tolist(), real.tolist()) == ([[1.0, 2.0]], [[True, True]])
    assert tensor.tolist() == [1.0, 2.0]
    exchange = RowExchange()
    exchange.start(torch.tensor([3]), torch.ones(1, 2), capacity=4)
    exchange.start(torch.tensor([3]), torch.ones(1, 2), capacity=4)
    assert exchange.finish() is None


def collect():
    mine = torch.tensor([1.0 + rank(), 5.0])
    return world_size(), all_gather(mine).tolist(), all_reduce_mean(mine).tolist(), mine.tolist()


def test_gather_and_mean(two_processes):
    for number, (size, gathered, mean, mine) in enumerate(two_processes.run(collect)):
        assert size == 2
        assert gathered == [[1.0, 5.0], [2.0, 5.0]]
        assert mean == [1.5, 5.0]
        assert mine == [1.0 + number, 5.0]


def collect_unequal():
    import torch.distributed as dist

    values, real = all_gather_padded(torch.arange(1.0, 3 - rank()))
    alone = dist.new_group([0]), dist.new_group([1])
    own = alone[rank()]
    mine = torch.tensor([1.0 + rank(), 5.0 - rank()])
    sizes = [world_size(own), rank(own), all_gather(mine, own).tolist(), all_reduce_max(mine, own).tolist()]
    return values.tolist(), real.tolist(), all_reduce_max(mine).tolist(), all_reduce_sum(mine).tolist(), sizes


def test_unequal_lengths_extremes_and_groups(two_processes):
    for number, (values, real, largest, total, own) in enumerate(two_processes.run(collect_unequal)):
        assert values == [[1.0, 2.0], [1.0, 0.0]]
        assert real == [[True, True], [True, False]]
        assert (largest, total) == ([2.0, 5.0], [3.0, 9.0])
        mine = [1.0 + number, 5.0 - number]
        assert own == [1, 0, [mine], mine]


def gather_rows(capacity):
    mine = torch.arange(1.0, 7.0).reshape(3, 2)[: [1, 3][rank()]].clone().requires_grad_()
    rows, real, first = all_gather_rows(mine, capacity=capacity)
    # Each rank weights the rows in its own way; a row's gradient is the sum of both.
    (rows[real] * torch.arange(1.0, 9.0).reshape(4, 2) * (1 + rank())).sum().backward()
    with pytest.raises(ValueError, match=r"[13] rows are more than `capacity`=0"):
        all_gather_rows(mine, capacity=0)
    others, there = rows_of_other_ranks(mine, capacity=capacity)
    size = len(rows) // 2
    assert torch.equal(others, rows[size:] if first == 0 else rows[:size])
    assert torch.equal(there, real[size:] if first == 0 else real[:size])
    return rows.tolist(), real.tolist(), first, mine.grad.tolist()


@pytest.mark.parametrize("capacity", [3, 4, None])
def test_rows_of_all_ranks_carry_the_gradients_of_all_ranks(two_processes, capacity):
    one, other = two_processes.run(gather_rows, capacity)
    each = capacity or 3
    rows = [[1.0, 2.0], *[[0.0, 0.0]] * (each - 1), [1.0, 2.0], [3.0, 4.0], [5.0, 6.0], *[[0.0, 0.0]] * (each - 3)]
    real = [True, *[False] * (each - 1), *[True] * 3, *[False] * (each - 3)]
    assert one == (rows, real, 0, [[3.0, 6.0]])
    assert other == (rows, real, each, [[9.0, 12.0], [15.0, 18.0], [21.0, 24.0]])


def test_rows_of_one_process_are_its_own():
    mine = torch.ones(2, 3, requires_grad=True)
    rows, real, first = all_gather_rows(mine)
    assert rows is mine
    assert (real.tolist(), first) == ([True, True], 0)


def exchange_rows(capacity):
    exchange, big = RowExchange(), 2**40 + 7
    indices = torch.tensor([[big, 2], [5]][rank()])
    rows = torch.tensor([[[0.1, -0.0], [float("nan"), 2.0]], [[3.0, 4.0]]][rank()])
    labels = torch.tensor([[[7], [-8]], [[9]]][rank()], dtype=torch.int32)
    exchange.start(indices, rows, labels, capacity=capacity)
    with pytest.raises(RuntimeError, match="finish"):
        exchange.start(indices, rows, labels, capacity=capacity)
    received = exchange.finish()
    assert exchange.finish() is None
    where, floats, words = received
    return where.tolist(), floats.view(torch.int32).tolist(), words.view(torch.int32)[:, 0].tolist()


@pytest.mark.parametrize("capacity", [2, 3, None])
def test_rows_of_unequal_batches_arrive_everywhere_bit_for_bit(two_processes, capacity):
    one, other = two_processes.run(exchange_rows, capacity)
    assert one == other
    where, floats, labels = one
    each = capacity or 2
    assert where == [2**40 + 7, 2, *[-1] * (each - 2), 5, *[-1] * (each - 1)]
    sent = torch.tensor([[0.1, -0.0], [float("nan"), 2.0], [3.0, 4.0]]).view(torch.int32).tolist()
    assert [row for row, place in zip(floats, where, strict=True) if place >= 0] == sent
    assert [label for label, place in zip(labels, where, strict=True) if place >= 0] == [7, -8, 9]


def train_elr(sync):
    generator = torch.Generator().manual_seed(2)
    data = TensorDataset(torch.randn(22, 6, generator=generator), torch.randint(3, (22,), generator=generator))
    elr = ELRCallback(beta=0.5, sync=sync)
    fit(Classifier(), elr, loader=DataLoader(data, 4), max_epochs=2, **TWO_RANKS)
    plain = pickle.loads(pickle.dumps(copy.deepcopy(elr)))  # the last step's exchange may still be under way
    return plain._table.targets.all(), plain._table.labels.all()[:, 0], data.tensors[1]


def test_elr_targets_are_equal_on_all_ranks_and_complete(two_processes):
    (targets, labels, given), (others, other_labels, _) = two_processes.run(train_elr, "gather")
    assert torch.equal(targets, others)
    assert torch.equal(labels, other_labels)
    assert torch.equal(labels, given.to(labels.dtype))
    assert torch.allclose(targets.sum(1), torch.full((22,), 0.75))  # 22 = 2 x 11: no padding, two visits each


def test_elr_keeps_to_its_own_samples_where_asked(two_processes):
    (targets, _, _), (others, _, _) = two_processes.run(train_elr, "local")
    visited = (targets.sum(1) > 0).int() + (others.sum(1) > 0).int()
    assert visited.min() >= 1
    assert not torch.equal(targets, others)
