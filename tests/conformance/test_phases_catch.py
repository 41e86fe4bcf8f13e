"""Of the phases beside those of `Sound`: one that does nothing is nothing, and a broken one is caught by a law."""

import re
from dataclasses import replace

import pytest
import torch

from lightning_reg.engine.host.distributed import rank
from lightning_reg.engine.run.periods import Period
from lightning_reg.engine.technique import (
    DrawTechnique,
    GradientTechnique,
    LayerTechnique,
    LossTechnique,
    ModuleTechnique,
    StepTechnique,
    Technique,
)
from lightning_reg.engine.weights.owned import OwnModules
from tests.conformance.harness import difference, fit
from tests.conformance.laws import LAWS
from tests.conformance.problems import KINDS
from tests.conformance.references import (
    REFERENCES,
    BoundsGradients,
    DrawsSome,
    ProjectsFeatures,
    RestsAWhile,
    ShrinksBias,
    ShrinksFeatures,
    StretchesInputs,
    WidensLogits,
)


class NoDraws(DrawTechnique):
    def draw_samples(self, epoch, size):
        return None


class NoTerm(StepTechnique):
    def step_term(self, step):
        return None


class NoModules(ModuleTechnique):
    def __init__(self):
        super().__init__()
        self.own = OwnModules()

    def own_modules(self, module):
        return {}


class NoChange(GradientTechnique):
    def change_gradients(self, gradients):
        pass

    def after_step(self, module, optimizer):
        pass


class NoLogits(LossTechnique):
    def change_input(self, call):
        return None


class SameLogits(LossTechnique):
    def change_input(self, call):
        return call.loss_input.clone()


class NoEdits(LayerTechnique):
    stages = frozenset({"train", "validate"})

    def inputs_to_edit(self, module):
        return ["net.body"]

    features_to_edit = inputs_to_edit

    def edit_inputs(self, call):
        return None

    def edit_features(self, call):
        return None


class LaterPeriods(Technique):
    @property
    def periods(self):
        return (Period(99, frozen="net.*"), Period(500, 900, "steps", trained="net.head"))


_IDLE = [NoDraws, NoTerm, NoModules, NoChange, NoLogits, SameLogits, NoEdits, LaterPeriods]


@pytest.mark.parametrize("cls", _IDLE, ids=lambda cls: cls.__name__)
def test_one_that_does_nothing_is_nothing(cls):
    plain, null = fit([], KINDS["classification"]), fit([cls()], KINDS["classification"])
    for part in ("weights", "gradients"):
        assert not difference(getattr(plain, part), getattr(null, part))
    users = [[{k: v for k, v in row.items() if k[:4] != "reg/"} for _, row in run.logged] for run in (plain, null)]
    assert users[0] == users[1]


class DrawsGlobally(DrawsSome):
    def draw_samples(self, epoch, size):
        return torch.randint(size, (24,)) if epoch == 1 else None


class DrawsByRank(DrawsSome):
    def draw_samples(self, epoch, size):
        drawn = super().draw_samples(epoch, size)
        return drawn if drawn is None else (drawn + rank()) % size


class DrawsByCount(DrawsSome):
    asked = 0

    def draw_samples(self, epoch, size):
        self.asked += 1
        return torch.randint(size, (24,), generator=self.draw_generator(self.asked))


class TermOfOneRank(ShrinksFeatures):
    def step_term(self, step):
        return step.features["net.body"].mean().square()


class _Counts(Technique):
    """Counts its steps, and saves nothing of it."""

    count = 0

    def on_train_batch_end(self, *_):
        self.count += 1


class ChangesByCount(BoundsGradients, _Counts):
    def change_gradients(self, gradients):
        gradients["net.head.bias"].mul_(1.0 + self.count)


class FollowsByCount(ShrinksBias, _Counts):
    def after_step(self, module, optimizer):
        module.get_parameter("net.head.bias").mul_(1.0 - self.count / 100)


class ForgetsItsModules(ProjectsFeatures):
    def state_dict(self):
        return {}

    def load_state_dict(self, state_dict):
        pass


class DrawsInputsGlobally(StretchesInputs):
    def edit_inputs(self, call):
        return call.with_input(call.input * torch.rand(()))


class StretchesLess(StretchesInputs):
    def edit_inputs(self, call):
        return call.with_input(1.4 * call.input)


class WidensByRank(WidensLogits):
    def change_input(self, call):
        return torch.cat([super().change_input(call), call.input.mean(dim=(0, 1)).expand(len(call.input), 1)], dim=1)


class WidensLess(WidensLogits):
    def change_input(self, call):
        return super().change_input(call) / 1.05


class RestsByCount(RestsAWhile, _Counts):
    def on_train_batch_start(self, trainer, pl_module, *_):
        pl_module.net.body.requires_grad_(self.count < 10)

    def on_train_end(self, trainer, pl_module):
        pl_module.net.body.requires_grad_(True)


class LeavesItFrozen(RestsAWhile):
    def on_fit_end(self, trainer, pl_module):
        pl_module.net.head.bias.requires_grad_(False)


@pytest.mark.parametrize(
    ("cls", "law", "sentence"),
    [
        (DrawsGlobally, "own_randomness", "the global random state of torch"),
        (DrawsByRank, "ranks_agree", "of two processes and of one with the joined batch"),
        (DrawsByCount, "resume_is_exact", "resumed at .* and uninterrupted"),
        (TermOfOneRank, "ranks_agree", "of two processes and of one with the joined batch"),
        (ChangesByCount, "resume_is_exact", "resumed at epoch_end and uninterrupted"),
        (FollowsByCount, "resume_is_exact", "resumed at epoch_end and uninterrupted"),
        (ForgetsItsModules, "resume_is_exact", "resumed at epoch_end and uninterrupted"),
        (DrawsInputsGlobally, "own_randomness", "the global random state of torch"),
        (StretchesLess, "as_by_hand", "the loop by hand and the fit differ"),
        (WidensByRank, "ranks_agree", "of two processes and of one with the joined batch"),
        (WidensLess, "as_by_hand", "the loop by hand and the fit differ"),
        (RestsByCount, "resume_is_exact", "resumed at .* and uninterrupted"),
        (LeavesItFrozen, "leaves_no_trace", "what a plain fit leaves.*net.head.bias"),
    ],
)
def test_a_broken_one_is_caught(cls, law, sentence, request):
    case = next(case for case in REFERENCES if case.cls in cls.__mro__)
    pool = [request.getfixturevalue("two_processes")] if law == "ranks_agree" else []
    with pytest.raises(AssertionError, match=re.compile(sentence, re.DOTALL)):
        LAWS[law](replace(case, make=cls), *pool)
