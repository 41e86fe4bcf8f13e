r"""The loss of a batch whose samples were mixed in pairs.

.. math:: \lambda\, L(z, y) + (1 - \lambda)\, L(z, y_\pi)

Both terms are the user's own loss, so its reduction, class weights, ``ignore_index`` and label smoothing keep their
meaning: element by element :math:`\ell_e = \lambda \ell^{own}_e + (1 - \lambda) \ell^{other}_e`, with mass
:math:`m_e = \lambda m^{own}_e + (1 - \lambda) m^{other}_e`. The partners are a permutation of the batch, so with one
:math:`\lambda` for the batch the two terms have the same sum of weights, and so has the mixed loss.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.data.batches import lies_by_sample
from lightning_reg.engine.data.mixing import Mixing
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.loss.call import LossCall
from lightning_reg.engine.loss.call_by_hand import HandWrittenCall
from lightning_reg.engine.loss.elements import Decomposition

__all__ = ["MixedCall", "mixed_call"]


def mixed_call(call: LossCall, mixing: Mixing, *, certain: bool = True) -> "MixedCall":
    """A loss call as one for mixed samples.

    Args:
        call: The call.
        mixing: How the samples of the batch were mixed.
        certain: Whether its target is known to be the labels; else it follows if it holds class indices, or if the
            technique's ``loss`` chooses the call.

    Returns:
        A call whose elements, masses and sample losses are those of the mixed loss; ``target`` and ``labels`` are those
        of the samples themselves.

    Raises:
        MisconfigurationException: If the losses are computed already, or the target may be made of anything.

    """
    name = type(mixing.by).__name__
    if isinstance(call, HandWrittenCall):
        raise MisconfigurationException(
            f"{name}: the samples of the batch are mixed, but `reduce_loss` gets losses that are"
            " already computed, for targets that are not. Let the technique mix the targets in the batch as well."
        )
    target = call.given_target
    unsaid = not certain and mixing.by.loss is None
    if unsaid and target is not None and target.is_floating_point():
        advice = f", or {mixing.advice}" if mixing.advice else ""
        raise MisconfigurationException(
            f"{name}: the samples of the batch are mixed, but whether the target of {call} follows is not certain: it"
            " is no entry of the batch, so it may be made of the labels or of the mixed inputs (a teacher's output, an"
            f' autoencoder\'s target). If it is made of the labels, say so, `{name}(loss="{call.name}")`{advice}; if'
            f" another loss has the labels, choose that one with `loss=...`; if none has, leave {name} out."
        )
    return MixedCall(call, mixing)


class MixedCall(LossCall):
    """A loss call for mixed samples.

    Args:
        call: The user's call.
        mixing: How the samples were mixed.

    """

    def __init__(self, call: LossCall, mixing: Mixing) -> None:
        super().__init__(call.function, call.arguments, call.step, call.site)
        self.mixing, self._call = mixing, call

    @override
    def replace_target(self, target: Tensor) -> None:
        """See the base class."""
        super().replace_target(target)
        for name in ("own", "other"):
            self.__dict__.pop(name, None)

    @property
    @override
    def input(self) -> Tensor:
        """See the user's call."""
        return self._call.input

    @property
    @override
    def logits(self) -> Tensor:
        """See the user's call."""
        return self._call.logits

    @override
    def copies(self) -> Sequence[LossCall]:
        """The call for each copy of the rows, mixed as this one is."""
        calls = [MixedCall(call, self.mixing) for call in self._call.with_arguments(self.arguments).copies()]
        for call in calls:
            call.given_target = self.given_target
        return calls

    @cached_property
    def own(self) -> LossCall:
        """The call for the samples' own targets."""
        return self._call.with_arguments(self.arguments)

    @cached_property
    def other(self) -> LossCall:
        """The call for their partners' targets."""
        return self._call.with_arguments(self._partners())

    @cached_property
    @override
    def decomposition(self) -> Decomposition:
        """Elements of the mixed loss, with gradient."""
        own, other = self.own.decomposition, self.other.decomposition
        elements = self._between(own.elements, other.elements)
        if own.reduction == "none":
            return Decomposition(elements, elements, "none")
        if not isinstance(self.mixing.weights, Tensor):
            return Decomposition(elements, self._between(own.plain, other.plain), own.reduction)
        total = elements.sum()
        if own.reduction == "mean":
            total = total / (elements.numel() if self.mass is None else self.mass.sum().to(total.dtype))
        return Decomposition(elements, total, own.reduction)

    @cached_property
    @override
    def mass(self) -> Tensor | None:
        """Mixed mass of each element."""
        own, other = self.own.mass, self.other.mass
        return None if own is None or other is None else self._between(own, other)

    @cached_property
    @override
    def plain(self) -> Tensor:
        """The mixed loss under the user's own reduction."""
        if "decomposition" in self.__dict__ or isinstance(self.mixing.weights, Tensor):
            return self.decomposition.plain
        return self._between(self.own.plain, self.other.plain)

    def _between(self, own: Tensor, other: Tensor) -> Tensor:
        lam = self.mixing.weights
        if isinstance(lam, Tensor):  # both are per element, in the order of the samples
            lam = lam.to(own.device, own.dtype).repeat_interleave(own.numel() // len(lam)).reshape(own.shape)
        return lam * own + (1.0 - lam) * other

    def _partners(self) -> dict[str, Any]:
        target = None if self.target_name is None else self.arguments[self.target_name]
        samples, name = len(self.mixing.permutation), type(self.mixing.by).__name__
        if target is None or self.function is F.ctc_loss:
            raise MisconfigurationException(
                f"{name}: the samples of the batch are mixed, but {self} has no target with a row per sample that could"
                " be mixed as well. Choose another call with `loss=...`."
            )
        rows = target.shape[0] if target.dim() else 1
        if rows != samples and not self._is_flattened(rows):
            raise MisconfigurationException(
                f"{name}: the batch has {samples} mixed samples, but the target of {self} has {rows} rows, and is no"
                " entry of the batch flattened sample after sample: whose target each row is cannot be known. Keep the"
                " samples' dimension, as in (B, C, T) with (B, T), or choose the call that compares with the labels of"
                " the batch with `loss=...`."
            )
        if target.dim():
            target = target.unflatten(0, (samples, rows // samples))[self.mixing.permutation].flatten(0, 1)
        return {**self.arguments, str(self.target_name): target}

    def _is_flattened(self, rows: int) -> bool:
        given, samples = self.given_target, len(self.mixing.permutation)  # another target has the order of the given
        return given is not None and given.shape[:1] == (rows,) and lies_by_sample(given, self.mixing.part, samples)
