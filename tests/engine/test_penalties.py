"""Gradients of penalties; the toy penalty of 0.01 |p|^2 is SGD's own weight decay of 0.02."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from lightning_reg.engine.host.errors import MisconfigurationException
from tests.toys import CLASSES, QUIET, Classifier, Halve, Penalty, Term, fit, same_weights

pytestmark = QUIET


class Decays(Classifier):
    def __init__(self, decay=0.0, step=None, kind=torch.optim.SGD, **options):
        super().__init__(step=step, lr=0.3)
        self.decay, self.kind, self.options = decay, kind, options

    def configure_optimizers(self):
        return self.kind(
            self.parameters(), lr=self.lr, **({"weight_decay": self.decay} if self.decay else {}), **self.options
        )


@pytest.mark.parametrize("techniques", [[], [Term], [Halve]], ids=["alone", "with a term", "dense weights are seen"])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 4}, {"precision": "bf16-mixed"}], ids=str)
def test_is_weight_decay(techniques, options):
    ours, theirs, plain = Decays(), Decays(0.02), Decays()
    fit(ours, *(kind() for kind in techniques), Penalty(), **options)
    fit(theirs, *(kind() for kind in techniques), **options)
    fit(plain, *(kind() for kind in techniques), **options)
    assert same_weights(ours, theirs, atol=1e-6)  # float32, 8 steps
    assert not same_weights(ours, plain, atol=1e-4)


@pytest.mark.parametrize("fused", [False, True], ids=["unscaled by Lightning", "unscaled in the step"])
def test_under_a_gradient_scaler(fused):
    modules = [Decays(), Decays(0.02)]
    for module, penalties in zip(modules, ([Penalty()], []), strict=True):
        module.options = {"fused": fused}
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        fit(module, *penalties, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert same_weights(*modules, atol=1e-6)  # float32 additions of the same numbers


def test_clipping_comes_after():
    def step(module, batch):
        return F.cross_entropy(module(batch[0]), batch[1]) + 0.01 * sum(p.square().sum() for p in module.parameters())

    ours, theirs = Decays(), Decays(step=step)
    fit(ours, Penalty(), gradient_clip_val=0.05)
    fit(theirs, gradient_clip_val=0.05)
    assert same_weights(ours, theirs, atol=1e-6)  # float32, 8 steps


class Halves(Decays):
    """Manual optimization, an optimizer for each layer, the second one stepped in every other batch."""

    def __init__(self, decay=0.0):
        super().__init__(decay)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        one, two = self.optimizers()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        for optimizer in (one, two) if batch_idx % 2 else (one,):
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[i].parameters(), lr=0.3, weight_decay=self.decay) for i in (0, 3)]


def test_manual_optimization_with_two_optimizers():
    ours, theirs, plain = Halves(), Halves(0.02), Halves()
    fit(ours, Penalty())
    fit(theirs)
    fit(plain)
    assert same_weights(ours, theirs, atol=1e-6)  # float32, 8 steps
    assert not same_weights(ours, plain, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_skipped_step_is_left_alone():
    def step(module, batch):
        return F.cross_entropy(module(batch[0]), batch[1]) if module.trainer.global_step == 0 else None

    ours, theirs = Decays(step=step), Decays(0.02, step=step)
    fit(ours, Penalty())
    fit(theirs)
    assert same_weights(ours, theirs, atol=1e-7)  # one step


def test_gradients_that_are_sparse_or_not_there():
    class Words(Decays):
        def __init__(self, decay=0.0):
            super().__init__(decay)
            self.words, self.unused = nn.Embedding(5, CLASSES, sparse=not decay), nn.Linear(2, 2)
            with torch.no_grad():
                for i, p in enumerate((self.words.weight, *self.unused.parameters()), 1):
                    p.fill_(i)

        def training_step(self, batch, batch_idx):
            rest = sum(p.sum() for p in self.unused.parameters()) if self.decay else 0.0
            return F.cross_entropy(self(batch[0]) + self.words(batch[1]), batch[1]) + 0 * rest

    ours, theirs = Words(), Words(0.02)
    fit(ours, Penalty())
    fit(theirs)
    assert same_weights(ours, theirs, atol=1e-6)  # float32, 8 steps


def test_a_line_search_is_refused():
    with pytest.raises(
        MisconfigurationException, match=r"Penalty adds .* but the line search of LBFGS compares values"
    ):
        fit(Decays(kind=torch.optim.LBFGS, line_search_fn="strong_wolfe"), Penalty())


class Both(Halves):
    """Two optimizers with the same weights, stepped one after the other."""

    def training_step(self, batch, batch_idx):
        one, two = self.optimizers()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        one.step()
        two.step()
        two.zero_grad()

    def configure_optimizers(self):
        one, two = (torch.optim.SGD(self.parameters(), lr=0.3, weight_decay=decay) for decay in (0.0, self.decay))
        return [one, two]


def test_in_the_steps_of_one_optimizer():
    class Second(Penalty):
        optimizer = 1

    ours, theirs, plain = Both(), Both(0.02), Both()
    fit(ours, Second())
    fit(theirs)
    fit(plain)
    assert same_weights(ours, theirs, atol=1e-6)  # float32, 12 steps
    assert not same_weights(ours, plain, atol=1e-4)


@pytest.mark.parametrize("position", [-1, 2])
def test_an_optimizer_that_is_not_there_is_refused(position):
    technique = Penalty()
    technique.optimizer = position
    with pytest.raises(MisconfigurationException, match=f"Penalty: `optimizer` must be .* of the 2 .*, got {position}"):
        fit(Both(), technique)
