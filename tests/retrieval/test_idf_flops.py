"""Sparse retrieval: FLOPS of all ranks, teachers together, IDF, and how well documents are ranked."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.retrieval import RetrievalMRR, RetrievalNormalizedDCG

from lightning_reg import EnsembleDistillation, IDFFlops, QueryIDF, RetrievalMetrics
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import (
    ensemble_scores,
    flops_penalty,
    idf_from_corpus,
    quadratic_ramp,
    ranking_scores,
    score_distillation_loss,
    splade_vectors,
)
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.conformance.kinds.metric import MetricCase
from tests.conformance.kinds.network import NetworkCase
from tests.conformance.problems import KINDS, Problem
from tests.toys import QUIET, TWO_RANKS, make_trainer

pytestmark = QUIET
HERE = "tests.retrieval.test_idf_flops"
IDF = [0.5 + 0.25 * column for column in range(16)]


def teacher(slope=1.0):
    """Scores of four candidates, whatever the shape of the inputs."""
    return _Teacher(slope)


class _Teacher(nn.Module):
    def __init__(self, slope):
        super().__init__()
        self.weight = nn.Parameter(slope * torch.tensor([[1.0, -1.0, 0.5, 2.0]]))

    def forward(self, x):
        return x.float().flatten(1)[:, :4] * self.weight


class FlopsByHand(Hand):
    def term(self, loop, moment):
        rows = moment.features["net.body"]
        columns = (rows / torch.tensor(IDF)).abs().sum(0) / len(rows)
        return 0.3 * (columns**2).sum()


class EnsembleByHand(Hand):
    def term(self, loop, moment):
        given = moment.x.flatten(1)[:, :4]
        total = 0
        for scores in (given * torch.tensor([1.0, -1.0, 0.5, 2.0]), given * torch.tensor([-3.0, 3.0, -1.5, -6.0])):
            low, high = scores.min(1, keepdim=True)[0], scores.max(1, keepdim=True)[0]
            total = total + 10.0 * (scores - low) / (high - low + 1e-6) / 2
        p = (total / 2).softmax(1)
        q = (moment.features["net.head"] / 2).softmax(1)
        return 0.5 * (p * (p / q).log()).sum() / len(p)


def _by_hand(batches):
    gains, ranks, cut = [], [], []
    for batch in batches:
        for scores, relevant in zip(batch["scores"].double().tolist(), batch["relevant"].tolist(), strict=True):
            order = sorted(range(len(scores)), key=lambda n: (-scores[n], relevant[n]))
            hits = [relevant[n] for n in order]
            if any(hits):
                best = sum(1 / math.log2(rank + 2) for rank in range(min(3, sum(hits))))
                gains.append(sum(hit / math.log2(rank + 2) for rank, hit in enumerate(hits[:3])) / best)
                ranks.append(1 / (hits.index(True) + 1))
                cut.append(ranks[-1] if True in hits[:3] else 0.0)
    found = {"ndcg@3": gains, "mrr": ranks, "mrr@3": cut}
    return {name: torch.tensor(sum(values) / len(values)) for name, values in found.items()}


def _queries(seed):
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(5, 8, generator=draw).mul(4).round().div(4)  # with ties
    return {"scores": scores, "relevant": torch.rand(5, 8, generator=draw) < 0.3}


def labelled(size):
    x = torch.randn(size, 8)
    return x, (x[:, :4] + torch.randn(size, 4)).argmax(1)


# A problem of its own: neither has a loss call to choose, and what they name has one width.
DOCUMENTS = Problem(KINDS["classification"].net, labelled, F.cross_entropy, serves=["classification"])
ENSEMBLE = partial(
    EnsembleDistillation,
    "net.head",
    teachers={"dense": f"{HERE}.teacher", "sparse": f"{HERE}.teacher"},
    teacher_args={"sparse": {"slope": -3.0}},
    scale=10.0,
    temperature=2.0,
)
BOTH = "kl, weight=0.5, of dense (teacher, made at the first batch), sparse (teacher, made at the first batch)"
CASE = (
    Case(
        make=partial(IDFFlops, "net.body", IDF, 0.3, 1),
        neutral=partial(IDFFlops, "net.body", IDF, 0.0, 1),
        by_hand=FlopsByHand,
        data=DOCUMENTS,
        says=(
            "net.body, weight=0.3 after 1 steps, divided by IDF",
            "weight=0: inactive",
            "net.head, weight=0.1 after 5 steps",
        ),
        variants=[partial(IDFFlops, "net.head", weight=0.1, ramp_steps=5, group_size=2, threshold=3, position=0)],
        invalid=[
            ({"layer": "net.body", "weight": -0.1}, "weight"),
            ({"layer": "net.body", "ramp_steps": 0}, "ramp_steps"),
            ({"layer": "net.body", "group_size": 0}, "group_size"),
            ({"layer": "net.body", "threshold": -1}, "threshold"),
            ({"layer": "net.body", "position": -1}, "position"),
            ({"layer": "net.body", "loss": -1}, "loss"),
            ({"layer": "net.body", "idf": [1.0, -0.5]}, "idf"),
            ({"layer": "net.body", "pooling": "max"}, "pooling"),
        ],
    ),
    Case(
        make=partial(ENSEMBLE, weight=0.5),
        neutral=partial(ENSEMBLE, weight=0.0),
        by_hand=EnsembleByHand,
        data=DOCUMENTS,
        says=(BOTH, "weight=0: inactive", BOTH.replace("kl", "margin_mse")),
        variants=[partial(ENSEMBLE, weight=0.5, kind="margin_mse")],
        invalid=[
            ({"layer": "net.head"}, "teachers"),
            ({"layer": "net.head", "scores": {"a": "1"}, "weight": -0.1}, "weight"),
            ({"layer": "net.head", "scores": {"a": "1"}, "scale": 0.0}, "scale"),
            ({"layer": "net.head", "scores": {"a": "1"}, "temperature": 0.0}, "temperature"),
            ({"layer": "net.head", "scores": {"a": "1"}, "kind": "infonce"}, "kind"),
            ({"layer": "net.head", "scores": {"a": "1"}, "place": "disk"}, "place"),
            ({"layer": "net.head", "scores": {"a": "1"}, "teachers": {"a": "m.f"}}, "scores"),
            ({"layer": "net.head", "scores": {"a": "1"}, "teacher_args": {"b": {}}}, "teacher_args"),
            ({"layer": "net.head", "scores": {"a": "1"}, "teacher_entries": {"b": "0"}}, "teacher_entries"),
        ],
    ),
    NetworkCase(
        make=partial(QueryIDF, idf=[0.0, 0.5, 2.0, 1.0], special_token_ids=[0], trainable=True),
        inputs=(torch.tensor([[1, 2, 2, 0], [3, 3, 0, 0], [1, 2, 3, 0]]),),
        invalid=[
            ({"idf": [[1.0]]}, "idf"),
            ({"idf": [math.inf]}, "idf"),
            ({"idf": [1.0], "special_token_ids": [1]}, "special_token_ids"),
            ({"idf": [1.0], "special_token_ids": [-1]}, "special_token_ids"),
        ],
    ),
    MetricCase(
        make=partial(RetrievalMetrics, k=3),
        batches=[_queries(seed) for seed in range(4)],
        expected=_by_hand,
        invalid=[({"k": 0}, "k")],
    ),
)


# -- the core ---------------------------------------------------------------------------------------------------------


def test_flops_by_hand_and_its_gradient():
    w = torch.tensor([[1.0, 0.0, 4.0], [3.0, 2.0, 0.0]], dtype=torch.float64).requires_grad_()
    value = flops_penalty(w)
    assert value.item() == 2.0**2 + 1.0**2 + 2.0**2
    (gradient,) = torch.autograd.grad(value, w)  # 2 mean / N where w is not 0
    assert gradient.tolist() == [[2.0, 0.0, 2.0], [2.0, 1.0, 0.0]]
    idf = torch.tensor([0.5, 2.0, 4.0])
    assert flops_penalty(idf * w, idf).item() == 9.0  # powers of two: exact
    assert flops_penalty(w, torch.tensor([1.0, 0.0, 1.0])).item() == 8.0
    assert flops_penalty(w, group_size=2).item() == 1 + 16 + 9 + 4
    assert flops_penalty(w, threshold=1).item() == 9.0
    assert flops_penalty(w, threshold=2).item() == 0.0
    with pytest.raises(ValueError, match="2 documents are no multiple of `group_size`=3"):
        flops_penalty(w, group_size=3)


def test_it_is_float32_in_half_precision():
    w = torch.full((4, 30_000), 300.0, dtype=torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        value = flops_penalty(w)
    assert value.item() == pytest.approx(30_000 * 90_000, rel=1e-6)  # beyond float16
    assert splade_vectors(w[None]).dtype is torch.float32


# sentence-transformers 6.2.0, FlopsLoss(None, threshold).compute_loss_from_embeddings, backward to the logits: the
# value, and the sums of the gradient's squares and of its sizes.
@pytest.mark.parametrize(
    ("threshold", "figures"),
    [
        (None, (10.621918678283691, 2.068159580230713, 23.678356170654297)),
        (25, (2.3341283798217773, 0.21182949841022491, 4.964088439941406)),
    ],
)
def test_it_is_the_loss_of_sentence_transformers(threshold, figures):
    logits = torch.randn(12, 50, generator=torch.Generator().manual_seed(0)).requires_grad_()
    value = flops_penalty(logits.relu(), threshold=threshold)
    value.backward()
    found = value.item(), logits.grad.square().sum().item(), logits.grad.abs().sum().item()
    assert found == pytest.approx(figures, rel=1e-6)


def test_the_ramp_and_the_weights_of_a_text():
    assert [quadratic_ramp(step, 4) for step in (0, 1, 3, 9)] == [0.0625, 0.25, 1.0, 1.0]
    logits = torch.tensor([[[1.0, -2.0, 0.0], [5.0, -1.0, 2.0]]])
    assert splade_vectors(logits, torch.tensor([[1, 0]])).expm1().tolist()[0] == pytest.approx([1.0, 0.0, 0.0])
    assert splade_vectors(logits).expm1().tolist()[0] == pytest.approx([5.0, 0.0, 2.0])


def test_teachers_are_averaged_in_units_of_their_own():
    dense, sparse = torch.tensor([[0.2, 0.4, 0.3]]), torch.tensor([[10.0, 10.0, 30.0]])
    scores = ensemble_scores([dense, sparse], 30.0)
    torch.testing.assert_close(scores, torch.tensor([[0.0, 15.0, 22.5]]), atol=1e-3, rtol=0.0)  # the 1e-6
    moved = ensemble_scores([5 * dense - 3, sparse], 30.0)
    torch.testing.assert_close(scores, moved, atol=1e-3, rtol=0.0)
    assert ensemble_scores([torch.tensor([[7.0]])]).item() == 0.0
    assert ensemble_scores([torch.tensor([[0.0, 1e-6]])], 1.0)[0].tolist() == pytest.approx([0.0, 0.5])


def test_both_distillations_by_hand():
    s, t = torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[0.0, 0.0]])
    assert score_distillation_loss(s, t).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-6)
    assert score_distillation_loss(t, t).item() == pytest.approx(0.0, abs=1e-7)
    s, t = torch.tensor([[4.0, 1.0, 2.0]]), torch.tensor([[3.0, 3.0, 0.0]])
    assert score_distillation_loss(s, t, "margin_mse").item() == ((3 - 0) ** 2 + (2 - 3) ** 2) / 2
    other = score_distillation_loss(s, t, "margin_mse", positives=torch.tensor([2]))
    assert other.item() == ((-2 + 3) ** 2 + (1 + 3) ** 2) / 2
    assert score_distillation_loss(s, t, "margin_mse", 2.0).item() == 5.0 / 4


def test_idf_of_a_corpus():
    idf = idf_from_corpus([[0, 2, 2, 1], [2, 0], [0]], 4, special_token_ids=[0])
    # Two documents have a token that is not special.
    assert idf.tolist() == pytest.approx(
        [0.0, math.log(1 + 1.5 / 1.5), math.log(1 + 0.5 / 2.5), math.log(1 + 2.5 / 0.5)]
    )
    assert idf_from_corpus([[1]], 3, unseen=1.0).tolist()[0] == 1.0
    with pytest.raises(ValueError, match=r"token ids must be in \[0, 2\), got 1 to 2"):
        idf_from_corpus([[1, 2]], 2)
    with pytest.raises(ValueError, match="at least one with a token"):
        idf_from_corpus([[0]], 2, [0])


def test_ranks_are_those_of_torchmetrics_without_ties():
    draw = torch.Generator().manual_seed(1)
    scores, relevant = torch.randn(6, 30, generator=draw), torch.rand(6, 30, generator=draw) < 0.2
    given = scores.flatten(), relevant.flatten(), torch.arange(6).repeat_interleave(30)
    rank, ndcg = ranking_scores(scores, relevant)
    assert rank.mean().item() == pytest.approx(RetrievalMRR()(given[0], given[1], given[2]).item(), abs=1e-6)
    theirs = RetrievalNormalizedDCG(top_k=10)(given[0], given[1], given[2])
    assert ndcg.mean().item() == pytest.approx(theirs.item(), abs=1e-6)
    tied = ranking_scores(torch.zeros(1, 4), torch.tensor([[True, False, False, False]]))[0]
    assert tied.item() == 0.25
    broken = ranking_scores(torch.tensor([[torch.nan, 2.0, -torch.inf]]), torch.tensor([[True, False, False]]))
    assert [value.item() for value in broken] == pytest.approx([1 / 3, 0.5])


# sentence-transformers 6.2.0, InformationRetrievalEvaluator(mrr_at_k=[3, 10, 40], ndcg_at_k=[3, 10],
# corpus_chunk_size=16) by util.cos_sim and util.dot_score, of the rows below: 11 of the 12 queries have 1 to 14
# relevant documents of 40.
@pytest.mark.parametrize(
    ("cosine", "figures"),
    [
        (True, (0.13915647945247667, 0.18232091402327077, 0.2424242424242424, 0.27525252525252525, 0.3012423182877728)),
        (False, (0.133570793274796, 0.18136437823001755, 0.22727272727272727, 0.262987012987013, 0.28860028860028863)),
    ],
)
def test_rankings_are_valued_as_sentence_transformers_does(cosine, figures):
    draw = torch.Generator().manual_seed(4)
    queries, documents = torch.randn(12, 6, generator=draw), torch.randn(40, 6, generator=draw)
    relevant = torch.rand(12, 40, generator=draw) < 0.1
    relevant[:2] = False
    relevant[1, :14] = True
    if cosine:
        queries, documents = F.normalize(queries), F.normalize(documents)
    scores, found = queries @ documents.T, {}
    for k in (3, 10):
        metric = RetrievalMetrics(k=k)
        for chunk in (slice(0, 5), slice(5, 12)):
            metric.update(scores[chunk], relevant[chunk])
        found |= {name: value.item() for name, value in metric.compute().items()}
    names = ("ndcg@3", "ndcg@10", "mrr@3", "mrr@10", "mrr")
    assert found == pytest.approx(dict(zip(names, figures, strict=True)), abs=1e-6)


def test_queries_are_bags_of_words():
    query = QueryIDF([1.0, 0.5, 2.0, -1.0], special_token_ids=[0])
    given = torch.tensor([[2, 1, 2, 0], [3, 1, 2, 2]])
    assert query(given).tolist() == [[0.0, 0.5, 2.0, 0.0], [0.0, 0.5, 2.0, 0.0]]
    masked = query(given, torch.tensor([[0, 1, 0, 1], [1, 0, 1, 1]]))
    assert masked.tolist() == [[0.0, 0.5, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0]]
    assert not [*query.parameters()]


# -- over ranks -------------------------------------------------------------------------------------------------------


class Sparse(LightningModule):
    """Documents that a layer makes sparse, beside a loss of theirs."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 10), nn.ReLU())

    def training_step(self, batch, batch_idx):
        return 0.0 * self.net(batch[0]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.5)


def _documents(rows=slice(None)):
    return TensorDataset(torch.randn(16, 6, generator=torch.Generator().manual_seed(3))[rows])


def _train(rows, size, group_size=1, **options):
    module = Sparse()
    flops = IDFFlops("net", [0.5 + n for n in range(10)], weight=1.0, ramp_steps=2, group_size=group_size)
    trainer = make_trainer(callbacks=[flops], use_distributed_sampler=False, max_epochs=1, **options)
    trainer.fit(module, DataLoader(_documents(rows), size))
    logged = {name: trainer.callback_metrics[f"reg/idf_flops/{name}"].item() for name in ("flops", "nnz", "empty")}
    return logged, [p.detach().clone() for p in module.parameters()]


def _train_on_rank(_):
    rank = torch.distributed.get_rank()
    found = []
    for cut, group_size in ((5, 1), (6, 2)):  # of 8 documents in a step
        mine = range(cut) if rank == 0 else range(cut, 8)
        found.append(_train([*mine, *(8 + n for n in mine)], len(mine), group_size, **TWO_RANKS))
    return found


def test_two_ranks_with_unequal_batches_are_one_of_the_joined_batch(two_processes):
    alone = [_train(list(range(16)), 8, group_size) for group_size in (1, 2)]
    assert alone[1][0]["flops"] < 0.9 * alone[0][0]["flops"]  # the sum of two has pulled twice as strongly
    for rank in two_processes.run(_train_on_rank, None):
        for (found, weights), (logged, expected) in zip(rank, alone, strict=True):
            assert found == pytest.approx(logged, rel=1e-5)
            for one, two in zip(weights, expected, strict=True):
                torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)  # float32, sums in another order


# -- the techniques ---------------------------------------------------------------------------------------------------


class Scaled(nn.Sequential):
    """Puts out what it was made of times a factor."""

    def __init__(self, layers, factors):
        super().__init__(*layers)
        self.factors = factors

    def forward(self, x):
        return super().forward(x) * self.factors


@pytest.mark.parametrize("group_size", [1, 2])
def test_idf_in_the_query_and_idf_divided_out_of_the_layer_train_the_same(group_size):
    """Powers of two, by which products are exact: the same to the last bit."""
    idf, ends = torch.tensor([2.0**n for n in range(-4, 6)]), []

    class Ranking(Sparse):
        def training_step(self, batch, batch_idx):
            query, document = torch.zeros(8, 10), self.net(batch[0])
            query[torch.arange(8), torch.arange(8)] = 1.0
            return F.cross_entropy((query * (1.0 if explicit else idf)) @ document.T, torch.arange(8))

    for explicit in (False, True):
        module = Ranking()
        module.net = Scaled(module.net, idf) if explicit else module.net
        flops = IDFFlops("net", idf.tolist() if explicit else None, 0.3, 2, group_size)
        trainer = make_trainer(callbacks=[flops], max_epochs=2)
        trainer.fit(module, DataLoader(_documents(), 8))
        ends.append([*module.parameters(), trainer.callback_metrics["reg/idf_flops/flops"]])
    assert all(torch.equal(one, two) for one, two in zip(*ends, strict=True))


def test_the_ramp_follows_optimizer_steps():
    seen = []

    class Terms(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            logged = trainer.callback_metrics
            seen.append((logged["reg/idf_flops/term"] / logged["reg/idf_flops/flops"]).item())

    trainer = make_trainer(callbacks=[IDFFlops("net", None, 0.9, 3), Terms()], accumulate_grad_batches=2)
    trainer.fit(Sparse(), DataLoader(_documents(), 4))  # 4 batches in each of 2 epochs
    assert seen == pytest.approx([0.1, 0.1, 0.4, 0.4, 0.9, 0.9, 0.9, 0.9])


def test_empty_documents_are_told():
    module = Sparse()
    nn.init.constant_(module.net[0].bias, -100.0)
    trainer = make_trainer(callbacks=[IDFFlops("net")], log_every_n_steps=1, max_epochs=1)
    with pytest.warns(UserWarning, match="8 of 8 documents have no active entry in 'net': the vectors collapse"):
        trainer.fit(module, DataLoader(_documents(), 8))
    assert trainer.callback_metrics["reg/idf_flops/empty"].item() == 1.0
    assert trainer.callback_metrics["reg/idf_flops/nnz"].item() == 0.0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"pooling": "splade"}, r"gave \(8, 10\) in this step, where trained logits \(N, T, V\) are needed"),
        ({"idf": [1.0, 2.0]}, r"where trained vectors \(N, V\) with V=2, the length of `idf`, are needed"),
        ({"position": 1}, "gave .* are needed. Name the layer that puts them out, say which pass in `position`"),
        ({"group_size": 3}, "8 documents in this step, which is no multiple of group_size=3"),
    ],
)
def test_what_is_no_vector_of_documents_is_refused(arguments, says):
    with pytest.raises(MisconfigurationException, match=says):
        make_trainer(callbacks=[IDFFlops("net", **arguments)]).fit(Sparse(), DataLoader(_documents(), 8))


def test_a_layer_that_rests_gets_no_gradient_and_one_without_gradient_is_refused():
    class Resting(Sparse):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + 0.0 * self.other

    module = Resting()
    module.other = nn.Parameter(torch.zeros(()))
    module.net.requires_grad_(requires_grad=False)
    trainer = make_trainer(callbacks=[IDFFlops("net", weight=1.0)])
    trainer.fit(module, DataLoader(_documents(), 8))
    assert trainer.callback_metrics["reg/idf_flops/flops"] > 0

    class Detached(Resting):
        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                self.net(batch[0])
            return 0.0 * self.other

    module = Detached()
    module.other = nn.Parameter(torch.zeros(()))
    trainer = make_trainer(callbacks=[IDFFlops("net")])
    with pytest.raises(MisconfigurationException, match=r"^IDFFlops: .* that 'net' gave in this step have no gradient"):
        trainer.fit(module, DataLoader(_documents(), 8))


class Retriever(LightningModule):
    """A small masked language model, whose documents a bag of words asks for."""

    def __init__(self, model):
        super().__init__()
        self.model, self.query = model, QueryIDF([1.0] * 40, [0])
        self.seen = []

    def training_step(self, batch, batch_idx):
        logits = self.model(batch["ids"], attention_mask=batch["mask"]).logits
        documents, queries = splade_vectors(logits, batch["mask"]), self.query(batch["query"])
        self.seen.append((documents.detach(), queries))
        return F.cross_entropy(queries @ documents.T, torch.arange(len(queries)) * 2)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def _masked_language_model(**options):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=40, **sizes, **options))


def _texts():
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 40, (4, 6), generator=draw)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2] * 2)
    given = torch.tensor([[0.5, 0.1], [0.2, 0.9]])
    return {"ids": ids, "mask": mask, "query": ids[::2, :3], "dense": given, "sparse": 9 * given.flip(1)}


def test_a_masked_language_model_as_published():
    batch, module = _texts(), Retriever(_masked_language_model())
    flops = IDFFlops("model.cls", weight=0.5, ramp_steps=2, pooling="splade", mask_key="mask")
    trainer = make_trainer(callbacks=[flops], log_every_n_steps=1, max_epochs=1)
    trainer.fit(module, DataLoader([batch], batch_size=None))
    documents = module.seen[0][0]
    assert trainer.callback_metrics["reg/idf_flops/term"].item() == pytest.approx(
        0.5 * 0.25 * documents.mean(0).square().sum().item(), rel=1e-5
    )
    assert trainer.callback_metrics["reg/idf_flops/nnz"].item() == pytest.approx((documents > 0).sum(1).float().mean())
    wrong = make_trainer(callbacks=[IDFFlops("model.cls", pooling="splade", mask_key="query")])
    with pytest.raises(MisconfigurationException, match=r"must name the mask \(4, 6\) of the tokens"):
        wrong.fit(module, DataLoader([batch], batch_size=None))


def test_mappings_count_by_their_entry():
    """As modules of sentence-transformers and transformers give them; the value is that of the tensors themselves."""

    class Mapped(nn.Sequential):
        def forward(self, x):
            return {"token_embeddings": x, "sentence_embedding": super().forward(x)}

    class Sentences(Sparse):
        def __init__(self):
            super().__init__()
            self.net = Mapped(*self.net)

        def training_step(self, batch, batch_idx):
            return 0.0 * self.net(batch[0])["sentence_embedding"].sum()

    found = []
    for module in (Sparse(), Sentences()):
        scores = EnsembleDistillation("net", scores={"given": "1"})
        data = DataLoader(TensorDataset(*_documents().tensors, torch.arange(160.0).view(16, 10).sin()), 8)
        trainer = make_trainer(callbacks=[IDFFlops("net"), scores], max_epochs=1)
        trainer.fit(module, data)
        found.append({name: value.item() for name, value in trainer.callback_metrics.items()})
    assert found[0] == found[1]
    assert found[0]["reg/idf_flops/flops"] > 0
    assert found[0]["reg/ensemble_distillation/term"] > 0

    found = []
    for layer in ("model", "model.cls"):
        flops = IDFFlops(layer, pooling="splade", mask_key="mask")
        trainer = make_trainer(callbacks=[flops], max_epochs=1)
        trainer.fit(
            Retriever(_masked_language_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)),
            DataLoader([_texts()], batch_size=None),
        )
        found.append(trainer.callback_metrics["reg/idf_flops/flops"].item())
    assert found[0] == found[1]


class TwoTowers(LightningModule):
    def __init__(self):
        super().__init__()
        self.held = (n for n in "ab")  # cannot be copied, which scores of the batch do not ask for
        self.documents, self.queries = nn.Linear(3, 5), nn.Linear(2, 5)

    def training_step(self, batch, batch_idx):
        return 0.0 * (self.documents(batch["documents"]).sum() + self.queries(batch["queries"]).sum())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


class DenseTeacher(nn.Module):
    def forward(self, batch):
        return batch["queries"], batch["documents"][:, :2]


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("kind", ["kl", "margin_mse"])
def test_candidates_are_own_documents_or_all(in_batch, kind):
    draw = torch.Generator().manual_seed(0)
    queries, documents = torch.randn(2, 2, generator=draw), torch.randn(6, 3, generator=draw)
    width = 6 if in_batch else 3
    batch = {"queries": queries, "documents": documents, "given": torch.randn(2, width, generator=draw)}
    module, teachers = TwoTowers(), {"dense": f"{HERE}.DenseTeacher"} if in_batch else None
    if in_batch:
        module.held = None
    technique = EnsembleDistillation(
        "documents", "queries", teachers, None, {"dense": ""} if in_batch else None, {"sparse": "given"}, kind=kind
    )
    trainer = make_trainer(callbacks=[technique], log_every_n_steps=1, max_epochs=1)
    trainer.fit(module, DataLoader([batch], batch_size=None))
    q, d = module.queries(queries), module.documents(documents)
    if in_batch:
        student, target, positives = q @ d.T, [queries @ documents[:, :2].T, batch["given"]], [0, 3]
    else:
        student = torch.stack([d[3 * row : 3 * row + 3] @ q[row] for row in range(2)])
        target, positives = [batch["given"]], [0, 0]
    target = ensemble_scores(target, 30.0)
    expected = score_distillation_loss(student, target, kind, positives=torch.tensor(positives))
    assert trainer.callback_metrics["reg/ensemble_distillation/term"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        ({"sparse": "given"}, r"the student gave \(2, 3\) in this step, where scores \(2, 4\)"),
        ({"sparse": "given", "dense": "other"}, r"teacher 'dense' gave \(2, 3\)"),
    ],
)
def test_scores_of_other_candidates_are_refused(scores, says):
    batch = {"queries": torch.randn(2, 2), "documents": torch.randn(6, 3)}
    batch |= {"given": torch.randn(2, 4), "other": torch.randn(2, 3)}
    trainer = make_trainer(callbacks=[EnsembleDistillation("documents", "queries", scores=scores)])
    with pytest.raises(MisconfigurationException, match=says):
        trainer.fit(TwoTowers(), DataLoader([batch], batch_size=None))


def test_a_student_without_gradient_is_refused_unless_it_rests():
    class Detached(TwoTowers):
        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                super().training_step(batch, batch_idx)
            return 0.0 * self.other

    batch = {"queries": torch.randn(2, 2), "documents": torch.randn(6, 3), "given": torch.randn(2, 3)}
    for rests in (False, True):
        module = Detached()
        module.other = nn.Parameter(torch.zeros(()))
        module.queries.requires_grad_(requires_grad=not rests)
        module.documents.requires_grad_(requires_grad=not rests)
        technique = EnsembleDistillation("documents", "queries", scores={"sparse": "given"})
        trainer = make_trainer(callbacks=[technique], max_steps=1)
        if rests:
            trainer.fit(module, DataLoader([batch], batch_size=None))
        else:
            with pytest.raises(
                MisconfigurationException,
                match=r"^EnsembleDistillation: .* that 'documents' and 'queries' gave in this step have",
            ):
                trainer.fit(module, DataLoader([batch], batch_size=None))
