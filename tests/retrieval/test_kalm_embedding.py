"""FocalContrastive, HardNegativeMixing, pooling and cut-off embeddings."""

import math
from collections import OrderedDict
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import (
    ClassDropout,
    FocalContrastive,
    HardNegativeMixing,
    LossReweighting,
    Mixup,
    MultiSampleDropout,
)
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.technique import LossTechnique
from lightning_reg.functional import (
    draw_mixtures,
    focal_weights,
    hardest_negatives,
    matryoshka_loss,
    mean_pooled,
    mix_hard_negatives,
    own_negatives,
)
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.conformance.problems import KINDS, Problem
from tests.retrieval.hosts import bert_text
from tests.toys import QUIET, Classifier, ShiftTargets, _Toy, fit, make_loader, make_tensors, same_weights

pytestmark = QUIET


class Focused(Hand):
    def weights(self, losses):
        return (1 - (-losses.detach()).exp()) ** 2.0


def labelled(size):
    x = torch.randn(size, 8)
    return x, (x[:, :4] + torch.randn(size, 4)).argmax(1)


ITEMS = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))


class Items(nn.Module):
    """Four documents that stay as they are: a weight of no layer would be mapped by some and not by others."""

    def forward(self, like):
        return ITEMS.to(like)


class Cosines(nn.Module):
    def __init__(self):
        super().__init__()
        self.items = Items()

    def forward(self, x):
        return F.normalize(x) @ F.normalize(self.items(x)).T / 0.2


def with_items():
    layers = {"first": nn.Linear(8, 16), "act": nn.Tanh(), "body": nn.Linear(16, 16), "act_body": nn.Tanh()}
    return nn.Sequential(OrderedDict(**layers, head=nn.Linear(16, 4), cosines=Cosines()))


def unit(row):
    return row / row.square().sum().sqrt()


def mixtures(q, negatives, pairs, list_mix):
    """The mixtures of one query, from (share, order) of each pair, whose first two are mixed, and all its negatives."""
    found = []
    for share, order in pairs:
        one, two = [k for k in order if k < len(negatives)][:2]
        found.append(unit(share * negatives[one] + (1 - share) * negatives[two]))
    if list_mix:
        weights = torch.stack([q @ n for n in negatives]).softmax(0)
        found.append(unit(sum(weight * n for weight, n in zip(weights, negatives, strict=True))))
    return found


def drawn(generator, rows, pairs, pool, beta=2.0):
    """For each row the shares, and of each pair in what order the pool is drawn from."""
    one, two = torch.randint(2**62, (2,), generator=generator).tolist()
    shares = np.random.default_rng(one).beta(beta, beta, (rows, pairs)).astype("float32")
    chances = np.random.default_rng(two).random((rows, pairs, pool))
    order = (-chances).argsort(axis=2)
    return [[(float(s), o) for s, o in zip(*row, strict=True)] for row in zip(shares, order.tolist(), strict=True)]


class Mixed(Hand):
    """Of four documents the three wrong ones are mixed, the nearest first; none that another technique has masked."""

    def change_input(self, output, moment):
        technique = self.technique
        documents = [unit(row) for row in ITEMS]
        pairs = drawn(moment.draws(technique), len(output), technique.num_pairs, 3)
        added = []
        for logits, y, q, own in zip(output, moment.y, moment.features["net.head"], pairs, strict=True):
            wrong = sorted(set(range(4)) - {int(y)}, key=lambda j, logits=logits: -logits[j].item())
            there = [documents[j] for j in wrong if logits[j] > -torch.inf]
            if len(there) < 2:
                added.append(torch.full((technique.num_pairs + technique.list_mix,), -torch.inf))
                continue
            mixed = mixtures(unit(q), there, own, technique.list_mix)
            added.append(torch.stack([unit(q) @ h / 0.2 for h in mixed]))
        return torch.cat([output, torch.stack(added)], 1)


WHERE = "net.head and net.cosines.items, temperature=0.2"
MIXING = partial(HardNegativeMixing, "net.cosines.items", 0.2, "net.head")
CASE = (
    Case(
        make=partial(FocalContrastive, 2.0),
        neutral=partial(FocalContrastive, 0.0),
        by_hand=Focused,
        says=("gamma=2", "gamma=0: inactive", "gamma=0.5"),
        # A problem of its own: where there are several losses, it is to work on one of classes.
        data=Problem(KINDS["classification"].net, labelled, F.cross_entropy, serves=["classification"]),
        variants=[FocalContrastive],
        invalid=[({"gamma": -0.1}, "gamma")],
    ),
    Case(
        make=partial(MIXING, num_pairs=2, list_mix=True),
        neutral=partial(MIXING, num_pairs=0),
        by_hand=Mixed,
        says=(
            f"{WHERE}; mixtures of the 7 hardest: 2 by Beta(2, 2) and the list",
            "num_pairs=0: inactive",
            f"{WHERE}; mixtures of the 7 hardest: 1 by Beta(2, 2)",
            f"{WHERE}; mixtures of the 2 hardest: the list, constants",
        ),
        data=Problem(with_items, labelled, F.cross_entropy, serves=["classification"]),
        variants=[MIXING, partial(MIXING, num_pairs=0, list_mix=True, pool=2, detach=True)],
        invalid=[
            ({"temperature": 0.0}, "temperature"),
            ({"num_pairs": -1}, "num_pairs"),
            ({"pool": 1}, "pool"),
            ({"beta": 0.0}, "beta"),
            ({"negatives": "own"}, "negatives"),
        ],
    ),
)


def test_weights_by_hand_and_at_the_ends():
    losses = torch.tensor([0.0, 0.1, 2.0, 200.0], dtype=torch.float64)
    wanted = [0.0, (1 - math.exp(-0.1)) ** 0.5, (1 - math.exp(-2.0)) ** 0.5, 1.0]
    assert focal_weights(losses).tolist() == pytest.approx(wanted, abs=1e-12)
    assert focal_weights(losses, 0.0).tolist() == [1.0] * 4
    small = focal_weights(torch.tensor([1e-8]), 1.0)
    assert small.item() == pytest.approx(1e-8)  # 1 - exp(-1e-8) is 0 in float32
    assert focal_weights(torch.tensor([-1e-9])).item() == 0.0  # a rounding below 0


class Retrieval(Classifier):
    """Two encoders: a query's own document among those of the batch and a hard negative of each."""

    def training_step(self, batch, batch_idx):
        q = F.normalize(self.net(batch[0]))
        p, n = F.normalize(self.net(batch[0] + 0.1)), F.normalize(self.net(-batch[0]))
        return self.contrast(q @ torch.cat([p, n]).T / 0.1)

    def contrast(self, logits):
        return F.cross_entropy(logits, torch.arange(len(logits)))


class ByHand(Retrieval):
    """Writes the weights into its own loss."""

    def contrast(self, logits):
        losses = F.cross_entropy(logits, torch.arange(len(logits)), reduction="none")
        return ((1 - (-losses.detach()).exp()) ** 0.5 * losses).mean()


class Smoothed(Retrieval):
    def contrast(self, logits):
        return F.cross_entropy(logits, torch.arange(len(logits)), label_smoothing=0.1)


class Weighted(Retrieval):
    def contrast(self, logits):
        return F.cross_entropy(logits, torch.arange(len(logits)), weight=torch.ones(logits.shape[1]))


def test_a_contrastive_step_is_that_of_weights_by_hand_and_gamma_0_is_plain():
    ours, hand, plain, neutral = Retrieval(), ByHand(), Retrieval(), Retrieval()
    for module, technique in ((ours, [FocalContrastive()]), (hand, []), (plain, []), (neutral, [FocalContrastive(0)])):
        fit(module, *technique, max_epochs=1)
    assert same_weights(ours, hand, atol=1e-6)
    assert not same_weights(ours, plain, atol=1e-4)
    assert same_weights(neutral, plain)


@pytest.mark.parametrize(
    ("module", "techniques", "said"),
    [
        (Smoothed, [FocalContrastive()], "has `label_smoothing`"),
        (Weighted, [FocalContrastive()], "has `weight`"),
        (Retrieval, [FocalContrastive(), LossReweighting()], "off its cross-entropy, and LossReweighting"),
        (partial(Classifier, lambda m, b: F.mse_loss(m(b[0]), m(b[0]) * 0)), [FocalContrastive()], "is another loss"),
    ],
)
def test_what_it_cannot_read_is_refused_by_name(module, techniques, said):
    with pytest.raises(MisconfigurationException, match=said):
        fit(module(), *techniques, loader=make_loader())


# -- mixtures ---------------------------------------------------------------------------------------------------------


def units(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def test_mixtures_by_loops():
    q, n = units(5, 8), units(5, 4, 8)
    shares, chances = torch.rand(5, 3, dtype=torch.float64), torch.rand(5, 3, 4)
    found = mix_hard_negatives(q, n, shares, chances, list_mix=True)
    for i in range(5):
        order = [sorted(range(4), key=lambda k, row=row: -row[k].item()) for row in chances[i]]
        pairs = list(zip(shares[i], order, strict=True))
        torch.testing.assert_close(found[i], torch.stack(mixtures(q[i], n[i], pairs, True)))
    torch.testing.assert_close(found.norm(dim=2), torch.ones(5, 4, dtype=torch.float64))
    torch.testing.assert_close(found[:, :3], mix_hard_negatives(q, n, shares, chances))


def test_mixtures_at_the_ends():
    q, n = units(2, 3), units(2, 3, 3)
    chances = torch.tensor([[[0.1, 0.9, 0.5]], [[0.9, 0.1, 0.2]]])
    all_first = mix_hard_negatives(q, n, torch.ones(2, 1, dtype=torch.float64), chances)[:, 0]
    torch.testing.assert_close(all_first, torch.stack([n[0, 1], n[1, 0]]))
    all_second = mix_hard_negatives(q, n, torch.zeros(2, 1, dtype=torch.float64), chances)[:, 0]
    torch.testing.assert_close(all_second, torch.stack([n[0, 2], n[1, 2]]))
    there = torch.tensor([[True, False, True], [False, True, False]])  # the second row has too few: all of them
    halves = torch.full((2, 1), 0.5, dtype=torch.float64)
    found = mix_hard_negatives(q, n, halves, chances, True, there)
    torch.testing.assert_close(found[:, 0], torch.stack([unit(n[0, 0] + n[0, 2]), unit(n[1, 0] + n[1, 2])]))
    torch.testing.assert_close(found[0, 1], mixtures(q[0], n[0, [0, 2]], [], True)[0])
    opposite = mix_hard_negatives(q, torch.stack([n[:, 0], -n[:, 0]], 1), halves, chances[..., :2])
    assert opposite.tolist() == [[[0.0] * 3]] * 2  # nothing is left, and nothing divided by 0
    same = mix_hard_negatives(q, n[:, :1].expand(-1, 3, -1), halves, chances, True)
    torch.testing.assert_close(same, n[:, :1].expand(-1, 2, -1))


def test_the_draws_are_betas_and_pairs_and_a_row_keeps_its_own():
    shares, chances = draw_mixtures(4000, 5, 3, 2.0, torch.Generator().manual_seed(0))
    assert shares.mean().item() == pytest.approx(0.5, abs=0.01)
    assert shares.var().item() == pytest.approx(1 / 20, abs=0.002)  # of Beta(2, 2)
    pairs = chances.topk(2, dim=2).indices
    counts = torch.bincount((3 * pairs[..., 0] + pairs[..., 1]).flatten(), minlength=9).reshape(3, 3)
    assert counts.diagonal().tolist() == [0, 0, 0]
    assert (counts[~torch.eye(3, dtype=torch.bool)] / counts.sum() - 1 / 6).abs().max() < 0.01
    for all_rows, first_rows in zip(
        (shares, chances), draw_mixtures(7, 5, 3, 2.0, torch.Generator().manual_seed(0)), strict=True
    ):
        assert torch.equal(all_rows[:7], first_rows)
    assert draw_mixtures(1000, 1, 2, 1000.0)[0].std() < 0.02
    assert [tuple(draws.shape) for draws in draw_mixtures(0, 1, 2)] == [(0, 1), (0, 1, 2)]


def test_the_hardest_are_the_nearest_wrong_ones():
    similarities = torch.tensor([[0.1, 0.9, 0.8, 0.3], [0.5, -5.0, 0.2, -torch.inf], [0.1, 0.2, 0.3, 0.4]])
    columns, there = hardest_negatives(similarities, torch.tensor([1, 0, -100]), 9)
    assert columns[0].tolist() == [2, 3, 0]
    assert columns[1, 0] == 2
    assert columns[2].tolist() == [3, 2, 1]
    assert there.tolist() == [[True] * 3, [True, False, False], [True] * 3]
    own = torch.tensor([[True, False, False, True]]).expand(3, -1)
    columns, there = hardest_negatives(similarities, torch.tensor([1, 1, 1]), 2, own)
    assert columns[0].tolist() == [3, 0]
    assert there.tolist() == [[True, True], [True, False], [True, True]]


@pytest.mark.parametrize("layout", ["interleaved", "grouped", "stacked"])
def test_where_own_negatives_lie(layout):
    own = own_negatives(3, 12, layout)
    names = [[f"{i}{m}" for m in range(4)] for i in range(3)]  # m=0: the document
    columns = {
        "interleaved": [name for row in names for name in row],
        "grouped": [row[0] for row in names] + [name for row in names for name in row[1:]],
        "stacked": [row[m] for m in range(4) for row in names],
    }[layout]
    for i in range(3):
        assert [c for c, there in zip(columns, own[i], strict=True) if there] == [f"{i}1", f"{i}2", f"{i}3"]


class Mined(Classifier):
    """A query's document and two hard negatives of each, in one of three orders; one encoder or two."""

    def __init__(self, layout="grouped", passes="three", mixing=None, gamma=0.0, **options):
        super().__init__(lr=0.1, **options)
        self.layout, self.passes, self.mixing, self.gamma = layout, passes, mixing, gamma
        self.values = []

    def documents(self, x):
        own, first, second = x + 0.1, x.flip(1), x.roll(1, 1)
        if self.layout == "interleaved":
            return torch.stack([own, first, second], 1).flatten(0, 1)
        if self.layout == "grouped":
            return torch.cat([own, torch.stack([first, second], 1).flatten(0, 1)])
        return torch.cat([own, first, second])

    def training_step(self, batch, batch_idx):
        x = batch[0]
        texts = self.documents(x)
        if self.passes == "one":
            q, d = self.net(torch.cat([x, texts])).split([len(x), len(texts)])
        else:
            q, d = self.net(x), torch.cat([self.net(part) for part in texts.split(len(x))])
        q, d = F.normalize(q), F.normalize(d)
        y = torch.arange(len(x)) * (3 if self.layout == "interleaved" else 1)
        return self.loss(q, d, y)

    def loss(self, q, d, y):
        logits = q @ d.T / 0.1
        if self.mixing is not None:
            logits = torch.cat([logits, self.mixed(q, d, y, logits)], 1)
        self.values.append(F.cross_entropy(logits.detach(), y, reduction="none"))
        if self.mixing is None:
            return F.cross_entropy(logits, y)
        losses = F.cross_entropy(logits, y, reduction="none")
        return ((1 - (-losses.detach()).exp()) ** self.gamma * losses).mean()

    def mixed(self, q, d, y, logits):
        """The same by loops."""
        technique = self.mixing
        rows, columns = logits.shape
        own = own_negatives(rows, columns, self.layout)
        pool = min(technique.pool, columns - 1 if technique.negatives == "any" else 2)
        step = SimpleNamespace(batches_so_far=len(self.values) + 1, stream="")
        generator = technique.generator(step, same_on_ranks=True)
        pairs = drawn(generator, rows, technique.num_pairs, pool, technique.beta)
        added = []
        for i in range(rows):
            of = [j for j in range(columns) if j != y[i] and (technique.negatives == "any" or own[i, j])]
            of = sorted(of, key=lambda j, i=i: -logits[i, j].item())[:pool]
            assert len(of) == pool
            found = pairs[i]
            h = torch.stack(mixtures(q[i], d[of], found, technique.list_mix))
            added.append((h.detach() if technique.detach else h) @ q[i] / 0.1)
        return torch.stack(added)


WAYS = {
    "own, grouped": ({"layout": "grouped"}, {"negatives": "grouped"}),
    "own, stacked": ({"layout": "stacked"}, {"negatives": "stacked", "list_mix": True}),
    "own, interleaved": ({"layout": "interleaved"}, {"negatives": "interleaved", "num_pairs": 3, "beta": 0.5}),
    "any": ({"layout": "interleaved", "passes": "one"}, {"pool": 4, "num_pairs": 2}),
    "constants": ({"layout": "stacked"}, {"detach": True, "list_mix": True}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_a_contrastive_step_is_that_of_mixtures_by_loops(way, gamma):
    toy, options = WAYS[way]
    technique = HardNegativeMixing("net", 0.1, **options)
    ours, hand, plain = Mined(**toy), Mined(**toy, mixing=technique, gamma=gamma), Mined(**toy)
    loader = DataLoader(TensorDataset(*make_tensors(12)), 4)
    fit(ours, *([FocalContrastive(gamma)] if gamma else []), technique, loader=loader)
    fit(hand, loader=loader)
    fit(plain, *([FocalContrastive(gamma)] if gamma else []), loader=loader)
    assert same_weights(ours, hand, atol=1e-5)  # float32, 6 steps
    assert not same_weights(ours, plain, atol=1e-4)
    assert (torch.stack(hand.values[:1]) > torch.stack(plain.values[:1])).all()  # one wrong answer more


def test_two_encoders_and_the_order_beside_focal_weights():
    class Towers(Mined):
        def __init__(self):
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(1)
                self.document = nn.Linear(6, 3)

        def training_step(self, batch, batch_idx):
            q, d = F.normalize(self.net(batch[0])), F.normalize(self.document(batch[0]))
            return F.cross_entropy(q @ d.T / 0.1, torch.arange(len(q)))

    one, two, plain = Towers(), Towers(), Towers()
    techniques = [HardNegativeMixing("document", 0.1, "net"), FocalContrastive()]
    fit(one, *techniques)
    fit(two, *techniques[::-1])
    fit(plain, techniques[1])
    assert same_weights(one, two)
    assert not same_weights(one, plain, atol=1e-4)


class Documented(nn.Module):
    """Puts out what a module of sentence-transformers does."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return {"sentence_embedding": self.layer(x), "token_embeddings": x}


def test_a_mapping_counts_by_its_embedding_and_masked_columns_are_not_mixed():
    class Sentences(Classifier):
        def __init__(self, fill):
            super().__init__()
            self.fill, self.text = fill, Documented()
            nn.init.eye_(self.text.layer.weight)

        def training_step(self, batch, batch_idx):
            q, d = (F.normalize(self.text(x)["sentence_embedding"]) for x in (batch[0], batch[0] + 0.1))
            logits = (q @ d.T / 0.1).masked_fill(self.mask(batch[1]), self.fill)
            return F.cross_entropy(logits, torch.arange(len(q)))

        def mask(self, y):
            """Of each query but the first two no more than one wrong document is left."""
            rows = torch.arange(len(y))
            return ((rows[:, None] - rows).abs() > 1) & (rows[:, None] > 1) | (rows[:, None] == rows + 1)

    for fill in (-1e9, -torch.inf):
        seen = Seen()
        fit(Sentences(fill), HardNegativeMixing("text", 0.1), seen, max_steps=1)
        (added,) = [columns[:, 8] for columns in seen.inputs]
        assert added.isfinite().tolist() == [True] * 2 + [False] * 6


class Seen(_Toy, LossTechnique):
    def __init__(self):
        super().__init__()
        self.inputs = []

    def loss_term(self, call):
        self.inputs.append(call.loss_input.detach())


def test_a_last_batch_with_nothing_to_mix_is_plain():
    seen = Seen()
    loader = DataLoader(TensorDataset(*make_tensors(9)), 4)
    with pytest.warns(UserWarning, match="a batch of 1 rows gives each query 1 candidates, where others gave 4"):
        fit(InBatch(), HardNegativeMixing("net", 0.1), seen, loader=loader, max_epochs=1)
    assert [tuple(columns.shape) for columns in seen.inputs] == [(4, 5), (4, 5), (1, 1)]


@pytest.mark.parametrize("mixing_first", [False, True])
def test_mixtures_and_classes_left_out_go_by_the_order_of_the_callbacks(mixing_first):
    class Keeps(InBatch):
        def contrast(self, logits, y):
            self.logits = logits.detach()
            return super().contrast(logits, y)

    module, seen = Keeps(), Seen()
    mixing, dropout = HardNegativeMixing("net", 0.1, pool=5, list_mix=True), ClassDropout(0.6)
    techniques = [mixing, dropout] if mixing_first else [dropout, mixing]
    fit(
        module,
        *techniques,
        seen,
        loader=DataLoader(TensorDataset(*make_tensors(8)), 8),
        max_steps=1,
        log_every_n_steps=1,
    )
    step = SimpleNamespace(batches_so_far=1, stream="")
    width = 10 if mixing_first else 8
    kept = torch.randperm(width, generator=dropout.generator(step))[: int(0.6 * width)].tolist()
    start = Keeps()
    q, d = (F.normalize(start.net(x)) for x in (make_tensors(8)[0], make_tensors(8)[0] + 0.1))
    pairs = drawn(mixing.generator(step, same_on_ranks=True), 8, 1, 5)
    for i, found in enumerate(seen.inputs[0].tolist()):
        near = sorted((j for j in range(8) if j != i), key=lambda j, i=i: -(q[i] @ d[j]).item())
        if not mixing_first:
            near = [j for j in near if j in kept]
        mixed = mixtures(q[i], d[near[:5]], pairs[i], list_mix=True)
        wanted = [(q[i] @ each / 0.1).item() for each in (*d, *mixed)]
        for j, value in enumerate(wanted):
            there = j == i or j in kept or (j >= 8 and not mixing_first)
            assert found[j] == (pytest.approx(value, abs=1e-4) if there else -math.inf)


class InBatch(Classifier):
    """No hard negatives but those of the batch."""

    def training_step(self, batch, batch_idx):
        q, d = F.normalize(self.net(batch[0])), F.normalize(self.net(batch[0] + 0.1))
        return self.contrast(q @ d.T / 0.1, torch.arange(len(q)))

    def contrast(self, logits, y):
        return F.cross_entropy(logits, y)


class Biased(InBatch):
    def contrast(self, logits, y):
        return F.cross_entropy(logits + y / 10, y)


class Shifted(InBatch):
    def contrast(self, logits, y):
        return F.cross_entropy(logits[:, 2:], y % 5)


@pytest.mark.parametrize(
    ("module", "options", "said"),
    [
        (
            InBatch,
            {"temperature": 0.05},
            r"The logits of .* are cosines over 0\.1, as far .* `temperature` is 0.05",
        ),
        (Biased, {}, "are not the cosines of these rows over one temperature.*Name the layers whose"),
        (Shifted, {}, r"has 8 queries and 6 candidates, and the embeddings .* are \(8, 3\) and \(8, 3\)"),
        (InBatch, {"layer": "net.0"}, "are not the cosines of these"),
        (InBatch, {"negatives": "grouped"}, r'negatives="grouped"\) needs a document and two negatives .* has 8 for 8'),
        (Mined, {"negatives": "interleaved"}, "the targets of .* are other columns than those of the documents"),
        (partial(Mined, "interleaved"), {"negatives": "stacked"}, "the targets of .* are other columns than those"),
        (Mined, {"layer": "net.2", "query_layer": "net.3"}, r"are \(32, 3\) and \(32, 8\)"),
    ],
)
def test_what_cannot_be_mixed_is_refused(module, options, said):
    options = {"layer": "net", "temperature": 0.1, **options}
    with pytest.raises(MisconfigurationException, match=f"HardNegativeMixing.*{said}"):
        fit(module(), HardNegativeMixing(**options))


def test_outputs_that_are_no_rows_and_batches_without_negatives_are_refused():
    class Tokens(InBatch):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Unflatten(1, (3, 1))

        def training_step(self, batch, batch_idx):
            self.tokens(self.net(batch[0]))
            return super().training_step(batch, batch_idx)

    with pytest.raises(MisconfigurationException, match=r"Layer 'tokens' gave \(8, 3, 1\) in this step, where embedd"):
        fit(Tokens(), HardNegativeMixing("tokens", 0.1))
    pairs = DataLoader(TensorDataset(*make_tensors(8)), 2)
    with pytest.raises(MisconfigurationException, match="has 2 candidates: there are no two negatives"):
        fit(InBatch(), HardNegativeMixing("net", 0.1), loader=pairs)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (Mixup(), "a mixed sample has two documents"),
        (MultiSampleDropout("net.2"), "passes each row several times"),
        (ShiftTargets(), "replaces the targets of the same call"),
    ],
)
def test_who_cannot_stand_beside_it(other, said):
    with pytest.raises(MisconfigurationException, match=f"HardNegativeMixing.*cannot stand together.*{said}"):
        fit(Classifier(), HardNegativeMixing("net", 0.1), other)


def test_an_encoder_of_transformers_in_half_precision():
    class Search(Classifier):
        def __init__(self):
            super().__init__(lr=0.01)
            self.text = bert_text()

        def training_step(self, batch, batch_idx):
            q, d = (F.normalize(self.text(tokens)) for tokens in batch)
            return F.cross_entropy(q @ d.T / 0.02, torch.arange(len(q)))

    tokens = torch.randint(0, 50, (12, 9), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 1
    loader = DataLoader(TensorDataset(tokens[:, :4], tokens), 6)
    runs = []
    for precision in ("32-true", "bf16-mixed"):
        seen = Seen()
        fit(Search(), HardNegativeMixing("text", 0.02, num_pairs=2), seen, loader=loader, precision=precision)
        runs.append(torch.stack(seen.inputs))
    assert runs[0].shape == (4, 6, 8)
    assert (runs[1].float() - runs[0]).abs().max() < 50 * 0.05  # cosines of bfloat16


def test_padding_changes_no_mean():
    hidden, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [0, 0, 0]])
    padded = torch.cat([hidden, 1e4 * torch.ones(2, 2, 4)], dim=1)
    pooled = mean_pooled(padded, F.pad(mask, (0, 2)))
    torch.testing.assert_close(pooled, torch.stack([hidden[0, :2].mean(0), torch.zeros(4)]))
    empty = hidden.clone()
    empty[1] = torch.nan  # what a softmax over nothing leaves of a text of padding alone
    empty.requires_grad_()
    pooled = mean_pooled(empty, mask.float())
    assert pooled[1].tolist() == [0.0] * 4
    (gradient,) = torch.autograd.grad(pooled.sum(), empty)
    torch.testing.assert_close(gradient, (mask / 2.0)[..., None].expand(2, 3, 4))
    half = mean_pooled(300 * torch.ones(1, 4096, 1, dtype=torch.bfloat16), torch.ones(1, 4096))
    assert half.dtype is torch.bfloat16
    assert half.item() == 300.0


def test_leading_parts_are_made_units_after_they_are_cut():
    a, b = torch.randn(5, 6, requires_grad=True), torch.randn(5, 6)

    def loss(x, y):
        return F.cross_entropy(x @ y.T, torch.arange(5))

    wanted = 0.7 * loss(F.normalize(a), F.normalize(b)) + 0.2 * loss(F.normalize(a[:, :2]), F.normalize(b[:, :2]))
    found = matryoshka_loss(loss, [a, b], [6, 2], [0.7, 0.2])
    torch.testing.assert_close(found, wanted)
    assert torch.equal(*(torch.autograd.grad(value, a)[0].abs() > 0 for value in (found, wanted)))
    with pytest.raises(ValueError, match="from 1 to 6"):
        matryoshka_loss(loss, [a, b], [7])
    with pytest.raises(ValueError, match="one for each"):
        matryoshka_loss(loss, [a, b], [6, 2], [1.0])
