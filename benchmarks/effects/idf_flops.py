"""Search over the standard library: queries with and without IDF, under the same FLOPS penalty.

Docstrings of Python's standard library with at least 12 words behind their first line: the first line is the query, the
rest the document. 800 are kept for the test and never trained on. Vocabulary: the 3,000 most frequent words. Documents
are bags of words x through a linear layer of 128, tanh and a linear layer f back to the vocabulary: log(1 + relu(x +
f(x))). Queries are never encoded: a bag of words, with a weight of 1 or of the IDF from the trained documents.
Cross-entropy over the documents of the batch, Adam 2e-3, batch 64, 200 steps; FLOPS penalty with a ramp of 60. MRR and
NDCG@10 (in per cent) among the documents of the test, and active entries of a document. The last row is not trained:
the words that query and document share, with IDF.
"""

import ast
import re
import sys
import sysconfig
from collections import Counter
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from _shared import Arm, fit
from lightning.pytorch import LightningModule, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import IDFFlops, QueryIDF, RetrievalMetrics
from lightning_reg.functional import idf_from_corpus

VOCABULARY, TESTED, STEPS = 3000, 800, 200
ARMS = {f"{kind}, weight {weight:g}": (kind, weight) for weight in (0.05, 0.5) for kind in ("plain FLOPS", "IDF-FLOPS")}


@cache
def docstrings():
    """First lines and rests, as lists of words."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = {}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
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
                found.setdefault(tuple(document), query)  # the same text twice would be a wrong answer
    return [*found.values()], [*found]


def bags(texts, numbers):
    rows = torch.zeros(len(texts), VOCABULARY)
    for row, words in zip(rows, texts, strict=True):
        row[[numbers[word] for word in words if word in numbers]] = 1.0
    return rows


@cache
def vocabulary(seed):
    """The order of the pairs, those of the test first, and the numbers of the words."""
    queries, documents = docstrings()
    order = torch.randperm(len(queries), generator=torch.Generator().manual_seed(seed)).tolist()
    counts = Counter(word for n in order[TESTED:] for word in [*documents[n], *queries[n]])
    return order, {word: number for number, (word, _) in enumerate(counts.most_common(VOCABULARY))}


@cache
def data(seed):
    queries, documents = docstrings()
    order, numbers = vocabulary(seed)
    q, d = bags([queries[n] for n in order], numbers), bags([documents[n] for n in order], numbers)
    return q, d, idf_from_corpus((row.nonzero()[:, 0].tolist() for row in d[TESTED:]), VOCABULARY)


class Documents(nn.Module):
    def __init__(self):
        super().__init__()
        self.expand = nn.Sequential(nn.Linear(VOCABULARY, 128), nn.Tanh(), nn.Linear(128, VOCABULARY))

    def forward(self, words):
        return (words + self.expand(words)).relu().log1p()


class Search(LightningModule):
    def __init__(self, idf, encoder=Documents, rate=2e-3):
        super().__init__()
        self.idf, self.rate = idf, rate
        self.documents = encoder()

    def training_step(self, batch, batch_idx):
        queries, documents = batch
        scores = (queries * self.idf) @ self.documents(documents).T
        return F.cross_entropy(scores, torch.arange(len(scores)))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.rate)


@torch.no_grad()
def scored(queries, documents):
    metric, right = RetrievalMetrics(), torch.eye(len(queries), dtype=torch.bool)
    for rows, relevant in zip(queries.split(200), right.split(200), strict=True):
        metric.update(rows @ documents.T, relevant)
    found = metric.compute()
    active = (documents > 0).sum(1).float().mean().item()
    return {"MRR": 100 * found["mrr"], "NDCG@10": 100 * found["ndcg@10"], "active_entries": active}


def run(seeds):
    arms, plain = [Arm(name) for name in ARMS], Arm("shared words with IDF, not trained")
    for seed in seeds:
        queries, documents, idf = data(seed)
        for arm in arms:
            kind, weight = ARMS[arm.name]
            factors = QueryIDF(idf if kind == "IDF-FLOPS" else torch.ones(VOCABULARY)).idf
            seed_everything(seed, verbose=False)
            module = Search(factors)
            loader = DataLoader(TensorDataset(queries[TESTED:], documents[TESTED:]), 64, shuffle=True, drop_last=True)
            flops = IDFFlops("documents", weight=weight, ramp_steps=60)
            fit(module, [flops], loader, max_steps=STEPS, max_epochs=-1)
            module.eval()
            with torch.no_grad():
                encoded = module.documents(documents[:TESTED])
            arm.add(**scored(queries[:TESTED] * factors, encoded))
            print(
                f"seed {seed}, {arm.name}: {[values[-1] for values in arm.values.values()]}",
                file=sys.stderr,
                flush=True,
            )
        plain.add(**scored(queries[:TESTED] * idf, documents[:TESTED]))
    return [*arms, plain]
