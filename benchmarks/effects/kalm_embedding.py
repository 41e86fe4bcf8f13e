"""Search over the standard library with dense vectors: focal weights of the queries, and mixtures of hard negatives.

Docstrings and words as in ``idf_flops.py``: the first line is the query, the rest the document, 800 are kept for the
test. One encoder for both: the mean of embeddings (64 numbers) of the words, a layer of 64 with tanh beside it.
Cross-entropy over the documents of the batch of 64, cosines over 0.05, Adam 5e-3, 600 steps. In "mined" arms 7 hard
negatives of each query join them, drawn once from ranks 51 to 100 of the search by shared words with IDF, and those are
mixed; in the others the 7 hardest documents of the batch. In per cent, among the documents of the test.
"""

import sys

import torch
import torch.nn.functional as F
from _shared import Arm, fit
from idf_flops import TESTED, VOCABULARY, data
from lightning.pytorch import LightningModule, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import FocalContrastive, HardNegativeMixing, RetrievalMetrics

# Exponent of the focal weights, pairs, whether the list is mixed, whether negatives are mined.
ARMS = {
    "plain": (0.0, 0, False, False),
    "gamma 0.5": (0.5, 0, False, False),
    "gamma 2": (2.0, 0, False, False),
    "1 pair": (0.0, 1, False, False),
    "7 pairs and the list": (0.0, 7, True, False),
    "mined": (0.0, 0, False, True),
    "mined, 7 pairs and the list": (0.0, 7, True, True),
    "mined, 7 pairs, the list, gamma 0.5": (0.5, 7, True, True),
}


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.layer = nn.Linear(VOCABULARY, 64, bias=False), nn.Linear(64, 64)

    def forward(self, bags):
        mean = self.words(bags) / bags.sum(1, keepdim=True).clamp(min=1)
        return F.normalize(mean + self.layer(mean).tanh())


class Search(LightningModule):
    def __init__(self, documents=None):
        super().__init__()
        self.encoder, self.documents = Encoder(), documents

    def training_step(self, batch, batch_idx):
        queries, documents, mined = batch
        if self.documents is not None:
            documents = torch.cat([documents, self.documents[mined.flatten()]])
        return F.cross_entropy(self.encoder(queries) @ self.encoder(documents).T / 0.05, torch.arange(len(queries)))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 5e-3)


def mined(queries, documents, idf, seed):
    """7 documents for each query, from ranks 51 to 100 without its own."""
    ranks = torch.cat([((part * idf) @ documents.T).topk(101).indices for part in queries.split(500)])
    others = ranks != torch.arange(len(queries))[:, None]
    others &= others.cumsum(1).le(100) & others.cumsum(1).gt(50)
    chances = torch.rand(ranks.shape, generator=torch.Generator().manual_seed(seed)).masked_fill(~others, -1.0)
    return ranks.gather(1, chances.topk(7).indices)


def techniques(gamma, pairs, list_mix, is_mined):
    found = [FocalContrastive(gamma)] if gamma else []
    if pairs:
        negatives = "grouped" if is_mined else "any"
        found.append(HardNegativeMixing("encoder", 0.05, num_pairs=pairs, list_mix=list_mix, negatives=negatives))
    return found


def run(seeds):
    arms = [Arm(name) for name in ARMS]
    for seed in seeds:
        queries, documents, idf = data(seed)
        trained = queries[TESTED:], documents[TESTED:], mined(queries[TESTED:], documents[TESTED:], idf, seed)
        for arm in arms:
            seed_everything(seed, verbose=False)
            module = Search(trained[1] if ARMS[arm.name][-1] else None)
            loader = DataLoader(TensorDataset(*trained), 64, shuffle=True, drop_last=True)
            fit(module, techniques(*ARMS[arm.name]), loader, max_steps=600, max_epochs=-1)
            with torch.no_grad():
                scores = module.encoder(queries[:TESTED]) @ module.encoder(documents[:TESTED]).T
            metric = RetrievalMetrics()
            metric.update(scores, torch.eye(TESTED, dtype=torch.bool))
            found, best = metric.compute(), scores.argmax(1) == torch.arange(TESTED)
            figures = {"MRR": found["mrr"], "NDCG@10": found["ndcg@10"], "recall@1": best.float().mean()}
            arm.add(**{name: 100 * value for name, value in figures.items()})
            print(f"seed {seed}, {arm.name}", file=sys.stderr, flush=True)
    return arms
