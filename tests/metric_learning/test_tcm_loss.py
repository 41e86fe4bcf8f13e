"""TCM and OPIS: threshold-consistent margins, and how far the classes are from them."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import OPIS, TCM, LossMixin
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import opis, tcm_loss
from lightning_reg.metric_learning.tcm_loss import _pairs
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.conformance.kinds.metric import MetricCase
from tests.conformance.problems import KINDS, Problem
from tests.toys import CLASSES, QUIET, TWO_RANKS, Classifier, fit, make_loader, make_tensors, make_trainer, same_weights

pytestmark = QUIET


def hinges(embeddings, labels, m_plus, m_minus, lambda_plus=1.0, lambda_minus=1.0):
    """The formula, one pair after the other, with gradient."""
    z = [row / row.square().sum().sqrt() for row in embeddings]
    pulled, pushed = [], []
    for i in range(len(z)):
        for j in range(i):
            s = (z[i] * z[j]).sum()
            if labels[i] == labels[j] and s <= m_plus:
                pulled.append(m_plus - s)
            if labels[i] != labels[j] and s >= m_minus:
                pushed.append(s - m_minus)
    pulled, pushed = (sum(values) / len(values) if values else 0.0 for values in (pulled, pushed))
    return lambda_plus * pulled + lambda_minus * pushed


class MarginsByHand(Hand):
    def term(self, loop, moment):
        return hinges(moment.features["net.body"].flatten(1), moment.y, 0.8, -0.1, 2.0, 1.0)


def clusters(seed=0, rows=30, classes=5, noise=0.8, width=4):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=generator)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    return centres[labels] + noise * torch.randn(rows, width, generator=generator), labels


def inconsistency(batches, low=0.01, high=0.1, count=101, c=1.0, least=2):
    """OPIS with all pairs in a list, in float64."""
    z = torch.cat([batch["embeddings"] for batch in batches]).double().numpy()
    y = torch.cat([batch["labels"] for batch in batches]).numpy()
    z = z / np.sqrt((z**2).sum(1, keepdims=True))
    n = len(z)
    distance = np.array([[np.sqrt(((z[i] - z[j]) ** 2).sum()) for j in range(n)] for i in range(n)])
    pairs = [(i, j) for i in range(n) for j in range(i)]
    negative = [distance[i, j] for i, j in pairs if y[i] != y[j]]
    counted = [k for k in sorted(set(y.tolist())) if (y == k).sum() >= least]
    ends = np.quantile(negative, low), np.quantile(negative, high)
    curves = []
    for k in counted:
        inside = np.array([distance[i, j] for i, j in pairs if y[i] == y[j] == k])
        across = np.array([distance[i, j] for i, j in pairs if (y[i] == k) != (y[j] == k)])
        curve = []
        for d in np.linspace(*ends, count):
            psi, phi = (inside <= d).mean(), (across > d).mean()
            curve.append((1 + c * c) * phi * psi / (c * c * phi + psi) if phi + psi else 0.0)
        curves.append(curve)
    hits = [
        min(distance[i, j] for j in range(n) if j != i and y[j] == y[i])
        < min(distance[i, j] for j in range(n) if y[j] != y[i])
        for i in range(n)
        if y[i] in counted
    ]
    curves = np.array(curves)
    return {
        "opis": float(((curves - curves.mean(0)) ** 2).mean()),
        "recall_at_1": float(np.mean(hits)),
        "low": float(ends[0]),
        "high": float(ends[1]),
        "classes": float(len(counted)),
        "excluded": float(len(set(y.tolist())) - len(counted)),
    }


def labelled(size):
    x = torch.randn(size, 8)
    return x, (x[:, :4] + torch.randn(size, 4)).argmax(1)


SMALL = {"layer": "net.body", "margin_plus": 0.8, "margin_minus": -0.1, "lambda_plus": 2.0}
BATCHES = [dict(zip(("embeddings", "labels"), clusters(seed, 24, 4), strict=True)) for seed in range(4)]
CASE = (
    Case(
        make=partial(TCM, **SMALL),
        neutral=partial(TCM, "net.body", lambda_plus=0.0, lambda_minus=0.0),
        by_hand=MarginsByHand,
        says=(
            "net.body, margins -0.1 and 0.8, lambdas 1 and 2",
            "lambda_plus=lambda_minus=0: inactive",
            "net.head, margins 0.3 and 0.95, lambdas 1 and 1, from step 3 on",
            "net.act_body, margins 0.5 and 0.9, lambdas 0.5 and 0",
        ),
        # A problem of its own: where there are several losses, the batch's entry is no class number.
        data=Problem(KINDS["classification"].net, labelled, F.cross_entropy, serves=["classification"]),
        also=["images"],
        variants=[
            partial(TCM, "net.head", 0.95, 0.3, label_key="1", gather=False, start_step=3),
            partial(TCM, "net.act_body", lambda_plus=0.0, lambda_minus=0.5),
        ],
        invalid=[
            ({"layer": "net.body", "margin_plus": 1.01}, "margin_plus"),
            ({"layer": "net.body", "margin_plus": 0.5}, "margin_plus"),
            ({"layer": "net.body", "margin_minus": -1.01}, "margin_minus"),
            ({"layer": "net.body", "margin_minus": 1.01}, "margin_minus"),
            ({"layer": "net.body", "lambda_plus": -0.1}, "lambda_plus"),
            ({"layer": "net.body", "lambda_minus": -0.1}, "lambda_minus"),
            ({"layer": "net.body", "start_step": -1}, "start_step"),
            ({"layer": "net.body", "start_step": 0.5}, "start_step"),
            ({"layer": "net.body", "pooling": "max"}, "pooling"),
            ({"layer": "net.body", "loss": -1}, "loss"),
        ],
    ),
    MetricCase(
        make=OPIS,
        batches=BATCHES,
        expected=inconsistency,
        invalid=[
            ({"far_low": 0.0}, "far_low"),
            ({"far_low": 0.1}, "far_low"),
            ({"far_high": 1.1}, "far_high"),
            ({"num_thresholds": 1}, "num_thresholds"),
            ({"num_thresholds": 10.5}, "num_thresholds"),
            ({"sensitivity_weight": 0.0}, "sensitivity_weight"),
            ({"min_per_class": 1}, "min_per_class"),
        ],
        tolerance=2e-6,  # the distances of the range, in float32
    ),
)


# -- the loss ---------------------------------------------------------------------------------------------------------


def rows():
    embeddings = [[((7 * (i + 1) * (c + 2)) % 11 - 5.0) / 3 for c in range(3)] for i in range(8)]
    return torch.tensor(embeddings, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2, 3, 0])


OPTIONS = [(0.9, 0.5, 1.0, 1.0), (0.7, 0.2, 2.0, 0.5), (0.95, -0.3, 0.25, 3.0)]
# KevinMusgrave/pytorch-metric-learning @ 285cea0 (as in release 2.9.0), losses/tcm_loss.py,
# ThresholdConsistentMarginLoss, run on `rows()` in float64 with `OPTIONS`: loss, gradient of the first row.
LIBRARY = [
    (0.8797245376569294, [0.14485367555664674, 0.01680336097935181, 0.2056905462165345]),
    (1.2801114614382336, [0.3504065413430927, 0.09984259595629821, 0.2016001029046942]),
    (1.941907546880703, [0.17745817600045596, 0.05755378916371884, 0.06714740618231758]),
]


@pytest.mark.parametrize(("options", "library"), list(zip(OPTIONS, LIBRARY, strict=True)))
def test_equals_the_formula_in_loops_and_the_library(options, library):
    embeddings, labels = rows()
    z = embeddings.requires_grad_()
    value = tcm_loss(z, labels, *options)
    (gradient,) = torch.autograd.grad(value, z)
    assert value.item() == pytest.approx(
        hinges(embeddings, labels, *options).item(), rel=1e-12
    )  # float64 on both sides
    assert value.item() == pytest.approx(library[0], rel=1e-12)
    assert gradient[0].tolist() == pytest.approx(library[1], rel=1e-10)  # float64, sums in another order


def test_the_library_itself_if_it_is_there():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    embeddings, labels = clusters(3, 40, 6, width=8)
    for m_plus, m_minus, lambda_plus, lambda_minus in OPTIONS:
        one, two = embeddings.clone().requires_grad_(), embeddings.clone().requires_grad_()
        theirs = losses.ThresholdConsistentMarginLoss(lambda_plus, lambda_minus, m_plus, m_minus)(one, labels)
        ours = tcm_loss(two, labels, m_plus, m_minus, lambda_plus, lambda_minus)
        theirs.backward()
        ours.backward()
        assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)  # float32
        torch.testing.assert_close(two.grad, one.grad, atol=1e-6, rtol=0.0)


def four():
    return torch.tensor([[0.0, 1.0], [0.43, 0.9], [1.0, 0.0], [0.5, 0.5]]), torch.tensor([0, 0, 1, 1])


def test_the_number_of_the_library():
    # Positives: 0.9023 (satisfied) and 0.7071, so 0.9 - 0.7071. Negatives above 0.5: 0.7071 and 0.9429, so 0.3250.
    assert tcm_loss(*four()).item() == pytest.approx(0.1929 + 0.3250, abs=1e-4)


def test_pairs_that_satisfy_their_margin_change_nothing():
    embeddings, labels = four()
    wide = torch.cat([F.pad(embeddings, (0, 1)), torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.01, 1.0], [0.0, 0.0, -1.0]])])
    more = torch.cat([labels, torch.tensor([7, 7, 8])])
    one, two = embeddings.clone().requires_grad_(), wide.requires_grad_()
    few, many = tcm_loss(one, labels), tcm_loss(two, more)
    assert many.item() == pytest.approx(few.item(), abs=1e-6)
    few.backward()
    many.backward()
    torch.testing.assert_close(two.grad[:4, :2], one.grad, atol=1e-6, rtol=0.0)
    assert (two.grad[4:] == 0).all()


def test_without_hard_pairs_it_is_zero_with_a_gradient_of_zero():
    for embeddings, labels in (
        (torch.eye(3).repeat(2, 1), torch.tensor([0, 1, 2, 0, 1, 2])),
        (torch.eye(3)[:1], torch.tensor([0])),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)),
    ):
        z = embeddings.clone().requires_grad_()
        value = tcm_loss(z, labels)
        value.backward()
        assert value.item() == 0.0
        assert (z.grad == 0).all()


def test_the_last_hard_pair_has_the_whole_weight():
    z = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]] + [[0.0, 0.0, 1.0]] * 5, dtype=torch.float64)
    z.requires_grad_()
    labels = torch.tensor([0, 0] + [1] * 6)
    tcm_loss(z, labels, 0.9, 0.5).backward()
    assert z.grad[0].tolist() == pytest.approx([0.0, -0.8, 0.0])  # of -s, across the row: one pair of 28


def test_a_pair_on_its_margin_counts_as_hard():
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    # Both positives at 0.
    assert tcm_loss(z, torch.tensor([0, 0, 1, 1]), 0.0, -0.5, 1.0, 0.0).item() == 0.0
    z[1] = torch.tensor([-0.6, 0.8])
    # Positives at -0.6 and 0.
    assert tcm_loss(z, torch.tensor([0, 0, 1, 1]), 0.0, -1.0, 1.0, 0.0).item() == pytest.approx(0.3)


def test_it_is_linear_in_its_weights_and_blind_to_norms_and_order():
    z, labels = rows()
    value, twice = tcm_loss(z, labels), tcm_loss(z, labels, lambda_plus=2.0, lambda_minus=2.0)
    assert twice.item() == pytest.approx(2 * value.item())
    longer = z * torch.linspace(0.1, 9.0, 8, dtype=torch.float64)[:, None]
    assert tcm_loss(longer, labels).item() == pytest.approx(value.item())
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    assert tcm_loss(z[order], labels[order] + 10).item() == pytest.approx(value.item())


def test_gradient_is_that_of_finite_differences():
    z, labels = rows()
    assert torch.autograd.gradcheck(lambda z: tcm_loss(z, labels, 0.93, 0.17), z.requires_grad_())


def test_references_are_compared_with_all_rows():
    z, labels = rows()
    value = tcm_loss(z[:3], labels[:3], reference=z[3:], reference_labels=labels[3:])
    pairs = F.normalize(z[:3]) @ F.normalize(z[3:]).T
    same = labels[:3, None] == labels[3:]
    pulled, pushed = (0.9 - pairs)[same & (pairs <= 0.9)], (pairs - 0.5)[~same & (pairs >= 0.5)]
    assert value.item() == pytest.approx((pulled.mean() + pushed.mean()).item())


def test_half_precision_is_compared_in_float32():
    z, labels = clusters(1, 16, 3)
    for dtype in (torch.float16, torch.bfloat16):
        value = tcm_loss(z.to(dtype), labels)
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(tcm_loss(z.to(dtype).float(), labels).item(), abs=1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            assert tcm_loss(z, labels).item() == pytest.approx(tcm_loss(z, labels).item(), abs=1e-6)


def test_a_row_of_zeros_has_no_direction_and_no_gradient():
    z, labels = clusters(1, 6, 2)
    z[0] = 0.0
    z.requires_grad_()
    tcm_loss(z, labels).backward()
    assert z.grad.isfinite().all()
    assert (z.grad[0] == 0).all()


# -- the technique ----------------------------------------------------------------------------------------------------


class Plain(Classifier):
    """A loss that no function of torch makes; the term in the user's own code if it has a weight."""

    def __init__(self, weight=0.0, views=0, form="pair", **options):
        super().__init__(**options)
        self.weight, self.views, self.form = weight, views, form

    def training_step(self, batch, batch_idx):
        x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
        hidden = [self.net[0](x * (1 + 0.1 * view)) for view in range(self.views + 1)]
        with torch.no_grad():
            self.net[0](x)  # a teacher's pass
        logits = sum(self.net[1:](one) for one in hidden)
        loss = (logits.logsumexp(1) - logits.gather(1, y.reshape(-1, 1))[:, 0]).square().mean()
        if self.weight:
            loss = loss + self.weight * hinges(torch.cat(hidden), y.reshape(-1).repeat(len(hidden)), 0.9, 0.3)
        return loss


def weighted(weight=0.7, **options):
    return TCM("net.0", 0.9, 0.3, weight, weight, **options)


@pytest.mark.parametrize("views", [0, 1])
def test_it_trains_as_the_formula_in_the_users_own_code(views):
    technique, hand, plain = (Plain(weight, views, lr=0.05) for weight in (0.0, 0.7, 0.0))
    fit(technique, weighted())
    fit(hand)
    fit(plain)
    assert same_weights(technique, hand, atol=2e-6)  # float32, sums in another order
    assert not same_weights(hand, plain, atol=1e-3)


def test_labels_are_found_by_key_and_may_stand_in_a_column():
    x, y = make_tensors()

    class Named(torch.utils.data.Dataset):
        def __len__(self):
            return len(x)

        def __getitem__(self, index):
            return {"x": x[index], "y": y[index, None]}

    named, pair = Plain(), Plain()
    fit(named, weighted(label_key="y"), loader=make_loader(Named()))
    fit(pair, weighted())
    assert same_weights(named, pair)


def test_it_joins_from_its_step_on():
    late, hand = Plain(), Plain()
    fit(late, weighted(start_step=3), max_epochs=1)
    fit(hand, max_epochs=1, max_steps=3)
    hand.weight = 0.7
    fit(hand, loader=make_loader(TensorDataset(*(tensor[24:] for tensor in make_tensors()))), max_epochs=1)
    assert same_weights(late, hand, atol=1e-6)


def test_what_is_logged():
    trainer = fit(Plain(lr=0.0), TCM("net.0", 0.9, 0.3, 2.0, 3.0), max_epochs=1)
    logged = {name: float(value) for name, value in trainer.logged_metrics.items() if "tcm" in name}
    x, y = make_tensors()
    z = F.normalize(Classifier().net[0](x[24:]))
    cosines, same = (z @ z.T).tril(-1), y[24:, None] == y[24:]
    lower = torch.ones(8, 8).tril(-1).bool()
    pulled = (0.9 - cosines)[same & lower & (cosines <= 0.9)]
    pushed = (cosines - 0.3)[~same & lower & (cosines >= 0.3)]
    key = "reg/tcm_loss"
    assert logged[f"{key}/positive"] == pytest.approx(pulled.mean().item(), abs=1e-6)
    assert logged[f"{key}/negative"] == pytest.approx(pushed.mean().item(), abs=1e-6)
    assert (logged[f"{key}/hard_positives"], logged[f"{key}/hard_negatives"]) == (len(pulled), len(pushed))
    assert logged[f"{key}/term"] == pytest.approx((2 * pulled.mean() + 3 * pushed.mean()).item(), abs=1e-6)


def test_under_manual_optimization_it_joins_what_is_handed_over():
    class Manual(LossMixin, Plain):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(self.reduce_loss(super().training_step(batch, batch_idx).expand(len(batch[1]))))
            self.optimizers().step()
            self.optimizers().zero_grad()

    technique, hand = Manual(), Plain(0.7)
    fit(technique, weighted())
    fit(hand)
    assert same_weights(technique, hand, atol=2e-6)


def _data(form):
    x, y = make_tensors()
    return make_loader(TensorDataset(x, form(y)))


@pytest.mark.parametrize(
    ("form", "found"),
    [
        (lambda y: F.one_hot(y, CLASSES).float(), r"torch\.float32 \(8, 3\)"),
        (lambda y: y.double(), r"torch\.float64 \(8,\)"),
        (lambda y: F.one_hot(y, CLASSES), r"torch\.int64 \(8, 3\)"),
    ],
)
@pytest.mark.parametrize("start_step", [0, 100])
def test_labels_that_are_no_class_numbers_are_refused_in_the_first_step(form, found, start_step):
    model = Classifier(step=lambda module, batch: module(batch[0]).square().mean())
    wanted = rf"TCM\(label_key='1'\) must name a class number for each sample, whole numbers \(B,\), found {found}"
    with pytest.raises(MisconfigurationException, match=wanted):
        fit(model, weighted(start_step=start_step), loader=_data(form))
    assert model.trainer.global_step == 0


def test_an_entry_that_is_not_there_and_layers_of_no_use_are_refused():
    with pytest.raises(MisconfigurationException, match=r"TCM: label_key='labels' names nothing in the batch"):
        fit(Classifier(), weighted(label_key="labels"))
    with pytest.raises(MisconfigurationException, match=r"net\.00"):
        fit(Classifier(), TCM("net.00"))
    message = r"TCM: layer 'net\.0' gave {} in this step, where a trained embedding {} of each of 8 labels"

    def twice_as_many(module, batch):
        return module(batch[0].repeat(2, 1)).square().mean()

    with pytest.raises(MisconfigurationException, match=message.format(r"\(16, 8\)", r"\(B, D\)")):
        fit(Classifier(twice_as_many), weighted())
    frozen = Classifier()
    frozen.net[0].requires_grad_(False)
    with pytest.raises(MisconfigurationException, match=message.format(r"\(8, 8\) without gradient", r"\(B, D\)")):
        fit(frozen, weighted())
    pooled = message.format(r"\(8, 8\)", r"\(B, T, D\) for pooling='first'")
    with pytest.raises(MisconfigurationException, match=pooled):
        fit(Classifier(), weighted(pooling="first"))
    by_head = Classifier(step=lambda module, batch: module.net[1:](batch[0] @ module.net[0].weight.T).square().mean())
    with pytest.raises(MisconfigurationException, match=message.format("no tensor", r"\(B, D\)")):
        fit(by_head, weighted())


def test_a_loss_of_pytorch_metric_learning_is_served():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    contrast = losses.MultiSimilarityLoss()

    class Metric(Classifier):
        def __init__(self, weight=0.0):
            super().__init__(lr=0.05)
            self.weight = weight

        def training_step(self, batch, batch_idx):
            embeddings = self(batch[0])
            term = hinges(embeddings, batch[1], 0.9, 0.3) if self.weight else 0.0
            return {"loss": contrast(embeddings, batch[1]) + self.weight * term}

    technique, hand = Metric(), Metric(0.7)
    fit(technique, TCM("net.3", 0.9, 0.3, 0.7, 0.7))
    fit(hand)
    assert same_weights(technique, hand, atol=2e-6)


@pytest.mark.parametrize(("pooling", "pooled"), [("first", lambda h: h[:, 0]), ("mean", lambda h: h.mean(1))])
def test_a_vision_transformer_with_a_loss_of_its_own(pooling, pooled):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        num_labels=CLASSES,
    )  # fmt: skip

    class Vision(Classifier):
        def __init__(self, weight=0.0):
            super().__init__(lr=1.0)
            self.weight = weight
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.net = transformers.ViTForImageClassification(config)

        def training_step(self, batch, batch_idx):
            seen = []
            handle = self.net.vit.layernorm.register_forward_hook(lambda layer, args, output: seen.append(output))
            output = self.net(**batch)
            handle.remove()
            term = hinges(pooled(seen[0]), batch["labels"], 0.9, 0.3) if self.weight else 0.0
            return output.loss + self.weight * term

    images = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return 16

        def __getitem__(self, index):
            return {"pixel_values": images[index], "labels": make_tensors()[1][index]}

    technique, hand, plain = Vision(), Vision(0.7), Vision()
    tcm = TCM("net.vit.layernorm", 0.9, 0.3, 0.7, 0.7, label_key="labels", pooling=pooling)
    for model, callbacks in ((technique, [tcm]), (hand, []), (plain, [])):
        fit(model, *callbacks, loader=make_loader(Images()))
    assert same_weights(technique, hand, atol=1e-5)  # through the layer norm, whose gradient is large
    assert not same_weights(hand, plain, atol=1e-3)


# -- several ranks ----------------------------------------------------------------------------------------------------


def loss_on_rank(first, capacity, labels):
    import torch.distributed as dist

    mine = slice(0, first) if dist.get_rank() == 0 else slice(first, 8)
    theta = torch.eye(3, dtype=torch.float64).add(0.3).requires_grad_()
    values = []
    for dtype in (torch.float32, torch.float64):
        z = (rows()[0][mine] @ theta).to(dtype)
        group = {"group": dist.group.WORLD, "capacity": capacity}
        values.append(tcm_loss(z, labels[mine], 0.8, 0.2, 2.0, 0.5, **group))
    values[1].backward()
    return values[0].item(), values[1].item(), theta.grad


@pytest.mark.parametrize(("first", "capacity"), [(4, 8), (3, None), (8, 8)])
def test_the_mean_over_ranks_is_the_loss_of_all_rows_and_so_are_the_gradients(two_processes, first, capacity):
    labels = rows()[1] + 2**40 - 1  # float32 tells none of these from another
    labels[6] = -1
    theta = torch.eye(3, dtype=torch.float64).add(0.3).requires_grad_()
    value = tcm_loss(rows()[0] @ theta, labels, 0.8, 0.2, 2.0, 0.5)
    value.backward()
    (narrow, one, one_gradient), (narrow_too, two, two_gradient) = two_processes.run(
        loss_on_rank, first, capacity, labels
    )
    assert (one + two) / 2 == pytest.approx(value.item(), rel=1e-12)  # float64, sums in another order
    assert (narrow + narrow_too) / 2 == pytest.approx(value.item(), rel=1e-6)
    torch.testing.assert_close((one_gradient + two_gradient) / 2, theta.grad, rtol=1e-10, atol=1e-12)


def train_on_rank(tcm):
    import torch.distributed as dist

    # 6 and 5 samples in batches of 4: the last batches have 2 and 1.
    part = slice(0, 6) if dist.get_rank() == 0 else slice(6, 11)
    data = TensorDataset(*(tensor[part] for tensor in make_tensors()))
    model = Plain()
    fit(model, tcm, loader=DataLoader(data, 4), use_distributed_sampler=False, **TWO_RANKS)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("gather", [True, False])
def test_ranks_with_unequal_batches_train_as_one_process(two_processes, gather):
    one, two = two_processes.run(train_on_rank, weighted(gather=gather))
    model, (x, y) = Plain(), make_tensors()
    optimizer = model.configure_optimizers()
    for _ in range(2):
        for batches in ((slice(0, 4), slice(6, 10)), (slice(4, 6), slice(10, 11))):
            hidden, labels = [model.net[0](x[part]) for part in batches], [y[part] for part in batches]
            joined = [(torch.cat(hidden), torch.cat(labels))] if gather else list(zip(hidden, labels, strict=True))
            terms = [hinges(z, t, 0.9, 0.3) for z, t in joined]
            losses = [model.training_step((x[part], y[part]), 0) for part in batches]
            optimizer.zero_grad()
            (sum(losses) / 2 + 0.7 * sum(terms) / len(terms)).backward()
            optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(one[name], value, atol=1e-6, rtol=1e-5)
        assert torch.equal(one[name], two[name])


# -- OPIS -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entries", [2**22, 50])  # all pairs in one block; a row or two in each
@pytest.mark.parametrize(
    "options", [{}, {"far_low": 0.05, "far_high": 0.5, "num_thresholds": 51, "sensitivity_weight": 2.0}]
)
def test_opis_is_that_of_all_pairs_in_a_list(monkeypatch, entries, options):
    monkeypatch.setattr(_pairs, "_ENTRIES", entries)
    embeddings, labels = clusters()
    names = {"far_low": "low", "far_high": "high", "num_thresholds": "count", "sensitivity_weight": "c"}
    batch = {"embeddings": embeddings, "labels": labels}
    expected = inconsistency([batch], **{names[name]: value for name, value in options.items()})
    found = opis(embeddings, labels, **options)
    assert expected["opis"] > 0.01
    assert found.opis.item() == pytest.approx(expected["opis"], abs=1e-9)
    assert found.recall_at_1.item() == pytest.approx(expected["recall_at_1"])
    assert found.thresholds[[0, -1]].tolist() == pytest.approx([expected["low"], expected["high"]], abs=1e-6)
    assert len(found.thresholds) == options.get("num_thresholds", 101)


def test_a_class_of_few_rows_does_not_count_but_its_rows_do():
    embeddings, labels = clusters()
    labels[:3] = torch.tensor([11, 12, 12])
    batch = {"embeddings": embeddings, "labels": labels}
    for least in (2, 3):
        expected = inconsistency([batch], least=least)
        found = opis(embeddings, labels, min_per_class=least)
        assert found.opis.item() == pytest.approx(expected["opis"], abs=1e-9)
        assert found.recall_at_1.item() == pytest.approx(expected["recall_at_1"])
        assert found.excluded == expected["excluded"] >= least - 1
        assert found.utilities.shape == (len(found.classes), 101)
        assert not {11} & set(found.classes.tolist())


def test_classes_that_are_turns_of_one_another_have_none():
    # Four classes a quarter of a turn apart; float64 cosines of turned rows are equal, so are the counts.
    angles = torch.tensor([0.0, 0.11, 0.37, 0.9], dtype=torch.float64)
    points = torch.stack([angles.cos(), angles.sin()], 1)
    turned = torch.cat(
        [points, points.flip(1) * torch.tensor([-1, 1]), -points, points.flip(1) * torch.tensor([1, -1])]
    )
    labels = torch.arange(4).repeat_interleave(4)
    found = opis(turned, labels, 0.043, 0.387)
    assert found.opis.item() == pytest.approx(0.0, abs=1e-12)
    assert found.utilities.min() < 1
    renamed = opis(turned, torch.tensor([7, -3, 2**40, 0])[labels], 0.043, 0.387)
    torch.testing.assert_close(renamed.opis, found.opis, atol=1e-12, rtol=0.0)


def test_labels_and_rows_in_any_order_give_the_same():
    embeddings, labels = clusters()
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    found = opis(embeddings[order], torch.tensor([4, 9, -1, 0, 2**40])[labels[order]])
    assert found.opis.item() == pytest.approx(opis(embeddings, labels).opis.item(), abs=1e-12)


def test_where_the_range_is_not_known_it_is_nan():
    embeddings, labels = clusters()
    for z, y in (
        (embeddings[:8], labels[:8]),  # less than 100 pairs of two classes
        (embeddings, torch.zeros_like(labels)),
        (embeddings, torch.arange(30)),
        (embeddings[:0], labels[:0]),
    ):
        metric = OPIS()
        metric.update(z, y)
        assert metric.compute()["opis"].isnan()


def test_collapsed_embeddings_are_no_success():
    found = opis(torch.ones(30, 4), clusters()[1])
    assert found.recall_at_1 == 0.0  # every other row is as near
    assert found.opis == 0.0


def test_opis_refuses_labels_that_do_not_fit():
    embeddings, labels = clusters()
    for wrong in (labels[:-1], labels.float(), labels[:, None]):
        with pytest.raises(ValueError, match=r"^OPIS: `labels` must be class numbers \(B,\), one for each of 30"):
            OPIS().update(embeddings, wrong)


class Largest(TorchDispatchMode):
    """Most numbers of a tensor that was made."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else [output]:
            self.size = max(self.size, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
        return output


def test_there_is_never_a_table_of_all_pairs(monkeypatch):
    monkeypatch.setattr(_pairs, "_ENTRIES", 2**12)
    embeddings, labels = clusters(0, 1500, 7, noise=1.5)
    with Largest() as made:
        found = opis(embeddings, labels)
    assert found.opis > 0
    assert made.size <= 4 * 2**16  # the counts by bits; the table has 2.25 million


def test_it_is_logged_by_a_module():
    class Evaluated(Classifier):
        def __init__(self):
            super().__init__()
            self.opis = OPIS(far_low=0.05, far_high=0.3)

        def validation_step(self, batch, batch_idx):
            self.opis.update(self.net[0](batch[0]), batch[1])

        def on_validation_epoch_end(self):
            self.log_dict(self.opis.compute())
            self.opis.reset()

    model = Evaluated()
    trainer = make_trainer()
    trainer.validate(model, make_loader(), verbose=False)
    x, y = make_tensors()
    expected = inconsistency([{"embeddings": model.net[0](x).detach(), "labels": y}], 0.05, 0.3)
    assert trainer.callback_metrics["opis"].item() == pytest.approx(expected["opis"], abs=1e-6)
