"""CandidateDropout, ClassDropout and ClampedSelfDistillation."""

import math
from collections import OrderedDict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet1DModel
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

from lightning_reg import CandidateDropout, ClampedSelfDistillation, ClassDropout, Mixup
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import (
    best_candidates,
    candidate_subset,
    clamped_soft_labels,
    masked_classes,
    positions_in_subset,
    refinement_loss,
    subset_size,
    take,
    teacher_momentum,
    top_candidates,
)
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.conformance.problems import Problem
from tests.toys import (
    CLASSES,
    QUIET,
    Classifier,
    LossRecorder,
    ShiftTargets,
    StepLosses,
    fit,
    make_trainer,
    same_weights,
)

pytestmark = QUIET

WIDTH, CANDIDATES = 5, 8


# -- a scorer whose candidates attend to each other -------------------------------------------------------------------


class Among(nn.Module):
    """Each candidate and the mean of all: another set, other scores."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(2 * 6, 6)

    def forward(self, rows):
        return self.mix(torch.cat([rows, rows.mean(-2, keepdim=True).expand_as(rows)], -1))


class Score(nn.Linear):
    def forward(self, rows):
        return super().forward(rows)[..., 0]


def scorer():
    return nn.Sequential(
        OrderedDict(first=nn.Linear(WIDTH, 6), act=nn.Tanh(), body=Among(), act_body=nn.Tanh(), head=Score(6, 1))
    )


def candidates(size):
    x = torch.randn(size, CANDIDATES, WIDTH)
    return x, torch.sigmoid(x[..., 0] + torch.randn(size, CANDIDATES))


SCORES = Problem(scorer, candidates, F.binary_cross_entropy_with_logits)


def shrink(x):
    """A view that draws nothing: ranks and processes agree on it."""
    return 0.8 * x


def jitter(x):
    return x + 0.1 * torch.randn_like(x)


HERE = "tests.dropout.test_gtrs"


def drawn(generator, size, keep, always=()):
    """Positions by the order of the draws, those first that are always kept."""
    order = torch.randperm(size, generator=generator).tolist()
    order = [i for i in order if i in always] + [i for i in order if i not in always]
    return sorted(order[: math.floor(keep * size)])


class Fewer(Hand):
    """The batch with the columns that are drawn."""

    def observe(self, loop, moment):
        t = self.technique
        chosen = drawn(moment.draws(t), moment.x.shape[1], t.keep, t.always_keep)
        moment.x = torch.stack([moment.x[:, i] for i in chosen], 1)
        moment.y = torch.stack([moment.y[:, i] for i in chosen], 1)


class Bent(Hand):
    """The average of the weights, and labels it bends, one after the other."""

    def begin(self, loop):
        self.teacher, self.epoch = loop.constants(), 0

    def term(self, loop, moment):
        t, loss = self.technique, loop.part.loss
        regression = loss is F.mse_loss
        delta = t.delta_regression if regression else t.delta
        predicted = loop.run(self.teacher, moment.x)[0].detach()
        predicted = predicted if regression else 1 / (1 + (-predicted).exp())
        soft = torch.stack(
            [
                y + min(max(float(p - y), -delta), delta)
                for y, p in zip(moment.y.flatten(), predicted.flatten(), strict=True)
            ]
        ).reshape(moment.y.shape)
        total = t.weight * loss(moment.outputs[0], soft)
        if t.augment is not None:
            seen = loop.run(moment.weights, shrink(moment.x), moment)[0]
            total = total + t.view_weight * loss(seen, moment.y)
        return total

    def after_step(self, loop, moment):
        t = self.technique
        m = t.momentum + (t.momentum_end - t.momentum) * min(self.epoch / t.momentum_epochs, 1)
        now = loop.constants()
        self.teacher = {name: m * held + (1 - m) * now[name] for name, held in self.teacher.items()}

    def after_epoch(self, loop, epoch):
        self.epoch = epoch + 1


class Absent(Hand):
    """Exponentials of the classes that are there."""

    def change_input(self, output, moment):
        axis = 2 if output.dim() == 3 else 1  # tokens have their classes last
        chosen = drawn(moment.draws(self.technique), output.shape[axis], self.technique.keep)
        columns = [
            torch.where((moment.y == c) | (c in chosen), z, -torch.inf) for c, z in enumerate(output.unbind(axis))
        ]
        return torch.stack(columns, axis)


KEYS = {"0": 1, "1": -1}
CASE = (
    Case(
        make=partial(CandidateDropout, KEYS, always_keep=[2], same_on_ranks=True),
        neutral=partial(CandidateDropout, KEYS, keep=1.0),
        by_hand=Fewer,
        says=(
            "keep=0.5 of 0 along 1, 1 along -1; always 1 more; one subset for all ranks",
            "keep=1: inactive",
            "keep=0.75 of 1 along 1, argument 0 of net.first along 1; a subset for each rank",
            "keep=0.25 of 0 along 1, 1 along 1; a subset for each rank",
        ),
        data=SCORES,
        variants=[
            partial(CandidateDropout, {"1": 1}, keep=0.75, layer="net.first", axis=1),
            partial(CandidateDropout, {"0": 1, "1": 1}, keep=0.25, normalise=["1"], seed=3),
        ],
        invalid=[
            ({"candidate_axes": {}}, "candidate_axes"),
            ({"candidate_axes": {"0": 0.5}}, "candidate_axes"),
            ({"keep": 0.0}, "keep"),
            ({"keep": 1.1}, "keep"),
            ({"always_keep": [-1]}, "always_keep"),
            ({"always_keep": 1}, "always_keep"),
            ({"normalise": "0"}, "normalise"),
            ({"normalise": ["2"]}, "normalise"),
            ({"argument": -1}, "argument"),
            ({"axis": 64}, "axis"),
            ({"num_candidates": 0}, "num_candidates"),
            ({"candidate_axes": {}, "layer": "net", "positive_key": "1"}, "num_candidates"),
        ],
    ),
    Case(
        make=partial(ClassDropout, same_on_ranks=True),
        neutral=partial(ClassDropout, 1.0),
        by_hand=Absent,
        says=(
            "keep=0.5; one subset for all ranks",
            "keep=1: inactive",
            "keep=0.25; a subset for each rank",
        ),
        also=["images", "maps", "tokens"],
        variants=[partial(ClassDropout, 0.25, loss="cross_entropy", seed=2)],
        invalid=[({"keep": 0.0}, "keep"), ({"keep": 1.5}, "keep"), ({"loss": -1}, "loss")],
    ),
    Case(
        make=partial(
            ClampedSelfDistillation,
            momentum=0.5,
            momentum_end=0.75,
            momentum_epochs=1,
            augment=f"{HERE}.shrink",
            views=2,
        ),
        neutral=partial(ClampedSelfDistillation, weight=0.0),
        by_hand=Bent,
        says=(
            "delta=0.15 (regression: 1), weight=1; average of momentum 0.5 to 0.75 in 1 epochs; 2 views, weight 1",
            "weight=0: inactive",
            "weight=0; 1 views, weight 0.5",
            "delta=0.3 (regression: 1), weight=2; a copy for 1 epochs, then average of momentum 0.992 to 0.998 in 3"
            " epochs; no views",
        ),
        data="regression",
        variants=[
            partial(ClampedSelfDistillation, weight=0.0, augment=f"{HERE}.jitter", views=1, view_weight=0.5),
            partial(ClampedSelfDistillation, 0.3, weight=2.0, copy_epochs=1, loss="mse_loss"),
        ],
        invalid=[
            ({"delta": -0.1}, "delta"),
            ({"delta_regression": -1.0}, "delta_regression"),
            ({"weight": -1.0}, "weight"),
            ({"view_weight": -1.0}, "view_weight"),
            ({"momentum": 1.1}, "momentum"),
            ({"momentum_end": -0.1}, "momentum_end"),
            ({"momentum_epochs": 0}, "momentum_epochs"),
            ({"copy_epochs": -1}, "copy_epochs"),
            ({"views": 0}, "views"),
            ({"view_keys": "x"}, "view_keys"),
        ],
    ),
)


# -- the functional core ----------------------------------------------------------------------------------------------


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("size", "keep", "count"), [(8, 0.5, 4), (9, 0.5, 4), (1, 0.25, 1), (3, 0.25, 1), (100, 0.29, 29)]
)
def test_the_subset_is_the_first_of_a_permutation_and_of_one_size(size, keep, count):
    assert subset_size(size, keep) == count
    for seed in range(5):
        order = torch.randperm(size, generator=seeded(seed))
        assert candidate_subset(size, keep, seeded(seed)).tolist() == sorted(order[:count].tolist())
    assert candidate_subset(size, 1.0).tolist() == list(range(size))


def test_every_candidate_is_kept_as_often_as_keep_says_and_some_always():
    generator = seeded()
    counts, with_some = torch.zeros(2, 8)
    for _ in range(2000):
        counts[candidate_subset(8, 0.5, generator)] += 1 / 2000
        with_some[candidate_subset(8, 0.5, generator, torch.tensor([[1, -100], [1, 6]]))] += 1 / 2000
    assert counts.sub(0.5).abs().max() < 0.05  # four standard deviations of 2000 draws
    assert with_some[[1, 6]].tolist() == pytest.approx([1.0, 1.0], abs=1e-4)
    assert with_some[[0, 2, 3, 4, 5, 7]].sub(1 / 3).abs().max() < 0.05


def test_listed_tensors_stay_aligned_and_distributions_sum_to_1():
    x = torch.arange(6.0)
    entries = {"v": torch.stack([x, 10 * x], 1), "y": torch.stack([x, -x]), "p": (x[None] / 15).repeat(2, 1), "n": x}
    entries["p"][1] = F.one_hot(torch.tensor(0), 6)
    taken = take(entries, {"v": 0, "y": 1, "p": -1}, torch.tensor([1, 4]), ["p"])
    assert taken["v"].tolist() == [[1.0, 10.0], [4.0, 40.0]]
    assert taken["y"].tolist() == [[1.0, 4.0], [-1.0, -4.0]]
    assert taken["p"].tolist() == [pytest.approx([0.2, 0.8]), [0.5, 0.5]]
    assert taken["n"] is x


def test_soft_labels_at_the_bounds():
    y, p = torch.tensor([1.0, 0.0, 0.0, 0.4]), torch.tensor([0.2, 0.9, 0.1, 0.45])
    assert clamped_soft_labels(y, p, 0.0).tolist() == y.tolist()
    assert clamped_soft_labels(y, p, 1.0).tolist() == pytest.approx(p.tolist())
    assert clamped_soft_labels(y, p).tolist() == pytest.approx([0.85, 0.15, 0.1, 0.45])
    metres = clamped_soft_labels(torch.tensor([3.0, -3.0]), torch.tensor([9.0, -3.5]), 1.0)
    assert metres.tolist() == [4.0, -3.5]
    assert clamped_soft_labels(y.bool(), p.bfloat16().requires_grad_()).dtype == torch.float32
    assert y.tolist() == pytest.approx([1.0, 0.0, 0.0, 0.4])  # not written to


def test_subsets_and_soft_labels_are_those_of_the_authors_code():
    """NVlabs/GTRS at 5352e06127652ef0de19658704f7eca60d6f8411: ``GTRSAugAgent.compute_loss_soft_teacher`` was run on
    these scores and trajectories, and ``HydraTrajHead.forward`` draws ``torch.randperm(16)[:8]`` after seed 0."""
    y = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0, 0.0])
    scores = torch.tensor([-2.0, -3.0, 0.3, 3.0, 0.5, -0.2])
    theirs = [0.8500000238, 0.0474258736, 0.5744425058, 0.9525741339, 0.1500000060, 0.1500000060]
    assert clamped_soft_labels(y, scores.sigmoid()).tolist() == pytest.approx(theirs, rel=1e-6)
    chosen, given = 0.5 * torch.arange(8) + 0.4, 0.3 * torch.arange(8)
    poses = [0.4, 0.9, 1.4, 1.9, 2.2, 2.5, 2.8, 3.1]
    assert clamped_soft_labels(given, chosen, 1.0).tolist() == pytest.approx(poses, rel=1e-6)
    assert candidate_subset(16, 0.5, seeded()).tolist() == sorted([12, 10, 9, 6, 11, 8, 13, 5])


def test_ranks_draw_apart_unless_told(monkeypatch):
    step = SimpleNamespace(batches_so_far=1, stream="", is_logging=False)
    drawn_by = {}
    for rank in range(2):
        monkeypatch.setattr("lightning_reg.engine.technique.distributed.rank", lambda rank=rank: rank)
        for same in (False, True):
            step.notes = {}
            CandidateDropout({"x": 0}, same_on_ranks=same).transform_batch({"x": torch.arange(32)}, step)
            drawn_by[rank, same] = next(iter(step.notes.values()))[1].tolist()
    assert drawn_by[0, False] != drawn_by[1, False]
    assert drawn_by[0, True] == drawn_by[1, True]


def test_momentum_by_epoch():
    assert [teacher_momentum(e) for e in range(5)] == pytest.approx([0.992, 0.994, 0.996, 0.998, 0.998])
    assert [teacher_momentum(e, copy_epochs=3) for e in range(7)] == pytest.approx(
        [0, 0, 0, 0.992, 0.994, 0.996, 0.998]
    )


def test_classes_are_masked_in_any_layout():
    z = torch.arange(12.0).reshape(2, 3, 2)
    masked = masked_classes(z, torch.tensor([[2, -100], [255, 1]]), torch.tensor([0]))
    assert masked.isfinite().int().tolist() == [[[1, 1], [0, 0], [1, 0]], [[1, 1], [0, 1], [0, 0]]]
    assert masked[masked.isfinite()].tolist() == [0.0, 1.0, 4.0, 6.0, 7.0, 9.0]
    assert masked_classes(z[0, :, 0], torch.tensor(1), torch.tensor([2])).isfinite().tolist() == [False, True, True]


def test_the_best_candidates_are_those_of_the_whole_set_and_every_layer_counts():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.7, 0.2, 0.6]], requires_grad=True)
    chosen = top_candidates(scores, 2, among=torch.tensor([4, 1, 3]))
    assert chosen.tolist() == [[1, 3], [4, 3]]
    again = top_candidates(torch.tensor([[0.1, 0.2], [0.2, 0.1]]), 1, among=chosen)
    assert again.tolist() == [[3], [4]]
    targets = torch.tensor([[0.0, 1.0, 0.0, 0.5, 0.0], [0.2, 0.0, 0.0, 1.0, 0.0]])
    layers = [torch.tensor([[0.3, -0.1], [1.0, 2.0]]), torch.zeros(2, 2)]
    chosen_targets = [[1.0, 0.5], [0.0, 1.0]]
    wanted = 0.0
    for layer in layers:
        for row, ys in zip(layer.tolist(), chosen_targets, strict=True):
            wanted += sum(math.log1p(math.exp(z)) - y * z for z, y in zip(row, ys, strict=True)) / 4
    assert refinement_loss(layers, targets, chosen).item() == pytest.approx(wanted, rel=1e-6)
    assert refinement_loss(layers, targets, chosen, F.mse_loss).item() == pytest.approx(
        sum(F.mse_loss(layer, torch.tensor(chosen_targets)).item() for layer in layers), rel=1e-6
    )


def near(goals, offered):
    """Scores (B, n) of points on a line: how near they are."""
    return -(offered[..., 0] - goals).abs()


def test_the_best_of_a_set_and_of_proposals():
    goals, points = torch.tensor([[0.2], [7.4]], requires_grad=True), torch.arange(4.0)[:, None]
    assert best_candidates(near, goals, points)[..., 0].tolist() == [[0.0], [3.0]]
    two = best_candidates(near, goals, points, lambda g: torch.stack([g + 0.5, g + 5], 1).double(), k=3)
    assert two.shape == (2, 3, 1)
    assert two.dtype == torch.float32
    assert not two.requires_grad
    assert two[0, :, 0].tolist() == pytest.approx([0.0, 0.7, 1.0])
    assert two[1, :, 0].tolist() == pytest.approx([7.9, 3.0, 12.4])  # 0.7 is offered to the other sample
    alone = best_candidates(near, goals, points[:0], lambda g: g[:, None] + torch.tensor([[1.0], [-3.0]]))
    assert alone[:, 0, 0].tolist() == pytest.approx([1.2, 8.4])
    with pytest.raises(ValueError, match=r"must give \(B, N, ...\) for candidates \(4, 1\), got \(2, 1\)\."):
        best_candidates(near, goals, points, lambda g: g)
    with pytest.raises(ValueError, match=r"got \(2, 1, 2\)"):
        best_candidates(near, goals, points, lambda g: g.repeat(1, 2)[:, None])


def test_a_diffusion_model_proposes_trajectories():
    """diffusers' UNet1DModel denoises four trajectories of eight poses for each goal."""
    blocks = {"down_block_types": ["DownResnetBlock1D"], "up_block_types": ["UpResnetBlock1D"]}
    blocks |= {"mid_block_type": "MidResTemporalBlock1D", "out_block_type": "OutConv1DBlock", "act_fn": "mish"}
    time = {"time_embedding_type": "positional", "use_timestep_embedding": True, "freq_shift": 1.0}
    torch.manual_seed(0)
    network = UNet1DModel(8, in_channels=4, out_channels=4, block_out_channels=(8,), **blocks, **time)
    scheduler, made = DDIMScheduler(20), []
    scheduler.set_timesteps(3)

    def propose(goals):
        rows = goals.repeat_interleave(4, 0)[:, :, None].expand(-1, -1, 8)
        x = torch.randn(len(rows), 2, 8)
        for t in scheduler.timesteps:
            noise = network(torch.cat([x, rows], 1), t).sample[:, :2]
            x = scheduler.step(noise, t, x).prev_sample
        made.append(x.mT.unflatten(0, (-1, 4)))
        return made[0]

    def ends_near(goals, offered):
        return -(offered[..., -1, :] - goals[:, None]).norm(dim=-1)

    goals = torch.tensor([[50.0, 0.0], [0.0, 0.1]])
    chosen = best_candidates(ends_near, goals, 50 * torch.eye(2)[:, None].repeat(1, 8, 1), propose)[:, 0]
    assert chosen[0].tolist() == [[50.0, 0.0]] * 8  # of the set
    nearest = (made[0][1, :, -1] - goals[1]).norm(dim=-1).argmin()
    assert torch.equal(chosen[1], made[0][1, nearest])


def test_positions_come_into_the_subset_and_back():
    indices = torch.tensor([1, 4, 5])
    inside = positions_in_subset(torch.tensor([[5, 1], [0, -1]]), indices, 6)
    assert inside.tolist() == [[2, 0], [-1, -1]]
    assert indices[inside[0]].tolist() == [5, 1]


# -- in a Trainer -----------------------------------------------------------------------------------------------------


class Scorer(Classifier):
    """Looks at what its step gets: candidates of the batch or its own, a right one, scores of all."""

    def __init__(self, step, lr=0.1):
        super().__init__(step, lr)
        self.register_buffer("vocabulary", torch.linspace(-1, 1, CANDIDATES)[:, None].repeat(1, 3))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.embed, self.seen = nn.Linear(3, 6), []


def vocabulary():
    """Eight candidates for the whole batch, the positions of the right ones, and what belongs to each candidate."""
    rows = [{"x": torch.rand(6), "right": torch.tensor(i % 3), "scores": torch.arange(8.0) + 100 * i} for i in range(4)]
    loader = DataLoader(rows, 2)
    loader.collate_fn = lambda items: {
        **torch.utils.data.default_collate(items),
        "candidates": torch.arange(8.0)[:, None].repeat(1, 6),
    }
    return loader


def look(module, batch):
    module.seen.append((batch, module.dropout.indices))
    return F.cross_entropy(module.net[0](batch["x"]) @ module.net[0](batch["candidates"]).T, batch["right"])


def test_a_batch_is_cut_alike_and_right_ones_are_kept_and_found():
    module, keys = Scorer(look), {"candidates": 0, "scores": 1}
    dropout = module.dropout = CandidateDropout(keys, positive_key="right")
    trainer = fit(module, dropout, loader=vocabulary())
    assert trainer.callback_metrics["reg/candidate_dropout/kept"].item() == 4
    subsets = []
    for batch, indices in module.seen:
        assert batch["candidates"][:, 0].tolist() == indices.tolist()
        assert (batch["scores"] % 100).tolist() == [indices.tolist()] * 2
        given = (batch["scores"][:, 0] // 100).long() % 3
        assert indices[batch["right"]].tolist() == given.tolist()
        subsets.append(tuple(indices.tolist()))
    assert {len(s) for s in subsets} == {4}
    assert len(set(subsets)) > 1
    assert dropout.indices is None


def own(module, batch):
    scores = module.net[0](batch["x"]) @ module.embed(module.vocabulary)[:, :6].repeat(1, 2)[:, :8].T
    module.seen.append((scores, batch["scores"], module.dropout.indices))
    return F.cross_entropy(scores, batch["right"])


@pytest.mark.parametrize("keys", [{"scores": 1}, {}])
def test_candidates_of_the_model_are_cut_where_a_layer_gets_them(keys):
    module = Scorer(own)
    dropout = CandidateDropout(keys, layer="embed", positive_key="right", num_candidates=None if keys else 8)
    module.dropout = dropout
    fit(module, dropout, loader=vocabulary(), max_epochs=1)
    for scores, belonging, indices in module.seen:
        assert scores.shape == (2, 4)
        assert (belonging % 100).tolist() == ([indices.tolist()] * 2 if keys else [list(range(8))] * 2)
    assert len(module.vocabulary) == 8
    named = Scorer(lambda m, b: m.embed(input=m.vocabulary).sum() / len(m.embed(input=m.vocabulary)))
    named.dropout = CandidateDropout({}, layer="embed", argument="input", always_keep=[7])
    fit(named, named.dropout, loader=vocabulary(), max_epochs=1)


class Validated(Scorer):
    def validation_step(self, batch, batch_idx):
        self.seen.append((batch, self.dropout.indices, self.embed(self.vocabulary)))


def test_evaluation_sees_all_and_keep_1_is_nothing():
    module = Validated(lambda m, b: F.mse_loss(m.embed(m.vocabulary), m.embed(m.vocabulary).detach() + 1))
    module.dropout = CandidateDropout({"candidates": 0}, layer="embed")
    trainer = make_trainer(callbacks=[module.dropout], max_epochs=1, num_sanity_val_steps=0)
    trainer.fit(module, vocabulary(), vocabulary())
    for batch, indices, embedded in module.seen:
        assert len(batch["candidates"]) == len(embedded) == 8
        assert indices is None
    plain, same = Scorer(look, 1e-3), Scorer(look, 1e-3)
    same.dropout = plain.dropout = CandidateDropout({"candidates": 0}, keep=1)
    loader = vocabulary()
    fit(plain, loader=loader)
    fit(same, same.dropout, loader=loader)
    assert same_weights(plain, same)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"candidate_axes": {"candidates": 0, "x": 1}}, "'candidates' has 8 along 0, 'x' has 6 along 1"),
        ({"candidate_axes": {"candidates": 2}}, "with the candidates along axis 2, found a tensor (8, 6)"),
        ({"candidate_axes": {"rows": 0}}, "CandidateDropout: candidate_axes='rows' names nothing in the batch"),
        ({"candidate_axes": {"candidates": 0}, "positive_key": "x"}, "whole numbers in a tensor, found torch.float32"),
        (
            {"candidate_axes": {"candidates": 0}, "positive_key": "right", "keep": 0.2},
            "2 candidates are to be kept always, and",
        ),
        ({"candidate_axes": {"candidates": 0}, "always_keep": [8]}, "always_keep=[8]): there are 8 candidates"),
        (
            {"candidate_axes": {"x": 1}, "layer": "embed"},
            "layer 'embed' is given 8 candidates, and 6 were found before",
        ),
        (
            {"candidate_axes": {}, "layer": "embed", "argument": "rows"},
            "is given no argument 'rows', but 1 by position and []",
        ),
        ({"candidate_axes": {}, "layer": "embed", "argument": 1}, "is given no argument 1"),
        ({"candidate_axes": {}, "layer": "embed", "axis": 2}, "argument 0 of layer 'embed' must be a tensor"),
    ],
)
def test_candidates_that_do_not_fit_are_refused_by_name(options, said):
    module = Scorer(lambda m, b: m.embed(m.vocabulary).sum() + m.net(b["x"]).sum())
    with pytest.raises(MisconfigurationException) as caught:
        fit(module, CandidateDropout(**options), loader=vocabulary())
    assert said in str(caught.value)


class Bert(Classifier):
    """Passages to rank again: each is a pair of a question and itself, and a softmax runs over those of a question."""

    def __init__(self):
        super().__init__(lr=0.01)
        small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        self.bert, self.sizes = BertForSequenceClassification(BertConfig(vocab_size=30, num_labels=1, **small)), []

    def training_step(self, batch, batch_idx):
        tokens, right = batch
        self.sizes.append((tokens.shape[1], right.max().item()))
        scores = self.bert(input_ids=tokens.flatten(0, 1)).logits.reshape(tokens.shape[:2])
        return F.cross_entropy(scores, right)


def test_a_transformer_that_ranks_passages_again():
    tokens = torch.randint(30, (8, 6, 4), generator=seeded())
    data = DataLoader(TensorDataset(tokens, torch.zeros(8, dtype=torch.long)), 4)
    module = Bert()
    fit(module, CandidateDropout({"0": 1}, always_keep=[0]), loader=data, max_epochs=1, max_steps=2)
    assert module.sizes == [(3, 0)] * 2


# -- classes ----------------------------------------------------------------------------------------------------------


def test_other_techniques_see_the_given_logits_and_the_loss_the_chosen_classes():
    given, seen = [], []

    class Sees(LossRecorder):
        def loss_term(self, call):
            seen.append((call.logits.detach(), call.loss_input.detach()))

    def step(module, batch):
        given.append(module(batch[0]).detach())
        return F.cross_entropy(module(batch[0]), batch[1])

    trainer = fit(Classifier(step), ClassDropout(0.67), Sees(), max_epochs=1)
    whole, masked = seen[-1]
    share = whole.softmax(1)[masked.isinf()].sum() / len(whole)
    assert trainer.callback_metrics["reg/class_dropout/left_out"].item() == pytest.approx(share.item(), rel=1e-4)
    for logits, (whole, masked) in zip(given, seen, strict=True):
        assert torch.equal(logits, whole)
        kept = masked.isfinite()
        assert torch.equal(masked[kept], whole[kept])
        assert {2, 3} >= set(kept.sum(1).tolist()) > set()
    assert len({tuple(masked.isfinite().any(0).tolist() + masked.isfinite().all(0).tolist()) for _, masked in seen}) > 1


def test_maps_and_ignored_positions_keep_their_own_class():
    def step(module, batch):
        z = module(batch[0])[:, :, None].repeat(1, 1, 2)
        y = batch[1][:, None].repeat(1, 2)
        y[:, 1] = -100
        return F.cross_entropy(z, y)

    one, other = Classifier(step), Classifier()
    fit(one, ClassDropout(0.4))
    fit(other, ClassDropout(0.4))
    assert same_weights(one, other, atol=1e-6)
    assert all(value.isfinite().all() for value in one.state_dict().values())


def smoothed(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1], label_smoothing=0.1)


def soft(module, batch):
    return F.cross_entropy(module(batch[0]), F.one_hot(batch[1], CLASSES).float())


def squares(module, batch):
    return F.mse_loss(module(batch[0]), F.one_hot(batch[1], CLASSES).float())


@pytest.mark.parametrize(
    ("technique", "step", "said"),
    [
        (ClassDropout(), smoothed, "has label smoothing, which ask every class for a share"),
        (ClassDropout(), soft, "has probabilities as targets"),
        (ClassDropout(), squares, "leaves classes out of a softmax, and"),
        ([ClassDropout(), ShiftTargets()], None, "ShiftTargets replaces the targets of the same call"),
        ([ClassDropout(), Mixup()], None, "a mixed sample has two classes"),
        (ClampedSelfDistillation(), None, "is no binary cross-entropy"),
        (ClampedSelfDistillation(view_keys=["2"]), squares, "view_keys='2' names nothing in the batch"),
    ],
)
def test_losses_that_it_does_not_work_on_are_refused(technique, step, said):
    techniques = technique if isinstance(technique, list) else [technique]
    with pytest.raises(MisconfigurationException) as caught:
        fit(Classifier(step), *techniques)
    assert said in str(caught.value)


def test_without_effect_nobody_conflicts():
    assert ClassDropout(1.0).conflict_with(Mixup()) is None
    assert ClampedSelfDistillation(weight=0.0).conflict_with(ClassDropout()) is None


# -- distillation -----------------------------------------------------------------------------------------------------


def labels_of(batch):
    return F.one_hot(batch[1], CLASSES).float()


def several(module, batch):
    return F.binary_cross_entropy_with_logits(module(batch[0]), labels_of(batch), reduction="sum") / len(batch[0])


def probabilities(module, batch):
    return F.binary_cross_entropy(module(batch[0]).sigmoid(), labels_of(batch), reduction="sum") / len(batch[0])


def test_a_teacher_of_momentum_0_is_the_network_and_of_1_the_first_one():
    copied, still, first = Classifier(several), Classifier(several), Classifier()
    follows = ClampedSelfDistillation(1.0, momentum=0.0, momentum_end=0.0)
    stays = ClampedSelfDistillation(1.0, momentum=1.0, momentum_end=1.0)
    fit(copied, follows)
    fit(still, stays)
    assert same_weights(follows.teacher_weights, copied.state_dict(), atol=1e-6)
    assert same_weights(stays.teacher_weights, first.state_dict())
    assert not same_weights(still, copied, atol=1e-4)
    first.load_state_dict(follows.teacher_weights)
    assert ClampedSelfDistillation().teacher_weights is None


@pytest.mark.parametrize("step", [several, probabilities, squares])
def test_delta_0_is_twice_the_loss_and_views_that_are_the_batch_a_third(step):
    twice = Classifier(lambda m, b: 2 * step(m, b))
    thrice = Classifier(lambda m, b: 3 * step(m, b))
    ours, viewed = Classifier(step), Classifier(step)
    viewed.same = lambda x: x
    fit(twice)
    fit(thrice)
    fit(ours, ClampedSelfDistillation(0.0, 0.0))
    fit(viewed, ClampedSelfDistillation(0.0, 0.0, augment=f"{HERE}.unchanged", views=2))
    assert same_weights(ours, twice, atol=1e-6)
    assert same_weights(viewed, thrice, atol=1e-5)


def unchanged(x):
    return x


def test_views_of_the_data_set_are_trained_on_with_the_batchs_labels():
    x, y = torch.rand(16, 6, generator=seeded()), torch.arange(16) % CLASSES
    data = DataLoader(TensorDataset(x, y, 1 - x, x**2), 8)
    both = lambda m, b: (  # noqa: E731 # a step
        several(m, b) + 0.5 * (several(m, [b[2], b[1]]) + several(m, [b[3], b[1]])) / 2
    )
    hand, ours = Classifier(both), Classifier(several)
    fit(hand, loader=data)
    fit(ours, ClampedSelfDistillation(weight=0.0, view_keys=["2", "3"], view_weight=0.5), loader=data)
    assert same_weights(hand, ours, atol=1e-6)


def turned(points, degrees):
    """Points (..., 2) turned about the origin."""
    angle = torch.tensor(degrees).deg2rad()
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).reshape(2, 2)
    return (points.unflatten(-1, (-1, 2)) @ turn.T).flatten(-2)


def turn_both(entry):
    return type(entry)(turned(rows, 30.0) for rows in entry)


class Direction(Classifier):
    """Says where three points have their mean, of a batch or of one part of it."""

    def __init__(self, key=None, **kwargs):
        super().__init__(**kwargs)
        self.key, self.seen = key, []

    def loss_of(self, pair):
        return F.mse_loss(self.net(pair[0])[:, :2], pair[1])

    def training_step(self, batch, batch_idx):
        pair = batch if self.key is None else batch[self.key]
        self.seen.append(len(pair[0]))
        return self.loss_of(pair)


@pytest.mark.parametrize("made", ["by augment", "by the data set"])
def test_views_with_labels_of_their_own(made):
    x = torch.randn(16, 6, generator=seeded())
    y = x.unflatten(1, (3, 2)).mean(1)

    class ByHand(Direction):
        def training_step(self, batch, batch_idx):
            return self.loss_of(batch) + 0.5 * self.loss_of(turn_both(batch))

    hand = ByHand()
    fit(hand, loader=DataLoader(TensorDataset(x, y), 8))
    if made == "by augment":
        ours, data = Direction(), TensorDataset(x, y)
        options = {"augment": f"{HERE}.turn_both", "views": 1, "input_key": ""}
    else:
        ours, seen = Direction("given"), turn_both([x, y])
        data = [{"given": (x[i], y[i]), "turned": (seen[0][i], seen[1][i])} for i in range(16)]
        options = {"view_keys": ["turned"], "input_key": "given"}
    views = ClampedSelfDistillation(weight=0.0, view_weight=0.5, **options)
    fit(ours, views, loader=DataLoader(data, 8))
    assert set(ours.seen) == {16}  # two views of 8 samples in one pass
    assert same_weights(hand, ours, atol=1e-6)
    shared = Direction()
    fit(
        shared,
        ClampedSelfDistillation(weight=0.0, view_weight=0.5, augment=f"{HERE}.turn_inputs", views=1),
        loader=DataLoader(TensorDataset(x, y), 8),
    )
    assert not same_weights(hand, shared, atol=1e-3)


def turn_inputs(x):
    return turned(x, 30.0)


def test_the_teacher_bends_the_batchs_labels_beside_views_with_their_own():
    x = torch.randn(8, 6, generator=seeded())
    data = DataLoader(TensorDataset(x, 5 * x[:, :2]), 8)
    start, losses = Direction(), StepLosses()
    with torch.no_grad():
        z, y = start.net(x)[:, :2], 5 * x[:, :2]
    wanted = F.mse_loss(z, y) + F.mse_loss(z, y + (z - y).clamp(-1, 1))
    wanted = wanted + F.mse_loss(start.net(turned(x, 30.0))[:, :2], turned(y, 30.0))
    views = ClampedSelfDistillation(augment=f"{HERE}.turn_both", views=3, input_key="")
    fit(Direction(), views, losses, loader=data, max_steps=1)
    assert losses.losses[0] == pytest.approx(wanted.item(), rel=1e-5)


def test_the_teacher_may_see_inputs_before_an_augmentation():
    x, y = torch.rand(8, 6, generator=seeded()), torch.arange(8) % CLASSES
    data = DataLoader(TensorDataset(x + 3, y, x), 8)
    start, losses = Classifier(), StepLosses()
    with torch.no_grad():
        z, clean, hot = start(x + 3), start(x).sigmoid(), F.one_hot(y, CLASSES).float()
    bce = partial(F.binary_cross_entropy_with_logits, z, reduction="sum")
    wanted = bce(hot) + bce(hot + (clean - hot).clamp(-0.15, 0.15))
    fit(Classifier(several), ClampedSelfDistillation(clean_key="2"), losses, loader=data, max_steps=1)
    assert losses.losses[0] == pytest.approx(wanted.item() / 8, rel=1e-5)
    with pytest.raises(MisconfigurationException, match="clean_key='3' names nothing in the batch"):
        fit(Classifier(several), ClampedSelfDistillation(clean_key="3"), loader=data)
    assert ClampedSelfDistillation(clean_key="2").describe().endswith("in 3 epochs, which sees 2; no views")


class Stepped(Callback):
    """Weights after each optimizer step, and the epoch."""

    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            held = {name: value.clone() for name, value in pl_module.state_dict().items()}
            self.weights.append((trainer.current_epoch, held))


def test_a_copy_first_then_an_average_and_the_networks_buffers():
    module, stepped = Classifier(several), Stepped()
    module.net[1] = nn.BatchNorm1d(8)
    start = {name: value.clone() for name, value in module.state_dict().items()}
    momenta = [0.0, 0.2, 0.5, 0.8, 0.8]  # a copy for an epoch, then from 0.2 to 0.8 in two
    teacher = ClampedSelfDistillation(momentum=0.2, momentum_end=0.8, momentum_epochs=2, copy_epochs=1)
    fit(module, teacher, stepped, max_epochs=5, accumulate_grad_batches=2)
    for epoch, now in stepped.weights:
        for name, value in now.items():
            m = 0.0 if name.endswith(("running_mean", "running_var", "tracked")) else momenta[epoch]
            start[name] = m * start[name] + (1 - m) * value if m else value
    assert {epoch for epoch, _ in stepped.weights} == {0, 1, 2, 3, 4}
    assert same_weights(teacher.teacher_weights, start, atol=1e-6)
    assert not same_weights(start, module.state_dict(), atol=1e-3)


def test_weights_of_the_loss_and_what_is_logged_are_those_of_the_call():
    heavy = torch.tensor([1.0, 2.0, 0.5])

    def weighted(module, batch):
        return F.binary_cross_entropy_with_logits(module(batch[0]), labels_of(batch), pos_weight=heavy)

    with torch.no_grad():
        start, x = Classifier(), next(iter(fit(Classifier(), max_steps=1).train_dataloader))
        z, y = start(x[0]), labels_of(x)
    bent = y + (torch.sigmoid(z) - y).clamp(-0.15, 0.15)
    wanted = (heavy * bent * F.softplus(-z) + (1 - bent) * F.softplus(z)).mean()
    wanted = wanted + F.binary_cross_entropy_with_logits(z, y, pos_weight=heavy)
    losses = StepLosses()
    trainer = fit(Classifier(weighted), ClampedSelfDistillation(), losses, max_steps=1)
    assert losses.losses[0] == pytest.approx(wanted.item(), rel=1e-5)
    logged = trainer.callback_metrics
    assert logged["reg/clamped_self_distillation/bent"].item() == pytest.approx(
        (bent - y).abs().mean().item(), rel=1e-5
    )
    outside = ((torch.sigmoid(z) - y).abs() > 0.15).float().mean().item()
    assert logged["reg/clamped_self_distillation/clamped"].item() == pytest.approx(outside)


def test_a_teacher_that_scores_other_candidates_is_refused():
    module = Scorer(lambda m, b: F.mse_loss(m.embed(m.vocabulary), torch.ones(len(m.embed(m.vocabulary)), 6)))
    with pytest.raises(MisconfigurationException, match="the teacher's step has predictions"):
        fit(module, CandidateDropout({}, layer="embed"), ClampedSelfDistillation(), loader=vocabulary())
