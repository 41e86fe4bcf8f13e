"""The pass over the training data that the Fisher information needs: what it can do, and the losses of the samples."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.continual.weight_anchors.core import Labels, Outputs, fisher_losses
from lightning_reg.engine.host.autograd import rows_of_output
from lightning_reg.engine.host.distributed import world_size
from lightning_reg.engine.host.errors import MisconfigurationException, in_the_name_of
from lightning_reg.engine.host.names import plain_name
from lightning_reg.engine.loss.choice import no_loss_seen
from lightning_reg.engine.loss.mixin import LossMixin

if TYPE_CHECKING:
    from lightning_reg.engine.loss.call import LossCall
    from lightning_reg.engine.networks.peer import Peer
    from lightning_reg.engine.step import Step
    from lightning_reg.engine.technique import Technique

__all__ = ["FisherPass"]

_SAMPLES_AT_ONCE = 4  # fewer do not pay for their calls
_SMALLEST_PART = 2  # of parts of four samples at most, as equal as they can be
_OUTPUTS: "dict[Callable[..., Tensor] | None, Outputs]" = {
    F.mse_loss: "numbers",
    F.l1_loss: "numbers",
    F.smooth_l1_loss: "numbers",
    F.huber_loss: "numbers",
    F.gaussian_nll_loss: "numbers",
    F.poisson_nll_loss: "counts",
    F.binary_cross_entropy_with_logits: "several",
}


class FisherPass:
    """How a network's samples are gone through for their gradients.

    The gradients of B samples out of one pass cost B passes back, so a few samples at a time are sent through the
    network, where that gives what the whole batch gives for them. Else (samples meet in the network, a part of the
    batch cannot be cut) the whole batch is.

    Args:
        owner: Whose pass it is.
        labels: At whose label the gradient is taken, see :func:`fisher_losses`.
        per_sample: Whether single samples count, not batches.

    Attributes:
        head: Names of the parameters that have a row for each class; none if they are not known.
        seen: Which classes were a target, ``(C,)``; ``None`` where there are no classes, or no targets.

    """

    def __init__(self, owner: "Technique", labels: Labels, *, per_sample: bool) -> None:
        self._owner, self._labels, self._per_sample = owner, labels, per_sample
        self.head: list[str] = []
        self.seen: Tensor | None = None
        self._cuts: bool | None = None

    def try_out(self, peer: "Peer", step: "Step", params: Sequence[Tensor]) -> None:
        """Looks on one batch what the pass can do, gradients included.

        Args:
            peer: The network.
            step: The batch.
            params: Of the network, that gradients are wanted of.

        Raises:
            MisconfigurationException: If the pass could not go through.

        """
        calls = self._look(peer, step)
        if calls:
            problem = _problem_of(
                self._losses_of(calls[-1], self._owner.generator(step, calls[-1].input.device)), params
            )
            if problem:
                raise MisconfigurationException(
                    f"{self._name}: gradients of single samples, which the Fisher information is made of, cannot be"
                    f" taken here ({problem}). Layers that are checkpointed need `use_reentrant=False`."
                )

    def losses(self, peer: "Peer", steps: "Iterable[Step]") -> Iterator[Tensor]:
        """Losses with gradient, one batch or part of a batch after the other.

        Args:
            peer: The network.
            steps: The batches.

        Yields:
            ``(B,)``.

        Raises:
            MisconfigurationException: If there is no batch with a loss.

        """
        generator: torch.Generator | None = None
        for step in steps:
            if self._cuts is None:
                self._look(peer, step)
            for part in step.parts(_SAMPLES_AT_ONCE) if self._cuts else [step]:
                call = peer.see(part, self._owner, gradient=True).call
                if call is not None:
                    generator = generator or self._owner.generator(part, call.input.device)
                    yield from self._finite_apart(peer, part, self._losses_of(call, generator), generator)
        if generator is None and world_size() == 1:
            raise MisconfigurationException(
                f"{self._name}: the training data gives no batch with a loss when the fit has ended. Let it start anew"
                " with each `iter` of the DataLoader."
            )

    def _look(self, peer: "Peer", step: "Step") -> "list[LossCall]":
        """The call for a batch, and that for a part of it if parts may stand for it; refuses what cannot be used."""
        sight = peer.see(step, self._owner, gradient=True)
        if sight.call is None:
            if sight.made_loss:
                raise no_loss_seen([self._owner], step.module, by_mixin=isinstance(step.module, LossMixin))
            return []
        whole = self._output(sight.call)
        names = {id(p): plain_name(name) for name, p in peer.module.named_parameters()}
        self.head = [names[id(p)] for p in rows_of_output(whole, whole.shape[1]) if id(p) in names]
        part = next(step.parts(_SMALLEST_PART))
        self._cuts = False
        if not self._per_sample or part is step or part.batch_sizes == step.batch_sizes:
            return [sight.call]
        try:
            call = peer.see(part, self._owner, gradient=True).call
            output = None if call is None else self._output(call)
        except (MisconfigurationException, RuntimeError):  # a part of the batch that cannot be cut
            return [sight.call]
        if call is None or output is None or not _are_rows_of(output, whole):
            return [sight.call]
        self._cuts = True
        return [sight.call, call]

    def _finite_apart(self, peer: "Peer", part: "Step", losses: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
        # In the gradients of a batch a sample that is not finite spoils those of the others.
        if not self._cuts or losses.isfinite().all():
            yield losses
            return
        try:
            calls = [peer.see(single, self._owner, gradient=True).call for single in part.parts(1)]
            singles = [self._losses_of(call, generator) for call in calls if call is not None]
        except (MisconfigurationException, RuntimeError):  # one sample alone cannot pass
            singles = [losses]
        yield from singles

    def _losses_of(self, call: "LossCall", generator: torch.Generator) -> Tensor:
        kept = None if call.sample_mass is None else call.sample_mass > 0
        output = self._output(call)
        wanted: Tensor | None = None
        outputs = _OUTPUTS.get(call.function, "classes")
        if self._labels == "true" and outputs != "classes":
            wanted = _prediction_and_target(call)[1].reshape(output.shape)
        elif self._labels == "true":
            wanted = call.labels if kept is None else call.labels.where(kept, 0)  # what is ignored may be no class
        if outputs == "classes":
            self._note_targets(call, output.shape[1], kept)
        variances = _variances(call).reshape(output.shape) if call.function is F.gaussian_nll_loss else None
        losses = fisher_losses(output, wanted, self._labels, generator, outputs, variances)
        return losses if kept is None else losses[kept]

    def _note_targets(self, call: "LossCall", classes: int, kept: Tensor | None) -> None:
        target = call.given_target
        if target is None:
            return
        if self.seen is None:
            self.seen = torch.zeros(classes, dtype=torch.bool, device=target.device)
        if target.is_floating_point() and target.dim() > 1:
            self.seen |= (target.flatten(1) > 0).any(0)
            return
        labels = call.labels if kept is None else call.labels[kept]
        self.seen[labels[(labels >= 0) & (labels < classes)]] = True

    def _output(self, call: "LossCall") -> Tensor:
        """Class scores of the samples, or the numbers that were predicted for them."""
        outputs = _OUTPUTS.get(call.function, "classes")
        if outputs == "classes":
            try:
                return call.logits
            except MisconfigurationException as error:
                raise in_the_name_of(self._owner, error) from error
        if self._labels == "argmax" and outputs != "several":
            of = "counts" if outputs == "counts" else "a Gaussian with variance 1 around the prediction"
            of = of.replace("variance 1", "these variances") if call.function is F.gaussian_nll_loss else of
            raise MisconfigurationException(
                f"{self._name}: {call} is a regression, whose most probable target is the prediction itself, where"
                f' the gradient is 0. Write `{self._name}(labels="sample")`, the Fisher information of {of}, or'
                ' `labels="true"`.'
            )
        prediction, target = _prediction_and_target(call)
        if prediction.shape != target.shape:
            raise MisconfigurationException(
                f"{self._name}: {call} compares tensors of different shapes, so it is not known which numbers belong to"
                " a sample. Give both the same shape."
            )
        if outputs == "counts" and not call.arguments.get("log_input", True):
            prediction = (prediction + call.arguments.get("eps", 1e-8)).log()
        return prediction.reshape(call.batch_size, -1)

    @property
    def _name(self) -> str:
        return type(self._owner).__name__


def _problem_of(losses: Tensor, params: Sequence[Tensor]) -> str | None:
    """Why `torch.autograd.grad` does not give the gradients that `backward` does; ``None`` if it gives them."""
    try:
        found = torch.autograd.grad(losses, params, torch.ones_like(losses), retain_graph=True, allow_unused=True)
        if any(gradient is None for gradient in found):
            # A part of the network that the graph does not show, since it runs only when its turn comes.
            losses.sum().backward()  # type: ignore[no-untyped-call]  # torch's
    except RuntimeError as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        return str(error).splitlines()[0]
    hidden = any(p.grad is not None and g is None for p, g in zip(params, found, strict=True))
    return "`torch.autograd.grad` gives none of a part of the network that `backward` trains" if hidden else None


def _variances(call: "LossCall") -> Tensor:
    """The variances of a Gaussian in the shape of the predictions, as torch reads them."""
    means, given = call.input, call.arguments["var"]
    values = given if isinstance(given, Tensor) else torch.full_like(means, given, requires_grad=False)
    values = values.unsqueeze(-1) if values.shape == means.shape[:-1] and values.shape != means.shape else values
    least = values.detach().clamp(min=call.arguments.get("eps", 1e-6))
    return (values + (least - values.detach())).expand_as(means)  # torch bounds the values, not their gradient


def _prediction_and_target(call: "LossCall") -> tuple[Tensor, Tensor]:
    """What a regression compares, the one with a gradient first: to the loss the order is the same."""
    pair = call.arguments["input"], call.arguments["target"]
    symmetric = _OUTPUTS.get(call.function) == "numbers"
    return pair[::-1] if symmetric and not pair[0].requires_grad else pair


def _are_rows_of(part: Tensor, whole: Tensor) -> bool:
    """Whether some samples have the rows that they have in the whole batch, up to the rounding of other kernels."""
    if part.shape[1:] != whole.shape[1:] or len(part) > len(whole):
        return False
    part, rows = part.detach().float(), whole[: len(part)].detach().float()
    largest = torch.where(rows.isfinite(), rows, 0.0).abs().amax() if rows.numel() else rows.sum()
    share = 1e-2 if whole.dtype.itemsize > 2 else 1e-1
    return torch.allclose(part, rows, rtol=share, atol=share * float(largest), equal_nan=True)
