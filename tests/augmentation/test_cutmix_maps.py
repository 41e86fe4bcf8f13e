"""CutMix with targets per pixel or position, and targets of several labels."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import CutMix, LossMixin, LossReweighting, Mixup
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import reweight
from tests.augmentation.test_cutmix import drawn
from tests.toys import QUIET, StepLosses, fit

pytestmark = QUIET
B, C, H, W, IGNORED = 6, 4, 5, 7, 255


class Pixels(LightningModule):
    """A convolution without training, so that its outputs in a step are those of any other moment."""

    def __init__(self, step, net=None):
        super().__init__()
        self.step = step
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = net or nn.Conv2d(3, C, 3, padding=1)

    def training_step(self, batch, batch_idx):
        return self.step(self, batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def data(*targets, inputs=(3, H, W)):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(B, *inputs, generator=generator)
    return [x, *(make(generator) for make in targets)]


def classes(generator):
    y = torch.randint(C, (B, H, W), generator=generator)
    y[:, :2] = IGNORED
    y[:, :, :3] = y[:, :, 3:6].roll(1, 0)
    return y


def labels(generator):
    return torch.randint(C, (B,), generator=generator)


def loss_of(step, technique, batch, *others, net=None):
    note = StepLosses()
    module = Pixels(step, net)
    fit(module, technique, *others, note, loader=DataLoader(TensorDataset(*batch), B), max_epochs=1)
    return note.losses[0], module


def pasted_by_loop(y, mixed, x, permutation):
    """A target in which each place has the partner's value at which the inputs have the partner's."""
    pasted = y.clone()
    for b in range(len(x)):
        for place in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[2:])).reshape(-1, x.dim() - 2).tolist():
            if not torch.equal(mixed[(b, slice(None), *place)], x[(b, slice(None), *place)]):
                pasted[(b, ..., *place)] = y[(permutation[b], ..., *place)]
    return pasted


def cross_entropy_by_loop(logits, y):
    log_probs, total, count = logits.detach().double().log_softmax(1), 0.0, 0
    for b in range(len(y)):
        for i in range(H):
            for j in range(W):
                if y[b, i, j] != IGNORED:
                    total, count = total - log_probs[b, y[b, i, j], i, j].item(), count + 1
    return total / count


def on_maps(module, batch):
    return F.cross_entropy(module.net(batch[0]), batch[1], ignore_index=IGNORED)


def on_flat_pixels(module, batch):
    return F.cross_entropy(
        module.net(batch[0]).permute(0, 2, 3, 1).reshape(-1, C), batch[1].view(-1), ignore_index=IGNORED
    )


def on_copied_pixels(module, batch):
    return F.cross_entropy(
        module.net(batch[0]).permute(0, 2, 3, 1).reshape(-1, C), batch[1].clone().view(-1), ignore_index=IGNORED
    )


def on_one_hot_pixels(module, batch):
    counted = (batch[1] != IGNORED).view(-1, 1)
    one_hot = F.one_hot(batch[1] % IGNORED, C).float().flatten(0, 2) * counted
    return F.cross_entropy(module.net(batch[0]).permute(0, 2, 3, 1).reshape(-1, C), one_hot, reduction="sum")


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("step", [on_maps, on_flat_pixels, on_copied_pixels])
def test_labels_of_pixels_follow_the_box(step, per_sample):
    batch, technique = data(classes), CutMix(prob=1.0, seed=2, per_sample=per_sample)
    value, module = loss_of(step, technique, batch)
    mixed, permutation, lam = drawn(technique, 1, batch[0])
    pasted = pasted_by_loop(batch[1], mixed, batch[0], permutation)
    assert not torch.equal(pasted, batch[1])
    logits = module.net(mixed)
    assert value == pytest.approx(cross_entropy_by_loop(logits, pasted), rel=1e-5)
    if not per_sample:
        own, other = (cross_entropy_by_loop(logits, y) for y in (batch[1], batch[1][permutation]))
        assert value != pytest.approx(lam * own + (1 - lam) * other, rel=1e-3)


@pytest.mark.parametrize("per_sample", [False, True])
def test_flattened_one_hot_labels_follow_the_box(per_sample):
    batch, technique = data(classes), CutMix(prob=1.0, seed=2, per_sample=per_sample, loss=0)
    value, module = loss_of(on_one_hot_pixels, technique, batch)
    mixed, permutation, _ = drawn(technique, 1, batch[0])
    pasted = pasted_by_loop(batch[1], mixed, batch[0], permutation)
    count = int((pasted != IGNORED).sum())
    assert value == pytest.approx(count * cross_entropy_by_loop(module.net(mixed), pasted), rel=1e-5)


def numbers(generator):
    return torch.randn(B, 2, H, W, generator=generator)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("function", [F.mse_loss, F.binary_cross_entropy_with_logits])
def test_maps_of_numbers_follow_the_box(function, reduction):
    def step(module, batch):
        return function(module.net(batch[0])[:, :2], batch[1], reduction=reduction).mean()

    batch, technique = data(numbers), CutMix(prob=1.0, seed=2)
    value, module = loss_of(step, technique, batch)
    mixed, permutation, _ = drawn(technique, 1, batch[0])
    pasted = pasted_by_loop(batch[1], mixed, batch[0], permutation)
    assert value == pytest.approx(step(module, (mixed, pasted)).item(), rel=1e-6)


def sequence(generator):
    return torch.randint(C, (B, W), generator=generator)


def test_labels_of_positions_of_signals_follow_the_span():
    def step(module, batch):
        return F.cross_entropy(module.net(batch[0]), batch[1])

    batch, technique = data(sequence, inputs=(3, W)), CutMix(prob=1.0, seed=1)
    value, module = loss_of(step, technique, batch, net=nn.Conv1d(3, C, 3, padding=1))
    mixed, permutation, _ = drawn(technique, 1, batch[0])
    pasted = pasted_by_loop(batch[1], mixed, batch[0], permutation)
    assert not torch.equal(pasted, batch[1])
    assert value == pytest.approx(step(module, (mixed, pasted)).item(), rel=1e-6)


def test_as_many_classes_as_positions_are_no_map():
    def step(module, batch):
        return F.cross_entropy(module.net(batch[0]).mean(1), batch[1])  # (B, W) scores of W classes

    batch, technique = data(lambda g: torch.rand(B, W, generator=g).softmax(1), inputs=(3, W)), CutMix(prob=1.0, seed=1)
    value, module = loss_of(step, technique, batch, net=nn.Conv1d(3, C, 3, padding=1))
    mixed, permutation, lam = drawn(technique, 1, batch[0])
    own, other = (step(module, (mixed, y)).item() for y in (batch[1], batch[1][permutation]))
    assert value == pytest.approx(lam * own + (1 - lam) * other, rel=1e-6)


def test_of_several_targets_maps_follow_the_box_and_labels_the_area():
    def step(module, batch):
        z = module.net(batch[0])
        return F.cross_entropy(z, batch[1], ignore_index=IGNORED) + F.cross_entropy(z.mean((2, 3)), batch[2])

    batch, technique = data(classes, labels), CutMix(prob=1.0, seed=2)
    value, module = loss_of(step, technique, batch)
    mixed, permutation, lam = drawn(technique, 1, batch[0])
    pasted = pasted_by_loop(batch[1], mixed, batch[0], permutation)
    z = module.net(mixed)
    whole = [F.cross_entropy(z.mean((2, 3)), y).item() for y in (batch[2], batch[2][permutation])]
    expected = cross_entropy_by_loop(z, pasted) + lam * whole[0] + (1 - lam) * whole[1]
    assert value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("mixer", ["pair", "soft"])
def test_weights_of_samples_see_the_pasted_maps(mixer):
    batch, technique = data(classes), CutMix(prob=1.0, seed=2, form=mixer)
    value, module = loss_of(on_maps, technique, batch, LossReweighting(warmup_steps=0))
    mixed, permutation, _ = drawn(technique, 1, batch[0])
    pasted = pasted_by_loop(batch[1], mixed, batch[0], permutation)
    each = F.cross_entropy(module.net(mixed), pasted, ignore_index=IGNORED, reduction="none").detach().flatten(1)
    mass = (pasted != IGNORED).flatten(1).sum(1)
    losses = each.sum(1) / mass
    weights = reweight(losses) * B * mass / mass.sum()
    assert value == pytest.approx((weights * losses).sum().item(), rel=1e-5)


def test_maps_are_pasted_in_the_batch_too():
    seen = []

    def step(module, batch):
        seen.append(batch[1])
        return on_maps(module, batch)

    batch, technique = data(classes), CutMix(prob=1.0, seed=2, form="soft")
    value, _ = loss_of(step, technique, batch)
    mixed, permutation, _ = drawn(technique, 1, batch[0])
    assert torch.equal(seen[0], pasted_by_loop(batch[1], mixed, batch[0], permutation))
    assert value == loss_of(on_maps, CutMix(prob=1.0, seed=2), batch)[0]


def test_a_module_that_writes_its_loss_gets_pasted_maps():
    class Written(LossMixin, Pixels):
        def training_step(self, batch, batch_idx):
            each = F.cross_entropy(self.net(batch[0]), batch[1], ignore_index=IGNORED, reduction="none")
            return self.reduce_loss(each.flatten(1).mean(1))

    batch, note = data(classes), StepLosses()
    fit(Written(None), CutMix(prob=1.0, seed=2), note, loader=DataLoader(TensorDataset(*batch), B), max_epochs=1)
    mixed, permutation, _ = drawn(CutMix(prob=1.0, seed=2), 1, batch[0])
    pasted = pasted_by_loop(batch[1], mixed, batch[0], permutation)
    each = F.cross_entropy(Pixels(None).net(mixed), pasted, ignore_index=IGNORED, reduction="none")
    assert note.losses[0] == pytest.approx(each.mean().item(), rel=1e-6)


@pytest.mark.parametrize("per_sample", [False, True])
def test_mixup_blends_the_losses_of_maps(per_sample):
    batch, technique = data(numbers), Mixup(seed=2, per_sample=per_sample)

    def step(module, batch):
        return F.mse_loss(module.net(batch[0])[:, :2], batch[1])

    value, module = loss_of(step, technique, batch)
    mixed, permutation, lam = drawn(technique, 1, batch[0])
    z = module.net(mixed)[:, :2]
    shares = torch.as_tensor(lam).expand(B).reshape(-1, 1, 1, 1)
    each = shares * (z - batch[1]).square() + (1 - shares) * (z - batch[1][permutation]).square()
    assert value == pytest.approx(each.mean().item(), rel=1e-6)


SMALL = {
    "labels": (lambda g: torch.randint(C, (B, 2, 3), generator=g), lambda z, y: F.cross_entropy(z[..., :2, :3], y)),
    "channels": (lambda g: torch.rand(B, 4, 2, 3, generator=g), lambda z, y: F.mse_loss(z[..., :2, :3], y)),
}


@pytest.mark.parametrize("form", ["pair", "soft"])
@pytest.mark.parametrize("kind", SMALL)
def test_maps_of_another_size_are_refused(kind, form):
    target, loss = SMALL[kind]
    what = r"the target of F\..*" if form == "pair" else "target_key='1'"
    with pytest.raises(
        MisconfigurationException,
        match=rf"CutMix: {what} is a map of \(2, 3\) for inputs of \(5, 7\): which of its positions .*`F.interpolate`",
    ):
        loss_of(lambda m, b: loss(m.net(b[0]), b[1]), CutMix(prob=1.0, seed=2, form=form), data(target))


def test_one_number_per_channel_is_no_map():
    def step(module, batch):
        return F.mse_loss(module.net(batch[0]).mean((2, 3), keepdim=True), batch[1])

    batch, technique = data(lambda g: torch.rand(B, C, 1, 1, generator=g)), CutMix(prob=1.0, seed=2)
    value, module = loss_of(step, technique, batch)
    mixed, permutation, lam = drawn(technique, 1, batch[0])
    own, other = (step(module, (mixed, y)).item() for y in (batch[1], batch[1][permutation]))
    assert value == pytest.approx(lam * own + (1 - lam) * other, rel=1e-6)


# -- several labels ---------------------------------------------------------------------------------------------------


def several(module, batch):
    return F.binary_cross_entropy_with_logits(module.net(batch[0]).mean((2, 3)), batch[1].float())


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.uint8])
def test_several_labels_that_are_no_floats(kind):
    batch, technique = data(lambda g: (torch.rand(B, C, generator=g) < 0.4).to(kind)), Mixup(seed=2)
    mixed, permutation, lam = drawn(technique, 1, batch[0])
    named = Mixup(seed=2, loss="binary_cross_entropy_with_logits")
    value, module = loss_of(several, named, batch)
    own, other = (several(module, (mixed, y)).item() for y in (batch[1], batch[1][permutation]))
    assert value == pytest.approx(lam * own + (1 - lam) * other, rel=1e-6)
    with pytest.raises(MisconfigurationException, match=r'`Mixup\(loss="binary_cross_entropy_with_logits"\)`'):
        loss_of(several, technique, batch)
    if kind == torch.bool:
        assert loss_of(several, Mixup(seed=2, form="soft"), batch)[0] == pytest.approx(value, rel=1e-6)
    else:
        sentence = r'`y.float\(\)`, .*`Mixup\(form="pair", loss="binary_cross_entropy_with_logits"\)`'
        with pytest.raises(MisconfigurationException, match=sentence):
            loss_of(several, Mixup(seed=2, form="soft"), batch)
