r"""The loss of a batch whose samples were mixed in pairs.

.. math:: \lambda\, L(z, y) + (1 - \lambda)\, L(z, y_\pi)

Both terms are the user's own loss, so its reduction, class weights, ``ignore_index`` and label smoothing keep their
meaning: element by element :math:`\ell_e = \lambda \ell^{own}_e + (1 - \lambda) \ell^{other}_e`, with mass
:math:`m_e = \lambda m^{own}_e + (1 - \lambda) m^{other}_e`. The partners are a permutation of the batch, so with one
:math:`\lambda` for the batch the two terms have the same sum of weights, and so has the mixed loss.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.data.batches import lies_by_sample
from lightning_reg.engine.data.mixing import Mixing
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.loss.call import LossCall
from lightning_reg.engine.loss.call_by_hand import HandedOver
from lightning_reg.engine.loss.elements import Decomposition
from lightning_reg.engine.loss.evaluation import Derived, Evaluation

if TYPE_CHECKING:
    from lightning_reg.engine.data.views import Views

__all__ = ["Mixed", "check_mixed", "mixed_call"]


def mixed_call(call: LossCall, mixing: Mixing, *, certain: bool = True) -> LossCall:
    """A loss call as one for mixed samples.

    Args:
        call: The call.
        mixing: How the samples of the batch were mixed.
        certain: Whether its target is known to be the labels; else it follows if it holds class indices, or if the
            technique's ``loss`` chooses the call.

    Returns:
        A call whose elements, masses and sample losses are those of the mixed loss; ``target`` and ``labels`` are those
        of the samples themselves, and of maps with parts of the partner's the pasted ones.

    Raises:
        MisconfigurationException: If the losses are computed already, or the target may be made of anything.

    """
    name, advice = type(mixing.by).__name__, f", or {mixing.advice}" if mixing.advice else ""
    if isinstance(call.evaluation, HandedOver):
        raise MisconfigurationException(
            f"{name}: the samples of the batch are mixed, but `reduce_loss` gets losses that are already computed, for"
            f" targets that are not. Compute the loss with a function of torch.nn.functional and leave LossMixin out"
            f"{advice}."
        )
    target = call.given_target
    unsaid = not certain and mixing.by.loss is None
    if unsaid and target is not None and target.is_floating_point():
        raise MisconfigurationException(
            f"{name}: the samples of the batch are mixed, but whether the target of {call} follows is not certain: it"
            " is no entry of the batch, so it may be made of the labels or of the mixed inputs (a teacher's output, an"
            f' autoencoder\'s target). If it is made of the labels, say so, `{name}(loss="{call.name}")`{advice}; if'
            f" another loss has the labels, choose that one with `loss=...`; if none has, leave {name} out."
        )
    pasted = _pasted(call, mixing)
    if pasted is None:
        return replace(call, evaluation=Mixed(call.evaluation, mixing, call.given_target, call.site), is_mixed=True)
    return replace(call, evaluation=call.evaluation.with_target(pasted, call), is_mixed=True)


def check_mixed(call: LossCall, mixing: Mixing, *, certain: bool) -> None:
    """Refuses a loss call that could not follow the mixing of the batch, as :func:`mixed_call` and its value would."""
    evaluation = mixed_call(call, mixing, certain=certain).evaluation
    if isinstance(evaluation, Mixed):
        evaluation.other  # noqa: B018 # refuses targets without a row per sample


def _pasted(call: LossCall, mixing: Mixing) -> Tensor | None:
    """The target of a call with its parts where the inputs have them; ``None`` if it has none."""
    target = call.evaluation.target
    if target is None or not target.dim() or call.function is F.ctc_loss:  # of which each label may stand anywhere
        return None
    by_sample = len(target) == len(mixing.permutation)
    if not (call.evaluation.has_maps if by_sample else _is_flattened(call.evaluation, call.given_target, mixing)):
        return None
    return mixing.pasted(target, f"the target of {call}")


def _is_flattened(evaluation: Evaluation, given: Tensor | None, mixing: Mixing) -> bool:
    """Whether the target has several rows for each sample, one sample after the other."""
    target, samples = evaluation.target, len(mixing.permutation)
    if target is None or given is None or given.shape[:1] != target.shape[:1]:  # another target has the given's order
        return False
    if len(given) % samples:
        return False
    return lies_by_sample(given, mixing.part, samples) or evaluation.lies_by_sample(samples)


class Mixed(Derived):
    """A loss for mixed samples.

    Args:
        base: The loss for the samples' own targets.
        mixing: How the samples were mixed.
        given_target: The target as the user gave it, whose order other targets have.
        site: Where the user's code called it, as ``file.py:line``, or "".

    """

    def __init__(self, base: Evaluation, mixing: Mixing, given_target: Tensor | None, site: str = "") -> None:
        super().__init__(base)
        self._mixing, self._given_target, self._site = mixing, given_target, site

    @cached_property
    def other(self) -> Evaluation:
        """The loss for their partners' targets."""
        return self.base.with_target(self._partners(), self)

    @cached_property
    @override
    def mass(self) -> Tensor | None:
        own, other = self.base.mass, self.other.mass
        return None if own is None or other is None else self._between(own, other)

    @override
    def with_target(self, target: Tensor, call: object) -> "Mixed":
        return Mixed(self.base.with_target(target, call), self._mixing, self._given_target, self._site)

    @override
    def with_inputs(self, inputs: Sequence[Tensor], call: object) -> "Mixed":
        return Mixed(self.base.with_inputs(inputs, call), self._mixing, self._given_target, self._site)

    @override
    def narrowed(self, views: "Views", block: int = 0) -> Evaluation | None:
        return None  # a batch with views is not mixed

    @override
    def copies(self) -> "Sequence[Mixed]":
        return [Mixed(own, self._mixing, self._given_target, self._site) for own in self.base.copies()]

    @override
    def _take_apart(self) -> Decomposition:
        own, other = self.base.decomposition, self.other.decomposition
        elements = self._between(own.elements, other.elements)
        if own.reduction == "none":
            return Decomposition(elements, elements, "none")
        if not isinstance(self._mixing.weights, Tensor):
            return Decomposition(elements, self._between(own.plain, other.plain), own.reduction)
        total = elements.sum()
        if own.reduction == "mean":
            total = total / (elements.numel() if self.mass is None else self.mass.sum().to(total.dtype))
        return Decomposition(elements, total, own.reduction)

    @override
    def _compute(self) -> Tensor:
        if isinstance(self._mixing.weights, Tensor):
            return self.decomposition.plain
        return self._between(self.base.plain, self.other.plain)

    def _between(self, own: Tensor, other: Tensor) -> Tensor:
        lam = self._mixing.weights
        if isinstance(lam, Tensor):  # both are per element, in the order of the samples
            lam = lam.to(own.device, own.dtype).repeat_interleave(own.numel() // len(lam)).reshape(own.shape)
        return lam * own + (1.0 - lam) * other

    def _partners(self) -> Tensor:
        target, mixing = self.base.target, self._mixing
        samples, name = len(mixing.permutation), type(mixing.by).__name__
        if target is None or self.function is F.ctc_loss:
            raise MisconfigurationException(
                f"{name}: the samples of the batch are mixed, but {self._called()} has no target with a row per sample"
                " that could be mixed as well. Choose another call with `loss=...`."
            )
        rows = target.shape[0] if target.dim() else 1
        if rows != samples and not _is_flattened(self.base, self._given_target, mixing):
            raise MisconfigurationException(
                f"{name}: the batch has {samples} mixed samples, but the target of {self._called()} has {rows} rows,"
                " and is no entry of the batch flattened sample after sample: whose target each row is cannot be known."
                " Keep the samples' dimension, as in (B, C, T) with (B, T), or choose the call that compares with the"
                " labels of the batch with `loss=...`."
            )
        if not target.dim():
            return target
        by_sample = target.reshape(samples, rows // samples, *target.shape[1:])
        return by_sample[mixing.permutation].flatten(0, 1)

    def _called(self) -> str:
        return f"{self} at {self._site}" if self._site else str(self)
