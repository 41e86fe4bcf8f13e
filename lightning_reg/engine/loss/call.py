"""The loss call: what the user's ``training_step`` hands to its loss function, and what the techniques make of it."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.loss import elements as losses

if TYPE_CHECKING:
    from lightning_reg.engine.data.views import Views
    from lightning_reg.engine.host.owner import Owner
    from lightning_reg.engine.step import Samples, Step

__all__ = ["LossCall"]

SampleKind = Literal["row", "sequence", "map"]


class LossCall:
    r"""One call of a loss function, seen while the user's ``training_step`` runs.

    A *sample* is what the data loader counts: a row; a sequence, when a flattened ``(B * T, ...)`` call is folded back
    by the batch size; or a map, when a sample has several elements of its own (pixels, ``(B, V, T)`` tokens, outputs).
    Its loss is :math:`L_i = \sum_{e \in i} \ell_e / n_i` with mass :math:`n_i = \sum_{e \in i} m_e`, so that the
    user's mean is :math:`\sum_i n_i L_i / \sum_i n_i`. Ignored elements have mass 0.

    Args:
        function: The function of ``torch.nn.functional`` that was called.
        arguments: Its arguments by name.
        step: The training step that it happened in.
        site: Where the user's code called it, as ``file.py:line``, or "".

    Attributes:
        views: The views of the batch if the call was made for all of them; it is narrowed to the batch then.

    """

    reader: "Owner | None" = None  # a technique at work that must not read targets where samples were mixed
    weights: Tensor | None = None  # what techniques have made of it so far
    terms: Sequence[Tensor] = ()

    def __init__(self, function: Callable[..., Any], arguments: dict[str, Any], step: "Step", site: str = "") -> None:
        self.function = function
        self.arguments = arguments
        self.step = step
        self.site = site
        self.target_name = losses.target_name(function)
        self.given_target: Tensor | None = self.target
        self.views: Views | None = None
        self._whole_output: Tensor | None = None

    @property
    def name(self) -> str:
        """The function's name, ``cross_entropy`` for example."""
        return self.function.__name__

    @property
    def input(self) -> Tensor:
        """The first argument: logits, log-probabilities or predictions, as the user's network made them."""
        value: Tensor = self.arguments[losses.LOSS_FUNCTIONS[self.function][0]]
        return value

    @property
    def target(self) -> Tensor | None:
        """The target, already replaced if a technique has changed it; ``None`` where a loss has none."""
        self._check_reader()
        return None if self.target_name is None else self.arguments[self.target_name]

    @property
    def reduction(self) -> str:
        """The user's reduction."""
        return losses.reduction_of(self.arguments)

    def replace_target(self, target: Tensor) -> None:
        """Puts other targets into the call; what was computed from the old ones is forgotten.

        Args:
            target: The new targets, in a form that the loss function takes.

        Raises:
            MisconfigurationException: If the loss has no target.

        """
        if self.target_name is None:
            raise MisconfigurationException(f"{self} has no target that could be replaced.")
        self.arguments = {**self.arguments, self.target_name: target}
        for name in ("decomposition", "mass", "sample_mass", "losses", "plain", "batch_size"):
            self.__dict__.pop(name, None)

    @property
    def whole_output(self) -> Tensor | None:
        """What the network put out for the batch and its views; a loss written by hand may not say it."""
        return self.input if self._whole_output is None else self._whole_output

    def narrow(self, views: "Views") -> None:
        """Leaves the rows of the batch alone in the call, if it has rows for the views as well."""
        narrowed = views.narrow(self.arguments)
        if narrowed is not None:
            self._whole_output = self.input
            self.views, self.arguments = views, narrowed
            self.given_target = self.target

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

    def given_value(self, value: Tensor) -> Tensor:
        """The value as the user's code expects it: with rows for the views, if they were in the call."""
        return value if self.views is None else self.views.spread(value, self.reduction)

    def with_arguments(self, arguments: dict[str, Any]) -> "LossCall":
        """The same call with other arguments."""
        return LossCall(self.function, arguments, self.step, self.site)

    def copies(self) -> "Sequence[LossCall]":
        """The call for each copy of the rows.

        A technique whose term is to be the mean over the copies computes it for each of them; ``logits`` of the whole
        call are those of the mean prediction.

        Returns:
            Calls with B samples each; where there are no copies, this call alone.

        """
        return [self]

    def _check_reader(self) -> None:
        if self.reader is not None and self.step.mixing is not None:
            raise self.step.mixing.two_targets(self.reader)

    def replace_losses(self, per_sample: Tensor) -> None:
        """Puts other losses of the samples in place of the call's own; they are reduced as these are.

        Args:
            per_sample: ``(B,)`` with gradient, per unit of mass.

        Raises:
            MisconfigurationException: If a sample of the call is more than one row.

        """
        if self.kind != "row" or per_sample.shape != (self.batch_size,):
            raise MisconfigurationException(
                f"{self} has no loss per sample that could be replaced by one of shape {tuple(per_sample.shape)}."
            )
        mass = self.sample_mass
        elements = per_sample if mass is None else per_sample * mass
        reduction, plain = self.reduction, elements
        if reduction != "none":
            plain = elements.sum()
            if reduction != "sum":
                plain = plain / (len(elements) if mass is None else mass.sum())
        # `losses` and `plain` are computed anew from this.
        for name in ("losses", "plain"):
            self.__dict__.pop(name, None)
        self.__dict__["decomposition"] = losses.Decomposition(
            elements, plain, "mean" if "mean" in reduction else reduction
        )

    # -- samples ------------------------------------------------------------------------------------------------------

    @cached_property
    def batch_size(self) -> int:
        """Number of samples B.

        Raises:
            MisconfigurationException: If the call's rows are no multiple of a batch size: no value per sample exists.

        """
        rows, sizes = self._rows(), self.step.batch_sizes
        if not sizes or rows in sizes:
            return rows
        fitting = [size for size in sizes if rows % size == 0]
        if len(fitting) != 1:
            which = "could be samples of several loaders, of" if fitting else "is no multiple of the batch size"
            raise MisconfigurationException(
                f"{self} has {rows} rows, which {which} {', '.join(map(str, fitting or sizes))}: there is no loss per"
                " sample. Choose another call with `loss=...`, or write the loss with `LossMixin.reduce_loss`."
            )
        return fitting[0]

    @property
    def kind(self) -> SampleKind:
        """What one sample is, see the class."""
        if self._rows() != self.batch_size:
            return "sequence"
        return "row" if self.function in _ROW_LOSSES or self._element_dim() <= 1 else "map"

    @cached_property
    def decomposition(self) -> losses.Decomposition:
        """Elements of the loss, with gradient."""
        return losses.decompose(self.function, self.arguments)

    @cached_property
    def mass(self) -> Tensor | None:
        """Mass of each element, float32, in the shape of the elements; ``None`` when all weigh the same."""
        return losses.element_mass(self.function, self.arguments)

    @cached_property
    def sample_mass(self) -> Tensor | None:
        """Mass ``n_i`` of each sample, ``(B,)`` float32; ``None`` when all samples weigh the same."""
        mass = self.mass
        if mass is None or mass.shape == (self.batch_size,):
            return mass
        return mass.reshape(self.batch_size, -1).sum(1)

    @cached_property
    def losses(self) -> Tensor:
        """Loss of each sample ``L_i``, ``(B,)`` float32, without gradient; 0 where every element is ignored."""
        elements = self.decomposition.elements.detach().float().reshape(self.batch_size, -1)
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
        return None if self.mass is None else self.mass.flatten()

    def samples(self, technique: "Owner") -> "Samples":
        """Dataset indices of the samples, on the device of the input.

        Args:
            technique: Who asks: its ``index_key`` and ``dataloader`` say where they come from.

        Returns:
            Indices ``(B,)``, and what is known about them on the host.

        Raises:
            MisconfigurationException: If there are not as many indices as samples.

        """
        samples = self.step.samples(technique, self.input.device)
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
        if self.function not in (F.cross_entropy, F.nll_loss):
            raise MisconfigurationException(
                f"{self} has no class logits: a technique needs a single-label classification loss"
                " (F.cross_entropy or F.nll_loss). If there is one too, choose it with `loss='cross_entropy'`."
            )
        if self.input.dim() != 2:
            raise MisconfigurationException(
                f"{self} is a prediction per pixel or per position; a technique needs one per sample, logits of"
                " shape (B, C). Segmentation and token classification are not supported by it."
            )
        if self.input.shape[0] != self.batch_size:
            raise MisconfigurationException(
                f"{self} has {self.input.shape[0]} rows for a batch of {self.batch_size} samples (sequences flattened"
                " to tokens?); a technique needs one row of logits per sample."
            )
        return self.input

    @property
    def labels(self) -> Tensor:
        """Given class of each sample, ``(B,)`` int64; the largest entry where the targets are probabilities."""
        self._check_reader()
        target = self.given_target
        if target is None:
            raise MisconfigurationException(f"{self} has no labels.")
        return target.argmax(1) if target.dim() == 2 else target

    def _rows(self) -> int:
        if self.function is F.ctc_loss:
            return self.input.shape[1] if self.input.dim() == 3 else 1
        if self.name in _CLASS_LOSSES and self.input.dim() == 1:
            return 1
        return self.input.shape[0] if self.input.dim() else 1

    def _element_dim(self) -> int:
        return self.input.dim() - 1 if self.name in _CLASS_LOSSES else self.input.dim()

    # -- the value ----------------------------------------------------------------------------------------------------

    @cached_property
    def plain(self) -> Tensor:
        """The value the user's own call would return (for the present target)."""
        if "decomposition" in self.__dict__:
            return self.decomposition.plain
        value: Tensor = self.function(**self.arguments)
        return value

    def value(self, weights: Tensor | None, terms: list[Tensor]) -> Tensor:
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
            mass = elements.numel() if self.sample_mass is None else self.sample_mass.sum()
            value, unweighted = value / mass, unweighted / mass
        # torch's fused mean and a mean of elements are one rounding apart. The difference (without gradient) is carried
        # over, so that weights of 1 give the user's value exactly; there is none between infinities.
        rounding = plain.detach().to(value.dtype) - unweighted
        return (value + torch.where(rounding.isfinite(), rounding, 0.0)).to(plain.dtype)

    def _reduced(self, term: Tensor) -> Tensor:
        per_sample = term.dim() > 0
        if per_sample and term.shape != (self.batch_size,):
            raise ValueError(f"A term must have shape () or ({self.batch_size},), got {tuple(term.shape)}.")
        if self.reduction in ("mean", "batchmean"):
            if not per_sample:
                return term
            mass = self.sample_mass
            return term.mean() if mass is None else torch.dot(term, mass.to(term.dtype)) / mass.sum()
        elements = self.decomposition.elements
        if self.reduction == "none":
            each = self._per_element(term, elements) if per_sample else term
            return each if self.mass is None else each * self.mass.to(elements.dtype).reshape(elements.shape)
        mass = self.sample_mass
        if mass is None:
            return term.sum() * (elements.numel() // self.batch_size) if per_sample else term * elements.numel()
        return (term * mass).sum() if per_sample else term * mass.sum()

    def _per_element(self, per_sample: Tensor, elements: Tensor) -> Tensor:
        if elements.numel() == per_sample.numel():
            return per_sample.to(elements.dtype).reshape(elements.shape)
        return (
            per_sample.to(elements.dtype).repeat_interleave(elements.numel() // self.batch_size).reshape(elements.shape)
        )

    @override
    def __str__(self) -> str:
        shapes = ", ".join(str(tuple(v.shape)) for v in self.arguments.values() if isinstance(v, Tensor))
        return f"F.{self.name}({shapes}, reduction={self.reduction!r})" + (f" at {self.site}" if self.site else "")


# Losses over classes: the input has one dimension more than the elements.
_CLASS_LOSSES = ("cross_entropy", "nll_loss", "linear_cross_entropy")
# Losses whose elements are one number per row although their input is a matrix.
_ROW_LOSSES = (
    F.multilabel_margin_loss,
    F.multilabel_soft_margin_loss,
    F.multi_margin_loss,
    F.cosine_embedding_loss,
    F.triplet_margin_loss,
    F.triplet_margin_with_distance_loss,
    F.ctc_loss,
)
