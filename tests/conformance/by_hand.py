"""Training in plain PyTorch with the techniques written out, for the laws to compare fits with.

Nothing here comes from the engine: weights are tensors by name, what trains is a leaf of the autograd graph, a sparse
or mapped weight is a function of it, a penalty is a term of the loss. A technique's part of the loop is a
:class:`Hand` in its test file; the loop knows no technique. Where a problem has several losses, each technique works on
one of them, and sees targets and outputs of that one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from tests.conformance.problems import BATCH, SIZE, Part, Problem, seeded

__all__ = [
    "EPOCHS",
    "LEARNING_RATE",
    "MOMENTUM",
    "Hand",
    "Loop",
    "Moment",
    "View",
    "evaluate_by_hand",
    "train_by_hand",
]

EPOCHS, LEARNING_RATE, MOMENTUM = 2, 0.05, 0.9  # those of the harness


@dataclass
class Moment:
    """A step of the loop.

    Args:
        x: Inputs ``(B, ...)``, mixed once they are.
        y: Targets as the data set has them.
        index: Positions in the data set ``(B,)``.
        count: Batches so far, this one included.
        random: Global random state of torch when the user's step began.

    Attributes:
        partners: ``(B,)`` where the batch is mixed, else ``None``.
        share: Each sample's own share.
        outputs: The network's output for each copy of the rows.
        features: Outputs of the layers by name, for the first copy.
        weights: Those that the network runs with, by name, with gradient to what is trained.

    """

    x: Tensor
    y: Tensor
    index: Tensor
    count: int
    random: Tensor | None = None
    partners: Tensor | None = None
    share: float = 1.0
    outputs: list[Tensor] = field(default_factory=list)
    features: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)

    def of(self, part: Part) -> "Moment":
        """The step as one of several losses has it."""
        return replace(self, y=part.targets(self.y), outputs=[o[:, part.outputs] for o in self.outputs])

    @property
    def probabilities(self) -> Tensor:
        """Mean over the copies of the predicted probabilities."""
        return torch.stack([output.softmax(1) for output in self.outputs]).mean(0)

    @property
    def logits(self) -> Tensor:
        """The output; of several copies the logarithm of their mean probabilities."""
        return self.outputs[0] if len(self.outputs) == 1 else self.probabilities.log()

    def mixed(self, rows: Tensor) -> Tensor:
        """What a sample has of one row per sample: its own, or a share of two."""
        return rows if self.partners is None else self.share * rows + (1 - self.share) * rows[self.partners]

    def draws(self, technique: Any, stream: str = "") -> torch.Generator:
        """The technique's own random generator in this step."""
        return technique.generator(SimpleNamespace(batches_so_far=self.count, stream=stream), same_on_ranks=True)


class Hand:
    """A technique's part of the loop: what a method returns is done; each does nothing unless it is overridden.

    Args:
        technique: The instance that is trained with, for its arguments and its random draws.

    """

    copies = 1
    comes_first = False  # whether its use of weights comes before that of others, whatever the order of the callbacks
    stands_inside = False  # whether what it does to a layer is done within, before outputs are changed
    kind = ""  # which of several losses it works on

    def __init__(self, technique: Any) -> None:
        self.technique = technique

    def latent(self, name: str, weight: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]] | None:
        """What is trained in place of a weight, and the weight as a function of it."""

    def begin(self, loop: "View") -> None:
        """Before the first step."""

    def own(self) -> Sequence[Tensor]:
        """Leaves that are trained beside the weights; asked once, after :meth:`begin`."""
        return ()

    def draw(self, epoch: int) -> Tensor | None:
        """Which samples the epoch is made of, in order."""

    def mix(self, moment: Moment) -> tuple[Tensor, Tensor, float] | None:
        """Mixed inputs, partners and own share, if it mixes this batch; asked while nobody has."""

    def observe(self, loop: "View", moment: Moment) -> None:
        """The batch is final."""

    def used(self, name: str, weight: Tensor) -> Tensor:
        """The weight that the network uses, with gradient."""
        return weight

    def edit(self, name: str, rows: Tensor, moment: Moment, copy: int) -> Tensor:
        """Output of a layer in one of the copies."""
        return rows

    def edit_input(self, name: str, rows: Tensor, moment: Moment) -> Tensor:
        """Input of a layer."""
        return rows

    def begin_evaluation(self, weights: dict[str, Tensor]) -> None:
        """Before an evaluation with these weights; the technique is the trained one."""

    def edit_evaluation(self, name: str, rows: Tensor) -> Tensor:
        """Output of a layer in evaluation."""
        return rows

    def change_input(self, output: Tensor, moment: Moment) -> Tensor:
        """What the loss is computed from, for the output of one copy, changed by those before already."""
        return output

    def change_targets(self, y: Tensor) -> Tensor | None:
        """Targets that replace the user's, in the same form."""

    def losses(self, output: Tensor, moment: Moment) -> Tensor | None:
        """Losses of the samples ``(B,)`` that replace the user's, for the output of one copy."""

    def weights(self, losses: Tensor) -> Tensor | None:
        """Weights of the samples ``(B,)``, whose mean without effect is 1."""

    def term(self, loop: "View", moment: Moment) -> Tensor | None:
        """Joins the loss; ``()``."""

    def penalty(self, weights: dict[str, Tensor]) -> Tensor | None:
        """A term of the weights alone; ``()``."""

    def gradient(self, name: str, gradient: Tensor) -> Tensor:
        """The gradient of a weight, with those of penalties, that the optimizer gets."""
        return gradient

    def rests(self, name: str, moment: Moment) -> bool:
        """Whether a weight is left alone by the optimizer in this step."""
        return False

    def freezes_own(self, moment: Moment) -> bool:
        """Whether what others train beside the weights is left alone by the optimizer in this step."""
        return False

    def follow(self, loop: "View") -> None:
        """After the optimizer's step, before anybody looks at the new weights."""

    def after_step(self, loop: "View", moment: Moment) -> None:
        """After the optimizer's step."""

    def after_epoch(self, loop: "View", epoch: int) -> None:
        """After the last step of an epoch, counted from 0."""

    def end(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights to end with, before the network's own use of them."""
        return weights


class Loop:
    """Weights, data, and the steps.

    Args:
        problem: What is trained on what.
        hands: The techniques' parts, in the order of the callbacks.
        random: Global random state of torch before each step.

    """

    def __init__(self, problem: Problem, hands: Sequence[Hand], random: Sequence[Tensor] = ()) -> None:
        self.problem, self.hands, self.random = problem, hands, random
        self.parts = problem.parts or {"": Part(problem.loss, slice(None), lambda y: y, problem.each)}
        self.views = {kind: View(self, part) for kind, part in self.parts.items()}
        with seeded(0):
            self.net = problem.net().eval()
        with seeded(1):
            self.x, self.y = problem.data(SIZE)
        self.count = 0
        self.leaves: dict[str, Tensor] = {}
        self.maps: dict[str, Callable[[Tensor], Tensor]] = {}
        for name, parameter in self.net.named_parameters():
            self._add(f"net.{name}", parameter.detach().clone())

    def _add(self, name: str, weight: Tensor) -> None:
        for hand in self.hands:
            latent = hand.latent(name, weight)
            if latent is not None:
                weight, self.maps[name] = latent
        self.leaves[name] = weight.requires_grad_()

    def weights(self) -> dict[str, Tensor]:
        """The weights by the module's names, with gradient to what is trained."""
        named = {name: self.maps[name](leaf) if name in self.maps else leaf for name, leaf in self.leaves.items()}
        changing = [hand for hand in self.hands if type(hand).gradient is not Hand.gradient]
        if changing:
            # Of a leaf the hook would stay from step to step.
            named = {name: weight.view_as(weight) for name, weight in named.items()}
            for name, weight in named.items():
                for hand in changing:
                    weight.register_hook(lambda gradient, hand=hand, name=name: hand.gradient(name, gradient))
        return named

    def constants(self) -> dict[str, Tensor]:
        """A copy of the present weights."""
        return {name: weight.detach().clone() for name, weight in self.weights().items()}

    def steps(self, epoch: int) -> Iterator[Moment]:
        """The batches of an epoch."""
        drawn = [order for hand in self.hands if (order := hand.draw(epoch)) is not None]
        order = drawn[0] if drawn else torch.randperm(SIZE, generator=torch.Generator().manual_seed(epoch))
        for index in order.split(BATCH):
            self.count += 1
            random = self.random[self.count - 1] if len(self.random) else None
            yield Moment(self.x[index], self.y[index], index, self.count, random)

    def run(
        self,
        weights: dict[str, Tensor],
        x: Tensor,
        edit: Callable[[str, Tensor], Tensor] = lambda _, rows: rows,
        given: Callable[[str, Tensor], Tensor] = lambda _, rows: rows,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The network layer by layer: its output, and that of each layer by name."""
        features = {}
        for child, layer in self.net.named_children():
            name = f"net.{child}"
            own = {key[len(name) + 1 :]: w for key, w in weights.items() if key.startswith(f"{name}.")}
            x = features[name] = edit(name, functional_call(layer, own, given(name, x)))
        return x, features

    def train(self) -> None:
        """All epochs."""
        for hand in self.hands:
            hand.begin(self.views[hand.kind])
        own = {hand: list(hand.own()) for hand in self.hands}
        leaves = [*self.leaves.values(), *(leaf for of_hand in own.values() for leaf in of_hand)]
        optimizer = torch.optim.SGD(leaves, LEARNING_RATE, MOMENTUM)
        for epoch in range(EPOCHS):
            for moment in self.steps(epoch):
                self._mix(moment)
                loss = self._loss(moment)
                optimizer.zero_grad()
                loss.backward()
                for name, leaf in self.leaves.items():
                    if any(hand.rests(name, moment) for hand in self.hands):
                        leaf.grad = None
                self._drop(own, moment)
                optimizer.step()
                for hand in self.hands:
                    hand.follow(self.views[hand.kind])
                for hand in self.hands:
                    hand.after_step(self.views[hand.kind], moment)
            for hand in self.hands:
                hand.after_epoch(self.views[hand.kind], epoch)

    def _drop(self, own: dict[Hand, list[Tensor]], moment: Moment) -> None:
        freezing = [hand for hand in self.hands if hand.freezes_own(moment)]
        for hand, leaves in own.items():
            if any(other is not hand for other in freezing):
                for leaf in leaves:
                    leaf.grad = None

    def result(self) -> dict[str, Tensor]:
        """The module's weights when the fit has ended."""
        weights = self.constants()
        for hand in self.hands:
            weights = hand.end(weights)
        return {name: weight.detach() for name, weight in self.used(weights).items()}

    def used(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights as the network uses them."""
        for hand in sorted(self.hands, key=lambda hand: not hand.comes_first):
            weights = {name: hand.used(name, weight) for name, weight in weights.items()}
        return weights

    def _mix(self, moment: Moment) -> None:
        for hand in self.hands:
            found = None if moment.partners is not None else hand.mix(moment)
            if found is not None:
                moment.x, moment.partners, moment.share = found
        for hand in self.hands:
            hand.observe(self.views[hand.kind], self._seen(hand, moment))

    def _seen(self, hand: Hand, moment: Moment) -> Moment:
        return moment.of(self.parts[hand.kind]) if hand.kind else moment

    def _loss(self, moment: Moment) -> Tensor:
        weights = self.weights()
        used = moment.weights = self.used(weights)
        for copy in range(max([1, *(hand.copies for hand in self.hands)])):
            edit = partial(self.edited, moment=moment, copy=copy)
            output, features = self.run(used, moment.x, edit, partial(self.given, moment=moment))
            moment.outputs.append(output)
            moment.features = moment.features or features
        own = [
            self._weighted([hand for hand in self.hands if hand.kind == kind], part, moment.of(part))
            for kind, part in self.parts.items()
        ]
        terms = [hand.term(self.views[hand.kind], self._seen(hand, moment)) for hand in self.hands]
        penalties = [hand.penalty(weights) for hand in self.hands]
        return sum(value for value in (*own, *terms, *penalties) if value is not None)

    def edited(self, name: str, rows: Tensor, moment: Moment, copy: int) -> Tensor:
        """A layer's output as the techniques leave it."""
        for hand in sorted(self.hands, key=lambda hand: not hand.stands_inside):
            rows = hand.edit(name, rows, moment, copy)
        return rows

    def given(self, name: str, rows: Tensor, moment: Moment) -> Tensor:
        """A layer's input as the techniques leave it."""
        for hand in self.hands:
            rows = hand.edit_input(name, rows, moment)
        return rows

    def _weighted(self, hands: Sequence[Hand], part: Part, moment: Moment) -> Tensor:
        outputs = moment.outputs
        for hand in hands:
            outputs = [hand.change_input(output, moment) for output in outputs]
        moment = replace(moment, y=changed_targets(hands, moment.y))
        losses = torch.stack([_losses(hands, part, output, moment) for output in outputs]).mean(0)
        weighted = losses
        for hand in hands:
            factor = hand.weights(losses.detach())
            weighted = weighted if factor is None else weighted * factor
        return weighted.mean()


def changed_targets(hands: Sequence[Hand], y: Tensor) -> Tensor:
    """The targets of the loss that is trained."""
    for hand in hands:
        changed = hand.change_targets(y)
        y = y if changed is None else changed
    return y


class View:
    """The loop as a technique sees it that works on one of its losses; everything else is the loop's.

    Args:
        whole: The loop.
        part: The loss.

    """

    def __init__(self, whole: Loop, part: Part) -> None:
        self.whole, self.part = whole, part

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)

    def read(self, output: Tensor) -> Tensor:
        """The loss's columns of the network's output."""
        return output[:, self.part.outputs]

    def run(
        self, weights: dict[str, Tensor], x: Tensor, moment: Moment | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same of the network's output, and the outputs of its layers by name; as they are edited in a step."""
        if moment is None:
            output, features = self.whole.run(weights, x)
        else:
            whole = self.whole
            edit = partial(whole.edited, moment=moment, copy=0)
            output, features = whole.run(weights, x, edit, partial(whole.given, moment=moment))
        return self.read(output), features


def _losses(hands: Sequence[Hand], part: Part, output: Tensor, moment: Moment) -> Tensor:
    for hand in hands:
        losses = hand.losses(output, moment)
        if losses is not None:
            return losses
    own = _each(part, output, moment.y)
    if moment.partners is None:
        return own
    return moment.share * own + (1 - moment.share) * _each(part, output, moment.y[moment.partners])


def _each(part: Part, output: Tensor, y: Tensor) -> Tensor:
    if part.each is not None:
        return part.each(output, y)
    return torch.stack([part.loss(o[None], t[None]) for o, t in zip(output, y, strict=True)])


def train_by_hand(problem: Problem, hands: Sequence[Hand], random: Sequence[Tensor] = ()) -> dict[str, Tensor]:
    """Trains as a fit of the harness does.

    Args:
        problem: What is trained on what.
        hands: The techniques' parts, in the order of the callbacks.
        random: Global random state of torch before each step of the fit, for parts that follow the user's own draws.

    Returns:
        Weights by the module's names.

    """
    with torch.random.fork_rng(devices=[]):
        loop = Loop(problem, hands, random)
        loop.train()
    return loop.result()


def evaluate_by_hand(problem: Problem, weights: dict[str, Tensor], hand: Hand | None = None) -> float:
    """The loss of all samples, as a validation after a fit of the harness logs it.

    Args:
        problem: What was trained on what.
        weights: By the module's names.
        hand: A technique's part, if it acts in evaluation.

    Returns:
        The loss.

    """
    loop = Loop(problem, [])
    if hand is not None:
        hand.begin_evaluation(weights)
    edit = (lambda _, rows: rows) if hand is None else hand.edit_evaluation
    with torch.no_grad():
        return float(problem.loss(loop.run(weights, loop.x, edit)[0], loop.y))
