"""The loss call: samples, weights and terms under every reduction, against loops over the elements in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.loss.call import LossCall, loss_call
from lightning_reg.engine.loss.call_by_hand import call_by_hand
from lightning_reg.engine.loss.elements import LOSS_FUNCTIONS
from lightning_reg.engine.step import Samples

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")  # torch's advice on kl_div
G = torch.Generator().manual_seed(1)
REDUCTIONS = ("mean", "sum", "none")


class Step:
    """What a loss call asks of its step."""

    def __init__(self, batch_size: int | None = None, indices: tuple[int, ...] = (), batch: object = ()) -> None:
        self.batch_sizes = () if batch_size is None else (batch_size,)
        self.batch = batch
        self.indices = torch.tensor(indices)

    def may_have(self, rows: int) -> bool:
        return False

    def samples(self, technique: object, device: torch.device, given: Tensor | None = None) -> Samples:
        return Samples((self.indices if given is None else given).to(device), True, 4, 10)


class Reader:
    """A technique, as far as a message names it."""


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=G)


def unit(*shape: int) -> Tensor:
    return torch.rand(shape, generator=G) * 0.8 + 0.1


def classes(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=G)


def signs(*shape: int) -> Tensor:
    return torch.randint(2, shape, generator=G) * 2.0 - 1


CTC = {"input_lengths": torch.full((4,), 8), "target_lengths": torch.tensor([3, 1, 2, 3])}
# Of each function one call of four samples.
CALLS = {
    "cross_entropy": (normal(4, 5), classes(5, 4)),
    "nll_loss": (normal(4, 5).log_softmax(1), classes(5, 4), unit(5)),
    "binary_cross_entropy": (unit(4, 3), unit(4, 3)),
    "binary_cross_entropy_with_logits": (normal(4, 3), unit(4, 3)),
    "mse_loss": (normal(4, 3), normal(4, 3)),
    "l1_loss": (normal(4), normal(4)),
    "smooth_l1_loss": (normal(4, 3), normal(4, 3)),
    "huber_loss": (normal(4, 3), normal(4, 3)),
    "kl_div": (normal(4, 5).log_softmax(1), normal(4, 5).softmax(1)),
    "poisson_nll_loss": (normal(4), unit(4)),
    "gaussian_nll_loss": (normal(4, 3), normal(4, 3), unit(4, 3)),
    "soft_margin_loss": (normal(4, 3), signs(4, 3)),
    "multilabel_margin_loss": (normal(4, 3), torch.tensor([[2, 0, -1], [1, -1, 0], [0, 1, 2], [0, -1, -1]])),
    "multilabel_soft_margin_loss": (normal(4, 3), unit(4, 3)),
    "multi_margin_loss": (normal(4, 5), classes(5, 4)),
    "margin_ranking_loss": (normal(4), normal(4), signs(4)),
    "hinge_embedding_loss": (unit(4, 3), signs(4, 3)),
    "cosine_embedding_loss": (normal(4, 3), normal(4, 3), signs(4)),
    "triplet_margin_loss": (normal(4, 3), normal(4, 3), normal(4, 3)),
    "triplet_margin_with_distance_loss": (normal(4, 3), normal(4, 3), normal(4, 3)),
    "ctc_loss": (normal(8, 4, 5).log_softmax(2), classes(4, 4, 3) + 1, *CTC.values()),
    "linear_cross_entropy": (normal(4, 3), normal(5, 3), classes(5, 4)),
}
ROWS = {f for f, (x, *_) in CALLS.items() if x.dim() == 1} | {
    "cross_entropy",
    "linear_cross_entropy",
    "nll_loss",
    "multilabel_margin_loss",
    "multilabel_soft_margin_loss",
    "multi_margin_loss",
    "cosine_embedding_loss",
    "triplet_margin_loss",
    "triplet_margin_with_distance_loss",
    "ctc_loss",
}
PRESENT = {function.__name__: function for function in LOSS_FUNCTIONS}  # older torch has fewer
WEIGHTS = torch.tensor([0.5, 2.0, 0.0, 1.5])


def unflattened(rows: Tensor, batch_size: int | None) -> list[Tensor]:
    """A batch of which the rows are the entry, flattened sample after sample."""
    fits = batch_size and rows.dim() and len(rows) % batch_size == 0
    return [rows.view(batch_size, -1, *rows.shape[1:])] if fits else []


def call_of(name: str, *args: Tensor, batch_size: int | None = None, indices=(), site: str = "", **options) -> LossCall:
    """The call with a first argument that wants a gradient."""
    first, *others = args or CALLS[name]
    values = (first.clone().requires_grad_(), *others)
    arguments = dict(zip(LOSS_FUNCTIONS[PRESENT[name]], values, strict=False)) | options
    batch = unflattened(others[0], batch_size)
    return loss_call(PRESENT[name], arguments, Step(batch_size, indices, batch), site)


def gradient(value: Tensor, call: LossCall) -> Tensor:
    return torch.autograd.grad(value.sum(), call.input)[0]


# A classification of 3 samples in every form: (logits, target, batch size in the stub, sample of each element).
ELEMENTS = {
    "row": (normal(3, 4), torch.tensor([1, -100, 3]), 3),
    "row of unknown batch": (normal(3, 4), torch.tensor([1, 0, 3]), None),
    "map": (normal(3, 4, 2, 2), torch.tensor([[[1, -100], [0, 2]], [[-100] * 2] * 2, [[3, 3], [1, 0]]]), 3),
    "tokens": (normal(3, 4, 3), torch.tensor([[1, -100, 0], [2, 3, 3], [-100, -100, 1]]), 3),
    "sequence": (normal(9, 4), torch.tensor([1, 0, 2, -100, -100, -100, 3, -100, 2]), 3),
}
OPTIONS = {
    "": {},
    "class weights": {"weight": torch.tensor([0.5, 2.0, 1.0, 0.25])},
    "smoothing": {"label_smoothing": 0.2},
    "both": {"weight": torch.tensor([0.5, 2.0, 1.0, 0.25]), "label_smoothing": 0.2},
}


def elements_by_hand(form: str, options: dict) -> tuple[list[list[float]], list[list[float]]]:
    """Losses and masses of the elements of each sample, from the formulas in torch's CrossEntropyLoss."""
    logits, target, batch_size = ELEMENTS[form]
    scores = logits.double().movedim(1, -1).reshape(-1, 4).tolist()
    labels, smoothing = target.flatten().tolist(), options.get("label_smoothing", 0.0)
    class_weights = options.get("weight", torch.ones(4)).double().tolist()
    found, mass = [], []
    for row, label in zip(scores, labels, strict=True):
        log_probs = [s - math.log(sum(map(math.exp, row))) for s in row]
        spread = -sum(w * p for w, p in zip(class_weights, log_probs, strict=True)) / 4
        counts = label != -100
        mass.append(class_weights[label] if counts else 0.0)
        found.append((smoothing - 1) * mass[-1] * log_probs[label] + smoothing * spread if counts else 0.0)
    per_sample = len(labels) // (batch_size or len(labels))
    parts = range(0, len(labels), per_sample)
    return [found[i : i + per_sample] for i in parts], [mass[i : i + per_sample] for i in parts]


def classification(form: str, options: dict, reduction: str = "mean") -> LossCall:
    logits, target, batch_size = ELEMENTS[form]
    return call_of("cross_entropy", logits, target, batch_size=batch_size, reduction=reduction, **options)


every_form = pytest.mark.parametrize("form", ELEMENTS)
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
every_function = pytest.mark.parametrize("name", [name for name in CALLS if name in PRESENT])


# -- samples ----------------------------------------------------------------------------------------------------------


def test_the_calls_cover_every_function():
    assert set(PRESENT) <= set(CALLS)


@every_function
def test_four_samples_of_the_function_are_rows_or_maps(name):
    call = call_of(name, batch_size=4)
    assert (call.name, call.batch_size) == (name, 4)
    assert call.kind == ("row" if name in ROWS else "map")


@pytest.mark.parametrize(
    ("form", "kind"),
    [("row", "row"), ("row of unknown batch", "row"), ("map", "map"), ("tokens", "map"), ("sequence", "sequence")],
)
def test_kind_of_a_classification(form, kind):
    call = classification(form, {})
    assert (call.kind, call.batch_size) == (kind, 3)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("cross_entropy", (normal(4), torch.tensor(1))),
        ("nll_loss", (normal(4), torch.tensor(1))),
        ("mse_loss", (torch.tensor(1.0), torch.tensor(2.0))),
        ("ctc_loss", (normal(8, 5).log_softmax(1), torch.tensor([1, 2]), torch.tensor(8), torch.tensor(2))),
        pytest.param(
            "linear_cross_entropy",
            (normal(3), normal(5, 3), torch.tensor(1)),
        ),
    ],
)
def test_a_single_sample_without_batch_dimension(name, args):
    if name not in PRESENT:
        pytest.skip(f"this torch has no F.{name}")
    call = call_of(name, *args, batch_size=1, reduction="sum")
    assert (call.batch_size, call.kind) == (1, "row")
    assert torch.equal(call.value(torch.ones(1), []), call.plain)


def test_rows_that_are_no_multiple_are_refused():
    with pytest.raises(MisconfigurationException) as raised:
        _ = call_of("cross_entropy", normal(7, 4), classes(4, 7), batch_size=3, site="model.py:42").batch_size
    assert str(raised.value) == (
        "F.cross_entropy((7, 4), (7,), reduction='mean') at model.py:42 has 7 rows, which is no multiple of the batch"
        " size 3: there is no loss per sample. Choose another call with `loss=...`, or write the loss with"
        " `LossMixin.reduce_loss`."
    )


@every_option
@every_form
def test_losses_and_masses_of_the_samples(form, options):
    call, (elements, masses) = classification(form, options), elements_by_hand(form, options)
    expected = [sum(e) / sum(m) if sum(m) else 0.0 for e, m in zip(elements, masses, strict=True)]
    assert call.losses.tolist() == pytest.approx(expected, rel=1e-5)  # float32 log-softmax against float64
    assert call.sample_mass.tolist() == pytest.approx([sum(m) for m in masses], rel=1e-6)  # float32 sums
    assert not call.losses.requires_grad
    assert call.losses.dtype == torch.float32


@every_option
@every_form
def test_losses_and_masses_of_the_elements(form, options):
    call, (elements, masses) = classification(form, options), elements_by_hand(form, options)
    pairs = [(e, m) for es, ms in zip(elements, masses, strict=True) for e, m in zip(es, ms, strict=True)]
    assert call.element_losses.tolist() == pytest.approx([e / m if m else 0.0 for e, m in pairs], rel=1e-5)
    assert call.element_mass.tolist() == pytest.approx([m for _, m in pairs], rel=1e-6)


def test_losses_of_outputs_are_their_mean():
    call = call_of("l1_loss", torch.tensor([[1.0, 3.0], [0.0, 8.0]]), torch.zeros(2, 2), batch_size=2)
    assert call.losses.tolist() == [2.0, 4.0]
    assert call.element_losses.tolist() == [1.0, 3.0, 0.0, 8.0]
    assert (call.sample_mass, call.element_mass) == (None, None)


def test_samples_are_read_from_the_step():
    samples = call_of("cross_entropy", batch_size=4, indices=(7, 1, 2, 5)).samples(Reader())
    assert samples.indices.tolist() == [7, 1, 2, 5]
    assert samples[1:] == (True, 4, 10)


def test_another_number_of_indices_is_refused():
    with pytest.raises(MisconfigurationException) as raised:
        call_of("cross_entropy", batch_size=4, indices=(7, 1)).samples(Reader())
    assert str(raised.value) == (
        "F.cross_entropy((4, 5), (4,), reduction='mean') has 4 samples but the batch was made of 2 dataset indices"
        " (samples dropped or added by collate_fn or in training_step?). Say which entry of the batch holds the index"
        ' of each sample: `Reader(index_key="...")`.'
    )


# -- the value --------------------------------------------------------------------------------------------------------


@every_reduction
@every_function
def test_nothing_asked_is_the_plain_value(name, reduction):
    call = call_of(name, reduction=reduction)
    expected = call.function(**call.arguments)
    assert torch.equal(call.value(None, []), expected)
    assert not call.evaluation.is_taken_apart  # nobody asked for elements, so none are computed
    assert torch.equal(gradient(call.value(None, []), call), gradient(expected, call))


def test_the_plain_value_is_not_computed_again_after_the_elements():
    call = call_of("cross_entropy")
    assert call.plain is not call.decomposition.plain
    call = call.with_target(call.target)
    assert call.decomposition.plain is call.plain


@every_reduction
@every_function
def test_weights_of_one_are_the_plain_value(name, reduction):
    call = call_of(name, reduction=reduction)
    plain, value = call.function(**call.arguments), call.value(torch.ones(4), [])
    assert torch.equal(value, plain)
    # Two float32 paths through the same derivative.
    torch.testing.assert_close(gradient(value, call), gradient(plain, call), rtol=1e-5, atol=1e-6)


@every_reduction
@every_option
@every_form
def test_weights_of_one_are_the_plain_value_of_a_classification(form, options, reduction):
    call = classification(form, options, reduction)
    plain, value = call.function(**call.arguments), call.value(torch.ones(3), [])
    assert torch.equal(value, plain)
    torch.testing.assert_close(gradient(value, call), gradient(plain, call), rtol=1e-5, atol=1e-6)  # as above


def test_weights_of_one_under_batchmean():
    call = call_of("kl_div", reduction="batchmean")
    assert torch.equal(call.value(torch.ones(4), []), call.plain)


def test_weights_of_one_are_the_plain_value_in_half_precision():
    call = call_of("mse_loss", torch.full((8192,), 3.0).half(), torch.zeros(8192).half())
    assert torch.equal(call.value(torch.ones(8192), []), call.plain)


def test_weights_of_one_keep_an_infinite_value():
    call = call_of("cross_entropy", torch.tensor([[0.0, -math.inf], [1.0, 2.0]]), torch.tensor([1, 0]))
    assert torch.equal(call.value(torch.ones(2), []), call.plain)


@every_reduction
@every_function
def test_weighted_value_of_every_function(name, reduction):
    call = call_of(name, reduction=reduction)
    arguments = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in call.arguments.items()
    }
    elements = call.function(**{**arguments, "reduction": "none"}).reshape(4, -1).tolist()
    if name == "ctc_loss" and reduction == "mean":
        elements = [[e / n for e in row] for row, n in zip(elements, (3, 1, 2, 3), strict=True)]
    mass = [len(row) for row in elements]
    if name == "nll_loss":
        mass = call.arguments["weight"].double()[call.arguments["target"]].tolist()
    expected = [w * e for w, row in zip(WEIGHTS.tolist(), elements, strict=True) for e in row]
    value = call.value(WEIGHTS, [])
    if reduction != "none":
        expected = [sum(expected) / (sum(mass) if reduction == "mean" else 1)]
        assert value.shape == ()
    # float32 against float64, relative to numbers near 1.
    assert value.flatten().tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_weighted_batchmean():
    call = call_of("kl_div", normal(4, 2, 3).log_softmax(1), normal(4, 2, 3).softmax(1), reduction="batchmean")
    rows = F.kl_div(call.input.double(), call.target.double(), reduction="none").sum((1, 2)).tolist()
    expected = sum(w * r for w, r in zip(WEIGHTS.tolist(), rows, strict=True)) / 4
    assert call.value(WEIGHTS, []).item() == pytest.approx(expected, rel=1e-5)  # float32 against float64


@every_reduction
@every_option
@every_form
def test_weighted_value_of_a_classification(form, options, reduction):
    elements, masses = elements_by_hand(form, options)
    weights = [0.5, 3.0, 1.25]
    expected = [w * e for w, row in zip(weights, elements, strict=True) for e in row]
    if reduction != "none":
        expected = [sum(expected) / (sum(map(sum, masses)) if reduction == "mean" else 1)]
    value = classification(form, options, reduction).value(torch.tensor(weights), [])
    assert value.shape == (() if reduction != "none" else ELEMENTS[form][1].shape)
    assert value.flatten().tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)  # float32 against float64


@every_option
@every_form
def test_gradient_of_the_weighted_mean(form, options):
    call = classification(form, options)
    logits, target, _ = ELEMENTS[form]
    weights, mass = [0.5, 3.0, 1.25], [sum(m) for m in elements_by_hand(form, options)[1]]
    expected, per_sample = torch.zeros_like(logits, dtype=torch.float64), len(logits) // 3
    for i in (i for i in range(3) if mass[i]):  # an ignored sample has no gradient, and torch no mean of it
        x = logits.double()[i * per_sample : (i + 1) * per_sample].requires_grad_()
        double = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
        loss = F.cross_entropy(x, target[i * per_sample : (i + 1) * per_sample], **double)
        expected[i * per_sample : (i + 1) * per_sample] = (
            torch.autograd.grad(loss, x)[0] * weights[i] * mass[i] / sum(mass)
        )
    weights = torch.tensor(weights, requires_grad=True)
    value = call.value(weights, [])
    # float32 backward against float64.
    torch.testing.assert_close(gradient(value, call).double(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.autograd.grad(value, weights, allow_unused=True)[0]  # weights carry no gradient


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@every_option
@every_form
def test_terms_join_the_elements_that_count(form, options, reduction, scalar):
    masses = [sum(m) for m in elements_by_hand(form, options)[1]]
    terms = [0.5] * 3 if scalar else [2.0, -1.0, 0.25]
    expected = sum(n * r for n, r in zip(masses, terms, strict=True)) / (sum(masses) if reduction == "mean" else 1)
    call = classification(form, options, reduction)
    added = call.value(None, [torch.tensor(0.5 if scalar else terms)]) - call.plain
    assert added.item() == pytest.approx(expected, rel=1e-5, abs=1e-5)  # float32 sums of numbers near 10


@pytest.mark.parametrize("term", [torch.tensor(0.5), torch.tensor([2.0, -1.0, 0.25, 8.0])])
@pytest.mark.parametrize(
    ("name", "reduction"),
    [("kl_div", "batchmean"), *((name, reduction) for name in ("kl_div", "l1_loss") for reduction in REDUCTIONS)],
)
def test_terms_where_every_element_counts_the_same(name, reduction, term):
    call = call_of(name, reduction=reduction, batch_size=4)
    elements = 5 if name == "kl_div" else 1  # per sample
    rows = [r for r in term.expand(4).tolist() for _ in range(elements)]
    expected = {"mean": [sum(rows) / len(rows)], "sum": [sum(rows)], "none": rows}
    added = call.value(None, [term]) - call.plain
    # One float32 rounding of numbers near 50.
    assert added.flatten().tolist() == pytest.approx(expected.get(reduction, expected["mean"]), abs=1e-5)


def test_terms_of_a_flattened_sequence_go_to_its_rows():
    call = call_of("l1_loss", torch.zeros(6), torch.zeros(6), batch_size=3, reduction="none")
    assert call.value(None, [torch.tensor([1.0, 2.0, 3.0])]).tolist() == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]


@pytest.mark.parametrize("term", [torch.tensor(0.5), torch.tensor([2.0, -1.0, 0.25])])
@pytest.mark.parametrize("form", ["row", "map", "tokens", "sequence"])
def test_terms_of_none_sum_up_to_those_of_sum(form, term):
    options = OPTIONS["class weights"]
    by_sum, by_none = (classification(form, options, r).value(None, [term]).sum().item() for r in ("sum", "none"))
    assert by_none == pytest.approx(by_sum, rel=1e-5)  # float32 sums in another order


def test_weights_and_several_terms_add_up_in_order():
    call = call_of("l1_loss", torch.tensor([1.0, 2.0]), torch.zeros(2), reduction="none")
    value = call.value(torch.tensor([3.0, 0.5]), [torch.tensor([10.0, 20.0]), torch.tensor(100.0)])
    assert value.tolist() == [113.0, 121.0]


def test_a_term_carries_its_gradient():
    scale = torch.tensor(2.0, requires_grad=True)
    call = call_of("cross_entropy", normal(2, 3), torch.tensor([-100, 1]))
    (slope,) = torch.autograd.grad(call.value(None, [scale * torch.tensor([5.0, 7.0])]), scale)
    assert slope.item() == 7.0


def test_a_term_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"^A term must have shape \(\) or \(4,\), got \(3,\)\.$"):
        call_of("cross_entropy").value(None, [torch.zeros(3)])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weights_per_element_and_their_product_with_weights_per_sample(reduction):
    call = call_of("mse_loss", normal(4, 3), normal(4, 3), reduction=reduction)
    each = torch.arange(12) / 4
    elements = call.decomposition.elements.flatten() * each
    wanted = {"mean": elements.mean(), "sum": elements.sum(), "none": elements.reshape(4, 3)}[reduction]
    torch.testing.assert_close(call.value(each, []), wanted)
    both = WEIGHTS[:, None].expand(4, 3).flatten() * each
    torch.testing.assert_close(call.combined(WEIGHTS, each), both)
    torch.testing.assert_close(call.combined(each, WEIGHTS), both)
    assert call.combined(None, each) is each
    assert torch.equal(call.combined(WEIGHTS, WEIGHTS), WEIGHTS * WEIGHTS)
    hand = call_by_hand(normal(3), None, None, None, Step(3))
    assert (hand.element_losses.tolist(), hand.element_mass) == (hand.input.tolist(), None)


def test_weights_keep_the_type_of_the_loss_and_are_not_rounded_to_it():
    call = call_of("mse_loss", torch.ones(384).bfloat16(), torch.zeros(384).bfloat16(), reduction="sum")
    weights = torch.full((384,), 1.0035)  # rounded to bfloat16 it is 1, and the sum 384
    assert call.value(weights, []).item() == 386.0  # 385.3 in bfloat16
    for reduction in REDUCTIONS:
        call = call_of("mse_loss", normal(4, 3).bfloat16(), normal(4, 3).bfloat16(), reduction=reduction)
        assert call.value(WEIGHTS, []).dtype == torch.bfloat16


# -- targets, logits, labels ------------------------------------------------------------------------------------------


def test_replaced_targets_are_what_counts():
    logits, old, new = normal(4, 5), torch.tensor([0, -100, 2, 3]), torch.tensor([1, 1, -100, 0])
    call = call_of("cross_entropy", logits, old, batch_size=4)
    before = (call.plain, call.losses, call.sample_mass, call.decomposition, call.batch_size)
    given, call = call, call.with_target(new)
    assert given.target is old
    after = call_of("cross_entropy", logits, new, batch_size=4)
    assert torch.equal(call.plain, after.plain)
    assert not torch.equal(call.plain, before[0])
    assert torch.equal(call.losses, after.losses)
    assert call.sample_mass.tolist() == [1.0, 1.0, 0.0, 1.0]
    assert torch.equal(call.decomposition.elements, after.decomposition.elements)
    assert torch.equal(call.value(WEIGHTS, []), after.value(WEIGHTS, []))
    assert call.target is new
    assert call.given_target is old
    assert call.labels.tolist() == [0, -100, 2, 3]  # as given


def test_replacing_the_target_leaves_the_users_arguments_alone():
    arguments = {"input": normal(2, 3), "target": torch.tensor([0, 1])}
    loss_call(F.cross_entropy, arguments, Step()).with_target(torch.tensor([2, 2]))
    assert arguments["target"].tolist() == [0, 1]


def test_a_loss_without_target_cannot_have_it_replaced():
    call = call_of("triplet_margin_loss")
    assert call.target is None
    with pytest.raises(MisconfigurationException) as raised:
        call.with_target(torch.zeros(4))
    assert str(raised.value) == (
        "F.triplet_margin_loss((4, 3), (4, 3), (4, 3), reduction='mean') has no target that could be replaced."
    )
    with pytest.raises(MisconfigurationException, match=r"reduction='mean'\) has no labels\.$"):
        _ = call.labels


@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
def test_logits_and_labels_of_a_classification(name):
    call = call_of(name, batch_size=4)
    assert call.logits is call.input
    assert call.labels is call.target


def test_labels_of_probabilities_are_the_largest():
    target = torch.tensor([[0.2, 0.7, 0.1], [0.5, 0.1, 0.4]])
    assert call_of("cross_entropy", normal(2, 3), target).labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            call_of("mse_loss", normal(4, 3), normal(4, 3), site="m.py:1"),
            "F.mse_loss((4, 3), (4, 3), reduction='mean') at m.py:1 has no class logits: a technique needs a"
            " single-label classification loss (F.cross_entropy or F.nll_loss). If there is one too, choose it with"
            " `loss='cross_entropy'`.",
        ),
        (
            classification("map", {}),
            "F.cross_entropy((3, 4, 2, 2), (3, 2, 2), reduction='mean') is a prediction per pixel or per position; a"
            " technique needs one per sample, logits of shape (B, C). Segmentation and token classification are not"
            " supported by it.",
        ),
        (
            classification("sequence", {}),
            "F.cross_entropy((9, 4), (9,), reduction='mean') has 9 rows for a batch of 3 samples (sequences flattened"
            " to tokens?); a technique needs one row of logits per sample.",
        ),
    ],
)
def test_logits_are_refused_where_there_are_none(call, sentence):
    with pytest.raises(MisconfigurationException) as raised:
        _ = call.logits
    assert str(raised.value) == sentence


def test_arguments_by_name_in_any_order():
    logits, target = normal(4, 5), classes(5, 4)
    call = loss_call(F.cross_entropy, {"target": target, "input": logits}, Step(4))
    assert call.input is logits


# -- losses written by hand -------------------------------------------------------------------------------------------


def by_hand(step: Step | None = None, **given) -> LossCall:
    given = {"logits": None, "targets": None, "indices": None} | given
    return call_by_hand(torch.tensor([1.0, 2.0, 6.0], requires_grad=True), step=step or Step(), **given)


def test_hand_written_value():
    call = by_hand()
    assert (call.name, call.kind, call.batch_size, call.reduction) == ("reduce_loss", "row", 3, "mean")
    assert call.losses.tolist() == [1.0, 2.0, 6.0]
    assert torch.equal(call.value(None, []), call.input.mean())
    assert torch.equal(call.value(torch.ones(3), []), call.input.mean())
    weighted = call.value(torch.tensor([3.0, 0.0, 0.5]), [torch.tensor([3.0, 6.0, 9.0]), torch.tensor(0.5)])
    assert weighted.item() == 8.5  # (3 + 0 + 3) / 3 + (3 + 6 + 9) / 3 + 0.5
    # A third is no float32, and the engine multiplies before it divides.
    assert gradient(weighted, call).tolist() == pytest.approx([1.0, 0.0, 1 / 6], rel=1e-6)


def test_hand_written_logits_and_labels():
    logits, targets = normal(3, 4), torch.tensor([1, 0, 2])
    call = by_hand(logits=logits, targets=targets)
    assert call.logits is logits
    assert call.labels is targets
    assert call.target is targets
    assert by_hand(logits=logits, targets=logits.softmax(1)).labels.tolist() == logits.argmax(1).tolist()


@pytest.mark.parametrize(("logits", "shape"), [(None, None), (normal(3), (3,)), (normal(2, 4), (2, 4))])
def test_hand_written_logits_are_refused(logits, shape):
    with pytest.raises(MisconfigurationException) as raised:
        _ = by_hand(logits=logits).logits
    assert str(raised.value) == (
        f"A technique needs logits of shape (3, C), `reduce_loss` got {shape}: call"
        " `self.reduce_loss(per_sample_loss, logits=logits, targets=targets)`."
    )


def test_hand_written_targets_cannot_be_replaced():
    with pytest.raises(MisconfigurationException) as raised:
        by_hand(targets=torch.zeros(3)).with_target(torch.ones(3))
    assert str(raised.value) == (
        "A technique replaces the targets, but `reduce_loss` gets losses that are already computed. Compute the loss"
        " with a function of torch.nn.functional and leave LossMixin out."
    )


@pytest.mark.parametrize(("given", "expected"), [(None, [4, 5, 6]), (torch.tensor([9, 8, 7]), [9, 8, 7])])
def test_hand_written_indices(given, expected):
    assert by_hand(Step(indices=(4, 5, 6)), indices=given).samples(Reader()).indices.tolist() == expected


@pytest.mark.parametrize(("site", "text"), [("", "reduce_loss((3,))"), ("m.py:7", "reduce_loss((3,)) at m.py:7")])
def test_hand_written_text(site, text):
    assert str(by_hand(site=site)) == text
