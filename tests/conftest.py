"""Fixtures for all tests."""

import os

# The tests run on two processes, and start more: threads of torch in each of them would wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import weakref
from collections.abc import Generator

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch.overrides import _get_current_function_mode_stack
from torch.utils.data import BatchSampler, DataLoader

from tests.quick import make_fits_quick
from tests.workers import WorkerPool, plain_sharded_gradient

make_fits_quick()

_CHECKPOINTS: list[weakref.ref[Generator[None]]] = []


def _follow_checkpoints(name: str) -> None:
    """An exception in a checkpointed layer keeps its frames, and so torch's hooks, until garbage is collected."""
    made = getattr(torch.utils.checkpoint, name)

    def follow(*args, **kwargs):
        _CHECKPOINTS.append(weakref.ref(generator := made(*args, **kwargs)))
        return generator

    setattr(torch.utils.checkpoint, name, follow)


_GENERATOR = "_checkpoint_without_reentrant_generator"
_follow_checkpoints(f"{_GENERATOR}_impl" if hasattr(torch.utils.checkpoint, f"{_GENERATOR}_impl") else _GENERATOR)

_ASKED_BY_TORCH = {name: getattr(F, name) for name in ("has_torch_function_variadic", "handle_torch_function")}


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported and collected stays: the garbage collector need not look through it, then or later."""
    gc.disable()
    result = yield
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)  # fits leave circles of some megabytes; looking for them took a twentieth
    gc.enable()
    return result


@pytest.fixture(scope="session")
def two_processes():
    """A pool of two ranks, see :class:`tests.workers.WorkerPool`: ``two_processes.run(function, *args)``."""
    pool = WorkerPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def sharded_means(two_processes):
    """For comparisons of `fully_shard` on CPUs, where older versions of torch sum gradients, of a plain module too."""
    if two_processes.run(plain_sharded_gradient)[0] > 1.5:
        pytest.skip(f"torch {torch.__version__} sums the gradients of `fully_shard` over ranks on the CPU")


@pytest.fixture(autouse=True)
def torch_stays_as_it_is():
    """A test that leaves torch patched would change every test after it."""
    yield
    while _CHECKPOINTS:  # those that have ended do nothing more
        if (left := _CHECKPOINTS.pop()()) is not None:
            left.close()
    assert {name: getattr(F, name) for name in _ASKED_BY_TORCH} == _ASKED_BY_TORCH
    assert not _get_current_function_mode_stack()
    # Lightning wraps these while it asks for loaders, and leaves them wrapped where that raises.
    assert not [cls for cls in (DataLoader, BatchSampler) if "__old__init__" in vars(cls)]


@pytest.fixture(autouse=True)
def environment_stays_as_it_is():
    """Lightning notes seeds in the environment, and ``PL_SEED_WORKERS`` changes the loaders of every test after."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
