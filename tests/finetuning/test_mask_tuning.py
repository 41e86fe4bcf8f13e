"""MaskTuning: binary masks on frozen weights, gradient dropout, the weights that matter, bits."""

from functools import partial

import torch

from lightning_reg import MaskTuning
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.toys import QUIET


class MaskTuningByHand(Hand):
    """A real mask as the leaf of the layer in the middle; its gradient is replaced by a hook."""

    def latent(self, name, weight):
        if not (name.startswith("net.body") and name.endswith("weight")):
            return None
        technique = self.technique
        self.name, self.fixed, self.second, self.count = name, weight.clone(), None, 0
        # A leaf that is multiplied by the root of the factor learns by that factor faster, under SGD.
        self.root = technique.lr_factor**0.5

        def mapped(leaf):
            mask = leaf * self.root
            return self.fixed * ((mask > technique.threshold).float() + mask - mask.detach())

        return torch.full_like(weight, technique.init / self.root), mapped

    def begin(self, loop):
        self.first = loop.constants()
        self.leaf = loop.leaves[self.name]
        self.leaf.register_hook(self.dropped)

    def term(self, loop, moment):
        with torch.no_grad():
            said = loop.run(self.first, moment.x)[0].softmax(1)
        second = [-(said * output.log_softmax(1)).sum(1).mean() for output in moment.outputs]
        loss = sum(second) / len(second)
        self.second = None
        self.second = torch.autograd.grad(loss, loop.leaves[self.name], retain_graph=True)[0] / self.root

    def dropped(self, gradient):
        if self.second is None:
            return gradient
        technique, mask = self.technique, self.leaf.detach() * self.root
        a, b = gradient / self.root + technique.norm_weight * mask / mask.norm(), self.second
        draw = torch.Generator().manual_seed(technique.derived_seed(f"step {self.count} of {self.name}"))
        chance = 0.5 * (1 + a.sign() * (a + b) / (a.abs() + b.abs() + 1e-8))
        strength = technique.gradient_dropout
        return ((1 - strength) + strength * (chance > torch.rand(a.shape, generator=draw))) * a * self.root

    def follow(self, loop):
        self.count += 1


BESIDE = ["net.first", "net.head", "*.bias"]
CASE = Case(
    make=partial(MaskTuning, "net.body*", lr_factor=10.0, norm_weight=0.01, train=BESIDE),
    neutral=partial(MaskTuning, train="*"),
    by_hand=MaskTuningByHand,
    says=(
        "from 0.01, off at 0.005, gradient dropout 1, norm by 0.01, layers net.body*",
        "from 0.01, off at 0.005, gradient dropout 1, norm by 0.0001, layers auto",
        "from 0.02, off at 0, 40 % by gradient, gradient dropout 0.5, layers auto",
        "from 0.01, off at 0.005, layers auto",
    ),
    also=["images"],
    variants=[
        partial(
            MaskTuning,
            select="gradient",
            fraction=0.4,
            select_batches=2,
            init=0.02,
            threshold=0.0,
            gradient_dropout=0.5,
            norm_weight=0.0,
            lr_factor=10.0,
            train="*.bias",
        ),
        partial(MaskTuning, gradient_dropout=0.0, norm_weight=0.0),
    ],
    invalid=[
        ({"fraction": 0.0}, "fraction"),
        ({"fraction": 1.1}, "fraction"),
        ({"select_batches": 0}, "select_batches"),
        ({"threshold": -0.1}, "threshold"),
        ({"init": 0.005}, "init"),
        ({"gradient_dropout": -0.1}, "gradient_dropout"),
        ({"gradient_dropout": 1.1}, "gradient_dropout"),
        ({"norm_weight": -1.0}, "norm_weight"),
        ({"temperature": 0.0}, "temperature"),
        ({"lr_factor": -1.0}, "lr_factor"),
    ],
)

pytestmark = QUIET
