"""ItemSSL: halves of an item's features find each other."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import mutual_info_score
from torch import nn

from lightning_reg import IDFFlops, ItemSSL
from lightning_reg.engine.data.side_batches import distinct_rows, side_rows
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import (
    complementary_views,
    correlated_features,
    item_ssl_loss,
    mutual_information,
    popularity_slices,
)
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.conformance.problems import KINDS, Problem
from tests.toys import CLASSES, QUIET, Classifier, fit, same_weights

pytestmark = QUIET


def catalogue():
    """Forty items: four attributes, each twice, the second time in other numbers."""
    drawn = torch.randint(1, 4, (40, 4, 1), generator=torch.Generator().manual_seed(3))
    return torch.cat([drawn, 4 - drawn], dim=2).flatten(1)


def encode(module, items):
    """Through weights, and not through layers, which others edit for the rows of the batch."""
    first, body = module.net.first, module.net.body
    return F.linear(F.linear(items / 4, first.weight, first.bias).tanh(), body.weight, body.bias)


def labelled(size):
    x = torch.randn(size, 8)
    return x, (x[:, :4] + torch.randn(size, 4)).argmax(1)


class FoundAgain(Hand):
    """Pairs one after the other; the features that go together are known here: the two of an attribute."""

    def term(self, loop, moment):
        draws = self.technique.generator(SimpleNamespace(batches_so_far=moment.count, stream=""), same_on_ranks=True)
        rows = catalogue()[distinct_rows(40, 6, draws)].tolist()
        draws = self.technique.generator(SimpleNamespace(batches_so_far=moment.count, stream=""), same_on_ranks=True)
        torch.rand(8, generator=draws)
        seed = int(torch.randint(8, (1,), generator=draws))
        lost = {seed, seed ^ 1}
        views = [
            [[0.0 if (column in lost) == first else row[column] / 4 for column in range(8)] for row in rows]
            for first in (True, False)
        ]
        w = moment.weights
        z, other = (
            F.normalize(
                (torch.tensor(view) @ w["net.first.weight"].T + w["net.first.bias"]).tanh() @ w["net.body.weight"].T
                + w["net.body.bias"]
            )
            for view in views
        )
        total = 0.0
        for i in range(6):
            told_apart = [j for j in range(6) if j == i or rows[j] != rows[i]]
            total += z[i] @ other[i] / 0.5 - (z[i] @ other[told_apart].T / 0.5).exp().sum().log()
        return -0.7 * total / 6


SMALL = {
    "encode": f"{__name__}.encode",
    "items": f"{__name__}.catalogue",
    "missing": 0,
    "temperature": 0.5,
    "size": 6,
    "correlated": 1,
}
CASE = Case(
    make=partial(ItemSSL, **SMALL, weight=0.7),
    neutral=partial(ItemSSL, **SMALL, weight=0.0),
    by_hand=FoundAgain,
    # A problem of its own: its encoder is made of layers that vectors pass.
    data=Problem(KINDS["classification"].net, labelled, F.cross_entropy, serves=["classification"]),
    says=(
        f"{__name__}.encode on 6 of {__name__}.catalogue, correlated masking, weight 0.7",
        "weight=0: inactive",
        f"{__name__}.encode on 6 of {__name__}.catalogue, dropout masking, rate 0.5, weight 0.3",
    ),
    variants=[partial(ItemSSL, **SMALL | {"correlated": None}, masking="dropout", rate=0.5)],
    invalid=[
        (SMALL | {"weight": -0.1}, "weight"),
        (SMALL | {"temperature": 0.0}, "temperature"),
        (SMALL | {"size": 1}, "size"),
        (SMALL | {"rate": 1.0}, "rate"),
        (SMALL | {"rate": -0.1}, "rate"),
        (SMALL | {"correlated": -1}, "correlated"),
        (SMALL | {"fields": [0, 2]}, "fields"),
        (SMALL | {"unranked": [-1]}, "unranked"),
    ],
)


# -- the mathematics --------------------------------------------------------------------------------------------------


def test_mutual_information_is_that_of_scikit_learn_and_its_diagonal_the_entropy():
    table = catalogue()
    found = mutual_information(table)
    for i in range(8):
        for j in range(8):
            assert found[i, j].item() == pytest.approx(mutual_info_score(table[:, i], table[:, j]), abs=1e-12)
    p = table[:, 0].bincount()[1:].double() / 40
    assert found[0, 1].item() == pytest.approx(-(p * p.log()).sum().item())  # a copy says all


def test_values_of_a_field_are_one_category_in_any_order():
    table = torch.tensor([[0, 1, 5], [1, 0, 5], [2, 0, 7], [0, 2, 7]])
    found = mutual_information(table, torch.tensor([0, 0, 1]))
    assert found[0, 1].item() == pytest.approx(math.log(2))


def test_the_loss_by_hand_and_of_orthogonal_views():
    z, other = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double(), torch.randn(5, 3).double()
    a, b = F.normalize(z), F.normalize(other)
    wanted = -sum((a[i] @ b[i] / 0.2 - torch.logsumexp(a[i] @ b.T / 0.2, 0)) for i in range(5)) / 5
    torch.testing.assert_close(item_ssl_loss(z, other, 0.2), wanted)
    order = torch.randperm(5)
    torch.testing.assert_close(item_ssl_loss(z[order], other[order], 0.2), wanted)
    rows = 3 * torch.eye(6)
    assert item_ssl_loss(rows, rows, 0.1).item() == pytest.approx(math.log(1 + 5 * math.exp(-10)), abs=1e-6)


def test_equal_items_are_no_negatives_of_one_another():
    z, other = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).double()
    a, b = F.normalize(z), F.normalize(other)
    kept = [[0, 1, 3], [1, 0, 2, 3, 4], [2, 1, 3], [3, 0, 1, 2, 4], [4, 1, 3]]  # 0, 2 and 4 are one item
    wanted = sum(torch.logsumexp(a[i] @ b[of].T / 0.2, 0) - a[i] @ b[i] / 0.2 for i, of in enumerate(kept)) / 5
    torch.testing.assert_close(item_ssl_loss(z, other, 0.2, ids=torch.tensor([7, 1, 7, 2, 7])), wanted)
    torch.testing.assert_close(item_ssl_loss(z, other, 0.2, ids=torch.arange(5)), item_ssl_loss(z, other, 0.2))


def test_its_cosines_are_float32_in_half_precision():
    z, other = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = item_ssl_loss(z, other, 0.05)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, item_ssl_loss(z.float(), other.float(), 0.05), atol=1e-6, rtol=1e-6)


def test_views_share_no_feature_and_copies_stay_together():
    table, information = catalogue(), mutual_information(catalogue())
    for seed in range(8):
        masked = correlated_features(information, seed, 1)
        assert masked.nonzero()[:, 0].tolist() == [seed // 2 * 2, seed // 2 * 2 + 1]
        first, second = complementary_views(table, masked, torch.tensor(0))
        assert ((first > 0) ^ (second > 0)).all()
        torch.testing.assert_close(first + second, table)


def test_the_tail_is_what_is_left_of_the_popular():
    assert popularity_slices(torch.tensor([5, 5, 10, 0]), 0.5).tolist() == [False, False, True, False]
    assert popularity_slices(torch.tensor([5, 5, 10, 0]), 0.51).tolist() == [True, False, True, False]


# -- rows of the catalogue --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "size"), [(10, 8), (1000, 8), (5, 9)])
def test_drawn_rows_are_distinct_and_uniform(total, size):
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(total)
    for _ in range(2000):
        rows = distinct_rows(total, size, generator)
        assert len(rows.unique()) == len(rows) == min(size, total)
        counts[rows] += 1
    expected = 2000 * min(size, total) / total
    assert (counts - expected).abs().max() < 6 * math.sqrt(expected) + 1e-9


def test_ranks_share_the_draw(monkeypatch):
    draws = partial(torch.Generator().manual_seed, 7)
    whole = side_rows(draws(), 1000, 9)
    monkeypatch.setattr("lightning_reg.engine.host.distributed.world_size", lambda group=None: 2)
    ranks = []
    for rank in (0, 1):
        monkeypatch.setattr("lightning_reg.engine.host.distributed.rank", lambda group=None, rank=rank: rank)
        ranks.append(side_rows(draws(), 1000, 9))
    assert torch.equal(ranks[0], whole[::2])
    assert torch.equal(ranks[1], whole[1::2])


# -- attached ---------------------------------------------------------------------------------------------------------


class Tower(nn.Module):
    """Embeddings of eight fields, batch norm, dropout."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(4, 5)
        self.norm, self.drop, self.out = nn.BatchNorm1d(40), nn.Dropout(0.5), nn.Linear(40, 6)

    def forward(self, items):
        return self.out(self.drop(self.norm(self.embedding(items).flatten(1))))


class TwoTowers(Classifier):
    """Has an item tower beside what it trains."""

    def __init__(self):
        super().__init__()
        self.tower = Tower()
        self.seen = []
        self.tower.register_forward_pre_hook(lambda _, given: self.seen.append(given[0].clone()))

    def catalogue(self):
        return catalogue()

    def floats(self):
        return torch.rand(4, 2)

    def without_gradient(self, items):
        return self.tower(items).detach()

    def listed(self, items):
        return items.tolist()


def test_a_layer_of_the_module_sees_two_views_and_its_statistics_stay():
    model = TwoTowers()
    before = model.tower.norm.running_mean.clone()
    weight = model.tower.out.weight.detach().clone()
    fit(model, ItemSSL("tower", "catalogue", [0] * 8, size=10), max_epochs=1)
    assert torch.equal(model.tower.norm.running_mean, before)
    assert not torch.equal(model.tower.out.weight, weight)
    (views, *_) = model.seen
    first, second = views.chunk(2)
    assert len(first) == 10
    assert ((first > 0) ^ (second > 0)).all()
    known = {tuple(row) for row in catalogue().tolist()}
    assert {tuple(row) for row in (first + second).tolist()} <= known
    lost = (first == 0).all(0)
    assert lost.sum() == 4  # the seed and k // 2 - 1 more, the same in all items


def test_ids_are_in_a_view_by_chance_and_values_of_a_field_drop_alone():
    technique = ItemSSL("tower", "catalogue", 0, size=10, unranked=[7], fields=[0, 1, 2, 3, 4, 5, 6, 7], correlated=2)
    technique._prepare(catalogue())
    generator = torch.Generator().manual_seed(0)
    masks = torch.stack([technique._masked(generator) for _ in range(200)])
    assert 60 < masks[:, 7].sum() < 140
    assert (masks[:, :7].sum(1) == 3).all()
    several = ItemSSL("tower", "catalogue", 0, size=40, masking="none", rate=0.5, fields=[0, 0, 1, 2, 3, 4, 5, 6])
    several._prepare(catalogue())
    first, second = several._views(SimpleNamespace(batches_so_far=1, stream=""), catalogue())
    assert torch.equal(first[:, 2:], catalogue()[:, 2:])
    assert 20 < (first[:, :2] == 0).sum() < 60
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"items": "floats"}, "whole numbers"),
        ({"items": "nothing"}, "nothing"),
        ({"encode": "towers"}, "towers"),
        ({"encode": "seen"}, "names a list"),
        ({"encode": "listed"}, "returned list"),
        ({"encode": "without_gradient"}, "without gradient"),
        ({"correlated": 7}, "at least one must be left"),
        ({"unranked": [9]}, "ranked"),
        ({"missing": [0, 0]}, "8 columns"),
        ({"fields": [0, 1]}, "8 columns"),
    ],
)
def test_what_does_not_fit_is_told_by_name(options, said):
    with pytest.raises(MisconfigurationException, match=said):
        fit(TwoTowers(), ItemSSL(**{"encode": "tower", "items": "catalogue", "missing": 0} | options), max_epochs=1)


def test_what_the_encoder_draws_is_its_own():
    """The users' own draws, and the training of what the encoder does not touch, stay what they were."""
    one, two = TwoTowers(), TwoTowers()
    assert same_weights(one.net, two.net)
    fit(one, max_epochs=1)
    fit(two, ItemSSL("tower", "catalogue", 0), max_epochs=1)
    assert same_weights(one.net, two.net)


class Found(TwoTowers):
    """Classifies what its tower makes of items, by plain SGD."""

    def __init__(self):
        super().__init__()
        self.tower.drop.p = 0.0

    def training_step(self, batch, batch_idx):
        x, y = batch
        items = (x[:, torch.arange(8) % x.shape[1]] * 2).long().clamp(-1, 1) + 2
        return F.cross_entropy(self.tower(items)[:, :CLASSES], y)


@pytest.mark.parametrize("first", [0, 1])
def test_beside_idf_flops_on_the_same_tower_each_adds_its_own_gradient(first):
    """One step of SGD is linear in the gradient; the masked items are no documents."""
    made = [lambda: ItemSSL("tower", "catalogue", 0, size=8), lambda: IDFFlops("tower", weight=0.1, ramp_steps=1)]
    ends = {}
    for chosen in [(), (0,), (1,), (first, 1 - first)]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Found()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        fit(model, *[made[i]() for i in chosen], max_steps=1)
        ends[frozenset(chosen)] = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    plain, item, sparse, both = (ends[frozenset(of)] for of in ((), (0,), (1,), (0, 1)))
    for name, change in both.items():
        torch.testing.assert_close(change, item[name] + sparse[name] - plain[name], rtol=1e-4, atol=1e-6)
    assert (item["tower.out.weight"] - plain["tower.out.weight"]).abs().max() > 1e-4
    assert (sparse["tower.out.weight"] - plain["tower.out.weight"]).abs().max() > 1e-4
