"""Training steps with a term of the step, a module of its own or an edited output, written out as a user would."""

import torch
import torch.nn.functional as F
from by_hand import Numbers, Plain, Tied
from torch import nn

from lightning_reg.functional import frechet_scores, proximal_matching_gamma, proximal_matching_loss, tcm_loss

CLASSES, WIDTH = 10, 64
STEPS_APART = (torch.arange(CLASSES)[:, None] - torch.arange(CLASSES)).abs().double()  # labels on a scale


class Margins(Plain):
    """TCM on the features."""

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        features = self.net.body(x)
        return self.loss(self.net.top(features), y) + tcm_loss(features, y)


class Centres(nn.Module):
    """Cosines with a trained centre for each class, over a temperature."""

    def __init__(self):
        super().__init__()
        self.centres = nn.Parameter(torch.randn(CLASSES, WIDTH))

    def forward(self, embeddings, labels):
        return F.cross_entropy(F.normalize(embeddings) @ F.normalize(self.centres).T / 0.1, labels)


class WithCentres(Plain):
    """A loss with parameters of its own on the features."""

    def __init__(self, net):
        super().__init__(net)
        self.criterion = Centres()

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        features = self.net.body(x)
        return self.loss(self.net.top(features), y) + self.criterion(features, y)


class Dropped(Plain):
    """A learned state in place of half of the features."""

    def __init__(self, net):
        super().__init__(net)
        self.state = nn.Parameter(0.02 * torch.randn(WIDTH))

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        features = self.net.body(x)
        keep = torch.rand(len(x), 1) >= 0.5
        return self.loss(self.net.top(torch.where(keep, features, self.state)), y)


class Scored(Plain):
    """Loki's scores in place of the logits."""

    def __init__(self, net):
        super().__init__(net)
        self.register_buffer("squares", STEPS_APART.square())

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        probabilities = self.net(x).double().softmax(-1)
        return self.loss(frechet_scores(probabilities, self.squares, 1.0).float(), y)


class Clamped(Plain):
    """Weights of the head that stay at 0 or above."""

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self.net.head.weight.clamp_(min=0)


class Matched(Numbers):
    """Proximal matching in four stages, from the first step on."""

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        gamma = proximal_matching_gamma(self.trainer.global_step, 0.1, self.trainer.estimated_stepping_batches, 0)
        return proximal_matching_loss(self.net(x)[:, 0], y / self.scale, gamma).mean()


class Repelled(Tied):
    """EL2 away from the weights at the start, in the unit of their squared norm."""

    def __init__(self, net):
        super().__init__(net)
        self.scale = 1 / sum(float(a.square().sum()) for a in self.anchors)

    def training_step(self, batch, batch_idx):
        distance = sum((p - a).square().sum() for p, a in zip(self.net.parameters(), self.anchors, strict=True))
        return Plain.training_step(self, batch, batch_idx) + torch.exp(-self.scale * distance)
