"""What a loss call computes: its elements, their masses and its value, whatever it computes them from.

An evaluation is a value: it never changes, and what others make of it (other targets, other losses, two targets for a
mixed sample) is another one. What is costly is computed once, when somebody asks.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.host.autograd import lies_by_row
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.loss import elements

if TYPE_CHECKING:
    from lightning_reg.engine.data.views import Views

__all__ = ["Derived", "Evaluation", "FunctionEvaluation", "WithInput", "WithLosses"]


class Evaluation(ABC):
    """A loss of the samples of a batch.

    Attributes:
        function: The function of ``torch.nn.functional`` that was called, ``None`` for a loss written by hand.
        arguments: Its arguments by name.

    """

    function: Callable[..., Any] | None = None
    arguments: Mapping[str, Any] = {}  # read only, as everything here
    _decomposition: elements.Decomposition | None = None
    _plain: Tensor | None = None

    @property
    @abstractmethod
    def input(self) -> Tensor:
        """Logits, log-probabilities or predictions, as the user's network made them."""

    @property
    def loss_input(self) -> Tensor:
        """What the loss is computed from: the input, already changed if a technique has changed it."""
        return self.input

    @property
    def output(self) -> Tensor | None:
        """What the network put out; a loss written by hand may not say it."""
        return self.input

    @property
    @abstractmethod
    def target(self) -> Tensor | None:
        """The target; ``None`` where a loss has none."""

    @property
    @abstractmethod
    def reduction(self) -> str:
        """The user's reduction."""

    @property
    @abstractmethod
    def rows(self) -> int:
        """Number of rows."""

    @property
    @abstractmethod
    def has_maps(self) -> bool:
        """Whether a row has several elements of its own."""

    @property
    def decomposition(self) -> elements.Decomposition:
        """Elements of the loss, with gradient."""
        if self._decomposition is None:
            self._decomposition = self._take_apart()
        return self._decomposition

    @property
    def is_taken_apart(self) -> bool:
        """Whether somebody has asked for the elements."""
        return self._decomposition is not None

    @property
    @abstractmethod
    def mass(self) -> Tensor | None:
        """Mass of each element, float32, in the shape of the elements; ``None`` when all weigh the same."""

    @property
    def plain(self) -> Tensor:
        """The value that the user's own call would return, for the present target."""
        if self._plain is None:
            self._plain = self._compute() if self._decomposition is None else self._decomposition.plain
        return self._plain

    @abstractmethod
    def logits(self, batch_size: int, call: object) -> Tensor:
        """Class scores ``(B, C)`` of a single-label classification.

        Args:
            batch_size: Number of samples.
            call: What to name in the error.

        Returns:
            The scores.

        Raises:
            MisconfigurationException: If there are none.

        """

    @abstractmethod
    def with_target(self, target: Tensor, call: object) -> "Evaluation":
        """The same for other targets.

        Args:
            target: The new targets, in a form that the loss function takes.
            call: What to name in the error.

        Returns:
            Another evaluation.

        Raises:
            MisconfigurationException: If the loss has no target.

        """

    @abstractmethod
    def with_inputs(self, inputs: Sequence[Tensor], call: object) -> "Evaluation":
        """The same, computed from other logits; :attr:`input` and :meth:`logits` stay the given ones.

        Args:
            inputs: For each of :meth:`copies` logits of as many rows, with as many classes or further ones behind them.
            call: What to name in the error.

        Returns:
            Another evaluation.

        Raises:
            MisconfigurationException: If the loss is none of logits, or would have another meaning with these.

        """

    def lies_by_sample(self, size: int) -> bool:
        """Whether the graph says that the rows lie sample after sample, several for each.

        Args:
            size: Number of samples.

        Returns:
            ``False`` also where it does not say.

        """
        return lies_by_row(self.input, size)

    @abstractmethod
    def narrowed(self, views: "Views", block: int = 0) -> "Evaluation | None":
        """The same for the rows of the batch, or of one view, alone; ``None`` if there are no rows for its views."""

    def copies(self) -> "Sequence[Evaluation]":
        """The same for each copy of the rows; this one alone where there are no copies."""
        return [self]

    @abstractmethod
    def _take_apart(self) -> elements.Decomposition: ...

    @abstractmethod
    def _compute(self) -> Tensor: ...

    @override
    @abstractmethod
    def __str__(self) -> str: ...


class FunctionEvaluation(Evaluation):
    """A function of ``torch.nn.functional`` with its arguments.

    Args:
        function: The function.
        arguments: Its arguments by name.

    Attributes:
        first: The first of them: logits, log-probabilities or predictions.

    """

    def __init__(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
        self.function, self._function, self.arguments = function, function, arguments
        self.first: Tensor = arguments[elements.first_name(function)]
        self.target_name = elements.target_name(function)

    @property
    @override
    def input(self) -> Tensor:
        return self.first

    @property
    @override
    def target(self) -> Tensor | None:
        return None if self.target_name is None else self.arguments[self.target_name]

    @property
    @override
    def reduction(self) -> str:
        return elements.reduction_of(self.arguments)

    @property
    @override
    def rows(self) -> int:
        first, function = self.first, self.function
        if function is F.ctc_loss:
            return first.shape[1] if first.dim() == 3 else 1
        if first.dim() == 0 or (first.dim() == 1 and function in elements.CLASS_LOSSES):
            return 1
        return first.shape[0]

    @property
    @override
    def has_maps(self) -> bool:
        dims = self.first.dim() - (self.function in elements.CLASS_LOSSES)
        return self.function not in elements.ROW_LOSSES and dims > 1 and not self._is_flat

    @cached_property
    @override
    def mass(self) -> Tensor | None:
        return elements.element_mass(self._function, self.arguments)

    @override
    def logits(self, batch_size: int, call: object) -> Tensor:
        if self.function not in (F.cross_entropy, F.nll_loss):
            raise MisconfigurationException(
                f"{call} has no class logits: a technique needs a single-label classification loss"
                " (F.cross_entropy or F.nll_loss). If there is one too, choose it with `loss='cross_entropy'`."
            )
        if self.first.dim() != 2 and not self._is_flat:
            raise MisconfigurationException(
                f"{call} is a prediction per pixel or per position; a technique needs one per sample, logits of"
                " shape (B, C). Segmentation and token classification are not supported by it."
            )
        if self.first.shape[0] != batch_size:
            raise MisconfigurationException(
                f"{call} has {self.first.shape[0]} rows for a batch of {batch_size} samples (sequences flattened"
                " to tokens?); a technique needs one row of logits per sample."
            )
        return self.first if self.first.dim() == 2 else self.first.flatten(1)

    @property
    def _is_flat(self) -> bool:
        """Whether a classification has further dimensions of size 1 only, as logits (B, C, 1) have."""
        return self.function in elements.CLASS_LOSSES and self.first.dim() > 2 and prod(self.first.shape[2:]) == 1

    @override
    def with_target(self, target: Tensor, call: object) -> "FunctionEvaluation":
        if self.target_name is None:
            raise MisconfigurationException(f"{call} has no target that could be replaced.")
        if self._is_flat and target.is_floating_point():
            target = target.reshape(self.first.shape)
        return FunctionEvaluation(self._function, {**self.arguments, self.target_name: target})

    @override
    def with_inputs(self, inputs: Sequence[Tensor], call: object) -> "WithInput":
        (changed,) = inputs
        elements.check_logits(self._function, self.arguments, changed, call)
        return WithInput(self, FunctionEvaluation(self._function, {**self.arguments, "input": changed}))

    @override
    def narrowed(self, views: "Views", block: int = 0) -> "FunctionEvaluation | None":
        narrowed = views.narrow(self.arguments, block)
        return None if narrowed is None else FunctionEvaluation(self._function, narrowed)

    @override
    def _take_apart(self) -> elements.Decomposition:
        return elements.decompose(self._function, self.arguments)

    @override
    def _compute(self) -> Tensor:
        value: Tensor = self._function(**self.arguments)
        return value

    @override
    def __str__(self) -> str:
        shapes = ", ".join(str(tuple(v.shape)) for v in self.arguments.values() if isinstance(v, Tensor))
        return f"F.{self._function.__name__}({shapes}, reduction={self.reduction!r})"


class Derived(Evaluation):
    """An evaluation that is made from another one, and is like it but for what a subclass says.

    Args:
        base: The other one.

    """

    def __init__(self, base: Evaluation) -> None:
        self.base, self.function, self.arguments = base, base.function, base.arguments

    @property
    @override
    def input(self) -> Tensor:
        return self.base.input

    @property
    @override
    def loss_input(self) -> Tensor:
        return self.base.loss_input

    @property
    @override
    def output(self) -> Tensor | None:
        return self.base.output

    @property
    @override
    def target(self) -> Tensor | None:
        return self.base.target

    @property
    @override
    def reduction(self) -> str:
        return self.base.reduction

    @property
    @override
    def rows(self) -> int:
        return self.base.rows

    @property
    @override
    def has_maps(self) -> bool:
        return self.base.has_maps

    @property
    @override
    def mass(self) -> Tensor | None:
        return self.base.mass

    @override
    def logits(self, batch_size: int, call: object) -> Tensor:
        return self.base.logits(batch_size, call)

    @override
    def with_target(self, target: Tensor, call: object) -> Evaluation:
        return self.base.with_target(target, call)

    @override
    def with_inputs(self, inputs: Sequence[Tensor], call: object) -> Evaluation:
        return self.base.with_inputs(inputs, call)

    @override
    def narrowed(self, views: "Views", block: int = 0) -> Evaluation | None:
        return self.base.narrowed(views, block)

    @override
    def lies_by_sample(self, size: int) -> bool:
        return self.base.lies_by_sample(size)

    @override
    def copies(self) -> Sequence[Evaluation]:
        return self.base.copies()

    @override
    def _take_apart(self) -> elements.Decomposition:
        return self.base.decomposition

    @override
    def _compute(self) -> Tensor:
        return self.base.plain

    @override
    def __str__(self) -> str:
        return str(self.base)


class WithInput(Derived):
    """A loss that is computed from other logits than the given ones, which techniques see.

    Args:
        base: With the given logits.
        changed: With the other ones.

    """

    def __init__(self, base: Evaluation, changed: Evaluation) -> None:
        super().__init__(base)
        self._changed = changed

    @property
    @override
    def loss_input(self) -> Tensor:
        return self._changed.loss_input

    @override
    def with_target(self, target: Tensor, call: object) -> "WithInput":
        return WithInput(self.base.with_target(target, call), self._changed.with_target(target, call))

    @override
    def with_inputs(self, inputs: Sequence[Tensor], call: object) -> "WithInput":
        return WithInput(self.base, self._changed.with_inputs(inputs, call))

    @override
    def narrowed(self, views: "Views", block: int = 0) -> Evaluation | None:
        base, changed = self.base.narrowed(views, block), self._changed.narrowed(views, block)
        return None if base is None or changed is None else WithInput(base, changed)

    @override
    def copies(self) -> Sequence[Evaluation]:
        pairs = zip(self.base.copies(), self._changed.copies(), strict=True)
        return [WithInput(own, changed) for own, changed in pairs]

    @override
    def _take_apart(self) -> elements.Decomposition:
        return self._changed.decomposition

    @override
    def _compute(self) -> Tensor:
        return self._changed.plain


class WithLosses(Derived):
    """Other losses of the samples in place of an evaluation's own; they are reduced as these are.

    Args:
        base: The evaluation.
        per_sample: With gradient, per unit of mass: of the rows ``(B,)``, or of each element where rows are maps.

    """

    def __init__(self, base: Evaluation, per_sample: Tensor) -> None:
        super().__init__(base)
        mass, reduction = base.mass, base.reduction
        values = per_sample if mass is None else per_sample.reshape(mass.shape) * mass
        plain = values
        if reduction != "none":
            plain = values.sum()
            if reduction != "sum":
                plain = plain / (values.numel() if mass is None else mass.sum())
        self._decomposition = elements.Decomposition(values, plain, "mean" if "mean" in reduction else reduction)
