"""Search over the standard library with dense vectors: large batches in chunks, beside small ones that are accumulated.

Data and encoder as in ``kalm_embedding.py``, with dropout of 0.1 before the layer. Cross-entropy over the documents of
the batch, cosines over 0.05, Adam 5e-3, 150 steps of the optimizer. The last three arms see the same samples in a step:
8 batches of 32 one after the other, 256 at once, 256 in chunks of 32 by GradCache. In per cent, among the 800 documents
of the test; CPU time of the training in seconds. Most of the encoder is one matrix of words, and each chunk makes a
gradient for all of it; ``benchmarks/grad_cache.py`` has the time of an encoder with layers.
"""

import sys
import time

import torch
import torch.nn.functional as F
from _shared import Arm, fit
from idf_flops import TESTED, VOCABULARY, data
from lightning.pytorch import LightningModule, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import GradCache, RetrievalMetrics

STEPS = 150
# Batch, batches of a step, rows of a chunk.
ARMS = {
    "batches of 32": (32, 1, None),
    "8 batches of 32, accumulated": (32, 8, None),
    "batches of 256": (256, 1, None),
    "batches of 256, chunks of 32": (256, 1, 32),
}


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.drop, self.layer = nn.Linear(VOCABULARY, 64, bias=False), nn.Dropout(0.1), nn.Linear(64, 64)

    def forward(self, bags):
        mean = self.words(bags) / bags.sum(1, keepdim=True).clamp(min=1)
        return F.normalize(mean + self.layer(self.drop(mean)).tanh())


class Search(LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder = Encoder()

    def training_step(self, batch, batch_idx):
        queries, documents = (self.encoder(bags) for bags in batch)
        return F.cross_entropy(queries @ documents.T / 0.05, torch.arange(len(queries)))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 5e-3)


def run(seeds):
    arms = [Arm(name) for name in ARMS]
    for seed in seeds:
        queries, documents, _ = data(seed)
        for arm in arms:
            batch, accumulated, chunk = ARMS[arm.name]
            seed_everything(seed, verbose=False)
            module, techniques = Search(), [] if chunk is None else [GradCache("encoder", chunk)]
            loader = DataLoader(TensorDataset(queries[TESTED:], documents[TESTED:]), batch, True, drop_last=True)
            start = time.process_time()
            fit(module, techniques, loader, max_steps=STEPS, max_epochs=-1, accumulate_grad_batches=accumulated)
            seconds = time.process_time() - start
            module.eval()
            with torch.no_grad():
                scores = module.encoder(queries[:TESTED]) @ module.encoder(documents[:TESTED]).T
            metric = RetrievalMetrics()
            metric.update(scores, torch.eye(TESTED, dtype=torch.bool))
            found = metric.compute()
            figures = {"MRR": found["mrr"], "NDCG@10": found["ndcg@10"]}
            arm.add(**{name: 100 * value for name, value in figures.items()}, **{"CPU seconds": seconds})
            print(f"seed {seed}, {arm.name}, {seconds:.0f} s", file=sys.stderr, flush=True)
    return arms
