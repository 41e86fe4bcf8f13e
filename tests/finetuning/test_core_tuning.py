"""CoreTuning: cross-entropy on mixed features, and a contrast with hard pairs that are made by mixing."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from lightning_reg import CoreTuning, DRTune, Mixup, NestedDropout
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import (
    MixedRows,
    focal_contrastive_loss,
    foreign_rows,
    hard_pairs,
    mix_pairs,
    positive_pairs,
    supervised_contrastive_loss,
    two_label_losses,
)
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.conformance.problems import KINDS, Problem
from tests.toys import CLASSES, QUIET, TWO_RANKS, Classifier, StepLosses, fit, make_loader, make_tensors, same_weights

pytestmark = QUIET


def pairs_by_hand(h, y, draws):
    """Hard positive, hard negative and stranger of each sample, one after the other."""
    unit, found = [row / row.norm() for row in h], []
    for i in range(len(h)):
        mates = [j for j in range(len(h)) if y[j] == y[i] and j != i]
        strangers = [j for j in range(len(h)) if y[j] != y[i]]
        farthest = min(mates, key=lambda j: float(unit[i] @ unit[j]), default=i)
        nearest = max(strangers, key=lambda j: float(unit[i] @ unit[j]), default=i)
        found.append((farthest, nearest, strangers[int(draws[i] * len(strangers))] if strangers else i))
    return found


def rows_by_hand(h, y, classes, lam, mu, draws):
    """Features and soft labels of 3 n rows, with gradient."""
    one_hot, rows, soft = torch.eye(classes), [[], [], []], [[], [], []]
    for i, (mate, near, stranger) in enumerate(pairs_by_hand(h.detach(), y, draws)):
        for k, (a, i_a, i_b) in enumerate([(1.0, i, i), (1 - mu[i], i, stranger), (lam[i], mate, near)]):
            rows[k].append(a * h[i_a] + (1 - a) * h[i_b])
            soft[k].append(a * one_hot[y[i_a]] + (1 - a) * one_hot[y[i_b]])
    return torch.stack([row for k in range(3) for row in rows[k]]), torch.stack([y for k in range(3) for y in soft[k]])


def contrast_by_hand(z, groups, temperature):
    z, losses = z / z.norm(dim=1, keepdim=True), []
    for i in range(len(z)):
        others = [k for k in range(len(z)) if k != i]
        log_p = dict(zip(others, (z[others] @ z[i] / temperature).log_softmax(0), strict=True))
        mates = [j for j in others if groups[j] == groups[i]]
        if mates:
            losses.append(-sum((1 - log_p[j].exp()) * log_p[j] for j in mates) / len(mates))
    return sum(losses) / len(losses)


class CoreByHand(Hand):
    def begin(self, loop):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.technique.derived_seed("own modules"))
            self.projection = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 6))

    def own(self):
        return list(self.projection.parameters())

    def _rows(self, moment):
        h, generator = moment.features["net.act_body"], moment.draws(self.technique)
        seed = int(torch.randint(2**62, (), generator=generator))
        lam, mu = np.random.default_rng(seed).beta(1.0, 1.0, 2 * len(h)).reshape(2, -1)
        lam, mu = torch.from_numpy(lam).float(), torch.from_numpy(mu).float().clamp(min=0.8)
        return rows_by_hand(h, moment.y.tolist(), 4, lam, mu, torch.rand(len(h), generator=generator))

    def losses(self, output, moment):
        rows, soft = self._rows(moment)
        weight, bias = (moment.weights[f"net.head.{name}"] for name in ("weight", "bias"))
        return -((rows @ weight.T + bias).log_softmax(1) * soft).sum(1).view(3, -1).mean(0)

    def term(self, loop, moment):
        rows, soft = self._rows(moment)
        return 0.3 * contrast_by_hand(self.projection(rows), soft.argmax(1).tolist(), 0.5)


def labelled(size):
    x = torch.randn(size, 8)
    return x, (x[:, :4] + torch.randn(size, 4)).argmax(1)


LAYERS = {"layer": "net.act_body", "head": "net.head"}
SMALL = {**LAYERS, "eta": 0.3, "temperature": 0.5, "projection_size": 6, "seed": 1}  # roundings of seed 0: 3.3 %
CASE = Case(
    make=partial(CoreTuning, **SMALL),
    neutral=partial(CoreTuning, **LAYERS, eta=0.0, smooth_classifier=False),
    by_hand=CoreByHand,
    says=(
        "net.act_body to net.head, eta=0.3, smooth classifier, as paper",
        "eta=0, smooth_classifier=False: inactive",
        "net.act_body to net.head, eta=0.1, smooth classifier, as released",
        "net.act_body to net.head, eta=1, as paper",
        "net.act_body to net.head, eta=0, smooth classifier, as paper",
    ),
    data=Problem(KINDS["classification"].net, labelled, F.cross_entropy, serves=["classification"]),
    variants=[
        partial(CoreTuning, **{**SMALL, "eta": 0.1}, variant="released", focal=False),
        partial(CoreTuning, **LAYERS, smooth_classifier=False, gather=False, alpha=0.5),
        partial(CoreTuning, **LAYERS, eta=0.0, min_share=1.0),
    ],
    invalid=[
        ({**LAYERS, "eta": -0.1}, "eta"),
        ({**LAYERS, "alpha": 0.0}, "alpha"),
        ({**LAYERS, "min_share": 1.1}, "min_share"),
        ({**LAYERS, "min_share": -0.1}, "min_share"),
        ({**LAYERS, "temperature": 0.0}, "temperature"),
        ({**LAYERS, "projection_size": 0}, "projection_size"),
        ({**LAYERS, "focal": 1}, "focal"),
        ({**LAYERS, "smooth_classifier": 1}, "smooth_classifier"),
        ({**LAYERS, "gather": 1}, "gather"),
        ({**LAYERS, "variant": "code"}, "variant"),
        ({**LAYERS, "pooling": "max"}, "pooling"),
        ({**LAYERS, "lr_factor": -1.0}, "lr_factor"),
        ({**LAYERS, "weight_decay": -1.0}, "weight_decay"),
        ({**LAYERS, "own_optimizer": -1}, "own_optimizer"),
    ],
)
TOY = {"layer": "net.2", "head": "net.3", "projection_size": 4}


# -- pairs ------------------------------------------------------------------------------------------------------------

# Directions in a plane, by their angles in degrees; the class of 5 has no other sample.
ANGLES, LABELS = torch.tensor([0.0, 10.0, 80.0, 20.0, 130.0, 200.0]), torch.tensor([0, 0, 0, 1, 1, 2])
SIX = torch.stack([ANGLES.deg2rad().cos(), ANGLES.deg2rad().sin()], 1) * torch.tensor([1.0, 5, 2, 3, 1, 4])[:, None]


def test_hard_pairs_of_six_samples():
    hard, near = hard_pairs(SIX, LABELS)
    assert hard.tolist() == [2, 2, 0, 4, 3, 5]
    assert near.tolist() == [3, 3, 4, 1, 2, 4]
    alone, strangers = hard_pairs(SIX[:3], torch.zeros(3, dtype=torch.long))
    assert strangers.tolist() == [0, 1, 2]
    assert alone.tolist() == [2, 2, 0]


def test_a_sample_of_no_class_is_nobodys_pair_and_stands_in_no_contrast():
    labels = LABELS.clone()
    labels[[2, 3]] = -100
    hard, near = hard_pairs(SIX, labels)
    assert hard.tolist()[:2] == [1, 0]
    assert near.tolist()[:2] == [4, 4]
    assert not {2, 3} & {*foreign_rows(labels, torch.linspace(0, 0.99, 6)).tolist()}
    keys = labels >= 0
    positive = (labels[:, None] == labels) & ~torch.eye(6, dtype=torch.bool)
    kept = F.normalize(SIX)[keys]
    wanted = contrast_by_hand(kept, labels[keys].tolist(), 0.3)
    assert focal_contrastive_loss(F.normalize(SIX), positive, 0.3, keys=keys).item() == pytest.approx(wanted.item())


def test_strangers_are_all_equally_probable():
    draws = (torch.arange(30) + 0.5) / 30
    partners = torch.stack([foreign_rows(LABELS, draw.repeat(6)) for draw in draws])
    for i, label in enumerate(LABELS):
        strangers = (label != LABELS).nonzero()[:, 0].tolist()
        counts = [(partners[:, i] == j).sum().item() for j in strangers]
        assert sum(counts) == 30
        assert max(counts) - min(counts) <= 1
    assert foreign_rows(torch.zeros(3).long(), torch.rand(3)).tolist() == [0, 1, 2]


def test_the_released_rule_finds_no_positive_among_features_that_are_not_negative():
    generator, kinds = torch.Generator().manual_seed(0), np.zeros(3)
    for _ in range(20):
        features, labels = (
            torch.randn(64, 16, generator=generator).relu(),
            torch.randint(10, (64,), generator=generator),
        )
        hard = hard_pairs(features, labels, released=True)[0]
        own = hard == torch.arange(64)
        same = labels[hard] == labels
        kinds += [own.sum().item(), (~same).sum().item(), (same & ~own).sum().item()]
        right = hard_pairs(features, labels)[0]
        assert (labels[right] == labels).all()
    shares = kinds / kinds.sum()
    assert shares == pytest.approx([0.91, 0.09, 0.0], abs=0.02)  # of 1280 anchors; the card has measured 91, 9, 0


# -- the authors' figures ---------------------------------------------------------------------------------------------


def points(rows, columns, shift, scale):
    return torch.tensor(
        [
            [
                ((7 * (i + 1) * (c + 2) + shift * c * c + 3 * i * i * (c + 1)) % 23 - 11.0) / scale
                for c in range(columns)
            ]
            for i in range(rows)
        ]
    )


H, Y = points(12, 5, 3, 6), torch.tensor([0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 3])
HEAD, INNER, OUTER = points(4, 5, 1, 7), points(5, 5, 2, 9), points(6, 5, 4, 8)
ORDER = torch.tensor([3, 5, 8, 1, 0, 11, 2, 4, 9, 10, 7, 6])
NEGATIVE = torch.tensor([0.1, 0.85, 0.5, 0.95, 0.3, 0.8, 0.99, 0.2, 0.6, 0.9, 0.4, 0.7]).clamp(min=0.8)
POSITIVE = torch.tensor([0.3, 0.6, 0.05, 0.9, 0.45, 0.75, 0.15, 0.55, 0.8, 0.25, 0.65, 0.35])
# Vanint/Core-tuning @ f70e1bf, Core-tuning.py, `feature_mixup` and `focal_SupConLoss(mixup=True)` on these tensors,
# with `ORDER` for its shuffle and the two rows of shares for its draws, its soft cross-entropy, and a projection
# without biases: contrast, cross-entropy, two mixed rows, the gradient of cross-entropy + 0.1 contrast at two samples.
AUTHORS = {
    "signed": (
        0.6989011168479919,
        2.7037668228149414,
        [1.3416666984558105, -1.283333420753479, 0.3500000238418579, -0.27500003576278687, -0.4749999940395355],
        [1.125, -0.4583333134651184, -1.6166666746139526, -1.2000000476837158, -0.3583333492279053],
        [
            -0.001075412379577756,
            -0.07080719619989395,
            0.003434675745666027,
            -0.045448336750268936,
            0.009123777970671654,
        ],
        [0.017671067267656326, -0.010857153683900833, 0.045627571642398834, -0.07420419901609421, 0.07099562883377075],
    ),
    "not_negative": (
        0.8877534866333008,
        1.9510154724121094,
        [1.4166666269302368, 0.0, 0.42500001192092896, 0.1499999761581421, 0.0],
        [1.125, 0.25, 0.0, 0.07500000298023224, 0.0],
        [
            -0.007702728267759085,
            -0.01195954903960228,
            0.00035476405173540115,
            -0.030022453516721725,
            0.008927227929234505,
        ],
        [0.026469655334949493, 0.06723565608263016, 0.053824301809072495, -0.048000503331422806, 0.08129677176475525],
    ),
}


@pytest.mark.parametrize("kind", AUTHORS)
def test_the_released_variant_equals_the_authors_code(kind):
    features = (H if kind == "signed" else H.relu()).clone().requires_grad_()
    pairs = hard_pairs(features, Y, released=True)
    mixed = mix_pairs(features, Y, pairs, ORDER, POSITIVE, NEGATIVE, detach=True)
    projected = F.normalize((mixed.features @ INNER.T).relu() @ OUTER.T)
    contrast = focal_contrastive_loss(projected, positive_pairs(mixed, released=True), per_positive=False)
    entropy = two_label_losses(mixed.features @ HEAD.T, mixed).mean()
    gradient = torch.autograd.grad(entropy + 0.1 * contrast, features)[0]
    found = contrast.item(), entropy.item(), mixed.features[13], mixed.features[30], gradient[0], gradient[5]
    for one, theirs in zip(found, AUTHORS[kind], strict=True):
        torch.testing.assert_close(torch.as_tensor(one), torch.tensor(theirs), atol=1e-6, rtol=0.0)


def test_the_contrast_on_class_numbers_equals_the_authors_code():
    # The same file, `focal_SupConLoss(features, labels)` on unit rows of `H` and the labels `Y`.
    positive = (Y[:, None] == Y) & ~torch.eye(12, dtype=torch.bool)
    value = focal_contrastive_loss(F.normalize(H), positive, per_positive=False)
    assert value.item() == pytest.approx(1.4334626197814941, abs=1e-6)


# -- the losses -------------------------------------------------------------------------------------------------------


def test_without_focus_it_is_the_supervised_contrast():
    positive = (Y[:, None] == Y) & ~torch.eye(12, dtype=torch.bool)
    rows = F.normalize(H)
    wanted = supervised_contrastive_loss(H, Y, temperature=0.2)
    value = focal_contrastive_loss(rows, positive, 0.2, focal=False)
    assert value.item() == pytest.approx(wanted.item(), abs=1e-6)
    focal = focal_contrastive_loss(rows, positive, 0.2)
    assert focal.item() == pytest.approx(contrast_by_hand(H, Y.tolist(), 0.2).item(), abs=1e-6)


def test_anchors_without_a_positive_are_left_out_and_none_at_all_is_zero():
    rows = F.normalize(H[:5]).requires_grad_()
    positive = torch.zeros(5, 5, dtype=torch.bool)
    value = focal_contrastive_loss(rows, positive)
    value.backward()
    assert value.item() == 0
    assert not rows.grad.any()
    positive[0, 4] = True
    log_p = (rows[0] @ rows[1:].T / 0.07).log_softmax(0)[3]
    torch.testing.assert_close(focal_contrastive_loss(rows, positive), -(1 - log_p.exp()) * log_p)
    poles = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).repeat(4, 1)
    same = (poles @ poles.T > 0) & ~torch.eye(8, dtype=torch.bool)
    assert focal_contrastive_loss(poles[:4], same[:4, :4]).item() == pytest.approx(0.0, abs=1e-6)


def test_rows_of_one_class_have_the_plain_cross_entropy_and_shares_of_one_are_the_sources():
    mixed = mix_pairs(H, Y, hard_pairs(H, Y), ORDER, torch.ones(12), torch.ones(12))
    hard = hard_pairs(H, Y)[0]
    assert torch.equal(mixed.features, torch.cat([H, H[ORDER], H[hard]]))
    labels = torch.cat([Y, Y[ORDER], Y[hard]])
    wanted = F.cross_entropy(mixed.features @ HEAD.T, labels, reduction="none")
    torch.testing.assert_close(two_label_losses(mixed.features @ HEAD.T, mixed), wanted)
    assert torch.equal(positive_pairs(mixed), (labels[:, None] == labels) & ~torch.eye(36, dtype=torch.bool))


def test_what_is_a_positive_in_either_variant():
    first, second = torch.tensor([0, 0, 1, 1, 1, 0]), torch.tensor([0, 1, 0, 0, 1, 2])
    mixed = MixedRows(torch.zeros(6, 1), first, second, torch.tensor([0.3, 0.75, 0.25, 0.4, 0.1, 0.5]))
    groups = [0, 0, 0, 0, 1, 0]
    wanted = [[one == two and i != j for j, two in enumerate(groups)] for i, one in enumerate(groups)]
    assert positive_pairs(mixed).tolist() == wanted
    equal = positive_pairs(mixed, released=True)  # a label of .75 of 0 and .25 of 1 in both orders
    assert equal.nonzero().tolist() == [[1, 2], [2, 1]]


# -- in a fit ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "reaches"), [("paper", True), ("released", False)])
def test_the_encoder_learns_from_the_samples_themselves_in_the_paper_only(variant, reaches):
    """With a share of 1 and a class without companions the mixed rows are others', or the row itself."""
    features = H[:1].clone().requires_grad_()
    mixed = mix_pairs(features, Y[:1], (torch.tensor([0]),) * 2, torch.tensor([0]), torch.ones(1), torch.ones(1),
                      detach=variant == "released")  # fmt: skip
    two_label_losses(mixed.features[:1] @ HEAD.T, mixed._replace(first=Y[:1], second=Y[:1], share=torch.ones(1))).sum()
    assert mixed.features[:1].requires_grad  # as part of one tensor
    gradient = torch.autograd.grad(mixed.features[0].sum(), features)[0]
    assert gradient.any().item() == reaches


def test_maps_of_labels_are_refused_in_words():
    class Segments(Classifier):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, CLASSES, 1))

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

    maps = make_loader(TensorDataset(torch.rand(8, 1, 3, 3), torch.randint(CLASSES, (8, 3, 3))), 4)
    with pytest.raises(MisconfigurationException, match="must name the linear layer that gets the features"):
        fit(Segments(), CoreTuning("net.0", "net.1"), loader=maps)

    class Pixels(Segments):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, CLASSES))

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0].squeeze(1)).movedim(-1, 1), batch[1][:, 0])

    with pytest.raises(MisconfigurationException, match="There is no per-pixel form of it here"):
        fit(Pixels(), CoreTuning("net.0", "net.1"), loader=maps)


def test_smoothed_labels_are_refused_where_labels_are_mixed():
    def step(module, batch):
        return F.cross_entropy(module(batch[0]), batch[1], label_smoothing=0.1)

    with pytest.raises(MisconfigurationException, match="has `label_smoothing`, and the smooth classifier's labels"):
        fit(Classifier(step=step), CoreTuning(**TOY))
    fit(Classifier(step=step), CoreTuning(**TOY, smooth_classifier=False), max_epochs=1)


def test_mixed_batches_are_refused():
    with pytest.raises(MisconfigurationException, match="CoreTuning"):
        fit(Classifier(), Mixup(), CoreTuning(**TOY))


def test_what_changes_the_inputs_of_the_head_is_refused_where_the_head_gets_mixed_rows():
    with pytest.raises(MisconfigurationException, match=r"the head 'net.3' gets mixed features"):
        fit(Classifier(), NestedDropout("net.3", eta=2), CoreTuning(**TOY))
    fit(Classifier(), NestedDropout("net.3", eta=2, k="all"), CoreTuning(**TOY, smooth_classifier=False), max_epochs=1)
    fit(Classifier(), NestedDropout("net.0", eta=2, k="all"), CoreTuning(**TOY), max_epochs=1)


def test_beside_dr_tune_each_does_its_own():
    def one(*techniques, **kwargs):
        model, losses = Classifier(lr=0.0), StepLosses()
        fit(model, *techniques, losses, max_epochs=1, **kwargs)
        return torch.tensor(losses.losses)

    plain, core = one(), one(CoreTuning(**TOY))
    dr, both = one(DRTune("net.2", "net.3")), one(DRTune("net.2", "net.3"), CoreTuning(**TOY))
    torch.testing.assert_close(both - plain, (dr - plain) + (core - plain))
    assert ((dr - plain).abs() > 1e-3).all()
    assert ((core - plain).abs() > 1e-3).all()
    model, start = Classifier(lr=0.1), Classifier(lr=0.1)
    fit(model, CoreTuning(**TOY), DRTune("net.2", "net.3"), max_epochs=1)
    assert not same_weights(model, start)


def losses_on_ranks():
    part = slice(torch.distributed.get_rank(), None, 2)
    data = TensorDataset(*(tensor[part] for tensor in make_tensors()))
    model, losses, technique = Classifier(lr=0.5), StepLosses(), CoreTuning(**TOY)
    fit(model, technique, losses, loader=make_loader(data, 4), max_epochs=1, use_distributed_sampler=False, **TWO_RANKS)
    return losses.losses, model.state_dict(), technique.own["projection"].state_dict()


def test_two_ranks_train_as_one_on_the_joined_batch(two_processes):
    model, losses, technique = Classifier(lr=0.5), StepLosses(), CoreTuning(**TOY)
    fit(model, technique, losses, max_epochs=1)
    ranks = two_processes.run(losses_on_ranks)
    for _, weights, projection in ranks:
        assert same_weights(weights, model.state_dict(), atol=1e-5)  # sums in another order
        assert same_weights(projection, technique.own["projection"].state_dict(), atol=1e-5)
    means = torch.tensor([one for one, _, _ in ranks]).mean(0)
    torch.testing.assert_close(means, torch.tensor(losses.losses), atol=1e-5, rtol=1e-5)
