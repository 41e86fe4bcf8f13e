"""Training steps with a technique written out in ``training_step``, as a user would: what the engine is compared with.

A network has ``body(x)``, its features, and ``top(features)``, its logits, where a step needs them apart. Batches are
inputs, targets and positions in the data set.
"""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from lightning_reg import EWC, WeightCompander
from lightning_reg.functional import conr_loss, multi_sample_loss, nm_mask, sparsify_weight

LAM, RANDOM = 0.1, np.random.default_rng(0)


class Plain(LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        return self.loss(self.net(x), y)

    def loss(self, logits, y):
        """Of classes ``(B,)`` or of tokens ``(B, T)``."""
        return F.cross_entropy(logits.flatten(0, -2), y.flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


def by_hand_loss(logits, labels, index, targets, lam=3.0, beta=0.7):
    """The authors' formulas in five lines, as a user would write them."""
    p = logits.softmax(1).clamp(1e-4, 1 - 1e-4)
    p_hat = p.detach()
    targets[index] = beta * targets[index] + (1 - beta) * p_hat / p_hat.sum(1, keepdim=True)
    return F.cross_entropy(logits, labels) + lam * (1 - (targets[index] * p).sum(1)).log().mean()


class ByHand(Plain):
    """Early-learning regularization."""

    def __init__(self, net, num_samples, classes=10):
        super().__init__(net)
        self.register_buffer("targets", torch.zeros(num_samples, classes), persistent=False)

    def training_step(self, batch, batch_idx):
        x, y, index = batch
        return by_hand_loss(self.net(x), y, index, self.targets)


class WithTeacher(Plain):
    """Has a frozen copy of its network."""

    def __init__(self, net):
        super().__init__(net)
        self.teacher = copy.deepcopy(net).eval().requires_grad_(False)


class Averaged(WithTeacher):
    """ELR with the average of its own weights as the teacher."""

    def __init__(self, net, samples, classes=10):
        super().__init__(net)
        self.teacher.train()
        self.register_buffer("targets", torch.zeros(samples, classes), persistent=False)

    def training_step(self, batch, batch_idx):
        x, y, index = batch
        with torch.no_grad():
            seen = self.teacher(x).softmax(1)
        self.targets[index] = q = 0.7 * self.targets[index] + 0.3 * seen
        logits = self.net(x)
        p = logits.softmax(1).clamp(1e-4, 1 - 1e-4)
        return F.cross_entropy(logits, y) + 3.0 * (1 - (q * p).sum(1)).log().mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            for old, new in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                old.lerp_(new, 1 - 0.997)

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), 1e-3)


class Outputs(WithTeacher):
    """Distillation of the predictions of the first five classes."""

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        with torch.no_grad():
            old = self.teacher(x).sigmoid()
        logits = self.net(x)
        wanted = F.one_hot(y, logits.shape[1]).float()
        wanted[:, :5] = old[:, :5]
        return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").sum(1).mean()


class Features(WithTeacher):
    """Distillation of the features."""

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        with torch.no_grad():
            old = self.teacher.body(x)
        features = self.net.body(x)
        loss = self.loss(self.net.top(features), y)
        return loss + LAM * (features - old).square().flatten(1).sum(1).mean()


class Tied(Plain):
    """One term per parameter, as users write it."""

    def __init__(self, net):
        super().__init__(net)
        self.anchors = [p.detach().clone() for p in net.parameters()]

    def training_step(self, batch, batch_idx):
        pairs = zip(self.net.parameters(), self.anchors, strict=True)
        return super().training_step(batch, batch_idx) + LAM * sum((p - a).square().sum() for p, a in pairs)


class FirmlyTied(Tied):
    def training_step(self, batch, batch_idx):
        pairs = zip(self.net.parameters(), self.anchors, strict=True)
        term = sum((a.abs() * (p - a).square()).sum() for p, a in pairs)
        return Plain.training_step(self, batch, batch_idx) + LAM * term


def after_one_task(technique, **state):
    """As it is when one task is over."""
    technique.load_state_dict({"finished": 1, "in_task": False, **state})
    return technique


def ewc(net):
    """EWC after a task whose squared gradients were the sizes of the weights, as in :class:`FirmlyTied`."""
    anchors = {f"net.{name}": p.detach().clone() for name, p in net.named_parameters()}
    fisher = {name: anchor.abs() for name, anchor in anchors.items()}
    return after_one_task(EWC(LAM, fisher_batches=1), slots=[{"anchors": anchors, "weights": fisher}])


class Cut(Plain):
    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        side = x.shape[-1]
        lam, permutation = RANDOM.beta(1.0, 1.0), torch.randperm(len(x), device=x.device)
        half, (cy, cx) = int(side * (1 - lam) ** 0.5) // 2, RANDOM.integers(side, size=2)
        y1, y2, x1, x2 = (int(np.clip(value, 0, side)) for value in (cy - half, cy + half, cx - half, cx + half))
        mixed = x.clone()
        mixed[:, :, y1:y2, x1:x2] = x[permutation][:, :, y1:y2, x1:x2]
        lam, logits = 1 - (y2 - y1) * (x2 - x1) / side**2, self.net(mixed)
        return lam * F.cross_entropy(logits, y) + (1 - lam) * F.cross_entropy(logits, y[permutation])


class Mixed(Plain):
    """Mixup."""

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        lam, permutation = RANDOM.beta(1.0, 1.0), torch.randperm(len(x), device=x.device)
        logits = self.net(lam * x + (1 - lam) * x[permutation])
        return lam * F.cross_entropy(logits, y) + (1 - lam) * F.cross_entropy(logits, y[permutation])


class Numbers(Plain):
    """Regression on ``y / scale``, with an augmentation for the views."""

    def __init__(self, net, scale=10):
        super().__init__(net)
        self.scale = scale

    def augment(self, x):
        return x.roll(1, dims=1)

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        return F.mse_loss(self.net(x)[:, 0], y / self.scale)


class Contrasted(Numbers):
    """ConR on the features, two views."""

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        features = self.net.body(torch.cat([x, self.augment(x), self.augment(x)]))
        predictions, views = self.net.top(features)[:, 0], slice(len(x), None)
        y = y / self.scale
        term = conr_loss(features[views], y.repeat(2), predictions[views], 0.1)
        return F.mse_loss(predictions[: len(x)], y) + term


class Copies(Plain):
    """The head on M copies under dropout, with the functional core."""

    def __init__(self, net, samples):
        super().__init__(net)
        self.samples = samples

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        return multi_sample_loss(self.net.head, self.net.body(x), y, F.cross_entropy, self.net.drop.p, self.samples)


def linupper_loss(losses):
    """The samples' losses ``(B,)`` weighted by linupper with r = 0.4."""
    with torch.no_grad():
        low, high = losses.min(), losses.max()
        h = (2 * losses - (high + low)) / (high - low).clamp(min=1e-6)
        weights = torch.softmax((h + 1).clamp(max=1) / 0.4, dim=0)
    return (weights * losses).sum()


class Reweighted(Plain):
    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        losses = F.cross_entropy(self.net(x).flatten(0, -2), y.flatten(), reduction="none")
        return linupper_loss(losses.reshape(len(y), -1).mean(1))


class MovingAverage(Plain):
    """An exponential average of the weights, beside them."""

    def __init__(self, net):
        super().__init__(net)
        self.average = [p.detach().clone() for p in net.parameters()]

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            torch._foreach_lerp_(self.average, list(self.net.parameters()), 1 - 0.999)


class Sparse(Plain):
    """SR-STE with the functional cores: the network is called with sparse weights, whose gradients pass unchanged."""

    def __init__(self, net, technique):
        super().__init__(net)
        self.names = [name.removeprefix("net.") for name in technique.weights_to_edit(self)]
        self.n, self.m, self.lambda_w = technique.n, technique.m, technique.lambda_w

    def sparse_weights(self):
        dense = {name: self.net.get_parameter(name) for name in self.names}
        return {n: sparsify_weight(w, nm_mask(w, self.n, self.m), 0.0, self.lambda_w) for n, w in dense.items()}

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        return self.loss(functional_call(self.net, self.sparse_weights(), (x,)), y)


class Map(nn.Module):
    """w = a arctan(v / b), as a user would write it: a parametrization."""

    def __init__(self, a, b, learn):
        super().__init__()
        self.log_a, self.log_b = (nn.Parameter(torch.tensor(x).log(), requires_grad=learn) for x in (a, b))

    def forward(self, v):
        return self.log_a.exp() * (v / self.log_b.exp()).atan()

    def right_inverse(self, w):
        return self.log_b.exp() * (w / self.log_a.exp()).tan()


class Parametrized(Plain):
    """Companded weights."""

    def __init__(self, net, a, b, learn=False, exclude=None):
        super().__init__(net)
        weights = WeightCompander(exclude=exclude).weights_to_map(net)
        layers = {name.rpartition(".")[0]: name.rpartition(".")[2] for name in weights}
        for layer, name in layers.items():
            parametrize.register_parametrization(net.get_submodule(layer), name, Map(a, b, learn))

    def configure_optimizers(self):
        shapes = {id(p) for m in self.modules() if isinstance(m, Map) for p in m.parameters()}
        groups = [[p for p in self.parameters() if (id(p) in shapes) is own] for own in (False, True)]
        return torch.optim.SGD([{"params": groups[0]}, {"params": groups[1], "lr": 1e-5}], 1e-3)
