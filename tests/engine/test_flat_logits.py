"""Logits with further dimensions of size 1, (B, C, 1), are those of a classification of samples."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from lightning_reg import EWC, ELRCallback, LossReweighting, PredictionDistillation
from lightning_reg.engine.loss.call import loss_call
from tests.toys import CLASSES, QUIET, Classifier, fit, make_loader, same_weights

pytestmark = QUIET

MAKES = {
    "ELR": partial(ELRCallback, num_samples=32, num_classes=CLASSES),
    "LwF": partial(PredictionDistillation, new_classes=[3, 0]),
    "LwF, softmax": partial(PredictionDistillation, "softmax", new_classes=[3, 0]),
    "EWC": partial(EWC, 1.0, labels="true"),
    "reweighting": partial(LossReweighting, warmup_steps=0),
}


def step(module, batch, shape, reduction):
    logits, y = module(batch[0]), batch[1]
    if shape:
        logits, y = logits.reshape(*logits.shape, *shape), y.reshape(-1, *shape)
    return F.cross_entropy(logits, y, reduction=reduction).mean()


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_a_training_is_that_of_logits_of_two_dimensions(make, reduction, shape):
    ends = []
    for dims in ((), shape):
        module, technique = Classifier(partial(step, shape=dims, reduction=reduction)), make()
        for _ in range(2):
            fit(module, technique, loader=make_loader(), max_epochs=1)
        ends.append(module)
    assert same_weights(*ends, atol=1e-6)  # float32, other kernels


def test_labels_of_one_more_dimension_are_labels():
    logits, y = torch.randn(4, 3, 1, requires_grad=True), torch.tensor([[2], [0], [1], [2]])
    call = loss_call(F.cross_entropy, {"input": logits, "target": y}, None)
    assert call.labels.tolist() == [2, 0, 1, 2]
    soft = F.one_hot(y[:, 0], 3).float()[..., None]
    call = loss_call(F.cross_entropy, {"input": logits, "target": soft}, None)
    assert call.labels.tolist() == [2, 0, 1, 2]
