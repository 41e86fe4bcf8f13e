"""The toy techniques written by hand in ``training_step``, from their formulas."""

import torch.nn.functional as F
from torch.func import functional_call

from tests.toys import CLASSES, BatchShift, Halve, Penalty, ShiftTargets, Term, Watch, WeightsByLabel

__all__ = ["CASES", "by_hand_all", "by_hand_term"]


def penalty(module):
    """Of the dense parameters; only its gradient joins the loss."""
    value = 0.01 * sum(p.square().sum() for p in module.parameters())
    return value - value.detach()


def by_hand_term(module, batch):
    x, y = batch
    logits = module(x)
    return F.cross_entropy(logits, y) + (0.1 * logits.square().mean(1)).mean()


def by_hand_weights(module, batch):
    x, y = batch
    return ((1 + 0.5 * y) * F.cross_entropy(module(x), y, reduction="none")).mean()


def by_hand_targets(module, batch):
    x, y = batch
    return F.cross_entropy(module(x), (y + 1) % CLASSES)


def by_hand_penalty(module, batch):
    x, y = batch
    return F.cross_entropy(module(x), y) + penalty(module)


def by_hand_batch(module, batch):
    x, y = batch
    return F.cross_entropy(module(x + 0.5), y)


def halved(module):
    """Parameters whose weights are halved in value and whose gradient is that of the halved ones."""
    return {name: p + (0.5 * p - p).detach() if name.endswith("weight") else p for name, p in module.named_parameters()}


def by_hand_edit(module, batch):
    x, y = batch
    return F.cross_entropy(functional_call(module, halved(module), (x,)), y)


def by_hand_features(module, batch):
    x, y = batch
    features = module.net[1](module.net[0](x))
    return F.cross_entropy(module.net[3](features), y) + (0.1 * features.square().mean(1)).mean()


def by_hand_all(module, batch):
    x, y = batch
    parameters = {name.removeprefix("net."): p for name, p in halved(module).items()}
    features = F.relu(F.linear(x + 0.5, parameters["0.weight"], parameters["0.bias"]))
    logits = F.linear(features, parameters["3.weight"], parameters["3.bias"])
    losses = F.cross_entropy(logits, (y + 1) % CLASSES, reduction="none")
    weighted = ((1 + 0.5 * y) * losses).mean()
    terms = (0.1 * logits.square().mean(1)).mean() + (0.1 * features.square().mean(1)).mean()
    return weighted + terms + penalty(module)


# Techniques, and the step that does the same.
CASES = {
    "term": ([Term], by_hand_term),
    "weights": ([WeightsByLabel], by_hand_weights),
    "targets": ([ShiftTargets], by_hand_targets),
    "penalty": ([Penalty], by_hand_penalty),
    "batch": ([BatchShift], by_hand_batch),
    "edited weights": ([Halve], by_hand_edit),
    "features": ([Watch], by_hand_features),
    "all": ([Term, WeightsByLabel, ShiftTargets, Penalty, BatchShift, Halve, Watch], by_hand_all),
}
