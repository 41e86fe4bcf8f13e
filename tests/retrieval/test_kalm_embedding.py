"""FocalContrastive, pooling and cut-off embeddings."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from lightning_reg import FocalContrastive, LossReweighting
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import focal_weights, matryoshka_loss, mean_pooled
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.conformance.problems import KINDS, Problem
from tests.toys import QUIET, Classifier, fit, make_loader, same_weights

pytestmark = QUIET


class Focused(Hand):
    def weights(self, losses):
        return (1 - (-losses.detach()).exp()) ** 2.0


def labelled(size):
    x = torch.randn(size, 8)
    return x, (x[:, :4] + torch.randn(size, 4)).argmax(1)


CASE = Case(
    make=partial(FocalContrastive, 2.0),
    neutral=partial(FocalContrastive, 0.0),
    by_hand=Focused,
    says=("gamma=2", "gamma=0: inactive", "gamma=0.5"),
    # A problem of its own: where there are several losses, it is to work on one of classes.
    data=Problem(KINDS["classification"].net, labelled, F.cross_entropy, serves=["classification"]),
    variants=[FocalContrastive],
    invalid=[({"gamma": -0.1}, "gamma")],
)


def test_weights_by_hand_and_at_the_ends():
    losses = torch.tensor([0.0, 0.1, 2.0, 200.0], dtype=torch.float64)
    wanted = [0.0, (1 - math.exp(-0.1)) ** 0.5, (1 - math.exp(-2.0)) ** 0.5, 1.0]
    assert focal_weights(losses).tolist() == pytest.approx(wanted, abs=1e-12)
    assert focal_weights(losses, 0.0).tolist() == [1.0] * 4
    small = focal_weights(torch.tensor([1e-8]), 1.0)
    assert small.item() == pytest.approx(1e-8)  # 1 - exp(-1e-8) is 0 in float32
    assert focal_weights(torch.tensor([-1e-9])).item() == 0.0  # a rounding below 0


class Retrieval(Classifier):
    """Two encoders: a query's own document among those of the batch and a hard negative of each."""

    def training_step(self, batch, batch_idx):
        q = F.normalize(self.net(batch[0]))
        p, n = F.normalize(self.net(batch[0] + 0.1)), F.normalize(self.net(-batch[0]))
        return self.contrast(q @ torch.cat([p, n]).T / 0.1)

    def contrast(self, logits):
        return F.cross_entropy(logits, torch.arange(len(logits)))


class ByHand(Retrieval):
    """Writes the weights into its own loss."""

    def contrast(self, logits):
        losses = F.cross_entropy(logits, torch.arange(len(logits)), reduction="none")
        return ((1 - (-losses.detach()).exp()) ** 0.5 * losses).mean()


class Smoothed(Retrieval):
    def contrast(self, logits):
        return F.cross_entropy(logits, torch.arange(len(logits)), label_smoothing=0.1)


class Weighted(Retrieval):
    def contrast(self, logits):
        return F.cross_entropy(logits, torch.arange(len(logits)), weight=torch.ones(logits.shape[1]))


def test_a_contrastive_step_is_that_of_weights_by_hand_and_gamma_0_is_plain():
    ours, hand, plain, neutral = Retrieval(), ByHand(), Retrieval(), Retrieval()
    for module, technique in ((ours, [FocalContrastive()]), (hand, []), (plain, []), (neutral, [FocalContrastive(0)])):
        fit(module, *technique, max_epochs=1)
    assert same_weights(ours, hand, atol=1e-6)
    assert not same_weights(ours, plain, atol=1e-4)
    assert same_weights(neutral, plain)


@pytest.mark.parametrize(
    ("module", "techniques", "said"),
    [
        (Smoothed, [FocalContrastive()], "has `label_smoothing`"),
        (Weighted, [FocalContrastive()], "has `weight`"),
        (Retrieval, [FocalContrastive(), LossReweighting()], "off its cross-entropy, and LossReweighting"),
        (partial(Classifier, lambda m, b: F.mse_loss(m(b[0]), m(b[0]) * 0)), [FocalContrastive()], "is another loss"),
    ],
)
def test_what_it_cannot_read_is_refused_by_name(module, techniques, said):
    with pytest.raises(MisconfigurationException, match=said):
        fit(module(), *techniques, loader=make_loader())


def test_padding_changes_no_mean():
    hidden, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [0, 0, 0]])
    padded = torch.cat([hidden, 1e4 * torch.ones(2, 2, 4)], dim=1)
    pooled = mean_pooled(padded, F.pad(mask, (0, 2)))
    torch.testing.assert_close(pooled, torch.stack([hidden[0, :2].mean(0), torch.zeros(4)]))
    half = mean_pooled(300 * torch.ones(1, 4096, 1, dtype=torch.bfloat16), torch.ones(1, 4096))
    assert half.dtype is torch.bfloat16
    assert half.item() == 300.0


def test_leading_parts_are_made_units_after_they_are_cut():
    a, b = torch.randn(5, 6, requires_grad=True), torch.randn(5, 6)

    def loss(x, y):
        return F.cross_entropy(x @ y.T, torch.arange(5))

    wanted = 0.7 * loss(F.normalize(a), F.normalize(b)) + 0.2 * loss(F.normalize(a[:, :2]), F.normalize(b[:, :2]))
    found = matryoshka_loss(loss, [a, b], [6, 2], [0.7, 0.2])
    torch.testing.assert_close(found, wanted)
    assert torch.equal(*(torch.autograd.grad(value, a)[0].abs() > 0 for value in (found, wanted)))
    with pytest.raises(ValueError, match="from 1 to 6"):
        matryoshka_loss(loss, [a, b], [7])
    with pytest.raises(ValueError, match="one for each"):
        matryoshka_loss(loss, [a, b], [6, 2], [1.0])
