"""ContrastiveDistillation: a better model says how near all candidates of a batch are to each query."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import ContrastiveDistillation, FocalContrastive, Mixup, MultiSampleDropout
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import ranking_distillation_losses
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.retrieval.hosts import in_batch_problem
from tests.toys import QUIET, Classifier, fit, make_tensors, same_weights

pytestmark = QUIET


class Taught(Hand):
    """The inputs themselves are the teacher's embeddings of queries and documents."""

    def term(self, loop, moment):
        found = []
        for i, s in enumerate(moment.outputs[0]):
            cosines = torch.stack([F.cosine_similarity(moment.x[i], x, dim=0) for x in moment.x])
            p, q = ((each / self.technique.temperature).softmax(0) for each in (cosines, s))
            kl = sum(p[j] * (p[j].log() - q[j].log()) for j in range(len(p)))
            found.append(self.technique.weight * kl)
        return torch.stack(found).mean()


TAUGHT = partial(ContrastiveDistillation, "net.cosines.documents", "0", "0", "net.head", temperature=0.5)
CASE = Case(
    make=TAUGHT,
    neutral=partial(TAUGHT, weight=0.0),
    by_hand=Taught,
    says=(
        "net.head and net.cosines.documents from 0 and 0, temperature=0.5, weight=1",
        "weight=0: inactive",
        "net.head and net.cosines.documents from 0 and 0, temperature=0.5, weight=0.3",
    ),
    data=in_batch_problem("cosines"),
    variants=[partial(TAUGHT, weight=0.3)],
    invalid=[({"temperature": 0.0}, "temperature"), ({"weight": -0.1}, "weight")],
    compares_rows=True,
)


def test_a_students_distribution_by_loops_and_at_the_ends():
    student, teacher = torch.rand(4, 5, dtype=torch.float64, requires_grad=True), torch.rand(4, 5, dtype=torch.float64)
    found = ranking_distillation_losses(student, teacher, 0.1)
    for i in range(4):
        p, q = ([math.exp(s / 0.1) for s in row.tolist()] for row in (teacher[i], student[i]))
        wanted = sum(a / sum(p) * math.log(a / sum(p) / (b / sum(q))) for a, b in zip(p, q, strict=True))
        assert found[i].item() == pytest.approx(wanted)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    torch.testing.assert_close(gradient, ((student / 0.1).softmax(1) - (teacher / 0.1).softmax(1)) / 0.1)
    assert ranking_distillation_losses(teacher, teacher).tolist() == [0.0] * 4
    assert ranking_distillation_losses(teacher + 1, teacher).abs().max() < 1e-12  # a constant says nothing
    half = ranking_distillation_losses(teacher.half(), teacher.half(), 0.01)
    assert half.dtype is torch.float32
    assert half.isfinite().all()


class Student(Classifier):
    """Search with a hard negative of each query; the teacher's cosines written into the loss by hand."""

    def __init__(self, weight=0.0, gamma=0.0):
        super().__init__(lr=0.1)
        self.weight, self.gamma = weight, gamma

    def training_step(self, batch, batch_idx):
        x, _, queries, positives, negatives = batch
        q, d = F.normalize(self.net(x)), F.normalize(torch.cat([self.net(x + 0.1), self.net(x.flip(1))]))
        loss = F.cross_entropy(q @ d.T / 0.1, torch.arange(len(x)))
        if self.gamma:
            losses = F.cross_entropy(q @ d.T / 0.1, torch.arange(len(x)), reduction="none")
            loss = ((1 - (-losses.detach()).exp()) ** self.gamma * losses).mean()
        if self.weight:
            teacher = F.normalize(queries) @ F.normalize(torch.cat([positives, negatives])).T
            wanted, found = (teacher / 0.05).softmax(1), (q @ d.T / 0.05).log_softmax(1)
            loss = loss + self.weight * ((wanted.log() - found) * wanted).sum(1).mean()
        return loss


def taught_loader():
    generator = torch.Generator().manual_seed(0)
    x, y = make_tensors(12)
    return DataLoader(TensorDataset(x, y, *(torch.randn(12, 4, generator=generator) for _ in range(3))), 4)


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_a_step_with_a_teacher_is_that_by_hand(gamma):
    ours, hand, plain = Student(), Student(0.5, gamma), Student()
    technique = ContrastiveDistillation("net", "2", ["3", "4"], weight=0.5)
    fit(ours, technique, FocalContrastive(gamma), loader=taught_loader())
    fit(hand, loader=taught_loader())
    fit(plain, loader=taught_loader())
    assert same_weights(ours, hand, atol=1e-6)
    assert not same_weights(ours, plain, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"teacher_documents": "3"}, "3 of the batch has 4 for 8 columns of"),
        ({"teacher_queries": "1"}, r"the entry '1' of the batch must be embeddings \(n, E\), found torch.int64 \(4,\)"),
        ({"teacher_queries": "5"}, "embeddings='5' names nothing in the batch"),
        ({"query_layer": "net.0"}, r"and the embeddings of this step are \(12, 8\) and \(12, 3\)"),
    ],
)
def test_a_teacher_of_something_else_is_refused(options, said):
    given = {"layer": "net", "teacher_queries": "2", "teacher_documents": ["3", "4"], **options}
    with pytest.raises(MisconfigurationException, match=f"ContrastiveDistillation.*{said}"):
        fit(Student(), ContrastiveDistillation(**given), loader=taught_loader())


@pytest.mark.parametrize(
    ("other", "said"),
    [(Mixup(), "a mixed sample has two documents"), (MultiSampleDropout("net.2"), "passes each row several times")],
)
def test_who_cannot_stand_beside_a_teacher(other, said):
    with pytest.raises(MisconfigurationException, match=f"ContrastiveDistillation.*cannot stand together.*{said}"):
        fit(Classifier(), ContrastiveDistillation("net", "2", "3"), other)
