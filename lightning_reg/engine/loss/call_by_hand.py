"""The loss call of a module that computes its losses itself and hands them over."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.loss.call import LossCall, call_of
from lightning_reg.engine.loss.elements import Decomposition
from lightning_reg.engine.loss.evaluation import Evaluation

if TYPE_CHECKING:
    from lightning_reg.engine.data.views import Views
    from lightning_reg.engine.step import Step

__all__ = ["HandedOver", "call_by_hand"]


class HandedOver(Evaluation):
    """Losses that were handed over: one per sample, already computed, of which the mean counts.

    Args:
        per_sample: ``(B,)``, with gradient.
        logits: ``(B, C)`` if the user gave them.
        targets: Whatever the user gave.

    """

    def __init__(self, per_sample: Tensor, logits: Tensor | None, targets: Tensor | None) -> None:
        self.arguments = {"per_sample_loss": per_sample}
        self._logits, self._targets = logits, targets

    @property
    @override
    def input(self) -> Tensor:
        value: Tensor = self.arguments["per_sample_loss"]
        return value

    @property
    @override
    def output(self) -> Tensor | None:
        return self._logits

    @property
    @override
    def target(self) -> Tensor | None:
        return self._targets

    @property
    @override
    def reduction(self) -> str:
        return "mean"

    @property
    @override
    def rows(self) -> int:
        return len(self.input)

    @property
    @override
    def has_maps(self) -> bool:
        return False

    @property
    @override
    def mass(self) -> Tensor | None:
        return None

    @override
    def logits(self, batch_size: int, call: object) -> Tensor:
        logits = self._logits
        if logits is None or logits.dim() != 2 or len(logits) != batch_size:
            shape = None if logits is None else tuple(logits.shape)
            raise MisconfigurationException(
                f"A technique needs logits of shape ({batch_size}, C), `reduce_loss` got {shape}: call"
                " `self.reduce_loss(per_sample_loss, logits=logits, targets=targets)`."
            )
        return logits

    @override
    def with_target(self, target: Tensor, call: object) -> Evaluation:
        raise MisconfigurationException(
            "A technique replaces the targets, but `reduce_loss` gets losses that are already computed. Compute the"
            " loss with a function of torch.nn.functional and leave LossMixin out."
        )

    @override
    def with_inputs(self, inputs: Sequence[Tensor], call: object) -> Evaluation:
        raise MisconfigurationException(
            "A technique changes the logits of the loss, but `reduce_loss` gets losses that are already computed."
            " Compute the loss with `F.cross_entropy` and leave LossMixin out."
        )

    @override
    def narrowed(self, views: "Views", block: int = 0) -> Evaluation | None:
        narrowed = views.narrow({"input": self.input}, block)
        if narrowed is None:
            return None
        logits, targets = (p if p is None else views.block(p, block) for p in (self._logits, self._targets))
        return HandedOver(narrowed["input"], logits, targets)

    @override
    def _take_apart(self) -> Decomposition:
        return Decomposition(self.input, self.input.mean(), "mean")

    @override
    def _compute(self) -> Tensor:
        return self.decomposition.plain

    @override
    def __str__(self) -> str:
        return f"reduce_loss({tuple(self.input.shape)})"


def call_by_hand(
    per_sample: Tensor,
    logits: Tensor | None,
    targets: Tensor | None,
    indices: Tensor | None,
    step: "Step",
    site: str = "",
) -> LossCall:
    """The call of losses that were handed over by ``LossMixin.reduce_loss``.

    Args:
        per_sample: ``(B,)``, with gradient.
        logits: ``(B, C)`` if the user gave them.
        targets: Whatever the user gave.
        indices: ``(B,)`` if the user gave them.
        step: The training step that it happened in.
        site: ``file.py:line`` or "".

    Returns:
        The call.

    """
    return call_of(HandedOver(per_sample, logits, targets), step, site, indices)
