"""Generators of samplers: found under any name, put back, started from a seed."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Sampler

from lightning_reg import EWC
from lightning_reg.engine.data.order import Reordered
from lightning_reg.engine.host.generators import kept_generators
from tests.toys import BATCH, QUIET, SAMPLES, Classifier, fit, make_loader

pytestmark = QUIET

MAKES = {
    "torch": lambda: torch.Generator().manual_seed(0),
    "numpy": lambda: np.random.default_rng(0),
    "older numpy": lambda: np.random.RandomState(0),  # a user may
    "python": lambda: random.Random(0),
}


class Shuffles(Sampler):
    def __init__(self, rng):
        self.rng = rng

    def __len__(self):
        return SAMPLES

    def __iter__(self):
        if isinstance(self.rng, torch.Generator):
            return iter(torch.randperm(SAMPLES, generator=self.rng).tolist())
        if isinstance(self.rng, random.Random):
            return iter(self.rng.sample(range(SAMPLES), SAMPLES))
        return iter(self.rng.permutation(SAMPLES).tolist())


@pytest.mark.parametrize("kind", MAKES)
@pytest.mark.parametrize("batched", [False, True])
def test_the_next_order_is_that_of_a_loader_that_was_not_read(kind, batched):
    sampler, plain = Shuffles(MAKES[kind]()), Shuffles(MAKES[kind]())
    how = {"batch_sampler": BatchSampler(sampler, BATCH, drop_last=False)} if batched else {"sampler": sampler}
    loader = DataLoader(make_loader().dataset, **(how if batched else {**how, "batch_size": BATCH}))
    orders = []
    for seed in (3, 3, 4):
        with kept_generators(loader, seed):
            orders.append(list(sampler))
    assert orders[0] == orders[1] != orders[2]
    assert Reordered(loader, EWC()).draws(0) == Reordered(loader, EWC()).draws(0)
    with kept_generators(loader):
        assert list(sampler) == list(Shuffles(MAKES[kind]()))
    assert list(sampler) == list(plain)


@pytest.mark.parametrize("kind", MAKES)
def test_the_fisher_pass_draws_nothing_of_the_next_fit(kind):
    orders = []
    for techniques in ([], [EWC()]):
        sampler = Shuffles(MAKES[kind]())
        fit(Classifier(), *techniques, loader=DataLoader(make_loader().dataset, BATCH, sampler=sampler))
        orders.append(list(sampler))
    assert orders[0] == orders[1]
