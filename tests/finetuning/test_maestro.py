"""Maestro: factors with ordered columns, a lasso on their tails, ranks that shrink, export into smaller layers."""

from functools import partial

import torch

from lightning_reg import MaestroLowRank
from lightning_reg.functional import random_ranks, rank_pairs
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.toys import QUIET


class MaestroByHand(Hand):
    """Both factors of the layer in the middle as one leaf, of which as many columns count as are left."""

    comes_first = True

    def latent(self, name, weight):
        if not (name.startswith("net.body") and name.endswith("weight")):
            return None
        self.name, self.shape = name, weight.shape
        m, n = weight.flatten(1).shape
        u, s, vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        self.sizes, self.rank, self.since, self.count = (m, n), len(s), 0, None
        leaf = torch.cat([(u * s.sqrt()).flatten(), (vh.T * s.sqrt()).flatten()])
        self.leaf = leaf
        return leaf, lambda leaf: self.product(leaf, self.rank)

    def factors(self, leaf, rank):
        m, n = self.sizes
        u, v = leaf[: m * min(m, n)].reshape(m, -1), leaf[m * min(m, n) :].reshape(n, -1)
        return u[:, :rank], v[:, :rank]

    def product(self, leaf, rank):
        u, v = self.factors(leaf, rank)
        return (u @ v.T).reshape(self.shape)

    def observe(self, loop, moment):
        self.count = moment.count - 1 - self.since

    def used(self, name, weight):
        if self.count is None or name != self.name:
            return weight
        single = self.technique.sampler == "single"
        walk, place = divmod(self.count, self.rank) if single else (self.count, 0)
        draw = torch.Generator().manual_seed(self.technique.derived_seed(f"ranks since {self.since}, {walk}"))
        rank = int(rank_pairs([self.rank], draw)[place][1]) if single else random_ranks([self.rank], draw)[0]
        return self.product(self.leaf, rank)

    def penalty(self, weights):
        u, v = self.factors(self.leaf, self.rank)
        return self.technique.lasso_weight * sum(u[:, b:].norm() + v[:, b:].norm() for b in range(self.rank))

    def after_step(self, loop, moment):
        self.count = None

    @torch.no_grad()
    def after_epoch(self, loop, epoch):
        u, v = self.factors(self.leaf, self.rank)
        kept = [b for b in range(self.rank) if u[:, b:].norm() * v[:, b:].norm() >= self.technique.threshold]
        if len(kept) < self.rank:
            self.rank, self.since = len(kept), (epoch + 1) * 6


CASE = Case(
    make=partial(MaestroLowRank, layers="net.body*", lasso_weight=0.01, threshold=0.3),
    neutral=None,
    by_hand=MaestroByHand,
    says=(
        "one layer truncated, lasso by 0.01, tails below 0.3 cut after each epoch, layers net.body*",
        "every layer truncated, lasso by 1e-06, no tail cut, layers auto",
        "no layer truncated, lasso by 0.1, tails below 0.5 cut after every 2 epochs, layers auto",
    ),
    also=["images", "regression"],
    variants=[
        partial(MaestroLowRank, sampler="independent", threshold=0.0, lr_factor=0.5, decay=False),
        partial(MaestroLowRank, sampler="none", lasso_weight=0.1, threshold=0.5, shrink_every_n_epochs=2),
    ],
    invalid=[
        ({"lasso_weight": -1e-9}, "lasso_weight"),
        ({"threshold": -1e-9}, "threshold"),
        ({"shrink_every_n_epochs": 0}, "shrink_every_n_epochs"),
        ({"lr_factor": 0.0}, "lr_factor"),
    ],
    exempt={"neutral_is_nothing": "Two factors never train as one weight does: whoever wants that leaves them out."},
)

pytestmark = QUIET
