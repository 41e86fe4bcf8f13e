"""Search over the standard library where several queries of a batch have the same document: false negatives masked.

Docstrings and words as in ``idf_flops.py``, 800 kept for the test, where the first line is the query. 600 documents are
trained on with 8 queries each: the first line, and 7 times 5 words drawn from the rest. In a batch of 128 about one
query in six meets its own document once more, as a wrong answer. One encoder for both: the mean of embeddings (64
numbers) of the words, a layer of 64 with tanh beside it. Cross-entropy over the documents of the batch, cosines over
0.05, Adam 5e-3, 300 steps. The guide is the bag of words with IDF, margin 0. In per cent, among the documents of the
test.
"""

import sys

import torch
import torch.nn.functional as F
from _shared import Arm, fit
from idf_flops import TESTED, data
from kalm_embedding import Encoder
from lightning.pytorch import LightningModule, seed_everything
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import FalseNegativeMask, RetrievalMetrics

DOCUMENTS, QUERIES = 600, 8
ARMS = {
    "plain": list,
    "masked by ids": lambda: [FalseNegativeMask(ids="2")],
    "masked by a guide": lambda: [FalseNegativeMask(guide_queries="3", guide_documents="4")],
}


class Search(LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder = Encoder()

    def training_step(self, batch, batch_idx):
        queries, documents = batch[:2]
        return F.cross_entropy(self.encoder(queries) @ self.encoder(documents).T / 0.05, torch.arange(len(queries)))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 5e-3)


def pairs(queries, documents, idf, seed):
    """Queries, documents, their numbers, and what the guide makes of both."""
    generator = torch.Generator().manual_seed(seed)
    asked = [queries]
    for _ in range(QUERIES - 1):
        chances = torch.rand(documents.shape, generator=generator) * documents
        words = torch.zeros_like(documents).scatter(1, chances.topk(5).indices, 1.0)
        asked.append(words * documents)
    found, numbers = documents.repeat(QUERIES, 1), torch.arange(len(documents)).repeat(QUERIES)
    every = torch.cat(asked)
    return TensorDataset(every, found, numbers, every * idf, found * idf)


def run(seeds):
    arms = [Arm(name) for name in ARMS]
    for seed in seeds:
        queries, documents, idf = data(seed)
        trained = slice(TESTED, TESTED + DOCUMENTS)
        dataset = pairs(queries[trained], documents[trained], idf, seed)
        for arm in arms:
            seed_everything(seed, verbose=False)
            module = Search()
            loader = DataLoader(dataset, 128, shuffle=True, drop_last=True)
            fit(module, ARMS[arm.name](), loader, max_steps=300, max_epochs=-1)
            arm.add(**searched(module, queries, documents))
            print(f"seed {seed}, {arm.name}", file=sys.stderr, flush=True)
    return arms


def searched(module, queries, documents):
    """How well the documents of the test are found."""
    with torch.no_grad():
        scores = module.encoder(queries[:TESTED]) @ module.encoder(documents[:TESTED]).T
    metric = RetrievalMetrics()
    metric.update(scores, torch.eye(TESTED, dtype=torch.bool))
    found, best = metric.compute(), scores.argmax(1) == torch.arange(TESTED)
    figures = {"MRR": found["mrr"], "NDCG@10": found["ndcg@10"], "recall@1": best.float().mean()}
    return {name: 100 * float(value) for name, value in figures.items()}
