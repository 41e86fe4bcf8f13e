"""A loss on several copies of the rows: one loss per sample, the mean over its copies."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.host.autograd import lies_by_row
from lightning_reg.engine.loss import elements
from lightning_reg.engine.loss.evaluation import Evaluation, FunctionEvaluation, WithInput

__all__ = ["OnCopies", "goes_by_rows"]


class OnCopies(FunctionEvaluation):
    """A function on several copies of the rows.

    Techniques see the samples: B targets, B losses; :attr:`input` is the mean over the copies.

    Args:
        function: The function of ``torch.nn.functional`` that was called.
        arguments: Its arguments by name, of the first copy.
        all_rows: Those of them that were given for all copies, ``(M * B, ...)``.
        number: Number of copies M.

    """

    def __init__(
        self, function: Callable[..., Any], arguments: Mapping[str, Any], all_rows: Mapping[str, Tensor], number: int
    ) -> None:
        super().__init__(function, arguments)
        self._all_rows, self._copies_number = all_rows, number

    @cached_property
    @override
    def input(self) -> Tensor:
        return self._copies_of(self._first_rows).mean(0)

    @property
    def _first_rows(self) -> Tensor:
        return self._all_rows[elements.first_name(self._function)]

    @override
    def lies_by_sample(self, size: int) -> bool:
        return lies_by_row(self._first_rows, self._copies_number * size)

    @override
    def with_target(self, target: Tensor, call: object) -> "OnCopies":
        changed = super().with_target(target, call).arguments
        kept = {name: value for name, value in self._all_rows.items() if name != self.target_name}
        return OnCopies(self._function, changed, kept, self._copies_number)

    @override
    def with_inputs(self, inputs: Sequence[Tensor], call: object) -> WithInput:
        for given, changed in zip(self.copies(), inputs, strict=True):
            given.with_inputs([changed], call)  # refuses what is no other logits of a copy
        first, all_rows = {**self.arguments, "input": inputs[0]}, {**self._all_rows, "input": torch.cat([*inputs])}
        return WithInput(self, OnCopies(self._function, first, all_rows, self._copies_number))

    @override
    def copies(self) -> Sequence[Evaluation]:
        rows = {name: self._copies_of(value) for name, value in self._all_rows.items()}
        own = [{name: value[number] for name, value in rows.items()} for number in range(self._copies_number)]
        return [FunctionEvaluation(self._function, {**self.arguments, **one}) for one in own]

    @override
    def logits(self, batch_size: int, call: object) -> Tensor:
        r"""Logarithm of the mean over the copies of the class probabilities, ``(B, C)``: its softmax is that mean."""
        super().logits(batch_size, call)
        rows = self._first_rows
        log_probs = F.log_softmax(rows.to(torch.promote_types(rows.dtype, torch.float32)).flatten(1), dim=1)
        return self._copies_of(log_probs).logsumexp(0) - math.log(self._copies_number)

    @override
    def _take_apart(self) -> elements.Decomposition:
        values, plain, reduction = elements.decompose(self._function, self._all_arguments())
        return elements.Decomposition(self._mean(values), self._per_copy(plain, reduction), reduction)

    @override
    def _compute(self) -> Tensor:
        return self._per_copy(self._function(**self._all_arguments()), self.reduction)

    def spread(self) -> Tensor:
        """Standard deviation over the copies of the loss, ``()``, without gradient."""
        values = elements.decompose(self._function, self._all_arguments()).elements.detach().float()
        per_copy = self._copies_of(values).flatten(1)
        mass = per_copy.shape[1] if self.mass is None else self.mass.sum()
        return (per_copy.sum(1) / mass).std()

    def _all_arguments(self) -> dict[str, Any]:
        """The arguments for all copies: what was given for each row is repeated."""
        one = self.first
        arguments = {**self.arguments, **self._all_rows}
        for name, value in arguments.items():
            repeated = name not in self._all_rows and goes_by_rows(self._function, name, value, one)
            if repeated and value.shape[0] == one.shape[0]:
                arguments[name] = value.repeat(self._copies_number, *(1 for _ in value.shape[1:]))
        return arguments

    def _per_copy(self, value: Tensor, reduction: str) -> Tensor:
        if reduction == "sum":
            return value / self._copies_number
        return self._mean(value).to(value.dtype) if reduction == "none" else value

    def _mean(self, value: Tensor) -> Tensor:
        return self._copies_of(value.to(torch.promote_types(value.dtype, torch.float32))).mean(0)

    def _copies_of(self, value: Tensor) -> Tensor:
        return value.reshape(self._copies_number, len(value) // self._copies_number, *value.shape[1:])


# Where `weight` weights elements and not classes.
_WEIGHTS_OF_ELEMENTS = (
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.mse_loss,
    F.l1_loss,
    F.huber_loss,
)


def goes_by_rows(function: Callable[..., Any], name: str, value: Any, first: Tensor) -> bool:
    """Whether an argument has a row for each row of the first one, if it has as many."""
    if not isinstance(value, Tensor) or not value.dim() or name in ("pos_weight", "linear_weight", "linear_bias"):
        return False
    return name != "weight" or (function in _WEIGHTS_OF_ELEMENTS and value.dim() == first.dim())
