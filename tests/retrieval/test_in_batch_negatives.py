"""GatheredNegatives and FalseNegativeMask: which columns of a contrastive batch are negatives."""

import math
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_reg import (
    ClassDropout,
    ContrastiveDistillation,
    FalseNegativeMask,
    FocalContrastive,
    GatheredNegatives,
    HardNegativeMixing,
    LossReweighting,
    Mixup,
    MultiSampleDropout,
)
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.technique import LossTechnique
from lightning_reg.functional import (
    fitted_scale,
    same_document_mask,
    scores_of_other_ranks,
    similar_document_mask,
    text_hashes,
    token_hashes,
)
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.retrieval.hosts import bert_text, in_batch_problem
from tests.toys import QUIET, TWO_RANKS, Classifier, ShiftTargets, _Toy, fit, make_tensors, same_weights, weights_of

pytestmark = QUIET


IN_BATCH = in_batch_problem()


class Guided(Hand):
    """Inputs that are nearer to each other than a cosine of 0.25, or what the margin leaves, do not count."""

    def losses(self, output, moment):
        found = []
        for i, scores in enumerate(output):
            kept = [scores[i]]
            for j in range(len(output)):
                cosine = moment.x[i] @ moment.x[j] / (moment.x[i].norm() * moment.x[j].norm())
                if j != i and cosine <= 1 - self.technique.margin:
                    kept.append(scores[j])
            found.append(torch.stack(kept).logsumexp(0) - scores[i])
        return torch.stack(found)


GATHERED = partial(GatheredNegatives, "net.scores.documents", "net.head")
WHERE = "net.head and net.scores.documents, cosine"
CASE = (
    Case(
        make=partial(GATHERED, temperature=1.0),
        neutral=partial(GATHERED, temperature=1.0),
        by_hand=Hand,
        says=(f"{WHERE} over 1, 1 ranks", f"{WHERE} over 1, 1 ranks", f"{WHERE}, 1 ranks"),
        data=IN_BATCH,
        variants=[GATHERED],
        invalid=[
            ({"temperature": 0.0}, "temperature"),
            ({"similarity": "euclid"}, "similarity"),
            ({"direction": "both"}, "direction"),
        ],
        trains_as_plain=True,  # in the loop, which is one process; two ranks are compared with plain fits below
    ),
    Case(
        make=partial(FalseNegativeMask, guide_queries="0", guide_documents="0", margin=0.75),
        neutral=partial(FalseNegativeMask, guide_queries="0", guide_documents="0", margin=-3.0),
        by_hand=Guided,
        says=(
            "guide 0 and 0, absolute margin 0.75",
            "guide 0 and 0, absolute margin -3",
            "ids 1",
            "guide 0 and 0, relative margin 0.5",
        ),
        data=IN_BATCH,
        variants=[
            partial(FalseNegativeMask, ids="1"),
            partial(
                FalseNegativeMask,
                guide_queries="0",
                guide_documents=["0"],
                margin=0.5,
                margin_strategy="relative",
            ),
        ],
        invalid=[
            ({"margin": math.inf}, "margin"),
            ({"margin_strategy": "fixed"}, "margin_strategy"),
            ({"pad_token_id": 0.5}, "pad_token_id"),
            ({"guide_queries": "0", "guide_documents": None}, "guide_documents"),
            ({"guide_documents": None, "guide_queries": None}, "ids"),
        ],
        compares_rows=True,  # with those of all ranks below
    ),
)


# -- other ranks ------------------------------------------------------------------------------------------------------


class Search(Classifier):
    """A query, its document and hard negatives of it; one encoder or two, one direction or both."""

    def __init__(
        self,
        negatives=0,
        interleaved=False,
        towers=False,
        both=False,
        kind="cosine",
        learned=False,
        gathers=False,
        stacked=False,
    ):
        super().__init__(lr=0.1)
        self.gathers, self.stacked = gathers, stacked
        self.negatives, self.interleaved, self.both, self.kind = negatives, interleaved, both, kind
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.document = nn.Linear(6, 3) if towers else None
        self.log_scale = nn.Parameter(torch.tensor(2.0), requires_grad=learned)
        self.losses = []

    def texts(self, x):
        """``(B, 1 + M, D)``: the document first."""
        return torch.stack([x + 0.1, *(x.roll(k + 1, 1) for k in range(self.negatives))], 1)

    def training_step(self, batch, batch_idx):
        (x,) = batch
        texts = self.texts(x)
        ordered = texts.flatten(0, 1) if self.interleaved else torch.cat([texts[:, 0], texts[:, 1:].flatten(0, 1)])
        ordered = texts.transpose(0, 1).flatten(0, 1) if self.stacked else ordered
        q = self.net(x)
        d = self.net(ordered) if self.document is None else self.document(ordered)
        if self.kind == "cosine":
            q, d = F.normalize(q), F.normalize(d)
        y = torch.arange(len(x)) * (1 + self.negatives if self.interleaved else 1)
        if self.gathers and torch.distributed.is_initialized():
            y = y + torch.distributed.get_rank() * len(d)
            d = self.all_gather(d, sync_grads=True).flatten(0, 1)
        scores = q @ d.T * self.log_scale.exp()
        loss = F.cross_entropy(scores, y)
        if self.both:
            loss = (loss + F.cross_entropy(scores[:, y].T, torch.arange(len(x)))) / 2
        self.losses.append(loss.detach().clone())
        return loss


def inputs(rows=slice(None)):
    return TensorDataset(make_tensors(24)[0][rows])


def gatherers(options):
    if options.get("gathers"):
        return []
    where = ("document", "net") if options.get("towers") else ("net", None)
    given = {"similarity": options.get("kind", "cosine"), "interleaved": options.get("interleaved", False)}
    if not options.get("both"):
        return [GatheredNegatives(*where, **given)]
    second = GatheredNegatives(*where, direction="doc_to_query", loss=1, name="second", **given)
    return [GatheredNegatives(*where, loss=0, **given), second]


WAYS = {
    "no hard negatives": {},
    "one, both directions": {"negatives": 1, "both": True},
    "three, grouped": {"negatives": 3},
    "three, interleaved, both": {"negatives": 3, "interleaved": True, "both": True},
    "two encoders, both": {"towers": True, "both": True},
    "dot products": {"kind": "dot", "negatives": 1},
    "a learned temperature, both": {"learned": True, "both": True, "negatives": 1},
}


def trained(options, rows, size, techniques, **trainer):
    module = Search(**options)
    fit(
        module,
        *techniques,
        loader=DataLoader(inputs(rows), size),
        use_distributed_sampler=False,
        max_epochs=1,
        **trainer,
    )
    return torch.stack(module.losses), weights_of(module)


MIXED = partial(HardNegativeMixing, "net", math.exp(-2.0))
BESIDE = {
    "focal weights": ({"negatives": 1}, partial(FocalContrastive, 1.0)),
    "reweighting": ({"negatives": 1}, partial(LossReweighting, warmup_steps=1)),
    "its own negatives mixed": ({"negatives": 3}, partial(MIXED, negatives="grouped", list_mix=True)),
    "its own one after the other": (
        {"negatives": 3, "stacked": True},
        partial(MIXED, negatives="stacked", list_mix=True),
    ),
    "its own between the documents": (
        {"negatives": 2, "interleaved": True},
        partial(MIXED, negatives="interleaved", num_pairs=2),
    ),
    "those of all ranks mixed": ({"negatives": 1}, partial(MIXED, num_pairs=3, list_mix=True, pool=5)),
    "two encoders": ({"towers": True}, partial(HardNegativeMixing, "document", math.exp(-2.0), "net", num_pairs=2)),
    "both directions, constants": ({"both": True}, partial(MIXED, num_pairs=3, loss=0, detach=True)),
    "the user's own gathering": ({"negatives": 1, "gathers": True}, partial(MIXED, num_pairs=3, list_mix=True, pool=5)),
    "the user's, its own negatives": (
        {"negatives": 2, "interleaved": True, "gathers": True},
        partial(MIXED, negatives="interleaved", num_pairs=2),
    ),
}


def trained_on_rank(_):
    mine = torch.arange(24)[torch.distributed.get_rank() :: 2]  # as torch's sampler deals them: steps of 4 and 4
    found = {name: trained(options, mine, 4, gatherers(options), **TWO_RANKS) for name, options in WAYS.items()}
    for name, (options, make) in BESIDE.items():
        found[name] = trained(options, mine, 4, [*gatherers(options), make()], **TWO_RANKS)
    return found


def test_two_ranks_train_as_one_of_the_joined_batch(two_processes):
    ranks = two_processes.run(trained_on_rank, None)
    for name, (options, make) in {**{name: (o, None) for name, o in WAYS.items()}, **BESIDE}.items():
        techniques = [] if make is None else [make()]
        losses, weights = trained(options, slice(None), 8, techniques)
        half, _ = trained(options, torch.arange(24)[::2], 4, techniques)
        found = torch.stack([rank[name][0] for rank in ranks]).mean(0)
        torch.testing.assert_close(found, losses, atol=2e-6, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
        assert (half[0] - ranks[0][name][0][0]).abs() > 0.05, name  # without the other rank's documents
        for rank in ranks:
            assert same_weights(rank[name][1], weights, atol=1e-5), name  # float32, 3 steps, sums in another order


def other_order_on_rank(_):
    rank, found = torch.distributed.get_rank(), []
    options = {"negatives": 2}
    for first in (True, False):
        techniques = [GatheredNegatives("net"), MIXED(negatives="grouped", num_pairs=2)]
        techniques = techniques if first else techniques[::-1]
        found.append(trained(options, torch.arange(24)[rank::2], 4, techniques, **TWO_RANKS))
    with pytest.raises(MisconfigurationException, match=WRONG_ORDER):
        trained(options, torch.arange(24)[rank::2], 4, [MIXED(), GatheredNegatives("net")], **TWO_RANKS)
    return found


WRONG_ORDER = (
    "HardNegativeMixing stands before GatheredNegatives in the list of callbacks, and the documents of other ranks,"
    " which it would work on as well, are not there yet. Let GatheredNegatives stand before HardNegativeMixing."
)


def test_mixing_before_documents_are_gathered_is_right_of_its_own_negatives_and_else_refused(two_processes):
    for one, two in two_processes.run(other_order_on_rank, None):
        torch.testing.assert_close(one[0], two[0])
        assert same_weights(one[1], two[1], atol=1e-6)
    alone = [MIXED(), GatheredNegatives("net")]
    for techniques in (alone, alone[::-1]):  # on one process there is no other
        found = trained({}, slice(None), 8, techniques)
        assert torch.equal(found[0], trained({}, slice(None), 8, alone[:1])[0])


class Reads(Callback):
    """What is logged of each step."""

    def __init__(self, key):
        super().__init__()
        self.key, self.values = key, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(trainer.callback_metrics[self.key].item())


class Losses(_Toy, LossTechnique):
    def __init__(self):
        super().__init__()
        self.inputs = []

    def loss_term(self, call):
        self.inputs.append(call.loss_input.detach().clone())


def short_on_rank(_):
    rank = torch.distributed.get_rank()
    rows = [*range(9)] if rank == 0 else [*range(9, 20)]  # 4, 4, 1 and 4, 4, 3
    reads, seen = Reads("reg/gathered_negatives/candidates"), Losses()
    module = Search(negatives=1)
    loader, options = DataLoader(inputs(rows), 4), {"use_distributed_sampler": False, "max_epochs": 1, **TWO_RANKS}
    fit(module, GatheredNegatives("net"), seen, reads, loader=loader, **options)
    mixed = []
    for precision in ("32-true", "bf16-mixed"):
        other = Losses()
        fit(Search(negatives=1), GatheredNegatives("net"), other, loader=loader, precision=precision, **options)
        mixed.append(other.inputs[0])
    return reads.values, seen.inputs, mixed, weights_of(module)


def test_a_rank_with_fewer_documents_pads_with_what_has_no_probability(two_processes):
    one, two = two_processes.run(short_on_rank, None)
    assert one[0] == two[0] == [16.0, 16.0, 8.0]
    assert [tuple(scores.shape) for scores in one[1]] == [(4, 16), (4, 16), (1, 10)]
    assert [(scores > -torch.inf).sum(1).tolist() for scores in (one[1][2], two[1][2])] == [[8], [8] * 3]
    assert all(value.isfinite().all() for value in one[3].values())  # of what is not there no gradient
    for exact, half in (one[2], two[2]):
        assert half.dtype is torch.float32  # whatever the user's scores are
        assert (half - exact).abs().max() < 0.2  # bfloat16 cosines over 0.135


def unequal_on_rank(_):
    module = Search(negatives=1)
    module.texts = lambda x: torch.stack([x + 0.1] + [x] * (len(module.losses) + 1), 1)
    options = {"use_distributed_sampler": False, **TWO_RANKS}
    with pytest.raises(MisconfigurationException, match=r"has 12 columns, and the first .* says 8"):
        fit(module, GatheredNegatives("net"), loader=DataLoader(inputs(slice(8)), 4), **options)


def test_a_later_step_with_more_documents_is_refused(two_processes):
    two_processes.run(unequal_on_rank, None)


def test_one_rank_is_plain_to_the_last_bit():
    for options in WAYS.values():
        ours, plain = (trained(options, slice(None), 8, which) for which in (gatherers(options), []))
        assert torch.equal(ours[0], plain[0])
        assert same_weights(ours[1], plain[1])


@pytest.mark.parametrize(
    ("options", "given", "said"),
    [
        ({}, {"layer": "net.0"}, "cosine similarities over no temperature, as far as .* 'net.0' say. Name the layers"),
        ({}, {"temperature": 0.5}, r"similarities over 0.135, as .* `temperature` is 0.5. .* or leave `temperature`"),
        ({"kind": "dot"}, {}, "cosine similarities over no temperature"),
        ({}, {"similarity": "dot"}, "dot similarities over no temperature"),
        ({"towers": True}, {}, r"has 8 queries and 8 candidates, and the .* are \(8, 3\) and \(0, 3\)"),
        ({"negatives": 1}, {"direction": "doc_to_query"}, "cosine similarities over no temperature"),
        (
            {"towers": True},
            {"layer": "document", "direction": "doc_to_query"},
            r"has 8 documents and 8 queries, and the embeddings of this step are \(0, 3\) and \(8, 3\)",
        ),
    ],
)
def test_logits_of_other_rows_are_refused_on_one_process_already(options, given, said):
    with pytest.raises(MisconfigurationException, match=f"GatheredNegatives: .*{said}"):
        fit(Search(**options), GatheredNegatives(**{"layer": "net", **given}), loader=DataLoader(inputs(), 8))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (Mixup(), "a mixed sample has two documents"),
        (MultiSampleDropout("net.2"), "passes each row several times"),
        (ShiftTargets(), "ShiftTargets replaces the targets of the same call"),
        (GatheredNegatives("net", name="second"), "both would add the documents"),
    ],
)
def test_who_cannot_stand_beside_it(other, said):
    with pytest.raises(MisconfigurationException, match=f"GatheredNegatives.*cannot stand together.*{said}"):
        fit(Classifier(), GatheredNegatives("net"), other)


def test_a_scale_by_hand_its_gradient_and_masked_scores():
    features, scale = torch.randn(6, 3, dtype=torch.float64, requires_grad=True), torch.tensor(7.0, requires_grad=True)
    similarities = features @ features.T
    found = fitted_scale(similarities * scale, similarities)
    assert found.item() == pytest.approx(7.0)
    of_scale, of_features = torch.autograd.grad(found, (scale, features))
    assert of_scale.item() == pytest.approx(1.0)
    assert of_features.abs().max() < 1e-12
    masked = torch.eye(6, dtype=torch.bool)
    scores = (similarities * scale).masked_fill(masked, -torch.inf)
    assert fitted_scale(scores, similarities, ~masked).item() == pytest.approx(7.0)
    assert fitted_scale(torch.ones(2), torch.zeros(2)).isfinite()


def test_alone_there_are_no_other_scores():
    assert scores_of_other_ranks(torch.ones(2, 3), torch.ones(4, 3)).shape == (2, 0)


# -- false negatives --------------------------------------------------------------------------------------------------


def test_same_documents_by_loops():
    ids, labels = torch.tensor([3, 5, 3, 7, 5, 3]), torch.tensor([0, 1, 2, -100, 6])
    found = same_document_mask(ids, labels)
    for i, y in enumerate(labels.tolist()):
        wanted = [0 <= y < 6 and j != y and ids[j].item() == ids[y].item() for j in range(6)]
        assert found[i].tolist() == wanted
    more = torch.cat([ids, torch.tensor([5, 3])])
    assert torch.equal(same_document_mask(ids, labels, more)[:, :6], found)
    assert same_document_mask(ids, labels, more)[:, 6:].int().tolist() == [[0, 1], [1, 0], [0, 1], [0, 0], [0, 0]]


@pytest.mark.parametrize("strategy", ["absolute", "relative"])
@pytest.mark.parametrize("margin", [0.0, 0.2, -0.2])
def test_similar_documents_by_loops_for_scores_of_either_sign(strategy, margin):
    generator = torch.Generator().manual_seed(0)
    similarities = torch.rand(40, 9, generator=generator) * 2 - 1
    labels = torch.randint(9, (40,), generator=generator)
    labels[0] = -100
    found = similar_document_mask(similarities, labels, margin, strategy)
    for i, y in enumerate(labels.tolist()):
        scores = similarities[i].tolist()
        own = scores[y] if y >= 0 else math.inf
        threshold = own - margin * (abs(own) if strategy == "relative" else 1)
        assert found[i].tolist() == [y >= 0 and j != y and s > threshold for j, s in enumerate(scores)]


def test_a_larger_relative_margin_masks_more_even_of_negative_scores():
    similarities = torch.tensor([[-0.4, -0.42, -0.39, -0.5]])
    counts = [similar_document_mask(similarities, torch.tensor([0]), m, "relative").sum().item() for m in (0, 0.1, 0.5)]
    assert counts == [1, 2, 3]


def waves(phase, width):
    return torch.sin(torch.arange(6 * width, dtype=torch.float64).reshape(6, width) * phase)


# UKPLab/sentence-transformers, 85ec64559f4414aa536eca4bf53538291e0a333f, GISTEmbedLoss.forward at temperature 0.1
# without contrast of anchors or positives; all positives have a similarity above 0, where the margins mean the same.
GIST = {
    ("absolute", 0.0): 6.288421540889343,
    ("absolute", 0.2): 5.694053424909008,
    ("absolute", 0.5): 5.692715596866357,
    ("relative", 0.2): 5.694055975552165,
    ("relative", 0.5): 5.692716681029093,
}


@pytest.mark.parametrize(("strategy", "margin"), GIST)
def test_a_guide_masks_as_that_of_sentence_transformers(strategy, margin):
    texts, guide = ([F.normalize(waves(p, width)) for p in phases] for width, phases in WAVES.items())
    scores, similarities = (each[0] @ torch.cat(each[1:]).T for each in (texts, guide))
    mask = similar_document_mask(similarities, torch.arange(6), margin, strategy)
    loss = F.cross_entropy((scores / 0.1).masked_fill(mask, -torch.inf), torch.arange(6))
    assert loss.item() == pytest.approx(GIST[strategy, margin], rel=1e-12)


WAVES = {4: (0.7, 0.8, 1.3), 5: (0.9, 0.94, 1.7)}  # anchors, positives, negatives; of the model and of the guide


def test_tokens_and_texts_are_told_apart_and_padding_counts_nothing():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 4, (2000, 5), generator=generator)
    hashes = token_hashes(tokens)
    same, equal = hashes[:, None] == hashes, (tokens[:, None] == tokens).all(2)
    assert torch.equal(same, equal)
    assert equal.sum() > 2000
    assert torch.equal(token_hashes(F.pad(tokens, (0, 40))), hashes)
    padded = token_hashes(F.pad(tokens, (0, 3), value=-7), padding=-7)
    assert torch.equal(padded, token_hashes(tokens, padding=-7))
    assert token_hashes(torch.tensor([[1, 2], [2, 1]])).unique().numel() == 2
    assert text_hashes(["a", "ä", "a", ""]).unique().numel() == 3
    assert text_hashes(["query"]).item() == 245654452968300411


class Known(Classifier):
    """Queries and documents of which some are the same; the mask is written into the loss by hand."""

    def __init__(self, by_hand=False, negatives=0, smoothing=0.0, fill=None):
        super().__init__(lr=0.2)
        self.by_hand, self.negatives, self.smoothing, self.fill = by_hand, negatives, smoothing, fill
        self.losses = []

    def training_step(self, batch, batch_idx):
        x, ids = batch["x"], batch["ids"]
        texts = torch.cat([x + 0.1, *(x.roll(k + 1, 1) for k in range(self.negatives))])
        q, d = F.normalize(self.net(x)), F.normalize(self.net(texts))
        scores = q @ d.T / 0.2
        if self.by_hand:
            every = torch.cat([ids, *([batch["more"]] * self.negatives)])
            rows = range(len(x))
            wrong = [[j != i and every[j].item() == ids[i].item() for j in range(len(every))] for i in rows]
            scores = scores.masked_fill(torch.tensor(wrong), -torch.inf)
        loss = F.cross_entropy(scores, torch.arange(len(x)), label_smoothing=self.smoothing)
        self.losses.append(loss.detach().clone())
        return loss


class Rows(Dataset):
    """24 queries about 7 documents; the same is said by numbers, by words and by tokens."""

    def __init__(self, rows=range(24)):
        self.x, self.rows = make_tensors(24)[0], list(rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, n):
        row = self.rows[n]
        number = row % 7
        more = row % 5
        text = f"document {number}"
        tokens = torch.tensor([number + 1, 3, 0])
        return {"x": self.x[row], "ids": number, "more": more, "text": text, "tokens": tokens, "guide": GUIDE[number]}


GUIDE = torch.eye(7)
IDS = {
    "numbers": {"ids": "ids"},
    "words": {"texts": "text"},
    "tokens": {"texts": "tokens"},
    "a guide": {"guide_queries": "guide", "guide_documents": "guide", "margin": 0.5},
    "all": {"ids": ["ids"], "texts": ["tokens"], "guide_queries": "guide", "guide_documents": ["guide"], "margin": 0.5},
}


def known(module, *techniques, size=12, rows=range(24), **options):
    fit(module, *techniques, loader=DataLoader(Rows(rows), size), max_epochs=1, **options)
    return torch.stack(module.losses)


@pytest.mark.parametrize("way", IDS)
def test_a_step_is_that_of_a_mask_by_hand(way):
    ours, hand, plain = Known(), Known(by_hand=True), Known()
    values = known(ours, FalseNegativeMask(**IDS[way])), known(hand), known(plain)
    torch.testing.assert_close(values[0], values[1])
    assert (values[2] > values[1] + 0.05).all()  # wrong answers less
    assert same_weights(ours, hand, atol=1e-6)


def test_hard_negatives_have_numbers_too_and_focal_weights_see_the_mask():
    ours, hand, half = Known(negatives=1), Known(by_hand=True, negatives=1), Known(negatives=1)
    mask = FalseNegativeMask(ids=["ids", "more"])
    known(ours, mask, FocalContrastive(1.0))
    known(hand, FocalContrastive(1.0))
    known(half, mask)
    assert same_weights(ours, hand, atol=1e-6)
    assert not same_weights(ours, half, atol=1e-4)


def test_beside_reweighting_it_is_the_mask_by_hand():
    ours, hand = Known(), Known(by_hand=True)
    known(ours, FalseNegativeMask(ids="ids"), LossReweighting(warmup_steps=1))
    known(hand, LossReweighting(warmup_steps=1))
    assert same_weights(ours, hand, atol=1e-6)


def test_what_is_masked_is_not_mixed():
    mixing, seen = HardNegativeMixing("net", 0.2, num_pairs=3, pool=11), Losses()
    known(Known(), FalseNegativeMask(ids="ids"), mixing, seen)
    mixed_by_hand, other = HardNegativeMixing("net", 0.2, num_pairs=3, pool=11), Losses()
    known(Known(by_hand=True), mixed_by_hand, other)
    for one, two in zip(seen.inputs, other.inputs, strict=True):
        torch.testing.assert_close(one, two)


def test_classes_left_out_and_the_mask_are_both_masked_in_either_order():
    found = []
    for order in ((0, 1), (1, 0), (0,), (1,)):
        techniques, seen = (FalseNegativeMask(ids="ids"), ClassDropout(0.5)), Losses()
        known(Known(), *(techniques[i] for i in order), seen, max_steps=1)
        found.append(seen.inputs[0])
    both, reverse, mask, dropout = found
    assert torch.equal(both, reverse)
    assert torch.equal(both, mask.masked_fill(dropout.isinf(), -torch.inf))
    assert min(each.isinf().sum() for each in (mask, dropout)) > 0


def test_shares_are_logged():
    masked, left = Reads("reg/false_negative_mask/masked"), Reads("reg/false_negative_mask/negatives")
    known(Known(), FalseNegativeMask(ids="ids"), masked, left, size=8)
    # Of 8 in turn about 7 documents one pair is the same: 2 of 56.
    assert masked.values == pytest.approx([2 / 56] * 3)
    assert left.values == pytest.approx([54 / 8] * 3)


@pytest.mark.parametrize(
    "technique",
    [
        partial(FalseNegativeMask, ids="ids"),
        FocalContrastive,
        partial(GatheredNegatives, "net"),
        partial(HardNegativeMixing, "net", 0.2),
        partial(ContrastiveDistillation, "net", "x", "x"),
    ],
)
def test_fewer_candidates_in_a_short_last_batch_are_told_once(technique):
    found = []
    for rows, drop_last in ((24, False), (24, True), (4, False)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(Known(), technique(), loader=DataLoader(Rows(range(rows)), 10, drop_last=drop_last), max_epochs=2)
        found.append([str(each.message) for each in caught if "candidates" in str(each.message)])
    name = type(technique()).__name__
    told = f"{name}: a batch of 4 rows gives each query 4 candidates, where others gave 10: its loss"
    assert [len(messages) for messages in found] == [1, 0, 0]
    assert found[0][0].startswith(told)


def test_several_techniques_on_one_loss_tell_it_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        techniques = FalseNegativeMask(ids="ids"), FocalContrastive()
        fit(Known(), *techniques, loader=DataLoader(Rows(range(24)), 10), max_epochs=1)
    assert len([each for each in caught if "candidates" in str(each.message)]) == 1


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_guide_is_compared_in_float32_in_mixed_precision_too(precision):
    """Another document is nearer by a thousandth, which bfloat16 does not show."""
    cosines = torch.tensor([[0.5, 0.501], [0.501, 0.5]])
    guide = torch.cat([cosines, (1 - cosines.square().sum(1, keepdim=True)).sqrt()], 1)
    x = make_tensors(2)[0]
    rows = [{"x": x[n], "ids": n, "query": torch.eye(3)[n], "document": guide[n]} for n in range(2)]
    masked = Reads("reg/false_negative_mask/masked")
    technique = FalseNegativeMask(guide_queries="query", guide_documents="document")
    fit(Known(), technique, masked, loader=DataLoader(rows, 2), precision=precision, max_epochs=1)
    assert masked.values == [1.0]


def masked_on_rank(_):
    rank = torch.distributed.get_rank()
    options = {"use_distributed_sampler": False, **TWO_RANKS}
    found = {}
    for name, given in IDS.items():
        module = Known()
        techniques = [GatheredNegatives("net"), FalseNegativeMask(**given)]
        losses = known(module, *techniques, size=6, rows=range(rank, 24, 2), **options)
        found[name] = losses, weights_of(module)
    techniques = [FalseNegativeMask(ids="ids"), GatheredNegatives("net")]
    with pytest.raises(MisconfigurationException, match=r"stands before GatheredNegatives in .* Let GatheredNeg"):
        known(Known(), *techniques, size=6, rows=range(rank, 24, 2), **options)
    return found


def test_documents_of_other_ranks_are_masked_as_well(two_processes):
    hand = Known(by_hand=True)
    losses = known(hand)
    ranks = two_processes.run(masked_on_rank, None)
    for name in IDS:
        torch.testing.assert_close(torch.stack([rank[name][0] for rank in ranks]).mean(0), losses)
        for rank in ranks:
            assert same_weights(rank[name][1], weights_of(hand), atol=1e-5)  # sums in another order


@pytest.mark.parametrize(
    ("module", "given", "said"),
    [
        (partial(Known, smoothing=0.1), {"ids": "ids"}, "has probabilities as targets or `label_smoothing`"),
        (partial(Known, negatives=1), {"ids": "ids"}, "ids of the batch has 12 for 24 columns of"),
        (Known, {"ids": "x"}, r"ids='x' must name whole numbers, found torch.float32 \(12, 6\)"),
        (Known, {"ids": "text"}, "ids='text' must name whole numbers, found list"),
        (
            Known,
            {"texts": "ids"},
            r"texts='ids' must name strings, or whole numbers \(n, T\) of tokens, found torch.int64",
        ),
        (Known, {"ids": "idz"}, "ids='idz' names nothing in the batch.*'ids'"),
        (Known, {"guide_queries": "ids", "guide_documents": "x"}, r"'ids' of the batch must be embeddings \(n, E\)"),
        (
            partial(Known, negatives=1),
            {"guide_queries": "x", "guide_documents": "x"},
            "x of the batch has 12 for 24 columns",
        ),
    ],
)
def test_what_says_nothing_about_the_columns_is_refused(module, given, said):
    with pytest.raises(MisconfigurationException, match=f"FalseNegativeMask.*{said}"):
        known(module(), FalseNegativeMask(**given))


@pytest.mark.parametrize(
    ("other", "said"),
    [(Mixup(), "a mixed sample has two documents"), (ShiftTargets(), "ShiftTargets replaces the targets of the same")],
)
def test_who_cannot_stand_beside_the_mask(other, said):
    with pytest.raises(MisconfigurationException, match=f"FalseNegativeMask.*cannot stand together.*{said}"):
        fit(Classifier(), FalseNegativeMask(ids="1"), other)


def test_what_adds_columns_before_it_is_told_to_stand_behind():
    with pytest.raises(MisconfigurationException, match=r"knows the 12 columns .* finds 13. .* before what adds other"):
        known(Known(), HardNegativeMixing("net", 0.2), FalseNegativeMask(ids="ids"))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_text_encoder_of_transformers_whose_batch_has_a_text_twice(precision):
    class Texts(Classifier):
        def __init__(self):
            super().__init__(lr=0.01)
            self.text = bert_text()

        def training_step(self, batch, batch_idx):
            q, d = (F.normalize(self.text(tokens)) for tokens in (batch["query"], batch["document"]))
            return F.cross_entropy(q @ d.T / 0.02, torch.arange(len(q)))

    tokens = torch.randint(1, 50, (6, 9), generator=torch.Generator().manual_seed(0))
    tokens[3] = tokens[0]
    rows = [{"query": row[:4], "document": row} for row in tokens]
    seen = Losses()
    techniques = [GatheredNegatives("text"), FalseNegativeMask(texts="document"), seen]
    fit(Texts(), *techniques, loader=DataLoader(rows, 6), precision=precision)
    assert len(seen.inputs) == 2
    for scores in seen.inputs:
        assert torch.nonzero(scores == -torch.inf).tolist() == [[0, 3], [3, 0]]
