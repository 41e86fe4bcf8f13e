"""Training steps of a search engine, written out as a user would."""

import torch
import torch.nn.functional as F
from by_hand import Plain, WithTeacher
from overhead import SmallTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_reg.functional import (
    complementary_views,
    correlated_features,
    draw_mixtures,
    ensemble_scores,
    item_ssl_loss,
    mix_hard_negatives,
    mutual_information,
    ranking_distillation_losses,
    score_distillation_loss,
)

TEMPERATURE, POOL, PAIRS, GAMMA, CHUNK, VOCABULARY, RAMP, ITEMS = 0.05, 7, 1, 0.5, 16, 2000, 100, 3000


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


class Catalogue(Search):
    """Has items of eight features, besides."""

    def __init__(self, net):
        super().__init__(net)
        values = torch.randint(1, 256, (ITEMS, 2)).repeat_interleave(4, dim=1)
        self.items = torch.where(torch.rand(ITEMS, 8) < 0.2, torch.randint(1, 256, (ITEMS, 8)), values)

    def catalogue(self):
        return self.items


class Recognised(Catalogue):
    """Items have to be recognised from complementary halves of their features."""

    def __init__(self, net):
        super().__init__(net)
        self.information = mutual_information(self.items)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        items = self.items[torch.randint(ITEMS, (CHUNK,))]
        masked = correlated_features(self.information, int(torch.randint(8, ())), 3)
        views = self.encode(torch.cat(complementary_views(items, masked, torch.tensor(0))))
        return loss + 0.3 * item_ssl_loss(*views.chunk(2))


class RankedEncoder(Encoder):
    """The scores of all pairs are a layer."""

    def __init__(self):
        super().__init__()
        self.scores = nn.Identity()


class Ranked(Search):
    """Scores of a layer."""

    def training_step(self, batch, batch_idx):
        return self.compared(batch)[0]

    def compared(self, batch):
        queries, documents = self.encoded(batch[0])
        scores = self.net.scores(queries @ documents.T / TEMPERATURE)
        return F.cross_entropy(scores, torch.arange(len(scores))), scores


class Distilled(Ranked):
    """Scores follow the mean of two teachers' scores."""

    def training_step(self, batch, batch_idx):
        loss, scores = self.compared(batch)
        return loss + score_distillation_loss(scores, ensemble_scores(batch[3:5]))


class Followed(Ranked):
    """Scores follow the cosines of a teacher's embeddings."""

    def training_step(self, batch, batch_idx):
        loss, scores = self.compared(batch)
        queries, documents = (F.normalize(each, dim=1) for each in batch[3:5])
        return loss + ranking_distillation_losses(scores * TEMPERATURE, queries @ documents.T, TEMPERATURE).mean()


class Fewer(Plain):
    """Half of the tokens, which stand for candidates."""

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        kept = torch.randperm(x.shape[1])[: x.shape[1] // 2].sort().values
        return self.loss(self.net(x[:, kept]), y)


class FewerClasses(Plain):
    """A softmax over half of the classes and the right one."""

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        logits = self.net(x)
        absent = torch.ones_like(logits, dtype=torch.bool)
        absent[:, torch.randperm(logits.shape[1])[: logits.shape[1] // 2]] = False
        return F.cross_entropy(logits.masked_fill(absent.scatter(1, y[:, None], False), -torch.inf), y)


class ManyLabels(Plain):
    """Each class is a label of its own."""

    def loss(self, logits, y):
        return F.binary_cross_entropy_with_logits(logits, F.one_hot(y, logits.shape[1]).float())


class Bent(ManyLabels, WithTeacher):
    """Labels are bent towards what the average of the weights predicts."""

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        with torch.no_grad():
            seen = self.teacher(x).sigmoid()
        logits = self.net(x)
        labels = F.one_hot(y, logits.shape[1]).float()
        soft = labels + (seen - labels).clamp(-0.15, 0.15)
        return sum(F.binary_cross_entropy_with_logits(logits, each) for each in (labels, soft))

    @torch.no_grad()
    def on_train_batch_end(self, outputs, batch, batch_idx):
        torch._foreach_lerp_([*self.teacher.parameters()], [*self.net.parameters()], 1 - 0.992)

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), 1e-3)
