"""ADELE: masks are corrected class by class, when the network begins to memorise their errors."""

import sys
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import ADELE, CutMix, LabelStore, MultiScaleConsistency
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import (
    confident_classes,
    corrected_masks,
    fit_early_learning,
    flat_start,
    iou_counts,
    iou_of_counts,
    slope_drop,
    trigger_epoch,
)
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.conformance.problems import KINDS
from tests.toys import QUIET, fit, make_trainer, weights_of

pytestmark = QUIET


MAPS = KINDS["maps"]


class CorrectedByHand(Hand):
    """Masks that are corrected once, after the first epoch, pixel by pixel."""

    def begin(self, loop):
        self.y = loop.y.clone()

    def observe(self, loop, moment):
        moment.y = self.y[moment.index]  # of the batch, before anybody works on the loss

    def after_epoch(self, loop, epoch):
        if epoch != 0:
            return
        output = loop.run(loop.used(loop.constants()), loop.x)[0].double()
        for image, mask in enumerate(loop.y):
            present = set(mask.flatten().tolist())
            new = mask.clone()
            for place in torch.cartesian_prod(torch.arange(6), torch.arange(6)).tolist():
                p = output[image, :, place[0], place[1]].softmax(0)
                if p.max() > 0.4 and int(p.argmax()) in present:
                    new[place[0], place[1]] = p.argmax()
            small = (new != 0).sum() < 0.5 * (mask != 0).sum() and (new == 0).sum() > 0.95 * 36
            self.y[image] = mask if small else new


make = partial(ADELE, start=1, tau=0.4, scales=[1])
CASE = Case(
    make=make,
    neutral=partial(ADELE, tau=1.0),
    by_hand=CorrectedByHand,
    says=(
        "after epoch 1, tau=0.4; predictions in eval mode at scales 1; from given masks",
        "tau=1: inactive",
        "after epoch 1, tau=0.4; predictions in train mode; from corrected masks",
        "after epoch 1, tau=0.4; predictions in eval mode at scales 0.75, 1, 1.5; from given masks",
        "r=0.5, tau=0.4; predictions in eval mode at scales 1; from given masks",
    ),
    data="maps",
    variants=[
        partial(ADELE, start=1, tau=0.4, predict="train", from_original=False, rule="both", shrink_guard=False),
        partial(ADELE, start=1, tau=0.4, tau_background=0.5, flip=True, temperature=0.5, correct_every=0),
        partial(ADELE, r=0.5, tau=0.4, scales=[1], every_n_steps=2, min_points=3, layer="net.head", flat_rise=0.01),
    ],
    invalid=[
        ({"r": 0.0}, "r"),
        ({"r": 1.0}, "r"),
        ({"tau": 0.0}, "tau"),
        ({"tau": 1.1}, "tau"),
        ({"tau_background": 0.0}, "tau_background"),
        ({"tau_background": 1.1}, "tau_background"),
        ({"correct_every": -1}, "correct_every"),
        ({"scales": []}, "scales"),
        ({"scales": [1.0, 0.0]}, "scales"),
        ({"temperature": 0.0}, "temperature"),
        ({"start": 0}, "start"),
        ({"min_points": 2}, "min_points"),
        ({"every_n_steps": 0}, "every_n_steps"),
        ({"flat_rise": -0.1}, "flat_rise"),
        ({"multiple_of": 0}, "multiple_of"),
        ({"background": -1}, "background"),
        ({"num_samples": 0}, "num_samples"),
        ({"loss": -1}, "loss"),
    ],
    exempt={
        "precision": "whether a pixel's confidence exceeds the threshold is yes or no: near it bfloat16 says otherwise",
    },
)

# -- the functional core ----------------------------------------------------------------------------------------------


def test_counts_and_intersection_over_union():
    predicted = torch.tensor([[[0, 1], [2, 2]], [[1, 1], [0, 0]]])
    masks = torch.tensor([[[0, 1], [1, 255]], [[1, 0], [0, 255]]])
    counts = iou_counts(predicted, masks, 4)
    assert counts.tolist() == [[2, 2, 0, 0], [2, 3, 1, 0], [3, 3, 0, 0]]
    assert iou_of_counts(counts).tolist() == [2 / 3, 0.5, 0.0, 0.0]
    assert iou_counts(predicted, torch.full_like(masks, -100), 4, ignore_index=-100).sum() == 0


@pytest.mark.parametrize("points", [8, 15, 30])
@pytest.mark.parametrize(("true", "epoch"), [((0.8, 0.9, 2.0), 7), ((0.8, 0.9, 5.0), 15), ((0.6, 0.7, 3.0), 12)])
def test_exact_curves_are_recovered_and_trigger(true, epoch, points):
    a, b, c = true
    times = torch.arange(1, points + 1, dtype=torch.float64)
    values = a * (1 - (-(times**b) / c).exp())
    found = fit_early_learning(times.tolist(), values.tolist())
    assert found == pytest.approx(true, abs=1e-3)
    assert trigger_epoch(found, 30) == epoch
    assert trigger_epoch(found, epoch - 1) is None


# Kangningthu/ADELE @ 7195bd0, SegThor/brat/label_correction.py: `fit` on CURVE at np.linspace(0, 10, 10), and the
# relative change of `derivation` at epochs 1 to 15; `label_update_epoch` of it is 7, and `if_update` of (0, 0.02,
# 0.03, *CURVE) is true from epoch 10 on.
CURVE = [0.11, 0.32, 0.45, 0.51, 0.58, 0.6, 0.63, 0.645, 0.65, 0.661]
AUTHORS_FIT = (0.6822401450142412, 0.7821735169497026, 1.7566858286880416)
AUTHORS_DROP = [0.0, 0.4291842698295027, 0.6373644428716957, 0.7573776679606797, 0.8323532949000623, 0.8815026756611685]
AUTHORS_DROP += [0.9147942585200953, 0.9378935866699518, 0.9542223999743354, 0.9659393522295785, 0.9744518104453936]


def test_fit_and_drop_equal_the_authors_code():
    times = torch.linspace(0, 10, 10, dtype=torch.float64).tolist()
    found = fit_early_learning(times, CURVE)
    assert found == pytest.approx(AUTHORS_FIT, abs=1e-6)
    assert [slope_drop(found, epoch) for epoch in range(1, 12)] == pytest.approx(AUTHORS_DROP, abs=1e-6)
    assert trigger_epoch(found, 30) == 7
    assert flat_start([0.0, 0.02, 0.03, *CURVE], 0.1) == 3
    assert (flat_start([0.1, 0.1, 0.1], 0.1), flat_start([0.1], 0.1), flat_start([], 0.1)) == (2, 0, 0)


def test_what_has_no_slope_does_not_trigger():
    assert trigger_epoch((0.0, 0.5, 1.0), 30) is None
    assert trigger_epoch((0.5, 0.5, 0.0), 30) is None
    with pytest.raises(ValueError, match="at least three points, got 2 times"):
        fit_early_learning([1, 2], [0.1, 0.2])


# The same commit, `merge_labels_with_skip` (thresholds 0.7) of SegTHOR and `update_allclass` ("single") of
# lib/datasets/VOCTrainwsegDataset.py on the predictions and masks of `three_masks`, for classes 1, 3 and 1, 2, 3.
SEGTHOR_13 = (
    "------012110120020121101200201211012",
    "012002010120120020101200201201012002",
    "000000000000000000000000000000000000",
)
SEGTHOR_123 = (
    "------210120120012101201200121012012",
    "012001210120120012101200201121012001",
    "000000000000000000000000000000000000",
)
VOC_13 = (
    "-1--01010110120010101101200101011012",
    "012001010120120010101200201101012001",
    "300001030103010000301030100000010301",
)
VOC_123 = (
    "-12-01210120120012101201200121012012",
    "012001210120120012101200201121012001",
    "300001230123010002301230120000012301",
)


def three_masks():
    scores = (3 * torch.sin(1.7 * torch.arange(432, dtype=torch.float64) + 1)).reshape(3, 4, 6, 6)
    masks = (torch.arange(108) % 11 % 3).reshape(3, 6, 6)
    masks[0, 0], masks[2] = 255, 0
    return scores.softmax(1), masks


@pytest.mark.parametrize(
    ("expected", "classes", "options"),
    [
        (SEGTHOR_13, [1, 3], {"both": True, "shrink_guard": False}),
        (SEGTHOR_123, [1, 2, 3], {"both": True, "shrink_guard": False}),
        (VOC_13, [1, 3], {}),
        (VOC_123, [1, 2, 3], {}),
    ],
)
def test_corrections_equal_the_authors_code(expected, classes, options):
    probabilities, masks = three_masks()
    triggered = torch.zeros(4, dtype=torch.bool)
    triggered[classes] = True
    found = corrected_masks(confident_classes(probabilities, 0.7), masks, triggered, **options)
    theirs = [[255 if pixel == "-" else int(pixel) for pixel in row] for row in expected]
    theirs = torch.tensor(theirs).reshape(3, 6, 6)
    counted = masks != 255  # theirs for VOC replaces these too
    assert torch.equal(found[counted], theirs[counted])
    assert (found[~counted] == 255).all()
    assert not torch.equal(found, masks)


def test_what_is_left_alone():
    probabilities, masks = three_masks()
    everything, nothing = torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)
    assert torch.equal(corrected_masks(confident_classes(probabilities, 1.0), masks, everything), masks)
    only_background = corrected_masks(confident_classes(probabilities, 0.7), masks, nothing)
    assert torch.equal(only_background, masks)
    own = F.one_hot(masks[1:], 4).movedim(-1, 1).double()
    assert torch.equal(corrected_masks(confident_classes(own, 0.7), masks[1:], everything), masks[1:])


def test_a_mask_does_not_lose_its_object():
    masks = torch.zeros(1, 10, 10, dtype=torch.long)
    masks[0, :2, :3] = 1
    background, triggered = torch.zeros(1, 10, 10, dtype=torch.long), torch.tensor([False, True])
    assert corrected_masks(background, masks, triggered).equal(masks)
    assert corrected_masks(background, masks, triggered, shrink_guard=False).sum() == 0
    half = torch.where(torch.arange(10)[:, None] < 1, masks, 0)  # 3 of 6 pixels stay
    assert corrected_masks(half, masks, triggered).sum() == 3


def test_the_class_constraint_and_no_background():
    masks, triggered = torch.tensor([[[1, 1], [2, 2]]]), torch.ones(4, dtype=torch.bool)
    predicted = torch.tensor([[[3, 2], [0, 1]]])
    assert corrected_masks(predicted, masks, triggered).tolist() == [[[1, 2], [2, 1]]]
    free = corrected_masks(predicted, masks, triggered, background=None, class_constraint=False)
    assert free.tolist() == predicted.tolist()


def test_confidence_of_the_background_apart():
    p = torch.tensor([0.85, 0.15])[None, :, None, None]
    assert confident_classes(p, 0.8).item() == 0
    assert confident_classes(p, 0.8, 0.9).item() == 2
    assert confident_classes(p.flip(1), 0.8, 0.9).item() == 1
    assert confident_classes(p, 0.8, 0.9, background=None).item() == 0


# -- training ---------------------------------------------------------------------------------------------------------


class Segmenter(LightningModule):
    def __init__(self, step=None):
        super().__init__()
        self.step, self.seen = step, []
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = MAPS.net()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        if torch.is_grad_enabled() and self.trainer.training and self.training:
            self.seen.append(batch[1].clone())
        if self.step is not None:
            return self.step(self, batch)
        return F.cross_entropy(self(batch[0]), batch[1], ignore_index=255)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.5)


def images(n=8):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        x, y = MAPS.data(n)
    y[0, 0] = 255
    return x, y


def loader_of(x, y, batch=4):
    return DataLoader(TensorDataset(x, y), batch)


def dice_loss(module, batch):
    """As in segmentation_models_pytorch: written by hand, no function of torch.nn.functional."""
    logits, y = module(batch[0]), batch[1]
    counted = (y != 255)[:, None]
    p, truth = logits.softmax(1) * counted, F.one_hot(y.clamp(max=2), 3).movedim(-1, 1) * counted
    return 1 - ((2 * (p * truth).sum((0, 2, 3))) / (p + truth).sum((0, 2, 3)).clamp(min=1e-7)).mean()


def test_masks_are_corrected_from_the_epoch_after():
    x, y = images()
    module, adele = Segmenter(), make()
    fit(module, adele, loader=loader_of(x, y), max_epochs=3)
    epochs = [torch.cat(module.seen[2 * e : 2 * e + 2]) for e in range(3)]
    assert torch.equal(epochs[0], y)
    assert not torch.equal(epochs[1], y)
    assert (epochs[1][0, 0] == 255).all()
    assert adele.triggered == {1: 1, 2: 1}
    after = torch.stack([adele.corrected_mask(i, mask) for i, mask in enumerate(y)])
    with torch.no_grad():  # the last correction, by the trained weights
        confident = confident_classes(module.eval()(x).softmax(1), 0.4)
    assert torch.equal(after, corrected_masks(confident, y, torch.tensor([False, True, True])))
    times, iou = adele.curves
    assert times == [1.0, 2.0, 3.0]
    assert iou.shape == (3, 3)


@pytest.mark.parametrize("options", [{}, {"predict": "train"}], ids=["eval", "train"])
def test_dice_alone_through_a_named_layer(options):
    x, y = images()
    module, adele = Segmenter(dice_loss), make(layer="net.head", **options)
    fit(module, adele, loader=loader_of(x, y), max_epochs=3)
    assert not torch.equal(torch.cat(module.seen[-2:]), y)
    assert len(adele.mask_errors(y)) > 0


def test_cross_entropy_and_dice_see_the_same_masks():
    def both(module, batch):
        return F.cross_entropy(module(batch[0]), batch[1], ignore_index=255) + dice_loss(module, batch)

    x, y = images()
    module = Segmenter(both)
    fit(module, make(), loader=loader_of(x, y), max_epochs=2)
    assert not torch.equal(torch.cat(module.seen[-2:]), y)


def test_predictions_of_training_correct_in_the_epoch_after():
    x, y = images()
    module, adele = Segmenter(), make(predict="train", from_original=False)
    fit(module, adele, loader=loader_of(x, y), max_epochs=2)
    twin = Segmenter()
    scores = []

    def kept(module, batch):
        scores.append(module(batch[0]))
        return F.cross_entropy(scores[-1], batch[1], ignore_index=255)

    twin.step = kept
    fit(twin, loader=loader_of(x, y), max_epochs=1)
    confident = confident_classes(torch.cat(scores).softmax(1), 0.4)
    expected = corrected_masks(confident, y, torch.tensor([False, True, True]))
    assert torch.equal(torch.cat(module.seen[2:]), expected)


def test_the_curve_triggers_each_class_by_itself(monkeypatch):
    """Class 1 has a curve that flattens in epoch 7, class 2 one that does so later."""
    from lightning_reg.noisy_labels.adele._curves import Curves

    curves = Curves(0.9, None, 4, 0.0, 0)
    times = torch.arange(1.0, 9.0, dtype=torch.float64)
    one = 0.8 * (1 - (-(times**0.9) / 2).exp())
    two = 0.8 * (1 - (-(times**0.9) / 5).exp())
    found = []
    for n in range(1, 9):
        curves.times, curves.iou = times[:n].tolist(), torch.stack([one, one, two, 0 * one], 1)[:n]
        found.append(curves.trigger(n).tolist())
    assert [epoch for epoch, row in enumerate(found, 1) if row[1]] == [7]
    assert curves.triggered == {1: 7}  # never the background, nor a class that is absent
    shifted = torch.cat([torch.zeros(3, 1, dtype=torch.float64), curves.iou[:, 1:2]])
    curves = Curves(0.9, None, 4, 0.1, 0)
    curves.iou, curves.times = torch.cat([shifted, shifted], 1), [float(t) for t in range(1, 12)]
    assert curves.trigger(11).tolist() == [False, True]  # 2 flat points left out: 9 of 11


def test_a_curve_without_a_fit_waits_and_says_so(monkeypatch):
    from lightning_reg.noisy_labels.adele import _curves

    def no_fit(times, values):
        raise RuntimeError("Optimal parameters not found")

    monkeypatch.setattr(_curves, "fit_early_learning", no_fit)
    x, y = images()
    adele = ADELE(tau=0.4, scales=[1], min_points=3)
    with pytest.warns(UserWarning, match="no curve could be fitted to the training IoU of class [12]"):
        fit(Segmenter(), adele, loader=loader_of(x, y), max_epochs=4)
    assert adele.triggered == {}
    assert len(adele.mask_errors(y)) == 0


def test_scipy_is_asked_for_in_words(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(MisconfigurationException, match="pip install scipy"):
        fit(Segmenter(), ADELE(tau=0.4, scales=[1], min_points=3), loader=loader_of(*images()), max_epochs=3)


def test_masks_of_different_sizes():
    x, y = images(4)
    rows = [(x[i], y[i]) if i < 2 else (x[i, :, :4], y[i, :4]) for i in range(4)]
    module, adele = Segmenter(), make(scales=[0.75, 1, 1.5])
    fit(module, adele, loader=DataLoader(rows, 2), max_epochs=2)
    assert [tuple(mask.shape) for mask in module.seen] == [(2, 6, 6), (2, 4, 6)] * 2
    assert not torch.equal(module.seen[2], module.seen[0])
    assert not torch.equal(module.seen[3], module.seen[1])


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("options", [{}, {"predict": "train", "from_original": False}], ids=["eval", "train"])
def test_resumed_with_corrected_masks(tmp_path, options):
    x, y = images()
    whole = Segmenter()
    keep = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    fit(whole, make(**options), keep, loader=loader_of(x, y), max_epochs=4, enable_checkpointing=True)
    resumed = Segmenter()
    ckpt = tmp_path / "epoch=1.ckpt"
    seed_everything(1, verbose=False)
    again = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    make_trainer(callbacks=[make(**options), again], max_epochs=4, enable_checkpointing=True).fit(
        resumed, loader_of(x, y), ckpt_path=ckpt
    )
    assert all(map(torch.equal, whole.seen[4:], resumed.seen))
    assert not torch.equal(resumed.seen[0], y[:4])
    for one, other in zip(weights_of(whole).values(), weights_of(resumed).values(), strict=True):
        assert torch.equal(one, other)


def test_beside_multi_scale_consistency_and_not_beside_cutmix():
    x, y = images()
    module = Segmenter()
    fit(module, make(), MultiScaleConsistency(rho=0.4), loader=loader_of(x, y), max_epochs=2)
    own = [mask for mask in module.seen if mask.shape[1] == 6]
    assert torch.equal(torch.cat(own[:2]), y)
    assert not torch.equal(torch.cat(own[-2:]), y)
    with pytest.raises(MisconfigurationException, match="no rule for a sample with two owners"):
        fit(Segmenter(), CutMix(), make(), loader=loader_of(x, y))


def test_a_segformer():
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    sizes = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 1, 1]}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = SegformerConfig(num_channels=1, num_labels=3, decoder_hidden_size=8, **sizes)
        net = SegformerForSemanticSegmentation(config)
    module = Hugging()
    module.net = net
    x = torch.cos(0.9 * torch.arange(2 * 32 * 32.0)).reshape(2, 1, 32, 32)
    y = (x[:, 0] > 0).long()
    rows = [{"image": a, "mask": b} for a, b in zip(x, y, strict=True)]
    options = {"class_constraint": False, "shrink_guard": False}
    adele = make(tau=0.34, input_key="image", target_key="mask", multiple_of=32, scales=[1, 2], **options)
    fit(module, adele, loader=DataLoader(rows, 2), max_epochs=1)
    assert adele.triggered == {1: 1, 2: 1}
    assert adele.mask_errors(y).by_class(3).sum() > 0


@pytest.mark.parametrize("dice_alone", [True, False], ids=["Dice alone", "Dice and cross-entropy"])
def test_a_unet_with_the_dice_loss_of_its_library(dice_alone):
    smp = pytest.importorskip("segmentation_models_pytorch")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        options = {"encoder_weights": None, "encoder_depth": 3, "decoder_channels": (16, 8, 8)}
        net = smp.Unet("mobilenet_v2", in_channels=1, classes=3, **options)
    dice = smp.losses.DiceLoss("multiclass", ignore_index=255)

    def step(module, batch):
        logits = module(batch[0])
        own = 0 if dice_alone else F.cross_entropy(logits, batch[1], ignore_index=255)
        return dice(logits, batch[1]) + own

    module = Segmenter(step)
    module.net = net
    x = torch.cos(0.9 * torch.arange(4 * 16 * 16.0)).reshape(4, 1, 16, 16)
    y = (x[:, 0] > 0).long() + (x[:, 0] > 0.7).long()
    adele = make(tau=0.34, layer="net.segmentation_head", class_constraint=False, shrink_guard=False)
    consistency = [] if dice_alone else [MultiScaleConsistency(rho=0.1, multiple_of=8)]
    fit(module, adele, *consistency, loader=loader_of(x, y, 2), max_epochs=2)
    whole = [masks for masks in module.seen if masks.shape[1] == 16]
    assert torch.equal(torch.cat(whole[:2]), y)
    assert len(adele.mask_errors(y)) > 0
    assert not torch.equal(torch.cat(whole[-2:]), y)


class Hugging(Segmenter):
    def training_step(self, batch, batch_idx):
        return self.net(pixel_values=batch["image"], labels=batch["mask"]).loss


# -- probabilities for other tools ------------------------------------------------------------------------------------


def all_probabilities(adele, module, loader):
    """Of all images, from its batches, and the positions."""
    found = list(adele.pred_probs(module.trainer, loader))
    return torch.cat([indices for indices, _ in found]), torch.cat([probabilities for _, probabilities in found])


@torch.no_grad()
def by_hand(net, x, scales, temperature, flip):
    scores = []
    for scale in scales:
        small = x if scale == 1 else F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=True)
        for turned in (False, True) if flip else (False,):
            out = net(small.flip(-1) if turned else small)
            out = F.interpolate(out, x.shape[-2:], mode="bilinear", align_corners=True)
            scores.append(out.flip(-1) if turned else out)
    return (sum(scores) / len(scores) / temperature).softmax(1)


@pytest.mark.parametrize("layer", [None, "net.head"])
def test_probabilities_after_the_fit_are_those_that_corrected(layer):
    x, y = images()
    settings = {"scales": [0.5, 1], "temperature": 2.0, "flip": True}
    module, adele = Segmenter(), make(**settings, layer=layer)
    loader = DataLoader(TensorDataset(x, y), 3, shuffle=True, drop_last=True)
    fit(module, adele, loader=loader, max_epochs=2)
    weights, state = weights_of(module), torch.get_rng_state()
    indices, found = all_probabilities(adele, module, loader)
    assert indices.tolist() == list(range(8))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, by_hand(module.eval().net, x, settings["scales"], 2.0, True))
    torch.testing.assert_close(found.sum(1), torch.ones(8, 6, 6))
    assert all(map(torch.equal, weights.values(), weights_of(module).values()))
    assert torch.equal(state, torch.get_rng_state())
    confident = confident_classes(found, 0.4)
    corrected = corrected_masks(confident, y, torch.tensor([False, True, True]))
    assert (corrected != y).any()
    assert torch.equal(corrected, torch.stack([adele.corrected_mask(i, mask) for i, mask in enumerate(y)]))


def test_probabilities_of_one_batch_are_held_at_a_time():
    """Those of a batch are gone when the next ones come, and images are not fetched ahead."""
    x, y = images()
    module, adele, alive, fetched = Segmenter(), make(), [], []

    class Counted(TensorDataset):
        def __getitem__(self, index):
            fetched.append(index)
            return super().__getitem__(index)

    fit(module, adele, loader=loader_of(x, y), max_epochs=1)
    probabilities = adele.pred_probs(module.trainer, DataLoader(Counted(x, y), 2))
    assert fetched == []
    for number, (_, found) in enumerate(probabilities):
        assert len(fetched) == 4 + 2 * (number + 1)  # the first batch is fetched twice, to see that it stays
        assert found.shape == (2, 3, 6, 6)
        assert found.untyped_storage().nbytes() == 2 * 3 * 6 * 6 * 4
        assert sum(held() is not None for held in alive) <= 1  # the one before, until this loop lets go of it
        alive.append(weakref.ref(found))
        del found
    assert len(alive) == 4
    assert all(held() is None for held in alive)


def test_probabilities_of_a_store_are_those_of_whole_images():
    x, y = images()
    store = LabelStore(TensorDataset(x, y), 3, lambda sample: [entry[..., :4] for entry in sample], size=(6, 6))
    module, adele = Segmenter(), make()
    fit(module, adele, loader=DataLoader(store, 4), max_epochs=2)
    found = [probabilities for _, probabilities in adele.pred_probs(module.trainer, DataLoader(store, 4))]
    assert {tuple(probabilities.shape) for probabilities in found} == {(1, 3, 6, 6)}
    torch.testing.assert_close(torch.cat(found), by_hand(module.eval().net, x, [1], 1.0, False))


def test_what_has_no_probabilities_is_told():
    x, y = images()
    loader = loader_of(x, y)
    with pytest.raises(RuntimeError, match="there are no probabilities yet; fit first"):
        make().pred_probs(make_trainer(), loader)
    module, adele = Segmenter(), make(predict="train")
    fit(module, adele, loader=loader, max_epochs=1)
    with pytest.raises(MisconfigurationException, match='Write predict="eval" to have probabilities'):
        adele.pred_probs(module.trainer, loader)
    module, adele = Segmenter(), make()
    fit(module, adele, loader=loader, max_epochs=1)
    for wrong in (x, DataLoader(TensorDataset(x, y), batch_size=None)):
        with pytest.raises(TypeError, match="must be a DataLoader that draws batches by index, got"):
            adele.pred_probs(module.trainer, wrong)
    with pytest.raises(ValueError, match="of the training dataset with its 8 samples, got 4"):
        adele.pred_probs(module.trainer, loader_of(x[:4], y[:4]))
    with pytest.raises(MisconfigurationException, match="fetched twice was another one"):
        list(adele.pred_probs(module.trainer, DataLoader(Cropped(x, y), 4)))


# -- misuse -----------------------------------------------------------------------------------------------------------


class Cropped(TensorDataset):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        left = int(torch.randint(0, 3, ()))
        return x[:, :, left : left + 4], y[:, left : left + 4]


@pytest.mark.parametrize(
    ("step", "technique", "change", "words"),
    [
        (None, make(), lambda x, y: loader_of(x, y.float()), "whole numbers .* is torch.float32"),
        (None, make(target_key="0"), loader_of, r"torch.float32 \(4, 2, 6, 6\)"),
        (dice_loss, make(), loader_of, "found none in the loss call.*name the layer"),
        (None, make(), lambda x, y: DataLoader(Cropped(x, y), 4), "fetched twice was another one"),
        (
            lambda m, b: F.cross_entropy(m(b[0]).movedim(1, -1).reshape(-1, 3), b[1].reshape(-1), ignore_index=255),
            make(),
            loader_of,
            r"found a tensor \(144, 3\) in the loss call",
        ),
    ],
)
def test_misuse_is_told(step, technique, change, words):
    x, y = images()
    with pytest.raises(MisconfigurationException, match=words):
        fit(Segmenter(step), technique, loader=change(x, y))


def test_nothing_is_known_before_a_fit():
    with pytest.raises(RuntimeError, match="there are no masks yet"):
        ADELE().mask_errors([])
    mask = torch.tensor([[1]])
    assert ADELE().corrected_mask(0, mask).equal(mask)
