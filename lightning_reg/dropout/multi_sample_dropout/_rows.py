"""The rows of all copies in one pass through ``training_step``, of which the user's code is handed the first copy's."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lightning_reg.dropout.multi_sample_dropout._evaluation import OnCopies, goes_by_rows
from lightning_reg.dropout.multi_sample_dropout._plan import CopyPlan
from lightning_reg.engine.host.autograd import descends, version_of
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.loss import elements
from lightning_reg.engine.loss.call import LossCall
from lightning_reg.engine.loss.evaluation import FunctionEvaluation

__all__ = ["CopiedRows"]


class CopiedRows:
    """Knows which tensors of a pass hold all copies, from the layer that makes them to the loss.

    Args:
        plan: How the copies are made.
        name: Class to name in errors.
        depends: What was found of outputs in earlier passes, by their place; whether they come from the copies.

    Attributes:
        are_used: Whether a loss was computed from them.

    """

    def __init__(self, plan: CopyPlan, name: str, depends: dict[tuple[str, int, int], bool]) -> None:
        self._plan, self._name, self._depends = plan, name, depends
        self._count: int | None = None
        self._sizes: set[int] = set()
        self._made: Tensor | None = None
        self._handed: list[tuple[Tensor, Tensor, int]] = []
        self.are_used = False

    @property
    def count(self) -> int | None:
        """Rows of each copy, ``None`` where no copies are on their way."""
        return self._count

    def begin(self, rows: int, sizes: set[int], made: Tensor) -> None:
        """The layer has made the copies.

        Args:
            rows: Rows that it got.
            sizes: Samples that a batch may have.
            made: Its output.

        """
        self._count, self._made, self._sizes = rows, made, {rows, *sizes}

    def leave(self) -> None:
        """The outermost module around the layer has run: what was handed out is all that is left."""
        self._count = self._made = None

    def first(self, value: Any) -> Any:
        """The rows of the first copy, of a tensor that holds all copies; anything else as it is."""
        return value[: value.shape[0] // self._plan.number] if self.holds_copies(value) else value

    def holds_copies(self, value: Any) -> bool:
        """Whether a value has the rows of all copies."""
        if self._count is None or self._made is None or not isinstance(value, Tensor) or not value.dim():
            return False
        if value.shape[0] == 0 or value.shape[0] % (self._plan.number * self._count):
            return False
        return not value.requires_grad or self._comes_from_copies(value)

    def hand_out(self, value: Any, place: tuple[str, int, int]) -> Any:
        """What the user's code gets of a value: the rows of the first copy, if it holds all of them."""
        number = self._plan.number
        if not isinstance(value, Tensor) or not value.dim() or value.shape[0] == 0:
            return value
        if not self._fits(value):
            return value
        if place not in self._depends:
            self._depends[place] = self._comes_from_copies(value)
        if not self._depends[place]:
            return value
        first = value[: value.shape[0] // number]
        self._handed.append((first, value, version_of(first)))
        return first

    def _fits(self, value: Tensor) -> bool:
        """Whether there can be a row for each copy of each sample: a value over all rows may have any length."""
        return any(value.shape[0] % (self._plan.number * size) == 0 for size in self._sizes)

    def _comes_from_copies(self, value: Tensor) -> bool:
        made = self._made
        if made is None or self._count is None or not value.requires_grad:
            return False
        handed = [first.grad_fn for first, _, _ in self._handed]  # what comes from these alone is one copy
        if made.grad_fn is not None:
            return descends(value, made.grad_fn, but_through=handed)
        # A frozen backbone: the graph begins behind it.
        fits = value.shape[0] % (self._plan.number * self._count) == 0
        return fits and not any(descends(value, node) for node in handed)

    def _all_rows(self, value: Any) -> Tensor | None:
        """All copies of what the user's code got of the first, or of a view of that."""
        if not isinstance(value, Tensor) or not value.dim():
            return None
        for first, full, version in self._handed:
            if value is not first and (value._base is None or value._base is not first._base):
                continue
            offset = value.storage_offset() - full.storage_offset()
            tiles = value.shape[0] * value.stride(0) == first.shape[0] * first.stride(0)
            if not tiles or not value.requires_grad or not 0 <= offset < max(full.stride(0), 1):
                continue
            if version_of(value) != version:
                raise MisconfigurationException(
                    f"{self._name}: the output of the layers after {self._plan.layer!r} is changed in place before the"
                    f' loss, in one of its copies only. Write it out of place, or pass `{self._name}(outputs="all")`.'
                )
            if value is first:
                return full
            shape = (self._plan.number * value.shape[0], *value.shape[1:])
            return full.as_strided(shape, value.stride(), value.storage_offset())
        return None

    def _is_of_copies(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> bool:
        value, number = arguments[elements.LOSS_FUNCTIONS[function][0]], self._plan.number
        if self._count is None or not isinstance(value, Tensor) or not value.dim() or value.shape[0] % number:
            return False
        name = elements.target_name(function)
        target = None if name is None else arguments[name]
        if target is not None and target.dim() and target.shape[0] * number == value.shape[0]:
            return True
        same = target is None or (target.dim() > 0 and target.shape[0] == value.shape[0])
        return same and self._fits(value) and self._comes_from_copies(value)

    def evaluation_of(self, call: LossCall) -> OnCopies | None:
        """A loss on all copies; ``None`` for a call that has nothing to do with them."""
        evaluation, function = call.evaluation, call.function
        if not isinstance(evaluation, FunctionEvaluation) or function is None:
            return None
        if self._count is None and not self._handed:
            return None
        arguments, names = evaluation.arguments, elements.LOSS_FUNCTIONS[function]
        all_rows = {n: w for n in names if (w := self._all_rows(arguments.get(n))) is not None}
        if names[0] not in all_rows and not self._is_of_copies(function, arguments):
            return None
        number = self._plan.number
        rows = len(all_rows.get(names[0], arguments[names[0]]))
        for name in names:
            value: Any = arguments.get(name)
            if goes_by_rows(function, name, value, arguments[names[0]]) and len(value) == rows:
                all_rows[name] = value
        self.are_used = True
        firsts = {name: value[: value.shape[0] // number] for name, value in all_rows.items()}
        return OnCopies(function, {**arguments, **firsts}, all_rows, number)
