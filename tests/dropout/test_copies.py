"""Loss calls on several copies of the rows, against one call for each copy."""

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_reg.dropout.multi_sample_dropout._evaluation import OnCopies
from lightning_reg.engine.data.mixing import Mixing
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.loss.call import call_of
from lightning_reg.engine.loss.call_mixed import mixed_call
from lightning_reg.engine.loss.elements import LOSS_FUNCTIONS
from lightning_reg.engine.technique import Technique
from tests.engine.test_loss_call import CALLS, PRESENT, Step, normal

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")  # torch's advice on kl_div
COPIES, ROWS = 3, 4
# Arguments that come out of the network, and so as copies; all others are the batch's.
FROM_NETWORK = ("input", "input1", "input2", "anchor", "positive", "negative")
FUNCTIONS = [name for name in PRESENT if name != "ctc_loss"]  # its rows are not the first dimension
CLASSES = {"weight": torch.tensor([0.5, 2.0, 1.0, 0.25, 3.0])}
VARIANTS = {
    "cross_entropy": {"label_smoothing": 0.2, **CLASSES},
    "nll_loss": {},
    "binary_cross_entropy": {"weight": torch.rand(ROWS, 3)},
    "binary_cross_entropy_with_logits": {"weight": torch.rand(3), "pos_weight": torch.tensor([1.0, 2.0, 3.0])},
    "mse_loss": {"weight": torch.rand(ROWS, 3)},
    "multi_margin_loss": CLASSES,
}


def copies_of(name, **options):
    """A call on copies, and the arguments of each copy."""
    names = LOSS_FUNCTIONS[PRESENT[name]]
    first = dict(zip(names, CALLS[name], strict=False)) | options
    generator = torch.Generator().manual_seed(3)
    wide = {}
    for argument in FROM_NETWORK:
        if argument in first and isinstance(first[argument], torch.Tensor):
            value = first[argument]
            noise = 1 + 0.1 * torch.rand((COPIES * ROWS, *value.shape[1:]), generator=generator)
            wide[argument] = (value.repeat(COPIES, *(1 for _ in value.shape[1:])) * noise).requires_grad_()
    if name == "binary_cross_entropy":
        wide["input"] = wide["input"].detach().clamp(0.05, 0.95).requires_grad_()
    each = [first | {n: v[j * ROWS : (j + 1) * ROWS] for n, v in wide.items()} for j in range(COPIES)]
    return call_of(OnCopies(PRESENT[name], each[0], wide, COPIES), Step(ROWS)), each


@pytest.mark.parametrize("with_options", [False, True])
@pytest.mark.parametrize(
    ("name", "reduction"), [(n, r) for n in FUNCTIONS for r in ("mean", "sum", "none")] + [("kl_div", "batchmean")]
)
def test_value_and_losses_are_means_over_the_copies(name, reduction, with_options):
    options = {"reduction": reduction, **(VARIANTS.get(name, {}) if with_options else {})}
    call, each = copies_of(name, **options)
    expected = torch.stack([PRESENT[name](**arguments) for arguments in each]).mean(0)
    torch.testing.assert_close(call.plain, expected, rtol=1e-5, atol=1e-6)  # float32 in another order
    assert call.batch_size == ROWS
    assert torch.equal(call.decomposition.plain, call.plain)
    torch.testing.assert_close(call.value(torch.ones(ROWS), []), expected, rtol=1e-5, atol=1e-6)
    alone, _ = copies_of(name, **options)
    assert torch.equal(alone.value(torch.ones(ROWS), []), alone.plain)


CLASSIFICATIONS = {
    "plain": {},
    "weights": CLASSES,
    "smoothing": {"label_smoothing": 0.3},
    "all": {"label_smoothing": 0.3, "ignore_index": 1, **CLASSES},
}


def classification(reduction, options):
    scores = normal(COPIES * ROWS, 5).requires_grad_()
    labels = torch.tensor([1, 4, 0, 1])
    arguments = {"input": scores[:ROWS], "target": labels, "reduction": reduction, **options}
    return call_of(OnCopies(F.cross_entropy, arguments, {"input": scores}, COPIES), Step(ROWS)), scores, labels


@pytest.mark.parametrize("options", CLASSIFICATIONS.values(), ids=CLASSIFICATIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_and_terms_of_samples_on_copies(reduction, options):
    call, scores, labels = classification(reduction, options)
    weights, term = torch.tensor([0.5, 2.0, 0.0, 1.0]), torch.tensor([0.1, -0.2, 0.3, 0.4])
    class_weights = options.get("weight", torch.ones(5)).double()
    ignored = options.get("ignore_index", -100)
    smoothing = options.get("label_smoothing", 0.0)
    losses, masses = [0.0] * ROWS, [0.0] * ROWS
    for b, label in enumerate(labels.tolist()):
        if label == ignored:
            continue
        masses[b] = class_weights[label].item()
        for j in range(COPIES):
            row = scores[j * ROWS + b].double().tolist()
            logs = [s - math.log(sum(map(math.exp, row))) for s in row]
            spread = -sum(w * v for w, v in zip(class_weights.tolist(), logs, strict=True)) / 5
            losses[b] += (-(1 - smoothing) * masses[b] * logs[label] + smoothing * spread) / COPIES
    parts = [
        w * loss + mass * t for w, loss, mass, t in zip(weights.tolist(), losses, masses, term.tolist(), strict=True)
    ]
    expected = {"none": parts, "sum": sum(parts), "mean": sum(parts) / sum(masses)}[reduction]
    assert call.value(weights, [term]).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)  # float32
    per_sample = [loss / mass if mass else 0.0 for loss, mass in zip(losses, masses, strict=True)]
    assert call.losses.tolist() == pytest.approx(per_sample, rel=1e-5)
    assert call.sample_mass.tolist() == pytest.approx(masses)


def test_flattened_tokens_stay_with_their_sequence():
    scores, labels = normal(COPIES * 2 * 3, 4), torch.tensor([0, 1, -100, 3, 2, 1])  # 2 sequences of 3 tokens
    arguments = {"input": scores[:6], "target": labels}
    step = Step(2, batch=[labels.view(2, 3)])
    call = call_of(OnCopies(F.cross_entropy, arguments, {"input": scores}, COPIES), step)
    assert (call.batch_size, call.kind) == (2, "sequence")
    elements = torch.stack([F.cross_entropy(s, labels, reduction="none") for s in scores.split(6)]).mean(0)
    assert call.losses.tolist() == pytest.approx([elements[:3].sum().item() / 2, elements[3:].mean().item()], rel=1e-5)
    assert call.plain.item() == pytest.approx(elements.sum().item() / 5, rel=1e-5)


def test_logits_are_those_of_the_mean_prediction_and_the_input_is_the_mean():
    call, scores, labels = classification("mean", {})
    prediction = scores.softmax(1).reshape(COPIES, ROWS, 5).mean(0)
    torch.testing.assert_close(call.logits.softmax(1), prediction, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(call.logits.exp(), prediction, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(call.input, scores.reshape(COPIES, ROWS, 5).mean(0))
    assert torch.equal(call.labels, labels)
    # All copies take part in its gradient.
    (gradient,) = torch.autograd.grad(call.logits[:, 0].sum(), scores)
    assert (gradient.abs().sum(1) > 0).all()


def test_replaced_targets_are_those_of_all_copies():
    call, scores, _ = classification("mean", {})
    _ = call.losses, call.plain
    soft = torch.rand(ROWS, 5).softmax(1)
    call = call.with_target(soft)
    expected = torch.stack([F.cross_entropy(s, soft) for s in scores.split(ROWS)]).mean()
    torch.testing.assert_close(call.plain, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_mixed_samples_have_two_targets_on_every_copy(reduction):
    call, scores, labels = classification(reduction, {"label_smoothing": 0.1, **CLASSES})
    permutation = torch.tensor([1, 0, 3, 2])
    mixing = Mixing(Technique(), permutation, 0.3, scores, None)
    call.step.mixing, call.step.mixer = mixing, mixing.by
    mixed = mixed_call(call, mixing)
    options = {"label_smoothing": 0.1, "reduction": reduction, **CLASSES}
    own, other = (
        torch.stack([F.cross_entropy(s, y, **options) for s in scores.split(ROWS)]).mean(0)
        for y in (labels, labels[permutation])
    )
    torch.testing.assert_close(mixed.plain, 0.3 * own + 0.7 * other)
    torch.testing.assert_close(mixed.value(torch.ones(ROWS), []), 0.3 * own + 0.7 * other)
    assert torch.equal(mixed.logits, call.logits)


def test_spread_is_the_standard_deviation_of_the_copies_losses():
    call, scores, labels = classification("sum", {**CLASSES, "ignore_index": 1})
    own = [F.cross_entropy(s, labels, ignore_index=1, **CLASSES).item() for s in scores.split(ROWS)]
    mean = sum(own) / COPIES
    assert call.evaluation.spread().item() == pytest.approx((sum((v - mean) ** 2 for v in own) / 2) ** 0.5, rel=1e-4)


def test_half_precision_is_averaged_in_single():
    prediction = (1000 + torch.arange(6.0)).half().requires_grad_()
    arguments = {"input": prediction[:2], "target": torch.zeros(2).half(), "reduction": "none"}
    call = call_of(OnCopies(F.l1_loss, arguments, {"input": prediction}, 3), Step(2))
    assert call.decomposition.elements.dtype == torch.float32
    assert call.decomposition.elements.tolist() == [1002.0, 1003.0]
    assert call.plain.dtype == torch.float16


def test_class_scores_are_refused_where_there_are_none():
    call, _ = copies_of("mse_loss")
    with pytest.raises(MisconfigurationException, match="has no class logits"):
        _ = call.logits
