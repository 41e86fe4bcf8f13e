"""Embeddings of digits that training has not seen, as two experiments on metric learning compare them."""

import torch
from _shared import fit
from lightning.pytorch import seed_everything
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import OPIS

__all__ = ["SEEN", "scores"]

SEEN, EACH, STEPS = 6, 16, 250


def balanced(y, generator):
    """Batches with as many images of each digit."""
    places = [(y == digit).nonzero()[:, 0] for digit in range(SEEN)]
    for _ in range(STEPS):
        yield torch.cat([p[torch.randperm(len(p), generator=generator)[:EACH]] for p in places]).tolist()


def scores(make_model, callbacks, seed):
    """Trains on the digits below ``SEEN``; OPIS in thousandths and recall at 1 in per cent of the others."""
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    seen = y < SEEN
    seed_everything(seed, verbose=False)
    model = make_model()
    batches = list(balanced(y[seen], torch.Generator().manual_seed(seed)))
    loader = DataLoader(TensorDataset(x[seen], y[seen]), batch_sampler=batches)
    fit(model, callbacks, loader, max_epochs=1)
    metric = OPIS()
    with torch.no_grad():
        metric.update(model.embed(x[~seen]), y[~seen])
    found = metric.compute()
    return {"OPIS": 1000 * found["opis"], "recall_at_1": 100 * found["recall_at_1"]}
