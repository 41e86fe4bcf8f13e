"""The loss call of a module that computes its losses itself and hands them over."""

from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.loss import elements as losses
from lightning_reg.engine.loss.call import LossCall, SampleKind

if TYPE_CHECKING:
    from lightning_reg.engine.data.views import Views
    from lightning_reg.engine.host.owner import Owner
    from lightning_reg.engine.step import Samples, Step

__all__ = ["HandWrittenCall"]


class HandWrittenCall(LossCall):
    """A loss handed over by ``LossMixin.reduce_loss``: per sample, already computed.

    Args:
        per_sample: ``(B,)``, with gradient.
        logits: ``(B, C)`` if the user gave them.
        targets: Whatever the user gave.
        indices: ``(B,)`` if the user gave them.
        step: The training step that it happened in.
        site: ``file.py:line`` or "".

    """

    def __init__(
        self,
        per_sample: Tensor,
        logits: Tensor | None,
        targets: Tensor | None,
        indices: Tensor | None,
        step: "Step",
        site: str = "",
    ) -> None:
        self.target_name = None
        self.arguments = {"per_sample_loss": per_sample}
        self.step, self.site = step, site
        self.given_target = targets
        self.views, self._whole_output = None, logits
        self._logits, self._indices = logits, indices

    @property
    @override
    def whole_output(self) -> Tensor | None:
        """What was handed over as ``logits``, for the batch and its views."""
        return self._whole_output

    @override
    def narrow(self, views: "Views") -> None:
        """Leaves the rows of the batch alone in what was handed over."""
        narrowed = views.narrow({"input": self.input})
        if narrowed is not None:
            self.views, self.arguments = views, {"per_sample_loss": narrowed["input"]}
            parts = (self._logits, self.given_target, self._indices)
            self._logits, self.given_target, self._indices = (p if p is None else views.first(p) for p in parts)

    @property
    @override
    def name(self) -> str:
        """``reduce_loss``."""
        return "reduce_loss"

    @property
    @override
    def input(self) -> Tensor:
        """The losses as they were handed over."""
        value: Tensor = self.arguments["per_sample_loss"]
        return value

    @property
    @override
    def target(self) -> Tensor | None:
        """The targets as the user gave them."""
        self._check_reader()
        return self.given_target

    @property
    @override
    def reduction(self) -> str:
        """The mean, always."""
        return "mean"

    @property
    @override
    def kind(self) -> SampleKind:
        """A row, always."""
        return "row"

    @cached_property
    @override
    def batch_size(self) -> int:
        """Number of samples B."""
        return len(self.input)

    @cached_property
    @override
    def decomposition(self) -> losses.Decomposition:
        """The losses as they were handed over."""
        return losses.Decomposition(self.input, self.input.mean(), "mean")

    @cached_property
    @override
    def mass(self) -> Tensor | None:
        """``None``: each sample is one element, and all weigh the same."""
        return None

    @cached_property
    @override
    def plain(self) -> Tensor:
        """The mean of the losses."""
        return self.decomposition.plain

    @property
    @override
    def logits(self) -> Tensor:
        """Class scores ``(B, C)`` as the user gave them.

        Raises:
            MisconfigurationException: If they were not given or have no such shape.

        """
        if self._logits is None or self._logits.dim() != 2 or len(self._logits) != self.batch_size:
            shape = None if self._logits is None else tuple(self._logits.shape)
            raise MisconfigurationException(
                f"A technique needs logits of shape ({self.batch_size}, C), `reduce_loss` got {shape}: call"
                " `self.reduce_loss(per_sample_loss, logits=logits, targets=targets)`."
            )
        return self._logits

    @override
    def samples(self, technique: "Owner") -> "Samples":
        """Dataset indices: the user's own if given, see the base class."""
        if self._indices is not None:
            self.step.give_indices(self._indices)
        return super().samples(technique)

    @override
    def replace_target(self, target: Tensor) -> None:
        """Refused: the losses are computed already.

        Raises:
            MisconfigurationException: Always.

        """
        raise MisconfigurationException(
            "A technique replaces the targets, but `reduce_loss` gets losses that are already computed. Compute the"
            " loss with a function of torch.nn.functional and leave LossMixin out."
        )

    @override
    def __str__(self) -> str:
        return f"reduce_loss({tuple(self.input.shape)})" + (f" at {self.site}" if self.site else "")
