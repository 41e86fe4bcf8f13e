"""The least technique of each phase; every technique is tried beside each of them."""

import torch
import torch.nn.functional as F
from torch import nn
from typing_extensions import override

from lightning_reg.engine.data.entries import replace_entry
from lightning_reg.engine.data.mixing import Mixing
from lightning_reg.engine.run.periods import Period
from lightning_reg.engine.technique import (
    BatchTechnique,
    DrawTechnique,
    GradientTechnique,
    LayerTechnique,
    LossTechnique,
    ModuleTechnique,
    PenaltyTechnique,
    StepTechnique,
    Technique,
    WeightTechnique,
)
from lightning_reg.engine.weights.owned import OwnModules
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.conformance.problems import SIZE
from tests.toys import Doubled, LowRank

__all__ = ["REFERENCES"]


class _Reference(Technique):
    @classmethod
    @override
    def key(cls):
        return cls.__name__.lower()


class DrawsSome(_Reference, DrawTechnique):
    """Some of the samples, some of them twice, in the second epoch; the first one is left alone."""

    @override
    def draw_samples(self, epoch, size):
        return torch.randint(size, (24,), generator=self.draw_generator(epoch)) if epoch == 1 else None


class SomeByHand(Hand):
    def draw(self, epoch):
        draw = torch.Generator().manual_seed(self.technique.derived_seed(f"draws {epoch}"))
        return torch.randint(SIZE, (24,), generator=draw) if epoch == 1 else None


class MixesNeighbours(_Reference, BatchTechnique):
    """Some batches: three quarters of each sample and a quarter of the next one."""

    @property
    def turn(self):
        """Which of two batches it mixes; two instances are to mix different ones."""
        return 1 if self.name == "two" else 0

    @property
    @override
    def mixes(self):
        return "some"

    @override
    def is_active(self, step):
        return step.mixing is None and step.batches_so_far % 2 == self.turn

    @override
    def transform_batch(self, batch, step):
        if step.mixing is not None:
            return batch
        partners = torch.arange(len(batch[0])).roll(1)
        mixed = 0.75 * batch[0] + 0.25 * batch[0][partners]
        step.mixing = Mixing(self, partners, 0.75, mixed, batch)
        return replace_entry(batch, "0", mixed)


class MixedByHand(Hand):
    def mix(self, moment):
        if moment.count % 2 != self.technique.turn:
            return None
        partners = torch.arange(len(moment.x)).roll(1)
        return 0.75 * moment.x + 0.25 * moment.x[partners], partners, 0.75


class WidensLogits(_Reference, LossTechnique):
    """The mean of the logits is one more wrong answer, and all are sharper by a tenth."""

    @override
    def change_input(self, call):
        logits = call.loss_input
        return 1.1 * torch.cat([logits, logits.mean(1, keepdim=True)], dim=1)


class WidenedByHand(Hand):
    def change_input(self, output, moment):
        return 1.1 * torch.cat([output, output.mean(1, keepdim=True)], dim=1)


class LowersLabels(_Reference, LossTechnique):
    """Each class but the first becomes the one before it."""

    @override
    def change_targets(self, call):
        return (call.target - 1).clamp(min=0)


class LoweredByHand(Hand):
    def change_targets(self, y):
        return (y - 1).clamp(min=0)


class RootsOfLosses(_Reference, LossTechnique):
    """The root of one plus each loss."""

    @override
    def change_losses(self, call):
        return (1 + F.cross_entropy(call.logits, call.target, reduction="none")).sqrt()


class RootsByHand(Hand):
    def losses(self, output, moment):
        return (1 + F.cross_entropy(output, moment.y, reduction="none")).sqrt()


class WeighsByLoss(_Reference, LossTechnique):
    """Each sample counts by its share of the loss."""

    @override
    def sample_weights(self, call):
        return call.losses / call.losses.mean()


class WeighedByHand(Hand):
    def weights(self, losses):
        return losses / losses.mean()


class ShrinksOutputs(_Reference, LossTechnique):
    """Squares of the outputs join the loss."""

    @override
    def loss_term(self, call):
        return 0.3 * torch.stack([copy.input.square().mean(1) for copy in call.copies()]).mean(0)


class ShrunkByHand(Hand):
    def term(self, loop, moment):
        return 0.3 * torch.stack([loop.read(output).square().mean() for output in moment.outputs]).mean()


class HalvesFeatures(_Reference, LayerTechnique):
    """The layer in the middle has half its output."""

    @override
    def features_to_edit(self, module):
        return ["net.body"]

    @override
    def edit_features(self, call):
        return 0.5 * call.output


class HalvedByHand(Hand):
    def edit(self, name, rows, moment, copy):
        return 0.5 * rows if name == "net.body" else rows


class StretchesInputs(_Reference, LayerTechnique):
    """The layer in the middle gets one and a half of its input."""

    @override
    def inputs_to_edit(self, module):
        return ["net.body"]

    @override
    def edit_inputs(self, call):
        return call.with_input(1.5 * call.input)


class StretchedByHand(Hand):
    def edit_input(self, name, rows, moment):
        return 1.5 * rows if name == "net.body" else rows


class RunsWithLess(_Reference, WeightTechnique):
    """The network runs with nine tenths of the head's bias; what is trained stays as it is."""

    @override
    def weights_to_edit(self, module):
        return ["net.head.bias"]

    @override
    def edit_weights(self, weights):
        weights["net.head.bias"].mul_(0.9)


class LessByHand(Hand):
    ended = False

    def used(self, name, weight):
        return weight - (0.1 * weight).detach() if name == "net.head.bias" and not self.ended else weight

    def end(self, weights):
        self.ended = True
        return weights


class ShrinksFeatures(_Reference, StepTechnique):
    """A tenth of the mean square of the body's output joins the loss of the step."""

    takes_mixed = True

    @property
    @override
    def feature_layers(self):
        return ["net.body"]

    @override
    def step_term(self, step):
        return 0.1 * step.features["net.body"].square().mean()


class FeaturesShrunkByHand(Hand):
    def term(self, loop, moment):
        return 0.1 * moment.features["net.body"].square().mean()


class ProjectsFeatures(_Reference, ModuleTechnique, StepTechnique):
    """A projection of the body's output is to be 1, and is trained with the network."""

    takes_mixed = True

    def __init__(self, name=None):
        super().__init__(name=name)
        self.own = OwnModules()

    @property
    @override
    def feature_layers(self):
        return ["net.body"]

    @override
    def own_modules(self, module):
        return {"projection": nn.Linear(16, 1)}

    @override
    def step_term(self, step):
        rows = step.features["net.body"].flatten(1)[:, :16]
        return (self.own["projection"](rows) - 1.0).square().mean()


class FeaturesProjectedByHand(Hand):
    def begin(self, loop):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.technique.derived_seed("own modules"))
            self.projection = nn.Linear(16, 1)

    def own(self):
        return list(self.projection.parameters())

    def term(self, loop, moment):
        rows = moment.features["net.body"].flatten(1)[:, :16]
        return (self.projection(rows) - 1.0).square().mean()


class BoundsGradients(_Reference, GradientTechnique):
    """The hyperbolic tangent of ten times the gradient of the head's bias in its place."""

    @override
    def change_gradients(self, gradients):
        if "net.head.bias" in gradients:  # which may belong to another optimizer
            gradients["net.head.bias"].mul_(10.0).tanh_()


class GradientsBoundByHand(Hand):
    def gradient(self, name, gradient):
        return (10.0 * gradient).tanh() if name == "net.head.bias" else gradient


class ShrinksBias(_Reference, GradientTechnique):
    """The head's bias is nine tenths of itself after a step."""

    @override
    def after_step(self, module, optimizer):
        module.get_parameter("net.head.bias").mul_(0.9)


class BiasShrunkByHand(Hand):
    def follow(self, loop):
        with torch.no_grad():
            loop.leaves["net.head.bias"].mul_(0.9)


class PullsToZero(_Reference, PenaltyTechnique):
    """A tenth of the squares of the first layer."""

    @override
    def penalty(self, module):
        return 0.1 * module.net.first.weight.square().sum()


class PulledByHand(Hand):
    def penalty(self, weights):
        return 0.1 * weights["net.first.weight"].square().sum()


class TrainsHalf(_Reference, Doubled):
    """The bias of the first layer is twice what is trained."""

    def __init__(self, **options):
        super().__init__(["net.first.bias"], **options)


class HalfByHand(Hand):
    def latent(self, name, weight):
        return (weight / 2, lambda half: 2 * half) if name == "net.first.bias" else None


class TrainsFactors(_Reference, LowRank):
    """A product of two factors joins the first layer's weight, and they are trained in its place."""

    def __init__(self, name=None):
        super().__init__(["net.first.weight"], rank=2, row_scale=2.0, name=name)


class FactorsByHand(Hand):
    def latent(self, name, weight):
        if name != "net.first.weight":
            return None
        rows, columns = weight.flatten(1).shape
        draw = torch.Generator().manual_seed(0)
        left, right = 0.1 * torch.randn(rows, 2, generator=draw), 0.3 * torch.randn(2, columns, generator=draw)

        def mapped(leaf):
            product = 0.5 * leaf[: 2 * rows].reshape(rows, 2) @ leaf[2 * rows :].reshape(2, columns)
            scaled = product * torch.linspace(1, 2.0, rows)[:, None]
            return weight + (product.detach() + scaled - scaled.detach()).reshape(weight.shape)

        return torch.cat([left.flatten(), right.flatten()]), mapped


class RestsAWhile(_Reference, Technique):
    """The head's bias is left alone for six steps; two instances leave it alone at different times."""

    @property
    @override
    def periods(self):
        start = 2 if self.name == "two" else 5
        return (Period(start, start + 6, "steps", frozen="net.head.bias"),)


class RestedByHand(Hand):
    def rests(self, name, moment):
        (period,) = self.technique.periods
        return name == "net.head.bias" and period.start < moment.count <= period.end


def _case(cls, hand, *also):
    return Case(make=cls, neutral=None, by_hand=hand, also=also, exempt={"says_what_it_does": "it says nothing at all"})


REFERENCES = [
    _case(DrawsSome, SomeByHand, "images", "maps", "regression"),
    _case(MixesNeighbours, MixedByHand, "images", "maps", "regression"),
    _case(WidensLogits, WidenedByHand, "images", "maps"),
    _case(LowersLabels, LoweredByHand, "images"),
    _case(RootsOfLosses, RootsByHand, "images"),
    _case(WeighsByLoss, WeighedByHand, "images", "maps", "regression"),
    _case(ShrinksOutputs, ShrunkByHand, "images", "regression"),
    _case(HalvesFeatures, HalvedByHand, "images", "maps", "regression"),
    _case(StretchesInputs, StretchedByHand, "images", "maps", "regression"),
    _case(RunsWithLess, LessByHand, "images", "maps", "regression"),
    _case(ShrinksFeatures, FeaturesShrunkByHand, "images", "maps", "regression"),
    _case(ProjectsFeatures, FeaturesProjectedByHand, "images", "maps", "regression"),
    _case(PullsToZero, PulledByHand, "images", "maps", "regression"),
    _case(BoundsGradients, GradientsBoundByHand, "images", "maps", "regression"),
    _case(ShrinksBias, BiasShrunkByHand, "images", "maps", "regression"),
    _case(RestsAWhile, RestedByHand, "images", "maps", "regression"),
    _case(TrainsHalf, HalfByHand, "images", "maps", "regression"),
    _case(TrainsFactors, FactorsByHand, "images", "maps", "regression"),
]
