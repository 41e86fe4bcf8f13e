"""Loss-based sample reweighting."""

import inspect
import math
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import ModelParallelStrategy
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Sampler, TensorDataset

from lightning_reg import ELRCallback, LossMixin, LossReweighting
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import (
    apply_strategy,
    elr_regularizer,
    normalize_losses,
    reweight,
    scheduled_temperature,
    sequence_losses,
    weighted_loss,
)
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.toys import INPUTS, QUIET, TWO_RANKS, Callback, Classifier, StepLosses, fit, make_trainer, same_weights

ROOT = Path(__file__).parents[2]


class ReweightingByHand(Hand):
    def weights(self, losses):
        return len(losses) * torch.tensor(by_hand(losses.tolist()))


CASE = Case(
    make=partial(LossReweighting, warmup_steps=0),
    neutral=partial(LossReweighting, strategy="uniform", warmup_steps=0),
    by_hand=ReweightingByHand,
    says=(
        "linupper per sample, r=0.4; token_share",
        "uniform: inactive",
        "quadratic per sample, r=1; first 5 steps plain; token_share",
        "extremes per sample, r=0.4; first 3 steps r=10; token_share",
        "linupper per sample, r=0.4 from 5, linear in 15 steps; first 2 steps plain; token_share",
        "linupper per sample, r=0.4 from 100, cosine in 10 steps, weights <= 1.5/M; token_share",
        "linupper per token, r=0.4; sample_mean",
    ),
    also=["regression"],
    variants=[
        partial(LossReweighting, strategy="quadratic", r=1.0, warmup_steps=5),
        partial(LossReweighting, strategy="extremes", warmup="high_r", r_start=10.0, warmup_steps=3),
        partial(LossReweighting, warmup_steps=2, schedule="linear", r_start=5.0, schedule_steps=15),
        partial(LossReweighting, warmup_steps=0, schedule="cosine", schedule_steps=10, max_weight=1.5),
        partial(LossReweighting, warmup_steps=0, objective="sample_mean", level="token", loss="last"),
    ],
    invalid=[
        ({"r": 0.0}, "r"),
        ({"r_start": 0.0}, "r_start"),
        ({"delta": 0.0}, "delta"),
        ({"eps": 0.0}, "eps"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"warmup_steps": 0.5}, "warmup_steps"),
        ({"schedule_steps": 1}, "schedule_steps"),
        ({"schedule": "linear"}, "schedule_steps"),
        ({"max_weight": 0.99}, "max_weight"),
        ({"loss": -1}, "loss"),
    ],
)

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

STRATEGIES = ("linupper", "quadratic", "extremes", "uniform")


def by_hand(losses, strategy="linupper", r=0.4, delta=1.0, eps=1e-6):
    """The weights, in float64 and one number at a time; losses that are None do not count."""
    known = [loss for loss in losses if loss is not None]
    low, high = min(known), max(known)
    scores = []
    for loss in losses:
        if loss is None:
            continue
        h = delta * (2 * loss - (high + low)) / max(high - low, eps)
        shape = {"linupper": min(h + delta, delta), "quadratic": 1 - h * h / delta**2, "extremes": abs(h), "uniform": 0}
        scores.append(math.exp(shape[strategy] / r))
    left = iter(scores)
    return [0.0 if loss is None else next(left) / sum(scores) for loss in losses]


# -- the functional core ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("r", "delta"), [(0.4, 1.0), (1.0, 1.0), (0.2, 0.5)])
def test_weights_are_those_of_the_formula(strategy, r, delta):
    losses = torch.tensor([2.0, 0.5, 3.5, 0.5, 1.0, 2.75, 9.0])  # a tie at the bottom, an outlier
    wanted = torch.tensor(by_hand(losses.tolist(), strategy, r, delta))
    torch.testing.assert_close(reweight(losses, strategy, r, delta), wanted, atol=1e-6, rtol=1e-5)  # float32


def test_figures_worked_out_by_hand():
    losses = torch.tensor([1.0, 2.0, 5.0])
    assert normalize_losses(losses).tolist() == [-1.0, -0.5, 1.0]
    assert normalize_losses(losses, delta=2.0).tolist() == [-2.0, -1.0, 2.0]
    h = torch.tensor([-1.0, -0.5, 0.0, 0.25, 1.0])
    assert apply_strategy(h, "linupper").tolist() == [0.0, 0.5, 1.0, 1.0, 1.0]
    assert apply_strategy(h, "quadratic").tolist() == [0.0, 0.75, 1.0, 0.9375, 0.0]
    assert apply_strategy(h, "extremes").tolist() == [1.0, 0.5, 0.0, 0.25, 1.0]
    assert apply_strategy(h, "uniform").tolist() == [0.0] * 5
    assert apply_strategy(2 * h, "linupper", delta=2.0).tolist() == [0.0, 1.0, 2.0, 2.0, 2.0]
    assert apply_strategy(2 * h, "quadratic", delta=2.0).tolist() == [0.0, 0.75, 1.0, 0.9375, 0.0]
    with pytest.raises(ValueError, match=r"`strategy` must be 'linupper', .* got 'upper'"):
        apply_strategy(h, "upper")
    # Two samples: e^0 and e^(1/r).
    low, high = reweight(torch.tensor([0.3, 0.7]), r=0.4).tolist()
    assert high / low == pytest.approx(math.exp(2.5), rel=1e-5)
    # An outlier: more than 2/M with r = 0.4.
    outlier = torch.tensor([1.0, 1.1, 0.9, 1.05, 12.0])
    assert reweight(outlier).tolist() == pytest.approx([0.064, 0.067, 0.061, 0.065, 0.743], abs=5e-4)
    quadratic = reweight(outlier, "quadratic")
    assert (quadratic.min().item(), quadratic.max().item()) == pytest.approx((0.184, 0.220), abs=5e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_invariants(strategy):
    losses = torch.rand(64, generator=torch.Generator().manual_seed(0), requires_grad=True) * 4
    weights = reweight(losses, strategy)
    assert not weights.requires_grad
    assert weights.sum().item() == pytest.approx(1, abs=1e-6)
    assert weights.max() / weights.min() <= math.exp(1 / 0.4) * (1 + 1e-5)
    for other in (losses + 7, losses * 3):  # rounding of float32, through 1 / r
        torch.testing.assert_close(reweight(other, strategy), weights, atol=1e-6, rtol=1e-4)
    uniform = (weights.new_ones(64) / 64).tolist()
    assert reweight(losses, strategy, r=1e6).tolist() == pytest.approx(uniform, rel=1e-5)
    assert reweight(torch.full((64,), 2.3), strategy).tolist() == pytest.approx(uniform, abs=0)  # equal: exactly 1/M
    assert reweight(torch.tensor([4.2]), strategy).tolist() == [1.0]
    assert reweight(losses.detach().half(), strategy).dtype is torch.float32
    cold = reweight(losses, strategy, r=1e-3)  # no overflow, no 0/0
    assert cold.isfinite().all()
    assert cold.sum().item() == pytest.approx(1, abs=1e-5)


def test_linupper_rises_to_mid_range_and_quadratic_is_symmetric_about_it():
    losses = torch.linspace(1, 3, 21)
    upper, quadratic = reweight(losses), reweight(losses, "quadratic")
    assert all(one <= two for one, two in pairwise(upper.tolist()))
    assert (upper[10:] == upper[10]).all()
    assert (upper[:10].diff() > 0).all()
    torch.testing.assert_close(quadratic, quadratic.flip(0), atol=1e-7, rtol=1e-5)
    assert quadratic.argmax() == 10


def test_a_tiny_range_does_not_cancel():
    # 2 L - (high + low), computed in float32 around 1000, is wrong by whole steps of the range.
    losses = 1000 + torch.arange(4) * 2.0**-14
    assert normalize_losses(losses).tolist() == pytest.approx([-1.0, -1 / 3, 1 / 3, 1.0])
    # Under the floor only a part of the interval is taken.
    assert normalize_losses(torch.tensor([0.0, 2.5e-7, 5e-7])).tolist() == pytest.approx([-0.5, 0.0, 0.5])
    assert normalize_losses(torch.full((3,), 5.0)).tolist() == [0.0, 0.0, 0.0]


def test_samples_that_do_not_count_change_nothing():
    losses, counted = torch.tensor([0.0, 2.0, 3.0, 99.0, 2.5]), torch.tensor([False, True, True, False, True])
    for strategy in STRATEGIES:
        weights = reweight(losses, strategy, counted=counted)
        assert weights[~counted].tolist() == [0.0, 0.0]
        torch.testing.assert_close(weights[counted], reweight(losses[counted], strategy))
    assert reweight(losses, counted=torch.zeros(5, dtype=torch.bool)).tolist() == [0.0] * 5
    capped = reweight(losses, r=0.2, max_weight=1.2, counted=counted)
    torch.testing.assert_close(capped[counted], reweight(losses[counted], r=0.2, max_weight=1.2))
    assert capped.max().item() == pytest.approx(1.2 / 3)


def test_sequence_losses_and_their_counts():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(4, 6, 7, generator=generator), torch.randint(7, (4, 6), generator=generator)
    labels[1, 3:], labels[2] = -100, -100
    labels[3, 1:] = -100  # the only label left is that of the first position, which nothing predicts
    for shift in (True, False):
        losses, counts = sequence_losses(logits.bfloat16(), labels, shift=shift)
        log_probs = logits.bfloat16().double().log_softmax(2)
        for row in range(4):
            terms = [
                -log_probs[row, t - int(shift), labels[row, t]].item()
                for t in range(int(shift), 6)
                if labels[row, t] != -100
            ]
            assert counts[row] == len(terms)
            assert losses[row].item() == pytest.approx(sum(terms) / max(len(terms), 1), abs=1e-5)
        assert losses.dtype is torch.float32
    nine, counts = sequence_losses(logits, labels.masked_fill(labels == -100, 9), ignore_index=9)
    torch.testing.assert_close(nine, sequence_losses(logits, labels)[0])
    logits.requires_grad_()
    sequence_losses(logits, labels)[0].sum().backward()
    assert logits.grad[:, -1].abs().sum() == 0
    assert logits.grad.isfinite().all()


def test_weighted_loss_is_either_objective():
    losses, counts = torch.tensor([1.0, 3.0], requires_grad=True), torch.tensor([30, 10])
    weights = torch.tensor([0.1, 0.3])  # of one rank of two
    assert weighted_loss(losses, weights, world_size=2).item() == pytest.approx(2 * (0.1 * 1 + 0.3 * 3))
    # 2 ranks x 2 samples x sum of w n / 40 L
    shares = weighted_loss(losses, weights, counts, world_size=2)
    assert shares.item() == pytest.approx(2 * 2 * (0.1 * 0.75 * 1 + 0.3 * 0.25 * 3))
    shares.backward()
    assert losses.grad.tolist() == pytest.approx([4 * 0.1 * 0.75, 4 * 0.3 * 0.25])
    uniform = torch.full((2,), 0.5)
    assert weighted_loss(losses, uniform).item() == pytest.approx(2.0)  # mean over samples
    assert weighted_loss(losses, uniform, counts).item() == pytest.approx(1.5)  # mean over tokens
    one = weighted_loss(losses, torch.tensor([1.0, 0.0]), torch.tensor([30, 0]))
    assert one.item() == pytest.approx(1.0)


def test_temperature_on_its_way():
    assert [scheduled_temperature(s, 0.4, 2.4, 4, "linear") for s in (-1, 0, 1, 2, 4, 9)] == pytest.approx(
        [2.4, 2.4, 1.9, 1.4, 0.4, 0.4]
    )
    cosine = [scheduled_temperature(s, 0.4, 2.4, 4, "cosine") for s in range(5)]
    assert cosine == pytest.approx([0.4 + 1 + math.cos(math.pi * s / 4) for s in range(5)])
    assert [scheduled_temperature(s, 0.4, 2.4, 0, "constant") for s in (-1, 0, 5)] == [2.4, 0.4, 0.4]


def test_redundant_regression_learns_faster():
    # 90 % of the samples lie in 5 of 40 directions; half the squared error on isotropic inputs after 1000 steps of SGD.
    # The published code's rule gives uniform 2.06, linupper 0.173 (r = 1), quadratic 1.18, extremes 3.02.
    generator = torch.Generator().manual_seed(0)
    truth, x = torch.randn(40, generator=generator), torch.randn(1000, 32, 40, generator=generator)
    redundant = torch.rand(1000, 32, 1, generator=generator) < 0.9
    leak = 0.05 * torch.rand(1000, 32, 1, generator=generator) * redundant + ~redundant
    x = torch.cat([x[..., :5], x[..., 5:] * leak], dim=2)
    error = {}
    for strategy, r in (("uniform", 1.0), ("linupper", 1.0), ("linupper", 0.4), ("quadratic", 1.0), ("extremes", 0.4)):
        solution = torch.zeros(40)
        for batch in x:
            residual = batch @ (solution - truth)
            solution -= 0.01 * batch.T @ (reweight(0.5 * residual.square(), strategy, r) * residual)
        error[strategy, r] = 0.5 * (solution - truth).square().sum().item()
    assert error["linupper", 1.0] < 0.25 * error["uniform", 1.0]
    assert error["linupper", 0.4] < 0.01 * error["uniform", 1.0]
    assert error["quadratic", 1.0] < error["uniform", 1.0] < error["extremes", 0.4]


# -- one step of training ---------------------------------------------------------------------------------------------

ROWS, LENGTH, WORDS = 6, 5, 7
IGNORED = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
IGNORED[0, 2:] = IGNORED[3] = IGNORED[4, :4] = True


def problem():
    generator = torch.Generator().manual_seed(3)
    tokens, labels = (torch.randint(WORDS, (ROWS, LENGTH), generator=generator) for _ in range(2))
    return tokens, labels


class Tagger(LightningModule):
    """Logits ``(B, T, V)`` of tokens; the loss is handed over."""

    def __init__(self, loss=None):
        super().__init__()
        self.loss = loss
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Embedding(WORDS, 8), nn.Linear(8, WORDS))

    def training_step(self, batch, batch_idx):
        tokens, labels = batch
        return self.loss(self.net(tokens), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1.0)


def flat(logits, labels, **options):
    return F.cross_entropy(logits.flatten(0, 1), labels.masked_fill(IGNORED, -100).flatten(), **options)


def unflattened(logits, labels, **options):
    return F.cross_entropy(logits.transpose(1, 2), labels.masked_fill(IGNORED, -100), **options)


CLASS_WEIGHTS = torch.linspace(0.5, 2, WORDS)


def objective(logits, labels, name, level, class_weights=None, smoothing=0.0, **options):
    """The weighted loss from its formula, in loops; what carries a gradient is the per-token loss only."""
    losses = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none", weight=class_weights, label_smoothing=smoothing
    ).reshape(labels.shape)
    mass = (~IGNORED).float() * (1.0 if class_weights is None else class_weights[labels])
    groups = [[(b, t) for t in range(LENGTH)] for b in range(ROWS)]
    if level == "token":
        groups = [[(b, t)] for b in range(ROWS) for t in range(LENGTH)]
    groups = [[at for at in group if not IGNORED[at]] for group in groups]
    groups = [group for group in groups if group]
    sizes = [sum(mass[at].item() for at in group) for group in groups]
    means = [sum(losses[at] for at in group) / size for group, size in zip(groups, sizes, strict=True)]
    weights = by_hand([mean.item() for mean in means], **options)
    if name == "sample_mean":
        return sum(w * mean for w, mean in zip(weights, means, strict=True))
    shares = [size / sum(sizes) for size in sizes]
    return len(groups) * sum(w * s * mean for w, s, mean in zip(weights, shares, means, strict=True))


def one_step(module, technique, batch=None, **options):
    """Loss and gradients of one step of SGD with learning rate 1 (weights before less weights after)."""
    before = {name: value.clone() for name, value in module.state_dict().items()}
    losses = StepLosses()
    loader = DataLoader(TensorDataset(*(batch or problem())), ROWS)
    trainer = fit(module, *([technique] if technique else []), losses, loader=loader, max_epochs=1, **options)
    return losses.losses[0], {n: before[n] - value for n, value in module.state_dict().items()}, trainer


def check(loss, technique, reference, rtol=1e-5):
    value, gradients, trainer = one_step(Tagger(loss), technique)
    wanted, wanted_gradients, _ = one_step(Tagger(reference), None)
    assert value == pytest.approx(wanted, rel=rtol)
    for name, gradient in gradients.items():  # float32, other order of sums
        torch.testing.assert_close(gradient, wanted_gradients[name], atol=2e-6, rtol=1e-4)
    return trainer


@pytest.mark.parametrize("call", [flat, unflattened])
@pytest.mark.parametrize("name", ["token_share", "sample_mean"])
@pytest.mark.parametrize("level", ["sample", "token"])
def test_sequences_of_differing_lengths_under_both_objectives(call, name, level):
    technique = LossReweighting(warmup_steps=0, objective=name, level=level)
    check(call, technique, lambda z, y: objective(z, y, name, level))


@pytest.mark.parametrize("strategy", ["quadratic", "extremes"])
def test_other_strategies_temperatures_and_widths(strategy):
    technique = LossReweighting(strategy, r=0.7, delta=0.5, warmup_steps=0)
    check(flat, technique, lambda z, y: objective(z, y, "token_share", "sample", strategy=strategy, r=0.7, delta=0.5))


@pytest.mark.parametrize("name", ["token_share", "sample_mean"])
def test_class_weights_and_label_smoothing(name):
    def loss(z, y):
        return flat(z, y, weight=CLASS_WEIGHTS, label_smoothing=0.1)

    def reference(z, y):
        return objective(z, y, name, "sample", class_weights=CLASS_WEIGHTS, smoothing=0.1)

    check(loss, LossReweighting(warmup_steps=0, objective=name), reference)


@pytest.mark.parametrize("name", ["token_share", "sample_mean"])
def test_sums_divided_by_the_users_own_count(name):
    count = int((~IGNORED).sum())
    check(
        lambda z, y: flat(z, y, reduction="sum") / (4 * count),
        LossReweighting(warmup_steps=0, objective=name),
        lambda z, y: objective(z, y, name, "sample") / 4,
    )


def test_losses_the_user_reduces_and_scales_and_other_terms():
    def loss(z, y):
        each = unflattened(z, y, reduction="none")
        return 3 * each.sum() / (~IGNORED).sum() + 0.1 * z.square().mean()

    def reference(z, y):
        return 3 * objective(z, y, "token_share", "sample") + 0.1 * z.square().mean()

    check(loss, LossReweighting(warmup_steps=0), reference)


def test_uniform_weights_and_large_r_give_the_users_own_loss():
    plain, gradients, _ = one_step(Tagger(flat), None)
    value, same, _ = one_step(Tagger(flat), LossReweighting(strategy="uniform", warmup_steps=0))
    assert value == plain
    assert all(torch.equal(gradients[name], same[name]) for name in gradients)
    value, _, _ = one_step(Tagger(flat), LossReweighting(r=1e6, warmup_steps=0))
    assert value == pytest.approx(plain, rel=1e-5)


def rows():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(ROWS, 6, generator=generator), torch.randint(3, (ROWS,), generator=generator)


def test_rows_maps_and_regression():
    batch = rows()
    module = Classifier(lr=1.0)
    losses = F.cross_entropy(module(batch[0]), batch[1], reduction="none")
    value, gradients, trainer = one_step(module, LossReweighting(warmup_steps=0), batch)
    reference = Classifier(lr=1.0)
    each = F.cross_entropy(reference(batch[0]), batch[1], reduction="none")
    weights = by_hand(losses.tolist())
    wanted = sum(w * one for w, one in zip(weights, each, strict=True))
    assert value == pytest.approx(wanted.item(), rel=1e-5)
    wanted.backward()  # the sum of w times the gradients: no gradient flows through w
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-4)
    # The figures that are logged.
    logged = {name.rpartition("/")[2]: v.item() for name, v in trainer.logged_metrics.items() if "reweighting" in name}
    assert logged == pytest.approx(
        {
            "r": 0.4,
            "samples": ROWS,
            "effective_samples": 1 / sum(w * w for w in weights),
            "max_weight": ROWS * max(weights),
            "small_weights": sum(w < 0.1 / ROWS for w in weights) / ROWS,
            "loss_weighted": wanted.item(),
            "loss_unweighted": sum(losses.tolist()) / ROWS,
        },
        rel=1e-4,
    )
    assert trainer.logged_metrics["reg/loss/total"].item() == pytest.approx(wanted.item(), rel=1e-5)

    def squares(module, batch):
        return F.mse_loss(module(batch[0]), batch[0][:, :3])

    module = Classifier(step=squares)
    errors = (module(batch[0]) - batch[0][:, :3]).square().mean(1)
    value, _, _ = one_step(module, LossReweighting(warmup_steps=0), batch)
    assert value == pytest.approx(float(torch.tensor(by_hand(errors.tolist())) @ errors.detach()), rel=1e-5)


def test_small_weights_are_counted_and_capped_weights_logged():
    # Losses of 0, 0, 0, 4: with r = 0.2 the weights are 1 : 1 : 1 : e^5.
    def steep(module, batch):
        return F.l1_loss(module(batch[0])[:, 0] * 0, batch[1].float())

    batch = torch.rand(4, 6), torch.tensor([0, 0, 0, 4])
    figures = {}
    for cap in (None, 1.5):
        technique = LossReweighting(r=0.2, warmup_steps=0, max_weight=cap)
        trainer = fit(
            Classifier(step=steep), technique, loader=DataLoader(TensorDataset(*batch), 4), max_epochs=1, max_steps=1
        )
        figures[cap] = {name.rpartition("/")[2]: v.item() for name, v in trainer.logged_metrics.items()}
    small = 1 / (3 + math.exp(5))
    assert figures[None]["small_weights"] == pytest.approx(0.75)
    assert figures[None]["max_weight"] == pytest.approx(4 * math.exp(5) * small, rel=1e-5)
    assert figures[1.5]["max_weight"] == pytest.approx(1.5)
    assert figures[1.5]["loss_weighted"] == pytest.approx(4 * 1.5 / 4)
    assert figures[1.5]["small_weights"] == 0
    assert figures[1.5]["effective_samples"] == pytest.approx(1 / ((1.5 / 4) ** 2 + 3 * (2.5 / 12) ** 2))


def test_beside_elr_the_term_is_not_weighted():
    batch = rows()
    logits = Classifier()(batch[0]).detach()
    losses = F.cross_entropy(logits, batch[1], reduction="none")
    p = logits.softmax(1)
    term = elr_regularizer(logits, 0.3 * p / p.sum(1, keepdim=True))
    module, returned = Classifier(), StepLosses()
    both = [LossReweighting(warmup_steps=0), ELRCallback(lam=2.0, beta=0.7)]
    fit(module, *both, returned, loader=DataLoader(TensorDataset(*batch), ROWS), max_epochs=1)
    wanted = (reweight(losses) * losses).sum() + 2 * term
    assert returned.losses[0] == pytest.approx(wanted.item(), abs=1e-4)  # ELR clamps p


# -- what a fit does --------------------------------------------------------------------------------------------------


def loader_of(batch, size):
    return DataLoader(TensorDataset(*batch), size)


def test_the_warm_up_is_plain_to_the_last_bit_and_counts_optimizer_steps():
    plain, warm, after = Classifier(), Classifier(), Classifier()
    batch = rows()
    options = {"loader": loader_of(batch, 2), "max_epochs": 4, "accumulate_grad_batches": 3}  # 4 optimizer steps
    fit(plain, **options)
    losses = StepLosses()
    fit(warm, LossReweighting(warmup_steps=3), losses, **options)
    fit(after, LossReweighting(warmup_steps=0), **options)
    plain_losses = StepLosses()
    fit(Classifier(), plain_losses, **options)
    assert losses.losses[:9] == plain_losses.losses[:9]
    assert all(one != two for one, two in zip(losses.losses[9:], plain_losses.losses[9:], strict=True))
    assert not same_weights(warm, plain)
    assert not same_weights(warm, after)


def test_each_micro_batch_is_weighted_on_its_own():
    batch, model = rows(), Classifier()
    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none").tolist()
    returned = StepLosses()
    technique = LossReweighting(warmup_steps=0)
    fit(model, technique, returned, loader=loader_of(batch, 3), max_epochs=1, accumulate_grad_batches=2)
    halves = [sum(w * v for w, v in zip(by_hand(half), half, strict=True)) for half in (losses[:3], losses[3:])]
    assert returned.losses == pytest.approx([half / 2 for half in halves], rel=1e-5)  # divided by Lightning


class NoSync(TorchDispatchMode):
    """Refuses what reads a value on the host, which is where a GPU would be waited for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a host sync"
        return function(*args, **(kwargs or {}))


class Watched(LossReweighting):
    def sample_weights(self, call):
        with NoSync():
            weights = super().sample_weights(call)
            call.value(weights, [])
            return weights


def test_nothing_is_read_on_the_host():
    with pytest.raises(AssertionError, match="host sync"), NoSync():
        torch.ones(()).item()
    for options in ({}, {"max_weight": 1.5}, {"level": "token", "objective": "sample_mean"}):
        one_step(Tagger(flat), Watched(warmup_steps=0, **options), log_every_n_steps=100)


class Validating(Classifier):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


def test_validation_is_untouched():
    batch, module = rows(), Validating(lr=0.0)
    trainer = make_trainer(callbacks=[LossReweighting(warmup_steps=0)], max_epochs=1)
    trainer.fit(module, loader_of(batch, ROWS), loader_of(batch, ROWS))
    plain = F.cross_entropy(module(batch[0]), batch[1]).item()
    assert trainer.callback_metrics["val_loss"].item() == pytest.approx(plain, rel=1e-6)


class Temperatures(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, *_):
        self.seen.append(trainer.callback_metrics["reg/loss_reweighting/r"].item())


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [("linear", [9.0, 9.0, 9.0, 7.0, 5.0, 3.0, 1.0, 1.0]), ("constant", [9.0, 9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])],
)
def test_the_temperature_follows_the_schedule_after_a_warm_up_at_high_r(schedule, wanted):
    steps = {"schedule_steps": 4} if schedule == "linear" else {}
    technique = LossReweighting(r=1.0, r_start=9.0, warmup_steps=2, warmup="high_r", schedule=schedule, **steps)
    seen = Temperatures()
    fit(Classifier(), technique, seen, loader=loader_of(rows(), 3), max_epochs=4)
    assert seen.seen == pytest.approx(wanted)
    assert technique.describe().startswith("linupper per sample, r=1")


def test_a_run_that_is_never_reweighted_is_warned_of():
    with pytest.warns(UserWarning, match="nothing is reweighted: the run ends after 8 optimizer steps, lower `warmup_"):
        fit(Classifier(), LossReweighting(warmup_steps=8))
    fit(Classifier(), LossReweighting(warmup_steps=7))
    fit(Classifier(), LossReweighting(warmup_steps=8, warmup="high_r"))
    with pytest.warns(UserWarning, match="the global batch is one sample, whose weight is always 1"):
        fit(Classifier(), LossReweighting(warmup_steps=0), loader=loader_of(rows(), 1), max_epochs=1)
    # The last batch of an epoch may have one sample.
    fit(Classifier(), LossReweighting(warmup_steps=0), loader=loader_of(rows(), 5), max_epochs=1)


def test_one_row_for_a_batch_of_unknown_size_is_refused():
    def step(module, batch):  # as a detector's: images of different sizes, one loss for all of them
        logits = torch.cat([module(image) for image in batch]).mean(0, keepdim=True)
        return F.cross_entropy(logits, torch.zeros(1, dtype=torch.long))

    images = DataLoader([torch.zeros(2 + size, INPUTS) for size in range(4)], 2, collate_fn=list)
    sentence = r"^LossReweighting: F.cross_entropy.* is one sample, whose weight is always 1.*`LossMixin.reduce_loss"
    with pytest.raises(MisconfigurationException, match=sentence):
        fit(Classifier(step=step), LossReweighting(warmup_steps=0), loader=images)


def test_two_on_one_call_are_refused():
    both = [LossReweighting(warmup_steps=0, name="a"), LossReweighting("quadratic", warmup_steps=0, name="b")]
    with pytest.raises(MisconfigurationException, match="product of two weightings does not sum to 1"):
        fit(Classifier(), *both)

    def two_losses(module, batch):
        logits = module(batch[0])
        return F.cross_entropy(logits, batch[1]) + F.mse_loss(logits, F.one_hot(batch[1], 3).float())

    both = [
        LossReweighting(warmup_steps=0, name="a", loss=0),
        LossReweighting(warmup_steps=0, name="b", loss="mse_loss"),
    ]
    returned, batch = StepLosses(), rows()
    logits = Classifier()(batch[0]).detach()
    fit(Classifier(step=two_losses), *both, returned, loader=loader_of(batch, ROWS), max_epochs=1)
    parts = [
        F.cross_entropy(logits, batch[1], reduction="none"),
        (logits - F.one_hot(batch[1], 3)).square().mean(1),
    ]
    wanted = sum((reweight(part) * part).sum().item() for part in parts)
    assert returned.losses[0] == pytest.approx(wanted, rel=1e-5)


class Fused(torch.autograd.Function):
    """A cross-entropy that never calls torch's."""

    @staticmethod
    def forward(ctx, logits, labels):
        log_probs = logits.log_softmax(1)
        ctx.save_for_backward(log_probs, labels)
        return -log_probs.gather(1, labels[:, None])[:, 0]

    @staticmethod
    def backward(ctx, gradient):
        log_probs, labels = ctx.saved_tensors
        return gradient[:, None] * (log_probs.exp() - F.one_hot(labels, log_probs.shape[1])), None


class Handed(LossMixin, Classifier):
    def training_step(self, batch, batch_idx):
        return self.reduce_loss(Fused.apply(self(batch[0]), batch[1]))


def test_a_fused_loss_is_refused_with_the_mixin_which_then_works():
    with pytest.raises(MisconfigurationException, match=r"LossReweighting: .*nothing to attach to(.|\n)*LossMixin"):
        fit(
            Classifier(step=lambda module, batch: Fused.apply(module(batch[0]), batch[1]).mean()),
            LossReweighting(warmup_steps=0),
        )
    batch = rows()
    technique = partial(LossReweighting, warmup_steps=0)
    value, gradients, _ = one_step(Handed(lr=1.0), technique(), batch)
    wanted, wanted_gradients, _ = one_step(Classifier(lr=1.0), technique(), batch)
    assert value == pytest.approx(wanted, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted_gradients[name], atol=1e-6, rtol=1e-4)


# -- models of transformers, called with labels -----------------------------------------------------------------------


def language_model(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "GPT2":
        options = {"n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
        options |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=20, **options))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, max_position_embeddings=8, **sizes))


class CausalLM(LightningModule):
    def __init__(self, net, **arguments):
        super().__init__()
        self.net, self.arguments = net, arguments

    def training_step(self, batch, batch_idx):
        tokens, labels = batch
        return self.net(input_ids=tokens, labels=labels, **self.arguments).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1.0)


@pytest.mark.parametrize("items", [None, 40])
@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
def test_transformers_called_with_labels(kind, items):
    tokens = torch.randint(20, (4, 7), generator=torch.Generator().manual_seed(4))
    labels = tokens.clone()
    labels[1, 3:], labels[2] = -100, -100
    named = inspect.signature(language_model(kind).forward).parameters
    if items is not None and all(p.kind != p.VAR_KEYWORD for p in named.values()):
        pytest.skip("this transformers' model does not take the number of items")
    arguments = {} if items is None else {"num_items_in_batch": items}
    model, losses = CausalLM(language_model(kind), **arguments), StepLosses()
    reference = language_model(kind)
    each, counts = sequence_losses(reference(input_ids=tokens).logits, labels)
    weights = reweight(each, counted=counts > 0)
    wanted = weighted_loss(each, weights, counts) * (1 if items is None else counts.sum() / items)
    wanted.backward()
    before = {name: value.clone() for name, value in model.net.named_parameters()}
    fit(model, LossReweighting(warmup_steps=0), losses, loader=loader_of((tokens, labels), 4), max_epochs=1)
    assert losses.losses[0] == pytest.approx(wanted.item(), rel=1e-5)
    for (name, after), parameter in zip(model.net.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(before[name] - after, parameter.grad, atol=2e-6, rtol=1e-3)


# -- two processes ----------------------------------------------------------------------------------------------------


class Part(Sampler):
    """The rows of one rank, in order."""

    def __init__(self, indices):
        self.indices = indices

    def __len__(self):
        return len(self.indices)

    def __iter__(self):
        return iter(self.indices)


def on_ranks(shares, options, masked):
    """One step on this rank's rows; ``shares`` are the rows of each rank."""
    rank = dist.get_rank() if len(shares) > 1 else 0
    own = shares[rank]

    def loss(z, y):
        ignored = IGNORED[own] if masked else torch.zeros_like(IGNORED[own])
        return F.cross_entropy(z.flatten(0, 1), y.masked_fill(ignored, -100).flatten())

    module, dataset = Tagger(loss), TensorDataset(*problem())
    before = {name: value.clone() for name, value in module.state_dict().items()}
    more = {"use_distributed_sampler": False, **TWO_RANKS} if len(shares) > 1 else {}
    technique = LossReweighting(warmup_steps=0, **options)
    trainer = fit(module, technique, loader=DataLoader(dataset, len(own), sampler=Part(own)), max_epochs=1, **more)
    logged = {n.rpartition("/")[2]: v.item() for n, v in trainer.logged_metrics.items() if "/loss_reweighting/" in n}
    return {name: before[name] - value for name, value in module.state_dict().items()}, logged


@pytest.mark.parametrize(
    ("options", "masked"),
    [
        ({}, False),
        ({"strategy": "quadratic", "r": 0.1}, False),
        ({"max_weight": 1.3}, False),
        ({"level": "token"}, False),
        ({"objective": "sample_mean"}, True),
        ({"objective": "sample_mean", "max_weight": 1.3, "level": "token"}, True),
    ],
)
def test_ranks_of_unequal_batches_are_one_process_of_the_joined_batch(two_processes, options, masked):
    joined, logged = on_ranks([[0, 1, 2, 3, 4, 5]], options, masked)
    for gradients, figures in two_processes.run(on_ranks, [[0, 1, 2, 3], [4, 5]], options, masked):
        assert figures == pytest.approx(logged, rel=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, joined[name], atol=2e-6, rtol=1e-4)


def token_share_on_ranks(shares):
    return on_ranks(shares, {}, True)[0]


def test_token_shares_are_those_of_each_rank(two_processes):
    # As in the authors' code: ranks count alike, whatever their number of tokens, as they do in DDP's plain mean.
    shares = [[0, 1, 2], [3, 4, 5]]
    tokens, labels = problem()
    module = Tagger()
    each, counts = sequence_losses(module.net(tokens), labels.masked_fill(IGNORED, -100), shift=False)
    weights = reweight(each, counted=counts > 0)
    parts = [weighted_loss(each[own], weights[own], counts[own], world_size=2) for own in shares]
    (sum(parts) / 2).backward()
    for gradients in two_processes.run(token_share_on_ranks, shares):
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, atol=2e-6, rtol=1e-4)


class Meshed(Classifier):
    """Under ``ModelParallelStrategy``, sharded as FSDP does where there are several data-parallel ranks."""

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        if mesh.size() > 1:
            fully_shard(self.net, mesh=mesh)

    def on_train_start(self):
        self.ranks = dist.get_world_size(host.data_parallel_group(self.trainer))


def on_mesh(data_parallel):
    strategy = ModelParallelStrategy(data_parallel_size=data_parallel, tensor_parallel_size=2 // data_parallel)
    module, returned, loader = Meshed(lr=1.0), StepLosses(), loader_of(rows(), ROWS // data_parallel)
    fit(module, LossReweighting(warmup_steps=0), returned, loader=loader, max_epochs=1, strategy=strategy, devices=2)
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in module.named_parameters()}
    return module.ranks, {name: weight.detach() for name, weight in whole.items()}, returned.losses


@pytest.mark.usefixtures("sharded_means")
@pytest.mark.parametrize("data_parallel", [1, 2])  # tensor parallelism: both ranks hold the same samples; FSDP
def test_tensor_parallel_and_sharded_ranks(two_processes, data_parallel):
    module, returned = Classifier(lr=1.0), StepLosses()
    fit(module, LossReweighting(warmup_steps=0), returned, loader=loader_of(rows(), ROWS), max_epochs=1)
    answers = two_processes.run(on_mesh, data_parallel)
    assert sum(losses[0] for _, _, losses in answers) / 2 == pytest.approx(returned.losses[0], rel=1e-5)
    for ranks, weights, _ in answers:
        assert ranks == data_parallel
        for name, weight in module.named_parameters():
            torch.testing.assert_close(weights[name], weight.detach(), atol=1e-6, rtol=1e-5)


# -- in use -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LightningCLI, of jsonargparse
def test_yaml_says_every_schedule(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    config = tmp_path / "config.yaml"
    config.write_text(
        "trainer:\n  logger: false\n  callbacks:\n    - class_path: lightning_reg.LossReweighting\n"
        "      init_args: {strategy: quadratic, r: 1, warmup: high_r, schedule: cosine, schedule_steps: 50,"
        " max_weight: 2, objective: sample_mean, level: token}\n"
    )

    def run(*arguments):
        options = {"run": False, "save_config_callback": None, "seed_everything_default": 1}
        return LightningCLI(BoringModel, args=["--config", str(config), *arguments], **options)

    technique = run().trainer.callbacks[0]
    assert (technique.strategy, technique.r, technique.schedule_steps, technique.max_weight) == (
        "quadratic",
        1.0,
        50,
        2,
    )
    with pytest.raises(SystemExit):
        run("--print_config")
    printed = capsys.readouterr().out
    assert "schedule: cosine" in printed
    assert "warmup_steps: 1000" in printed


def test_learns_the_rare_digits_sooner_when_most_samples_are_redundant():
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=generator)
    pool, test = order[:1200], order[1200:]
    zeros = pool[y[pool] == 0]
    few = zeros[torch.randint(len(zeros), (64 * 60,), generator=generator)]
    drawn = pool[torch.randint(len(pool), (64 * 60,), generator=generator)]
    batch = torch.where(torch.rand(64 * 60, generator=generator) < 0.9, few, drawn)
    accuracy = {}
    for strategy in ("uniform", "linupper"):
        torch.manual_seed(0)
        model = Classifier()
        model.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        model.configure_optimizers = lambda net=model.net: torch.optim.SGD(net.parameters(), 0.1)
        loader = DataLoader(TensorDataset(x[batch], y[batch]), 64)
        fit(model, LossReweighting(strategy, warmup_steps=0), loader=loader, max_epochs=1)
        accuracy[strategy] = (model.net(x[test]).argmax(1) == y[test]).float().mean().item()
    assert accuracy["linupper"] > accuracy["uniform"] + 0.1, accuracy


@pytest.mark.filterwarnings("ignore:LossReweighting. nothing is reweighted:UserWarning")  # the run has one step
def test_rows_that_are_no_sequences_are_told_in_the_first_step_of_the_warm_up():
    def time_first(logits, labels):
        return F.cross_entropy(logits.transpose(0, 1).flatten(0, 1), labels.t().flatten())

    with pytest.raises(MisconfigurationException, match=r"LossReweighting: .*lie sample after sample is not certain"):
        one_step(Tagger(time_first), LossReweighting(warmup_steps=3))
    by_token = LossReweighting(warmup_steps=0, level="token")
    check(time_first, by_token, lambda z, y: token_weighted(z.flatten(0, 1), y.flatten()))


def token_weighted(logits, labels):
    each = F.cross_entropy(logits, labels, reduction="none")
    return sum(w * one for w, one in zip(by_hand(each.tolist()), each, strict=True))
