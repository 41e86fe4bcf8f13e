"""Search over the standard library: BM25, dense and sparse vectors, before and after each technique.

Run it with ``python examples/search.py``; it takes about a minute on one core and downloads nothing. It is a notebook
too: ``examples/notebooks/search.ipynb``. It needs bm25s: ``pip install -e '.[examples]'``.
"""

# %% [markdown]
# # Search over the standard library
#
# The first line of a docstring is what somebody asks for, the rest is what should be found. Three kinds of search
# engine do that here: counted words (BM25), one dense vector per document, and sparse vectors over a vocabulary, which
# an inverted index can hold. The two that are trained are small modules written by hand; techniques of `lightning_reg`
# are attached to their `Trainer`, and the modules stay as they are.

# %%
import ast
import logging
import os
import re
import sysconfig
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bm25s
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_reg import (
    EnsembleDistillation,
    FocalContrastive,
    HardNegativeMixing,
    IDFFlops,
    QueryIDF,
    RetrievalMetrics,
    plots,
)
from lightning_reg.functional import idf_from_corpus

SHORT = "LIGHTNING_REG_SHORT" in os.environ  # the tests run it in seconds
DENSE_STEPS, SPARSE_STEPS, VOCABULARY, BATCH = (5, 5, 500, 16) if SHORT else (600, 300, 3000, 64)
torch.set_num_threads(1)
console = Console(width=100)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec|number of training batches)")

# %% [markdown]
# ## The data
#
# Docstrings with at least 12 words behind their first line. 800 are kept for the test: what is searched there are
# documents that training has never seen, with queries that it has never seen. The package that a docstring stands in is
# its domain.


# %%
def docstrings(folder: Path) -> tuple[list[list[str]], list[list[str]], list[str]]:
    """Words of queries and of documents, and the packages that they are from."""
    kinds, found = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef), {}
    for path in sorted(folder.glob("[a-c]*.py") if SHORT else folder.rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & {*path.parts}:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            text = (ast.get_docstring(node) or "") if isinstance(node, kinds) else ""
            first, _, rest = text.partition("\n")
            query, document = (re.findall(r"[a-z]+", part.lower()) for part in (first, rest))
            if len(query) > 2 and len(document) >= 12:
                package = path.relative_to(folder).parts[0].removesuffix(".py")
                found.setdefault(tuple(document), (query, package))  # the same text twice would be a wrong answer
    return [query for query, _ in found.values()], [[*words] for words in found], [name for _, name in found.values()]


queries, documents, packages = docstrings(Path(sysconfig.get_paths()["stdlib"]))
order = torch.randperm(len(queries), generator=torch.Generator().manual_seed(0)).tolist()
size = min(800, len(order) // 2)
tested, trained = order[:size], order[size:]
counts = Counter(word for n in trained for word in [*documents[n], *queries[n]])
numbers = {word: number for number, (word, _) in enumerate(counts.most_common(VOCABULARY - 1), 1)}  # 0 is padding


def token_ids(texts: list[list[str]]) -> Tensor:
    """Numbers of known words, ``(texts, words of the longest)``, padded with 0."""
    rows = [torch.tensor([numbers[word] for word in text if word in numbers], dtype=torch.long) for text in texts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def bags(texts: list[list[str]]) -> Tensor:
    """1 for each word that occurs, ``(texts, VOCABULARY)``."""
    found = torch.zeros(len(texts), VOCABULARY).scatter(1, token_ids(texts), 1.0)
    found[:, 0] = 0.0
    return found


asked, asked_bags, document_bags = token_ids(queries), bags(queries), bags(documents)
searched = document_bags[tested]
idf = idf_from_corpus((row.nonzero()[:, 0].tolist() for row in document_bags[trained]), VOCABULARY, [0])
console.print(f"{len(trained):,} docstrings to train on, {len(tested):,} for the test, of {len({*packages})} packages")

# %% [markdown]
# ## How it is measured
#
# NDCG at 10 and the mean reciprocal rank of the right document among those of the test, in per cent, by
# `RetrievalMetrics`; entries of a document that are not zero; bytes of the index (4 for a number, 4 more for the place
# of a sparse one); and milliseconds from a query's words to the scores of all documents, one query at a time.


# %%
class Results:
    """A row for each search engine."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, float]] = {}
        self.scores: dict[str, Tensor] = {}  # of the queries of the test, (queries, documents)

    def add(self, name: str, search: Callable[[int], Tensor], entries: float, is_sparse: bool) -> None:
        search(tested[0])
        started = time.perf_counter()
        scores = torch.stack([search(n) for n in tested])
        milliseconds = 1000 * (time.perf_counter() - started) / len(tested)
        metric = RetrievalMetrics(k=10)
        metric.update(scores, torch.eye(len(tested), dtype=torch.bool))
        found = {key: 100 * value.item() for key, value in metric.compute().items()}
        size = entries * len(tested) * (8 if is_sparse else 4) / 1000
        self.rows[name] = {**found, "nnz": entries, "index, kB": size, "ms / query": milliseconds}
        self.scores[name] = scores

    def table(self) -> Table:
        table = Table("engine", *next(iter(self.rows.values())), title="queries that training has not seen")
        for name, row in self.rows.items():
            table.add_row(name, *(f"{value:.{2 if key == 'ms / query' else 1}f}" for key, value in row.items()))
        return table


results = Results()

# %% [markdown]
# ## BM25
#
# Nothing is trained; `bm25s` keeps the weight of each word in each document. It knows all words, the engines below the
# 3,000 most frequent of the training documents.

# %%


def by_words(places: list[int]) -> tuple[Callable[[int], Tensor], float]:
    """What scores these documents for a query, and the entries of one."""
    engine = bm25s.BM25()
    engine.index([documents[n] for n in places], show_progress=False)
    return lambda n: torch.from_numpy(engine.get_scores(queries[n])), len(engine.scores["data"]) / len(places)


results.add("BM25", *by_words(tested), is_sparse=True)

# %% [markdown]
# ## Dense vectors
#
# One encoder for queries and documents, cosines over a temperature, and the other documents of the batch as wrong
# answers. `FocalContrastive` lets queries count more whose document is badly ranked, `HardNegativeMixing` mixes the
# hardest wrong answers of each query into new ones.


# %%
class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer = nn.Linear(VOCABULARY, 64, bias=False), nn.Linear(64, 64)

    def forward(self, bags: Tensor) -> Tensor:
        mean = self.words(bags) / bags.sum(1, keepdim=True).clamp(min=1)
        return F.normalize(mean + self.layer(mean).tanh())


class DenseSearch(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        q, d = self.encoder(batch["query_bags"]), self.encoder(batch["documents"])
        return F.cross_entropy(q @ d.T / 0.05, torch.arange(len(q)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 5e-3)


def train(module: LightningModule, callbacks: list[Any], steps: int, **teachers: Tensor) -> None:
    """``teachers`` have scored all documents to train on for all queries; a batch gets its part of each table."""

    def collate(rows: list[int]) -> dict[str, Tensor]:
        places = [trained[row] for row in rows]
        part = {"queries": asked[places], "query_bags": asked_bags[places], "documents": document_bags[places]}
        return part | {name: table[rows][:, rows] for name, table in teachers.items()}

    trainer = Trainer(
        max_epochs=-1, max_steps=steps, accelerator="cpu", callbacks=callbacks, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(range(len(trained)), BATCH, shuffle=True, drop_last=True, collate_fn=collate))
    module.eval()


@torch.no_grad()
def add_dense(name: str, callbacks: list[Any]) -> DenseSearch:
    seed_everything(0, verbose=False)
    module = DenseSearch()
    with torch.enable_grad():
        train(module, callbacks, DENSE_STEPS)
    index = module.encoder(searched)
    results.add(name, lambda n: index @ module.encoder(bags([queries[n]]))[0], 64, is_sparse=False)
    return module


dense = add_dense("dense", [])
add_dense("dense, FocalContrastive", [FocalContrastive(gamma=0.5)])
mixing = HardNegativeMixing("encoder", 0.05, num_pairs=7, list_mix=True)
mixed = add_dense("dense, HardNegativeMixing", [mixing])

# %% [markdown]
# ## Sparse vectors without a network for queries
#
# A document's vector has a weight for each word of the vocabulary, those that it implies too. A query is never encoded:
# `QueryIDF` gives each of its words the word's IDF. The index is inverted: for each word the documents that have it.
#
# `IDFFlops` keeps the vectors sparse, in frequent words first. `EnsembleDistillation` lets the scores of a batch follow
# those of BM25 and of the dense encoder, each brought to one scale.


# %%
class Documents(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Linear(VOCABULARY, 128), nn.Tanh(), nn.Linear(128, VOCABULARY))

    def forward(self, words: Tensor) -> Tensor:
        return (words + self.expand(words)).relu().log1p()


class SparseSearch(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.queries, self.documents = QueryIDF(idf, special_token_ids=[0]), Documents()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        scores = self.queries(batch["queries"]) @ self.documents(batch["documents"]).T
        return F.cross_entropy(scores, torch.arange(len(scores)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 2e-3)


def inverted(vectors: Tensor) -> Callable[[int], Tensor]:
    """Search in an index that has for each word its documents and their weights."""
    words, places = vectors.T.nonzero().unbind(1)
    weights = vectors.T[words, places]
    ends = words.bincount(minlength=VOCABULARY).cumsum(0).tolist()

    def search(n: int) -> Tensor:
        scores = torch.zeros(len(vectors))
        for number in {numbers[word] for word in queries[n] if word in numbers}:
            part = slice(ends[number - 1], ends[number])
            scores.index_add_(0, places[part], weights[part], alpha=idf[number].item())
        return scores

    return search


@torch.no_grad()
def add_sparse(name: str, callbacks: list[Any], **teachers: Tensor) -> None:
    seed_everything(0, verbose=False)
    module = SparseSearch()
    with torch.enable_grad():
        train(module, callbacks, SPARSE_STEPS, **teachers)
    index = module.documents(searched)
    results.add(name, inverted(index), (index > 0).sum(1).float().mean().item(), is_sparse=True)


search_words, _ = by_words(trained)
with torch.no_grad():
    teachers = {
        "words": torch.stack([search_words(n) for n in trained]),
        "meaning": dense.encoder(asked_bags[trained]) @ dense.encoder(document_bags[trained]).T,
    }
flops = {"layer": "documents", "weight": 0.05, "ramp_steps": 60}
add_sparse("sparse", [])
add_sparse("sparse, IDFFlops", [IDFFlops(**flops)])
distillation = EnsembleDistillation("documents", "queries", scores={name: name for name in teachers})
add_sparse("sparse, IDFFlops, EnsembleDistillation", [IDFFlops(**flops), distillation], **teachers)

# %%
console.print(results.table())

# %% [markdown]
# One run each: differences of a point are within what another seed makes of it, and of a technique alone
# `benchmarks/effects` has three seeds with intervals. BM25, which is not trained at all, is hard to beat here. A real
# encoder beats it, MiniLM: `benchmarks/effects/search.py` tunes that with our techniques and with losses of
# sentence-transformers (`hardness_mode`, GISTEmbedLoss, orthogonal regularization).
#
# ## Quality against size
#
# What an index costs is told by its size, so both belong in one picture.

# %%
figure = plots.quality_by_size(
    {name: (row["index, kB"], row["ndcg@10"]) for name, row in results.rows.items()},
    size="index, kB",
    quality="NDCG@10, %",
)
figure.savefig("search.png", dpi=150)
axes = plt.figure(figsize=figure.get_size_inches(), dpi=150).add_axes((0, 0, 1, 1))  # a notebook shows pyplot's figures
axes.imshow(plt.imread("search.png"))
axes.axis("off")
plt.show()

# %% [markdown]
# ## By package
#
# What is found depends on the domain, and one mean hides that: the packages with the most queries in the test.

# %%
shown = {"BM25": "BM25", "dense": "dense", "sparse": "sparse, IDFFlops, EnsembleDistillation"}
by_package = Table("package", "queries", *shown, title="NDCG@10, %")
for package, count in Counter(packages[n] for n in tested).most_common(6):
    own = torch.tensor([packages[n] == package for n in tested])
    cells = []
    for name in shown.values():
        metric = RetrievalMetrics(k=10)
        metric.update(results.scores[name][own], torch.eye(len(tested), dtype=torch.bool)[own])
        cells.append(f"{100 * metric.compute()['ndcg@10'].item():.1f}")
    by_package.add_row(package, str(count), *cells)
console.print(by_package)
