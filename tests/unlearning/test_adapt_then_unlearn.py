"""Weights kept away from adapted ones: the terms, the references, the generator's Fisher information, a real GAN."""

import atexit
import copy
import math
import shutil
import tempfile
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import L2ToStart, WeightRepulsion
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import (
    frechet_distance,
    generator_fisher,
    joint_reference,
    repulsion,
    split_pool,
    unlearned_percentage,
    weight_distance,
)
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.conformance.kinds.procedure import ProcedureCase
from tests.conformance.problems import KINDS, seeded
from tests.toys import QUIET, Classifier, LightningModule, fit, make_trainer, same_weights

pytestmark = QUIET


@cache
def folder():
    path = tempfile.mkdtemp(prefix="lightning_reg_")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)


@cache
def adapted_file(number=0):
    """Weights near those that the law's network begins with."""
    with seeded(0):
        net = KINDS["classification"].net()
    with seeded(number + 1):
        weights = {f"net.{name}": p.detach() + 0.1 * torch.randn_like(p) for name, p in net.named_parameters()}
    path = folder() / f"adapted{number}.pt"
    torch.save(weights, path)
    return str(path)


def away_from_files(count, **options):
    return WeightRepulsion([adapted_file(number) for number in range(count)], **options)


class AwayByHand(Hand):
    def begin(self, loop):
        self.start = loop.constants()
        self.unit = sum(float(w.square().sum()) for w in self.start.values())

    def penalty(self, weights):
        distance = sum((w - self.start[name]).square().sum() for name, w in weights.items())
        return 20.0 * torch.exp(-distance / self.unit)


def tensors(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.double) for shape in shapes]


SHAPES = [(3, 2), (4,), (), (0,)]


def layers(*sizes):
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))


def pair_of_networks():
    with seeded(0):
        return nn.ModuleDict(
            {"generator": nn.Sequential(layers(2, 3), nn.BatchNorm1d(3), nn.Tanh()), "discriminator": layers(3, 1)}
        )


CASE = (
    Case(
        make=partial(WeightRepulsion, weight=20.0, params="net.*"),
        neutral=partial(WeightRepulsion, weight=0.0),
        by_hand=AwayByHand,
        says=(
            "el2, weight=20; away from the weights at the start",
            "weight=0: inactive",
            "nl2, weight=0.1, alpha=2; away from 1 set of weights, up to 3 times the distance",
            "il2, weight=0.2; away from 2 sets of weights",
            "el2, weight=1; away from the weights at the start",
        ),
        also=["regression"],
        variants=[
            partial(away_from_files, 1, kind="nl2", weight=0.1, alpha=2.0, max_ratio=3.0, first_step_only=True),
            partial(away_from_files, 2, kind="il2", weight=0.2, distance="mean_per_tensor", exclude=["net.head.*"]),
            partial(WeightRepulsion, params=["net.*.weight"], optimizer=0),
        ],
        invalid=[
            ({"weight": -0.1}, "weight"),
            ({"alpha": 0.0}, "alpha"),
            ({"max_ratio": 0.0}, "max_ratio"),
            ({"optimizer": -1}, "optimizer"),
            ({"kind": "il2"}, "kind"),
            ({"away_from": []}, "away_from"),
        ],
    ),
    ProcedureCase(
        generator_fisher,
        pair_of_networks,
        (torch.tensor([[0.5, -1.0], [1.5, 0.25]]),),
        {},
        [
            ({"params": "generator.9.*"}, "params"),
            ({"discriminator": "critic"}, "discriminator"),
            ({"generator": "generator.2"}, "generator"),
        ],
        is_mean=True,
    ),
)

# -- the terms --------------------------------------------------------------------------------------------------------

CLOSED = {  # value and slope by the distance
    "el2": lambda d, a: (math.exp(-a * d), -a * math.exp(-a * d)),
    "nl2": lambda d, a: (-a * d, -a),
    "il2": lambda d, a: (1 / (a * d), -1 / (a * d**2)),
}


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("kind", CLOSED)
def test_gradients_are_the_closed_ones_and_those_of_autograd(kind, per_tensor):
    params, anchors = [p.requires_grad_() for p in tensors(0, *SHAPES)], tensors(1, *SHAPES)
    value = repulsion(weight_distance(params, anchors, per_tensor), kind, alpha=0.3)
    ours = torch.autograd.grad(value, params)

    shares = [1 / (len(params) * max(1, p.numel())) if per_tensor else 1.0 for p in params]
    squares = [share * (p - a).square().sum() for share, p, a in zip(shares, params, anchors, strict=True)]
    plain = sum(squares)
    theirs = {"el2": torch.exp(-0.3 * plain), "nl2": -0.3 * plain, "il2": 1 / (0.3 * plain)}[kind]
    autograd = torch.autograd.grad(theirs, params)
    number, slope = CLOSED[kind](float(plain.detach()), 0.3)
    assert float(value.detach()) == pytest.approx(number, rel=1e-12)
    for got, wanted, share, p, a in zip(ours, autograd, shares, params, anchors, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)
        torch.testing.assert_close(got, 2 * share * slope * (p - a).detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", CLOSED)
def test_at_the_adapted_weights_there_is_no_direction(kind):
    w = torch.ones(3, requires_grad=True)
    value = repulsion(weight_distance([w], [torch.ones(3)]), kind)
    assert torch.autograd.grad(value, w)[0].tolist() == [0.0] * 3
    assert value.isfinite()


def test_limits_of_the_terms():
    params, anchors = tensors(0, (3, 2)), tensors(1, (3, 2))
    w = params[0].requires_grad_()
    (slope,) = torch.autograd.grad(repulsion(weight_distance([w], anchors), "el2", alpha=1e-30), w)
    assert float(slope.abs().max()) < 1e-28
    assert float(weight_distance(params, anchors, True).detach()) == pytest.approx(
        float(weight_distance(params, anchors).detach()) / 6, rel=1e-14
    )
    half = weight_distance([p.bfloat16() for p in params], [a.bfloat16() for a in anchors])
    assert half.dtype is torch.float32
    for options, name in (({"kind": "l2"}, "kind"), ({"alpha": 0.0}, "alpha"), ({"alpha": math.nan}, "alpha")):
        with pytest.raises(ValueError, match=f"repulsion: `{name}` must be"):
            repulsion(torch.ones(()), **options)


@pytest.mark.parametrize("kind", CLOSED)
def test_one_step_of_repulsion_alone_leads_away(kind):
    params, anchors = [p.requires_grad_() for p in tensors(0, *SHAPES)], tensors(1, *SHAPES)
    before = weight_distance(params, anchors)
    repulsion(before, kind, alpha=0.2).backward()
    torch.optim.SGD(params, lr=0.1).step()
    assert float(weight_distance(params, anchors).detach()) > float(before.detach())


@pytest.mark.parametrize("per_tensor", [False, True])
def test_several_sets_are_their_mean_and_a_constant(per_tensor):
    params, sets = tensors(9, *SHAPES), [tensors(seed, *SHAPES) for seed in range(3)]
    means, spread = joint_reference(sets, per_tensor)
    one_by_one = sum(float(weight_distance(params, one, per_tensor)) for one in sets) / 3
    assert float(weight_distance(params, means, per_tensor) + spread) == pytest.approx(one_by_one, rel=1e-13)
    assert means[0][0, 0].item() == pytest.approx(sum(one[0][0, 0].item() for one in sets) / 3, rel=1e-14)
    alone, none = joint_reference(sets[:1])
    assert float(none) == 0.0
    assert torch.equal(alone[0], sets[0][0])
    assert joint_reference([[torch.ones(2, dtype=torch.bfloat16)]])[0][0].dtype is torch.float32
    with pytest.raises(ValueError, match="joint_reference: `sets` must hold"):
        joint_reference([])


# The k-th parameter of two linear layers (3, 4, 2) is cos(0.7 n + k + 0.1 s) in set s; the original is set 0. With
# gamma = 1.3: distance, value of the term, norm of each parameter's gradient. calc_difference_param_new and train of
# Unlearning/Unlearning_MNIST/train_different_losses.py, atriguha/Adapt_Unlearn, commit 163a354.
AUTHORS = {
    (1, "el2"): [0.0020490508361482593, 99.73397785897953, 0.6593876806679555, 1.1814540701130518, 0.7634654836818755],
    (1, "nl2"): [0.0020490508361482593, -0.0026637660869927374, 0.006611464766805023, 0.011846053827147936],
    (1, "il2"): [0.0020490508361482593, 634.4400915126629, 1574.6796733267222, 2821.423213869513, 1823.2272359449744],
    (3, "el2"): [0.08721964295360078, 89.28063848957885, 10.673630231738699, 18.844508803642483, 12.228332602566779],
    (3, "nl2"): [0.08721964295360078, -0.11338553583968103, 0.11955145496618018, 0.21107049772994269],
    (3, "il2"): [0.08721964295360078, 14.90489935497186, 15.715429581166758, 27.745906937519862, 18.004511655208372],
}


def by_cosine(number):
    net = layers(3, 4, 2).double()
    for k, p in enumerate(net.parameters()):
        n = torch.arange(p.numel(), dtype=torch.double)
        p.data.copy_(torch.cos(0.7 * n + k + 0.1 * number).reshape(p.shape))
    return net


@pytest.mark.parametrize(("sets", "kind"), AUTHORS)
def test_the_authors_numbers(sets, kind):
    params = list(by_cosine(0).parameters())
    means, spread = joint_reference([list(by_cosine(s + 1).parameters()) for s in range(sets)], per_tensor_mean=True)
    factor = sets**2 / 2  # of their distance
    distance = weight_distance(params, means, per_tensor_mean=True) + spread
    weight, alpha = {"el2": (100.0, 1.3), "nl2": (1.0, 1.3), "il2": (1.0, 1 / 1.3)}[kind]
    value = weight * repulsion(distance, kind, alpha * factor)
    slopes = [float(g.norm()) for g in torch.autograd.grad(value, params)]
    got, wanted = [float(distance.detach()) * factor, float(value.detach()), *slopes], AUTHORS[sets, kind]
    assert got[: len(wanted)] == pytest.approx(wanted, rel=1e-10)


# -- scores -----------------------------------------------------------------------------------------------------------


def test_frechet_distance_of_known_normals():
    with seeded(0):
        x = torch.randn(50, 3, dtype=torch.double)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T  # mean 0 and covariance 1, exactly
    turn, _ = torch.linalg.qr(tensors(3, (3, 3))[0])
    one = (x * torch.tensor([1.0, 2.0, 0.0])) @ turn
    two = (x * torch.tensor([3.0, 2.0, 0.5]) + torch.tensor([1.0, -1.0, 2.0])) @ turn
    wanted = 1 + 1 + 4 + (1 - 3) ** 2 + 0 + 0.25  # means, and deviations along common axes
    assert float(frechet_distance(one, two)) == pytest.approx(wanted, rel=1e-7)
    assert float(frechet_distance(two, one)) == pytest.approx(wanted, rel=1e-7)
    assert float(frechet_distance(two, two)) == pytest.approx(0, abs=1e-9)
    # Covariances that do not commute: the root of a product of two matrices by its eigenvalues.
    a, b = (f.T.cov() for f in (x @ tensors(5, (3, 3))[0], x @ tensors(6, (3, 3))[0]))
    root = torch.linalg.eigvals(a @ b).real.sqrt().sum()
    got = frechet_distance(x @ tensors(5, (3, 3))[0], x @ tensors(6, (3, 3))[0])
    assert float(got) == pytest.approx(float(a.trace() + b.trace() - 2 * root), rel=1e-9)
    assert float(frechet_distance(x.float().reshape(50, 3, 1), x)) == pytest.approx(0, abs=1e-6)
    for pair in ((x[:1], x), (x, x[:, :2])):
        with pytest.raises(ValueError, match="frechet_distance: `one` and `two` must be features of at least 2 rows"):
            frechet_distance(*pair)


def test_percentage_unlearned():
    assert [unlearned_percentage(0.2, after) for after in (0.0, 0.1, 0.2, 0.3)] == pytest.approx([100, 50, 0, -50])
    for before, after, name in ((0.0, 0.1, "before"), (0.1, -0.1, "after"), (math.nan, 0.1, "before")):
        with pytest.raises(ValueError, match=f"unlearned_percentage: `{name}` must be"):
            unlearned_percentage(before, after)


def test_a_pool_is_filled_in_the_order_of_the_draws():
    drawn = []

    def sample(count):
        start = sum(drawn)
        drawn.append(count)
        return torch.arange(start, start + count)[:, None].float()

    pool = split_pool(sample, lambda x: x[:, 0] % 4 == 1, wanted=4, unwanted=3, batch=3)
    assert pool.wanted.flatten().tolist() == [0, 2, 3, 4]
    assert pool.unwanted.flatten().tolist() == [1, 5, 9]
    assert (sum(drawn), pool.share) == (12, 3 / 12)
    nothing = split_pool(sample, lambda x: x[:, 0] < 0, wanted=0, unwanted=0, batch=2)
    assert (len(nothing.wanted), len(nothing.unwanted), nothing.share) == (0, 0, 0.0)
    with pytest.raises(ValueError, match=r"of 8 samples 8 are wanted and 0 unwanted, and 1 and 1 are asked .*got 9\)"):
        split_pool(sample, lambda x: x[:, 0] < 0, wanted=1, unwanted=1, batch=4, most=9)
    for name, low in (("wanted", 0), ("unwanted", 0), ("batch", 1)):
        options = {"wanted": 1, "unwanted": 1, name: low - 1}
        with pytest.raises(ValueError, match=f"split_pool: `{name}` must be at least {low}"):
            split_pool(sample, lambda x: x[:, 0] < 0, **options)


# -- a GAN ------------------------------------------------------------------------------------------------------------


class DCGAN(LightningModule):
    """Convolutions and batch norm, 8 x 8 pixels, two optimizers by hand; ``term`` joins the generator's loss."""

    def __init__(self, term=None, toggles=False, paths=False, both=False):
        super().__init__()
        self.automatic_optimization = False
        self.term, self.toggles, self.paths, self.both = term, toggles, paths, both
        with seeded(0):
            self.generator = nn.Sequential(
                nn.Unflatten(1, (4, 1, 1)),
                *(nn.ConvTranspose2d(4, 8, 2), nn.BatchNorm2d(8), nn.ReLU()),
                *(nn.ConvTranspose2d(8, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.ReLU()),
                *(nn.ConvTranspose2d(4, 1, 4, 2, 1), nn.Tanh()),
            )
            self.discriminator = nn.Sequential(
                *(nn.Conv2d(1, 4, 4, 2, 1), nn.LeakyReLU(0.2)),
                *(nn.Conv2d(4, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(32, 1)),
            )

    def draw(self, count, batch_idx):
        place = torch.Generator().manual_seed(100 * self.current_epoch + batch_idx)
        return torch.randn(count, 4, generator=place, dtype=self.generator[1].weight.dtype)

    def step_of(self, optimizer, loss):
        if self.toggles:
            self.toggle_optimizer(optimizer)
        value = loss()
        optimizer.zero_grad()
        self.manual_backward(value)
        optimizer.step()
        if self.toggles:
            self.untoggle_optimizer(optimizer)

    def training_step(self, batch, batch_idx):
        generating, judging = self.optimizers()
        real, noise = batch[0], self.draw(len(batch[0]), batch_idx)

        def judged():
            fake = self.generator(noise).detach()
            return F.softplus(self.discriminator(fake)).mean() + F.softplus(-self.discriminator(real)).mean()

        def generated(term=self.term):
            loss = F.softplus(-self.discriminator(self.generator(noise))).mean()
            return loss if term is None else loss + term(self)

        self.step_of(judging, judged)
        self.step_of(generating, generated)
        if self.paths:
            self.step_of(generating, lambda: 0.1 * self.generator(noise).square().mean())

    def configure_optimizers(self):
        judged = self.parameters() if self.both else self.discriminator.parameters()
        optimizers = (torch.optim.Adam(p, 2e-3, (0.5, 0.99)) for p in (self.generator.parameters(), judged))
        return list(optimizers)


def images():
    with seeded(1):
        return DataLoader(TensorDataset(torch.rand(24, 1, 8, 8, dtype=torch.double) * 2 - 1), 8)


def train(module, *callbacks, **options):
    return fit(module.double(), *callbacks, loader=images(), precision="64-true", **options)


def adapted(path, number=0):
    """The start's weights and a step of random size in each: a fine-tuned copy."""
    module = DCGAN().double()
    with seeded(50 + number), torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn_like(p))
    torch.save(module.state_dict(), path)
    return module


def term_by_hand(files, kind="el2", weight=3.0, alpha=None, names="generator."):
    """The term in the loss, from the formula alone, on weights whose names begin so."""
    sets = [torch.load(file, weights_only=True) for file in files]
    start = dict(DCGAN().double().named_parameters())

    def squares(params):
        own = [(name, p) for name, p in params.items() if name.startswith(names)]
        return sum((p - one[name]).square().sum() for name, p in own for one in sets) / len(sets)

    scale = 1 / float(squares({name: p.detach() for name, p in start.items()})) if alpha is None else alpha

    def term(module):
        d = scale * squares(dict(module.named_parameters()))
        return weight * {"el2": torch.exp(-d), "nl2": -d, "il2": 1 / d}[kind]

    return term


@pytest.fixture
def files(tmp_path):
    paths = [str(tmp_path / f"adapted{number}.pt") for number in range(3)]
    for number, path in enumerate(paths):
        adapted(path, number)
    return paths


@pytest.mark.parametrize("toggles", [False, True], ids=["", "toggled"])
@pytest.mark.parametrize("kind", CLOSED)
def test_gradients_are_those_of_the_loss_form(kind, toggles, files):
    ours, theirs, plain = DCGAN(toggles=toggles), DCGAN(term_by_hand(files[:1], kind), toggles), DCGAN(toggles=toggles)
    train(ours, WeightRepulsion(files[0], kind, weight=3.0, params="generator.*"))
    for module in (theirs, plain):
        train(module)
    assert same_weights(ours, theirs, atol=1e-10)  # float64, 6 steps of Adam
    assert not same_weights(ours, plain, atol=1e-4)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_in_the_first_step_the_discriminator_gets_what_it_got(precision, files):
    modules, away = [DCGAN(), DCGAN()], WeightRepulsion(files[0], weight=3.0, params="generator.*")
    for module, callbacks in zip(modules, ([away], []), strict=True):
        loader = DataLoader(TensorDataset(next(iter(images()))[0].float()), 8)
        fit(module, *callbacks, loader=loader, max_epochs=1, precision=precision)
    assert same_weights(*(module.discriminator for module in modules))
    assert not same_weights(*(module.generator for module in modules), atol=1e-4)


def test_several_sets_and_all_settings(files):
    ours, theirs = DCGAN(), DCGAN(term_by_hand(files, alpha=0.25, names="generator.1"))
    away = WeightRepulsion(files, "el2", 3.0, 0.25, ["generator.*"], ["generator.[2-9].*"], max_ratio=1e6)
    train(ours, away)
    train(theirs)
    assert same_weights(ours, theirs, atol=1e-10)  # float64, 6 steps of Adam
    state = away.state_dict()
    assert list(state["anchors"]) == ["generator.1.weight", "generator.1.bias"]
    assert sum(t.numel() for t in state["anchors"].values()) == 4 * 8 * 4 + 8  # however many sets


@pytest.mark.parametrize("first", [False, True])
def test_the_step_for_path_lengths(first, files):
    term = term_by_hand(files[:1])

    class InBoth(DCGAN):
        def step_of(self, optimizer, loss):
            joins = optimizer is self.optimizers()[0] and not first
            super().step_of(optimizer, (lambda: loss() + term(self)) if joins else loss)

    ours, theirs = DCGAN(paths=True), InBoth(term if first else None, paths=True)
    train(ours, WeightRepulsion(files[0], weight=3.0, params="generator.*", first_step_only=first))
    train(theirs)
    assert same_weights(ours, theirs, atol=1e-10)  # float64, 6 batches of Adam


def test_weights_in_two_optimizers(files):
    """The second optimizer has the generator's weights as well, and steps them without the term."""
    ours, theirs = DCGAN(both=True), DCGAN(term_by_hand(files[:1]), both=True)
    away = WeightRepulsion(files[0], weight=3.0, params="generator.*", optimizer=0, first_step_only=True)
    train(ours, away)
    train(theirs)
    assert same_weights(ours, theirs, atol=1e-10)  # float64, 6 batches of Adam


def test_resumed_runs_go_on_without_the_files(files, tmp_path):
    def make():
        return WeightRepulsion(files, weight=3.0, params="generator.*")

    whole, half, rest = DCGAN(), DCGAN(), DCGAN()
    away = make()
    train(whole, away)
    train(half, make(), max_epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    for file in files:
        Path(file).unlink()
    again = make()
    trainer = make_trainer(callbacks=[again], precision="64-true")
    trainer.fit(rest.double(), images(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert same_weights(whole, rest)
    one, two = away.state_dict(), again.state_dict()
    assert (one["unit"], one["spread"]) == (two["unit"], two["spread"])
    assert same_weights(one["anchors"], two["anchors"])


def test_weights_that_are_frozen_at_first(files):
    """They count in the distance, and are repelled from the step on that trains them."""

    class Thaws(DCGAN):
        def on_train_epoch_start(self):
            self.generator[1].requires_grad_(self.current_epoch > 0)

    ours, theirs = Thaws(), Thaws(term_by_hand(files[:1]))
    train(ours, WeightRepulsion(files[0], weight=3.0, params="generator.*"))
    train(theirs)
    assert same_weights(ours, theirs, atol=1e-10)  # float64, 6 steps of Adam


def test_files_hold_channels_in_their_order(files):
    assert WeightRepulsion(files[0]).remembers_channels
    assert not WeightRepulsion(files[0], weight=0.0).remembers_channels
    assert not WeightRepulsion().remembers_channels


def test_a_further_fit_begins_anew(files, tmp_path):
    module, away = DCGAN(), WeightRepulsion(weight=3.0, params="generator.*")
    train(module, away)
    before = {name: p.detach().clone() for name, p in module.named_parameters() if name.startswith("generator.")}
    train(module, away)
    assert same_weights(before, away.state_dict()["anchors"])
    checkpoint = tmp_path / "adapted.ckpt"
    train(DCGAN(), max_epochs=1).save_checkpoint(checkpoint)
    away = WeightRepulsion(str(checkpoint), params="generator.*")
    train(DCGAN(), away)
    wanted = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(value, wanted[name]) for name, value in away.state_dict()["anchors"].items())


def test_far_enough_is_enough():
    def pushed(distance):
        module = Classifier()
        away = WeightRepulsion(kind="nl2", max_ratio=0.01, alpha=1.0)
        fit(module, away, max_epochs=1, limit_train_batches=1)
        away._now = [torch.zeros(2, requires_grad=True)]
        away._kept = {"anchors": {"w": torch.tensor([math.sqrt(distance), 0.0])}, "spread": 0.0, "unit": 2.0}
        value = away.penalty(module)
        return float(value.detach()), torch.autograd.grad(value, away._now[0])[0].tolist()

    assert pushed(0.015) == (pytest.approx(-0.015), pytest.approx([2 * math.sqrt(0.015), 0.0]))
    assert pushed(0.03) == (pytest.approx(-0.02), [0.0, 0.0])


def test_the_distance_is_logged(files):
    away = WeightRepulsion(files[0], "nl2", params="generator.*")
    logged = train(DCGAN(), away, max_epochs=1, limit_train_batches=1).logged_metrics
    assert float(logged["reg/weight_repulsion/distance"]) == pytest.approx(1.0)  # before the first step
    assert float(logged["reg/weight_repulsion/penalty"]) == pytest.approx(-1.0)


# -- what is refused --------------------------------------------------------------------------------------------------


def refused(match, *arguments, **options):
    away = WeightRepulsion(*arguments, **{"params": "generator.*", **options})
    with pytest.raises(MisconfigurationException, match=match):
        train(DCGAN(), away)


def test_files_that_cannot_be_used(files, tmp_path):
    refused(r"WeightRepulsion\(away_from='no.pt'\): there is no such file", "no.pt")
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"nothing")
    refused(r"broken.pt'\): the file cannot be read with .* Write it with `trainer.save_checkpoint`", str(broken))
    torch.save([1.0], tmp_path / "list.pt")
    refused(r"list.pt'\): the file must hold tensors by name", str(tmp_path / "list.pt"))
    own = DCGAN().generator.state_dict()
    torch.save(own, tmp_path / "own.pt")
    refused(r"'generator.1.weight' is not there, .* has '1.weight', '1.bias'", str(tmp_path / "own.pt"))
    renamed = {f"_orig_mod.{name}": value for name, value in torch.load(files[0], weights_only=True).items()}
    torch.save(renamed, tmp_path / "compiled.pt")  # of `torch.compile`, which is as good
    train(DCGAN(), WeightRepulsion(str(tmp_path / "compiled.pt"), params="generator.*"), max_epochs=1)
    other = torch.load(files[0], weights_only=True) | {"generator.1.bias": torch.zeros(3)}
    torch.save(other, tmp_path / "other.pt")
    refused(r"'generator.1.bias' has shape \(3,\), and is of shape \(8,\)", str(tmp_path / "other.pt"))
    torch.save(DCGAN().double().state_dict(), tmp_path / "same.pt")
    refused("the fit begins with the adapted weights themselves", str(tmp_path / "same.pt"))
    torch.save(other | {"generator.1.bias": torch.full((8,), math.nan)}, tmp_path / "nan.pt")
    refused("or those that the fit begins with, are not finite", str(tmp_path / "nan.pt"))


def test_setups_that_are_refused(files):
    refused(r"there are 2 optimizers, .*`params` which ones are meant", files[0], params=None)
    refused(r"WeightRepulsion\(params=\['generatr.*'\]\): no parameter has such a name", files[0], params="generatr.*")
    refused(r"WeightRepulsion: `optimizer` must be the position of one of the 2", files[0], optimizer=2)

    class Searching(Classifier):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(MisconfigurationException, match="LBFGS evaluates the loss several times in a step"):
        fit(Searching(), WeightRepulsion(first_step_only=True))
    away = WeightRepulsion(params="net.0.*")
    fit(Classifier(), away)
    other = WeightRepulsion(params="net.*.weight")
    other.load_state_dict(away.state_dict())
    with pytest.raises(MisconfigurationException, match=r"of other weights: 'net.3.weight' is of shape none there"):
        fit(Classifier(), other)


# -- Fisher information -----------------------------------------------------------------------------------------------


def fisher_by_loops(module, noise, names):
    module = copy.deepcopy(module).eval()
    sums = {name: torch.zeros_like(p) for name, p in module.named_parameters() if name in names}
    for row in noise:
        module.zero_grad()
        module.discriminator(module.generator(row[None])).sum().backward()
        for name, p in module.named_parameters():
            if name in names:
                sums[name] += p.grad**2 / len(noise)
    return sums


def test_fisher_information_of_a_gan_by_loops():
    module, noise = DCGAN().double(), tensors(0, (7, 4))[0]
    train(module, max_epochs=1)  # statistics of batch norm
    names = [name for name, _ in module.named_parameters() if name.startswith("generator.")]
    fisher = generator_fisher(module.train(), noise)
    assert list(fisher) == names
    wanted = fisher_by_loops(module, noise, names)
    for name in names:
        torch.testing.assert_close(fisher[name], wanted[name], rtol=1e-10, atol=1e-14)
    some = generator_fisher(module, noise, params="generator.1.*")
    assert list(some) == ["generator.1.weight", "generator.1.bias"]
    assert torch.equal(some["generator.1.bias"], fisher["generator.1.bias"])


def test_the_authors_fisher_information():
    # estimate_fisher of Negative_Adaptation/EWC_ADAPT_MNIST/model.py, atriguha/Adapt_Unlearn, commit 163a354, for a
    # generator tanh(two linear layers), weights as above, noise sin(0.37 n), and D(x) = 1.5 x_0 - 0.5 x_1.
    discriminator = nn.Linear(2, 1).double()
    with torch.no_grad():
        discriminator.weight.copy_(torch.tensor([[1.5, -0.5]]))
        discriminator.bias.zero_()
    gan = nn.ModuleDict({"generator": nn.Sequential(by_cosine(0), nn.Tanh()), "discriminator": discriminator})
    noise = torch.sin(0.37 * torch.arange(96, dtype=torch.double)).reshape(32, 3)
    fisher = generator_fisher(gan, noise)
    sums = [6.917979988126898, 4.739526752211223, 15.87735292041071, 2.0485112981527305]
    assert [float(value.sum()) for value in fisher.values()] == pytest.approx(sums, rel=1e-10)
    row = [0.17186661879303447, 0.17208523402150017, 0.17558746051343233]
    assert fisher["generator.0.0.weight"][0].tolist() == pytest.approx(row, rel=1e-10)


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
def test_split_weights_are_refused_before_anything_begins(name):
    trainer = type("Trainer", (), {"strategy": type(name, (), {})()})
    with pytest.raises(
        MisconfigurationException,
        match=rf"^WeightRepulsion compares whole parameters, which {name} splits over the processes\. Use DDP\.$",
    ):
        WeightRepulsion("*").check(trainer, Classifier())


def test_what_the_fisher_information_refuses():
    module, noise = DCGAN(), torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"`discriminator` must be the name of a layer, got 'critic'. Near names: "):
        generator_fisher(module, noise, discriminator="critic")
    with pytest.raises(ValueError, match=r"`params` must match parameters of 'generator', got 'discriminator"):
        generator_fisher(module, noise, params="discriminator.*")
    with pytest.raises(ValueError, match=r"`generator` must be a layer with parameters, got 'generator.0'"):
        generator_fisher(module, noise, generator="generator.0")
    with pytest.raises(ValueError, match=r"must give one number for each sample, got shape \(2, 4, 4, 4\) for 2"):
        generator_fisher(module, noise, discriminator="discriminator.0")
    with pytest.raises(ValueError, match="a row for each sample, got no sample"):
        generator_fisher(module, noise[:0])
    with pytest.raises(ValueError, match="a row for each sample, got no sample"):
        generator_fisher(module)
    noise[1] = math.inf
    with pytest.raises(ValueError, match="of 2 whose gradient is not finite"):
        generator_fisher(module, noise)


def test_stage_one_is_tied_by_importance(tmp_path):
    module, noise = DCGAN().double(), tensors(0, (5, 4))[0]
    fisher = generator_fisher(module, noise, params="generator.*.weight")
    torch.save(fisher, tmp_path / "fisher.pt")
    start = {name: p.detach().clone() for name, p in module.named_parameters()}

    def term(other):
        named = dict(other.named_parameters())
        return 500.0 * sum((f.float().double() * (named[n] - start[n]).square()).sum() for n, f in fisher.items())

    tie = L2ToStart(500.0, params="generator.*", importance=str(tmp_path / "fisher.pt"))
    ours, theirs, plain = DCGAN(), DCGAN(term), DCGAN()
    assert tie.describe().startswith(f"weight=500, gradient, importance of {tmp_path / 'fisher.pt'};")
    train(ours, tie)
    for one in (theirs, plain):
        train(one)
    assert same_weights(ours, theirs, atol=1e-10)  # float64, 6 steps of Adam
    assert not same_weights(ours, plain, atol=1e-4)
