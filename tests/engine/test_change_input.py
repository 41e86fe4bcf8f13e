"""Logits that a technique puts in place of the call's own: more columns, other values; rows, masses, targets stay."""

import re

import pytest
import torch
import torch.nn.functional as F

from lightning_reg import LossMixin, Mixup, MultiSampleDropout
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.technique import LossTechnique
from tests.conformance.by_hand import train_by_hand
from tests.conformance.discovery import case_of
from tests.conformance.harness import difference
from tests.conformance.harness import fit as fit_quietly
from tests.conformance.problems import KINDS
from tests.conformance.references import WidenedByHand, WidensLogits
from tests.toys import CLASSES, QUIET, Classifier, Term, WeightsByLabel, _Toy, fit, same_weights

pytestmark = QUIET

CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 1.0])


class Column(_Toy, LossTechnique):
    """One more column, a constant."""

    def __init__(self, value=1.0, **options):
        super().__init__(**options)
        self.value = value

    def change_input(self, call):
        return widened(call.loss_input, self.value)


class Doubles(_Toy, LossTechnique):
    """Twice the logits, whatever there are."""

    def change_input(self, call):
        return 2 * call.loss_input


class Hides(_Toy, LossTechnique):
    """The columns are masked of classes that are not the sample's own, but for the one after it."""

    def __init__(self, own=False, **options):
        super().__init__(**options)
        self.own = own

    def change_input(self, call):
        return hidden(call.loss_input, call.labels, self.own)


def widened(logits, value=1.0):
    return torch.cat([logits, torch.full_like(logits[:, :1], value)], dim=1)


def hidden(logits, y, own=False):
    kept = F.one_hot((y + 1) % CLASSES, CLASSES) + (0 if own else F.one_hot(y, CLASSES))
    return logits.masked_fill(kept == 0, -torch.inf)


def ignoring(y):
    return torch.where(torch.arange(len(y)) % 3 == 0, -100, y)


def step_of(change, **options):
    def step(module, batch):
        return F.cross_entropy(change(module(batch[0]), batch[1]), batch[1], **options)

    return step


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignored", [False, True])
def test_mass_and_reduction_are_the_users(reduction, ignored):
    def ours(module, batch, change=lambda logits: logits):
        y = ignoring(batch[1]) if ignored else batch[1]
        value = F.cross_entropy(change(module(batch[0])), y, reduction=reduction)
        return value.sum() / 10 if reduction == "none" else value

    one, two = Classifier(step=ours, lr=0.05), Classifier(step=lambda m, b: ours(m, b, widened), lr=0.05)
    fit(one, Column())
    fit(two)
    assert same_weights(one, two, atol=1e-7)  # the same operations
    assert not same_weights(one, Classifier(), atol=1e-3)


@pytest.mark.parametrize("options", [{"weight": CLASS_WEIGHTS}, {"label_smoothing": 0.2}, {}], ids=str)
def test_values_change_with_class_weights_and_smoothing(options):
    one, two = (Classifier(step=step_of(change, **options)) for change in (lambda z, _: z, lambda z, _: 2 * z))
    fit(one, Doubles())
    fit(two)
    assert same_weights(one, two, atol=1e-7)


def test_probabilities_as_targets_stay_where_the_columns_do():
    def step(module, batch, factor=1):
        return F.cross_entropy(factor * module(batch[0]), F.one_hot(batch[1], CLASSES) * 0.9 + 0.1 / CLASSES)

    one, two = Classifier(step=step), Classifier(step=lambda m, b: step(m, b, 2))
    fit(one, Doubles())
    fit(two)
    assert same_weights(one, two, atol=1e-7)


def test_masked_columns_get_no_gradient():
    one, two = Classifier(), Classifier(step=step_of(hidden))
    fit(one, Hides())
    fit(two)
    assert same_weights(one, two, atol=1e-7)


@pytest.mark.parametrize("order", [1, -1])
def test_two_change_it_in_the_order_of_the_callbacks(order):
    one = Classifier()
    wanted = Classifier(step=step_of(lambda z, _: 2 * widened(z, 3.0) if order == 1 else widened(2 * z, 3.0)))
    fit(one, *[Column(3.0), Doubles()][::order])
    fit(wanted)
    assert same_weights(one, wanted, atol=1e-7)


class Notes(_Toy, LossTechnique):
    """What a technique sees of the call."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def loss_term(self, call):
        assert call.loss_input.shape == (8, CLASSES + 1)
        assert torch.equal(call.losses, F.cross_entropy(widened(call.logits), call.labels, reduction="none").detach())
        self.seen.append([call.logits, call.input, call.whole_output, call.arguments["input"]])


@pytest.mark.parametrize("order", [1, -1])
def test_others_see_the_given_logits_and_the_changed_losses(order):
    given, notes = [], Notes()

    def step(module, batch):
        given.append(module(batch[0]))
        return F.cross_entropy(given[-1], batch[1])

    fit(Classifier(step=step), *[Column(), notes][::order])
    assert len(notes.seen) == len(given) == 8
    assert all(tensor is logits for row, logits in zip(notes.seen, given, strict=True) for tensor in row)


@pytest.mark.parametrize("order", [1, -1])
def test_weights_and_terms_join(order):
    def hand(module, batch):
        x, y = batch
        z = module(x)
        return ((1 + 0.5 * y) * F.cross_entropy(widened(z), y, reduction="none")).mean() + 0.1 * z.square().mean()

    one, two = Classifier(lr=0.1), Classifier(step=hand, lr=0.1)
    fit(one, *[Column(), WeightsByLabel(), Term()][::order])
    fit(two)
    assert same_weights(one, two, atol=1e-6)  # float32, 8 steps


def test_the_last_call():
    one, two = Classifier(), Classifier()
    fit(one, Column(loss="last"))
    fit(two, Column())
    assert same_weights(one, two, atol=1e-6)  # a total with one part exchanged


def test_the_base_that_is_logged_is_the_users():
    run = fit_quietly([Column(20.0)], KINDS["classification"])
    rows = [(row["reg/loss/base"], row["reg/loss/total"]) for _, row in run.logged if "reg/loss/base" in row]
    assert rows
    assert all(base < 10 < total for base, total in rows[:3])


@pytest.mark.parametrize("mixed", [False, True])
def test_every_copy_of_the_rows_is_changed_and_mixed_samples_are(mixed):
    dropout = case_of(MultiSampleDropout)
    cases = [*([case_of(Mixup)] if mixed else []), dropout]
    run = fit_quietly([*(case.make() for case in cases), WidensLogits(), WidensLogits(name="two")], dropout.problem)
    hands = [*(case.by_hand(case.make()) for case in cases), WidenedByHand(None), WidenedByHand(None)]
    hand = train_by_hand(dropout.problem, hands)
    assert not difference(run.weights, hand, rtol=1e-4, atol=1e-5)  # float32, 16 steps
    assert difference(hand, train_by_hand(dropout.problem, hands[:-1]), rtol=1e-3, atol=1e-4)


def test_pixels_have_channels_added():
    def pixels(module, batch, change=lambda z: z):
        z = change(module(batch[0])[:, :, None] * torch.tensor([1.0, -2.0]))
        return F.cross_entropy(z, torch.stack([batch[1], batch[1].flip(0)], 1))

    one, two = Classifier(step=pixels), Classifier(step=lambda m, b: pixels(m, b, widened))
    fit(one, Column())
    fit(two)
    assert same_weights(one, two, atol=1e-7)


# -- refusals ---------------------------------------------------------------------------------------------------------


class Odd(_Toy, LossTechnique):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def change_input(self, call):
        return self.change(call.loss_input)


class Squares(_Toy, LossTechnique):
    def change_losses(self, call):
        return call.logits.square().sum(1)


class ByHand(LossMixin, Classifier):
    def training_step(self, batch, batch_idx):
        z = self(batch[0])
        return self.reduce_loss(F.cross_entropy(z, batch[1], reduction="none"), logits=z, targets=batch[1])


def soft(module, batch):
    return F.cross_entropy(module(batch[0]), F.one_hot(batch[1], CLASSES).float())


OTHER_LOSSES = {
    "nll_loss": lambda m, b: F.nll_loss(m(b[0]).log_softmax(1), b[1]),
    "mse_loss": lambda m, b: F.mse_loss(m(b[0]), F.one_hot(b[1], CLASSES).float()),
    "binary_cross_entropy_with_logits": lambda m, b: F.binary_cross_entropy_with_logits(
        m(b[0]), F.one_hot(b[1], CLASSES).float()
    ),
    "kl_div": lambda m, b: F.kl_div(m(b[0]).log_softmax(1), F.one_hot(b[1], CLASSES).float(), reduction="batchmean"),
    "multi_margin_loss": lambda m, b: F.multi_margin_loss(m(b[0]), b[1]),
    "triplet_margin_loss": lambda m, b: F.triplet_margin_loss(m(b[0]), m(b[0]) + 1, m(b[0]).roll(1, 0)),
}


@pytest.mark.parametrize("name", OTHER_LOSSES)
def test_losses_without_logits_are_refused(name):
    sentence = rf"Doubles: A technique changes the logits of the loss, and F\.{name}\(.* has none that a softmax"
    with pytest.raises(MisconfigurationException, match=sentence):
        fit(Classifier(step=OTHER_LOSSES[name]), Doubles())


@pytest.mark.parametrize(
    ("module", "techniques", "said"),
    [
        (Classifier(step=soft), [Column()], "Column: .* has probabilities as targets, for the given columns alone"),
        (Classifier(step=step_of(lambda z, _: z, weight=CLASS_WEIGHTS)), [Column()], "has class weights, for the"),
        (Classifier(step=step_of(lambda z, _: z, label_smoothing=0.1)), [Column()], "has label smoothing, for the"),
        (ByHand(), [Doubles()], "Doubles: .* `reduce_loss` gets losses that are already computed"),
        (Classifier(), [Odd(lambda z: z[:, 1:])], r"Odd: Logits of shape \(8, 2\) cannot take the place .* \(8, 3\)"),
        (Classifier(), [Odd(lambda z: z[1:])], r"Logits of shape \(7, 3\)"),
        (Classifier(), [Odd(lambda z: z[:, :, None])], r"Logits of shape \(8, 3, 1\)"),
        # The second goes back to the given columns, and the first would not count.
        (Classifier(), [Column(), Odd(lambda z: z[:, :CLASSES])], r"Logits of shape \(8, 3\) .* \(8, 4\): rows stay"),
        (Classifier(), [Hides(own=True)], "Hides: with the changed logits losses of .* are infinite that are finite"),
        (Classifier(step=soft), [Hides()], "are infinite that are finite with the given ones. A column that"),
        (Classifier(), [Column(), Squares()], "Column and Squares cannot stand together: Column changes the logits"),
        (Classifier(), [Squares(), Column()], "Squares and Column cannot stand together: Column changes the logits"),
        (Classifier(), [Column(), Squares(loss=0)], "Squares: .* has logits that another technique has changed"),
        (Classifier(), [WeightsByLabel(), Column(loss="last")], "changes logits or targets of a loss call that Weigh"),
        (Classifier(), [Column(), Squares(loss="last")], "Squares: .* has logits that another technique has changed"),
    ],
)
def test_what_has_no_meaning_is_refused(module, techniques, said):
    with pytest.raises(MisconfigurationException, match=re.compile(said, re.DOTALL)):
        fit(module, *techniques)


def test_losses_that_were_infinite_before_are_not_its_doing():
    values = []

    def step(module, batch):
        values.append(F.cross_entropy(hidden(module(batch[0]), batch[1], own=True), batch[1]))
        return values[-1]

    fit(Classifier(step=step), Doubles(), max_steps=1)
    assert [value.item() for value in values] == [torch.inf]


def test_a_problem_of_the_harness_with_two_of_them():
    run = fit_quietly([WidensLogits(), WidensLogits(name="two")], KINDS["classification"])
    hand = train_by_hand(KINDS["classification"], [WidenedByHand(None), WidenedByHand(None)])
    assert not difference(run.weights, hand, rtol=1e-4, atol=1e-5)  # float32, 12 steps
