"""A catalogue with a long tail: how many of the items that are asked for are found, with and without ItemSSL.

3,000 items have eight fields, which are noisy copies of three hidden attributes (20 values each; one value in ten is
drawn anew): the mutual information of two fields is 2.07 within an attribute and 0.06 across. Items are asked for with
a popularity of rank^-0.9; a query is the item's attributes, three in ten drawn anew. Two towers (embeddings of 16
numbers, a hidden layer of 64, 32 numbers out) learn from 4,000 interactions: softmax over the batch of 256, cosines
over 0.1, Adam 3e-3, 400 steps. Test: queries for all items alike; recall is the share of queries whose item is among
the first 50. Head: the most popular items with half of the interactions. Weight 0.3, temperature 0.1, 256 items a step.

"Correlated" masks a seed field and three more; two arms mask two more, which is one attribute where it has three
fields, and four. The attributes say nothing about each other here: without a field in both views of one attribute,
the views have nothing in common, so correlated masking has less to learn from than masking at random. The last arm
draws nothing uniformly, but masks items as they are interacted with.
"""

import sys

import torch
import torch.nn.functional as F
from _shared import Arm, fit
from lightning.pytorch import LightningModule, seed_everything
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_reg import ItemSSL
from lightning_reg.functional import popularity_slices

ITEMS, VALUES, FIELDS = 3000, 20, [0, 0, 0, 1, 1, 1, 2, 2]
ASKED_ANEW = 0.3
ARMS = {
    "no second loss": None,
    "correlated": {},
    "correlated, two beside the seed": {"correlated": 2},
    "correlated, four beside the seed": {"correlated": 4},
    "random": {"masking": "random"},
    "dropout 0.5": {"masking": "dropout", "rate": 0.5},
    "spread out": {"masking": "none"},
    "correlated, as interacted with": {"items": "interacted"},
}


def tower(columns):
    return nn.Sequential(
        nn.Embedding(columns * (VALUES + 1), 16),
        nn.Flatten(),
        nn.Linear(16 * columns, 64),
        nn.ReLU(),
        nn.Linear(64, 32),
    )


class TwoTowers(LightningModule):
    def __init__(self, table, asked):
        super().__init__()
        self.queries, self.items = tower(3), tower(len(FIELDS))
        self.table, self.asked = table, asked

    def embed(self, items):
        return self.items(items + torch.arange(items.shape[1]) * (VALUES + 1))

    def ask(self, queries):
        return self.queries(queries + torch.arange(3) * (VALUES + 1))

    def catalogue(self):
        return self.table

    def interacted(self):
        return self.table[self.asked]

    def training_step(self, batch, batch_idx):
        query, item = batch
        q, x = F.normalize(self.ask(query)), F.normalize(self.embed(self.table[item]))
        return F.cross_entropy(q @ x.T / 0.1, torch.arange(len(q)))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 3e-3)


def noisy(values, share):
    """Values, of which a share is drawn anew; 0 is left for what is masked."""
    return torch.where(torch.rand(values.shape) < share, torch.randint(1, VALUES + 1, values.shape), values)


def recalls(model, attributes, popular):
    """Of queries for all items alike."""
    with torch.no_grad():
        x = F.normalize(model.embed(model.table))
        found = torch.zeros(ITEMS)
        for _ in range(3):
            scores = F.normalize(model.ask(noisy(attributes, ASKED_ANEW))) @ x.T
            found += (scores.topk(50).indices == torch.arange(ITEMS)[:, None]).any(1) / 3
    return {"recall": found.mean(), "head": found[popular].mean(), "tail": found[~popular].mean()}


def run(seeds):
    arms = [Arm(name) for name in ARMS]
    for seed in seeds:
        seed_everything(seed, verbose=False)
        attributes = torch.randint(1, VALUES + 1, (ITEMS, 3))
        table = noisy(attributes[:, FIELDS], 0.1)
        weights = torch.arange(1, ITEMS + 1).double() ** -0.9
        asked = weights[torch.randperm(ITEMS)].multinomial(4000, replacement=True)
        popular = popularity_slices(asked.bincount(minlength=ITEMS))
        data = TensorDataset(noisy(attributes[asked], ASKED_ANEW), asked)
        for arm in arms:
            seed_everything(seed, verbose=False)
            model, options = TwoTowers(table, asked), ARMS[arm.name]
            options = None if options is None else {"items": "catalogue"} | options
            callbacks = [] if options is None else [ItemSSL("embed", missing=0, size=256, **options)]
            batches = BatchSampler(RandomSampler(data), 256, drop_last=True)
            fit(model, callbacks, DataLoader(data, batch_size=None, sampler=batches), max_epochs=27, max_steps=400)
            arm.add(**recalls(model, attributes, popular))
            print(f"seed {seed}, {arm.name}", file=sys.stderr, flush=True)
    return arms
