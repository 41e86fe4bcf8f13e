"""Search over the standard library: a small encoder taught by the words that query and document share.

Data, encoder, loss and optimizer as in ``kalm_embedding.py`` without mined negatives: batches of 64, cosines over 0.05,
600 steps. The teacher's embeddings are bags of words times their IDF, 3,000 numbers; both distributions at temperature
0.05. In per cent, among the documents of the test; the last row is the teacher.
"""

import sys

from _shared import Arm, fit
from idf_flops import TESTED, data
from in_batch_negatives import Search, searched
from lightning.pytorch import seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import ContrastiveDistillation

ARMS = {"plain": 0.0, "weight 0.1": 0.1, "weight 1": 1.0}


class Teacher(nn.Module):
    def __init__(self, idf):
        super().__init__()
        self.idf = idf

    def encoder(self, bags):
        return nn.functional.normalize(bags * self.idf)


def run(seeds):
    arms = [Arm(name) for name in (*ARMS, "the teacher, not trained")]
    for seed in seeds:
        queries, documents, idf = data(seed)
        q, d = queries[TESTED:], documents[TESTED:]
        for arm in arms[:-1]:
            seed_everything(seed, verbose=False)
            module, weight = Search(), ARMS[arm.name]
            loader = DataLoader(TensorDataset(q, d, q * idf, d * idf), 64, shuffle=True, drop_last=True)
            technique = ContrastiveDistillation("encoder", "2", "3", weight=weight)
            fit(module, [technique] if weight else [], loader, max_steps=600, max_epochs=-1)
            arm.add(**searched(module, queries, documents))
            print(f"seed {seed}, {arm.name}", file=sys.stderr, flush=True)
        arms[-1].add(**searched(Teacher(idf), queries, documents))
    return arms
