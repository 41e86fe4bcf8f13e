"""Maestro: factors with ordered columns, a lasso on their tails, ranks that shrink, export into smaller layers."""

import inspect
import json
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
)

from lightning_reg import L2ToStart, MaestroLowRank, NMSparsity, SoupAverager
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.technique import GradientTechnique
from lightning_reg.engine.weights.maps import WeightMaps
from lightning_reg.functional import (
    export_low_rank,
    forward_flops,
    greedy_ranks,
    hierarchical_lasso,
    kept_rank,
    low_rank_gradients,
    low_rank_layers_,
    low_rank_product,
    random_ranks,
    rank_pairs,
    svd_factors,
    tail_norms,
)
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.conformance.problems import BATCHES, seeded
from tests.toys import QUIET, Classifier, Halve, fit, same_weights, weights_of


class MaestroByHand(Hand):
    """Both factors of the layer in the middle as one leaf, of which as many columns count as are left."""

    comes_first = True

    def latent(self, name, weight):
        if not (name.startswith("net.body") and name.endswith("weight")):
            return None
        self.name, self.shape = name, weight.shape
        m, n = weight.flatten(1).shape
        u, s, vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        self.sizes, self.rank, self.since, self.count = (m, n), len(s), 0, None
        leaf = torch.cat([(u * s.sqrt()).flatten(), (vh.T * s.sqrt()).flatten()])
        self.leaf = leaf
        return leaf, lambda leaf: self.product(leaf, self.rank)

    def factors(self, leaf, rank):
        m, n = self.sizes
        u, v = leaf[: m * min(m, n)].reshape(m, -1), leaf[m * min(m, n) :].reshape(n, -1)
        return u[:, :rank], v[:, :rank]

    def product(self, leaf, rank):
        u, v = self.factors(leaf, rank)
        return (u @ v.T).reshape(self.shape)

    def observe(self, loop, moment):
        self.count = moment.count - 1 - self.since

    def used(self, name, weight):
        if self.count is None or name != self.name:
            return weight
        single = self.technique.sampler == "single"
        walk, place = divmod(self.count, self.rank) if single else (self.count, 0)
        draw = torch.Generator().manual_seed(self.technique.derived_seed(f"ranks since {self.since}, {walk}"))
        rank = int(rank_pairs([self.rank], draw)[place][1]) if single else random_ranks([self.rank], draw)[0]
        return self.product(self.leaf, rank)

    def penalty(self, weights):
        u, v = self.factors(self.leaf, self.rank)
        return self.technique.lasso_weight * sum(u[:, b:].norm() + v[:, b:].norm() for b in range(self.rank))

    def after_step(self, loop, moment):
        self.count = None

    @torch.no_grad()
    def after_epoch(self, loop, epoch):
        u, v = self.factors(self.leaf, self.rank)
        kept = [b for b in range(self.rank) if u[:, b:].norm() * v[:, b:].norm() >= self.technique.threshold]
        if len(kept) < self.rank:
            self.rank, self.since = len(kept), (epoch + 1) * BATCHES


CASE = Case(
    make=partial(MaestroLowRank, layers="net.body*", lasso_weight=0.01, threshold=0.3),
    neutral=None,
    by_hand=MaestroByHand,
    says=(
        "one layer truncated, lasso by 0.01, tails below 0.3 cut after each epoch, layers net.body*",
        "every layer truncated, lasso by 1e-06, no tail cut, layers auto",
        "no layer truncated, lasso by 0.1, tails below 0.5 cut after every 2 epochs, layers auto",
    ),
    also=["images", "regression"],
    variants=[
        partial(MaestroLowRank, sampler="independent", threshold=0.0, lr_factor=0.5, decay=False),
        partial(MaestroLowRank, sampler="none", lasso_weight=0.1, threshold=0.5, shrink_every_n_epochs=2),
    ],
    invalid=[
        ({"lasso_weight": -1e-9}, "lasso_weight"),
        ({"threshold": -1e-9}, "threshold"),
        ({"shrink_every_n_epochs": 0}, "shrink_every_n_epochs"),
        ({"lr_factor": 0.0}, "lr_factor"),
    ],
    exempt={"neutral_is_nothing": "Two factors never train as one weight does: whoever wants that leaves them out."},
)

pytestmark = QUIET

# -- the functional core ----------------------------------------------------------------------------------------------


def factors(m, n, r, *stack, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(*stack, side, r, generator=draw, dtype=torch.float64) for side in (m, n)]


def test_norms_of_tails_and_the_lasso_by_hand():
    left, right = factors(5, 7, 4)
    tails = [sum(float(x) ** 2 for x in left[:, b:].flatten()) ** 0.5 for b in range(4)]
    assert tail_norms(left).tolist() == pytest.approx(tails, rel=1e-12)
    assert tails == sorted(tails, reverse=True)
    others = [float(right[:, b:].norm()) for b in range(4)]
    assert float(hierarchical_lasso(left, right)) == pytest.approx(sum(tails) + sum(others), rel=1e-12)
    # The last column is in every group: its gradient is u_r times the sum of all inverse norms.
    leaf = left.clone().requires_grad_()
    hierarchical_lasso(leaf, right).backward()
    for b in range(4):
        torch.testing.assert_close(leaf.grad[:, b], left[:, b] * sum(1 / t for t in tails[: b + 1]), rtol=1e-12, atol=0)
    # A stack counts as one group.
    stack = torch.stack([left, 2 * left])
    torch.testing.assert_close(tail_norms(stack), tail_norms(left) * 5**0.5, rtol=1e-12, atol=0)
    assert tail_norms(left.half()).dtype == torch.float32
    leaf = torch.tensor([[3.0, 0.0]], requires_grad=True)
    hierarchical_lasso(leaf, leaf.detach()).backward()
    assert leaf.grad.tolist() == [[1.0, 0.0]]  # the root has an infinite slope at zero


def test_what_rank_is_kept():
    left, right = torch.tensor([[3.0, 4.0, 0.0]]), torch.tensor([[0.0, 0.5, 0.0]])
    # Products of the norms of tails: 5 * 0.5, 4 * 0.5, 0.
    assert [kept_rank(left, right, e) for e in (0.0, 1e-9, 2.0, 2.1, 2.5, 2.6, 99.0)] == [3, 2, 2, 1, 1, 1, 1]


@pytest.mark.parametrize("stack", [(), (3,)])
@pytest.mark.parametrize("rank", [1, 3, None])
def test_gradients_of_the_first_columns(stack, rank):
    left, right = (f.requires_grad_() for f in factors(5, 7, 4, *stack))
    weight = low_rank_product(left, right, rank)
    want = sum(left[..., :, [b]] * right[..., :, b].unsqueeze(-2) for b in range(rank or 4))
    torch.testing.assert_close(weight, want, rtol=1e-12, atol=1e-12)
    weight.retain_grad()
    weight.sin().sum().backward()
    at_left, at_right = low_rank_gradients(weight.grad, left, right, rank)
    torch.testing.assert_close(at_left, left.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(at_right, right.grad, rtol=1e-12, atol=1e-12)
    assert not at_left[..., rank or 4 :].any()
    assert at_left[..., : rank or 4].all()


def test_factors_to_begin_with():
    draw = torch.Generator().manual_seed(0)
    for shape in ((6, 9), (9, 6), (3, 5, 4), (1, 4), (4, 1)):
        matrix = torch.randn(shape, generator=draw, dtype=torch.float64)
        left, right = svd_factors(matrix)
        r = min(shape[-2:])
        assert (left.shape, right.shape) == ((*shape[:-1], r), (*shape[:-2], shape[-1], r))
        torch.testing.assert_close(left @ right.mT, matrix, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(left.norm(dim=-2), right.norm(dim=-2), rtol=1e-10, atol=1e-12)
        sizes = torch.linalg.svdvals(matrix)
        for b in range(1, r + 1):
            away = (matrix - low_rank_product(left, right, b)).square().sum((-2, -1))
            torch.testing.assert_close(away, sizes[..., b:].square().sum(-1), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(svd_factors(matrix, 1)[0], left[..., :1])
    assert svd_factors(torch.ones(2, 3).bfloat16())[0].dtype == torch.float32
    # What is zero could never learn if both sides were: V is not.
    for matrix, size in ((torch.diag(torch.tensor([4.0, 0.0])), 2.0), (torch.zeros(2, 3), 1.0)):
        left, right = svd_factors(matrix)
        torch.testing.assert_close(left @ right.T, matrix)
        assert not left[:, 1].any()
        assert float(right[:, 1].norm()) == pytest.approx(size)


def test_each_pair_of_a_layer_and_a_rank_once_in_a_walk():
    ranks = [25, 1, 7]
    walks = [rank_pairs(ranks, torch.Generator().manual_seed(seed)) for seed in range(2)]
    for pairs in walks:
        assert pairs.dtype == torch.int64
        assert sorted(pairs.tolist()) == [[layer, b] for layer, r in enumerate(ranks) for b in range(1, r + 1)]
    assert not torch.equal(*walks)
    drawn = torch.tensor([random_ranks(ranks, torch.Generator().manual_seed(seed)) for seed in range(2000)])
    for column, r in zip(drawn.T, ranks, strict=True):
        counts = torch.bincount(column, minlength=r + 1)
        assert counts[0] == 0
        assert len(counts) == r + 1
        assert (counts[1:] - 2000 / r).abs().max() < 5 * (2000 / r) ** 0.5


def of_the_authors(*shape):
    size = torch.Size(shape).numel()
    rows = torch.sin(torch.arange(1.0, size + 1, dtype=torch.float64) ** 2 * 0.731).reshape(shape)
    return rows * torch.linspace(1, 0.2, shape[-1], dtype=torch.float64)


def test_figures_of_the_authors_code():
    """SamuelHorvath/Maestro-LoD at 0003014a: decompose_model, group_lasso_criterion, importance, progressive_shrinking.

    A convolution (2, 4, 3, stride 2, padding 1), relu, and a linear layer (64, 5) with these weights, in float64.
    """
    kernels, row = of_the_authors(4, 2, 3, 3), of_the_authors(5, 64)
    of_kernels, of_row = svd_factors(kernels.flatten(1)), svd_factors(row)
    assert float(hierarchical_lasso(*of_kernels) + hierarchical_lasso(*of_row)) == pytest.approx(47.33102264136933)
    importance = [tail_norms(left) * tail_norms(right) for left, right in (of_kernels, of_row)]
    assert importance[0].tolist() == pytest.approx([8.254812875, 5.713208733, 3.530284342, 1.501547791], abs=1e-9)
    wanted = [17.953470532, 13.839489562, 9.847733168, 6.168584069, 2.954292018]
    assert importance[1].tolist() == pytest.approx(wanted, abs=1e-9)

    def run(first, second):
        kernel = low_rank_product(*of_kernels, first).reshape(4, 2, 3, 3)
        rows = F.conv2d(of_the_authors(3, 2, 8, 8), kernel, of_the_authors(4), 2, 1).relu().flatten(1)
        return F.linear(rows, low_rank_product(*of_row, second), of_the_authors(5))

    full = [-3.384219641, 8.405755546, 3.324117234, 3.476490218, 8.971374766]
    truncated = [1.60312394, -3.052023959, -0.151166065, 2.041874747, 5.776500082]
    shrunk = [-4.273971146, 4.939321131, -5.402791534, 1.485954497, 9.754586715]
    ranks = [kept_rank(*of_kernels, 4.0), kept_rank(*of_row, 4.0)]
    assert ranks == [2, 4]
    for output, want in ((run(None, None), full), (run(2, 3), truncated), (run(*ranks), shrunk)):
        assert output.sum(0).tolist() == pytest.approx(want, abs=1e-8)
    # Of the shrunk network, with the linear layer at rank 2: the sums of all absolute gradients.
    of_kernels, of_row = ([f[:, :r].requires_grad_() for f in both] for both, r in ((of_kernels, 2), (of_row, 4)))
    run(None, 2).square().sum().backward()
    got = [float(f.grad.abs().sum()) for f in (*of_row, *of_kernels)]
    assert got == pytest.approx([57.54900946, 791.132965341, 63.829214577, 364.102453129], abs=1e-6)


# -- training ---------------------------------------------------------------------------------------------------------


class Map(LightningModule):
    """A linear map of six numbers to nine, or to six."""

    def __init__(self, target, lr=0.1):
        super().__init__()
        self.target, self.lr = target, lr
        with seeded(1):
            self.layer = nn.Linear(target.shape[1], target.shape[0], bias=False)

    def training_step(self, batch, batch_idx):
        return (self.layer(batch[0]) - batch[0] @ self.target.T).square().sum(1).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


def orthogonal(size, seed=0):
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)))[0]


def distances(target, rows, steps, **options):
    module, technique = Map(target), MaestroLowRank(lasso_weight=0.0, threshold=0.0, **options)
    loader = DataLoader(TensorDataset(rows.repeat(steps, 1)), len(rows))
    fit(module, technique, loader=loader, max_epochs=1)
    left, right = (part.detach() for part in technique.latents.own["layer.weight"].values())
    return [float((target - low_rank_product(left, right, b)).norm()) for b in range(1, 7)]


def test_the_theorem_a_linear_map_becomes_its_decomposition():
    """Singular values 3, 2, 1 and uniform data: what is left of the target is sqrt(5), 1 and 0."""
    target = orthogonal(9)[:, :6] @ torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0, 0.0, 0.0])) @ orthogonal(6, 1)
    left = distances(target, orthogonal(6, 2) * 6**0.5, 600)
    assert left[:2] == pytest.approx([5**0.5, 1.0], abs=2e-3)
    assert max(left[2:]) < 0.06
    unordered = distances(target, orthogonal(6, 2) * 6**0.5, 100, sampler="none")
    assert unordered[0] > 2.4
    assert unordered[5] < 0.06


def test_the_theorem_an_autoencoder_becomes_principal_components():
    """The order follows the data: of the identity, whose singular values are equal, the first are the components."""
    scales, axes = torch.tensor([3.0, 2.0, 1.2, 0.5, 0.3, 0.1]), orthogonal(6, 3)
    module, technique = Map(torch.eye(6), 0.2), MaestroLowRank(lasso_weight=0.0, threshold=0.0)
    rows = torch.diag(scales) @ axes
    fit(module, technique, loader=DataLoader(TensorDataset(rows.repeat(600, 1)), 6), max_epochs=1)
    left, right = technique.latents.own["layer.weight"].values()
    for b in (1, 2, 3):
        left_out = (rows - rows @ low_rank_product(left, right, b).T.detach()).square().sum()
        assert float(left_out) == pytest.approx(float(scales[b:].square().sum()), rel=0.06)


class Looks(Callback):
    """Ranks that the layers run with, and what the module holds elsewhere."""

    def __init__(self, technique, names=("net.0.weight", "net.3.weight")):
        self.technique, self.names = technique, names
        self.steps, self.elsewhere, self.ranks = [], [], []

    def watch(self, module):
        # In float64: what was cut is zero to the last bits of float32.
        return [int(torch.linalg.matrix_rank(module.get_parameter(n).detach(), rtol=1e-5)) for n in self.names]

    def note(self, module):
        for name, parts in self.technique.latents.own.items():
            whole, weight = (parts["U"] @ parts["V"].T).detach(), module.get_parameter(name).detach()
            # Before the first step it is the network's own weight, which differs by rounding.
            self.elsewhere.append(torch.allclose(weight, whole, rtol=0, atol=1e-6))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.note(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.note(pl_module)
        self.ranks.append(dict(self.technique.ranks))

    def on_validation_epoch_start(self, trainer, pl_module):
        self.note(pl_module)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.note(pl_module)


class Validated(Classifier):
    def __init__(self, looks, **options):
        super().__init__(**options)
        self.looks = [looks]  # no module of its own

    def training_step(self, batch, batch_idx):
        self.looks[0].steps.append(self.looks[0].watch(self))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.looks[0].note(self)

    def val_dataloader(self):
        return DataLoader(TensorDataset(torch.rand(8, 6), torch.zeros(8, dtype=torch.long)), 4)


def test_one_layer_is_truncated_in_a_batch_and_all_else_sees_the_whole():
    technique = MaestroLowRank(lasso_weight=0.0, threshold=0.0)
    looks = Looks(technique)
    fit(Validated(looks, lr=0.1), technique, looks, max_epochs=9, val_check_interval=2)
    assert all(looks.elsewhere)
    assert len(looks.elsewhere) > 200
    assert len(looks.steps) == 36
    # Full ranks are 6 and 3: in each nine batches one layer has each of its ranks once.
    for start in range(0, 36, 9):
        walk = looks.steps[start : start + 9]
        assert sorted(walk) == sorted([[b, 3] for b in range(1, 7)] + [[6, b] for b in range(1, 4)])
    assert looks.steps[:9] != looks.steps[9:18]


def test_accumulated_batches_have_draws_of_their_own():
    technique = MaestroLowRank(lasso_weight=0.0, threshold=0.0, sampler="independent")
    looks = Looks(technique)
    fit(Validated(looks, lr=0.0), technique, looks, max_epochs=1, accumulate_grad_batches=4)
    assert len({tuple(ranks) for ranks in looks.steps}) == 4


def test_tails_are_emptied_and_cut_and_a_walk_begins_anew():
    technique = MaestroLowRank(lasso_weight=0.05, threshold=0.2)
    looks, module = Looks(technique), Classifier(lr=0.1)
    trainer = fit(module, technique, looks, max_epochs=8)
    sums = [sum(ranks.values()) for ranks in looks.ranks]
    assert sums == sorted(sums, reverse=True)
    assert sums[0] == 9
    assert sums[-1] < 6
    assert all(len(set(sums[start : start + 4])) == 1 for start in range(0, 32, 4))  # at the ends of epochs
    assert all(looks.elsewhere)
    for name, parts in technique.latents.own.items():
        assert torch.equal(module.get_parameter(name), parts["U"] @ parts["V"].T)
        assert kept_rank(parts["U"], parts["V"], 0.2) == technique.ranks[name]
    assert float(trainer.callback_metrics["reg/maestro/rank"]) == pytest.approx(sums[-1] / 9)
    lasso = sum(hierarchical_lasso(*parts.values()) for parts in technique.latents.own.values())
    logged = float(trainer.callback_metrics["reg/maestro/penalty"])
    assert logged == pytest.approx(0.05 * float(lasso.detach()), rel=0.1)  # that before the last step


class Adam(Classifier):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.02, weight_decay=0.3)


def test_what_adam_keeps_of_the_columns_is_cut_with_them_and_decay_is_that_of_factors():
    results = {}
    for decay in (True, False):
        module, technique = Adam(), MaestroLowRank(layers="net.0", lasso_weight=0.0, threshold=0.0, decay=decay)
        fit(module, technique, max_epochs=3)
        results[decay] = technique.latents.own["net.0.weight"]
    norms = {decay: [float(own[part].detach().norm()) for part in "UV"] for decay, own in results.items()}
    assert all(one < 0.95 * two for one, two in zip(norms[True], norms[False], strict=True))
    state = technique.latents.state_dict()["moments"]["net.0.weight"]
    technique.latents.cut("net.0.weight", 2)
    cut = technique.latents.state_dict()["moments"]["net.0.weight"]
    for part in "UV":
        assert technique.latents.own["net.0.weight"][part].is_leaf
        assert torch.equal(technique.latents.own["net.0.weight"][part], results[False][part][:, :2])
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(cut[part][key], state[part][key][:, :2])
        assert cut[part]["step"] == 12
    technique.latents._moments["net.0.weight"]["U"]["row"] = torch.zeros(8)  # of another shape, as Adafactor has
    technique.latents.cut("net.0.weight", 1)
    assert technique.latents.state_dict()["moments"]["net.0.weight"].keys() == {"V"}


def test_zeros_learn():
    module = Classifier(lr=0.1)
    with torch.no_grad():
        module.net[3].weight.zero_()
    technique = MaestroLowRank(lasso_weight=0.0, threshold=0.0)
    fit(module, technique, max_epochs=1)
    assert int(torch.linalg.matrix_rank(module.net[3].weight.detach())) > 1


class Writes(Callback):
    """An average, say, that somebody puts in."""

    def __init__(self, value, at):
        self.value, self.at = value, at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.at:
            with torch.no_grad():
                pl_module.net[0].weight.copy_(self.value)


def test_what_others_write_is_factorized_anew_with_the_rank_that_it_needs():
    for value, rank in ((torch.eye(8, 6), 6), (torch.ones(8, 6), 3)):
        module, technique = Classifier(lr=0.0), MaestroLowRank(lasso_weight=0.0, threshold=0.0)
        cut = Callback()
        cut.on_train_epoch_start = lambda *_, t=technique: t.latents.cut("net.0.weight", 3) if t.latents.own else None
        fit(module, technique, cut, Writes(value, 6))
        assert technique.ranks["net.0.weight"] == rank
        torch.testing.assert_close(module.net[0].weight.detach(), value, rtol=0, atol=1e-6)


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.attention = nn.Embedding(40, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.mix, self.depth = nn.Conv1d(8, 8, 3, groups=2, padding=1), nn.Conv1d(8, 8, 3, groups=8, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids, labels=None):
        x = self.table(input_ids)
        x = self.attention(x, x, x, need_weights=False)[0].transpose(1, 2)
        logits = self.head(self.depth(self.mix(x)).mean(2))
        return {"loss": None if labels is None else F.cross_entropy(logits, labels), "logits": logits}


def test_projections_and_groups_have_factors_of_their_own():
    module, technique = Wraps(made(Attends)), MaestroLowRank(lasso_weight=0.0, threshold=0.0)
    start = weights_of(module)
    fit(module, technique, loader=texts(), max_epochs=1)
    own = {name.removeprefix("model."): parts for name, parts in technique.latents.own.items()}
    assert own["attention.in_proj_weight"]["U"].shape == (3, 8, 8)
    assert own["mix.weight"]["U"].shape == (2, 4, 4)
    assert own["mix.weight"]["V"].shape == (2, 12, 4)
    assert own["attention.out_proj.weight"]["U"].shape == (8, 8)
    assert technique.describe().endswith("left alone, of rank 1 as they are: model.depth.weight")
    mix = torch.cat([own["mix.weight"]["U"][g] @ own["mix.weight"]["V"][g].T for g in range(2)]).reshape(8, 4, 3)
    torch.testing.assert_close(module.model.mix.weight, mix)
    assert not torch.equal(module.model.mix.weight, start["model.mix.weight"])
    projections = module.model.attention.in_proj_weight.detach().split(8)
    left, right = own["attention.in_proj_weight"].values()
    for i, projection in enumerate(projections):
        torch.testing.assert_close(projection, (left[i] @ right[i].T).detach())


def test_frozen_weights_are_left_alone_and_setups_are_refused():
    module, technique = Classifier(), MaestroLowRank()
    module.net[0].weight.requires_grad_(False)
    start = weights_of(module)
    fit(module, technique, max_epochs=1)
    assert list(technique.ranks) == ["net.3.weight"]
    assert torch.equal(module.net[0].weight, start["net.0.weight"])
    assert technique.describe().endswith("1 weights of 3 columns; left alone, frozen: net.0.weight")
    with pytest.raises(MisconfigurationException) as raised:
        fit(module, MaestroLowRank(layers="net.0"))
    assert str(raised.value).startswith("MaestroLowRank: none of the 1 chosen weights can be factorized: net.0.weight")

    class Doubles(GradientTechnique):
        def change_gradients(self, gradients):
            for gradient in gradients.values():
                gradient.mul_(2)

    with pytest.raises(MisconfigurationException, match=r"^MaestroLowRank and Doubles cannot stand together: Doubles"):
        fit(Classifier(), MaestroLowRank(), Doubles())


def test_ddp_needs_a_parameter_that_is_not_mapped():
    maps = WeightMaps(Map(torch.ones(9, 6)), [MaestroLowRank()])
    with pytest.raises(MisconfigurationException) as raised:
        maps.freeze(needs_one=True)
    assert str(raised.value) == (
        "MaestroLowRank trains in place of all parameters that need a gradient, and DDP wants a parameter with a"
        " gradient. Exclude the layer of 'layer.weight', or let another parameter be trained."
    )


# -- beside others ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_masks_on_other_weights_are_as_if_alone_and_on_the_same_they_are_refused(first):
    technique, sparse = MaestroLowRank(layers="net.0"), NMSparsity(2, 4, layers="net.3")
    module = Classifier(lr=0.1)
    fit(module, *((technique, sparse) if first else (sparse, technique)), max_epochs=3)
    end = module.net[3].weight.detach()
    assert (end.unflatten(1, (2, 4)) != 0).sum(2).tolist() == [[2, 2]] * 3
    assert technique.ranks.keys() == {"net.0.weight"}
    whole = MaestroLowRank()
    with pytest.raises(MisconfigurationException) as raised:
        fit(Classifier(), *((whole, sparse) if first else (sparse, whole)))
    assert str(raised.value).startswith("NMSparsity and MaestroLowRank cannot stand together on 'net.3.weight': masks")
    assert str(raised.value).endswith("or give the layers that are exported to a training with masks.")


def test_exported_layers_can_be_masked():
    module, technique = Classifier(lr=0.1), MaestroLowRank(layers="net.0", lasso_weight=0.0, threshold=0.0)
    fit(module, technique)
    small, layers = export_low_rank(technique, module, {"net.0.weight": 2})
    assert layers == {"net.0": 2}
    fit(small, NMSparsity(1, 2, layers="net.0.*"), max_epochs=3)
    for layer in small.net[0]:
        assert (layer.weight.detach().unflatten(1, (-1, 2)) != 0).sum(2).eq(1).all()


def test_what_others_edit_is_the_truncated_weight():
    seen = {}

    def steps(name, *techniques):
        def step(module, batch):
            seen.setdefault(name, []).append(module.net[3].weight.detach().clone())
            return F.cross_entropy(module(batch[0]), batch[1])

        fit(Classifier(step, lr=0.0), *techniques)

    options = {"layers": "net.3", "lasso_weight": 0.0, "threshold": 0.0}
    steps("alone", MaestroLowRank(**options))
    steps("first", MaestroLowRank(**options), Halve(names=("net.3.weight",)))
    steps("last", Halve(names=("net.3.weight",)), MaestroLowRank(**options))
    for weight, first, last in zip(*seen.values(), strict=True):
        torch.testing.assert_close(first, weight / 2)
        torch.testing.assert_close(last, weight / 2)


def test_a_penalty_on_the_weight_reaches_all_columns():
    """One step by hand in float64, of a truncated layer."""
    x = torch.eye(6, dtype=torch.float64)
    module = Map(torch.ones(9, 6, dtype=torch.float64), 0.1).double()
    weight = module.layer.weight.detach().clone()
    technique = MaestroLowRank(lasso_weight=0.0, threshold=0.0)
    left, right = (f.requires_grad_() for f in svd_factors(weight))
    pairs = rank_pairs([6], torch.Generator().manual_seed(technique.derived_seed("ranks since 0, 0")))
    for rank in pairs[:2, 1].tolist():
        loss = (x @ low_rank_product(left, right, rank).T - x @ module.target.T).square().sum(1).mean()
        loss = loss + 0.3 * (low_rank_product(left, right) - weight).square().sum()
        gradients = torch.autograd.grad(loss, (left, right))
        with torch.no_grad():
            left -= 0.1 * gradients[0]
            right -= 0.1 * gradients[1]
    fit(module, technique, L2ToStart(0.3), loader=DataLoader(TensorDataset(x.repeat(2, 1)), 6), max_epochs=1)
    own = technique.latents.own["layer.weight"]
    torch.testing.assert_close(own["U"], left, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(own["V"], right, rtol=1e-9, atol=1e-9)


def test_an_average_is_one_of_the_weights_and_is_no_product_of_the_factors():
    module, technique = Classifier(lr=0.3), MaestroLowRank(lasso_weight=0.02, threshold=0.3)
    soup, snapshots = SoupAverager("uniform", load_at_end=True), []
    keeps = Callback()
    keeps.on_train_epoch_end = lambda trainer, pl_module: snapshots.append(weights_of(pl_module))
    fit(module, technique, keeps, soup, max_epochs=4)
    for name, value in weights_of(module).items():
        torch.testing.assert_close(value, torch.stack([s[name] for s in snapshots]).mean(0), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"is not what its factors were trained to; an average of weights, say, has a"):
        export_low_rank(technique, module)


# -- export -----------------------------------------------------------------------------------------------------------


def made(make):
    with seeded(0):
        return make()


def bert():
    options = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    options |= {"intermediate_size": 24, "max_position_embeddings": 12, "num_labels": 3}
    return BertForSequenceClassification(BertConfig(**options))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_head=2, n_layer=2, n_positions=12))


def resnet():
    options = {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(num_channels=3, num_labels=3, **options))


class Grouped(nn.Module):
    """Convolutions of many kinds."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, stride=2, padding="valid", bias=False)
        self.groups = nn.Conv2d(12, 12, 3, padding=2, dilation=2, groups=2, padding_mode="reflect")
        self.up, self.head = nn.ConvTranspose2d(12, 8, 2), nn.Linear(8, 3)

    def forward(self, pixel_values, labels=None):
        x = self.up(self.groups(self.first(pixel_values).relu()).relu()).relu()
        logits = self.head(x.mean((2, 3)))
        return {"loss": None if labels is None else F.cross_entropy(logits, labels), "logits": logits}


class Wraps(LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        ids = batch[0].dtype == torch.long
        labels = batch[0] if isinstance(self.model, GPT2LMHeadModel) else batch[1]
        return self.model(**{"input_ids" if ids else "pixel_values": batch[0]}, labels=labels)["loss"]

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 3e-3)


def texts():
    draw = torch.Generator().manual_seed(3)
    return DataLoader(
        TensorDataset(torch.randint(40, (32, 8), generator=draw), torch.randint(3, (32,), generator=draw)), 4
    )


def pictures():
    draw = torch.Generator().manual_seed(3)
    return DataLoader(
        TensorDataset(torch.randn(32, 3, 16, 16, generator=draw), torch.randint(3, (32,), generator=draw)), 4
    )


HOSTS = {"bert": (bert, texts), "gpt2": (gpt2, texts), "resnet": (resnet, pictures), "Grouped": (Grouped, pictures)}
# Products of the norms of tails at which about a half of each layer is left: they grow with the layer.
THRESHOLDS = {"bert": 0.05, "gpt2": 0.05, "resnet": 3.0, "Grouped": 1.0}


def logits_of(model, loader):
    with torch.no_grad():
        return model.eval()(next(iter(loader()))[0])["logits"]


def trained(name, **options):
    make, loader = HOSTS[name]
    module = Wraps(made(make))
    technique = MaestroLowRank(**{"lasso_weight": 5e-3, "threshold": THRESHOLDS[name], **options})
    fit(module, technique, loader=loader(), max_epochs=4)
    return module, technique


@pytest.mark.parametrize("name", HOSTS)
def test_the_export_puts_out_the_same_with_less_work(name):
    module, technique = trained(name)
    make, loader = HOSTS[name]
    small, layers = export_low_rank(technique, module.model, prefix="model")
    before = logits_of(module.model, loader)
    torch.testing.assert_close(logits_of(small, loader), before, rtol=0, atol=1e-5)
    inputs = next(iter(loader()))[0]
    flops = [forward_flops(lambda model=model: model(inputs)) for model in (module.model, small)]
    assert flops[1] < flops[0]
    assert 0 < len(layers) <= len(technique.ranks)
    for layer, rank in layers.items():
        pair = small.get_submodule(layer)
        assert isinstance(pair, nn.Sequential)
        assert [type(layer) for layer in pair] in ([nn.Linear] * 2, [nn.Conv2d] * 2)
        size, whole = (sum(p.numel() for p in m.parameters()) for m in (pair, module.model.get_submodule(layer)))
        assert size < whole
        assert pair[1].bias is module.model.get_submodule(layer).bias or torch.equal(
            pair[1].bias, module.model.get_submodule(layer).bias
        )
        assert rank == technique.ranks[f"model.{layer}.weight"]
        # What other code may read of the layer is what it was.
        one = module.model.get_submodule(layer)
        torch.testing.assert_close(pair.weight, one.weight, rtol=0, atol=1e-5)
        assert pair.bias is pair[1].bias
        for key in ("in_features", "out_features", "kernel_size", "stride", "padding", "groups", "nx", "nf"):
            assert getattr(pair, key, None) == getattr(one, key, None)
    # Loaded strictly into a new network, and trained on as an ordinary one.
    again = made(make)
    low_rank_layers_(again, layers)
    again.load_state_dict(small.state_dict(), strict=True)
    torch.testing.assert_close(logits_of(again, loader), logits_of(small, loader), rtol=0, atol=0)
    fit(Wraps(again.train()), loader=loader(), max_epochs=1)
    assert not same_weights(again, small)


LOADS = """
import json, sys, torch
import torch.nn.functional as F
from torch import nn
from lightning_reg.functional import low_rank_layers_
{network}
model = Grouped()
low_rank_layers_(model, json.load(open(sys.argv[1] + "/layers.json")))
model.load_state_dict(torch.load(sys.argv[1] + "/small.pt", weights_only=True), strict=True)
with torch.no_grad():
    logits = model.eval()(torch.load(sys.argv[1] + "/x.pt"))["logits"]
torch.save(logits, sys.argv[1] + "/logits.pt")
"""


def test_a_fresh_process_loads_the_export_strictly(tmp_path):
    module, technique = trained("Grouped")
    small, layers = export_low_rank(technique, module.model, prefix="model")
    torch.save(small.state_dict(), tmp_path / "small.pt")
    torch.save(next(iter(pictures()))[0], tmp_path / "x.pt")
    (tmp_path / "layers.json").write_text(json.dumps(layers))
    script = LOADS.format(network=inspect.getsource(Grouped))
    subprocess.run([sys.executable, "-W", "ignore", "-c", script, str(tmp_path)], check=True)
    before = logits_of(module.model, pictures)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), before, rtol=0, atol=1e-5)


def test_smaller_ranks_are_the_first_columns_and_a_layer_that_gains_nothing_stays_whole():
    module, technique = Classifier(lr=0.1), MaestroLowRank(lasso_weight=0.0, threshold=0.0)
    fit(module, technique)
    # 8 by 6: a pair is less work up to rank 3 (42 numbers for 48).
    for rank, pairs in ((6, {}), (4, {}), (3, {"net.0": 3}), (1, {"net.0": 1})):
        small, layers = export_low_rank(technique, module, {"net.0.weight": rank})
        assert layers == pairs
        weight = small.net[0].weight if not pairs else small.net[0][1].weight @ small.net[0][0].weight
        own = technique.latents.own["net.0.weight"]
        torch.testing.assert_close(weight, low_rank_product(own["U"], own["V"], rank))
        torch.testing.assert_close(small.net[3].weight, module.net[3].weight)
    assert module.net[0].weight.shape == (8, 6)  # the network itself stays as it is
    for rank, words in ((0, "must be from 1 to 6, got 0"), (7, "must be from 1 to 6, got 7")):
        with pytest.raises(ValueError, match=rf"^export_low_rank: the rank of 'net\.0\.weight' {words}"):
            export_low_rank(technique, module, {"net.0.weight": rank})
    with pytest.raises(ValueError, match=r"the rank of 'net\.0' is of no weight that was trained, got 2"):
        export_low_rank(technique, module, {"net.0": 2})
    with pytest.raises(ValueError, match=r"'net\.0\.weight' was trained, and is not in the given network"):
        export_low_rank(technique, module.net)
    with pytest.raises(ValueError, match="nothing was trained yet"):
        export_low_rank(MaestroLowRank(), module)
    for layers in ({"net.9": 1}, {"net.1": 1}, {"": 1}):
        with pytest.raises(ValueError, match="is no linear layer or convolution within the network"):
            low_rank_layers_(module, layers)
    with pytest.raises(ValueError, match="is no linear layer or convolution within the network"):
        low_rank_layers_(nn.Linear(8, 8), {"": 1})


class Shares(Classifier):
    """One weight in two layers, and one layer under two names."""

    def __init__(self):
        super().__init__(lr=0.1)
        self.twin = nn.Linear(6, 8)
        self.twin.weight, self.again = self.net[0].weight, self.net[3]

    def forward(self, x):
        return self.again((self.net[0](x) + self.twin(x)).relu())


def test_shared_weights_share_the_pair():
    module, technique = Shares(), MaestroLowRank(lasso_weight=0.0, threshold=0.0)
    fit(module, technique)
    small, layers = export_low_rank(technique, module, {"net.0.weight": 2, "net.3.weight": 2})
    assert layers == {"net.0": 2, "twin": 2, "net.3": 2}
    assert small.net[0][0].weight is small.twin[0].weight
    assert small.net[0][1].bias is not small.twin[1].bias
    assert small.again is small.net[3]
    assert sum(p.numel() for p in small.parameters()) == 2 * (6 + 8) + 16 + 2 * (8 + 3) + 3


def test_attention_keeps_whole_layers_of_the_same_rank():
    module, technique = Wraps(made(Attends)), MaestroLowRank(lasso_weight=0.0, threshold=0.0)
    fit(module, technique, loader=texts(), max_epochs=1)
    ranks = {f"model.{name}": 2 for name in ("attention.in_proj_weight", "attention.out_proj.weight", "mix.weight")}
    small, layers = export_low_rank(technique, module.model, ranks, prefix="model")
    assert layers == {"mix": 2}
    for projection in (*small.attention.in_proj_weight.split(8), small.attention.out_proj.weight):
        assert int(torch.linalg.matrix_rank(projection, rtol=1e-5)) == 2
    assert logits_of(small, texts).shape == (4, 3)


def test_ranks_for_a_budget_go_where_they_cost_the_least():
    module, technique = Classifier(lr=0.1), MaestroLowRank(lasso_weight=0.0, threshold=0.0)
    fit(module, technique)
    own, asked = technique.latents.own, []

    def numbers(model):
        return sum(p.numel() for p in model.parameters())

    def score(model):
        asked.append(numbers(model))
        lost = 0.0
        for layer, whole in ((model.net[0], module.net[0]), (model.net[3], module.net[3])):
            weight = layer.weight if isinstance(layer, nn.Linear) else layer[1].weight @ layer[0].weight
            lost += float((weight - whole.weight).detach().square().sum())
        return -lost

    assert greedy_ranks(technique, module, score, numbers, 83) == {"net.0.weight": 6, "net.3.weight": 3}
    assert not asked
    # Both whole have 48 + 8 + 24 + 3 numbers. Rank 3 of the first leaves 42, rank 2 of the second 22.
    tails = [(own["net.0.weight"], 3), (own["net.3.weight"], 2)]
    lost = [float((parts["U"][:, b:] @ parts["V"][:, b:].T).detach().square().sum()) for parts, b in tails]
    want = {"net.0.weight": 3, "net.3.weight": 3} if lost[0] < lost[1] else {"net.0.weight": 6, "net.3.weight": 2}
    assert greedy_ranks(technique, module, score, numbers, 82) == want
    assert sorted(asked) == [77, 81]
    ranks = greedy_ranks(technique, module, score, numbers, 36, share=0.5)
    assert ranks == {"net.0.weight": 1, "net.3.weight": 1}
    with pytest.raises(ValueError, match=r"^greedy_ranks: a cost of 35 cannot be reached, 36 is the least\."):
        greedy_ranks(technique, module, score, numbers, 35)
