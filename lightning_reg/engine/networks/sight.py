"""What a pass made of a batch that is not the user's own step: its loss call and the outputs of layers."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_reg.engine.host import distributed
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.generators import own_randomness
from lightning_reg.engine.host.modules import BatchNorm, own_buffers
from lightning_reg.engine.host.quiet import silenced
from lightning_reg.engine.loss.call import LossCall, loss_call
from lightning_reg.engine.loss.call_by_hand import call_by_hand
from lightning_reg.engine.loss.choice import Selection
from lightning_reg.engine.loss.elements import bind
from lightning_reg.engine.loss.mixin import LossMixin
from lightning_reg.engine.loss.watch import Interception, call_site

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    from lightning_reg.engine.host.owner import Owner
    from lightning_reg.engine.step import Step
    from lightning_reg.engine.technique import Technique

__all__ = ["SeenCall", "Sight", "beside_the_step", "kept_buffers"]


@dataclass(frozen=True)
class Sight:
    """What a second network, or a further pass of the user's, made of a batch.

    A second network's is without gradient unless it was asked for; that of a further pass is with gradient.

    Args:
        call: The loss call of its ``training_step``, the same one as of the user's module; ``None`` if it was not asked
            for, or the step made no loss.
        features: Outputs of the named layers.
        made_loss: Whether its ``training_step`` returned a loss that has a gradient.

    """

    call: LossCall | None
    features: Mapping[str, Any]
    made_loss: bool = False


class SeenCall:
    """Sees the loss calls of a pass, and keeps the one that a technique works on.

    Args:
        module: The module that runs.
        interception: Sees the loss functions, from one pass to the next.

    Attributes:
        with_gradient: Of each call of the pass that counts, something that has a gradient, while :meth:`watch` lasts.
        without_gradient: How many calls did not count although gradients were on.

    """

    def __init__(self, module: "LightningModule", interception: Interception) -> None:
        self._module, self._interception = module, interception
        self._step: Step | None = None
        self._selection: Selection[Owner] = Selection(())
        self._taken: LossCall | None = None
        self._keep: Callable[[dict[str, Any]], dict[str, Any]] = _detached
        self.with_gradient: list[Tensor] = []
        self.without_gradient = 0

    @contextmanager
    def watch(self, step: "Step", technique: "Owner | None", *, gradient: bool) -> Iterator[None]:
        """A context in which the calls are seen.

        Args:
            step: The step that a call belongs to.
            technique: Whose ``loss`` chooses the call; ``None`` if none is wanted.
            gradient: Whether the call is kept with its graph.

        """
        self._step, self._selection, self._taken = step, Selection([] if technique is None else [technique]), None
        self._keep = _unchanged if gradient else _detached
        self.without_gradient = 0
        try:
            if not isinstance(self._module, LossMixin):
                with self._interception.watch(self._intercept):
                    yield
                return
            replaced = host.Replacement(self._module, "reduce_loss", self._reduce_loss)
            try:
                yield
            finally:
                replaced.undo()
        finally:
            self._step = None
            self.with_gradient = []

    def chosen(self) -> LossCall | None:
        """What was seen of the pass, handed out once.

        Returns:
            The call; ``None`` if there was none.

        Raises:
            MisconfigurationException: If it is not certain which one is meant.

        """
        if self._selection.seen:
            self._selection.check()
        call, self._taken = self._taken, None
        return call

    def _intercept(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = bind(function, args, kwargs)
        values = arguments.values()
        differentiable = next((v for v in values if isinstance(v, Tensor) and v.requires_grad), None)
        if self._step is not None and torch.is_grad_enabled() and self._counts(differentiable):
            self._note(loss_call(function, self._keep(arguments), self._step, call_site()))
        return function(*args, **kwargs)

    def _reduce_loss(
        self,
        per_sample_loss: Tensor,
        *,
        logits: Tensor | None = None,
        targets: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> Tensor:
        differentiable = per_sample_loss if per_sample_loss.requires_grad else None
        if self._step is not None and self._counts(differentiable):
            handed_over = self._keep({"loss": per_sample_loss, "logits": logits})
            self._note(
                call_by_hand(handed_over["loss"], handed_over["logits"], targets, indices, self._step, call_site())
            )
        return per_sample_loss.mean()

    def _counts(self, differentiable: Tensor | None) -> bool:
        if differentiable is None:
            self.without_gradient += 1
            return False
        self.with_gradient.append(differentiable)
        return True

    def _note(self, call: LossCall) -> None:
        if self._selection.take(call.name, call.site, str(call)) or self._selection.late:
            self._taken = call


def _detached(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in arguments.items()}


def _unchanged(arguments: dict[str, Any]) -> dict[str, Any]:
    return arguments


@contextmanager
def kept_buffers(module: nn.Module, *, except_norms: bool = False) -> Iterator[None]:
    """Buffers of a module are at the end what they were.

    Args:
        module: The module.
        except_norms: Whether statistics of batch norm go on from what they were meanwhile.

    """
    # In eval mode too: `training_step` may move them itself. Copies stand in for them, because a graph that outlives
    # the pass allows no writing into what it saved.
    copies = {id(buffer): buffer.detach().clone() for buffer in module.buffers()}
    places = [(layer, own, dict(own)) for layer in module.modules() if (own := own_buffers(layer))]
    try:
        for _, place, before in places:
            place.update({name: None if buffer is None else copies[id(buffer)] for name, buffer in before.items()})
        yield
    finally:
        for layer, place, before in places:
            if except_norms and isinstance(layer, BatchNorm):
                for name, buffer in before.items():
                    after = place[name]
                    if buffer is not None and after is not None:
                        buffer.data.copy_(after)  # unseen by graphs that saved it, and do not read it
            place.update(before)


@contextmanager
def beside_the_step(
    technique: "Technique", step: "Step", purpose: str, *, norms_follow: bool = False
) -> Iterator[None]:
    """The user's module may run once more, and nobody notices.

    Nothing is logged; metrics, buffers and random states are put back, and what is drawn meanwhile depends on the
    technique's seed, the purpose, the rank and the count of batches.

    Args:
        technique: Who runs it.
        step: The present step.
        purpose: What for.
        norms_follow: Whether statistics of batch norm go on from what they were meanwhile.

    """
    seed = technique.derived_seed(f"{purpose} {distributed.rank()} {step.batches_so_far}{step.stream}")
    with (
        own_randomness(seed),
        silenced(step.module, step.trainer),
        host.metrics_kept(step.module),
        kept_buffers(step.module, except_norms=norms_follow),
    ):
        yield
