"""GroupDRO: the worst group counts; and the metrics of groups."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import AdjustedAverageAccuracy, GroupDRO, LossReweighting, Mixup, WorstGroupAccuracy
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import (
    group_ascent,
    group_draws,
    group_losses,
    group_membership,
    group_sample_weights,
    worst_group_weights,
)
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.conformance.kinds.metric import MetricCase
from tests.conformance.problems import SIZE
from tests.toys import QUIET, SAMPLES, Classifier, IndexRecorder, fit, make_loader, make_tensors

pytestmark = QUIET

HERE = "tests.reweighting.test_group_dro"


def thirds(size=SIZE):
    return torch.arange(size) % 3


def overlapping():
    """What two groups of one model and two of another would be; the first sample is in none."""
    right = torch.stack([torch.arange(SIZE) % 2 == 0, torch.arange(SIZE) < 9], 1)
    groups = torch.cat([right, ~right], 1)
    groups[0] = False
    return groups


def more_thirds():
    return thirds(40)


def everyone():
    return torch.zeros(40, dtype=torch.long)


def toy_thirds():
    return thirds(SAMPLES)


def toy_rare():
    return (torch.arange(SAMPLES) >= SAMPLES - 2).long()


def toy_everyone():
    return torch.zeros(SAMPLES, dtype=torch.long)


class GroupsByHand(Hand):
    """Losses group by group."""

    def begin(self, loop):
        self.q = [1 / 3] * 3

    def observe(self, loop, moment):
        self.groups = thirds()[moment.index].tolist()

    def weights(self, losses):
        members = [[i for i, group in enumerate(self.groups) if group == g] for g in range(3)]
        means = [sum(losses[i].item() for i in of) / len(of) if of else None for of in members]
        sizes = [more_thirds().tolist().count(g) for g in range(3)]
        up = [
            q if mean is None else q * math.exp(0.5 * (mean + 2 / math.sqrt(size)))
            for q, mean, size in zip(self.q, means, sizes, strict=True)
        ]
        self.q = [one / sum(up) for one in up]
        return torch.tensor([len(losses) * self.q[g] / len(members[g]) for g in self.groups])


def accuracies(batches, groups):
    found = []
    for group in range(groups):
        hits = [
            (row.argmax() if row.dim() else row).item() == y
            for b in batches
            for row, y, g in zip(b["preds"], b["target"].tolist(), b["groups"].tolist(), strict=True)
            if g == group
        ]
        found.append(sum(hits) / len(hits) if hits else math.nan)
    return found


def worst(batches):
    return min((a for a in accuracies(batches, 3) if not math.isnan(a)), default=math.nan)


def adjusted(batches):
    return sum(share * a for share, a in zip((0.75, 0.25), accuracies(batches, 2), strict=True))


def group_batches(groups):
    draw = torch.Generator().manual_seed(0)
    return [
        {
            "preds": torch.randn(12, 3, generator=draw),
            "target": torch.randint(3, (12,), generator=draw),
            "groups": torch.arange(12) % groups - (torch.arange(12) > 10) * 12,  # the last one has none
        }
        for _ in range(4)
    ]


TABLE = {"num_groups": 3, "groups": f"{HERE}.more_thirds", "index_key": "2"}
CASE = (
    Case(
        make=partial(GroupDRO, **TABLE, eta=0.5, generalization_adjustment=2.0),
        neutral=partial(GroupDRO, num_groups=1, groups=f"{HERE}.everyone", index_key="2"),
        by_hand=GroupsByHand,
        says=(
            f"3 groups from {HERE}.more_thirds by sample, eta=0.5, adjusted by 2",
            f"1 groups from {HERE}.everyone by sample, eta=0.01",
            "4 groups from entry '1', the worst alone, adjusted by 1",
            f"4 groups from {HERE}.overlapping by sample, eta=0.1",
            f"3 groups from {HERE}.thirds by sample, eta=0.01, drawn alike",
        ),
        also=["images", "regression", "tokens"],
        variants=[
            partial(GroupDRO, 4, group_key="1", mode="max", generalization_adjustment=1.0, group_counts=[4, 6, 6, 6]),
            partial(GroupDRO, 4, groups=f"{HERE}.overlapping", eta=0.1, loss="last"),
            partial(GroupDRO, 3, groups=f"{HERE}.thirds", draws="balanced", index_key="2"),
        ],
        invalid=[
            ({"num_groups": 0, "group_key": "1"}, "num_groups"),
            ({"num_groups": 2}, "group_key"),
            (TABLE | {"group_key": "1"}, "group_key"),
            (TABLE | {"eta": -0.1}, "eta"),
            (TABLE | {"generalization_adjustment": -0.1}, "generalization_adjustment"),
            (TABLE | {"group_counts": [1, 2, 3]}, "group_counts"),
            ({"num_groups": 2, "group_key": "1", "group_counts": [1]}, "group_counts"),
            ({"num_groups": 2, "group_key": "1", "group_counts": [1, 0]}, "group_counts"),
            ({"num_groups": 2, "group_key": "1", "generalization_adjustment": 1.0}, "group_counts"),
            ({"num_groups": 2, "groups": "f", "draws": "all"}, "draws"),
            ({"num_groups": 2, "group_key": "1", "draws": "balanced"}, "draws"),
        ],
    ),
    MetricCase(
        make=partial(WorstGroupAccuracy, num_groups=3),
        batches=group_batches(3),
        expected=worst,
        invalid=[({"num_groups": 0}, "num_groups")],
    ),
    MetricCase(
        make=partial(AdjustedAverageAccuracy, group_counts=[6, 2]),
        batches=group_batches(2),
        expected=adjusted,
        invalid=[({"group_counts": c}, "group_counts") for c in ([], [0, 0], [-1, 2])],
    ),
)


# -- the formulas -----------------------------------------------------------------------------------------------------


def test_losses_of_overlapping_groups():
    membership = group_membership(torch.tensor([[True, False, False], [True, True, False]]), 3)
    losses, counts = group_losses(torch.tensor([1.0, 3.0]), membership)
    assert losses.tolist() == [2.0, 3.0, 0.0]
    assert counts.tolist() == [2.0, 1.0, 0.0]
    weights = group_sample_weights(membership, torch.tensor([0.5, 0.25, 0.25]), counts)
    assert weights.tolist() == [0.25, 0.5]


def test_ascent_as_the_product_form_has_it():
    # DomainBed's GroupDRO (facebookresearch/DomainBed at b93c22a, domainbed/algorithms.py): q[m] *= exp(eta * loss),
    # then q /= q.sum(), with eta 0.01.
    log_q, q = torch.full((3,), 1 / 3).log(), [1 / 3] * 3
    for losses in ([2.0, 0.5, 1.0], [1.5, 0.25, 3.0]):
        log_q = group_ascent(log_q, torch.tensor(losses), torch.ones(3, dtype=torch.bool), 0.01)
        q = [one * math.exp(0.01 * loss) for one, loss in zip(q, losses, strict=True)]
        q = [one / sum(q) for one in q]
    assert log_q.exp().tolist() == pytest.approx(q, abs=1e-6)


def test_an_absent_group_keeps_its_share_of_the_rest():
    log_q = group_ascent(torch.tensor([0.5, 0.5]).log(), torch.tensor([9.0, 0.0]), torch.tensor([False, True]), 1.0)
    assert log_q.exp().tolist() == pytest.approx([0.5, 0.5])
    assert worst_group_weights(torch.tensor([9.0, 1.0]), torch.tensor([False, True])).tolist() == [0.0, 1.0]
    assert worst_group_weights(torch.tensor([9.0]), torch.tensor([False])).tolist() == [0.0]


def test_each_group_is_drawn_as_often_as_another():
    membership = torch.zeros(100, 3)
    membership[:90, 0] = membership[85:95, 1] = membership[95:99, 2] = 1  # five are in two, the last one in none
    drawn = group_draws(membership, 60_000, torch.Generator().manual_seed(0)).bincount(minlength=100) / 60_000
    expected = torch.zeros(100)
    expected[:90] += 1 / 270
    expected[85:95] += 1 / 30
    expected[95:99] += 1 / 12
    torch.testing.assert_close(drawn, expected, atol=0.004, rtol=0.0)  # 3.5 deviations of the largest
    assert drawn[99] == 0
    with pytest.raises(ValueError, match="group 1 has no sample to draw"):
        group_draws(torch.tensor([[1.0, 0.0]]), 4, torch.Generator())
    assert group_draws(membership, 0, torch.Generator()).shape == (0,)


@pytest.mark.parametrize("groups", [torch.zeros(3), torch.zeros(3, 2, dtype=torch.bool), torch.zeros(3).bool()])
def test_groups_of_another_form_are_refused(groups):
    with pytest.raises(ValueError, match=r"whole numbers \(B,\), or bool \(B, 3\)"):
        group_membership(groups, 3)


# -- training ---------------------------------------------------------------------------------------------------------


def test_the_worst_group_alone_has_gradient():
    def worst_step(module, batch):
        x, y = batch
        losses = F.cross_entropy(module(x), y, reduction="none")
        return torch.stack([losses[y == g].mean() for g in range(3) if (y == g).any()]).max()

    ours, by_hand = Classifier(), Classifier(worst_step)
    fit(ours, GroupDRO(3, group_key="1", mode="max"))
    fit(by_hand)
    for one, two in zip(ours.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)  # another order of sums


def test_class_weights_and_ignored_samples_leave_the_mean_of_the_group():
    weight = torch.tensor([1.0, 2.0, 3.0])

    def masked(module, batch):
        return F.cross_entropy(module(batch[0]), batch[1], weight=weight, ignore_index=2)

    def by_hand(module, batch):
        x, y = batch
        kept = y != 2
        return F.cross_entropy(module(x[kept]), y[kept])  # one group; its mean is over samples, not over class weights

    ours, plain = Classifier(masked), Classifier(by_hand)
    fit(ours, GroupDRO(1, groups=f"{HERE}.toy_everyone"))
    fit(plain)
    for one, two in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)  # another order of sums


def test_a_smaller_group_is_the_worst_where_losses_are_alike():
    dro = GroupDRO(2, group_key="1", mode="max", generalization_adjustment=1.0, group_counts=[100, 1])
    assert dro._weights(torch.tensor([1.5, 1.0]), torch.ones(2)).tolist() == [0.0, 1.0]  # 1.6 and 2


def test_a_loss_that_is_not_finite_moves_nothing():
    dro = GroupDRO(2, group_key="1", eta=1.0)
    assert dro._weights(torch.tensor([math.inf, 0.0]), torch.ones(2)).tolist() == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"num_groups": 2, "group_key": "1"}, "there is a group 2, and num_groups=2"),
        ({"num_groups": 2, "group_key": "0"}, "the entry '0': groups must be whole numbers"),
        ({"num_groups": 3, "groups": f"{HERE}.thirds"}, f"of {SIZE} samples, the training dataset has {SAMPLES}"),
        ({"num_groups": 4, "groups": f"{HERE}.toy_thirds"}, r"no training sample is of group \[3\]"),
        ({"num_groups": 2, "groups": f"{HERE}.toy_thirds"}, "there is a group 2"),
    ],
)
def test_misuse_is_told_at_the_first_step(arguments, sentence):
    with pytest.raises(MisconfigurationException, match=sentence):
        fit(Classifier(), GroupDRO(**arguments), max_epochs=1)


def test_a_group_that_no_batch_has_is_told_once():
    x, y = make_tensors()
    loader = DataLoader(TensorDataset(x, y % 2), 4)
    said = r"^GroupDRO: no sample of an epoch was of group \[2\] by .*'1', .* Leave it out"
    with pytest.warns(UserWarning, match=said) as caught:
        fit(Classifier(), GroupDRO(3, group_key="1"), loader=loader, max_epochs=2)
    assert sum("no sample of an epoch" in str(one.message) for one in caught) == 1
    fit(Classifier(), GroupDRO(2, group_key="1"), loader=loader)  # a warning is an error


def test_groups_of_another_number_than_samples_are_told():
    def collate(rows):
        x, y = (torch.stack(column) for column in zip(*rows, strict=True))
        return x, y, torch.zeros(1, dtype=torch.long)

    with pytest.raises(MisconfigurationException, match=r"the entry '2' has 1 groups, and .* has 8 samples"):
        fit(
            Classifier(lambda module, batch: F.cross_entropy(module(batch[0]), batch[1])),
            GroupDRO(3, group_key="2"),
            loader=make_loader(collate_fn=collate),
            max_epochs=1,
        )


@pytest.mark.parametrize("other", [LossReweighting(), Mixup()])
def test_what_does_not_stand_beside_it(other):
    with pytest.raises(MisconfigurationException, match="GroupDRO"):
        fit(Classifier(), GroupDRO(3, group_key="1"), other, max_epochs=1)


def test_epochs_of_balanced_groups():
    dro, recorder = GroupDRO(2, groups=f"{HERE}.toy_rare", draws="balanced", seed=3), IndexRecorder()
    fit(Classifier(), dro, recorder, max_epochs=20)
    drawn = torch.tensor([index for batch in recorder.indices for index in batch])
    membership = group_membership(toy_rare(), 2)
    for epoch in range(2):
        wanted = group_draws(membership, SAMPLES, dro.draw_generator(epoch))
        assert drawn.view(20, SAMPLES)[epoch].tolist() == wanted.tolist()
    assert toy_rare()[drawn].float().mean().item() == pytest.approx(0.5, abs=0.05)  # 640 draws, where 2 of 32 are rare
    with pytest.raises(MisconfigurationException, match=f"of {SIZE} samples, the training dataset has {SAMPLES}"):
        fit(Classifier(), GroupDRO(3, groups=f"{HERE}.thirds", draws="balanced", index_key="2"))


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_by_numbers():
    preds, target, groups = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, -1])
    lowest, average = WorstGroupAccuracy(3), AdjustedAverageAccuracy([3, 1, 0])
    assert lowest(preds, target, groups) == 0.0
    assert average(preds, target, groups) == 0.75
    assert AdjustedAverageAccuracy([3, 1, 1])(preds, target, groups).isnan()  # a group that nobody has tested
    lowest.reset()
    assert lowest(preds[3:], target[3:], groups[3:]).isnan()  # nothing was tested


def test_metrics_refuse_what_they_cannot_read():
    metric = WorstGroupAccuracy(2)
    with pytest.raises(ValueError, match=r"Write `logits > 0`"):
        metric.update(torch.rand(3), torch.ones(3), torch.zeros(3))
    metric.update(torch.ones(3).long(), torch.ones(3).long(), torch.tensor([0, 1, 7]))
    with pytest.raises(ValueError, match="1 samples are of groups above 1"):
        metric.compute()
