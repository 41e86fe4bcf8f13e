"""Loki: predictions by expected squared distance, the metric that counts by distance, trees of labels."""

import copy
import math
import pickle
from dataclasses import replace
from functools import partial

import networkx as nx
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from scipy.optimize import linprog
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import EWC, Loki, MeanSquaredDistance, Mixup
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import (
    embedding_distances,
    expected_distances,
    frechet_predict,
    frechet_scores,
    is_complete,
    next_class,
    pairwise_locus,
    tree_cover,
    tree_distances,
    tree_locus,
)
from lightning_reg.metric_learning.loki import core
from lightning_reg.metric_learning.loki._rule import own_distances
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.conformance.harness import difference
from tests.conformance.kinds import MetricCase
from tests.conformance.laws import LAWS
from tests.conformance.problems import KINDS, Problem
from tests.toys import CLASSES, QUIET, Classifier, fit, make_loader, make_tensors, make_trainer, weights_of

pytestmark = QUIET

LINE = [[abs(i - j) for j in range(4)] for i in range(4)]
COMPLETE = [[float(i != j) for j in range(4)] for i in range(4)]
WIDE = [[abs(i - j) for j in range(6)] for i in range(6)]
ALL = ("train", "validate", "test", "predict")
TREE = [("all", "pet"), ("all", "car"), ("pet", "cat"), ("pet", "dog"), ("car", "bus"), ("bus", "red")]
LABELS = ["cat", "dog", "red", "pet", "all", "car", "bus"]


def net():
    return KINDS["classification"].net()


def data(size):
    return KINDS["classification"].data(size)


# All losses of the network's output alone: in the problem with two losses the layer has columns that are no classes.
PROBLEM = Problem(net, data, F.cross_entropy, serves=["classification"])


class ScoredByHand(Hand):
    def edit(self, name, rows, moment, copy):
        return self.edit_evaluation(name, rows) if "train" in self.technique.modes else rows

    def edit_evaluation(self, name, rows):
        if name != "net.head":
            return rows
        costs = rows.softmax(1) @ torch.tensor(LINE, dtype=rows.dtype).square()
        return costs.detach().amin(1, keepdim=True) - costs


def distances_by_loops(batches):
    matrix = tree_by_networkx(TREE, LABELS)
    found = [matrix[p][t] ** 2 for b in batches for p, t in zip(b["preds"].tolist(), b["target"].tolist(), strict=True)]
    return sum(found) / len(found)


def tree_by_networkx(edges, labels):
    graph = nx.Graph()
    graph.add_weighted_edges_from([(*edge, 1.0)[:3] for edge in edges])
    lengths = dict(nx.all_pairs_dijkstra_path_length(graph))
    return [[lengths[one][two] for two in labels] for one in labels]


def labels(seed, size):
    generator = torch.Generator().manual_seed(seed)
    return dict(zip(("preds", "target"), torch.randint(7, (2, size), generator=generator), strict=True))


CASE = (
    Case(
        make=partial(Loki, "net.head", LINE, modes=ALL),
        neutral=partial(Loki, "net.head", COMPLETE, modes=ALL),
        by_hand=ScoredByHand,
        says=(
            "net.head, 4 of 4 labels, power=2, temperature=1; in train, validate, test, predict",
            "net.head, all labels equally far apart: inactive",
            "net.head, 4 of 4 labels, power=2, temperature=1; in validate, test, predict",
            "net.head, distances between rows of its weight, power=2; in validate, test, predict",
            "net.head, 4 of 6 labels, power=1, temperature=2; in validate, test, predict",
            "net.head, 4 of 6 labels, power=2, temperature=1; in train, validate, test, predict",
        ),
        data=PROBLEM,
        also=["images"],
        variants=[
            partial(Loki, "net.head", LINE),
            partial(Loki, "net.head"),
            partial(Loki, "net.head", torch.tensor(WIDE), observed=[0, 2, 3, 5], power=1.0, temperature=2.0, chunk=4),
            partial(Loki, "net.head", WIDE, observed=[5, 0, 3, 2], outputs="observed", modes=ALL),
        ],
        invalid=[
            ({"distances": [[0, 1], [1]]}, "distances"),
            ({"distances": [0.0, 1.0]}, "distances"),
            ({"distances": [[0, 1], [1, 0], [1, 1]]}, "distances"),
            ({"distances": [[0, -1], [-1, 0]]}, "distances"),
            ({"distances": [[0, math.nan], [1, 0]]}, "distances"),
            ({"distances": [[0, math.inf], [1, 0]]}, "distances"),
            ({"distances": [[1, 1], [1, 0]]}, "distances"),
            ({"distances": [[0, 1, 2], [2, 1, 1]]}, "distances"),
            ({"distances": None, "modes": ALL}, "distances"),
            ({"distances": LINE, "observed": [0, 4]}, "observed"),
            ({"distances": LINE, "observed": [-1, 0]}, "observed"),
            ({"distances": LINE, "observed": [1, 1]}, "observed"),
            ({"distances": LINE, "observed": [0.5, 1]}, "observed"),
            ({"distances": LINE, "observed": []}, "observed"),
            ({"distances": LINE[:2], "observed": [0]}, "observed"),
            ({"distances": LINE, "power": 0.0}, "power"),
            ({"distances": LINE, "temperature": 0.0}, "temperature"),
            ({"distances": LINE, "chunk": 0}, "chunk"),
            ({"distances": LINE, "modes": ["fit"]}, "modes"),
        ],
    ),
    MetricCase(
        make=partial(MeanSquaredDistance, distances=tree_distances(TREE, LABELS)),
        batches=[labels(seed, size) for seed, size in enumerate((5, 1, 8, 3))],
        expected=distances_by_loops,
        invalid=[
            ({"distances": [[1, 1], [1, 0]]}, "distances"),
            ({"distances": LINE, "observed": [0, 0]}, "observed"),
            ({"distances": LINE, "power": 0.0}, "power"),
        ],
    ),
)


@pytest.mark.parametrize("law", ["neutral_is_nothing", "as_by_hand", "order"])
def test_laws_of_the_form_that_leaves_training_alone(law):
    LAWS[law](replace(CASE[0], make=partial(Loki, "net.head", LINE)))


# -- the rule ---------------------------------------------------------------------------------------------------------


def random_metric(size, generator):
    points = torch.rand(size, 3, generator=generator, dtype=torch.float64)
    return (points[:, None] - points).square().sum(-1).sqrt()


def random_rows(rows, size, generator):
    return torch.rand(rows, size, generator=generator, dtype=torch.float64).pow(3)


@pytest.mark.parametrize("power", [2.0, 1.0, 3.5])
@pytest.mark.parametrize("chunk", [None, 1, 3, 100])
def test_prediction_and_scores_by_loops(power, chunk):
    generator = torch.Generator().manual_seed(0)
    distances, p = random_metric(9, generator)[:5], random_rows(20, 5, generator)
    scores = frechet_scores(p, distances, power, chunk)
    for b in range(20):
        sums = [sum(float(p[b, i]) * float(distances[i, y]) ** power for i in range(5)) for y in range(9)]
        assert frechet_predict(p, distances, power, chunk)[b] == min(range(9), key=lambda y: sums[y])
        for y in range(9):
            assert scores[b, y].item() == pytest.approx(min(sums) - sums[y], abs=1e-13)
        assert scores[b].max() == 0
    assert frechet_scores(p.float(), distances, power, chunk).dtype is torch.float32


def test_a_complete_graph_gives_argmax_and_one_probability_its_own_class():
    generator = torch.Generator().manual_seed(1)
    p = torch.rand(1000, 50, generator=generator).softmax(1)  # nearly even: the scores differ in the last digits
    assert torch.equal(frechet_predict(p, 1 - torch.eye(50)), p.argmax(1))
    assert torch.equal(frechet_predict(torch.eye(9), random_metric(9, generator)), torch.arange(9))


def test_a_path_known_at_its_ends_gives_the_rounded_point():
    n = 7
    line = (torch.arange(n + 1.0)[:, None] - torch.arange(n + 1.0)).abs()
    for step in range(101):
        p = step / 100
        if abs(n * (1 - p) % 1 - 0.5) > 1e-9:
            assert frechet_predict(torch.tensor([p, 1 - p]), line[[0, n]]).item() == round(n * (1 - p))


def test_scale_and_names_do_not_matter_and_ties_go_to_the_first():
    generator = torch.Generator().manual_seed(2)
    distances, p = random_metric(8, generator), random_rows(50, 8, generator)
    expected = frechet_predict(p, distances)
    assert torch.equal(frechet_predict(17.0 * p, 0.01 * distances), expected)
    order = torch.randperm(8, generator=generator)  # label k is called order.argsort()[k]
    renamed = frechet_predict(p[:, order], distances[order][:, order])
    assert torch.equal(order[renamed], expected)
    star = tree_distances([(0, 1), (0, 2), (0, 3)])  # a third on each leaf; of two leaves all three are as near
    thirds = torch.tensor([[0.0, 1 / 3, 1 / 3, 1 / 3], [0.5, 0.0, 0.1, 0.4]])
    assert frechet_predict(thirds, star).tolist() == [0, 0]
    line = torch.tensor([[0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, 0.0]])  # between the middle two
    halves = torch.tensor([[0.5, 0.5], [0.3, 0.1 + 0.2]], dtype=torch.float64)  # the last is 0.30000000000000004
    assert frechet_predict(halves, line).tolist() == [1, 1]
    assert frechet_scores(halves[1], line).tolist()[1:3] == [0.0, 0.0]


def test_close_labels_of_a_large_tree_are_told_apart_in_any_precision():
    deep = [(k, k + 1) for k in range(600)]  # squares up to 360,000: beyond float16
    distances = tree_distances(deep)
    p = torch.zeros(601)
    p[[0, 599, 600]] = torch.tensor([0.001, 0.4985, 0.5005])  # mean 598.9015
    expected = expected_distances(p, distances)
    assert frechet_predict(p, distances).item() == 599
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(expected_distances(p, distances), expected)
    for dtype in (torch.bfloat16, torch.float16):
        assert frechet_scores(p, distances).to(dtype).argmax().item() == 599
    bytes_each = distances.to(torch.int16)
    assert torch.equal(expected_distances(p, bytes_each, chunk=7), expected)


def test_on_a_device_without_float64_autocast_is_kept_out(monkeypatch):
    monkeypatch.setattr(core, "_working_dtype", lambda tensor: torch.float32)
    distances, p = tree_distances([(k, k + 1) for k in range(300)]), torch.full((301,), 1 / 301)
    expected = expected_distances(p, distances)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(expected_distances(p, distances), expected)
    assert expected.dtype is torch.float32


def test_scores_are_logits_with_the_gradient_of_the_expected_distance():
    generator = torch.Generator().manual_seed(3)
    distances = random_metric(7, generator)[:4]
    logits = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(7, (6,), generator=generator)
    gradients = []
    for score in (lambda p: frechet_scores(p, distances), lambda p: -(p @ distances.square())):
        leaf = logits.clone().requires_grad_()
        loss = F.cross_entropy(score(leaf.softmax(1)), y)
        gradients.append((loss.item(), torch.autograd.grad(loss, leaf)[0]))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-12)
    torch.testing.assert_close(gradients[0][1], gradients[1][1], rtol=1e-10, atol=1e-14)  # another order of sums
    leaf = torch.full((1, 2), 0.5, dtype=torch.float64, requires_grad=True)
    tied = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(frechet_scores(leaf, tied)[0, 2], leaf)
    assert gradient.tolist() == [[-1.0, 0.0]]  # a tie has its value set, not its gradient


def test_distances_of_embeddings():
    points = torch.tensor([[1e3, 0.0], [1e3, 1e-2], [1e3, 3.0]])
    distances = embedding_distances(points)
    torch.testing.assert_close(distances, torch.tensor([[0.0, 0.01, 3.0], [0.01, 0.0, 2.99], [3.0, 2.99, 0.0]]))
    mean = frechet_predict(torch.tensor([[0.6, 0.4, 0.0]]), distances)
    assert mean.item() == 0


# -- what can be predicted --------------------------------------------------------------------------------------------


def random_tree(size, seed):
    generator = torch.Generator().manual_seed(seed)
    parents = [int(torch.randint(k, (), generator=generator)) for k in range(1, size)]
    return [(parent, k) for k, parent in enumerate(parents, 1)]


def reachable(distances, observed):
    """By linear programming: is there a mass on the classes for which no label is nearer?"""
    squares = torch.as_tensor(distances, dtype=torch.float64)[list(observed)].square().numpy()
    found = []
    for label in range(squares.shape[1]):
        rows = (squares[:, [label]] - squares).T
        mass = linprog([0.0] * len(observed), rows, [1e-9] * len(rows), [[1.0] * len(observed)], [1.0])
        found.append(mass.status == 0)
    return found


@pytest.mark.parametrize("seed", range(6))
def test_in_a_tree_the_paths_between_classes_can_be_predicted_and_nothing_else(seed):
    edges = random_tree(11, seed)
    observed = torch.randperm(11, generator=torch.Generator().manual_seed(seed))[:3].tolist()
    expected = reachable(tree_distances(edges), observed)
    assert sorted(tree_locus(edges, observed)) == [label for label, found in enumerate(expected) if found]
    assert pairwise_locus(tree_distances(edges), observed).tolist() == expected
    generator = torch.Generator().manual_seed(seed)
    seen = frechet_predict(random_rows(500, 3, generator), tree_distances(edges)[observed])
    assert set(seen.tolist()) <= set(tree_locus(edges, observed))


@pytest.mark.parametrize("seed", range(3))
def test_the_leaves_are_the_smallest_cover_of_a_tree(seed):
    edges = random_tree(9, seed)
    leaves = tree_cover(edges)
    assert sorted(leaves) == sorted(node for node, degree in nx.Graph(edges).degree if degree == 1)
    assert all(reachable(tree_distances(edges), leaves))
    for leaf in leaves:
        assert not all(reachable(tree_distances(edges), [k for k in range(9) if k != leaf]))


def test_in_a_complete_graph_only_the_classes_themselves_can_be_predicted():
    complete = 1 - torch.eye(5)
    assert is_complete(complete)
    assert is_complete(3 * complete)
    assert pairwise_locus(complete, [1, 3]).tolist() == reachable(complete, [1, 3]) == [False, True, False, True, False]
    assert not is_complete(torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 2.0], [1.0, 2.0, 0.0]]))
    assert not is_complete(torch.ones(2, 2))
    assert not is_complete(complete[:3])
    assert is_complete(torch.zeros(1, 1))
    assert pairwise_locus(complete, [3]).tolist() == [False, False, False, True, False]


def test_two_classes_reach_a_part_of_what_three_reach_in_other_spaces():
    distances = 1 - torch.eye(4)
    distances[0, 1:] = distances[1:, 0] = 0.6**0.5  # against 1/2 of two classes, and 2/3 of three
    assert reachable(distances, [1, 2, 3]) == [True] * 4
    assert pairwise_locus(distances, [1, 2, 3]).tolist() == [False, True, True, True]
    generator = torch.Generator().manual_seed(4)
    for size in (2, 3):
        distances = random_metric(9, generator)
        exact = reachable(distances, range(size))
        found = pairwise_locus(distances, list(range(size))).tolist()
        assert found == exact if size == 2 else all(e for f, e in zip(found, exact, strict=True) if f)


# Printed by `ActiveSelection.select` and `TreeWithLocus` of SprocketLab/loki, 7b010d8, active_learning/libs, with the
# tree, the first classes, their locus; then the classes that it chose until the tree was covered.
CHOSEN = [
    (
        [(0, 1), (1, 2), (0, 3), (2, 4), (4, 5), (3, 6), (3, 7), (4, 8), (7, 9), (5, 10), (9, 11), (3, 12), (8, 13)],
        [2, 4, 13], [2, 4, 8, 13], [11, 10, 6, 12],
    ),
    (
        [(0, 1), (0, 2), (1, 3), (0, 4), (3, 5), (3, 6), (3, 7), (6, 8), (3, 9), (1, 10), (7, 11), (0, 12), (6, 13)],
        [0, 6, 9], [0, 1, 3, 6, 9], [11, 2, 4, 5, 8, 10, 12, 13],
    ),
    (
        [(0, 1), (0, 2), (0, 3), (2, 4), (1, 5), (5, 6), (6, 7), (4, 8), (4, 9), (9, 10), (3, 11), (9, 12), (0, 13)],
        [2, 9, 10], [2, 4, 9, 10], [7, 11, 8, 12, 13],
    ),
    (
        [(0, 1), (0, 2), (1, 3), (3, 4), (4, 5), (0, 6), (4, 7), (0, 8), (7, 9), (4, 10), (8, 11), (3, 12), (3, 13)],
        [7, 8, 11], [0, 1, 3, 4, 7, 8, 11], [2, 5, 6, 9, 10, 12, 13],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("edges", "observed", "locus", "chosen"), CHOSEN)
def test_the_next_class_is_the_one_that_the_authors_code_chooses(edges, observed, locus, chosen):
    assert sorted(tree_locus(edges, observed)) == locus
    known = list(observed)
    for wanted in chosen:
        assert next_class(edges, known) == wanted
        known.append(wanted)
    assert next_class(edges, known) is None
    assert set(tree_cover(edges)) <= set(known)


def test_the_next_class_counts_lengths_and_keeps_to_candidates():
    edges = [("root", "near", 1.0), ("root", "far", 5.0), ("near", "leaf", 1.0)]
    assert next_class(edges, ["root"]) == "far"
    assert next_class(edges, ["root"], candidates=["near", "leaf"]) == "leaf"
    assert next_class(edges, ["far", "leaf"], candidates=["near"]) is None


# -- trees ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_tree_distances_are_those_of_networkx(seed):
    lengths = torch.rand(12, generator=torch.Generator().manual_seed(seed)).tolist()
    edges = [(f"n{one}", f"n{two}", length) for (one, two), length in zip(random_tree(13, seed), lengths, strict=True)]
    edges = [(two, one, length) if k % 2 else (one, two, length) for k, (one, two, length) in enumerate(edges)][::-1]
    chosen = ["n7", "n0", "n12", "n3"]
    expected = torch.tensor(tree_by_networkx(edges, chosen))
    torch.testing.assert_close(tree_distances(edges, chosen), expected)
    assert tree_distances(random_tree(13, seed)).tolist() == tree_by_networkx(random_tree(13, seed), range(13))


@pytest.mark.parametrize(
    ("edges", "words"),
    [
        ([], "there are none"),
        ([(0, 1), (2, 3)], "2 is not connected with 0"),
        ([(0, 1), (1, 2), (2, 0)], "several ways"),
        ([(0, 1), (1, 0)], "several ways"),
        ([(0, 1), (1, 1)], "several ways"),
        ([(0, 1, 0.0)], "lengths above 0, got"),
        ([(0, 1, math.inf)], "lengths above 0, got"),
    ],
)
@pytest.mark.parametrize("function", [tree_distances, tree_cover, partial(tree_locus, observed=[0])])
def test_what_is_no_tree_is_refused(edges, words, function):
    with pytest.raises(ValueError, match=f"^A tree's `edges` must .*{words}"):
        function(edges)


def test_nodes_that_are_not_there_are_refused():
    edges = [("a", "b"), ("b", "c")]
    with pytest.raises(ValueError, match=r"^tree_distances: `labels` must be given unless the nodes are the numbers"):
        tree_distances(edges)
    with pytest.raises(ValueError, match=r"^tree_distances: `labels` must be nodes of the tree, got 'd'"):
        tree_distances(edges, ["a", "d"])
    with pytest.raises(ValueError, match=r"^tree_locus: `observed` must be nodes of the tree, got 0"):
        tree_locus(edges, [0])
    with pytest.raises(ValueError, match=r"^tree_locus: `observed` must have a node at least"):
        tree_locus(edges, [])
    with pytest.raises(ValueError, match=r"^next_class: `candidates` must be nodes of the tree, got 'd'"):
        next_class(edges, ["a"], ["d"])


# -- the metric -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_metric_takes_scores_columns_and_maps():
    target = torch.tensor([5, 0, 3])
    scores = torch.tensor([[0.1, 0.9], [0.1, 0.9], [2.0, 0.0]])
    columns = MeanSquaredDistance(WIDE, observed=[1, 4])  # predicts 4, 4, 1
    columns.update(scores, target)
    assert columns.compute().item() == pytest.approx((1 + 16 + 4) / 3)
    rows = MeanSquaredDistance([WIDE[1], WIDE[4]], power=1.0)
    rows.update(scores.argmax(1), target)
    assert rows.compute().item() == pytest.approx((1 + 4 + 2) / 3)
    maps = MeanSquaredDistance(WIDE)
    maps.update(F.one_hot(torch.tensor([[4, 0], [5, 5]]), 6).movedim(-1, 1).float(), torch.tensor([[4, 2], [0, 5]]))
    assert maps.compute().item() == pytest.approx((4 + 25) / 4)
    assert not maps.state_dict()
    accuracy = MeanSquaredDistance(COMPLETE)
    accuracy.update(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 3, 2]))
    assert accuracy.compute().item() == 0.5
    assert math.isnan(copy.deepcopy(MeanSquaredDistance(LINE)).compute().item())


@pytest.mark.parametrize(
    "preds", [torch.zeros(3), torch.zeros(2, dtype=torch.int64), torch.zeros(3, 5), torch.zeros(3, 4, 4)]
)
def test_metric_refuses_shapes_that_do_not_fit(preds):
    with pytest.raises(ValueError, match="MeanSquaredDistance: `preds` must be labels of the target's shape"):
        MeanSquaredDistance(LINE).update(preds, torch.zeros(3, dtype=torch.int64))


# -- in a Trainer -----------------------------------------------------------------------------------------------------


class Seen(Classifier):
    """Notes what its network returns, in each kind of step, and the metrics that a user would compute."""

    def __init__(self, width=CLASSES, **options):
        super().__init__(**options)
        self.outputs = {stage: [] for stage in ALL}
        torch.manual_seed(3)
        if width != CLASSES:
            self.net[3] = nn.Linear(self.net[3].in_features, width)

    def note(self, stage, batch):
        output = self(batch[0])
        self.outputs[stage].append(output.detach().clone())
        return output

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.note("train", batch), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.note("validate", batch), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("accuracy", (self.note("test", batch).argmax(1) == batch[1]).float().mean())

    def predict_step(self, batch, batch_idx):
        return self.note("predict", batch)


LAST = "net.3"
SMALL = (torch.arange(3.0)[:, None] - torch.arange(3.0)).abs()


def logits_of(model):
    with torch.no_grad():
        return model.net(make_tensors()[0]).double()


def scores_by_hand(logits, distances, power=2.0, temperature=1.0):
    costs = (logits / temperature).softmax(1) @ torch.as_tensor(distances, dtype=torch.float64).pow(power)
    return costs.amin(1, keepdim=True) - costs


def run(entry, loki, model=None, **options):
    model, trainer = model or Seen(), make_trainer(callbacks=[loki], max_epochs=2, **options)
    if entry == "fit":
        trainer.fit(model, make_loader(), make_loader())
    else:
        getattr(trainer, entry)(model, make_loader(), **({} if entry == "predict" else {"verbose": False}))
    return model, trainer


@pytest.mark.parametrize("entry", ["validate", "test", "predict"])
def test_without_a_fit_the_users_steps_see_scores_whose_argmax_is_the_prediction(entry):
    model, trainer = run(entry, Loki(LAST, 10 * SMALL, temperature=0.3))
    got, expected = torch.cat(model.outputs[entry]), scores_by_hand(logits_of(model), 10 * SMALL, temperature=0.3)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)  # a float32 of it
    assert torch.equal(got.argmax(1), expected.argmax(1))
    moved = (got.argmax(1) != logits_of(model).argmax(1)).double().mean().item()
    assert 0 < moved < 1
    if entry != "predict":
        assert trainer.callback_metrics[f"reg/loki/{entry}_moved"].item() == pytest.approx(moved)
    if entry == "test":
        right = (expected.argmax(1) == make_tensors()[1]).double().mean().item()
        assert trainer.callback_metrics["accuracy"].item() == pytest.approx(right)


def test_a_fit_is_the_plain_one_and_its_validation_sees_the_scores():
    plain, loki = Seen(), Seen()
    make_trainer().fit(plain, make_loader(), make_loader())
    trainer = make_trainer(callbacks=[Loki(LAST, SMALL)])
    trainer.fit(loki, make_loader(), make_loader())
    assert not difference(weights_of(plain), weights_of(loki))
    torch.testing.assert_close(torch.cat(loki.outputs["train"]), torch.cat(plain.outputs["train"]), rtol=0, atol=0)
    scores = scores_by_hand(logits_of(loki), SMALL)
    torch.testing.assert_close(torch.cat(loki.outputs["validate"])[-32:].double(), scores, rtol=1e-5, atol=1e-6)
    loss = F.cross_entropy(scores, make_tensors()[1]).item()
    assert trainer.callback_metrics["val_loss"].item() == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("modes", [("test",), ("validate", "predict")])
def test_it_keeps_to_its_modes(modes):
    for entry in ("validate", "test", "predict"):
        model, _ = run(entry, Loki(LAST, SMALL, modes=modes))
        wanted = scores_by_hand(logits_of(model), SMALL) if entry in modes else logits_of(model)
        torch.testing.assert_close(torch.cat(model.outputs[entry]).double(), wanted, rtol=1e-5, atol=1e-6)


def test_labels_that_the_network_never_saw_are_predicted():
    distances, observed = torch.tensor(WIDE, dtype=torch.float64), [5, 0, 3]
    expected = scores_by_hand(logits_of(Seen()), distances[observed])
    for given in (Loki(LAST, WIDE, observed), Loki(LAST, distances[observed]), Loki(LAST, WIDE, observed, chunk=2)):
        model, _ = run("predict", given)
        got = torch.cat(model.outputs["predict"])
        assert got.shape == (32, 6)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    assert set(got.argmax(1).tolist()) - set(observed)
    model, _ = run("predict", Loki(LAST, WIDE, observed, outputs="observed"))
    alone = scores_by_hand(logits_of(model), distances[observed][:, observed])
    torch.testing.assert_close(torch.cat(model.outputs["predict"]).double(), alone, rtol=1e-5, atol=1e-5)


def test_columns_of_labels_without_training_samples_do_not_count():
    observed, distances = [4, 1, 2], torch.tensor(WIDE, dtype=torch.float64)
    model, trainer = run("test", Loki(LAST, WIDE, observed), Seen(width=6))
    known = logits_of(model)[:, observed]
    expected = scores_by_hand(known, distances[observed])
    torch.testing.assert_close(torch.cat(model.outputs["test"]).double(), expected, rtol=1e-5, atol=1e-5)
    moved = (expected.argmax(1) != torch.tensor(observed)[known.argmax(1)]).double().mean().item()
    assert trainer.callback_metrics["reg/loki/test_moved"].item() == pytest.approx(moved)
    model, _ = run("test", Loki(LAST, WIDE, observed, outputs="observed"), Seen(width=6))
    got = torch.cat(model.outputs["test"])
    assert (got[:, [0, 3, 5]] == -torch.inf).all()
    alone = scores_by_hand(known, distances[observed][:, observed])
    torch.testing.assert_close(got[:, observed].double(), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["sigmoid", "given"])
def test_other_probabilities(kind):
    model = Seen()
    if kind == "given":
        model.net.append(nn.Softplus())
    layer = "net.4" if kind == "given" else LAST
    run("predict", Loki(layer, SMALL, probabilities=kind, temperature=0.5), model)
    values = logits_of(model)
    shares = (values / 0.5).sigmoid() if kind == "sigmoid" else values
    costs = shares / shares.sum(1, keepdim=True) @ SMALL.double().square()
    got = torch.cat(model.outputs["predict"]).double()
    torch.testing.assert_close(got, costs.amin(1, keepdim=True) - costs, rtol=1e-5, atol=1e-6)


def test_without_distances_those_of_the_weights_present_when_an_evaluation_starts():
    model, trainer = Seen(), make_trainer(callbacks=[Loki(LAST)], max_epochs=2)
    trainer.fit(model, make_loader(), make_loader())
    for entry in ("validate", "test", "predict"):
        if entry != "validate":
            model.net[3].weight.data.mul_(2.0)
            getattr(trainer, entry)(model, make_loader())
        got = model.outputs[entry][-4:]
        weight = model.net[3].weight.detach().double()
        distances = torch.tensor([[(a - b).norm().item() for b in weight] for a in weight])
        expected = scores_by_hand(logits_of(model), distances)
        torch.testing.assert_close(torch.cat(got).double(), expected, rtol=1e-4, atol=1e-5)


def weight_of_ranks():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.manual_seed(0)
    layer = nn.Linear(4, 6)
    whole = own_distances(layer, "head")
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), init_device_mesh("cpu", (2,)), [Shard(0)]))
    return own_distances(layer, "head"), whole


def test_a_weight_that_is_split_over_processes_is_gathered_for_its_distances(two_processes):
    for split, whole in two_processes.run(weight_of_ranks):
        torch.testing.assert_close(split, whole, rtol=0, atol=0)


class Maps(Seen):
    """A class for each pixel, and for each word."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim
        self.net = nn.Sequential(nn.Conv1d(1, 3, 3, padding=1)) if dim == 1 else nn.Sequential(nn.Linear(1, 3))

    def forward(self, x):
        return self.net(x[:, None] if self.dim == 1 else x[:, :, None])


@pytest.mark.parametrize("dim", [1, -1])
def test_maps_and_words(dim):
    model, _ = run("predict", Loki("net.0", SMALL, dim=dim), Maps(dim))
    with torch.no_grad():
        logits = model(make_tensors()[0]).movedim(dim, -1).double()
    expected = scores_by_hand(logits.reshape(-1, 3), SMALL).reshape(logits.shape).movedim(-1, dim)
    torch.testing.assert_close(torch.cat(model.outputs["predict"]).double(), expected, rtol=1e-5, atol=1e-6)


def test_the_fine_tuning_form_trains_the_cross_entropy_of_the_scores():
    distances = torch.tensor(WIDE, dtype=torch.float32)[[0, 2, 5]]
    x, y = make_tensors()
    loader = DataLoader(TensorDataset(x, 2 * y), 8)  # labels 0, 2, 4: the last is none of the classes
    model, by_hand = Seen(), Seen()
    trainer = make_trainer(callbacks=[Loki(LAST, WIDE, [0, 2, 5], modes=["train"])], max_epochs=3, log_every_n_steps=1)
    trainer.fit(model, loader, make_loader())
    assert "reg/loki/moved" in trainer.callback_metrics
    optimizer = by_hand.configure_optimizers()
    for _ in range(3):
        for inputs, targets in loader:
            optimizer.zero_grad()
            F.cross_entropy(-(by_hand.net(inputs).softmax(1) @ distances.square()), targets).backward()
            optimizer.step()
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_half_precision_keeps_the_prediction():
    deep = 40 * SMALL
    model, _ = run("predict", Loki(LAST, deep), precision="bf16-mixed")
    got = torch.cat(model.outputs["predict"])
    assert got.dtype is torch.float32
    true = Seen().to(torch.bfloat16)
    run("predict", Loki(LAST, deep), true, precision="bf16-true")
    assert torch.cat(true.outputs["predict"]).dtype is torch.float32
    for one in (got, torch.cat(true.outputs["predict"])):
        assert (one.argmax(1) == scores_by_hand(logits_of(Seen()), deep).argmax(1)).double().mean() > 0.9


# -- beside others ----------------------------------------------------------------------------------------------------


def test_beside_mixup_the_training_is_mixups_and_metrics_see_the_scores():
    weights, outputs = [], []
    for callbacks in ([Mixup(alpha=1.0)], [Mixup(alpha=1.0), Loki(LAST, SMALL)], [Loki(LAST, SMALL), Mixup(alpha=1.0)]):
        model = Seen()
        make_trainer(callbacks=callbacks, max_epochs=3).fit(model, make_loader(), make_loader())
        weights.append(weights_of(model))
        outputs.append(torch.cat(model.outputs["validate"])[-32:])
    for other in (1, 2):
        assert not difference(weights[0], weights[other])
        expected = scores_by_hand(logits_of(model), SMALL)
        torch.testing.assert_close(outputs[other].double(), expected, rtol=1e-5, atol=1e-6)


def test_beside_ewc_nothing_changes_over_two_tasks():
    found = []
    for others in ([], [Loki(LAST, SMALL)]):
        model, ewc = Seen(), EWC(weight=3.0)
        for seed in (0, 1):
            loader = DataLoader(TensorDataset(*make_tensors(seed=seed)), 8)
            make_trainer(callbacks=[ewc, *others], max_epochs=2).fit(model, loader, make_loader())
        found.append((weights_of(model), ewc.state_dict()))
    assert not difference(*found)


def test_two_on_one_layer_are_refused_in_a_test_too_unless_their_modes_differ():
    one, two = Loki(LAST, SMALL, name="one"), Loki(LAST, 2 * SMALL, name="two")
    for entry in ("fit", "test"):
        model, trainer = (Seen if entry == "test" else Classifier)(), make_trainer(callbacks=[one, two])
        with pytest.raises(MisconfigurationException, match=r"^Loki and Loki cannot stand together: both replace what"):
            getattr(trainer, entry)(model, make_loader())
    apart = [Loki(LAST, SMALL, modes=["validate"], name="one"), Loki(LAST, SMALL, modes=["test"], name="two")]
    make_trainer(callbacks=apart).test(Seen(), make_loader(), verbose=False)


# -- what is refused --------------------------------------------------------------------------------------------------


class Probabilities(Seen):
    def __init__(self):
        super().__init__()
        self.net.append(nn.Softmax(1))


@pytest.mark.parametrize(
    ("loki", "model", "words"),
    [
        (
            Loki(LAST, LINE),
            Seen,
            r"'net\.3' returned 3 columns in dimension -1, and the distances are of 4 classes",
        ),
        (Loki(LAST, LINE, [0, 1]), Seen, "are of 2 classes among 4 labels"),
        (Loki("net.4", SMALL), Probabilities, r"'net\.4' returned probabilities .* Write probabilities=\"given\""),
        (Loki(LAST, SMALL, probabilities="given"), Seen, r"'net\.3' returned numbers below 0"),
        (Loki("net.4"), Probabilities, r"'net\.4' \(Softmax\) has no weight with a row for each class"),
        (Loki(LAST, SMALL, dim=2), Seen, r"with classes in dimension 2, returned of shape \(8, 3\)"),
        (Loki("net.33", SMALL), Seen, r"net\.33"),
    ],
)
def test_setups_that_cannot_work_are_refused_in_the_first_step(loki, model, words):
    with pytest.raises(MisconfigurationException, match=words):
        run("test", loki, model())


def test_another_network_is_looked_at_anew():
    loki = Loki(LAST, SMALL, modes=["train"])
    fit(Classifier(), loki)
    with pytest.raises(MisconfigurationException, match=r"'net\.3' returned 4 columns"):
        make_trainer(callbacks=[loki], num_sanity_val_steps=0, max_epochs=1).fit(
            Seen(width=4), make_loader(), make_loader()
        )


def test_a_layer_that_returns_no_tensor_is_refused():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    class Pairs(Seen):
        def __init__(self):
            super().__init__()
            self.net.append(Pair())

    with pytest.raises(MisconfigurationException, match=r"'net\.4' must return a tensor of logits .* returned tuple"):
        run("test", Loki("net.4", SMALL), Pairs())


def test_distances_that_differ_by_direction_are_told():
    with pytest.warns(UserWarning, match="Loki: `distances` are not the same in both directions"):
        Loki(LAST, [[0, 1], [2, 0]])


def test_the_line_says_what_it_knows():
    assert Loki("head", WIDE, [0, 5]).describe() == (
        "head, 2 of 6 labels, power=2, temperature=1; in validate, test, predict"
    )
    assert Loki("head").describe() == "head, distances between rows of its weight, power=2; in validate, test, predict"
    assert Loki("head", COMPLETE).describe() == "head, all labels equally far apart: inactive"
    moved = Loki("head", COMPLETE, observed=[1, 0, 2, 3])  # the columns have another order: not neutral
    assert "4 of 4" in moved.describe()


def test_a_copy_leaves_the_matrix_on_the_device_behind():
    loki = Loki(LAST, SMALL)
    run("test", loki)
    size = len(pickle.dumps(loki))
    assert size < len(pickle.dumps(Loki(LAST, SMALL))) + 200


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LightningCLI, of jsonargparse
def test_yaml_reaches_every_argument(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    config = tmp_path / "config.yaml"
    config.write_text(
        "trainer:\n  logger: false\n  callbacks:\n    - class_path: lightning_reg.Loki\n"
        "      init_args: {layer: layer, distances: [[0, 1.5], [1.5, 0]], observed: [1, 0], modes: [test]}\n"
    )
    options = {"run": False, "save_config_callback": None, "seed_everything_default": 1}
    loki = LightningCLI(BoringModel, args=["--config", str(config)], **options).trainer.callbacks[0]
    assert (loki.distances, loki.observed, list(loki.modes)) == ([[0, 1.5], [1.5, 0]], [1, 0], ["test"])


# -- real networks and data -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_vision_transformer_is_tested_without_a_fit():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=4, **sizes)
    torch.manual_seed(0)

    class Transformer(Seen):
        def __init__(self):
            super().__init__()
            self.net = transformers.ViTForImageClassification(config)
            self.metric = MeanSquaredDistance(WIDE)

        def test_step(self, batch, batch_idx):
            logits = self.net(pixel_values=batch[0]).logits
            self.metric(logits, batch[1])
            self.log("distance", self.metric)

    images, y = torch.randn(20, 3, 8, 8), torch.arange(20) % 6
    loader = DataLoader(TensorDataset(images, y), 8)
    model, observed = Transformer(), [5, 0, 3, 2]
    trainer = make_trainer(callbacks=[Loki("net.classifier", WIDE, observed, temperature=0.1)])
    trainer.test(model, loader, verbose=False)
    with torch.no_grad():
        logits = model.eval().net(pixel_values=images).logits.double()
    predicted = scores_by_hand(logits, torch.tensor(WIDE)[observed], temperature=0.1).argmax(1)
    expected = (predicted - y).double().square().mean().item()
    assert trainer.callback_metrics["distance"].item() == pytest.approx(expected)


@pytest.mark.parametrize("known", [2, 3, 4, 6])
def test_on_diabetes_in_twelve_steps_the_squared_distance_falls_by_a_third(known):
    datasets = pytest.importorskip("sklearn.datasets")
    linear = pytest.importorskip("sklearn.linear_model")
    x, value = datasets.load_diabetes(return_X_y=True)
    edges = torch.quantile(torch.tensor(value), torch.linspace(0, 1, 13, dtype=torch.float64))[1:-1]
    y = torch.bucketize(torch.tensor(value), edges)
    line = (torch.arange(12)[:, None] - torch.arange(12)).abs()
    seen = torch.linspace(0, 11, known).round().long()
    argmax, loki = MeanSquaredDistance(line, observed=seen.tolist()), MeanSquaredDistance(line)
    for seed in range(5):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        train, test = order[:300], order[300:]
        train = train[torch.isin(y[train], seen)]
        model = linear.LogisticRegression(max_iter=1000).fit(20 * x[train], y[train])
        assert model.classes_.tolist() == seen.tolist()
        p = torch.tensor(model.predict_proba(20 * x[test]))
        argmax.update(p.argmax(1), y[test])
        loki.update(frechet_predict(p, line[model.classes_]), y[test])
    assert loki.compute() < 0.7 * argmax.compute()
