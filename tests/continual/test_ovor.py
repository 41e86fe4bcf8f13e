"""VirtualOutliers and OnePrompt: the head knows what is outside the data; one prompt for all tasks."""

from collections import OrderedDict
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_reg import OnePrompt, VirtualOutliers
from lightning_reg.functional import (
    boundary_points,
    energy,
    energy_hinge_loss,
    neighbour_distances,
    outlier_candidates,
    synthesize_outliers,
)
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.conformance.problems import BATCHES, KINDS, Problem
from tests.toys import QUIET

pytestmark = QUIET


class OutliersByHand(Hand):
    """In the second of two epochs the head alone, on features of the first one's network."""

    def rests(self, name, moment):
        return moment.count > BATCHES and not name.startswith("net.head")

    def freezes_own(self, moment):
        return moment.count > BATCHES

    def term(self, loop, moment):
        batch = moment.count - BATCHES - 1
        if batch < 0:
            return None
        if batch == 0:
            weights = {name: weight.detach() for name, weight in moment.weights.items()}
            features = loop.run(weights, loop.x)[1]["net.act_body"]
            noise = torch.randn(4, 4, 16, generator=moment.draws(self.technique))
            self.outliers = kept(features, boundary_points(features, 4, 3), noise, 16, 0.5, 3).float()
        rows = self.outliers[2 * batch : 2 * batch + 2]
        logits = rows @ moment.weights["net.head.weight"].T + moment.weights["net.head.bias"]
        inside = -moment.features["net.head"].exp().sum(1).log() + 3.0
        outside = -0.5 + logits.exp().sum(1).log()
        return 0.7 * sum(F.huber_loss(side.relu(), torch.zeros_like(side)) for side in (inside, outside))


def labelled(size):
    x = torch.randn(size, 8)
    return x, (x[:, :4] + torch.randn(size, 4)).argmax(1)


SMALL = {"head": "net.head", "epochs": 1, "weight": 0.7, "threshold": -3.0, "outlier_threshold": -0.5, "sigma": 0.5}
SMALL |= {"k": 3, "select": 4, "sample_from": 4, "per_class": 4}
INVALID = [
    ({"head": "h", name: value}, name)
    for name, values in {
        **dict.fromkeys(("epochs", "k", "select", "sample_from", "per_class"), (0, 1.5)),
        "weight": (-0.1,),
        "sigma": (0.0,),
        "threshold": (float("nan"),),
        "outlier_threshold": (-15.0,),
        "candidates": ("ours",),
        "feature_noise": ("unit",),
    }.items()
    for value in values
]
OF_OUTLIERS = Case(
    make=partial(VirtualOutliers, **SMALL),
    neutral=partial(VirtualOutliers, "net.head", weight=0.0),
    by_hand=OutliersByHand,
    says=(
        "net.head alone in the last 1 epochs, weight=0.7, 4 outliers a class (paper, sigma=0.5); energies below -3, of"
        " outliers above -0.5; tasks before: 0",
        "weight=0: inactive",
        "net.head alone in the last 2 epochs, weight=0.1, 2 outliers a class (released, sigma=1 of the features');"
        " energies below the median, of outliers above that of the bias; your loss over the task's own classes;"
        " tasks before: 0",
    ),
    # A problem of its own: where there are several losses, the batch's entry is no class number.
    data=Problem(KINDS["classification"].net, labelled, F.cross_entropy, serves=["classification"]),
    variants=[
        partial(
            VirtualOutliers,
            "net.head",
            2,
            threshold=None,
            outlier_threshold=None,
            sigma=1.0,
            k=4,
            select=3,
            sample_from=4,
            per_class=2,
            candidates="released",
            feature_noise="relative",
            new_classes=[4, 4],
        )
    ],
    invalid=[*INVALID, ({"head": "h", "new_classes": [2, -1]}, "new_classes")],
)


class Attention(nn.Module):
    """Two heads, as timm has it."""

    def __init__(self, width=16):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, tokens):
        size, count, width = tokens.shape
        q, k, v = self.qkv(tokens).reshape(size, count, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(size, count, width))


def tokens_network():
    first = nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Linear(4, 16))
    head = nn.Sequential(nn.Flatten(), nn.Linear(32, 4))
    return nn.Sequential(OrderedDict(first=first, act=nn.Tanh(), body=Attention(), act_body=nn.Tanh(), head=head))


def attended(tokens, weights, key, value):
    """Attention of two heads with keys and values in front, head by head."""
    q, k, v = (tokens @ weights["qkv.weight"].T + weights["qkv.bias"]).chunk(3, dim=2)
    k, v = (torch.cat([p.expand(len(tokens), -1, -1), rows], 1) for p, rows in ((key, k), (value, v)))
    heads = []
    for part in (slice(0, 8), slice(8, 16)):
        scores = q[:, :, part] @ k[:, :, part].transpose(1, 2) / 8**0.5
        heads.append(scores.softmax(2) @ v[:, :, part])
    return torch.cat(heads, 2) @ weights["proj.weight"].T + weights["proj.bias"]


class PromptedByHand(Hand):
    def begin(self, loop):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.technique.derived_seed("own modules"))
            self.key, self.value = (torch.rand(3, 16).requires_grad_() for _ in range(2))

    def own(self):
        return [self.key, self.value]

    def rests(self, name, moment):
        return not name.startswith("net.head")

    def edit_input(self, name, rows, moment):
        if name == "net.body":
            self.tokens = rows
        return rows

    def edit(self, name, rows, moment, copy):
        return self.prompted(moment.weights) if name == "net.body" else rows

    def begin_evaluation(self, weights):
        prefix = self.technique.own["net.body"]
        self.key, self.value, self.weights = prefix.key.detach(), prefix.value.detach(), weights

    def edit_evaluation(self, name, rows):
        if name == "net.act":
            self.tokens = rows
        return self.prompted(self.weights) if name == "net.body" else rows

    def prompted(self, weights):
        own = {key[len("net.body.") :]: w for key, w in weights.items() if key.startswith("net.body.")}
        return attended(self.tokens, own, self.key, self.value)


OF_PROMPTS = Case(
    make=partial(OnePrompt, "net.head*", [6]),
    neutral=partial(OnePrompt, "net.head*", []),
    by_hand=PromptedByHand,
    says=(
        "3 keys and values before those of the first 1 attention layers; trained beside them: net.head*",
        "no prompts: inactive",
        "1 keys and values before those of the first 1 attention layers among *body; trained beside them: what you"
        " have left trainable",
    ),
    data=Problem(tokens_network, labelled, F.cross_entropy, serves=["classification"]),
    variants=[partial(OnePrompt, lengths=[2], layers="*body", lr_factor=2.0, weight_decay=0.1)],
    invalid=[
        ({"lengths": [3]}, "lengths"),
        ({"lengths": [-2]}, "lengths"),
        ({"lengths": [2.5]}, "lengths"),
        ({"lr_factor": -1.0}, "lr_factor"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"own_optimizer": -1}, "own_optimizer"),
    ],
)
CASE = (OF_OUTLIERS, OF_PROMPTS)


# -- the formulas -----------------------------------------------------------------------------------------------------


def test_distances_to_neighbours_by_hand():
    data, rows = torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]]), torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert neighbour_distances(rows, data, 1).tolist() == [0.0, 0.0]
    assert neighbour_distances(rows, data, 2).tolist() == [25.0, 25.0]
    assert neighbour_distances(rows, data, 3).tolist() == [100.0, 25.0]
    assert neighbour_distances(rows, data, 9).tolist() == [100.0, 25.0]  # there are three
    many = torch.arange(2500.0)[:, None]
    assert torch.equal(neighbour_distances(many, many, 2), torch.ones(2500))  # in parts


def test_the_border_of_a_cluster_and_a_far_point_is_the_far_point():
    draw = torch.Generator().manual_seed(0)
    cluster = torch.tensor([5.0, 0.0, 0.0]) + 0.1 * torch.randn(30, 3, generator=draw)
    points = torch.cat([cluster[:12], torch.tensor([[0.0, 7.0, 0.0]]), cluster[12:]])
    assert boundary_points(points, 1, 5).tolist() == [12]
    assert boundary_points(points * torch.rand(31, 1, generator=draw).add(0.5), 1, 5).tolist() == [12]  # directions
    assert sorted(boundary_points(points, 99, 5).tolist()) == list(range(31))


def kept(features, boundary, noise, count, sigma, k):
    """The paper's outliers, one by one in float64."""
    unit = [row / row.norm() for row in features.double()]
    found = []
    for position, draws in zip(boundary.tolist(), noise.double(), strict=True):
        for draw in draws:
            row = features[position].double() + sigma * draw
            distance = sorted(float((row / row.norm() - other).square().sum()) for other in unit)[k - 1]
            found.append((distance, row))
    return torch.stack([row for _, row in sorted(found, key=lambda pair: -pair[0])[:count]])


def test_outliers_are_the_candidates_farthest_from_the_data_and_all_distinct():
    draw = torch.Generator().manual_seed(1)
    features = torch.randn(20, 5, generator=draw) + 2.0
    boundary, noise = boundary_points(features, 4, 3), torch.randn(4, 6, 5, generator=draw)
    made = synthesize_outliers(features, boundary, noise, 10, sigma=0.7, k=3)
    torch.testing.assert_close(made.double(), kept(features, boundary, noise, 10, 0.7, 3), atol=1e-6, rtol=1e-6)
    assert len(made.unique(dim=0)) == 10
    still = synthesize_outliers(features, boundary, noise, 99, sigma=1e-12, k=3)
    assert still.shape == (24, 5)
    wanted = {tuple(row) for row in features[boundary].tolist()}
    assert {tuple(row) for row in still.tolist()} == wanted  # without noise: the points of the border
    scaled = synthesize_outliers(features, boundary, noise, 99, sigma=2.0, k=3, feature_noise="relative")
    by_hand = outlier_candidates(features[boundary], noise, 2.0 * features.std(0, correction=0))
    assert {tuple(row) for row in scaled.tolist()} == {tuple(row) for row in by_hand.tolist()}


def test_energies_by_hand():
    logits = torch.tensor([[1.0, 2.0, 700.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    assert energy(logits, slice(0, 2)).tolist() == pytest.approx([-2.3132616875182228, -0.6931471805599453])
    assert energy(logits).tolist() == pytest.approx([-700.0, -1.0986122886681098])
    mask, positions = torch.tensor([True, False, True]), torch.tensor([2, 0])
    assert torch.equal(energy(logits, mask), energy(logits, positions))
    assert energy(torch.full((1, 2), 6e4).half()).item() == pytest.approx(-60000.6931)  # float16 would overflow


def test_the_hinge_is_zero_with_zero_gradient_between_the_thresholds():
    inside, outside = torch.tensor([-16.0, -20.0]).requires_grad_(), torch.tensor([-2.0, 0.0]).requires_grad_()
    loss = energy_hinge_loss(inside, outside, -15.0, -3.0)
    loss.backward()
    assert loss.item() == 0.0
    assert inside.grad.tolist() == outside.grad.tolist() == [0.0, 0.0]
    inside, outside = torch.tensor([-14.5, -9.0]), torch.tensor([-3.2, -7.0, 1.0])
    by_hand = (0.125 + 5.5) / 2 + (0.02 + 3.5 + 0.0) / 3
    assert energy_hinge_loss(inside, outside, -15.0, -3.0).item() == pytest.approx(by_hand, rel=1e-6)
    assert energy_hinge_loss(inside, outside[:0], -15.0, -3.0).item() == pytest.approx(5.625 / 2)


# jpmorganchase/ovor @ 4f59b75, learners/ood.py, `NPOS` on these tensors in float32, with an exact index in place of
# faiss (its distances are squared L2) and these draws: `_boundary`, the distances behind it, `_generate`, `loss`.
FEATURES = torch.sin(torch.arange(48.0) ** 1.5).reshape(12, 4) + 1.5
NOISE = torch.cos(torch.arange(20.0) ** 1.3).reshape(5, 4)
OF_DATA, OUTSIDE = 6 * torch.sin(torch.arange(15.0)).reshape(5, 3), 4 * torch.cos(torch.arange(12.0)).reshape(4, 3)


def test_what_the_code_of_the_authors_gives():
    unit = FEATURES / FEATURES.norm(dim=1, keepdim=True)
    distances = [0.050398360937833786, 0.04016567021608353, 0.08422603458166122, 0.0892988070845604]
    assert neighbour_distances(unit, unit, 3)[:4].tolist() == pytest.approx(distances, abs=1e-6)
    boundary = boundary_points(FEATURES, 4, 3)
    assert boundary.tolist() in ([11, 8, 4, 7], [11, 8, 4, 3])  # the authors' is the former; 3 and 7 are equally far
    made = synthesize_outliers(FEATURES, boundary, NOISE, 6, sigma=0.5, k=3, candidates="released")
    first = [-0.3556552231311798, 0.05979562923312187, 0.22543013095855713, -0.4145353436470032]
    fifth = [0.5, 0.27015116810798645, -0.3890051543712616, -0.25759169459342957]
    wanted = torch.tensor([first] * 4 + [fifth] * 2)  # each of the draws once for each point of the border
    torch.testing.assert_close(made, wanted, atol=1e-6, rtol=0.0)


def test_what_the_loss_of_the_authors_gives():
    data, outliers = OF_DATA.clone().requires_grad_(), OUTSIDE.clone().requires_grad_()
    energies = energy(data), energy(outliers)
    loss = 0.1 * energy_hinge_loss(*energies, -4.0, -3.5)
    loss.backward()
    assert [e.mean().item() for e in energies] == pytest.approx([-4.267480373382568, -2.400681257247925], abs=1e-6)
    assert loss.item() == pytest.approx(0.08505839854478836, abs=1e-6)
    second = [-0.01988203637301922, -9.092516847886145e-05, -2.7039695851271972e-05]
    assert data.grad[1].tolist() == pytest.approx(second, abs=1e-6)
    first = [0.013990660198032856, 0.002224649302661419, 4.849970355280675e-05]
    assert outliers.grad[0].tolist() == pytest.approx(first, abs=1e-6)
