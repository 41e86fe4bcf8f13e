"""Every loss function taken apart: elements, mass, plain value; against torch's own values and against loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.loss.elements import (
    LOSS_FUNCTIONS,
    bind,
    decompose,
    element_mass,
    reduction_of,
    target_name,
)

# torch's advice on kl_div and on the two old flags: the calls under test are the user's, warnings and all.
pytestmark = [
    pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning"),
    pytest.mark.filterwarnings("ignore:size_average and reduce args:UserWarning"),
]
G = torch.Generator().manual_seed(0)  # not the global one: pytest collects many modules in one process
B, C, H, V, T = 6, 4, 3, 5, 7


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=G)


def unit(*shape: int) -> Tensor:
    return torch.rand(shape, generator=G) * 0.8 + 0.1


def signs(*shape: int) -> Tensor:
    return torch.randint(2, shape, generator=G) * 2.0 - 1


def classes(high: int, *shape: int, ignored: int | None = None) -> Tensor:
    labels = torch.randint(high, shape, generator=G)
    if ignored is not None:
        labels.view(-1)[1::3] = ignored
    return labels


def logp(*shape: int) -> Tensor:
    return normal(*shape).log_softmax(1)


def soft(*shape: int) -> Tensor:
    return normal(*shape).softmax(1)


def at_zero() -> Tensor:
    labels = classes(C, B, ignored=0)
    labels[0] = 2  # not all are ignored
    return labels


MULTILABEL = torch.tensor([[3, 0, -1, 1], [1, -1, 0, 0], [0, 1, 2, 3]] * 2)
CTC = {"input_lengths": torch.full((3,), 8), "target_lengths": torch.tensor([3, 1, 0])}

# name: (function, positional arguments, keyword arguments); the name begins with the function's.
CASES = {
    "cross_entropy": (F.cross_entropy, (normal(B, C), classes(C, B)), {}),
    "cross_entropy-one": (F.cross_entropy, (normal(C), classes(C)), {}),
    "cross_entropy-weight": (F.cross_entropy, (normal(B, C), classes(C, B), unit(C)), {}),
    "cross_entropy-ignored": (F.cross_entropy, (normal(B, C), classes(C, B, ignored=-100)), {}),
    "cross_entropy-index": (F.cross_entropy, (normal(B, C), at_zero(), unit(C)), {"ignore_index": 0}),
    "cross_entropy-smooth": (F.cross_entropy, (normal(B, C), classes(C, B)), {"label_smoothing": 0.2}),
    "cross_entropy-smooth-all": (
        F.cross_entropy,
        (normal(B, C), classes(C, B, ignored=-1), unit(C)),
        {"label_smoothing": 0.2, "ignore_index": -1},
    ),
    "cross_entropy-soft": (F.cross_entropy, (normal(B, C), soft(B, C)), {}),
    "cross_entropy-soft-all": (F.cross_entropy, (normal(B, C), soft(B, C), unit(C)), {"label_smoothing": 0.1}),
    "cross_entropy-pixels": (F.cross_entropy, (normal(B, C, H, T), classes(C, B, H, T, ignored=-100), unit(C)), {}),
    "cross_entropy-soft-pixels": (F.cross_entropy, (normal(B, C, H, T), soft(B, C, H, T)), {}),
    "cross_entropy-tokens": (F.cross_entropy, (normal(B, V, T), classes(V, B, T, ignored=-100)), {}),
    "nll_loss": (F.nll_loss, (logp(B, C), classes(C, B)), {}),
    "nll_loss-all": (F.nll_loss, (logp(B, C), classes(C, B, ignored=9), unit(C)), {"ignore_index": 9}),
    "nll_loss-pixels": (F.nll_loss, (logp(B, C, H, T), classes(C, B, H, T, ignored=-100), unit(C)), {}),
    "binary_cross_entropy": (F.binary_cross_entropy, (unit(B, C), unit(B, C)), {}),
    "binary_cross_entropy-weight": (F.binary_cross_entropy, (unit(B, C), unit(B, C), unit(C)), {}),
    "binary_cross_entropy_with_logits": (F.binary_cross_entropy_with_logits, (normal(B), unit(B)), {}),
    "binary_cross_entropy_with_logits-weight": (
        F.binary_cross_entropy_with_logits,
        (normal(B, C), unit(B, C), unit(B, 1)),
        {"pos_weight": unit(C)},
    ),
    "mse_loss": (F.mse_loss, (normal(B, C), normal(B, C)), {}),
    "l1_loss": (F.l1_loss, (normal(B, C), normal(B, C)), {}),
    "smooth_l1_loss": (F.smooth_l1_loss, (normal(B, C), normal(B, C)), {"beta": 0.5}),
    "huber_loss": (F.huber_loss, (normal(B), normal(B)), {"delta": 0.5}),
    "kl_div": (F.kl_div, (logp(B, C), soft(B, C)), {}),
    "kl_div-log": (F.kl_div, (logp(B, C, H), logp(B, C, H)), {"log_target": True}),
    "poisson_nll_loss": (F.poisson_nll_loss, (normal(B), unit(B) * 9), {"full": True}),
    "gaussian_nll_loss": (F.gaussian_nll_loss, (normal(B, C), normal(B, C), unit(B, C)), {}),
    "gaussian_nll_loss-one-var": (F.gaussian_nll_loss, (normal(B, C), normal(B, C), unit(B)), {"full": True}),
    "soft_margin_loss": (F.soft_margin_loss, (normal(B, C), signs(B, C)), {}),
    "multilabel_margin_loss": (F.multilabel_margin_loss, (normal(B, C), MULTILABEL), {}),
    "multilabel_soft_margin_loss": (F.multilabel_soft_margin_loss, (normal(B, C), unit(B, C)), {}),
    "multilabel_soft_margin_loss-weight": (F.multilabel_soft_margin_loss, (normal(B, C), unit(B, C), unit(C)), {}),
    "multi_margin_loss": (F.multi_margin_loss, (normal(B, C), classes(C, B)), {"p": 2, "margin": 0.5}),
    "multi_margin_loss-weight": (F.multi_margin_loss, (normal(B, C), classes(C, B)), {"weight": unit(C)}),
    "margin_ranking_loss": (F.margin_ranking_loss, (normal(B), normal(B), signs(B)), {"margin": 0.1}),
    "hinge_embedding_loss": (F.hinge_embedding_loss, (unit(B, C), signs(B, C)), {}),
    "cosine_embedding_loss": (F.cosine_embedding_loss, (normal(B, C), normal(B, C), signs(B)), {"margin": 0.1}),
    "triplet_margin_loss": (F.triplet_margin_loss, (normal(B, C), normal(B, C), normal(B, C)), {"swap": True}),
    "triplet_margin_with_distance_loss": (
        F.triplet_margin_with_distance_loss,
        (normal(B, C), normal(B, C), normal(B, C)),
        {"margin": 2.0},
    ),
    "ctc_loss": (F.ctc_loss, (normal(8, 3, C).log_softmax(2), classes(C - 1, 3, 3) + 1), CTC),
}
if hasattr(F, "linear_cross_entropy"):  # torch >= 2.12
    CASES["linear_cross_entropy"] = (
        F.linear_cross_entropy,
        (normal(B, H), normal(C, H), classes(C, B, ignored=-100)),
        {"weight": unit(C)},
    )
    CASES["linear_cross_entropy-soft"] = (F.linear_cross_entropy, (normal(B, H), normal(C, H), soft(B, C)), {})
    CASES["linear_cross_entropy-soft-weight"] = (
        F.linear_cross_entropy,
        (normal(B, H), normal(C, H), soft(B, C)),
        {"weight": unit(C)},
    )
for f in (F.mse_loss, F.l1_loss, F.huber_loss):
    if "weight" in LOSS_FUNCTIONS[f]:  # newer torch
        CASES[f"{f.__name__}-weight"] = (f, (normal(B, C), normal(B, C)), {"weight": unit(B, C)})

REDUCTIONS = [(name, reduction) for name in CASES for reduction in ("mean", "sum", "none")]
REDUCTIONS += [(name, "batchmean") for name in CASES if name.startswith("kl_div")]
FLAGS = {  # (size_average, reduce): what torch makes of them, whatever `reduction` says
    (None, False): "none",
    (None, True): "mean",
    (False, None): "sum",
    (True, None): "mean",
    (False, False): "none",
    (True, False): "none",
    (False, True): "sum",
    (True, True): "mean",
}
FLAGGED = [name for name, (function, _, _) in CASES.items() if "size_average" in LOSS_FUNCTIONS[function]]


def arguments_of(name: str, **options) -> tuple[object, dict]:
    """The case's function and arguments by name, with a first argument that wants a gradient."""
    function, args, kwargs = CASES[name]
    arguments = dict(zip(LOSS_FUNCTIONS[function], args, strict=False)) | kwargs | options
    first = next(iter(arguments))
    return function, arguments | {first: arguments[first].clone().requires_grad_()}


def torch_value(function, arguments: dict, reduction: str) -> Tensor:
    flags = ("size_average", "reduce", "reduction")
    return function(**{k: v for k, v in arguments.items() if k not in flags}, reduction=reduction)


def test_the_cases_cover_every_function():
    assert {function for function, _, _ in CASES.values()} == set(LOSS_FUNCTIONS)


def test_every_loss_of_torch_is_known():
    losses = {n for n in vars(F) if n.endswith(("_loss", "cross_entropy", "_with_logits", "kl_div")) and n[0] != "_"}
    assert losses == {function.__name__ for function in LOSS_FUNCTIONS}


@pytest.mark.parametrize(("name", "reduction"), REDUCTIONS)
def test_plain_is_the_functions_own_value_and_gradient(name, reduction):
    function, arguments = arguments_of(name, reduction=reduction)
    first = next(iter(arguments.values()))
    expected, plain = function(**arguments), decompose(function, arguments).plain
    assert torch.equal(plain, expected)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), first)
    (gradient,) = torch.autograd.grad(plain.sum(), first)
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize(("name", "reduction"), REDUCTIONS)
def test_elements_are_torchs_own_and_carry_the_gradient(name, reduction):
    function, arguments = arguments_of(name, reduction=reduction)
    elements, _, stated = decompose(function, arguments)
    expected = torch_value(function, arguments, "none")
    if reduction == "batchmean":
        expected = torch.stack([row.sum() for row in expected])
    if function is F.ctc_loss and reduction == "mean":
        expected = torch.stack([e / max(n, 1) for e, n in zip(expected, (3, 1, 0), strict=True)])
    assert stated == {"batchmean": "mean"}.get(reduction, reduction)
    # float32 sums of at most 12 numbers in another order; everything else is bitwise.
    torch.testing.assert_close(elements, expected, rtol=1e-6 if reduction == "batchmean" else 0, atol=0)
    first = next(iter(arguments.values()))
    (expected_gradient,) = torch.autograd.grad(expected.sum(), first)
    (gradient,) = torch.autograd.grad(elements.sum(), first)
    # The one gradient flows through a fused backward, the other through its parts: float32 roundings.
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_mean_is_elements_over_mass(name):
    function, arguments = arguments_of(name, reduction="mean")
    elements, plain, _ = decompose(function, arguments)
    mass = element_mass(function, arguments)
    if mass is not None:
        assert mass.shape == elements.shape
        assert mass.dtype == torch.float32
    total = elements.numel() if mass is None else mass.double().sum()
    # float32 sums of up to 126 elements, here redone in float64.
    torch.testing.assert_close(elements.double().sum() / total, plain.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_sum_is_the_sum_of_elements(name):
    elements, plain, _ = decompose(*arguments_of(name, reduction="sum"))
    torch.testing.assert_close(elements.sum(), plain, rtol=1e-5, atol=1e-5)  # float32 sums in another order


def test_batchmean_is_the_mean_of_rows():
    elements, plain, _ = decompose(*arguments_of("kl_div-log", reduction="batchmean"))
    assert elements.shape == (B,)
    torch.testing.assert_close(elements.mean(), plain, rtol=1e-6, atol=1e-6)  # float32 sums in another order


def test_batchmean_of_one_dimension_has_its_own_elements():
    arguments = {"input": logp(B, C)[:, 0], "target": unit(B), "reduction": "batchmean"}
    assert torch.equal(decompose(F.kl_div, arguments).elements, F.kl_div(**arguments | {"reduction": "none"}))


@pytest.mark.parametrize(("size_average", "reduce"), FLAGS)
def test_reduction_of_the_deprecated_flags(size_average, reduce):
    arguments = {"reduction": "none", "size_average": size_average, "reduce": reduce}
    assert reduction_of(arguments) == FLAGS[size_average, reduce]


@pytest.mark.parametrize(("arguments", "reduction"), [({}, "mean"), ({"reduction": "batchmean"}, "batchmean")])
def test_reduction_without_flags(arguments, reduction):
    assert reduction_of(arguments) == reduction


@pytest.mark.parametrize(("size_average", "reduce"), FLAGS)
@pytest.mark.parametrize("name", FLAGGED)
def test_flags_decompose_as_torch_reads_them(name, size_average, reduce):
    function, arguments = arguments_of(name, size_average=size_average, reduce=reduce, reduction="none")
    _, plain, reduction = decompose(function, arguments)
    assert torch.equal(plain, function(**arguments))
    assert reduction == FLAGS[size_average, reduce]


def test_elements_of_cross_entropy_against_the_formula():
    function, arguments = arguments_of("cross_entropy-pixels")
    logits, target = arguments["input"].double().tolist(), arguments["target"].tolist()
    weight = arguments["weight"].double().tolist()
    elements = decompose(function, arguments).elements
    mass = element_mass(function, arguments)
    for b, row, column in [(b, h, t) for b in range(B) for h in range(H) for t in range(T)]:
        label, scores = target[b][row][column], [logits[b][c][row][column] for c in range(C)]
        counts = label != -100
        weighs = weight[label] if counts else 0.0
        loss = weighs * (math.log(sum(map(math.exp, scores))) - scores[label]) if counts else 0.0
        # float32 log-softmax against float64.
        assert elements[b, row, column].item() == pytest.approx(loss, rel=1e-5, abs=1e-6)
        assert mass[b, row, column].item() == pytest.approx(weighs, rel=1e-7)  # a float32 printed and read back


@pytest.mark.parametrize("name", ["nll_loss-all", "cross_entropy-index", "cross_entropy-smooth-all"])
def test_mass_is_the_class_weight_and_nothing_where_ignored(name):
    function, arguments = arguments_of(name)
    expected = [
        0.0 if label == arguments["ignore_index"] else arguments["weight"][label].item()
        for label in arguments["target"].tolist()
    ]
    assert 0.0 in expected
    assert element_mass(function, arguments).tolist() == expected


@pytest.mark.parametrize("ignore_index", [{}, {"ignore_index": None}])  # None: the gate hands on this default
def test_mass_without_class_weights_counts_what_is_not_ignored(ignore_index):
    arguments = {"input": normal(3, 2), "linear_weight": normal(2, 2), "target": torch.tensor([1, -100, 0])}
    function = getattr(F, "linear_cross_entropy", F.cross_entropy)
    assert element_mass(function, arguments | ignore_index).tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    "name", ["cross_entropy-soft-all", "binary_cross_entropy-weight", "multi_margin_loss-weight", "mse_loss"]
)
def test_weights_that_the_mean_does_not_divide_by_are_no_mass(name):
    assert element_mass(*arguments_of(name)) is None


def test_bind_names_positional_arguments():
    assert bind(F.huber_loss, (1, 2), {"delta": 3.0}) == {"input": 1, "target": 2, "delta": 3.0}


@pytest.mark.parametrize(
    ("function", "name"),
    [(F.mse_loss, "target"), (F.ctc_loss, "targets"), (F.triplet_margin_loss, None), (F.margin_ranking_loss, "target")],
)
def test_target_name(function, name):
    assert target_name(function) == name


@pytest.mark.parametrize("error", [NotImplementedError("no grid"), ValueError("no grid")])
def test_a_call_without_elements_is_refused(monkeypatch, error):
    def mse_loss(**arguments):
        raise error

    with pytest.raises(MisconfigurationException) as raised:
        decompose(mse_loss, {"input": normal(2), "target": normal(2)})
    assert str(raised.value) == (
        "F.mse_loss has no value per sample for these arguments (no grid). Write the loss with"
        " `LossMixin.reduce_loss`, which takes the per-sample loss from you."
    )
    assert raised.value.__cause__ is error
