"""Search over the standard library with dense vectors: recall and MRR with and without focal weights of the queries.

Docstrings and words as in ``idf_flops.py``: the first line is the query, the rest the document, 800 are kept for the
test. One encoder for both: the mean of embeddings (64 numbers) of the words, a layer of 64 with tanh beside it.
Cross-entropy over the documents of the batch of 64, cosines over 0.05, Adam 5e-3, 600 steps. In per cent, among the
documents of the test.
"""

import sys

import torch
import torch.nn.functional as F
from _shared import Arm, fit
from idf_flops import TESTED, VOCABULARY, data
from lightning.pytorch import LightningModule, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import FocalContrastive, RetrievalMetrics

ARMS = {"plain": 0.0, "gamma 0.5": 0.5, "gamma 2": 2.0}


class Encoder(LightningModule):
    def __init__(self):
        super().__init__()
        self.words, self.layer = nn.Linear(VOCABULARY, 64, bias=False), nn.Linear(64, 64)

    def forward(self, bags):
        mean = self.words(bags) / bags.sum(1, keepdim=True).clamp(min=1)
        return F.normalize(mean + self.layer(mean).tanh())

    def training_step(self, batch, batch_idx):
        queries, documents = batch
        return F.cross_entropy(self(queries) @ self(documents).T / 0.05, torch.arange(len(queries)))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 5e-3)


def run(seeds):
    arms = [Arm(name) for name in ARMS]
    for seed in seeds:
        queries, documents, _ = data(seed)
        for arm in arms:
            seed_everything(seed, verbose=False)
            module = Encoder()
            loader = DataLoader(TensorDataset(queries[TESTED:], documents[TESTED:]), 64, shuffle=True, drop_last=True)
            gamma = ARMS[arm.name]
            fit(module, [FocalContrastive(gamma)] if gamma else [], loader, max_steps=600, max_epochs=-1)
            with torch.no_grad():
                scores = module(queries[:TESTED]) @ module(documents[:TESTED]).T
            metric = RetrievalMetrics()
            metric.update(scores, torch.eye(TESTED, dtype=torch.bool))
            found, best = metric.compute(), scores.argmax(1) == torch.arange(TESTED)
            figures = {"MRR": found["mrr"], "NDCG@10": found["ndcg@10"], "recall@1": best.float().mean()}
            arm.add(**{name: 100 * value for name, value in figures.items()})
            print(f"seed {seed}, {arm.name}", file=sys.stderr, flush=True)
    return arms
