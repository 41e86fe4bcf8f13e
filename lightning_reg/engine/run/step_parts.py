"""Parts around what the step has returned, and around the optimizer's step; what techniques train of their own."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.generators import own_randomness
from lightning_reg.engine.host.names import plain_name
from lightning_reg.engine.loss.result import loss_of, with_loss
from lightning_reg.engine.run.part import Part
from lightning_reg.engine.run.period_part import resting
from lightning_reg.engine.run.phases import OnGradients, OnModules, OnParameters, OnStep, taking_part
from lightning_reg.engine.weights import shards
from lightning_reg.engine.weights.penalties import add_penalties_

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle

    from lightning_reg.engine.step import Step

__all__ = ["GradientPart", "OwnPart", "PenaltyPart", "TermPart", "log_joined", "observed_as_before"]


def log_joined(step: "Step", technique: Any, name: str, value: Tensor, loss: Tensor | None) -> None:
    """Logs a scalar that joins the loss: under the technique's key, and in the sum of all.

    Args:
        step: The step.
        technique: Whose it is.
        name: What it is.
        value: Its value.
        loss: The loss without it; ``None`` where the step returned none.

    """
    step.log(technique, name, value)
    if loss is not None:
        step.scalars.setdefault("reg/loss/base", loss.detach())
        step.scalars["reg/loss/total"] = step.scalars.get("reg/loss/total", loss.detach()) + value.detach()


class TermPart(Part):
    """Terms that join the loss of a step.

    Args:
        techniques: Those that take part.

    """

    def __init__(self, techniques: Sequence[OnStep]) -> None:
        self._techniques = techniques

    @override
    @contextmanager
    def around(self, step: "Step") -> Iterator[None]:
        active = [t for t in self._techniques if t in step.active and t not in step.resting]
        by_hand = not step.module.automatic_optimization
        if by_hand:
            positions = count()
            step.add_terms = lambda loss: self._joined(loss, step, self._handed(active, next(positions)))
        yield
        loss = None if by_hand else loss_of(step.output)
        if loss is not None:
            step.output = with_loss(step.output, self._joined(loss, step, active))

    def _handed(self, active: list[OnStep], position: int) -> list[OnStep]:
        """Those whose terms join the loss that the user's code hands over as the first, the second of a step."""
        unsure = [technique for technique in active if technique.loss is None]
        if position and unsure:
            raise MisconfigurationException(
                f"{type(unsure[0]).__name__}: the step hands over several losses, and the term joined the first. Say"
                " which one it is to join: `loss=0` for the first, `loss=1` for the second."
            )
        return [technique for technique in active if technique.loss in (position, None)]

    def _joined(self, loss: Tensor, step: "Step", techniques: list[OnStep]) -> Tensor:
        total = loss = resting(loss) if step.alone else loss
        with step.trainer.precision_plugin.train_step_context():
            for technique in techniques:
                with observed_as_before(step):
                    term = technique.step_term(step)
                if term is None:
                    term = loss.new_zeros(())  # logged as such: all ranks log the same names
                if term.dim():
                    raise MisconfigurationException(
                        f"{type(technique).__name__}: `step_term` must return a scalar, got a tensor of shape"
                        f" {tuple(term.shape)}."
                    )
                total = total + term
                if step.is_logging:
                    log_joined(step, technique, "term", term, loss)
        return total


@contextmanager
def observed_as_before(step: "Step") -> Iterator[None]:
    """Of layers that a term runs (an encoder, on other names), others still see what the step itself made of them."""
    features, passes = dict(step.features), {name: list(rows) for name, rows in step.passes.items()}
    yield
    for held, before in ((step.features, features), (step.passes, passes)):
        held.clear()
        held.update(before)


class GradientPart(Part):
    """Gradients changed before an optimizer's step, and what follows it.

    Args:
        trainer: The Trainer.
        module: The user's module.
        techniques: Those that take part.

    """

    def __init__(self, trainer: "Trainer", module: "LightningModule", techniques: Sequence[OnGradients]) -> None:
        self._trainer, self._module = trainer, module
        self._changing = taking_part(techniques, OnGradients, "change_gradients")
        # An average is one of the weights as the step leaves them, whoever changes them in whatever order.
        self._following = sorted(taking_part(techniques, OnGradients, "after_step"), key=lambda t: t.only_follows)
        self._active: Sequence[Any] = ()
        self._names: dict[int, str] = {}
        self._handles: list[RemovableHandle] = []
        self._stepped = False

    @override
    def start(self) -> None:
        self._names = {id(p): plain_name(name) for name, p in self._module.named_parameters()}
        # The scaler of half precision calls no step that it skips, and so nothing that follows it.
        for optimizer in self._trainer.optimizers:
            self._handles.append(optimizer.register_step_post_hook(self._note))

    def _note(self, *_: Any) -> None:
        self._stepped = True

    @override
    @contextmanager
    def around(self, step: "Step") -> Iterator[None]:
        self._active = step.active
        yield

    @override
    def begin_step(self) -> None:
        self._active = ()  # in a step in which no technique is active the part is not entered

    @override
    def before_optimizer(self, optimizer: "Optimizer") -> None:
        changing = [technique for technique in self._changing if technique in self._active]
        if not changing or host.skips_step(self._trainer, optimizer):
            return
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        scale = host.gradient_scale(self._trainer, optimizer)
        gradients = {self._names[id(p)]: p.grad for p in params if id(p) in self._names}
        with torch.no_grad(), _unscaled(list(gradients.values()), scale):
            for technique in changing:
                technique.change_gradients(gradients)

    @override
    @contextmanager
    def around_optimizer(self, optimizer: "Optimizer") -> Iterator[None]:
        self._stepped = False
        yield
        following: list[Callable[..., None]] = [t.after_step for t in self._following if t in self._active]
        if self._stepped:
            with torch.no_grad():
                for follow in following:
                    follow(self._module, optimizer)

    @override
    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


class PenaltyPart(Part):
    """Penalties on parameters: their gradients, and their values for the log.

    Args:
        trainer: The Trainer.
        module: The user's module.
        techniques: Those that take part.

    """

    def __init__(self, trainer: "Trainer", module: "LightningModule", techniques: Sequence[OnParameters]) -> None:
        self._trainer, self._module, self._techniques = trainer, module, techniques
        self._active: Sequence[OnParameters] = techniques

    @override
    def start(self) -> None:
        count = len(self._trainer.optimizers)
        for technique in self._techniques:
            if technique.optimizer is not None and not -1 < technique.optimizer < count:
                raise MisconfigurationException(
                    f"{type(technique).__name__}: `optimizer` must be the position of one of the {count} that"
                    f" `configure_optimizers` returns, 0 for the first, got {technique.optimizer}."
                )

    @override
    def begin_step(self) -> None:
        self._active = ()  # in a step in which no technique is active the part is not entered

    @override
    @contextmanager
    def around(self, step: "Step") -> Iterator[None]:
        self._active = [technique for technique in self._techniques if technique in step.active]
        with torch.no_grad():
            found = [(t, t.penalty(self._module)) for t in self._active] if step.is_logging else []
        yield
        self._log({technique: shards.whole(value) for technique, value in found if value is not None}, step)

    def _log(self, penalties: dict[OnParameters, Tensor], step: "Step") -> None:
        loss = loss_of(step.output)
        for technique, penalty in penalties.items():
            log_joined(step, technique, "penalty", penalty, loss)  # by hand no loss need be returned

    @override
    def before_optimizer(self, optimizer: Any) -> None:
        asked = [t for t in self._active if t.optimizer is None or self._trainer.optimizers[t.optimizer] is optimizer]
        if asked:
            penalties = [technique.penalty for technique in asked]
            add_penalties_(penalties, self._module, self._trainer, optimizer, type(asked[0]).__name__)


class OwnPart(Part):
    """Modules that techniques train of their own.

    Args:
        trainer: The Trainer.
        module: The user's module.
        techniques: Those that take part.

    """

    def __init__(self, trainer: "Trainer", module: "LightningModule", techniques: Sequence[OnModules]) -> None:
        self._trainer, self._module, self._techniques = trainer, module, techniques
        self._step: Step | None = None
        self._stepping: list[OnModules] = []
        self._unasked = list(techniques)

    @override
    def prepare(self) -> None:
        for technique in self._techniques:
            fresh = not technique.own.modules or host.batches_so_far(self._trainer) == 0
            with own_randomness(technique.derived_seed("own modules")):
                modules = technique.own_modules(self._module) if fresh else technique.own.modules
            technique.own.begin(modules, self._module.device, type(technique).__name__, fresh=fresh)
        self._techniques = [technique for technique in self._techniques if technique.own.modules]

    @override
    def start(self) -> None:
        for technique in [technique for technique in self._techniques if technique.own.parameters]:
            count, position = len(self._trainer.optimizers), technique.own_optimizer
            if (position is None and count > 1) or not -1 < (position or 0) < count:
                raise MisconfigurationException(
                    f"{type(technique).__name__} trains modules of its own with the user's optimizer, of which there"
                    f" are {count}. Say which one in `own_optimizer`, by its position: 0 for the first."
                )

    @override
    def begin_step(self) -> None:
        self._step = None  # in a step in which no technique is active the part is not entered
        for technique in self._techniques:
            if technique.own.is_loaded:  # the learning-rate finder puts states back
                technique.own.begin(technique.own.modules, self._module.device, type(technique).__name__)

    @override
    @contextmanager
    def around(self, step: "Step") -> Iterator[None]:
        self._step = step
        yield

    @override
    @contextmanager
    def around_optimizer(self, optimizer: "Optimizer") -> Iterator[None]:
        of = {t: self._trainer.optimizers[t.own_optimizer or 0] for t in self._techniques}
        self._stepping = [t for t in self._techniques if of[t] is optimizer]
        with ExitStack() as stack:
            for technique in self._stepping:
                stack.enter_context(technique.own.lent(optimizer, type(technique).__name__))
            yield

    @override
    def after_closure(self) -> None:
        # While they are still scaled: what is not finite on one rank is so on all, and all skip the step.
        step = self._step
        if step is None:
            return
        for technique in self._stepping:
            if technique in step.resting or technique in step.frozen_own:
                technique.own.drop_gradients()
            elif technique in step.active:
                self._ask(technique)
                technique.own.average_gradients()

    def _ask(self, technique: OnModules) -> None:
        """Says, in the first step of each, which of its parameters get no gradient on any rank: one collective."""
        if technique not in self._unasked:
            return
        self._unasked.remove(technique)
        missing = technique.own.without_gradient()
        if missing:
            host.rank_zero_warn(
                f"{type(technique).__name__} trains {', '.join(map(repr, missing))} of its own, and in its first step"
                " no gradient reached them on any rank: they are not used there, or detached from the loss. If nothing"
                " reaches them later either, they stay as they are."
            )

    @override
    def rest(self) -> None:
        self._step = None  # which holds its batch

    @override
    def close(self) -> None:
        self.rest()
        for technique in self._techniques:
            technique.own.end()


@contextmanager
def _unscaled(gradients: list[Tensor], scale: Tensor | None) -> Iterator[None]:
    """Gradients that a fused optimizer will divide by the scale itself are so meanwhile."""
    if scale is not None:
        torch._foreach_div_(gradients, scale)
    yield
    if scale is not None:
        torch._foreach_mul_(gradients, scale)
