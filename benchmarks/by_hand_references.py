"""Training steps of fine-tuning beside what a network was, written out as a user would."""

from collections import deque

import torch
import torch.nn.functional as F
from by_hand import Plain, WithTeacher
from torch import nn

from lightning_reg.functional import (
    calibrate,
    dr_loss,
    focal_contrastive_loss,
    foreign_rows,
    hard_pairs,
    kabsch,
    mix_pairs,
    positive_pairs,
    two_label_losses,
    window_shares,
)

BANK, WIDTH, WINDOW, APART = 256, 64, 9, 10


class Agreeing(WithTeacher):
    """Features and logits held to those of the frozen network."""

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        with torch.no_grad():
            old = self.teacher.body(x)
            old_logits = self.teacher.top(old)
        features = self.net.body(x)
        logits = self.net.top(features)
        distance = (F.normalize(features, dim=-1) - F.normalize(old, dim=-1)).abs().mean()
        kl = F.kl_div(logits.log_softmax(1), old_logits.log_softmax(1), reduction="sum", log_target=True)
        return self.loss(logits, y) + 10 * distance + kl / logits.numel()


class Banked(WithTeacher):
    """DR-Tune: the head classifies calibrated features of the frozen encoder, from a bank."""

    def __init__(self, net):
        super().__init__(net)
        self.first, self.then = torch.zeros(BANK, WIDTH), torch.zeros(BANK, WIDTH)
        self.labels, self.at, self.filled, self.rotation = torch.zeros(BANK, dtype=torch.long), 0, False, None

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        with torch.no_grad():
            old = self.teacher.body(x)
        features = self.net.body(x)
        loss, head = self.loss(self.net.top(features), y), self.net.head
        if self.filled:
            with torch.no_grad():
                if batch_idx % 10 == 0 or self.rotation is None:
                    self.rotation = kabsch(F.normalize(self.first, dim=1), F.normalize(self.then, dim=1))
                length = features.norm(dim=1).mean()
                rows = calibrate(self.first, self.then, self.labels, head.weight, length, self.rotation)
            loss = loss + dr_loss(rows, self.labels.clone(), head.weight, head.bias)  # written to below
        places = slice(self.at, self.at + len(x))  # batches divide the bank
        self.first[places], self.then[places], self.labels[places] = old, features.detach(), y
        self.at = (self.at + len(x)) % BANK
        self.filled |= self.at == 0
        return loss


class Recent(WithTeacher):
    """Features drawn to those of a mean of the latest snapshots."""

    def __init__(self, net):
        super().__init__(net)
        self.snapshots = deque(maxlen=WINDOW + 1)

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        with torch.no_grad():
            if batch_idx % APART == 0:
                self.snapshots.append([p.clone() for p in self.net.parameters()])
                shares = window_shares(len(self.snapshots) - 1, 0.9).tolist()
                for mean, *each in zip(self.teacher.parameters(), *self.snapshots, strict=True):
                    mean.copy_(sum(share * p for share, p in zip(shares, each, strict=True)))
            old = self.teacher.body(x)
        features = self.net.body(x)
        return self.loss(self.net.top(features), y) + F.mse_loss(features, old)


class Mined(Plain):
    """Core-tuning: hard pairs, mixed features, a focal contrast through a projection, a smooth classifier."""

    def __init__(self, net):
        super().__init__(net)
        self.projection = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 256))

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        features = self.net.body(x)
        self.net.top(features)  # a user's step calls the head, and the engine's replaces what it gave
        beta = torch.distributions.Beta(1.0, 1.0)
        shares, partners = beta.sample((2, len(x))), foreign_rows(y, torch.rand(len(x)))
        pairs = hard_pairs(features, y)
        mixed = mix_pairs(features, y, pairs, partners, shares[0], shares[1].clamp(min=0.8))
        losses = two_label_losses(self.net.head(mixed.features), mixed)
        rows = F.normalize(self.projection(mixed.features), dim=1)
        return losses.mean() + focal_contrastive_loss(rows, positive_pairs(mixed))
