"""AdaWAC: weights of samples between the supervised loss and the consistency of two views."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import AdaWAC, LossReweighting, Mixup
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import (
    adawac_loss,
    adawac_update,
    apply_symmetry,
    batch_dice_loss,
    draw_symmetries,
    encoder_consistency,
    undo_symmetry,
    weight_ascent,
)
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.toys import QUIET, TWO_RANKS, fit, make_trainer, same_weights, weights_of

pytestmark = QUIET

HERE = "tests.reweighting.test_adawac"


def shrink(x, y):
    """A view that draws nothing: ranks and processes agree on it."""
    return 0.9 * x, y


def cut(x, y):
    return x[..., :2], y[..., :2]


def halved(features):
    return features / 2


class TwoViewsByHand(Hand):
    """A weight per sample, and two passes."""

    def begin(self, loop):
        self.b = torch.full((len(loop.x),), 0.5)

    def observe(self, loop, moment):
        self.loop, self.moment = loop, moment

    def _other(self, weights, moment):
        output, features = self.loop.run(weights, 0.9 * moment.x, moment)
        losses = torch.stack([self.loop.part.loss(o[None], t[None]) for o, t in zip(output, moment.y, strict=True)])
        return losses, features["net.body"]

    def weights(self, losses):
        moment = self.moment
        with torch.no_grad():
            weights = self.loop.used(self.loop.weights())
            features = self.loop.run(weights, moment.x, moment)[1]["net.body"]
            other, aligned = self._other(weights, moment)
            consistency = 2 * (features - aligned).square().flatten(1).mean(1)
            up = self.b[moment.index] * (2 * ((losses + other) / 2 - consistency)).exp()
            self.b[moment.index] = up / (up + 1 - self.b[moment.index])
        return self.b[moment.index] / 2

    def term(self, loop, moment):
        b = self.b[moment.index]
        other, aligned = self._other(moment.weights, moment)
        consistency = 2 * (moment.features["net.body"] - aligned).square().flatten(1).mean(1)
        return (b / 2 * other + (1 - b) * consistency).mean()


SMALL = {"layer": "net.body", "view": f"{HERE}.shrink"}
CASE = Case(
    make=partial(AdaWAC, **SMALL),
    neutral=None,
    by_hand=TwoViewsByHand,
    says=(
        f"net.body, eta=2, lam=2; view {HERE}.shrink, compared as it is",
        f"net.body, eta=0, lam=0; view {HERE}.shrink, compared as it is",
        f"net.body, eta=0.5, lam=2; view {HERE}.shrink, compared by {HERE}.halved",
    ),
    also=["images", "regression"],
    variants=[
        partial(AdaWAC, **SMALL, eta=0.0, lam=0.0, loss="last", norms_follow=True),
        partial(AdaWAC, **SMALL, eta=0.5, limit=3.0, align=f"{HERE}.halved", index_key="2", num_samples=40),
    ],
    invalid=[
        ({"eta": -0.1}, "eta"),
        ({"lam": -0.1}, "lam"),
        ({"limit": 0.0}, "limit"),
        ({"num_samples": 0}, "num_samples"),
        ({"index_key": "2"}, "num_samples"),
        ({"seed": -1}, "seed"),
        ({"loss": -1}, "loss"),
    ],
    exempt={"neutral_is_nothing": "No setting leaves the other view out: eta=0 weighs both losses alike."},
)

# -- the functional core ----------------------------------------------------------------------------------------------


def test_weights_are_the_logistic_of_the_gaps():
    a = torch.zeros(4)
    for _ in range(7):
        b = adawac_update(a, torch.tensor([2, 0]), torch.tensor([0.8, 0.1]), torch.tensor([0.3, 0.5]), eta=2.0)
    assert b.tolist() == pytest.approx([0.9990889, 0.0036842], abs=1e-6)  # sigmoid(7), sigmoid(-5.6)
    assert a.tolist() == pytest.approx([-5.6, 0.0, 7.0, 0.0], abs=1e-6)  # only visited ones change


def test_no_step_stays_at_a_half_and_no_consistency_goes_to_one():
    supervised, consistency = torch.tensor([0.3, 0.7]), torch.tensor([0.5, 0.1])
    half = weight_ascent(torch.zeros(2), supervised, consistency, 0.0).sigmoid()
    assert adawac_loss(supervised, consistency, half).item() == pytest.approx(0.4)
    a, before = torch.zeros(2), torch.full((2,), 0.5)
    for _ in range(5):
        a = weight_ascent(a, supervised, torch.zeros(2), 1.0)
        assert (a.sigmoid() > before).all()
        before = a.sigmoid()


def test_a_weight_comes_back_from_where_a_product_would_underflow():
    a = torch.zeros(1)
    for gap in (-2.0, 2.0):
        for _ in range(60):
            a = weight_ascent(a, torch.tensor([gap]), torch.zeros(1), 2.0)
    assert a.sigmoid().item() == pytest.approx(0.5)
    assert weight_ascent(torch.zeros(1), torch.tensor([50.0]), torch.zeros(1), 2.0, limit=20.0).item() == 20.0


def test_what_is_not_finite_moves_nothing():
    moved = weight_ascent(torch.tensor([1.0, 1.0]), torch.tensor([torch.nan, 0.5]), torch.tensor([0.0, 0.0]), 2.0)
    assert moved.tolist() == [1.0, 2.0]


def test_gradient_flows_through_both_views_and_not_into_weights():
    one, two = torch.tensor([[1.0, 3.0]], requires_grad=True), torch.tensor([[0.0, 1.0]], requires_grad=True)
    b, supervised = torch.tensor([0.25], requires_grad=True), torch.tensor([2.0], requires_grad=True)
    consistency = encoder_consistency(one, two)
    assert consistency.tolist() == [2.5]
    adawac_loss(supervised, consistency, b).backward()
    assert b.grad is None
    assert supervised.grad.tolist() == [0.25]
    assert one.grad.tolist() == [[0.75, 1.5]]
    assert two.grad.tolist() == [[-0.75, -1.5]]


@pytest.mark.parametrize("turns", [True, False])
def test_symmetries_are_undone(turns):
    maps = torch.arange(2 * 200 * 3 * (3 if turns else 4)).reshape(200, 2, 3, -1)
    draws = draw_symmetries(200, torch.Generator().manual_seed(0), turns)
    turned = apply_symmetry(maps, draws)
    assert torch.equal(undo_symmetry(turned, draws), maps)
    # Each of the 8 symmetries of the square, or of the 4 of the rectangle, was drawn.
    assert len(draws.unique(dim=0)) == (8 if turns else 4)
    quarter = torch.tensor([[True, False, True]])  # rows and columns exchanged, flipped sidewards
    if turns:
        assert torch.equal(apply_symmetry(maps[:1], quarter)[0], maps[0].rot90(-1, (1, 2)))


# -- the authors' code ------------------------------------------------------------------------------------------------
# gail-yxie/adawac @ 7d1b79e, models.py, UNETS_AW_AC.forward with loss="adawac", dac=True, and utils.py, DiceLossFull,
# run with `Encoding` as the network and the flipped images as the second view: losses, weights and the head after 6
# steps of SGD, for (dice_ratio, lr_w, dac_encoder).

AUTHORS = {
    (0.0, 0.7, 20.0): (
        [1.93793821, 1.04184055, 0.96898031, 0.83997154, 0.94425648, 1.11576223],
        [0.30155087, 0.36908358, 0.42879716, 0.57025939, 0.68371683, 0.58265704],
        [
            0.27818897,
            -0.15761001,
            -0.23532958,
            0.21701361,
            0.18109453,
            -0.25952357,
            -0.11620166,
            0.29030356,
            0.02130682,
            -0.30565837,
            0.05719648,
            0.29132169,
        ],
    ),
    (0.5, 2.0, 2.0): (
        [0.73068839, 0.72811127, 0.78175259, 0.77841282, 0.79082823, 0.78682017],
        [0.9942764, 0.99417126, 0.99480897, 0.99364555, 0.99509823, 0.99439448],
        [
            0.28883439,
            -0.16418368,
            -0.2361249,
            0.22106843,
            0.17343308,
            -0.24761236,
            -0.12515534,
            0.29368317,
            0.01832282,
            -0.31099594,
            0.06694549,
            0.28388724,
        ],
    ),
}


def waves_(module):
    with torch.no_grad():
        for k, p in enumerate(module.parameters()):
            p.copy_(0.3 * torch.sin(1.7 * torch.arange(p.numel(), dtype=torch.float32) + k).reshape(p.shape))


class Encoding(LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder, self.head, self.losses = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 3, 1), []
        self.act = nn.Tanh()
        waves_(self)

    def forward(self, x):
        return self.head(self.act(self.encoder(x)))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def on_before_backward(self, loss):
        self.losses.append(loss.item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def images(n=6, s=4):
    x = torch.cos(0.9 * torch.arange(n * s * s, dtype=torch.float32)).reshape(n, 1, s, s)
    return x, (torch.arange(n * s * s) % 7 % 3).reshape(n, s, s)


def mirror(x, y):
    return x.flip(-1), None if y is None else y.flip(-1)


@pytest.mark.parametrize("setting", AUTHORS)
def test_the_core_gives_the_authors_figures(setting):
    (dice, eta, lam), (losses, weights, head) = setting, AUTHORS[setting]
    net, table = Encoding(), torch.zeros(6)
    optimizer = net.configure_optimizers()
    x, y = images()
    for step in range(6):
        i = torch.tensor([[0, 1, 2], [3, 4, 5]][step % 2])
        views = [(x[i], y[i]), mirror(x[i], y[i])]
        z = [net.act(net.encoder(view)) for view, _ in views]
        logits = [net.head(each) for each in z]
        truths = [truth for _, truth in views]
        each = [F.cross_entropy(o, t, reduction="none").mean((1, 2)) for o, t in zip(logits, truths, strict=True)]
        supervised, consistency = (each[0] + each[1]) / 2, lam * encoder_consistency(*z)
        b = adawac_update(table, i, supervised, consistency, eta)
        shared = sum(batch_dice_loss(o, t) for o, t in zip(logits, truths, strict=True)) / 2
        loss = dice * shared + (1 - dice) * adawac_loss(supervised, consistency, b)
        assert loss.item() == pytest.approx(losses[step], abs=1e-6)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert table.sigmoid().tolist() == pytest.approx(weights, abs=1e-6)
    assert net.head.weight.flatten().tolist() == pytest.approx(head, abs=1e-6)


def test_trains_as_the_authors_code_does():
    (_, eta, lam), (losses, weights, head) = next(iter(AUTHORS.items()))
    net = Encoding()
    adawac = AdaWAC("act", eta, lam, view=f"{HERE}.mirror", align=None)
    fit(net, adawac, loader=DataLoader(TensorDataset(*images()), 3), max_epochs=3)
    assert net.losses == pytest.approx(losses, abs=1e-6)
    report = adawac.sample_report()
    assert report.weight.tolist() == pytest.approx(weights, abs=1e-6)
    assert report.visits.tolist() == [3] * 6
    assert net.head.weight.flatten().tolist() == pytest.approx(head, abs=1e-6)


# -- masks ------------------------------------------------------------------------------------------------------------


class Symmetric(Encoding):
    """With an encoder that commutes with flips and quarter turns, each pixel being on its own."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Conv2d(1, 4, 1)
        waves_(self)

    def training_step(self, batch, batch_idx):
        self.seen = batch
        return F.cross_entropy(self(batch[0]), batch[1], ignore_index=255)


@pytest.mark.parametrize(("align", "zero"), [("auto", True), (None, False)])
def test_views_are_turned_back(align, zero):
    adawac, net = AdaWAC("act", eta=1.0, view="symmetries", align=align), Symmetric()
    fit(net, adawac, loader=DataLoader(TensorDataset(*images()), 6), max_epochs=1)
    plain = Symmetric()
    losses = F.cross_entropy(plain(images()[0]), images()[1], reduction="none").mean((1, 2))
    alike = torch.allclose(adawac.sample_report().weight, losses.sigmoid(), atol=1e-6)
    assert alike is zero  # both views have the same losses, and the same features where these are turned back
    # What the module saw last is the turned batch, masks alike.
    x, y = net.seen
    assert not torch.equal(x, images()[0])
    before, after = (
        {(round(v, 5), t) for v, t in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)}
        for a, b in (images(), (x, y))
    )
    assert before == after


def test_ignored_pixels_do_not_count():
    x, y = images()
    y[0, :2] = 255
    y[1] = 255
    adawac, plain = AdaWAC("act", eta=1.0, lam=0.0, view="flips"), Symmetric()
    losses = F.cross_entropy(plain(x), y, ignore_index=255, reduction="none").flatten(1)
    counted = (y != 255).flatten(1).sum(1)
    expected = (losses.sum(1) / counted.clamp(min=1)).sigmoid()
    fit(Symmetric(), adawac, loader=DataLoader(TensorDataset(x, y), 6), max_epochs=1)
    report = adawac.sample_report()
    assert torch.allclose(report.weight, expected, atol=1e-6)
    assert report.weight[1] == 0.5
    assert report.visits.tolist() == [1, 0, 1, 1, 1, 1]


def test_a_mean_of_losses_and_other_terms_stay_the_users_own():
    class WithDice(Symmetric):
        def training_step(self, batch, batch_idx):
            logits = self(batch[0])
            each = F.cross_entropy(logits, batch[1], reduction="none")
            return 0.5 * batch_dice_loss(logits, batch[1]) + 0.5 * each.mean()

    net, plain = WithDice(), WithDice()
    adawac = AdaWAC("act", eta=0.0, lam=0.0, view="flips")
    fit(net, adawac, loader=DataLoader(TensorDataset(*images()), 6), max_epochs=1)
    x, y = images()
    logits = plain(x)
    expected = 0.5 * batch_dice_loss(logits, y) + 0.25 * F.cross_entropy(logits, y)  # b = 1/2
    assert net.losses == pytest.approx([expected.item()], abs=1e-6)


def test_a_segformer_with_its_encoder_named(tmp_path):
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    class Segmenter(LightningModule):
        def __init__(self):
            super().__init__()
            sizes = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 1, 1]}
            config = SegformerConfig(num_channels=1, num_labels=3, decoder_hidden_size=8, **sizes)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.net = SegformerForSemanticSegmentation(config)

        def training_step(self, batch, batch_idx):
            return self.net(pixel_values=batch["pixel_values"], labels=batch["labels"]).loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    x, y = images(4, 64)
    y[0] = 255
    rows = [{"pixel_values": a, "labels": b} for a, b in zip(x, y, strict=True)]
    layer = "net.segformer"  # puts out several stages
    adawac = AdaWAC(layer, input_key="pixel_values", target_key="labels")
    net = Segmenter()
    before = weights_of(net)
    fit(net, adawac, loader=DataLoader(rows, 2), max_epochs=1)
    report = adawac.sample_report()
    assert report.weight[0] == 0.5
    assert (report.weight[1:] != 0.5).all()
    assert not torch.equal(before["net.decode_head.classifier.weight"], net.net.decode_head.classifier.weight)
    report.to_csv(tmp_path / "weights.csv")
    assert (tmp_path / "weights.csv").read_text().splitlines()[:2] == ["index,weight,visits", "0,0.500000,0"]


# -- state, ranks, reports --------------------------------------------------------------------------------------------


def test_the_report_tells_dense_from_sparse():
    adawac = AdaWAC("act")
    with pytest.raises(RuntimeError, match="no weights yet"):
        adawac.sample_report()
    rows = {"width": 2, "values": torch.tensor([[3.0, 2.0], [-1.0, 2.0], [0.0, 0.0], [5.0, 1.0], [-4.0, 1.0]])}
    adawac.load_state_dict({"num_samples": 5, "rows": rows})
    report = adawac.sample_report()
    assert len(report) == 5
    assert report.dense().tolist() == [3, 0]
    assert report.sparse().tolist() == [4, 1]
    table = report.__rich__()
    assert table.title == "2 dense labels, 2 sparse ones"
    assert list(table.columns[0].cells) == ["3", "0", "…", "1", "4"]


def _on_ranks(_):
    net, adawac = Encoding(), AdaWAC("act", 0.7, 20.0, view=f"{HERE}.mirror", align=None)
    loader = DataLoader(TensorDataset(*images()), 1)  # Lightning deals samples out to the ranks
    trainer = make_trainer(callbacks=[adawac], max_epochs=3, **TWO_RANKS)
    trainer.fit(net, loader)
    return weights_of(net), adawac.sample_report()


def test_ranks_hold_the_same_weights_of_all_samples(two_processes):
    (one, first), (two, second) = two_processes.run(_on_ranks, None)
    assert same_weights(one, two)
    assert torch.equal(first.weight, second.weight)
    assert first.visits.tolist() == [3] * 6


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("technique", "words"),
    [
        (AdaWAC("encoderr"), "encoder"),
        (AdaWAC("act", view="missing"), r"AdaWAC\(view=...\): 'missing' names no function"),
        (AdaWAC("act", align="missing"), r"AdaWAC\(align=...\): 'missing' names no function"),
        (AdaWAC("act", input_key="9"), "AdaWAC: input_key='9' names nothing in the batch"),
        (AdaWAC("act", view=f"{HERE}.cut"), "must be alike"),
    ],
)
def test_misuse_is_told(technique, words):
    with pytest.raises((MisconfigurationException, RuntimeError), match=words):
        fit(Encoding(), technique, loader=DataLoader(TensorDataset(*images()), 3))


def test_views_of_other_shapes_are_told():
    x, y = images()
    loader = DataLoader(TensorDataset(x[:, :, :2], y[:, :2]), 3)
    with pytest.raises(MisconfigurationException, match=r'turns square images.*Write view="flips"'):
        fit(Encoding(), AdaWAC("act"), loader=loader)
    fit(Encoding(), AdaWAC("act", view="flips"), loader=loader, max_epochs=1)
    loader = DataLoader(TensorDataset(*images()), 3)
    with pytest.raises(MisconfigurationException, match="where a tensor with a row for each of 3 samples is needed"):
        fit(Flat(), AdaWAC("act"), loader=loader)
    frozen = Encoding()
    frozen.encoder.requires_grad_(False)
    with pytest.raises(MisconfigurationException, match="has no gradient"):
        fit(frozen, AdaWAC("act"), loader=loader)


class Flat(Encoding):
    def __init__(self):
        super().__init__()
        self.act = nn.Sequential(nn.Tanh(), nn.Flatten(0, 1))

    def forward(self, x):
        return self.head(self.act(self.encoder(x)).unflatten(0, (-1, 4)))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (LossReweighting(warmup_steps=0), "both weigh the samples of the same loss"),
        (AdaWAC("act", name="second"), "both weigh the samples of the same loss"),
        (Mixup(alpha=1.0), "AdaWAC and Mixup cannot stand together"),
    ],
)
def test_who_cannot_stand_beside_it(other, words):
    with pytest.raises(MisconfigurationException, match=words):
        fit(Encoding(), AdaWAC("act"), other, loader=DataLoader(TensorDataset(*images()), 3))
