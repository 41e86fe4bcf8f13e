"""Fixtures for all tests."""

import os

# The tests run on two processes, and start more: threads of torch in each of them would wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch.nn.functional as F
from torch.overrides import _get_current_function_mode_stack

from tests.workers import WorkerPool

_ASKED_BY_TORCH = {name: getattr(F, name) for name in ("has_torch_function_variadic", "handle_torch_function")}


@pytest.fixture(scope="session")
def two_processes():
    """A pool of two ranks, see :class:`tests.workers.WorkerPool`: ``two_processes.run(function, *args)``."""
    pool = WorkerPool()
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def torch_stays_as_it_is():
    """A test that leaves torch patched would change every test after it."""
    yield
    assert {name: getattr(F, name) for name in _ASKED_BY_TORCH} == _ASKED_BY_TORCH
    assert not _get_current_function_mode_stack()


@pytest.fixture(autouse=True)
def environment_stays_as_it_is():
    """Lightning notes seeds in the environment, and ``PL_SEED_WORKERS`` changes the loaders of every test after."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
