"""Training steps of a search engine, written out as a user would."""

import torch
import torch.nn.functional as F
from by_hand import Plain
from overhead import SmallTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_reg.functional import draw_mixtures, mix_hard_negatives

TEMPERATURE, POOL, PAIRS, GAMMA, CHUNK, VOCABULARY, RAMP = 0.05, 7, 1, 0.5, 16, 2000, 100


class Encoder(SmallTransformer):
    """One unit vector of each text, of a layer."""

    def __init__(self):
        super().__init__()
        self.head, self.unit = nn.Linear(64, 64), nn.Identity()

    def forward(self, x):
        return self.unit(F.normalize(super().forward(x)))


class Expander(SmallTransformer):
    """A weight for each word of a vocabulary."""

    def __init__(self):
        super().__init__()
        self.head, self.sparse = nn.Linear(64, VOCABULARY), nn.Identity()

    def forward(self, x):
        return self.sparse(super().forward(x).relu().log1p())


class Search(Plain):
    """The first tokens of a text ask for it among those of the batch."""

    temperature = TEMPERATURE

    def training_step(self, batch, batch_idx):
        queries, documents = self.encoded(batch[0])
        return F.cross_entropy(queries @ documents.T / self.temperature, torch.arange(len(queries)))

    def encoded(self, x):
        return self.encode(x[:, :8]), self.encode(x)

    def encode(self, x):
        return self.net(x)


class SparseSearch(Search):
    """Dot products of weights of words."""

    temperature = 1.0


class Penalized(SparseSearch):
    """The FLOPS of the documents, with a quadratic ramp."""

    def training_step(self, batch, batch_idx):
        queries, documents = self.encoded(batch[0])
        loss = F.cross_entropy(queries @ documents.T, torch.arange(len(queries)))
        ramp = min((self.global_step + 1) / RAMP, 1.0) ** 2
        return loss + 1e-3 * ramp * documents.mean(0).square().sum()


class Focal(Search):
    """Queries whose document is badly ranked count more."""

    def training_step(self, batch, batch_idx):
        queries, documents = self.encoded(batch[0])
        losses = F.cross_entropy(queries @ documents.T / TEMPERATURE, torch.arange(len(queries)), reduction="none")
        return (-torch.expm1(-losses.detach()).clamp(max=0.0)).pow(GAMMA).mul(losses).mean()


class Mixed(Search):
    """Mixtures of the hardest negatives join the candidates."""

    def training_step(self, batch, batch_idx):
        queries, documents = self.encoded(batch[0])
        similarities, labels = queries @ documents.T, torch.arange(len(queries))
        near = similarities.detach().fill_diagonal_(-torch.inf).topk(POOL, dim=1).indices
        mixed = mix_hard_negatives(queries, documents[near], *draw_mixtures(len(queries), PAIRS, POOL))
        added = (mixed @ queries[:, :, None])[..., 0]
        return F.cross_entropy(torch.cat([similarities, added], dim=1) / TEMPERATURE, labels)


class Masked(Search):
    """Documents with equal ids are no negatives of each other."""

    def training_step(self, batch, batch_idx):
        queries, documents = self.encoded(batch[0])
        ids = batch[1]
        same = (ids == ids[:, None]).fill_diagonal_(0)
        scores = (queries @ documents.T / TEMPERATURE).masked_fill(same, -torch.inf)
        return F.cross_entropy(scores, torch.arange(len(queries)))


class Chunked(Search):
    """The encoder in chunks, each under a checkpoint."""

    def encode(self, x):
        return torch.cat([checkpoint(self.net, part, use_reentrant=False) for part in x.split(CHUNK)])
