"""Multi-scale consistency: predictions at several scales of an image agree."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import Mixup, MultiScaleConsistency
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import multiscale_consistency, resized, scaled_size
from tests.conformance.by_hand import Hand, changed_targets
from tests.conformance.case import Case
from tests.toys import QUIET, Classifier, ShiftTargets, fit

pytestmark = QUIET


class ScalesByHand(Hand):
    """Two more passes, and the divergence of three predictions, sample by sample."""

    def term(self, loop, moment):
        outputs = [moment.outputs[0]]
        for size in (5, 12):  # of 8 pixels
            x = F.interpolate(moment.x, size=(size, size), mode="bilinear", align_corners=True)
            outputs.append(loop.run(moment.weights, x, moment)[0])
        total = torch.zeros(())
        for row in range(len(moment.x)):
            p = [output[row].softmax(0) for output in outputs]
            q = sum(p) / 3
            if q.max() >= 0.3:
                total = total + 0.5 * sum((each * (each / q).log()).sum() for each in p)
        total = total / len(moment.x)
        y = changed_targets(loop.hands, moment.y)  # labels that are corrected count at all scales
        return total + sum(loop.part.loss(output, y) for output in outputs[1:])


CASE = Case(
    make=partial(MultiScaleConsistency, lam=0.5, rho=0.3),
    neutral=partial(MultiScaleConsistency, lam=0.0, supervised=0.0),
    by_hand=ScalesByHand,
    says=(
        "scales 0.7, 1, 1.5; lam=0.5, rho=0.3 per pixel, supervised=1",
        "lam=0, supervised=0: inactive",
        "scales 1, 0.5; lam=1, rho=0 per image, supervised=0",
        "scales 0.7, 1, 1.5; lam=0, rho=0.8 per pixel, supervised=0.5",
    ),
    data="images",
    variants=[
        partial(MultiScaleConsistency, rho=0.0, scales=[1, 0.5], supervised=0.0, mask="image", loss="last"),
        partial(MultiScaleConsistency, lam=0.0, supervised=0.5, multiple_of=4, norms_follow=True, seed=3),
    ],
    invalid=[
        ({"lam": -0.1}, "lam"),
        ({"rho": -0.1}, "rho"),
        ({"rho": 1.1}, "rho"),
        ({"supervised": -0.1}, "supervised"),
        ({"scales": [1.0, 0.0]}, "scales"),
        ({"scales": [0.7, 1.5]}, "scales"),
        ({"scales": [1.0]}, "scales"),
        ({"scales": [1.0, 0.5, 0.5]}, "scales"),
        ({"multiple_of": 0}, "multiple_of"),
        ({"seed": -1}, "seed"),
        ({"loss": -1}, "loss"),
    ],
)

# -- the functional core ----------------------------------------------------------------------------------------------


def scores(k, b=2, c=3, s=4):
    return 2 * torch.sin(1.3 * torch.arange(b * c * s * s, dtype=torch.float32) + k).reshape(b, c, s, s)


THREE = [scores(0), scores(0.4), scores(0.9)]


def entropy(p):
    return -(p * p.log()).sum(1)


def test_three_times_the_jensen_shannon_divergence():
    p = [each.double().softmax(1) for each in THREE]
    divergence = entropy(sum(p) / 3) - sum(map(entropy, p)) / 3
    expected = 3 * divergence.mean((1, 2))
    assert multiscale_consistency(THREE, rho=0.0).tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def test_by_hand_for_two_scales():
    p = torch.tensor([[0.9, 0.1], [0.5, 0.5]])
    value = multiscale_consistency([p[:1].log(), p[1:].log()], rho=0.7)  # q = (0.7, 0.3)
    expected = sum(a * math.log(a / b) for a, b in ((0.9, 0.7), (0.1, 0.3), (0.5, 0.7), (0.5, 0.3)))
    assert value.item() == pytest.approx(expected, abs=1e-6)
    assert multiscale_consistency([p[:1].log(), p[1:].log()], rho=0.71).item() == 0.0


def test_what_agrees_and_what_is_certain_costs_nothing():
    assert multiscale_consistency([THREE[0]] * 3, rho=0.0).abs().max() < 1e-6
    sure = torch.tensor([[1e4, 0.0]])
    assert multiscale_consistency([sure, sure]).item() == 0.0
    impossible = torch.tensor([[1.0, 1.0, -torch.inf]])  # a class that is masked out, at one scale or at both
    assert multiscale_consistency([impossible, impossible], rho=0.0).item() == pytest.approx(0.0, abs=1e-6)
    assert multiscale_consistency([impossible, torch.zeros(1, 3)], rho=0.0).isfinite().all()
    empty = multiscale_consistency(THREE, 0.0, torch.zeros(2, 4, 4, dtype=torch.bool))
    assert empty.tolist() == [0.0, 0.0]


# Kangningthu/ADELE @ 7195bd0, lib/utils/JSD_loss.py, calc_jsd_multiscale with equal weights and threshold 0.8 on
# `THREE`: the consistency of all pixels, and of all but the first of the first image with its label 255 (a mean over
# 32 pixels there).
AUTHORS_ALL, AUTHORS_WITHOUT_FIRST = 0.24234741926193237, 0.23014357686042786


def test_equals_the_authors_code():
    value = multiscale_consistency(THREE, 0.8, mask="image").mean()
    assert value.item() == pytest.approx(AUTHORS_ALL, abs=1e-6)
    valid = torch.ones(2, 4, 4, dtype=torch.bool)
    valid[0, 0, 0] = False
    one, two = multiscale_consistency(THREE, 0.8, valid, mask="image").tolist()
    assert (15 * one + 16 * two) / 32 == pytest.approx(AUTHORS_WITHOUT_FIRST, abs=1e-6)
    # Each pixel by itself: fewer count.
    q = sum(each.softmax(1) for each in THREE) / 3
    assert 0 < (q.amax(1) >= 0.8).float().mean() < 1
    assert multiscale_consistency(THREE, 0.8).mean() < value


def test_gradient_flows_through_predictions_and_mean():
    one, two = (each.clone().requires_grad_() for each in THREE[:2])
    p = torch.stack([one.softmax(1), two.softmax(1)])
    written = (p * (p.log() - p.mean(0).log())).sum((0, 2)).mean((1, 2)).sum()
    expected = torch.autograd.grad(written, (one, two))
    ours = torch.autograd.grad(multiscale_consistency([one, two], rho=0.0).sum(), (one, two))
    for found, by_formula in zip(ours, expected, strict=True):
        assert by_formula.abs().max() > 1e-3
        torch.testing.assert_close(found, by_formula, atol=1e-6, rtol=1e-5)  # float32


def test_sizes():
    assert scaled_size((256, 250), 0.7) == (179, 175)
    assert scaled_size((256, 224), 0.7, 32) == (192, 160)
    assert scaled_size((8, 8), 0.01) == (1, 1)
    mask = torch.tensor([[[0, 1], [2, 255]]])
    assert resized(mask, (4, 4)).tolist() == [[[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 255, 255], [2, 2, 255, 255]]]
    assert resized(resized(mask, (4, 4)), (2, 2)).tolist() == mask.tolist()
    assert resized(mask, (2, 2)) is mask
    assert resized(torch.arange(16).reshape(1, 4, 4), (2, 2)).tolist() == [[[5, 7], [13, 15]]]  # of centres
    line = torch.tensor([[[[0.0, 2.0]]]]).expand(1, 1, 2, 2)
    assert resized(line, (2, 3))[0, 0, 0].tolist() == [0.0, 1.0, 2.0]


# -- masks ------------------------------------------------------------------------------------------------------------


class Segmenter(LightningModule):
    def __init__(self, step=None):
        super().__init__()
        self.step, self.losses, self.sizes = step, [], []
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        if self.step is not None:
            return self.step(self, batch)
        self.sizes.append((*batch[0].shape[-2:], *batch[1].shape[-2:]))
        return F.cross_entropy(self(batch[0]), batch[1], ignore_index=255)

    def on_before_backward(self, loss):
        self.losses.append(loss.item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.5)


def images(n=4, s=6):
    x = torch.cos(0.9 * torch.arange(n * s * s, dtype=torch.float32)).reshape(n, 1, s, s)
    y = (torch.arange(n * s * s) % 7 % 3).reshape(n, s, s)
    y[0, 0] = 255
    return x, y


def by_hand(module, batch):
    x, y = batch
    logits = [module(x)]
    for size in (4, 9):
        small = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=True)
        logits.append(F.interpolate(module(small), size=(6, 6), mode="bilinear", align_corners=True))
    p = [each.softmax(1) for each in logits]
    q = sum(p) / 3
    divergence = sum((each * (each / q).log()).sum(1) for each in p)
    counted = y != 255
    consistency = (divergence * (q.amax(1) >= 0.4) * counted).sum() / counted.sum()
    return sum(F.cross_entropy(each, y, ignore_index=255) for each in logits) + 2 * consistency


def test_trains_masks_as_a_loop_by_hand():
    loader = DataLoader(TensorDataset(*images()), 4)
    ours, theirs = Segmenter(), Segmenter(by_hand)
    fit(ours, MultiScaleConsistency(lam=2.0, rho=0.4), loader=loader)
    fit(theirs, loader=loader)
    assert ours.losses == pytest.approx(theirs.losses, abs=1e-6)
    assert ours.sizes[:3] == [(6, 6, 6, 6), (4, 4, 4, 4), (9, 9, 9, 9)]
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_labels_that_another_technique_changes_count_at_all_scales():
    def shifted(module, batch):
        return by_hand(module, (batch[0], (batch[1] + 1) % 3))

    x, y = images()
    loader = DataLoader(TensorDataset(x, y % 3), 4)
    ours, theirs = Segmenter(), Segmenter(shifted)
    ours.step = lambda module, batch: F.cross_entropy(module(batch[0]), batch[1])
    fit(ours, MultiScaleConsistency(lam=2.0, rho=0.4), ShiftMasks(), loader=loader)
    fit(theirs, loader=loader)
    assert ours.losses == pytest.approx(theirs.losses, abs=1e-6)


class ShiftMasks(ShiftTargets):
    def change_targets(self, call):
        return (call.target + 1) % 3


def test_a_segformer():
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    sizes = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 1, 1]}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = SegformerConfig(num_channels=1, num_labels=3, decoder_hidden_size=8, **sizes)
        net = SegformerForSemanticSegmentation(config)
    module = Segmenter(lambda module, batch: module.net(pixel_values=batch["image"], labels=batch["mask"]).loss)
    module.net = net
    x, y = images(2, 64)
    rows = [{"image": a, "mask": b} for a, b in zip(x, y, strict=True)]
    options = {"input_key": "image", "target_key": "mask", "multiple_of": 32}
    plain = F.cross_entropy(F.interpolate(net(x).logits, (64, 64), mode="bilinear"), y, ignore_index=255)
    fit(module, MultiScaleConsistency(**options), loader=DataLoader(rows, 2), max_epochs=1)
    assert 2 * plain < module.losses[0] < 5 * plain  # cross-entropy at three scales


@pytest.mark.parametrize(
    ("module", "technique", "words"),
    [
        (Classifier, MultiScaleConsistency(), "resizes images .* and the entry '0' of the batch is torch.float32"),
        (Segmenter, MultiScaleConsistency(input_key="1"), r"is torch.int64 \(4, 6, 6\)"),
        (Segmenter, MultiScaleConsistency(target_key="9"), "target_key='9' names nothing"),
        (
            lambda: Segmenter(lambda m, b: F.mse_loss(m(b[0])[:, 0], b[1].float())),
            MultiScaleConsistency(),
            "has no class scores",
        ),
        (
            lambda: Segmenter(lambda m, b: F.cross_entropy(m(b[0]).movedim(1, -1).reshape(-1, 3), b[1].reshape(-1))),
            MultiScaleConsistency(),
            "pixels that are flattened cannot be put in another size",
        ),
    ],
)
def test_misuse_is_told(module, technique, words):
    x, y = images()
    loader = None if module is Classifier else DataLoader(TensorDataset(x, y % 3), 4)
    with pytest.raises(MisconfigurationException, match=words):
        fit(module(), technique, loader=loader)


def test_mixed_samples_are_refused():
    with pytest.raises(MisconfigurationException, match="Mixup mixes samples"):
        fit(Classifier(), MultiScaleConsistency(), Mixup(alpha=1.0))
