"""ConR: the contrastive regularizer for imbalanced regression."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule, seed_everything
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_reg import ConR, LossMixin
from lightning_reg.engine.errors import MisconfigurationException
from lightning_reg.functional import conr_loss, inverse_density_weights, label_distance, pair_masks
from tests.conformance.case import Case
from tests.toys import QUIET, make_trainer

pytestmark = QUIET


def shrink(x):
    """An augmentation that draws nothing: ranks and processes agree on it."""
    return 0.9 * x


def jitter(x):
    return x + 0.1 * torch.randn_like(x)


HERE = "tests.metric_learning.test_conr"
SMALL = {"layer": "net.body", "window": 0.5, "temperature": 0.5, "eta": 0.5}
CASE = Case(
    make=partial(ConR, **SMALL, augment=f"{HERE}.shrink"),
    neutral=partial(ConR, **SMALL, beta=0.0, augment=f"{HERE}.shrink"),
    data="regression",
    variants=[
        partial(ConR, **SMALL, augment=f"{HERE}.jitter", seed=3),
        partial(ConR, **SMALL, augment=f"{HERE}.jitter", views="one", compat=True, distance="l2", loss="mse_loss"),
        partial(ConR, **SMALL, views="dropout", push="linear", distance="max", warmup_steps=5, loss="last"),
        partial(ConR, **SMALL, views="none", gather=False, distance="lightning_reg.functional.label_distance"),
    ],
    invalid=[
        ({"window": -0.1}, "window"),
        ({"beta": -0.1}, "beta"),
        ({"temperature": 0.0}, "temperature"),
        ({"eta": -0.1}, "eta"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"warmup_steps": 0.5}, "warmup_steps"),
        ({"distance": "cosine"}, "distance"),
        ({"augment": None}, "augment"),
        ({"views": "none"}, "augment"),
        ({"views": "one", "augment": None}, "augment"),
        ({"views": "dropout"}, "augment"),
        ({"seed": -1}, "seed"),
        ({"loss": -1}, "loss"),
    ],
)

# -- the functional core ----------------------------------------------------------------------------------------------


def rows(n=8):
    features = [[((7 * (i + 1) * (c + 2)) % 11 - 5.0) / 3 for c in range(3)] for i in range(n)]
    targets = [(3.0 * i * i) % 17 for i in range(n)]
    targets[n // 2 :] = targets[: n // 2]
    predictions = [((5 * i) % 7) * 0.9 for i in range(n)]
    weights = [0.5 + ((3 * i) % 5) * 0.25 for i in range(n)]
    return [torch.tensor(values, dtype=torch.float64) for values in (features, targets, predictions, weights)]


def reference(features, targets, predictions, window, t, eta, weights=None, compat=False):
    """The formula in loops: lists of float64 numbers."""
    n = len(features)
    q = [1.0] * n if weights is None else weights
    norms = [math.sqrt(sum(v * v for v in f)) for f in features]
    z = [[v / norm for v in f] for f, norm in zip(features, norms, strict=True)]
    total = 0.0
    for i in range(n):
        apart = [abs(targets[i] - targets[j]) for j in range(n)]
        similarity = [sum(a * b for a, b in zip(z[i], z[j], strict=True)) / t for j in range(n)]
        positives = [j for j in range(n) if j != i and apart[j] <= window]
        negatives = [j for j in range(n) if apart[j] > window and abs(predictions[i] - predictions[j]) <= window]
        if not positives or not negatives:
            continue
        denominator = sum(math.exp(similarity[j]) for j in positives)
        denominator += sum(q[i] * math.exp(eta * apart[j]) * math.exp(similarity[j]) for j in negatives)
        denominator += n - len(positives) if compat else 0
        terms = [-math.log(math.exp(similarity[j]) / denominator) for j in positives]
        total += q[i] * sum(terms) / len(positives)
    return total / n


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("window", "t", "eta"), [(1.0, 0.07, 0.01), (2.0, 0.2, 0.2), (3.5, 1.0, 0.0)])
def test_equals_the_formula_in_loops(compat, weighted, window, t, eta):
    features, targets, predictions, weights = rows()
    q = weights if weighted else None
    value = conr_loss(features, targets, predictions, window, t, eta, q, compat)
    lists = [part.tolist() for part in (features, targets, predictions)]
    expected = reference(*lists, window, t, eta, weights.tolist() if weighted else None, compat)
    assert expected > 0.1
    assert value.item() == pytest.approx(expected, rel=1e-12)  # float64 on both sides


# BorealisAI/ConR @ ad6a8c9, agedb-dir/loss.py, ConR(targets and predictions as (n, 1), weights as (n, 1) or 1), run on
# `rows()` in float64: window, eta, whether weighted, loss, gradient of the first row.
AUTHORS_AGES = [
    (1.0, 0.01, False, 0.12428972192022428, [-0.3818730228791226, 0.005102050548044659, -0.7892562984984685]),
    (1.0, 0.01, True, 0.14552758905783564, [-0.4537900815980935, -0.054023914292530596, -0.637460591733534]),
    (2.0, 0.2, False, 7.263330579231489, [-0.8003855595567877, 0.011682960238960715, -1.6591859203083792]),
    (2.0, 0.2, True, 7.680107415675662, [-0.8572996600060803, -0.082016835635937, -1.3045151418324756]),
]
# The same commit, nyud2-dir/ConR.py, ConR(w=2.0, t=0.2, e=0.2), on `depth_rows()`.
AUTHORS_DEPTH = 2.1398820457658063
AUTHORS_DEPTH_GRADIENT = [
    [-0.022966862039823212, -0.045933724079646424],
    [0.0014811169878713218, 0.0029622339757426437],
    [-0.05333930901900304, -0.10667861803800607],
]


@pytest.mark.parametrize(("window", "eta", "weighted", "expected", "gradient"), AUTHORS_AGES)
def test_compat_is_the_authors_code(window, eta, weighted, expected, gradient):
    features, targets, predictions, weights = rows()
    features.requires_grad_()
    q = weights if weighted else None
    value = conr_loss(features, targets, predictions, window, eta=eta, weights=q, compat=True)
    value.backward()
    assert value.item() == pytest.approx(expected, rel=1e-12)
    assert features.grad[0].tolist() == pytest.approx(gradient, rel=1e-10)  # float64, sums in another order


def depth_rows():
    features, targets, predictions, weights = rows()
    spread = torch.tensor([[-1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    maps = [values[:, None, None, None] + spread for values in (targets, predictions)]
    return features[:, :, None, None] * torch.tensor([1.0, 2.0], dtype=torch.float64), *maps, weights


def test_linear_push_is_the_authors_code_for_depth_maps():
    features, targets, predictions, weights = depth_rows()
    features.requires_grad_()
    value = conr_loss(features, targets, predictions, 2.0, 0.2, 0.2, weights, compat=True, push="linear")
    value.backward()
    assert value.item() == pytest.approx(AUTHORS_DEPTH, rel=1e-12)
    assert features.grad[0].flatten(1).tolist() == [pytest.approx(row, rel=1e-10) for row in AUTHORS_DEPTH_GRADIENT]


def test_linear_push_of_zero_leaves_the_positives_alone():
    features, targets, predictions, _ = rows()
    features.requires_grad_()
    value = conr_loss(features, targets, predictions, 1.0, 0.2, eta=0.0, push="linear")
    value.backward()
    assert value.item() == pytest.approx(0.0, abs=1e-12)  # one positive each: its own share of the denominator
    assert features.grad.isfinite().all()


def test_gradient_is_that_of_finite_differences():
    features, targets, predictions, weights = rows()
    features.requires_grad_()
    for options in ({}, {"compat": True, "weights": weights}, {"push": "linear", "eta": 0.3}):
        assert torch.autograd.gradcheck(
            lambda z, options=options: conr_loss(z, targets, predictions, 2.0, 0.2, **options), features
        )


def test_gradient_flows_through_the_features_alone():
    features, targets, predictions, weights = (part.requires_grad_() for part in rows())
    conr_loss(features, targets, predictions, 2.0, weights=weights).backward()
    assert features.grad.abs().sum() > 0
    assert targets.grad is predictions.grad is weights.grad is None


def test_no_negatives_or_no_positives_give_exactly_zero():
    features, targets, predictions, _ = rows()
    near, far = torch.zeros(8), 100.0 * torch.arange(8.0)
    for y, p in ((targets, far), (near, near), (far, near), (far, far)):
        variable = features.clone().requires_grad_()
        for options in ({}, {"compat": True}, {"push": "linear"}):
            value = conr_loss(variable, y, p, 1.0, **options)
            (gradient,) = torch.autograd.grad(value, variable)
            assert value.item() == 0.0
            assert torch.equal(gradient, torch.zeros_like(gradient))


def test_a_window_as_wide_as_the_labels_leaves_no_negative():
    features, targets, predictions, _ = rows()
    assert conr_loss(features, targets, predictions, window=12.0).item() == 0.0
    assert conr_loss(features, targets, predictions, window=11.9).item() > 0.0


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_tiny_batches(n):
    features = torch.ones(n, 2, requires_grad=True)
    value = conr_loss(features, torch.arange(n), torch.zeros(n), 1.0)  # 0, 1, 2: the ends are apart
    value.backward()
    # All alike: 2 of 3 rows are anchors, with one positive and one negative that is pushed by exp(0.02).
    expected = 2 / 3 * math.log(1 + math.exp(0.02)) if n == 3 else 0.0
    assert value.item() == pytest.approx(expected, abs=1e-6)
    assert features.grad.isfinite().all()


def test_rows_of_zeros_have_no_direction_and_no_gradient():
    features, targets, predictions, _ = rows()
    features[2] = 0.0
    features.requires_grad_()
    conr_loss(features, targets, predictions, 2.0).backward()
    assert features.grad.isfinite().all()
    assert torch.equal(features.grad[2], torch.zeros(3, dtype=torch.float64))


def test_order_of_the_rows_is_nothing_to_it():
    parts, order = rows(), torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    value = conr_loss(*parts[:3], 2.0, weights=parts[3])
    shuffled = [part[order] for part in parts]
    assert conr_loss(*shuffled[:3], 2.0, weights=shuffled[3]).item() == pytest.approx(value.item(), rel=1e-12)


def test_a_constant_weight_scales_the_rows_and_shifts_the_push():
    features, targets, predictions, _ = rows()
    three = conr_loss(features, targets, predictions, 2.0, 0.2, 0.0, weights=torch.full((8,), 3.0))
    lists = [part.tolist() for part in (features, targets, predictions)]
    assert three.item() == pytest.approx(reference(*lists, 2.0, 0.2, 0.0, [3.0] * 8), rel=1e-12)
    assert three.item() > 3 * conr_loss(features, targets, predictions, 2.0, 0.2, 0.0).item()


def test_columns_and_whole_numbers_are_the_same_labels():
    features, targets, predictions, weights = rows()
    value = conr_loss(features, targets, predictions, 2.0, weights=weights).item()
    columns = [part[:, None] for part in (targets, predictions, weights)]
    assert conr_loss(features, *columns[:2], 2.0, weights=columns[2]).item() == value
    assert conr_loss(features, targets.long(), predictions, 2.0, weights=weights).item() == value


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_under_autocast_are_compared_in_float32(dtype):
    features, targets, predictions, _ = rows()
    features = (torch.cat([features, features]) * 100).to(dtype).requires_grad_()  # duplicates: exp(1 / 0.07) > 65504
    targets, predictions = targets.repeat(2).float(), predictions.repeat(2).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        value = conr_loss(features, targets, predictions, 2.0)
    value.backward()
    assert value.dtype == torch.float32
    assert value.item() == conr_loss(features.float(), targets, predictions, 2.0).item()
    assert features.grad.isfinite().all()


def test_distances_of_labels_that_are_vectors():
    one, two = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[3.0, 4.0]])
    assert label_distance(one, two).tolist() == [[7.0], [5.0]]
    assert label_distance(one, two, "l2").tolist() == [[5.0], [pytest.approx(math.sqrt(13))]]
    assert label_distance(one, two, "max").tolist() == [[4.0], [3.0]]
    positive, negative = pair_masks(one.repeat(2, 1), torch.zeros(4, 2), 1.0, partial(label_distance, kind="max"))
    assert positive.all(1).tolist() == [False] * 4  # never with oneself
    assert not negative.any()
    assert pair_masks(one, torch.zeros(2, 2), 1.9)[1].tolist() == [[False, True], [True, False]]


def test_masks_are_those_of_the_definition():
    _, targets, predictions, _ = rows()
    positive, negative = pair_masks(targets, predictions, 2.0)
    for i in range(8):
        for j in range(8):
            near = abs(targets[i] - targets[j]) <= 2.0
            assert positive[i, j] == (near and i != j)
            assert negative[i, j] == (not near and abs(predictions[i] - predictions[j]) <= 2.0)


def test_weights_of_rare_labels():
    targets = torch.tensor([0.0] * 9 + [5.0] * 4 + [10.0])
    plain = inverse_density_weights(targets, 10, "inverse")
    assert plain.tolist() == pytest.approx([14 / 3 / 9] * 9 + [14 / 3 / 4] * 4 + [14 / 3])
    assert inverse_density_weights(targets[:, None], 10)[[0, 9, 13]].tolist() == pytest.approx(
        [14 / 6 / 3, 14 / 6 / 2, 14 / 6]
    )
    assert plain.mean().item() == pytest.approx(1.0)
    # Three bins of counts 3, 1, 2, smoothed by exp(-1/2) at the neighbours (one bin on either side).
    a = math.exp(-0.5)
    smooth = [3 + a, 3 * a + 1 + 2 * a, a + 2]
    inverse = [1 / smooth[b] for b in (0, 0, 0, 1, 2, 2)]
    expected = [6 * v / sum(inverse) for v in inverse]
    targets = torch.tensor([0.0, 0.1, 0.2, 1.5, 2.9, 3.0])
    assert inverse_density_weights(targets, 3, "inverse", lds_sigma=1.0).tolist() == pytest.approx(expected)
    assert inverse_density_weights(torch.ones(3), 4).tolist() == [1.0] * 3
    for arguments in ((0,), (3, "log"), (3, "inverse", 0.0)):
        with pytest.raises(ValueError, match="inverse_density_weights: `bins`"):
            inverse_density_weights(targets, *arguments)
