"""Mixed samples: the pair form of every loss, and what the engine does with calls, batches and other techniques."""

import dataclasses
from collections import UserDict, namedtuple
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_reg import LossMixin
from lightning_reg.engine.data.blend import draw_lam, mix_targets, mixup
from lightning_reg.engine.data.entries import find_entry, replace_entry
from lightning_reg.engine.data.mixing import Mixing
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.loss.call import loss_call
from lightning_reg.engine.loss.call_by_hand import call_by_hand
from lightning_reg.engine.loss.call_mixed import mixed_call
from lightning_reg.engine.loss.elements import LOSS_FUNCTIONS
from lightning_reg.engine.technique import BatchTechnique
from tests.engine.test_loss_call import CALLS, PRESENT, REDUCTIONS, Step, classes, normal
from tests.toys import (
    CLASSES,
    QUIET,
    Classifier,
    IndexRecorder,
    LossRecorder,
    ShiftTargets,
    StepLosses,
    Term,
    WeightsByLabel,
    WeightsByPosition,
    fit,
    make_loader,
    make_tensors,
)

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")]

PERMUTATION = torch.tensor([2, 0, 3, 1])
EACH = torch.tensor([0.9, 0.25, 0.5, 1.0])
WITHOUT_ROWS = ("triplet_margin_loss", "triplet_margin_with_distance_loss", "ctc_loss")


class Swap(BatchTechnique):
    """Mixes each sample of an ``(x, y)`` batch with the one before it."""

    def __init__(self, share=0.75, every=1, **kwargs):
        super().__init__(**kwargs)
        self.share, self.every = share, every

    @classmethod
    @override
    def key(cls):
        return "swap"

    @property
    @override
    def mixes(self):
        return "all" if self.every == 1 else "some"

    @override
    def transform_batch(self, batch, step):
        if step.mixing is not None or step.batches_so_far % self.every:
            return batch
        x = batch[0]
        mixed, permutation, lam = mixup(x, self.share)
        permutation = (torch.arange(len(x)) - 1) % len(x)
        mixed = lam * x + (1 - lam) * x[permutation]
        advice = 'have them mixed in the batch, `Swap(form="soft")`'
        step.mixing = Mixing(self, permutation, lam, mixed, batch, advice=advice)
        return [mixed, *batch[1:]]


def swapped(x, share=0.75):
    return share * x + (1 - share) * x.roll(1, 0)


def mixing(weights, permutation=PERMUTATION, part=None):
    return Mixing(Swap(), permutation, weights, torch.zeros(0), part)


def pair_of(name, weights, *args, batch_size=None, **options):
    """A mixed call, and the plain ones for the samples' own targets and for their partners'."""
    first, *others = args or CALLS[name]
    names = LOSS_FUNCTIONS[PRESENT[name]]
    arguments = dict(zip(names, (first.clone().requires_grad_(), *others), strict=False)) | options
    target = next(key for key in ("target", "targets") if key in names)
    batch = len(PERMUTATION)
    partners = arguments[target].reshape(batch, -1)[PERMUTATION].reshape(arguments[target].shape)
    entry = arguments[target] if arguments[target]._base is None else arguments[target]._base
    step = Step(batch_size, batch=[entry])
    call = loss_call(PRESENT[name], arguments, step)
    mixed = mixed_call(call, mixing(weights, part=[entry]))
    return mixed, call, loss_call(PRESENT[name], {**arguments, target: partners}, step)


# -- the pair form ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", sorted(set(CALLS) & set(PRESENT) - set(WITHOUT_ROWS)))
def test_with_one_share_every_loss_is_the_sum_of_two(name, reduction):
    mixed, own, other = pair_of(name, 0.3, reduction=reduction)
    expected = 0.3 * own.function(**own.arguments) + (1 - 0.3) * own.function(**other.arguments)
    assert torch.equal(mixed.value(None, []), expected)
    torch.testing.assert_close(mixed.value(torch.ones(4), []), expected)  # through elements
    # Loss and mass of each sample give the value back.
    if reduction == "mean":
        mass = torch.ones(4) if mixed.sample_mass is None else mixed.sample_mass
        torch.testing.assert_close((mass * mixed.losses).sum() / mass.sum(), expected.detach())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "options",
    [{"weight": torch.tensor([1.0, 4.0, 0.5, 2.0, 3.0])}, {"label_smoothing": 0.2}, {"ignore_index": 2}],
    ids=lambda options: next(iter(options)),
)
def test_options_of_cross_entropy_keep_their_meaning(options, reduction):
    logits, target = normal(4, 5), torch.tensor([0, 2, 1, 2])
    mixed, *_ = pair_of("cross_entropy", 0.3, logits, target, reduction=reduction, **options)
    sums = [F.cross_entropy(logits, y, reduction=reduction, **options) for y in (target, target[PERMUTATION])]
    torch.testing.assert_close(mixed.value(None, []), 0.3 * sums[0] + 0.7 * sums[1])
    torch.testing.assert_close(mixed.value(torch.ones(4), []), 0.3 * sums[0] + 0.7 * sums[1])


def test_shares_per_sample_weight_elements_and_masses():
    logits, target, weight = normal(4, 5), torch.tensor([0, 2, 1, 2]), torch.tensor([1.0, 4.0, 0.5, 2.0, 3.0])
    mixed, *_ = pair_of("cross_entropy", EACH, logits, target, weight=weight)
    total = mass = 0.0
    log_probs = logits.double().log_softmax(1)
    for i in range(4):
        for label, share in ((target[i], EACH[i]), (target[PERMUTATION[i]], 1 - EACH[i])):
            total -= float(share * weight[label]) * float(log_probs[i, label])
            mass += float(share * weight[label])
    assert mixed.value(None, []).item() == pytest.approx(total / mass, rel=1e-6)
    assert mixed.sample_mass.sum().item() == pytest.approx(mass, rel=1e-6)


@pytest.mark.parametrize("weights", [0.3, EACH], ids=["one share", "a share each"])
@pytest.mark.parametrize("form", ["sequence", "map"])
def test_elements_belong_to_their_samples(form, weights):
    logits, target = normal(4, 5, 3), classes(5, 4, 3)  # 4 samples, 5 classes, 3 positions
    target[1, 0] = target[2, 2] = -100
    each = torch.as_tensor(weights).expand(4)[:, None].double()
    elements = [
        F.cross_entropy(logits.double(), y, reduction="none") * share
        for y, share in ((target, each), (target[PERMUTATION], 1 - each))
    ]
    masses = (target != -100) * each + (target[PERMUTATION] != -100) * (1 - each)
    expected = (elements[0] + elements[1]).sum() / masses.sum()
    args = (logits, target) if form == "map" else (logits.transpose(1, 2).flatten(0, 1), target.flatten())
    mixed, *_ = pair_of("cross_entropy", weights, *args, batch_size=4)
    torch.testing.assert_close(mixed.value(None, []).double(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(mixed.sample_mass.double(), masses.sum(1), atol=1e-6, rtol=1e-6)
    sample = torch.tensor([1.0, 2.0, 0.5, 3.0])
    weighted = ((elements[0] + elements[1]) * sample[:, None]).sum() / masses.sum()
    torch.testing.assert_close(mixed.value(sample, []).double(), weighted, atol=1e-6, rtol=1e-6)


def test_the_gradient_is_that_of_soft_targets():
    logits, target = normal(4, 5).requires_grad_(), classes(5, 4)
    mixed, *_ = pair_of("cross_entropy", 0.3, logits.detach(), target)
    soft = 0.3 * F.one_hot(target, 5) + 0.7 * F.one_hot(target[PERMUTATION], 5)
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, soft), logits)
    torch.testing.assert_close(torch.autograd.grad(mixed.value(None, []), mixed.input)[0], expected)


def test_replaced_targets_are_mixed_too():
    mixed, *_ = pair_of("mse_loss", 0.3)
    before, new = mixed.value(None, []), normal(4, 3)
    mixed = mixed.with_target(new)
    expected = 0.3 * F.mse_loss(mixed.input, new) + 0.7 * F.mse_loss(mixed.input, new[PERMUTATION])
    assert torch.equal(mixed.value(None, []), expected)
    assert not torch.equal(before, expected)


@pytest.mark.parametrize("name", WITHOUT_ROWS)
def test_losses_without_a_target_per_row_are_refused(name):
    step, arguments = Step(), dict(zip(LOSS_FUNCTIONS[PRESENT[name]], CALLS[name], strict=False))
    with pytest.raises(MisconfigurationException, match=rf"Swap: .*F\.{name}.* has no target with a row per sample"):
        _ = mixed_call(loss_call(PRESENT[name], arguments, step), mixing(0.3)).plain


@pytest.mark.parametrize("rows", [3, 6, 8, 0])
def test_a_target_with_other_rows_is_refused(rows):
    call = loss_call(F.mse_loss, {"input": torch.zeros(rows, 2), "target": torch.zeros(rows, 2)}, Step())
    with pytest.raises(MisconfigurationException, match=rf"4 mixed samples, but the target of .* has {rows} rows"):
        _ = mixed_call(call, mixing(0.3)).plain


def test_rows_of_several_per_sample_are_taken_from_an_entry_of_the_batch_alone():
    labels = torch.arange(12).reshape(4, 3) % 5
    permuted = labels[PERMUTATION].flatten()
    whole = torch.arange(24).reshape(8, 3) % 5

    def partners(target, entry=labels):
        arguments = {"input": torch.zeros(len(target), 5), "target": target}
        return mixed_call(
            loss_call(F.cross_entropy, arguments, Step()), mixing(0.3, part=[entry])
        ).evaluation.other.target

    assert torch.equal(partners(labels.view(-1)), permuted)
    assert torch.equal(partners(labels.unsqueeze(1).flatten()), permuted)
    for rows in (
        labels.t().reshape(-1),
        labels[:, 1:].reshape(-1),
        torch.cat([labels[:, 0]] * 2),
        labels.clone().view(-1),
    ):
        with pytest.raises(MisconfigurationException, match=r"sample after sample: whose target each row is cannot be"):
            partners(rows)
    for rows, entry in ((labels.view(-1), labels.t()), (whole[:4].view(-1), whole), (whole[4:].view(-1), whole)):
        with pytest.raises(MisconfigurationException, match=r"sample after sample: whose target each row is cannot be"):
            partners(rows, entry)


@pytest.mark.parametrize(
    "stack",
    [lambda rows: torch.cat([rows, rows]), lambda rows: rows.repeat_interleave(2, 0)],
    ids=["one after the other", "in turns"],
)
def test_rows_that_the_step_stacks_itself_are_refused(stack):
    def stacked(module, batch):
        return F.cross_entropy(module(stack(batch[0])), stack(batch[1]))

    with pytest.raises(MisconfigurationException, match=r"Swap: the batch has 8 mixed samples, but .* has 16 rows"):
        losses_of(stacked, Swap())


def test_losses_that_are_computed_already_are_refused():
    call = call_by_hand(torch.zeros(4), None, None, None, Step())
    with pytest.raises(MisconfigurationException, match=r"Swap: .*`reduce_loss` gets losses that are already computed"):
        mixed_call(call, mixing(0.3))


# -- draws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_shares_have_the_moments_of_the_beta_distribution(alpha):
    lam = draw_lam(alpha, torch.Generator().manual_seed(0), 20_000).double()
    variance = 1 / (4 * (2 * alpha + 1))
    assert lam.mean().item() == pytest.approx(0.5, abs=4 * (variance / 20_000) ** 0.5)  # 4 standard errors
    assert lam.var().item() == pytest.approx(variance, rel=0.05)
    assert ((lam >= 0) & (lam <= 1)).all()


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan")])
def test_alpha_must_be_above_zero(alpha):
    with pytest.raises(ValueError, match="`alpha` must be above 0"):
        draw_lam(alpha)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("each", [False, True])
def test_mixup_is_the_formula_in_the_type_of_the_inputs(dtype, each):
    x = normal(5, 3, 4).to(dtype)
    lam = torch.tensor([0.1, 0.9, 0.5, 1.0, 0.0]) if each else 0.3
    mixed, permutation, same = mixup(x, lam, generator=torch.Generator().manual_seed(1))
    assert mixed.dtype == dtype
    assert torch.equal(torch.as_tensor(same), torch.as_tensor(lam))
    assert sorted(permutation.tolist()) == list(range(5))
    for i in range(5):
        share = float(lam[i]) if each else lam
        expected = share * x[i].double() + (1 - share) * x[permutation[i]].double()
        tolerance = {"atol": 4 * torch.finfo(dtype).eps, "rtol": 2 * torch.finfo(dtype).eps}  # a few roundings
        torch.testing.assert_close(mixed[i].double(), expected, **tolerance)


def test_mixup_with_share_one_is_the_inputs_and_draws_leave_the_global_state_alone():
    x, state = normal(4, 3), torch.get_rng_state()
    mixed, *_ = mixup(x, 1.0, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mixed, x)
    assert mixed.data_ptr() != x.data_ptr()
    one, two = (mixup(x, alpha=0.4, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert one[2] == two[2]
    assert torch.equal(one[0], two[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_mixup_refuses_whole_numbers():
    with pytest.raises(TypeError, match=r"floating-point inputs, got torch.uint8"):
        mixup(torch.zeros(2, 3, dtype=torch.uint8))


def test_mixed_targets_by_hand():
    labels, permutation = torch.tensor([0, 2]), torch.tensor([1, 0])
    expected = torch.tensor([[0.9, 0.0, 0.1], [0.75, 0.0, 0.25]])
    torch.testing.assert_close(mix_targets(labels, permutation, torch.tensor([0.9, 0.25]), 3), expected)
    torch.testing.assert_close(mix_targets(torch.tensor([4.0, 8.0]), permutation, 0.75), torch.tensor([5.0, 7.0]))
    with pytest.raises(ValueError, match="`num_classes` is needed to mix class indices"):
        mix_targets(labels, permutation, 0.5)


# -- batches ----------------------------------------------------------------------------------------------------------

Named = namedtuple("Named", ["image", "label"])  # what data sets return


@dataclasses.dataclass(frozen=True)
class Frozen:
    image: object
    label: object


class Loose:
    def __init__(self, image, label):
        self.image, self.label = image, label


@pytest.mark.parametrize(
    ("batch", "key"),
    [
        ([1, 2], "0"),
        ((1, 2), "0"),
        ({"image": 1, "label": 2}, "image"),
        ({0: 1, 1: 2}, "0"),
        ({"data": {"image": [1, 2]}, "label": 3}, "data.image.0"),
        (Named(1, 2), "image"),
        (Named(1, 2), "0"),
        (Frozen(1, 2), "image"),
        (Loose(1, 2), "image"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_an_entry_is_replaced_in_a_copy(batch, key):
    changed = replace_entry(batch, key, 9)
    assert type(changed) is type(batch)
    assert (find_entry(changed, key, "key"), find_entry(batch, key, "key")) == (9, 1)
    if isinstance(batch, tuple | list):
        assert list(changed) == [9, 2]


@dataclasses.dataclass
class Scaled:
    image: object
    weight: object = dataclasses.field(init=False, default=None)

    def __post_init__(self):
        self.image = self.image / 255


def test_nothing_of_a_dataclass_runs_when_an_entry_is_replaced():
    batch = Scaled(510)
    batch.weight = 3
    changed = replace_entry(batch, "image", 9)
    assert (changed.image, changed.weight) == (9, 3)
    assert (batch.image, batch.weight) == (2, 3)


def test_a_batch_that_cannot_be_written_to_is_refused():
    class Reading:
        image = property(lambda self: 1)

    with pytest.raises(MisconfigurationException, match="entry 'image' of a Reading cannot be replaced"):
        replace_entry(Reading(), "image", 2)


# -- the engine -------------------------------------------------------------------------------------------------------


def by_hand(module, batch, *extra):
    x, y = batch
    logits = module(swapped(x))
    return 0.75 * F.cross_entropy(logits, y) + 0.25 * F.cross_entropy(logits, y.roll(1, 0))


def losses_of(step, *techniques, **kwargs):
    losses = StepLosses()
    fit(Classifier(step=step), *techniques, losses, **kwargs)
    return losses.losses


def test_training_is_the_pair_form_to_the_last_bit():
    assert losses_of(None, Swap()) == losses_of(by_hand)


def test_two_losses_on_the_labels_both_follow():
    def heads(module, batch):
        x, y = batch
        logits = module(x)
        return F.cross_entropy(logits, y) + 0.5 * nn.CrossEntropyLoss()(2 * logits, y.view(-1))

    def heads_by_hand(module, batch):
        x, y = batch
        logits, other = module(swapped(x)), y.roll(1, 0)
        total = 0.75 * F.cross_entropy(logits, y) + 0.25 * F.cross_entropy(logits, other)
        return total + 0.5 * (0.75 * F.cross_entropy(2 * logits, y) + 0.25 * F.cross_entropy(2 * logits, other))

    assert losses_of(heads, Swap()) == pytest.approx(losses_of(heads_by_hand), rel=1e-6)


def test_a_loss_on_the_mixed_inputs_is_left_alone():
    def both(module, batch):
        x, y = batch
        logits = module(x)
        return F.cross_entropy(logits, y) + F.mse_loss(logits @ torch.ones(CLASSES, x.shape[1]), x)

    def both_by_hand(module, batch):
        x, y = batch
        mixed = swapped(x)
        logits = module(mixed)
        total = 0.75 * F.cross_entropy(logits, y) + 0.25 * F.cross_entropy(logits, y.roll(1, 0))
        return total + F.mse_loss(logits @ torch.ones(CLASSES, x.shape[1]), mixed)

    assert losses_of(both, Swap()) == pytest.approx(losses_of(both_by_hand), rel=1e-6)


def distilled(module, batch):
    x, y = batch
    logits = module(x)
    teacher = (x[:, :CLASSES] * 3).softmax(1)
    return F.cross_entropy(logits, y) + F.kl_div(logits.log_softmax(1), teacher, reduction="batchmean")


def test_a_target_of_unknown_origin_asks_for_a_choice():
    with pytest.raises(
        MisconfigurationException, match=r"(?s)Swap: the training step calls 2 losses.*loss=1: F.kl_div"
    ):
        losses_of(distilled, Swap())

    def distilled_by_hand(module, batch):
        x, y = batch
        mixed = swapped(x)
        logits = module(mixed)
        total = 0.75 * F.cross_entropy(logits, y) + 0.25 * F.cross_entropy(logits, y.roll(1, 0))
        return total + F.kl_div(logits.log_softmax(1), (mixed[:, :CLASSES] * 3).softmax(1), reduction="batchmean")

    assert losses_of(distilled, Swap(loss="cross_entropy")) == pytest.approx(losses_of(distilled_by_hand), rel=1e-6)


@pytest.mark.parametrize("loss", [0, "last", "binary_cross_entropy_with_logits"])
def test_a_converted_target_is_mixed_if_it_is_chosen(loss):
    def one_hot(module, batch):
        return F.binary_cross_entropy_with_logits(module(batch[0]), F.one_hot(batch[1], CLASSES).float())

    def one_hot_by_hand(module, batch):
        logits, hot = module(swapped(batch[0])), F.one_hot(batch[1], CLASSES).float()
        bce = F.binary_cross_entropy_with_logits
        return 0.75 * bce(logits, hot) + 0.25 * bce(logits, hot.roll(1, 0))

    # loss="last" is swapped into the total when it is there, which is one rounding more.
    assert losses_of(one_hot, Swap(loss=loss)) == pytest.approx(losses_of(one_hot_by_hand), rel=1e-6)


@pytest.mark.parametrize(
    "target",
    [
        lambda x, y: (x[:, :CLASSES] * 3).softmax(1),  # a teacher's output
        lambda x, y: (x[:, :CLASSES] - 0.5) / 0.2,  # an autoencoder's target in other units
        lambda x, y: F.one_hot(y, CLASSES).float(),
    ],
    ids=["teacher", "inputs", "labels"],
)
def test_numbers_of_unknown_origin_are_refused_unless_they_are_chosen(target):
    def step(module, batch):
        return F.mse_loss(module(batch[0]), target(*batch))

    sentence = r'Swap: .*whether the target of F\.mse_loss.* follows is not certain.*`Swap\(loss="mse_loss"\)`.*"soft"'
    with pytest.raises(MisconfigurationException, match=sentence):
        losses_of(step, Swap())


def test_class_indices_of_unknown_origin_follow():
    def converted(module, batch):
        return F.cross_entropy(module(batch[0]), batch[1].short().long())

    assert losses_of(converted, Swap()) == losses_of(by_hand)


def test_a_part_of_the_batch_is_refused():
    def first_five(module, batch):
        return F.cross_entropy(module(batch[0][:5]), batch[1][:5])

    with pytest.raises(MisconfigurationException, match=r"Swap: the batch has 8 mixed samples, but .* has 5 rows"):
        losses_of(first_five, Swap())


def test_a_loss_out_of_sight_is_refused():
    def written(module, batch):
        return -module(batch[0]).log_softmax(1).gather(1, batch[1][:, None]).mean()

    with pytest.raises(
        MisconfigurationException, match=r"Swap: `training_step` at toys.py:\d+ returned a loss, but none of torch's"
    ):
        losses_of(written, Swap())


def test_a_loss_that_goes_out_of_sight_is_refused():
    def sometimes(module, batch):
        module.steps = getattr(module, "steps", 0) + 1
        logits = module(batch[0])
        if module.steps == 3:
            return -logits.log_softmax(1).gather(1, batch[1][:, None]).mean()
        return F.cross_entropy(logits, batch[1])

    with pytest.raises(MisconfigurationException, match="Swap: the samples of this batch are mixed, but its loss was"):
        losses_of(sometimes, Swap())


class Written(LossMixin, Classifier):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.reduce_loss(F.cross_entropy(self(x), y, reduction="none"), targets=y)


def test_a_mixin_module_cannot_follow_in_the_loss():
    with pytest.raises(MisconfigurationException, match="`reduce_loss` gets losses that are already computed"):
        fit(Written(), Swap())


def test_only_the_loader_that_was_mixed_counts():
    x, y = make_tensors()
    loaders = {"a": make_loader(), "b": make_loader(TensorDataset(x.flip(0), y.flip(0)))}

    class SwapA(Swap):
        @override
        def transform_batch(self, batch, step):
            part = batch["a"]
            mixed = swapped(part[0])
            step.mixing = Mixing(self, (torch.arange(len(mixed)) - 1) % len(mixed), 0.75, mixed, part)
            return {**batch, "a": [mixed, part[1]]}

    def two(module, batch):
        return sum(F.cross_entropy(module(x), y) for x, y in (batch["a"], batch["b"]))

    def two_by_hand(module, batch):
        (x, y), (u, v) = batch["a"], batch["b"]
        logits = module(swapped(x))
        mixed = 0.75 * F.cross_entropy(logits, y) + 0.25 * F.cross_entropy(logits, y.roll(1, 0))
        return mixed + F.cross_entropy(module(u), v)

    wanted = losses_of(two_by_hand, loader=loaders)
    assert losses_of(two, SwapA(), loader=loaders) == pytest.approx(wanted, rel=1e-6)


def test_manual_optimization_follows_too():
    class Manual(Classifier):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.automatic_optimization = False

        @override
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    manual, automatic = Manual(), Classifier()
    fit(manual, Swap())
    fit(automatic, Swap())
    for one, two in zip(manual.parameters(), automatic.parameters(), strict=True):
        assert torch.equal(one, two)


# -- with other techniques --------------------------------------------------------------------------------------------


def test_weights_and_terms_join_the_mixed_loss():
    def weighted(module, batch):
        x, y = batch
        logits = module(swapped(x))
        elements = [F.cross_entropy(logits, t, reduction="none") for t in (y, y.roll(1, 0))]
        weights = 1 + torch.arange(len(x)) / len(x)
        term = 0.1 * logits.square().mean(1)
        return (weights * (0.75 * elements[0] + 0.25 * elements[1])).mean() + term.mean()

    recorder = LossRecorder()
    for order in ([Swap(), WeightsByPosition(), Term()], [Term(), WeightsByPosition(), Swap()]):
        assert losses_of(None, *order, recorder) == pytest.approx(losses_of(weighted), rel=1e-6)
    x, y = next(iter(make_loader()))
    logits = Classifier()(swapped(x))
    elements = [F.cross_entropy(logits, t, reduction="none") for t in (y, y.roll(1, 0))]
    torch.testing.assert_close(recorder.losses[0], (0.75 * elements[0] + 0.25 * elements[1]).detach())


def by_position(module, batch):
    x, y = batch
    logits = module(swapped(x))
    elements = [F.cross_entropy(logits, t, reduction="none") for t in (y, y.roll(1, 0))]
    return ((1 + torch.arange(len(x)) / len(x)) * (0.75 * elements[0] + 0.25 * elements[1])).mean()


@pytest.mark.parametrize("choices", [(None, None), ("last", None), (None, "last"), ("last", "last")], ids=str)
def test_weights_join_whoever_waits_for_the_last_call(choices):
    one, two = choices
    losses = losses_of(None, Swap(loss=one), WeightsByPosition(loss=two))
    assert losses == pytest.approx(losses_of(by_position), rel=1e-6)


def one_hot(module, batch):
    return F.cross_entropy(module(batch[0]), F.one_hot(batch[1], CLASSES).float())


@pytest.mark.parametrize("late", [Swap, ShiftTargets])
def test_targets_that_change_too_late_are_refused(late):
    names = (
        rf'{late.__name__}\(loss="last"\) changes logits or targets of a loss call that WeightsByPosition has worked on'
    )
    with pytest.raises(MisconfigurationException, match=names):
        fit(Classifier(step=one_hot), late(loss="last"), WeightsByPosition())
    fit(Classifier(step=one_hot), late(loss="last"), WeightsByPosition(loss="last"))


def test_a_technique_that_reads_targets_is_refused_by_both_names():
    with pytest.raises(MisconfigurationException, match="WeightsByLabel and Swap cannot stand together: WeightsByL"):
        fit(Classifier(), Swap(), WeightsByLabel())


@pytest.mark.parametrize("other", [ShiftTargets, IndexRecorder])
def test_a_technique_with_no_rule_for_two_owners_is_refused_at_the_start(other):
    for order in ([Swap(every=2), other()], [other(), Swap(every=2)]):
        with pytest.raises(
            MisconfigurationException, match=f"Swap .*{other.__name__} has no rule for a sample with tw"
        ):
            fit(Classifier(), *order)


def test_whoever_learns_from_unmixed_batches_needs_some():
    class Careful(IndexRecorder):
        takes_mixed = True

    fit(Classifier(), Careful(), Swap(every=2))
    with pytest.raises(
        MisconfigurationException, match="Careful learns about single samples from the batches that are"
    ):
        fit(Classifier(), Careful(), Swap())


def test_of_two_that_mix_the_second_gets_what_the_first_leaves():
    first, second = Swap(every=2, name="one"), Swap(share=0.5, name="two")
    seen = []

    def note(module, batch):
        seen.append(batch[0][:, 0])
        return F.cross_entropy(module(batch[0]), batch[1])

    fit(Classifier(step=note), first, second, max_epochs=1)
    originals = [x[:, 0] for x, _ in make_loader()]
    for position, (got, x) in enumerate(zip(seen, originals, strict=True), start=1):
        assert torch.equal(got, swapped(x, 0.5 if position % 2 else 0.75))
    with pytest.raises(MisconfigurationException, match="a batch is mixed once, and the first mixes all of them"):
        fit(Classifier(), Swap(name="one"), Swap(every=2, name="two"))


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_batches_that_the_step_fetches_itself_are_refused():
    class Fetching(Classifier):
        @override
        def training_step(self, dataloader_iter):
            batch, *_ = next(dataloader_iter)
            return F.cross_entropy(self(batch[0]), batch[1])

    with pytest.raises(MisconfigurationException, match=r"Swap changes the batch, but `training_step\("):
        fit(Fetching(), Swap())


def test_an_unmixed_batch_costs_no_loss_call():
    losses = losses_of(None, Swap(every=10**6))
    assert losses == losses_of(None)


@pytest.mark.parametrize("make", [SimpleNamespace, dict, UserDict], ids=["object", "dict", "mapping of its own"])
def test_origin_is_told_by_storage(make):
    x, y, elsewhere = torch.zeros(4, 2), torch.zeros(4, 1), torch.zeros(4, 1)
    batch = {"a": make(x=x, y=y), "b": [elsewhere]}
    mixed = Mixing(Swap(), PERMUTATION, 0.5, x, batch["a"])
    assert mixed.concerns(y.flatten(), batch) is True
    assert mixed.concerns(x[:, 0], batch) is False
    assert mixed.concerns(elsewhere, batch) is False
    assert mixed.concerns(y.clone(), batch) is None
    assert mixed.concerns(None, batch) is None
    joined = {"a": make(x=torch.zeros(8, 2), y=torch.zeros(8, 1)), "b": [elsewhere]}
    targets = joined["a"]["y"] if make is not SimpleNamespace else joined["a"].y
    assert mixed.concerns(targets[:4], batch, joined) is True


def test_loader_of_one_sample_is_mixed_with_itself():
    loader = DataLoader(TensorDataset(*make_tensors(4)), 1)
    assert losses_of(None, Swap(), loader=loader) == pytest.approx(losses_of(None, loader=loader), rel=1e-5)
