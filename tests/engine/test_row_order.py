"""Rows that are folded into samples: where it is certain that they lie sample after sample, and nowhere else."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_reg.engine.data.batches import lies_across, repeats_by_sample
from lightning_reg.engine.host.autograd import lies_by_row
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.technique import LossTechnique
from tests.toys import QUIET, Classifier, StepLosses, WeightsByPosition, fit, make_loader, make_tensors

pytestmark = QUIET
B, T, V, H = 4, 6, 5, 7
HEAD = nn.Linear(H, V)


def made(*shape):
    """What no operation tells anything about."""
    return torch.rand(shape, requires_grad=True) * 1


# -- what the graph says ----------------------------------------------------------------------------------------------

BY_SAMPLE = {
    "flatten": lambda z: z.flatten(0, 1),
    "reshape": lambda z: z.reshape(-1, V),
    "shifted": lambda z: z[..., :-1, :].contiguous().view(-1, V),
    "shifted, reshaped": lambda z: z[:, 1:].reshape(-1, V),
    "another type": lambda z: z.view(-1, V).double(),
    "another type first": lambda z: z.double().clone().view(-1, V),
    "last feature": lambda z: z.view(-1, V)[:, -1],
    "one feature": lambda z: z[..., :1].squeeze(-1).flatten(),
    "some features": lambda z: z.view(-1, V)[..., :2],
    "log probabilities": lambda z: F.log_softmax(z.view(-1, V), dim=-1),
    "probabilities": lambda z: z.view(-1, V).softmax(1),
    "a layer on flattened rows": lambda z: nn.Linear(V, 3)(z.reshape(-1, V)),
    "without bias": lambda z: nn.Linear(V, 3, bias=False)(z.reshape(-1, V)),
    "pixels": lambda z: z.unflatten(1, (2, 3)).permute(0, 2, 3, 1).reshape(-1, 2),
    "two views of each": lambda z: torch.stack([z[:, 0], z[:, 1]], 1).flatten(0, 1),
}


@pytest.mark.parametrize("flattened", BY_SAMPLE.values(), ids=BY_SAMPLE)
def test_operations_that_keep_the_order_of_rows(flattened):
    assert lies_by_row(flattened(made(B, T, V)), B)
    assert lies_by_row(flattened(HEAD(made(B, T, H))), B)


NOT_BY_SAMPLE = {
    "time first": lambda z: z.transpose(0, 1).reshape(-1, V),
    "time first, flattened by a layer": lambda z: nn.Linear(V, 3)(z.transpose(0, 1).reshape(-1, V)),
    "time first, shifted": lambda z: z.transpose(0, 1)[1:].reshape(-1, V),
    "time first, some samples": lambda z: z.transpose(0, 1)[:, :2].reshape(-1, V),
    "cut across samples": lambda z: z.view(T, B, V)[:, :2].reshape(-1, V),
    "turned on itself": lambda z: z.flatten(0, 1).t().contiguous().t(),
    "views joined": lambda z: torch.cat([z[:, 0], z[:, 1]]),
    "views stacked": lambda z: torch.stack([z[:, 0], z[:, 1]]).flatten(0, 1),
    "chosen rows": lambda z: z.flatten(0, 1)[torch.arange(2 * B)],
    "some rows": lambda z: z.flatten(0, 1)[: 2 * B],
    "normalized over rows": lambda z: z.flatten(0, 1).log_softmax(0),
    "a layer": lambda z: nn.Linear(V, 3)(z.flatten(0, 1).detach()),
    "unknown": lambda z: z.flatten(0, 1).cumsum(0),
}


@pytest.mark.parametrize("rows", NOT_BY_SAMPLE.values(), ids=NOT_BY_SAMPLE)
def test_operations_that_do_not(rows):
    assert not lies_by_row(rows(made(B, T, V)), B)


@pytest.mark.parametrize("dim", range(-3, 3))
def test_what_goes_along_another_dimension_keeps_the_order_of_rows(dim):
    rows = made(B, T, 2, V).flatten(0, 1)
    assert lies_by_row(F.log_softmax(rows, dim), B) == (dim not in (-3, 0))


def test_as_many_positions_as_samples_say_nothing():
    assert not lies_by_row(made(B, B, V).flatten(0, 1), B)
    assert not lies_by_row(made(B, 2, B, V).flatten(0, 2), B)
    assert lies_by_row(made(B, T, B).flatten(0, 1), B)
    assert not lies_by_row(made(B, T, B).flatten(), B)


# -- what the values of the batch say ---------------------------------------------------------------------------------

TOKENS = torch.arange(B * T).reshape(B, T)
SQUARE = torch.arange(B * B).reshape(B, B)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (TOKENS.clone().view(-1), True),
        (TOKENS[:, 1:].reshape(-1), True),
        (F.pad(TOKENS, (0, 1), value=-100)[:, 1:].reshape(-1), True),
        (TOKENS.masked_fill(TOKENS % 3 == 0, -100).view(-1), True),
        (SQUARE.clone().view(-1), True),
        (TOKENS.t().reshape(-1), False),
        (TOKENS.t()[1:].reshape(-1), False),
        (SQUARE.t().reshape(-1), False),
        (TOKENS.flip(1).reshape(-1), False),
        (TOKENS[:, :-2].reshape(-1) + 2, False),
        (torch.full((B * T,), -100), False),
        (torch.cat([TOKENS[:, 0], TOKENS[:, 1]]), False),
    ],
)
def test_values_of_an_entry_sample_after_sample(rows, expected):
    assert repeats_by_sample(rows, [TOKENS, SQUARE, TOKENS[:, 0]], B, -100) is expected


def test_rows_with_features_are_compared_with_entries_of_the_same():
    entry = torch.rand(B, T, 3)
    assert repeats_by_sample(entry.clone().flatten(0, 1), [entry], B)
    assert not repeats_by_sample(entry.transpose(0, 1).flatten(0, 1), [entry], B)
    assert not repeats_by_sample(entry[..., :2].flatten(0, 1), [entry], B)


def test_an_entry_that_lies_across():
    assert lies_across(SQUARE.t(), [SQUARE], B)
    assert not lies_across(SQUARE, [SQUARE], B)
    assert not lies_across(SQUARE.t().contiguous(), [SQUARE], B)
    assert not lies_across(TOKENS.t(), [TOKENS], B)


# -- steps ------------------------------------------------------------------------------------------------------------


class PerSample(LossTechnique):
    """Notes the losses of the samples."""

    def __init__(self, **options):
        super().__init__(**options)
        self.noted = []

    def sample_weights(self, call):
        self.noted.append((call.kind, call.losses))


class Scalar(LossTechnique):
    """Adds a number."""

    def loss_term(self, call):
        return torch.tensor(0.25)


class PerElement(LossTechnique):
    """Weights every other element."""

    def sample_weights(self, call):
        assert call.element_losses.shape == call.element_mass.shape
        return torch.arange(len(call.element_losses)) % 2 * 2.0


class Tagger(Classifier):
    """A layer between words and words, and a loss on what it says of a batch ``(B, T)`` of words and labels."""

    def __init__(self, step, words=11):
        super().__init__(step=step)
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Embedding(words, H), nn.Linear(H, words))


def sentences(samples=8, length=T):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(11, (samples, length), generator=generator) for _ in range(2)]


def flat(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), labels.reshape(-1))


def losses_of(step, *techniques, data=None, **options):
    note = StepLosses()
    loader = DataLoader(TensorDataset(*(data or sentences())), B, **options)
    fit(Tagger(step), *techniques, note, loader=loader, max_epochs=1)
    return note.losses


def hidden(rows):
    """As they are, in a way that tells nothing of their order."""
    return rows.cumsum(1).diff(dim=1, prepend=torch.zeros_like(rows[:, :1]))


LAYOUTS = {
    "no copy": lambda m, b: F.cross_entropy(m(b[0]).flatten(0, 1), b[1].view(-1)),
    "copied labels": lambda m, b: F.cross_entropy(m(b[0]).flatten(0, 1), b[1].clone().view(-1)),
    "unknown logits": lambda m, b: F.cross_entropy(hidden(m(b[0]).flatten(0, 1)), b[1].view(-1)),
    "both unknown": lambda m, b: F.cross_entropy(hidden(m(b[0]).flatten(0, 1)), b[1].flatten() + 0),
}


@pytest.mark.parametrize("length", [T, B])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_flattened_sequences_are_folded(layout, length):
    data, note = sentences(length=length), PerSample()

    def by_sample(module, batch):
        z = module(batch[0])
        each.append(F.cross_entropy(z.transpose(1, 2), batch[1], reduction="none").mean(1).detach())
        return F.cross_entropy(z.transpose(1, 2), batch[1])

    each = []
    wanted = losses_of(by_sample, data=data)
    assert losses_of(LAYOUTS[layout], note, data=data) == pytest.approx(wanted, rel=1e-6)
    assert [kind for kind, _ in note.noted] == ["sequence"] * 2
    for (_, losses), own in zip(note.noted, each, strict=True):
        torch.testing.assert_close(losses, own)


def test_the_order_is_learned_once_and_kept_for_batches_that_do_not_say_it():
    """Batches of sentences of another length each; the second has as many words as samples."""
    batches = [[tokens[:B, :length] for tokens in sentences()] for length in (T, B, T - 1)]
    shifted = PerSample()

    def step(module, batch):
        return F.cross_entropy(module(batch[0]).flatten(0, 1), batch[1].flip(1).reshape(-1))

    fit(Tagger(step), shifted, loader=DataLoader(batches, batch_size=None), max_epochs=1)
    assert [len(losses) for _, losses in shifted.noted] == [B] * 3
    with pytest.raises(MisconfigurationException, match="that they lie sample after sample is not certain"):
        fit(Tagger(step), PerSample(), loader=DataLoader(batches[1:], batch_size=None), max_epochs=1)


def test_values_are_read_once(monkeypatch):
    from lightning_reg.engine.loss import row_order

    asked = []

    def counted(*args):
        asked.append(args)
        return repeats_by_sample(*args)

    monkeypatch.setattr(row_order, "repeats_by_sample", counted)
    losses_of(LAYOUTS["both unknown"], PerSample())
    assert len(asked) == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_language_model_is_folded():
    def step(module, batch):
        return module.lm(batch[0])

    class Model(Tagger):
        def __init__(self):
            super().__init__(step)

            def loss(tokens):
                logits = self.net(tokens)[:, :-1].contiguous().view(-1, 11)
                return F.cross_entropy(logits, tokens[:, 1:].contiguous().view(-1))

            self.lm = torch.compile(loss, backend="aot_eager")

    note, data = PerSample(), sentences()[0]
    model = Model()
    z = model.net(data[:B])
    own = F.cross_entropy(z[:, :-1].transpose(1, 2), data[:B, 1:], reduction="none").mean(1).detach()
    fit(model, note, loader=DataLoader(TensorDataset(data), B), max_epochs=1)
    torch.testing.assert_close(note.noted[0][1], own)


def time_first(module, batch):
    return flat(module(batch[0].t()), batch[1].t())


def views_joined(module, batch):
    return F.cross_entropy(module(torch.cat([batch[0], -batch[0]])), batch[1].repeat(2))


def views_in_turns(module, batch):
    return F.cross_entropy(module(batch[0].repeat_interleave(2, 0)), batch[1].repeat_interleave(2))


def contrast(module, batch):
    """NT-Xent with the views one after the other."""
    z = F.normalize(module(torch.cat([batch[0], -batch[0]])))
    likeness = (z @ z.t() / 0.5).fill_diagonal_(-1e9)
    return F.cross_entropy(likeness, torch.arange(len(z)).roll(len(z) // 2))


@pytest.mark.parametrize("step", [views_joined, views_in_turns, contrast])
def test_rows_of_views_are_refused(step):
    with pytest.raises(MisconfigurationException) as raised:
        fit(Classifier(step=step), WeightsByPosition())
    message = str(raised.value)
    assert message.startswith("WeightsByPosition: F.cross_entropy((16, ")
    assert message.endswith(
        "has 16 rows for a batch of 8 samples, and that they lie sample after sample is not certain (rows of several"
        " loaders or views that were joined, and rows with time first, lie otherwise): there is no loss per sample."
        " Keep the samples as first dimension, as in logits (B, V, T) with targets (B, T), choose another call with"
        " `loss=...`, or write the loss with `LossMixin.reduce_loss`."
    )


@pytest.mark.parametrize(("sizes", "named"), [((8, 8), "8"), ((8, 4), "8 and 4")])
def test_rows_of_two_loaders_are_refused(sizes, named):
    def joined(module, batch):
        (x, y), (u, v) = batch
        return F.cross_entropy(module(torch.cat([x, u])), torch.cat([y, v]))

    loaders = CombinedLoader([make_loader(batch_size=size) for size in sizes], "min_size")
    with pytest.raises(MisconfigurationException, match=f"{sum(sizes)} rows for a batch of {named} samples, and that"):
        fit(Classifier(step=joined), WeightsByPosition(), loader=loaders)


class Recurrent(Tagger):
    """An LSTM in its own layout."""

    def __init__(self, step):
        super().__init__(step)
        self.lstm, self.head = nn.LSTM(H, H), nn.Linear(H, 11)

    @override
    def forward(self, x):
        return self.head(self.lstm(self.net[0](x))[0])


@pytest.mark.parametrize("length", [T, B, 2 * B])
@pytest.mark.parametrize("model", [Tagger, Recurrent])
def test_time_first_is_refused(model, length):
    loader = DataLoader(TensorDataset(*sentences(length=length)), B)
    with pytest.raises(MisconfigurationException, match="that they lie sample after sample is not certain"):
        fit(model(time_first), PerSample(), loader=loader)


def test_what_does_not_look_at_samples_takes_any_order():
    plain = losses_of(time_first)
    loader = DataLoader(TensorDataset(*sentences()), B)
    note, by_hand = StepLosses(), StepLosses()

    def halves(module, batch):
        z, y = module(batch[0].t()).flatten(0, 1), batch[1].t().reshape(-1)
        return 2 * F.cross_entropy(z[1::2], y[1::2], reduction="sum") / len(y)

    fit(Tagger(time_first), Scalar(), note, loader=loader, max_epochs=1)
    assert note.losses == pytest.approx([value + 0.25 for value in plain], rel=1e-6)
    note = StepLosses()
    fit(Tagger(time_first), PerElement(), note, loader=loader, max_epochs=1)
    fit(Tagger(halves), by_hand, loader=loader, max_epochs=1)
    assert note.losses == pytest.approx(by_hand.losses, rel=1e-5)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_number_joins_rows_in_any_order_under_every_reduction(reduction):
    def step(module, batch):
        z, y = module(batch[0].t()).flatten(0, 1), batch[1].t().reshape(-1)
        return F.cross_entropy(z, y, reduction=reduction).sum() / len(y)

    assert losses_of(step, Scalar(), data=sentences(B))[0] == pytest.approx(
        losses_of(step, data=sentences(B))[0] + 0.25
    )


def test_a_batch_that_comes_with_time_first_is_refused():
    """As a ``collate_fn`` may make it: nothing but the loader's batch size says which dimension is which."""

    def turned(samples):
        return [torch.stack(tokens, 1) for tokens in zip(*samples, strict=True)]

    def maps(module, batch):
        return F.cross_entropy(module(batch[0]).transpose(1, 2), batch[1])

    def rows(module, batch):
        return flat(module(batch[0]), batch[1])

    for step, count in ((rows, B * T), (maps, T)):
        with pytest.raises(
            MisconfigurationException, match=f"{count} rows for a batch of {T} samples, which lie with time"
        ):
            losses_of(step, PerSample(), collate_fn=turned)


def test_maps_with_as_many_positions_as_samples_are_told_by_their_view():
    def across(module, batch):
        return F.mse_loss(module.net[0](batch[0].t())[..., 0], batch[1].t())

    data = sentences(length=B)
    with pytest.raises(MisconfigurationException, match=f"{B} rows for a batch of {B} samples, which lie with time f"):
        losses_of(across, PerSample(), data=[data[0], data[1].float()])


def test_a_last_batch_that_looks_like_time_first_is_none():
    """3 samples of 4 words in the second batch of 4 samples."""
    note = PerSample()
    losses_of(lambda m, b: flat(m(b[0]), b[1]), note, data=sentences(B + 3, B))
    assert [len(losses) for _, losses in note.noted] == [B, 3]


def test_rows_of_a_table_as_wide_as_the_batch_are_samples():
    x, y = make_tensors(3)
    note = PerSample()
    fit(Classifier(), note, loader=DataLoader(TensorDataset(x, y), x.shape[1]), max_epochs=1)
    assert [len(losses) for _, losses in note.noted] == [3]
