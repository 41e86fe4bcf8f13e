"""The loss call: what the user's ``training_step`` hands to its loss function, and what the techniques make of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.loss.evaluation import Evaluation, FunctionEvaluation, WithLosses
from lightning_reg.engine.loss.row_order import RowOrder

if TYPE_CHECKING:
    from lightning_reg.engine.data.views import Views
    from lightning_reg.engine.host.owner import Owner
    from lightning_reg.engine.loss.elements import Decomposition
    from lightning_reg.engine.step import Samples, Step

__all__ = ["LossCall", "call_of", "loss_call"]

SampleKind = Literal["row", "sequence", "map"]


@dataclass(frozen=True, eq=False)
class LossCall:
    r"""One call of a loss function, seen while the user's ``training_step`` runs; a value that never changes.

    A *sample* is what the data loader counts: a row; a sequence, when a flattened ``(B * T, ...)`` call is folded back
    by the batch size, its rows lying certainly sample after sample; or a map, when a sample has several elements of
    its own (pixels, ``(B, V, T)`` tokens, outputs). Its loss is :math:`L_i = \sum_{e \in i} \ell_e / n_i` with mass
    :math:`n_i = \sum_{e \in i} m_e`, so that the user's mean is
    :math:`\sum_i n_i L_i / \sum_i n_i`. Ignored elements have mass 0.

    Args:
        evaluation: What it computes.
        step: The training step that it happened in.
        site: Where the user's code called it, as ``file.py:line``, or "".
        given_target: The target as the user gave it, whatever techniques have put in its place.
        views: The views of the batch if the call was made for all of them; it is narrowed to the batch then.
        joined: What it computes for the batch and its views, if it is narrowed.
        given_indices: Dataset indices of the samples, if the user's code gave them.
        reader: A technique at work that must not read targets where samples were mixed.
        is_mixed: Whether it follows the mixing of the batch.
        order: What is known of the order of the rows of calls at this place.

    """

    evaluation: Evaluation
    step: "Step"
    site: str = ""
    given_target: Tensor | None = None
    views: "Views | None" = None
    joined: Evaluation | None = None
    given_indices: Tensor | None = None
    reader: "Owner | None" = None
    is_mixed: bool = False
    order: RowOrder = field(default_factory=RowOrder)

    @property
    def function(self) -> Callable[..., Any] | None:
        """The function of ``torch.nn.functional`` that was called, ``None`` for a loss written by hand."""
        return self.evaluation.function

    @property
    def name(self) -> str:
        """The function's name, ``cross_entropy`` for example; ``reduce_loss`` for a loss written by hand."""
        return "reduce_loss" if self.function is None else self.function.__name__

    @property
    def arguments(self) -> Mapping[str, Any]:
        """Arguments of the function by name."""
        return self.evaluation.arguments

    @property
    def input(self) -> Tensor:
        """The first argument: logits, log-probabilities or predictions, as the user's network made them."""
        return self.evaluation.input

    @property
    def loss_input(self) -> Tensor:
        """What the loss is computed from: the input, already changed if a technique has changed it."""
        return self.evaluation.loss_input

    @property
    def target(self) -> Tensor | None:
        """The target, already replaced if a technique has changed it; ``None`` where a loss has none."""
        self._check_reader()
        return self.evaluation.target

    @property
    def whole_output(self) -> Tensor | None:
        """What the network put out for the batch and its views; a loss written by hand may not say it."""
        return (self.evaluation if self.joined is None else self.joined).output

    @property
    def reduction(self) -> str:
        """The user's reduction."""
        return self.evaluation.reduction

    # -- other calls made from it -------------------------------------------------------------------------------------

    def with_target(self, target: Tensor) -> "LossCall":
        """The call with other targets.

        Args:
            target: The new targets, in a form that the loss function takes.

        Returns:
            Another call.

        Raises:
            MisconfigurationException: If the loss has no target.

        """
        return replace(self, evaluation=self.evaluation.with_target(target, self))

    def with_inputs(self, inputs: Sequence[Tensor]) -> "LossCall":
        """The call computed from other logits; :attr:`input` and :attr:`logits` stay the given ones.

        Args:
            inputs: One for each of :meth:`copies`, usually one: with the same rows, and as many classes or further ones
                behind them.

        Returns:
            Another call.

        Raises:
            MisconfigurationException: If the loss is none of logits, or would have another meaning with these.

        """
        return replace(self, evaluation=self.evaluation.with_inputs(inputs, self))

    def with_losses(self, per_sample: Tensor) -> "LossCall":
        """The call with other losses of the samples in place of its own; they are reduced as these are.

        Args:
            per_sample: ``(B,)`` with gradient, per unit of mass.

        Returns:
            Another call.

        Raises:
            MisconfigurationException: If a sample of the call is more than one row, or the call's logits were changed.

        """
        if self.loss_input is not self.input:
            raise MisconfigurationException(
                f"{self} has logits that another technique has changed, and these losses of its samples would not be"
                " computed from them. Remove one of the two, or let them work on different loss calls with `loss=...`."
            )
        if self.kind == "sequence" or per_sample.shape != (self.batch_size,):
            raise MisconfigurationException(
                f"{self} has no loss per sample that could be replaced by one of shape {tuple(per_sample.shape)}."
            )
        if self.kind == "map":  # each element has its sample's
            shape = self.decomposition.elements.shape
            per_sample = per_sample.repeat_interleave(shape.numel() // len(per_sample)).reshape(shape)
        return replace(self, evaluation=WithLosses(self.evaluation, per_sample))

    def narrowed(self, views: "Views") -> "LossCall":
        """The call for the rows of the batch alone, if it has rows for the views as well."""
        narrowed = self.evaluation.narrowed(views)
        if narrowed is None:
            return self
        indices = None if self.given_indices is None else views.block(self.given_indices)
        return replace(
            self,
            evaluation=narrowed,
            given_target=narrowed.target,
            views=views,
            joined=self.evaluation,
            given_indices=indices,
        )

    def of_views(self, technique: "Owner") -> "Sequence[LossCall]":
        """The user's call for each view that a technique made, with the targets and weights that the view brought.

        Args:
            technique: Who made them.

        Returns:
            Calls like this one; what techniques made of this one's targets is not in them.

        Raises:
            MisconfigurationException: If the call has no row for each sample and view.

        """
        self.check_views()
        if self.views is None or self.joined is None:
            return []
        blocks = [self.joined.narrowed(self.views, block) for block in self.views.blocks_of(technique)]
        return [replace(self, evaluation=one, given_target=one.target) for one in blocks if one is not None]

    def copies(self) -> "Sequence[LossCall]":
        """The call for each copy of the rows.

        A technique whose term is to be the mean over the copies computes it for each of them; ``logits`` of the whole
        call are those of the mean prediction.

        Returns:
            Calls with B samples each; where there are no copies, this call alone.

        """
        evaluations = self.evaluation.copies()
        if len(evaluations) == 1:
            return [self]
        return [replace(self, evaluation=evaluation) for evaluation in evaluations]

    def read_by(self, reader: "Owner | None") -> "LossCall":
        """The call as a technique reads it that has no rule for the two targets of a mixed sample."""
        return self if reader is self.reader else replace(self, reader=reader)

    # -- samples ------------------------------------------------------------------------------------------------------

    @cached_property
    def batch_size(self) -> int:
        """Number of samples B.

        Raises:
            MisconfigurationException: If the call's rows are no multiple of a batch size, or it is not certain that
                they lie sample after sample: no value per sample is known.

        """
        size, sizes = self._size, self.step.batch_sizes
        if self.function is None or not sizes or self.views is not None:  # with views it was certain before
            return size
        problem = self.order.problem(self.evaluation, self.given_target, self.step, size)
        if problem:
            raise MisconfigurationException(
                f"{self} has {self.evaluation.rows} rows for a batch of {' and '.join(map(str, sizes))} samples,"
                f" {problem}: there is no loss per sample. Keep the samples as first dimension, as in logits (B, V, T)"
                " with targets (B, T), choose another call with `loss=...`, or write the loss with"
                " `LossMixin.reduce_loss`."
            )
        return size

    @cached_property
    def _size(self) -> int:
        """Number of samples, if the rows lie sample after sample."""
        rows, sizes = self.evaluation.rows, self.step.batch_sizes
        if self.function is None or not sizes or rows in sizes:
            return rows
        fitting = [size for size in sizes if rows % size == 0]
        if not fitting and self.step.may_have(rows):
            return rows
        if len(fitting) != 1:
            which = "could be samples of several loaders, of" if fitting else "is no multiple of the batch size"
            raise MisconfigurationException(
                f"{self} has {rows} rows, which {which} {', '.join(map(str, fitting or sizes))}: there is no loss per"
                " sample. Choose another call with `loss=...`, or write the loss with `LossMixin.reduce_loss`."
            )
        return fitting[0]

    @property
    def rows_per_sample(self) -> int:
        """Rows for each sample, in whatever order they lie.

        Raises:
            MisconfigurationException: If the call's rows are no multiple of a batch size.

        """
        return self.evaluation.rows // max(self._size, 1)

    @property
    def kind(self) -> SampleKind:
        """What one sample is, see the class."""
        if self.evaluation.rows != self.batch_size:
            return "sequence"
        return "map" if self.evaluation.has_maps else "row"

    @property
    def decomposition(self) -> "Decomposition":
        """Elements of the loss, with gradient."""
        return self.evaluation.decomposition

    @property
    def mass(self) -> Tensor | None:
        """Mass of each element, float32, in the shape of the elements; ``None`` when all weigh the same."""
        return self.evaluation.mass

    @cached_property
    def sample_mass(self) -> Tensor | None:
        """Mass ``n_i`` of each sample, ``(B,)`` float32; ``None`` when all samples weigh the same."""
        mass = self.evaluation.mass
        if mass is None or mass.shape == (self.batch_size,):
            return mass
        return mass.reshape(self.batch_size, -1).sum(1)

    @cached_property
    def losses(self) -> Tensor:
        """Loss of each sample ``L_i``, ``(B,)`` float32, without gradient; 0 where every element is ignored."""
        return self._per_sample(self.decomposition.elements.detach())

    @property
    def learned_losses(self) -> Tensor:
        """The same with gradient."""
        return self._per_sample(self.decomposition.elements)

    def _per_sample(self, elements: Tensor) -> Tensor:
        elements = elements.float().reshape(self.batch_size, -1)
        if self.sample_mass is None:
            return elements.mean(1)
        return elements.sum(1) / torch.where(self.sample_mass > 0, self.sample_mass, 1.0)

    @property
    def element_losses(self) -> Tensor:
        """Loss of each element per mass, ``(E,)`` float32, without gradient; 0 where the element is ignored."""
        elements = self.decomposition.elements.detach().float().flatten()
        mass = self.element_mass
        return elements if mass is None else elements / torch.where(mass > 0, mass, 1.0)

    @property
    def element_mass(self) -> Tensor | None:
        """Mass ``m_e`` of each element, ``(E,)`` float32; ``None`` when all weigh the same."""
        mass = self.evaluation.mass
        return None if mass is None else mass.flatten()

    def samples(self, technique: "Owner") -> "Samples":
        """Dataset indices of the samples, on the device of the input.

        Args:
            technique: Who asks: its ``index_key`` and ``dataloader`` say where they come from.

        Returns:
            Indices ``(B,)``, and what is known about them on the host.

        Raises:
            MisconfigurationException: If there are not as many indices as samples.

        """
        samples = self.step.samples(technique, self.input.device, self.given_indices)
        if len(samples.indices) != self.batch_size:
            raise MisconfigurationException(
                f"{self} has {self.batch_size} samples but the batch was made of {len(samples.indices)} dataset"
                " indices (samples dropped or added by collate_fn or in training_step?). Say which entry of the batch"
                f' holds the index of each sample: `{type(technique).__name__}(index_key="...")`.'
            )
        return samples

    @property
    def logits(self) -> Tensor:
        """Class scores ``(B, C)`` of a single-label classification.

        Log-probabilities (``nll_loss``) are logits too: their softmax gives them back.

        Raises:
            MisconfigurationException: If the call is no such classification.

        """
        return self.evaluation.logits(self._size, self)

    @property
    def labels(self) -> Tensor:
        """Given class of each sample, ``(B,)`` int64; the largest entry where the targets are probabilities."""
        self._check_reader()
        target = self.given_target
        if target is None:
            raise MisconfigurationException(f"{self} has no labels.")
        if target.dim() < 2:
            return target
        if target.is_floating_point() or target.numel() > len(target):
            target = target.argmax(1)
        return target.flatten()

    def check_views(self) -> None:
        """Refuses a call that a technique works on but that cannot be told apart into the batch and its views.

        Raises:
            MisconfigurationException: If there are views and the call has no row for each.

        """
        if self.step.views is not None and self.views is None:
            raise MisconfigurationException(
                f"{self} has no row for each sample of the batch and its {self.step.views.count - 1} further views, or"
                " several in an order that cannot be known (rows dropped, stacked or with time first, a loss over"
                " something else?), so the batch's own loss is not known."
            )

    def _check_reader(self) -> None:
        if self.reader is not None and self.step.mixing is not None:
            raise self.step.mixing.two_targets(self.reader)

    # -- the value ----------------------------------------------------------------------------------------------------

    @property
    def plain(self) -> Tensor:
        """The value the user's own call would return (for the present target)."""
        return self.evaluation.plain

    def given_value(self, value: Tensor) -> Tensor:
        """The value as the user's code expects it: with rows for the views, if they were in the call."""
        return value if self.views is None else self.views.spread(value, self.reduction)

    def value(self, weights: Tensor | None, terms: Sequence[Tensor]) -> Tensor:
        r"""What the call returns to the user's code.

        A weight multiplies every element of its sample. A term is added to every element of its sample (a scalar term
        to all elements) before that element's own mass, and then the user's own reduction is applied:

        .. math:: \frac{\sum_e w_{i(e)}\,\ell_e}{\sum_e m_e} + \frac{\sum_i n_i\,r_i}{\sum_i n_i} \quad\text{for a mean}

        With ``weights`` all 1 and no terms the value is the plain one to the last bit, whatever the reduction.

        Args:
            weights: Weight of each sample ``(B,)`` or of each element ``(E,)``, neutral 1; ``None`` for no weighting.
            terms: Terms per sample ``(B,)`` or scalars ``()``, in the order they are added.

        Returns:
            The loss, in the shape of the user's own value.

        """
        value = self.plain if weights is None else self._weighted(weights)
        for term in terms:
            value = value + self._reduced(term)
        return value

    def combined(self, weights: Tensor | None, more: Tensor) -> Tensor:
        """Product of weights, each per sample ``(B,)`` or per element ``(E,)``."""
        if weights is None or weights.shape == more.shape:
            return more if weights is None else weights * more
        elements = self.decomposition.elements
        return self._per_element(weights, elements).flatten() * self._per_element(more, elements).flatten()

    def _weighted(self, weights: Tensor) -> Tensor:
        elements, plain, reduction = self.decomposition
        elements = elements.to(torch.promote_types(elements.dtype, torch.float32))
        weighted = elements * self._per_element(weights.detach(), elements)
        if reduction == "none":
            return weighted.to(plain.dtype)
        value, unweighted = weighted.sum(), elements.detach().sum()
        if reduction == "mean":
            mass = elements.numel() if self.mass is None else self.mass.sum()
            value, unweighted = value / mass, unweighted / mass
        # torch's fused mean and a mean of elements are one rounding apart. The difference (without gradient) is carried
        # over, so that weights of 1 give the user's value exactly; there is none between infinities.
        rounding = plain.detach().to(value.dtype) - unweighted
        return (value + torch.where(rounding.isfinite(), rounding, 0.0)).to(plain.dtype)

    def _reduced(self, term: Tensor) -> Tensor:
        per_sample = term.dim() > 0
        if per_sample and term.shape != (self.batch_size,):
            raise ValueError(f"A term must have shape () or ({self.batch_size},), got {tuple(term.shape)}.")
        reduction = self.reduction
        if reduction in ("mean", "batchmean"):
            if not per_sample:
                return term
            mass = self.sample_mass
            return term.mean() if mass is None else torch.dot(term, mass.to(term.dtype)) / mass.sum()
        elements = self.decomposition.elements
        if reduction == "none":
            each = self._per_element(term, elements) if per_sample else term
            return each if self.mass is None else each * self.mass.to(elements.dtype).reshape(elements.shape)
        mass = self.sample_mass if per_sample else self.mass
        if mass is None:
            return term.sum() * (elements.numel() // self.batch_size) if per_sample else term * elements.numel()
        return (term * mass).sum() if per_sample else term * mass.sum()

    def _per_element(self, per_sample: Tensor, elements: Tensor) -> Tensor:
        if elements.numel() == per_sample.numel():
            return per_sample.to(elements.dtype).reshape(elements.shape)
        repeats = elements.numel() // self.batch_size
        return per_sample.to(elements.dtype).repeat_interleave(repeats).reshape(elements.shape)

    @override
    def __str__(self) -> str:
        return str(self.evaluation) + (f" at {self.site}" if self.site else "")


def loss_call(function: Callable[..., Any], arguments: Mapping[str, Any], step: "Step", site: str = "") -> LossCall:
    """The call of a function of ``torch.nn.functional``.

    Args:
        function: The function.
        arguments: Its arguments by name.
        step: The training step that it happened in.
        site: Where the user's code called it, as ``file.py:line``, or "".

    Returns:
        The call.

    """
    return call_of(FunctionEvaluation(function, arguments), step, site)


def call_of(evaluation: Evaluation, step: "Step", site: str = "", given_indices: Tensor | None = None) -> LossCall:
    """The call of an evaluation as the user made it."""
    return LossCall(evaluation, step, site, evaluation.target, given_indices=given_indices)
