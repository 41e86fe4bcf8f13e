"""Random states that are replayed."""

import random

import numpy as np
import torch
from torch import nn

from lightning_reg.engine.host.generators import own_generators, own_randomness, replayed_randomness


def drawn():
    return random.random(), np.random.rand()  # noqa: NPY002 # the global state is what users draw from


def test_the_second_context_draws_what_the_first_drew_and_leaves_no_trace():
    first, second = replayed_randomness()
    with first:
        one = drawn()
    between = random.getstate()
    for _ in range(2):
        with second:
            assert drawn() == one
        assert random.getstate() == between
    assert drawn() != one


def test_one_cached_normal_number_counts_as_drawn():
    np.random.seed(0)  # noqa: NPY002 # as above
    np.random.normal()  # noqa: NPY002 # numpy draws two and keeps one
    first, second = replayed_randomness()
    with first:
        one = np.random.normal()  # noqa: NPY002 # the kept one: nothing else of the state changes
    with second:
        assert np.random.normal() == one  # noqa: NPY002


def test_generators_of_an_object():
    layer = nn.Linear(2, 2)
    assert own_generators(layer) == []
    layer.draws, layer.chance = torch.Generator(), np.random.default_rng(0)
    assert own_generators(layer) == [layer.draws, layer.chance]


def test_a_seed_of_its_own_is_left_to_no_device():
    """A GPU that is used for the first time afterwards has the user's seed."""
    torch.manual_seed(3)
    users = list(torch.cuda._lazy_seed_tracker.get_calls())
    before = torch.get_rng_state()
    with own_randomness(7):
        one = torch.rand(()), drawn()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.cuda._lazy_seed_tracker.get_calls() == users
    with own_randomness(7):
        assert (torch.rand(()), drawn()) == one


def test_the_state_of_mps_is_put_back(monkeypatch):
    """No Apple GPU is here: a generator stands in for it."""
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", generator.get_state)
    monkeypatch.setattr(torch.mps, "set_rng_state", generator.set_state)
    monkeypatch.setattr(torch.mps, "manual_seed", generator.manual_seed)
    with own_randomness(7):
        assert generator.initial_seed() == 7
        torch.rand((), generator=generator)
    assert torch.equal(generator.get_state(), before)
