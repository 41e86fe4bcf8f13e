"""The pool of two processes that the distributed tests run on."""

import os

import pytest
import torch
import torch.distributed as dist

from tests.workers import WorkerPool


class LonelyError(Exception):
    pass


def where():
    return dist.get_rank(), dist.get_world_size(), os.getpid(), torch.get_num_threads()


def mean_of_ranks(value):
    tensor = torch.tensor(value * (1 + dist.get_rank()))
    dist.all_reduce(tensor)
    return tensor / 2


def fail_on_rank_1():
    if dist.get_rank() == 1:
        raise LonelyError("only here")


def die_on_rank_0():
    if dist.get_rank() == 0:
        os._exit(3)


@pytest.fixture(scope="module")
def pool():
    pool = WorkerPool()
    yield pool
    pool.close()


def test_two_ranks_that_stay(pool):
    first, second = pool.run(where), pool.run(where)
    assert [answer[:2] for answer in first] == [(0, 2), (1, 2)]
    assert first == second
    assert len({os.getpid(), first[0][2], first[1][2]}) == 3
    assert [answer[3] for answer in first] == [1, 1]


def test_the_ranks_reach_one_another(pool):
    assert [answer.tolist() for answer in pool.run(mean_of_ranks, 2.0)] == [3.0, 3.0]


def test_what_a_worker_raises_is_raised(pool):
    with pytest.raises(LonelyError, match="only here") as caught:
        pool.run(fail_on_rank_1)
    assert "on rank 1" in str(caught.value.__cause__)
    assert "in fail_on_rank_1" in str(caught.value.__cause__)


def test_a_dead_worker_is_an_error_and_the_pool_starts_anew(pool):
    before = {answer[2] for answer in pool.run(where)}
    with pytest.raises(RuntimeError, match="rank 0 ended with exit code 3"):
        pool.run(die_on_rank_0)
    after = pool.run(where)
    assert [answer[:2] for answer in after] == [(0, 2), (1, 2)]
    assert not before & {answer[2] for answer in after}
