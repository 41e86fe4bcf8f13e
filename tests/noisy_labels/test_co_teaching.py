"""Co-teaching: what each network is taught, by whom, with which rate; with nested dropout, and after it."""

import copy
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import CoTeaching, ELRPlusCallback, NestedDropout, NMSparsity
from lightning_reg.engine.data.order import Reordered
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.networks.trained import reset_parameters_
from lightning_reg.engine.run.composition import conflict_between
from lightning_reg.functional import (
    estimated_forget_rate,
    forget_rate_at,
    keep_prefix,
    prefix_probabilities,
    small_loss_mask,
    small_loss_weights,
)
from tests.conformance.by_hand import LEARNING_RATE, MOMENTUM, Hand, Moment
from tests.conformance.case import Case
from tests.conformance.problems import make_loader as make_loader_of
from tests.toys import (
    CLASSES,
    INPUTS,
    QUIET,
    SAMPLES,
    TWO_RANKS,
    Callback,
    Classifier,
    fit,
    make_loader,
    make_tensors,
    make_trainer,
)

pytestmark = QUIET


@dataclass
class PeerMoment(Moment):
    """A step of the second network."""

    def draws(self, technique, stream=" peer"):
        return super().draws(technique, stream)


def smallest(losses, rate):
    """1 for the picked samples and 0 for others, times n / kept; in plain Python."""
    kept = max(1, int((1 - rate) * len(losses) + 1e-9))
    order = sorted(range(len(losses)), key=lambda i: (losses[i], i))[:kept]
    return torch.tensor([len(losses) / kept if i in order else 0.0 for i in range(len(losses))])


class TaughtByHand(Hand):
    """The first network is taught what the second picks; the second trains after each epoch, by the first's picks."""

    def begin(self, loop):
        net = copy.deepcopy(loop.net)
        reset_parameters_(net, self.technique.derived_seed("weights"))
        self.second = {f"net.{name}": p.detach().requires_grad_() for name, p in net.named_parameters()}
        self.optimizer = torch.optim.SGD(list(self.second.values()), LEARNING_RATE, MOMENTUM)
        self.order = Reordered(make_loader_of(loop.problem, 4, len(loop.x), None), self.technique)
        self.count = 0

    def picks(self, loop, weights, x, y):
        """Of layers that nested dropout cuts the first features."""
        cutting = [hand for hand in loop.hands if getattr(hand.technique, "edits_second", False)]

        def edit(name, rows):
            for hand in cutting:
                rows = hand.edit_evaluation(name, rows)
            return rows

        with torch.no_grad():
            output = loop.read(loop.whole.run(weights, x, edit)[0])
            losses = [float(loop.part.loss(o[None], t[None])) for o, t in zip(output, y, strict=True)]
        return smallest(losses, self.technique.forget_rate)

    def observe(self, loop, moment):
        self.chosen = self.picks(loop, self.second, moment.x, moment.y)

    def weights(self, losses):
        return self.chosen

    def after_epoch(self, loop, epoch):
        cutting = [hand for hand in loop.hands if getattr(hand.technique, "edits_second", False)]
        for position, index in enumerate(self.order.draws(epoch)):
            self.count += 1
            x, y, index = loop.x[index], loop.y[index], torch.tensor(index)
            moment = PeerMoment(x, y, index, self.count)

            def given(name, rows, moment=moment):
                for hand in cutting:
                    rows = hand.edit_input(name, rows, moment)
                return rows

            torch.manual_seed(self.technique.derived_seed(f"batch 0 {epoch} {position}"))
            loop.net.train()
            output, _ = loop.whole.run(self.second, x, given=given)
            loop.net.eval()
            loss = 0
            for part in loop.parts.values():
                of, to = output[:, part.outputs], part.targets(y)
                if part is loop.part:
                    each = torch.stack([part.loss(o[None], t[None]) for o, t in zip(of, to, strict=True)])
                    loss = loss + (each * self.picks(loop, loop.constants(), x, to)).mean()
                else:
                    loss = loss + part.loss(of, to)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


ANEW = "a second network, initialized anew"
CASE = Case(
    make=partial(CoTeaching, 0.5, gradual_epochs=0),
    neutral=partial(CoTeaching, 0.0),
    by_hand=TaughtByHand,
    says=(
        f"forget_rate=0.5; {ANEW}",
        "forget_rate=0: inactive",
        f"forget rate estimated after 1 epoch; {ANEW}",
        "forget_rate=0.4, reached after 3 epochs; a second network, equal to the first at the start",
    ),
    variants=[
        partial(CoTeaching, gradual_epochs=1),
        partial(CoTeaching, 0.4, 3, exponent=2.0, peer_init="copy", index_key="2", num_samples=30, seed=3),
    ],
    invalid=[
        ({"forget_rate": -0.1}, "forget_rate"),
        ({"forget_rate": 1.0}, "forget_rate"),
        ({"gradual_epochs": -1}, "gradual_epochs"),
        ({"gradual_epochs": 0}, "gradual_epochs"),
        ({"exponent": 0.0}, "exponent"),
        ({"num_samples": 0}, "num_samples"),
        ({"index_key": "index"}, "num_samples"),
    ],
)
