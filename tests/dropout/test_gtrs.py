"""CandidateDropout, ClassDropout and ClampedSelfDistillation."""

import math
from collections import OrderedDict
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import CandidateDropout, ClassDropout, LossReweighting
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import (
    candidate_subset,
    clamped_soft_labels,
    masked_classes,
    positions_in_subset,
    refinement_loss,
    subset_size,
    take,
    teacher_momentum,
    top_candidates,
)
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.conformance.problems import Problem
from tests.toys import CLASSES, QUIET, Classifier, LossRecorder, ShiftTargets, fit, make_trainer, same_weights

pytestmark = QUIET

WIDTH, CANDIDATES = 5, 8


# -- a scorer whose candidates attend to each other -------------------------------------------------------------------


class Among(nn.Module):
    """Each candidate and the mean of all: another set, other scores."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(2 * 6, 6)

    def forward(self, rows):
        return self.mix(torch.cat([rows, rows.mean(-2, keepdim=True).expand_as(rows)], -1))


class Score(nn.Linear):
    def forward(self, rows):
        return super().forward(rows)[..., 0]


def scorer():
    return nn.Sequential(
        OrderedDict(first=nn.Linear(WIDTH, 6), act=nn.Tanh(), body=Among(), act_body=nn.Tanh(), head=Score(6, 1))
    )


def candidates(size):
    x = torch.randn(size, CANDIDATES, WIDTH)
    return x, torch.sigmoid(x[..., 0] + torch.randn(size, CANDIDATES))


SCORES = Problem(scorer, candidates, F.binary_cross_entropy_with_logits)


def drawn(generator, size, keep, always=()):
    """Positions by the order of the draws, those first that are always kept."""
    order = torch.randperm(size, generator=generator).tolist()
    order = [i for i in order if i in always] + [i for i in order if i not in always]
    return sorted(order[: math.floor(keep * size)])


class Fewer(Hand):
    """The batch with the columns that are drawn."""

    def observe(self, loop, moment):
        t = self.technique
        chosen = drawn(moment.draws(t), CANDIDATES, t.keep, t.always_keep)
        moment.x = torch.stack([moment.x[:, i] for i in chosen], 1)
        moment.y = torch.stack([moment.y[:, i] for i in chosen], 1)


class Absent(Hand):
    """Exponentials of the classes that are there."""

    def change_input(self, output, moment):
        classes = output.shape[1]
        chosen = drawn(moment.draws(self.technique), classes, self.technique.keep)
        rows = [
            [z if c in chosen or c == int(y) else torch.tensor(-torch.inf) for c, z in enumerate(row)]
            for row, y in zip(output, moment.y, strict=True)
        ]
        return torch.stack([torch.stack(row) for row in rows])


KEYS = {"0": 1, "1": -1}
CASE = (
    Case(
        make=partial(CandidateDropout, KEYS, always_keep=[2], same_on_ranks=True),
        neutral=partial(CandidateDropout, KEYS, keep=1.0),
        by_hand=Fewer,
        says=(
            "keep=0.5 of 0 along 1, 1 along -1; always 1 more; one subset for all ranks",
            "keep=1: inactive",
            "keep=0.75 of 1 along 1, argument 0 of net.first along 1; a subset for each rank",
            "keep=0.25 of 0 along 1, 1 along 1; a subset for each rank",
        ),
        data=SCORES,
        variants=[
            partial(CandidateDropout, {"1": 1}, keep=0.75, layer="net.first", axis=1),
            partial(CandidateDropout, {"0": 1, "1": 1}, keep=0.25, normalise=["1"], seed=3),
        ],
        invalid=[
            ({"keys": {}}, "keys"),
            ({"keys": {"0": 0.5}}, "keys"),
            ({"keep": 0.0}, "keep"),
            ({"keep": 1.1}, "keep"),
            ({"always_keep": [-1]}, "always_keep"),
            ({"normalise": ["2"]}, "normalise"),
            ({"argument": -1}, "argument"),
            ({"axis": 64}, "axis"),
            ({"num_candidates": 0}, "num_candidates"),
            ({"keys": {}, "layer": "net", "positive_key": "1"}, "num_candidates"),
        ],
    ),
    Case(
        make=partial(ClassDropout, same_on_ranks=True),
        neutral=partial(ClassDropout, 1.0),
        by_hand=Absent,
        says=(
            "keep=0.5; one subset for all ranks",
            "keep=1: inactive",
            "keep=0.25; a subset for each rank",
        ),
        also=["images", "maps", "tokens"],
        variants=[partial(ClassDropout, 0.25, loss="cross_entropy", seed=2)],
        invalid=[({"keep": 0.0}, "keep"), ({"keep": 1.5}, "keep"), ({"loss": -1}, "loss")],
    ),
)


# -- the functional core ----------------------------------------------------------------------------------------------


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("size", "keep", "count"), [(8, 0.5, 4), (9, 0.5, 4), (1, 0.25, 1), (3, 0.25, 1), (100, 0.29, 29)]
)
def test_the_subset_is_the_first_of_a_permutation_and_of_one_size(size, keep, count):
    assert subset_size(size, keep) == count
    for seed in range(5):
        order = torch.randperm(size, generator=seeded(seed))
        assert candidate_subset(size, keep, seeded(seed)).tolist() == sorted(order[:count].tolist())
    assert candidate_subset(size, 1.0).tolist() == list(range(size))


def test_every_candidate_is_kept_as_often_as_keep_says_and_some_always():
    generator = seeded()
    counts, with_some = torch.zeros(2, 8)
    for _ in range(2000):
        counts[candidate_subset(8, 0.5, generator)] += 1 / 2000
        with_some[candidate_subset(8, 0.5, generator, torch.tensor([[1, -100], [1, 6]]))] += 1 / 2000
    assert counts.sub(0.5).abs().max() < 0.05  # four standard deviations of 2000 draws
    assert with_some[[1, 6]].tolist() == pytest.approx([1.0, 1.0], abs=1e-4)
    assert with_some[[0, 2, 3, 4, 5, 7]].sub(1 / 3).abs().max() < 0.05


def test_listed_tensors_stay_aligned_and_distributions_sum_to_1():
    x = torch.arange(6.0)
    entries = {"v": torch.stack([x, 10 * x], 1), "y": torch.stack([x, -x]), "p": (x[None] / 15).repeat(2, 1), "n": x}
    entries["p"][1] = F.one_hot(torch.tensor(0), 6)
    taken = take(entries, {"v": 0, "y": 1, "p": -1}, torch.tensor([1, 4]), ["p"])
    assert taken["v"].tolist() == [[1.0, 10.0], [4.0, 40.0]]
    assert taken["y"].tolist() == [[1.0, 4.0], [-1.0, -4.0]]
    assert taken["p"].tolist() == [pytest.approx([0.2, 0.8]), [0.5, 0.5]]
    assert taken["n"] is x


def test_soft_labels_at_the_bounds():
    y, p = torch.tensor([1.0, 0.0, 0.0, 0.4]), torch.tensor([0.2, 0.9, 0.1, 0.45])
    assert clamped_soft_labels(y, p, 0.0).tolist() == y.tolist()
    assert clamped_soft_labels(y, p, 1.0).tolist() == pytest.approx(p.tolist())
    assert clamped_soft_labels(y, p).tolist() == pytest.approx([0.85, 0.15, 0.1, 0.45])
    metres = clamped_soft_labels(torch.tensor([3.0, -3.0]), torch.tensor([9.0, -3.5]), 1.0)
    assert metres.tolist() == [4.0, -3.5]
    assert clamped_soft_labels(y.bool(), p.bfloat16().requires_grad_()).dtype == torch.float32


def test_momentum_by_epoch():
    assert [teacher_momentum(e) for e in range(5)] == pytest.approx([0.992, 0.994, 0.996, 0.998, 0.998])
    assert [teacher_momentum(e, copy_epochs=3) for e in range(7)] == pytest.approx(
        [0, 0, 0, 0.992, 0.994, 0.996, 0.998]
    )


def test_classes_are_masked_in_any_layout():
    z = torch.arange(12.0).reshape(2, 3, 2)
    masked = masked_classes(z, torch.tensor([[2, -100], [255, 1]]), torch.tensor([0]))
    assert masked.isfinite().int().tolist() == [[[1, 1], [0, 0], [1, 0]], [[1, 1], [0, 1], [0, 0]]]
    assert masked[masked.isfinite()].tolist() == [0.0, 1.0, 4.0, 6.0, 7.0, 9.0]
    assert masked_classes(z[0, :, 0], torch.tensor(1), torch.tensor([2])).isfinite().tolist() == [False, True, True]


def test_the_best_candidates_are_those_of_the_whole_set_and_every_layer_counts():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.7, 0.2, 0.6]], requires_grad=True)
    chosen = top_candidates(scores, 2, among=torch.tensor([4, 1, 3]))
    assert chosen.tolist() == [[1, 3], [4, 3]]
    again = top_candidates(torch.tensor([[0.1, 0.2], [0.2, 0.1]]), 1, among=chosen)
    assert again.tolist() == [[3], [4]]
    targets = torch.tensor([[0.0, 1.0, 0.0, 0.5, 0.0], [0.2, 0.0, 0.0, 1.0, 0.0]])
    layers = [torch.tensor([[0.3, -0.1], [1.0, 2.0]]), torch.zeros(2, 2)]
    chosen_targets = [[1.0, 0.5], [0.0, 1.0]]
    wanted = 0.0
    for layer in layers:
        for row, ys in zip(layer.tolist(), chosen_targets, strict=True):
            wanted += sum(math.log1p(math.exp(z)) - y * z for z, y in zip(row, ys, strict=True)) / 4
    assert refinement_loss(layers, targets, chosen).item() == pytest.approx(wanted, rel=1e-6)
    assert refinement_loss(layers, targets, chosen, F.mse_loss).item() == pytest.approx(
        sum(F.mse_loss(layer, torch.tensor(chosen_targets)).item() for layer in layers), rel=1e-6
    )


def test_positions_come_into_the_subset_and_back():
    indices = torch.tensor([1, 4, 5])
    inside = positions_in_subset(torch.tensor([[5, 1], [0, -1]]), indices, 6)
    assert inside.tolist() == [[2, 0], [-1, -1]]
    assert indices[inside[0]].tolist() == [5, 1]
