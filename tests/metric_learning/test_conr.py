"""ConR: the contrastive regularizer for imbalanced regression."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule, seed_everything
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from sklearn.datasets import load_digits
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import ConR, LossMixin
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import conr_loss, inverse_density_weights, label_distance, pair_masks
from tests.conformance.by_hand import Hand
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


class ContrastByHand(Hand):
    """Two views of the batch through the network, one pair of rows after the other."""

    def term(self, loop, moment):
        x, y = shrink(moment.x).repeat(2, 1), moment.y.repeat(2, 1)
        predictions, features = loop.run(loop.used(loop.weights()), x, moment)
        z = features["net.body"] / features["net.body"].norm(dim=1, keepdim=True)
        total = torch.zeros(())
        for i in range(len(x)):
            apart, close = ((t - t[i]).abs().sum(1) for t in (y, predictions.detach()))
            positives = [j for j in range(len(x)) if j != i and apart[j] <= 0.5]
            negatives = [j for j in range(len(x)) if apart[j] > 0.5 and close[j] <= 0.5]
            if negatives:
                alike = ((z @ z[i]) / 0.5).exp()
                pushed = sum((0.5 * apart[j]).exp() * alike[j] for j in negatives)
                denominator = sum(alike[j] for j in positives) + pushed
                total = total - sum((alike[j] / denominator).log() for j in positives) / len(positives)
        return total / len(x)


CASE = Case(
    make=partial(ConR, **SMALL, augment=f"{HERE}.shrink"),
    neutral=partial(ConR, **SMALL, beta=0.0, augment=f"{HERE}.shrink"),
    by_hand=ContrastByHand,
    says=(
        "net.body, window=0.5, beta=1, temperature=0.5; views=two by tests.metric_learning.test_conr.shrink",
        "beta=0: inactive",
        "net.body, window=0.5, beta=1, temperature=0.5; views=two by tests.metric_learning.test_conr.jitter",
        "net.body, window=0.5, beta=1, temperature=0.5; views=one by tests.metric_learning.test_conr.jitter",
        "net.body, window=0.5, beta=1, rising over 5 steps, temperature=0.5; views=dropout",
        "net.body, window=0.5, beta=1, temperature=0.5; views=none",
    ),
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
        ({"views": "none", "augment": "augment"}, "augment"),
        ({"views": "one", "augment": None}, "augment"),
        ({"views": "dropout", "augment": "augment"}, "augment"),
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
    features, targets, *_ = rows()
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


class NothingIsRead(TorchDispatchMode):
    """Raises where a value would be read on the host, or a shape would depend on one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.index.Tensor,
            torch.ops.aten.masked_select.default,
        ), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def test_no_value_is_read_on_the_host():
    features, targets, predictions, weights = rows()
    features.requires_grad_()
    with NothingIsRead():
        for options in ({}, {"compat": True, "weights": weights}, {"push": "linear"}):
            conr_loss(features, targets, predictions, 2.0, **options).backward()
    with pytest.raises(AssertionError, match="waits for the device"), NothingIsRead():
        features.sum().item()


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


def test_weights_of_rare_labels_as_published():
    """Counts clipped to 5 and 1000, and smoothed by a Gaussian over five bins whose tails are reflected at its ends."""
    targets = torch.tensor([0.0] * 9 + [1.0] * 4 + [2.0] * 6)
    clipped = inverse_density_weights(targets, 3, "inverse", clip=(5, 8))
    each = [1 / 8] * 9 + [1 / 5] * 4 + [1 / 6] * 6
    assert clipped.tolist() == pytest.approx([19 * v / sum(each) for v in each])
    # scipy's gaussian_filter1d([0, 0, 1, 0, 0], sigma=2): the weights at each distance, with the reflected ones.
    outer, inner = 0.8582852382, 0.9458276530
    kernel = {0: 1.0, 1: inner, 2: outer}
    counts = [9, 4, 6]
    smooth = [sum(kernel[abs(i - j)] * counts[j] for j in range(3)) for i in range(3)]
    each = [1 / smooth[b] for b in [0] * 9 + [1] * 4 + [2] * 6]
    found = inverse_density_weights(targets, 3, "inverse", lds_sigma=2.0, lds_size=5)
    assert found.tolist() == pytest.approx([19 * v / sum(each) for v in each])
    for options in ({"lds_size": 4}, {"clip": (3, 2)}, {"clip": (-1, 2)}):
        with pytest.raises(ValueError, match="inverse_density_weights: `clip` must be"):
            inverse_density_weights(targets, 3, **options)


# -- the callback -----------------------------------------------------------------------------------------------------


class Regressor(LightningModule):
    """What a user has; nothing in it knows of ConR."""

    def __init__(self, loss=None, dropout=0.0, outputs=1):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout))
            self.head = nn.Linear(16, outputs)
        self.loss = loss or plain

    def forward(self, x):
        return self.head(self.body(x))

    def augment(self, x):
        return x + 0.1 * x.roll(1, dims=1)

    def training_step(self, batch, batch_idx):
        return self.loss(self, batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def plain(model, batch):
    return F.mse_loss(model(batch[0])[:, 0], batch[1])


def numbers(size=22):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(size, 6, generator=generator)
    y = (3 * x[:, 0] + torch.randn(size, generator=generator)).round()
    return TensorDataset(x, y, 0.5 + torch.rand(size, generator=generator))


def train(conr, model=None, loader=None, epochs=2, **options):
    """The module, trained; the last batch of an epoch is smaller than the others."""
    seed_everything(7, verbose=False)
    model = Regressor() if model is None else model
    trainer = make_trainer(callbacks=[conr] if conr else [], max_epochs=epochs, **options)
    loader = DataLoader(numbers(), 8) if loader is None else loader
    trainer.fit(
        model, **({"datamodule": loader} if isinstance(loader, LightningDataModule) else {"train_dataloaders": loader})
    )
    return model, trainer


def by_hand(loss=plain, views=None, beta=0.5, factor=None, epochs=2, outputs=1, **options):
    """Separate passes of the network: of the batch for the loss, of the views for the regularizer."""
    model = Regressor(outputs=outputs)
    optimizer = model.configure_optimizers()
    views = views or (lambda model, x: [model.augment(x)] * 2)
    for _ in range(epochs):
        for batch in DataLoader(numbers(), 8):
            rows = torch.cat(views(model, batch[0]))
            features = model.body(rows)
            repeated = [part.repeat(len(rows) // len(batch[1])) for part in batch[1:]]
            if options.get("weights") is not None:
                options["weights"] = repeated[1]
            term = conr_loss(features, repeated[0], model.head(features), WINDOW, TEMPERATURE, ETA, **options)
            optimizer.zero_grad()
            (loss(model, batch) + beta * (factor(batch) if factor else 1.0) * term).backward()
            optimizer.step()
    return model


WINDOW, TEMPERATURE, ETA = 1.0, 0.3, 0.1
ACTIVE = {"layer": "body", "window": WINDOW, "temperature": TEMPERATURE, "eta": ETA, "beta": 0.5}


def same(one, two):
    for ours, theirs in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)  # float32, one pass or several


def l1_columns(model, batch):
    return F.l1_loss(model(batch[0]), batch[1][:, None])


def smooth_l1(model, batch):
    return F.smooth_l1_loss(model(batch[0]).squeeze(1), batch[1], beta=0.5)


def huber(model, batch):
    return nn.HuberLoss(delta=0.7)(model(batch[0]).squeeze(1), batch[1])


def weighted(model, batch):
    return F.mse_loss(model(batch[0])[:, 0], batch[1], weight=batch[2])


def weighted_by_hand(model, batch):
    return (batch[2] * F.l1_loss(model(batch[0])[:, 0], batch[1], reduction="none")).mean()


def weighted_mean(model, batch):
    return (batch[2] * F.mse_loss(model(batch[0])[:, 0], batch[1], reduction="none")).sum() / batch[2].sum()


def summed(model, batch):
    return F.mse_loss(model(batch[0])[:, 0], batch[1], reduction="sum") / len(batch[1])


@pytest.mark.parametrize(
    "loss", [plain, l1_columns, smooth_l1, huber, weighted, weighted_by_hand, weighted_mean, summed]
)
def test_trains_as_three_passes_by_hand_do_whatever_the_loss(loss):
    model, _ = train(ConR(**ACTIVE, augment="augment"), Regressor(loss))
    # A term joins every element of the loss, so weights of the user's own that have another mean weight it too.
    factor = (lambda batch: batch[2].mean()) if loss is weighted_by_hand else None
    same(model, by_hand(loss, factor=factor))
    plainly, _ = train(None, Regressor(loss))
    assert not torch.allclose(model.head.weight, plainly.head.weight, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "views"),
    [
        ({"views": "one", "augment": "augment"}, lambda model, x: [x, model.augment(x)]),
        ({"views": "dropout"}, lambda model, x: [x, x]),
        ({"views": "none"}, lambda model, x: [x]),
        ({"augment": f"{HERE}.shrink"}, lambda model, x: [0.9 * x, 0.9 * x]),
    ],
    ids=["one", "dropout", "none", "import path"],
)
def test_views(arguments, views):
    model, _ = train(ConR(**ACTIVE, **arguments))
    same(model, by_hand(views=views))


def test_options_reach_the_core():
    conr = ConR(**ACTIVE, augment="augment", weights="2", compat=True, distance="max", push="exponential")
    same(train(conr)[0], by_hand(weights=True, compat=True))
    same(train(ConR(**ACTIVE, augment="augment", push="linear"))[0], by_hand(push="linear"))


def test_a_warmup_lets_beta_rise_from_zero():
    model, _ = train(ConR(**ACTIVE, augment="augment", warmup_steps=4), epochs=1)
    halves = Regressor()
    optimizer = halves.configure_optimizers()
    for step, batch in enumerate(DataLoader(numbers(), 8)):
        x, y, _ = batch
        features = halves.body(torch.cat([halves.augment(x)] * 2))
        term = conr_loss(features, y.repeat(2), halves.head(features), WINDOW, TEMPERATURE, ETA)
        optimizer.zero_grad()
        (plain(halves, batch) + 0.5 * step / 4 * term).backward()
        optimizer.step()
    same(model, halves)


def concatenated(model, batch):
    x, y = torch.cat([batch[0], model.augment(batch[0])]), batch[1].repeat(2)
    return F.mse_loss(model(x)[:, 0], y)


def two_passes(model, batch):
    outputs = torch.cat([model(batch[0]), model(model.augment(batch[0]))])
    return F.mse_loss(outputs[:, 0], batch[1].repeat(2))


def two_losses(model, batch):
    first = F.mse_loss(model(batch[0])[:, 0], batch[1])
    return first + F.mse_loss(model(model.augment(batch[0]))[:, 0], batch[1])


@pytest.mark.parametrize("step", [concatenated, two_passes])
def test_a_step_that_makes_two_views_itself(step):
    model, _ = train(ConR(**ACTIVE, views="none"), Regressor(step))
    same(model, by_hand(concatenated, views=lambda model, x: [x, model.augment(x)]))


def passes_first(model, batch):
    output, other = model(batch[0])[:, 0], model(model.augment(batch[0]))[:, 0]
    return F.mse_loss(output, batch[1]) + F.mse_loss(other, batch[1])


@pytest.mark.parametrize("step", [two_losses, passes_first])
@pytest.mark.parametrize(("loss", "view"), [(0, lambda m, x: [x]), (1, lambda m, x: [m.augment(x)])])
def test_of_two_losses_the_chosen_ones_pass_counts(loss, view, step):
    model, _ = train(ConR(**ACTIVE, views="none", loss=loss), Regressor(step))
    same(model, by_hand(two_losses, views=view))


def test_predictions_of_two_passes_have_no_feature_per_row():
    def ensemble(model, batch):
        outputs = model(batch[0]) + model(model.augment(batch[0]))
        return F.mse_loss(outputs[:, 0], batch[1])

    with pytest.raises(MisconfigurationException, match="before the loss, in 2 passes that the predictions come from"):
        train(ConR(**ACTIVE, views="none"), Regressor(ensemble))


class HandWritten(LossMixin, Regressor):
    def training_step(self, batch, batch_idx):
        output = self(batch[0])[:, 0]
        return self.reduce_loss((output - batch[1]).square(), logits=output, targets=batch[1])


def test_a_loss_written_by_hand():
    same(train(ConR(**ACTIVE, augment="augment"), HandWritten())[0], by_hand())


def test_an_augmentation_of_the_datamodule():
    class Data(LightningDataModule):
        def train_dataloader(self):
            return DataLoader(numbers(), 8)

        def twist(self, x):
            return x + 0.1 * x.roll(1, dims=1)

    same(train(ConR(**ACTIVE, augment="twist"), loader=Data())[0], by_hand())


def test_a_second_head_keeps_its_loss_to_the_batch():
    def heads(model, batch):
        output = model(batch[0])
        return F.mse_loss(output[:, 0], batch[1]) + F.l1_loss(output[:, 1:], batch[2][:, None])

    model, _ = train(ConR(**ACTIVE, augment="augment", loss="mse_loss"), Regressor(heads, outputs=2))
    expected = Regressor(outputs=2)
    optimizer = expected.configure_optimizers()
    for _ in range(2):
        for batch in DataLoader(numbers(), 8):
            features = expected.body(torch.cat([expected.augment(batch[0])] * 2))
            output = expected.head(features)[:, 0]
            term = conr_loss(features, batch[1].repeat(2), output, WINDOW, TEMPERATURE, ETA)
            optimizer.zero_grad()
            (heads(expected, batch) + 0.5 * term).backward()
            optimizer.step()
    same(model, expected)


def test_depth_maps_count_by_their_means():
    def maps(model, batch):
        spread = torch.tensor([[-1.0, 1.0]])
        return F.l1_loss(model(batch[0])[:, :, None] + spread, batch[1][:, None, None] + spread)

    same(train(ConR(**ACTIVE, augment="augment"), Regressor(maps))[0], by_hand(l1_columns))


@pytest.mark.parametrize("name", ["poisson_nll_loss", "gaussian_nll_loss"])
def test_likelihoods_are_regressions(name):
    def likelihood(model, batch):
        output, y = model(batch[0])[:, 0], batch[1].abs()
        if name == "poisson_nll_loss":
            return F.poisson_nll_loss(output, y)
        return F.gaussian_nll_loss(output, y, torch.ones_like(output))

    conr = ConR(**ACTIVE, augment="augment")
    _, trainer = train(conr, Regressor(likelihood), epochs=1, max_steps=1, log_every_n_steps=1)
    start = Regressor()
    x, y, _ = next(iter(DataLoader(numbers(), 8)))
    features = start.body(torch.cat([start.augment(x)] * 2))
    output = start.head(features)[:, 0]
    output = output.exp() if name == "poisson_nll_loss" else output
    term = 0.5 * conr_loss(features, y.abs().repeat(2), output, WINDOW, TEMPERATURE, ETA).item()
    assert trainer.callback_metrics["reg/conr/term"].item() == pytest.approx(term, abs=1e-6)
    assert term > 0.1


class Drawing(Regressor):
    def __init__(self):
        super().__init__()
        self.drawn = []

    def augment(self, x):
        self.drawn.append(torch.randn_like(x))
        return x + 0.1 * self.drawn[-1]


def test_draws_of_the_augmentation_are_the_techniques_own():
    states = []
    for conr in (None, ConR(**ACTIVE, augment="augment"), ConR(**ACTIVE, augment="augment", seed=1)):
        model, _ = train(conr, Drawing())
        states.append((torch.get_rng_state(), model))
    assert torch.equal(states[0][0], states[1][0])
    assert torch.equal(states[0][0], states[2][0])
    drawn = states[1][1].drawn
    assert len(drawn) == 2 * 2 * 3  # two views, two epochs, three batches
    assert len({float(noise.sum()) for noise in drawn + states[2][1].drawn}) == 24
    torch.manual_seed(99)
    again, _ = train(ConR(**ACTIVE, augment="augment"), Drawing())
    assert all(torch.equal(a, b) for a, b in zip(drawn, again.drawn, strict=True))


def test_logs_the_share_of_anchors_and_the_negatives():
    _, trainer = train(ConR(**ACTIVE, views="none"), epochs=1, max_steps=1, log_every_n_steps=1)
    model, (x, y, _) = Regressor(), next(iter(DataLoader(numbers(), 8)))
    positive, negative = pair_masks(y, model(x)[:, 0], WINDOW)
    share = (positive.any(1) & negative.any(1)).float().mean().item()
    assert 0 < share < 1
    assert trainer.callback_metrics["reg/conr/anchors"].item() == pytest.approx(share)
    assert trainer.callback_metrics["reg/conr/negatives"].item() == pytest.approx(negative.sum().item() / 8)
    logged = trainer.callback_metrics
    difference = logged["reg/loss/total"] - logged["reg/loss/base"]
    assert difference.item() == pytest.approx(logged["reg/conr/term"].item(), abs=1e-6)


def test_describe_says_what_is_done():
    conr = ConR(**ACTIVE, augment="augment", warmup_steps=3)
    assert conr.describe() == ("body, window=1, beta=0.5, rising over 3 steps, temperature=0.3; views=two by augment")
    assert ConR("body", 1.0, beta=0.0, views="none").describe() == "beta=0: inactive"


# -- refusals ---------------------------------------------------------------------------------------------------------


def classes(model, batch):
    return F.cross_entropy(model(batch[0]).repeat(1, 3), (batch[1] > 0).long())


def rows_dropped(model, batch):
    return F.mse_loss(model(batch[0])[1:, 0], batch[1][1:])


@pytest.mark.parametrize(
    ("conr", "loss", "words"),
    [
        (ConR(**ACTIVE | {"layer": "boddy"}, views="none"), plain, "No layer is named 'boddy'. Near names: 'body'"),
        (ConR(**ACTIVE, augment="agument"), plain, "'agument' names no function: neither Regressor nor the datamodule"),
        (ConR(**ACTIVE, augment="no.such.place"), plain, "'no.such.place' names no function: No module named 'no'"),
        (ConR(**ACTIVE, augment=f"{HERE}.nothing"), plain, "names no function: module .* has no attribute 'nothing'"),
        (ConR(**ACTIVE, augment=f"{HERE}.WINDOW"), plain, "names no function: it is a float"),
        (ConR(**ACTIVE, views="none", distance="no.such"), plain, r"ConR\(distance=...\): 'no.such' names no function"),
        (ConR(**ACTIVE, augment=f"{HERE}.cut"), plain, "an augmentation has to keep the shape|different shapes"),
        (ConR(**ACTIVE, augment="augment", input_key="7"), plain, "input_key='7' names nothing in the batch"),
        (ConR(**ACTIVE, augment="augment"), classes, "ConR: F.cross_entropy.* is no regression"),
        (ConR(**ACTIVE, augment="augment"), rows_dropped, "has no row for each sample of the batch and its 2 further"),
        (ConR(**ACTIVE, views="none"), rows_dropped, "gave .8, 16. before the loss, where a feature for each of 7"),
        (ConR(**ACTIVE, augment="augment", weights="0"), plain, r"ConR\(weights='0'\) must name a tensor .* of 8"),
        (ConR(**ACTIVE | {"layer": "head"}, views="none"), "before", "'head' gave no tensor before the loss"),
        (ConR(**ACTIVE, views="none"), "frozen", "the output of layer 'body' has no gradient"),
    ],
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_setups_that_cannot_work_are_refused_in_words(conr, loss, words):
    model = Regressor(LOSSES.get(loss, loss))
    if loss == "frozen":
        model.body.requires_grad_(False)
    with pytest.raises(MisconfigurationException, match=words):
        train(conr, model)


def before(model, batch):
    return F.mse_loss(model.body(batch[0]).mean(1), batch[1])


LOSSES = {"before": before, "frozen": plain}


def cut(x):
    return x[:, :3]


def test_rows_that_do_not_fit_are_refused():
    def shapes(model, batch):
        return F.mse_loss(model(batch[0]).expand(-1, 2), batch[1][:, None])

    with pytest.warns(UserWarning, match="target size"), pytest.raises(MisconfigurationException, match="same rows"):
        train(ConR(**ACTIVE, augment="augment"), Regressor(shapes))


def test_a_loss_by_hand_has_to_say_what_it_compares():
    class Silent(LossMixin, Regressor):
        def training_step(self, batch, batch_idx):
            return self.reduce_loss((self(batch[0])[:, 0] - batch[1]).square())

    with pytest.raises(MisconfigurationException, match="`reduce_loss` got none"):
        train(ConR(**ACTIVE, augment="augment"), Silent())


def test_arguments_that_contradict_each_other():
    with pytest.raises(ValueError, match="ConR: `augment` must be given with views='two', got None"):
        ConR("body", 1.0)
    with pytest.raises(ValueError, match="ConR: `augment` has no use with views='none', got 'augment'"):
        ConR("body", 1.0, views="none", augment="augment")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LightningCLI, of jsonargparse
def test_yaml_reaches_every_argument(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    config = tmp_path / "config.yaml"
    config.write_text(
        "trainer:\n  logger: false\n  callbacks:\n    - class_path: lightning_reg.ConR\n"
        "      init_args: {layer: layer, window: 1.5, augment: my_project.augment}\n"
    )

    def run(*arguments):
        options = {"run": False, "save_config_callback": None, "seed_everything_default": 1}
        return LightningCLI(BoringModel, args=list(arguments), **options)

    conr = run("--config", str(config)).trainer.callbacks[0]
    assert (type(conr), conr.window, conr.augment, conr.temperature) == (ConR, 1.5, "my_project.augment", 0.07)
    with pytest.raises(SystemExit):
        run("--config", str(config), "--print_config")
    printed = capsys.readouterr().out
    assert "views: two" in printed
    with pytest.raises(SystemExit):
        run("--trainer.callbacks.help", "lightning_reg.ConR")
    assert "Labels this close count as similar" in capsys.readouterr().out


# -- several ranks ----------------------------------------------------------------------------------------------------


def loss_on_rank(first, capacity, options):
    import torch.distributed as dist

    mine = slice(0, first) if dist.get_rank() == 0 else slice(first, 8)
    features, targets, predictions, weights = (part[mine] for part in rows())
    theta = torch.eye(3, dtype=torch.float64).add(0.3).requires_grad_()
    group = {"group": dist.group.WORLD, "capacity": capacity}
    value = conr_loss(features @ theta, targets, predictions, 2.0, 0.2, 0.2, weights, **options, **group)
    value.backward()
    return value.item(), theta.grad


@pytest.mark.parametrize("first", [4, 3, 7, 8])
@pytest.mark.parametrize("capacity", [8, None])
@pytest.mark.parametrize("options", [{}, {"compat": True}, {"push": "linear"}], ids=str)
def test_the_mean_over_ranks_is_the_loss_of_all_rows_and_so_are_the_gradients(two_processes, first, capacity, options):
    features, targets, predictions, weights = rows()
    theta = torch.eye(3, dtype=torch.float64).add(0.3).requires_grad_()
    value = conr_loss(features @ theta, targets, predictions, 2.0, 0.2, 0.2, weights, **options)
    value.backward()
    (one, one_gradient), (two, two_gradient) = two_processes.run(loss_on_rank, first, capacity, options)
    assert (one + two) / 2 == pytest.approx(value.item(), rel=1e-12)  # float64, sums in another order
    torch.testing.assert_close((one_gradient + two_gradient) / 2, theta.grad, rtol=1e-10, atol=1e-12)


def train_on_rank(conr):
    import torch.distributed as dist

    # 6 and 5 samples in batches of 4: the last batches have 2 and 1.
    part = slice(0, 6) if dist.get_rank() == 0 else slice(6, 11)
    loader = DataLoader(TensorDataset(*(tensor[part] for tensor in numbers().tensors)), 4)
    options = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    model, _ = train(conr, loader=loader, **options)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("gather", [True, False])
def test_ranks_with_unequal_batches_train_as_one_process(two_processes, gather):
    one, two = two_processes.run(train_on_rank, ConR(**ACTIVE, augment="augment", gather=gather))
    model = Regressor()
    optimizer = model.configure_optimizers()
    x, y, _ = numbers().tensors
    for _ in range(2):
        for batches in ((slice(0, 4), slice(6, 10)), (slice(4, 6), slice(10, 11))):
            views = [torch.cat([model.augment(x[part])] * 2) for part in batches]
            labels = [y[part].repeat(2) for part in batches]
            parts = [(torch.cat(views), torch.cat(labels))] if gather else list(zip(views, labels, strict=True))
            terms = []
            for rows_of_part, labels_of_part in parts:
                features = model.body(rows_of_part)
                terms.append(conr_loss(features, labels_of_part, model.head(features), WINDOW, TEMPERATURE, ETA))
            losses = [plain(model, (x[part], y[part])) for part in batches]
            optimizer.zero_grad()
            (sum(losses) / 2 + 0.5 * sum(terms) / len(terms)).backward()
            optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(one[name], value, atol=1e-6, rtol=1e-5)
        assert torch.equal(one[name], two[name])


# -- what it does -----------------------------------------------------------------------------------------------------


class DigitRegressor(LightningModule):
    """Digits as numbers."""

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 64), nn.ReLU())
        self.head = nn.Linear(64, 1)

    def forward(self, x):
        return self.head(self.body(x))[:, 0]

    def augment(self, x):
        dy, dx = torch.randint(-1, 2, (2,)).tolist()
        return x.roll((dy, dx), dims=(2, 3)) + 0.1 * torch.randn_like(x)

    def training_step(self, batch, batch_idx):
        return F.l1_loss(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


class Negatives(Callback):
    """Negatives per row in the last full batch of each epoch."""

    def __init__(self):
        self.counts = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.counts.append(float(trainer.callback_metrics.get("reg/conr/negatives", 0.0)))


def test_on_skewed_digits_negatives_fade_and_the_error_is_about_that_of_the_plain_loss():
    digits = load_digits()
    x = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
    y = torch.tensor(digits.target, dtype=torch.float32)
    counts = [90, 90, 70, 50, 30, 20, 12, 8, 5, 5]
    kept = torch.cat([(y == digit).nonzero()[:count, 0] for digit, count in enumerate(counts)])
    test = torch.cat([(y == digit).nonzero()[-60:, 0] for digit in range(10)])
    error, negatives = {}, Negatives()
    for beta in (0.0, 0.2):
        seed_everything(0, verbose=False)
        model = DigitRegressor()
        loader = DataLoader(TensorDataset(x[kept], y[kept]), 64, shuffle=True, drop_last=True)
        conr = ConR("body", window=0.5, beta=beta, eta=0.2, augment="augment")
        make_trainer(max_epochs=20, callbacks=[conr, negatives if beta else Negatives()]).fit(model, loader)
        with torch.no_grad():
            error[beta] = (model(x[test]) - y[test]).abs().mean().item()
    assert sum(negatives.counts[-5:]) < 0.5 * sum(negatives.counts[:5])
    assert error[0.2] < 1.05 * error[0.0]
