"""The engine on two processes."""

import contextlib
import io

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DistributedSampler, TensorDataset
from typing_extensions import override

from lightning_reg import ELRCallback
from lightning_reg.engine.loss.lookup import ENGINES
from tests.toys import (
    BATCH,
    CLASSES,
    QUIET,
    TWO_RANKS,
    Classifier,
    IndexRecorder,
    Pairs,
    Penalty,
    ShiftTargets,
    Term,
    WeightsByLabel,
    fit,
    make_loader,
    make_tensors,
    same_weights,
    weights_of,
)

pytestmark = QUIET


class CollectiveError(Exception):
    pass


def fit_twice():
    answers = []
    for _ in range(2):
        module, term = Classifier(), Term()
        trainer = fit(module, term, **TWO_RANKS)
        environment = type(trainer.strategy.cluster_environment).__name__
        answers.append((trainer.world_size, trainer.global_rank, trainer.global_step, environment, weights_of(module)))
        assert trainer.callbacks == [term]
        assert not {"training_step", "process_dataloader"} & trainer.strategy.__dict__.keys()
        assert not ENGINES
    return answers


def test_trainers_in_the_workers_use_the_group(two_processes):
    for rank, answers in enumerate(two_processes.run(fit_twice)):
        assert [answer[:4] for answer in answers] == [(2, rank, 4, "TorchElasticEnvironment")] * 2
        assert same_weights(answers[0][4], answers[1][4])


def note_marks(module, batch):
    module.marks.append(batch[0][:, 0].long().tolist())
    return F.cross_entropy(module(batch[0] / 100), batch[1])


def record_indices(samples):
    recorder, module = IndexRecorder(), Classifier(step=note_marks)
    module.marks = []
    fit(module, recorder, loader=make_loader(Pairs(samples=samples, mark=True), batch_size=4), seed=5, **TWO_RANKS)
    return recorder.indices, module.marks, set(recorder.sizes)


def test_indices_are_those_of_the_distributed_sampler(two_processes):
    # 13 samples: the sampler repeats one, so that both ranks have 7.
    answers = two_processes.run(record_indices, 13)
    drawn = []
    for rank, (indices, marks, sizes) in enumerate(answers):
        sampler = DistributedSampler(range(13), num_replicas=2, rank=rank, shuffle=True, seed=5)
        expected = []
        for epoch in range(2):
            sampler.set_epoch(epoch)
            own = list(sampler)
            expected += [own[:4], own[4:]]
        assert indices == expected
        assert marks == indices
        assert sizes == {13}
        drawn += indices[0] + indices[1]
    assert len(drawn) == 14
    assert set(drawn) == set(range(13))


def reported(samples):
    elr = ELRCallback(lam=1e-3)
    x, y = make_tensors(samples)
    y[::3] = (y[::3] + 1) % CLASSES  # wrong labels, which a network of one epoch contradicts
    loader = make_loader(TensorDataset(x, y), batch_size=4)
    fit(Classifier(), elr, loader=loader, seed=5, max_epochs=6, **TWO_RANKS)
    errors = elr.label_errors()
    return errors.index.tolist(), errors.given.tolist(), y.tolist(), len(elr.suspected_label_errors())


def test_rows_that_the_distributed_sampler_repeats_leave_no_trace_in_reports(two_processes):
    (indices, given, labels, size), other = two_processes.run(reported, 13)
    assert (indices, given, labels, size) == other  # both ranks report the whole data set
    assert size == 13
    assert indices
    assert len(set(indices)) == len(indices)
    assert given == [labels[index] for index in indices]


def train(kinds, ranks):
    module, dataset = Classifier(), Pairs()
    rank = dist.get_rank() if ranks == 2 else 0
    sampler = DistributedSampler(dataset, num_replicas=ranks, rank=rank, shuffle=False)
    loader = make_loader(dataset, batch_size=BATCH // ranks, sampler=sampler)
    strategy = TWO_RANKS if ranks == 2 else {}
    trainer = fit(module, *(kind() for kind in kinds), loader=loader, use_distributed_sampler=False, **strategy)
    return weights_of(module), {name: value.item() for name, value in trainer.logged_metrics.items()}


@pytest.mark.parametrize(
    "kinds",
    [
        (Term,),
        (WeightsByLabel, Penalty),
        (ShiftTargets, WeightsByLabel, Term, Penalty),
    ],
    ids=lambda kinds: "+".join(kind.__name__ for kind in kinds),
)
def test_two_ranks_train_as_one_process_with_twice_the_batch(two_processes, kinds):
    # Rank 0 has the even samples and rank 1 the odd ones: together the batch of the one process.
    one, other = two_processes.run(train, kinds, 2)
    alone = train(kinds, 1)
    assert same_weights(one[0], other[0])
    assert not same_weights(one[0], weights_of(Classifier()), atol=1e-2)
    assert same_weights(one[0], alone[0], atol=1e-6)  # float32, 8 steps: means of halves round differently
    # What is logged is the mean over the ranks.
    assert one[1] == other[1]
    assert one[1].keys() == alone[1].keys() >= {"reg/loss/base", "reg/loss/total"}
    assert one[1] == pytest.approx(alone[1], abs=1e-5)


def printed(enable):
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        fit(Classifier(), Term(), enable_model_summary=enable, **TWO_RANKS)
    return text.getvalue()


def test_the_table_is_printed_by_rank_zero_only(two_processes):
    zero, one = two_processes.run(printed, True)
    assert zero.count("lightning_reg") == 2  # at the start and at the end
    assert "factor=0.1" in zero
    assert "lightning_reg" not in one


def raise_in_second_step():
    def step(module, batch):
        if module.trainer.global_step == 1:
            raise CollectiveError("in training")
        return F.cross_entropy(module(batch[0]), batch[1])

    term, recorder = Term(), IndexRecorder()
    try:
        fit(Classifier(step=step), term, recorder, **TWO_RANKS)
    finally:
        assert not ENGINES


def test_an_exception_on_both_ranks_arrives_and_leaves_the_pool_usable(two_processes):
    with pytest.raises(CollectiveError, match="in training"):
        two_processes.run(raise_in_second_step)
    assert [answers[1][2] for answers in two_processes.run(fit_twice)] == [4, 4]


class Drawing(Term):
    """Draws numbers of the rank's own, then numbers that all ranks share."""

    def __init__(self):
        super().__init__()
        self.own, self.shared = [], []

    @override
    def loss_term(self, call):
        self.own.append(torch.rand(2, generator=self.generator(call.step)).tolist())
        self.shared.append(torch.rand(2, generator=self.generator(call.step, same_on_ranks=True)).tolist())


def draw():
    drawing = Drawing()
    fit(Classifier(), drawing, **TWO_RANKS)
    return drawing.own, drawing.shared


def test_ranks_draw_their_own_numbers_unless_they_ask_for_the_same(two_processes):
    (own, shared), (other_own, other_shared) = two_processes.run(draw)
    assert shared == other_shared
    assert len({tuple(pair) for pair in own + other_own}) == 8
    assert own == shared  # rank 0 draws what one process would
