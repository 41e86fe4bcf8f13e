"""Further views of a batch: they pass the network with it, and every loss stays the batch's own."""

from collections import UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_reg.engine.data.entries import replace_entry
from lightning_reg.engine.data.views import Views
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.technique import BatchTechnique, LossTechnique
from tests.toys import (
    QUIET,
    BatchShift,
    Classifier,
    IndexRecorder,
    LossRecorder,
    Penalty,
    StepLosses,
    Term,
    WeightsByLabel,
    _Toy,
    fit,
    make_loader,
    make_tensors,
    same_weights,
    weights_of,
)

pytestmark = QUIET


class Shifted(_Toy, BatchTechnique, LossTechnique):
    """Adds ``count`` views, each shifted further, and notes what the network made of them."""

    def __init__(self, count=2, **kwargs):
        super().__init__(**kwargs)
        self.count, self.seen, self.inputs = count, [], []

    @override
    def extra_views(self, batch, step):
        return [replace_entry(batch, "0", batch[0] + 1 + view) for view in range(self.count)]

    @override
    def loss_term(self, call):
        self.seen.append(call.views.of(self, call.whole_output, with_batch=False).detach())
        self.inputs.append(call.views.of(self, call.step.views.batch[0], with_batch=True))


class Relabelled(Shifted):
    """Its views have other labels, and other weights of their rows."""

    @override
    def extra_views(self, batch, step):
        return [[batch[0] + 1 + view, (batch[1] + 1 + view) % 3] for view in range(self.count)]

    @override
    def loss_term(self, call):
        return torch.stack([view.learned_losses for view in call.of_views(self)]).sum(0)


def ones(y):
    return F.one_hot(y, 3).float()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_users_loss_of_each_view_has_what_the_view_brought(reduction):
    def loss(module, x, y):
        weight = 1.0 + y[:, None].expand(-1, 3)  # of rows
        loss = F.binary_cross_entropy_with_logits(module(x), ones(y), weight=weight, reduction=reduction)
        return loss.mean()

    def by_hand(module, batch):
        x, y = batch
        return loss(module, x, y) + loss(module, x + 1, (y + 1) % 3) + loss(module, x + 2, (y + 2) % 3)

    hand, ours = Classifier(step=by_hand), Classifier(step=lambda module, batch: loss(module, *batch))
    fit(hand)
    fit(ours, Shifted(count=1, name="other"), Relabelled())
    assert same_weights(hand, ours, atol=1e-6)


def test_without_views_there_is_no_loss_of_any():
    seen = []

    class Asks(LossRecorder):
        def loss_term(self, call):
            seen.append(list(call.of_views(self)))

    fit(Classifier(), Asks(), max_epochs=1)
    assert seen[0] == []


@pytest.mark.parametrize("others", [[], [WeightsByLabel], [Term, BatchShift], [LossRecorder, Penalty]])
def test_views_that_nobody_uses_change_nothing(others):
    with_views, without = Classifier(), Classifier()
    fit(with_views, Shifted(), *(other() for other in others))
    fit(without, *(other() for other in others))
    assert same_weights(with_views, without, atol=1e-6)  # float32: rows of a larger matrix product
    assert not same_weights(without, Classifier(), atol=1e-2)


def test_each_technique_gets_the_rows_of_its_own_views():
    model, one, two = Classifier(lr=0.0), Shifted(count=1, name="one"), Shifted(count=2, name="two")
    x = make_tensors()[0][:8]
    fit(model, one, two, BatchShift(), max_epochs=1)
    # The batch is what its transforms made of it, whatever their place among the callbacks.
    batch = x + 0.5
    torch.testing.assert_close(one.inputs[0], torch.cat([batch, batch + 1]))
    torch.testing.assert_close(two.inputs[0], torch.cat([batch, batch + 1, batch + 2]))
    torch.testing.assert_close(one.seen[0], model(batch + 1))
    torch.testing.assert_close(two.seen[0], model(torch.cat([batch + 1, batch + 2])))


def test_losses_and_indices_per_sample_are_the_batchs():
    recorders = LossRecorder(), IndexRecorder()
    alone = LossRecorder()
    fit(Classifier(), Shifted(), *recorders)
    fit(Classifier(), alone)
    assert [len(losses) for losses in recorders[0].losses] == [8] * 8
    torch.testing.assert_close(recorders[0].losses, alone.losses, atol=1e-6, rtol=1e-6)
    assert [len(indices) for indices in recorders[1].indices] == [8] * 8


def reduced(reduction, weighted=False):
    def step(module, batch):
        x, y = batch
        loss = F.cross_entropy(module(x), y, reduction=reduction)
        if weighted:
            return (loss * (1 + y)).sum() / (1 + y).sum()
        return loss / len(y) if reduction == "sum" else loss.mean()

    return step


@pytest.mark.parametrize(
    "step",
    [reduced("mean"), reduced("sum"), reduced("none"), reduced("none", weighted=True)],
    ids=["mean", "sum", "none", "weighted"],
)
@pytest.mark.parametrize("choice", [None, "last"])
def test_every_reduction_is_that_of_the_batch(step, choice):
    runs = []
    for techniques in ([Shifted(loss=choice)], []):
        losses, module = StepLosses(), Classifier(step=step)
        fit(module, *techniques, losses)
        runs.append((losses.losses, weights_of(module)))
    assert runs[0][0] == pytest.approx(runs[1][0], abs=1e-6)
    assert same_weights(runs[0][1], runs[1][1], atol=1e-6)


def test_what_is_logged_is_the_batchs():
    trainers = [fit(Classifier(), *techniques, Term()) for techniques in ([Shifted()], [])]
    logged = [{name: value.item() for name, value in t.logged_metrics.items()} for t in trainers]
    assert logged[0] == pytest.approx(logged[1], abs=1e-6)


class Copied(Shifted):
    @override
    def extra_views(self, batch, step):
        return [batch]


def test_views_are_made_for_one_loader_of_batches_of_known_size():
    loaders = {"a": make_loader(), "b": make_loader()}
    module = Classifier(step=lambda module, batch: F.cross_entropy(module(batch["a"][0]), batch["a"][1]))
    with pytest.raises(MisconfigurationException, match="Copied adds views to the batch, but the batch comes from sev"):
        fit(module, Copied(), loader=loaders)
    unknown = DataLoader(TensorDataset(torch.rand(4, 6)), 4, collate_fn=lambda rows: [[1.0], "text"])
    with pytest.raises(MisconfigurationException, match="but the batch has no number of samples that is known"):
        fit(Classifier(), Copied(), loader=unknown)


def test_a_call_without_a_row_for_each_view_is_refused_where_it_is_used():
    def step(module, batch):
        return F.cross_entropy(module(batch[0])[:5], batch[1][:5])

    with pytest.raises(
        MisconfigurationException, match=r"F.cross_entropy.* has no row for each sample of the batch and"
    ):
        fit(Classifier(step=step), Shifted())


def test_calls_that_are_not_about_the_batch_stay_as_they_are():
    def step(module, batch):
        pull = F.mse_loss(module.net[0].weight, torch.zeros(8, 6), reduction="sum")  # one view: 8 = 2 * 4 rows
        return F.cross_entropy(module(batch[0]), batch[1]) + 0.01 * pull

    one, two = Classifier(step=step), Classifier(step=step)
    fit(one, Shifted(count=1, loss="cross_entropy"), loader=make_loader(batch_size=4))
    fit(two, loader=make_loader(batch_size=4))
    assert same_weights(one, two, atol=1e-6)


# -- structures -------------------------------------------------------------------------------------------------------


Point = namedtuple("Point", "x y")


@dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    rest: dict


X, Y = torch.arange(6.0).reshape(3, 2), torch.tensor([7, 8, 9])


def joined(batch, *others):
    return Views(batch, 3, {Shifted(): list(others)}).batch


def test_joins_every_structure_of_batch():
    tuple_ = joined((X, Y), (X + 1, Y))
    assert type(tuple_) is tuple
    assert torch.equal(tuple_[0], torch.cat([X, X + 1]))
    assert tuple_[1].tolist() == [7, 8, 9, 7, 8, 9]
    point = joined(Point(X, Y), Point(X, Y))
    assert type(point) is Point
    assert len(point.x) == 6
    mapping = joined(
        UserDict(x=X, deep=[Y, "text"], names=["a", "b", "c"], scale=torch.tensor(2.0)),
        UserDict(x=X, deep=[Y, "text"], names=["a", "b", "c"], scale=torch.tensor(2.0)),
    )
    assert type(mapping) is UserDict
    assert mapping["deep"][0].tolist() == [7, 8, 9, 7, 8, 9]
    assert mapping["deep"][1] == "text"
    assert mapping["names"] == ["a", "b", "c"] * 2
    assert mapping["scale"].shape == ()
    frozen = Frozen(X, {"y": Y})
    both = joined(frozen, frozen)
    assert type(both) is Frozen
    assert both.rest["y"].tolist() == [7, 8, 9, 7, 8, 9]
    assert len(frozen.x) == 3
    assert joined((X, Y), (X.double(), Y))[0].dtype == X.dtype


def test_views_of_another_shape_are_refused():
    with pytest.raises(MisconfigurationException, match=r"different shapes, \(3, 2\), \(3, 1\)"):
        joined((X, Y), (X[:, :1], Y))


def test_only_arguments_with_a_row_per_sample_are_narrowed():
    views = Views((X, Y), 3, {Shifted(): [(X, Y)]})
    arguments = {
        "input": torch.rand(6, 6), "target": torch.rand(6, 6), "pos_weight": torch.rand(6), "weight": torch.rand(6),
    }  # fmt: skip
    narrowed = views.narrow(arguments)
    assert [len(narrowed[name]) for name in ("input", "target", "pos_weight", "weight")] == [3, 3, 6, 6]
    assert len(views.narrow({**arguments, "weight": torch.rand(6, 6)})["weight"]) == 3
    assert views.narrow({"input": torch.rand(4, 6), "target": torch.rand(4, 6)}) is None
    assert views.narrow({"log_probs": torch.rand(6, 6, 6)}) is None


def test_several_rows_per_sample_are_narrowed_where_their_order_is_certain():
    t = torch.arange(12.0).reshape(3, 4)
    views = Views({"x": X, "t": t}, 3, {Shifted(): [{"x": X, "t": t}]})
    whole, output = views.batch["t"], torch.rand(6, 4, requires_grad=True) * 1
    unknown = torch.rand(24, requires_grad=True) * 1
    for output_, target in ((unknown, whole.view(-1)), (output.reshape(-1), 2 * whole.reshape(-1))):
        narrowed = views.narrow({"input": output_, "target": target})
        assert torch.equal(narrowed["input"], output_[:12])
        assert torch.equal(narrowed["target"], target[:12])
    time_first = torch.rand(4, 6, 1, requires_grad=True) * 1
    for rows in (unknown, time_first.reshape(-1), output.t().reshape(-1), torch.cat([output, output])):
        assert views.narrow({"input": rows, "target": torch.rand(rows.shape)}) is None
        assert views.narrow({"input": rows, "target": whole.t().reshape(-1)[: len(rows)]}) is None


@pytest.mark.parametrize(
    "order",
    [lambda rows: torch.cat([rows, -rows]), lambda rows: rows.repeat_interleave(2, 0)],
    ids=["stacked", "in turns"],
)
def test_rows_that_the_step_stacks_itself_are_refused(order):
    def step(module, batch):
        return F.cross_entropy(module(order(batch[0])), order(batch[1]).abs())

    with pytest.raises(MisconfigurationException, match="several in an order that cannot be known"):
        fit(Classifier(step=step), Shifted())
