"""What counts as a task, and what is kept from one to the next."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from numbers import Integral
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.modules import BatchNorm
from lightning_reg.engine.host.names import plain_name
from lightning_reg.engine.technique import Technique
from lightning_reg.engine.weights.finite import all_finite
from lightning_reg.engine.weights.strategies import check_whole

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.step import Step

__all__ = ["TaskTechnique", "Tasks"]


class Tasks:
    """How many tasks are finished, whether one is under way, and what is kept from one to the next.

    Where the datamodule numbers its tasks (``current_task``), the number decides what a task is, not the fit. What a
    fit leaves is for the next number then, and stands beside ``kept`` until that comes: a further fit of the same
    number goes on with what its task began with.

    Attributes:
        kept: What the present task works with, or what the last one left: tensors and plain values.
        begun: Whether the present fit has begun its task, or goes on with it.
        resumed: Whether a state was loaded that is of the midst of a task, which the present fit goes on with.
        number: The present task's number, or the last one's; ``None`` without one.

    """

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}
        self.begun = self.resumed = False
        self.number: int | str | None = None
        self._finished = 0
        self._left: dict[str, Any] | None = None
        self._now: int | str | None = None
        self._is_further_fit = False

    @property
    def finished(self) -> int:
        """Number of tasks that came to their end."""
        under_way = self.begun or self.resumed or self._is_further_fit
        return self._finished + (self._left is not None and not under_way)

    @property
    def so_far(self) -> str:
        """For the table at the start of a fit."""
        number = "" if self._now is None else f", current_task={self._now!r}"
        return f"tasks before: {self.finished}{number}"

    @property
    def has_numbers(self) -> bool:
        """Whether the next fit may go on with the last one's task."""
        return self._left is not None

    @property
    def goes_on(self) -> bool:
        """Whether the task that begins has begun before this fit."""
        return self.resumed or self._is_further_fit

    def enter(self, number: int | str | None) -> None:
        """A fit begins, with this number as far as it is known before the first step."""
        self.begun, self._now = False, number
        self._is_further_fit = self._left is not None and number == self.number

    def start(self, number: int | str | None) -> None:
        """The first step of a fit, or of a task within one, with this number."""
        if not self.resumed:
            self.enter(number)
            if self._left is not None and not self._is_further_fit:
                self.kept, self._left = self._left, None
                self._finished += 1
        if number is not None or not self.resumed:  # else the loader alone was given to a fit that is resumed
            self.number = number

    def is_over(self, number: int | str | None) -> bool:
        """Whether a task is under way that has another number than this one."""
        return (self.begun or self.resumed) and None not in (number, self.number) and number != self.number

    def end(self, kept: dict[str, Any]) -> None:
        """Counts a task as finished, which leaves this for the next one."""
        if self.number is None:
            self.kept = kept
            self._finished += 1
        else:
            self._left = kept
        self.leave()

    def leave(self) -> None:
        """No task is under way any more."""
        self.begun = self.resumed = self._is_further_fit = False

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        state = {"finished": self._finished, "in_task": self.begun or self.resumed, **self.kept}
        return state if self.number is None else {**state, "number": self.number, "left": self._left}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave."""
        kept = dict(state)
        self.leave()
        self._finished, self.resumed = kept.pop("finished"), kept.pop("in_task")
        self.number, self._left = kept.pop("number", None), kept.pop("left", None)
        self.kept = kept


class TaskTechnique(Technique, ABC):
    """A technique that carries something from one task to the next; the user keeps the object between the fits.

    A task is a fit that came to its end: not one that an exception or Ctrl-C ended, no ``fast_dev_run``, and not one
    that ended with weights or statistics of batch norm that are not finite, which would spoil every later task. What is
    kept is taken in ``on_fit_end``, when averages and masks are in the module for good. A fit that is resumed from a
    checkpoint written while it ran goes on with the same task, and ends it even if no step was left.

    If the fit's datamodule has a number (or a name) of the present task in ``current_task``, that decides: a fit of the
    same number as the one before goes on with its task, from what that began with. A number that changes within a fit
    ends the task in the first step that sees it, with the weights as they are there; a technique that must read the
    task's data then refuses it. The number of a step is read there, and nothing else of the datamodule.

    Args:
        loss: See :class:`Technique`.
        name: See :class:`Technique`.
        seed: See :class:`Technique`.

    """

    reads_data_of_task: ClassVar[bool] = False  # to keep what it keeps

    def __init__(self, *, loss: int | str | None = None, name: str | None = None, seed: int = 0) -> None:
        super().__init__(loss=loss, name=name, seed=seed)
        self._tasks = Tasks()

    @property
    def tasks(self) -> int:
        """Number of tasks that came to their end."""
        return self._tasks.finished

    @property
    @abstractmethod
    def is_neutral(self) -> bool:
        """Whether its settings make it do nothing, and keep nothing."""

    @property
    @abstractmethod
    def acts(self) -> bool:
        """Whether it has anything to do in this task."""

    @abstractmethod
    def begin(self, step: "Step") -> None:
        """Makes ready for a task, before its first step, from what was kept."""

    @abstractmethod
    def keep(self, trainer: "Trainer", module: "LightningModule") -> dict[str, Any]:
        """What to keep when a task has come to its end: tensors and plain values."""

    @abstractmethod
    def forget(self) -> None:
        """Lets go of what was made for one fit."""

    @override
    def check(self, trainer: "Trainer", module: "LightningModule") -> None:
        check_whole(self, trainer, "keeps")

    @override
    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._tasks.enter(_number_of_task(trainer))
        self.forget()

    @override
    def is_active(self, step: "Step") -> bool:
        if self.is_neutral:
            return False
        number = _number_of_task(step.trainer)
        if self._tasks.is_over(number):
            self._end_within_fit(step, number)
        if not self._tasks.begun:
            # Not in `on_train_start`: other callbacks may put other weights into the module there.
            self._tasks.start(number)
            self.begin(step)
            self._tasks.begun, self._tasks.resumed = True, False
        return self.acts

    @override
    def on_fit_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        in_task = self._tasks.begun or (self._tasks.resumed and not self.is_neutral)
        if in_task and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by Lightning's debugging setup
            self._end(trainer, pl_module)
        self._leave()

    @override
    def on_exception(self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException) -> None:
        self._leave()

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._tasks.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._leave()  # a state may come in the middle of a fit: Lightning's learning-rate finder puts the old one back
        self._tasks.load_state_dict(state_dict)

    def _end_within_fit(self, step: "Step", number: int | str | None) -> None:
        if self.reads_data_of_task:
            raise MisconfigurationException(
                f"{type(self).__name__}: `datamodule.current_task` was {self._tasks.number!r} and is {number!r} within"
                " one fit, and the data of a task are read once more when it ends, which may be gone by now. Fit once"
                " for each task, with `current_task` set before."
            )
        self._end(step.trainer, step.module)
        self._leave()

    def _end(self, trainer: "Trainer", module: "LightningModule") -> None:
        spoiled = _not_finite(module)
        if spoiled is None:
            self._tasks.end(self.keep(trainer, module))
        else:
            host.rank_zero_warn(
                f"{type(self).__name__}: the fit ended with {spoiled!r} not finite. Nothing is kept of its task,"
                " and what was kept before stays."
            )

    def _leave(self) -> None:
        self._tasks.leave()
        self.forget()


def _number_of_task(trainer: "Trainer") -> int | str | None:
    """What the fit's datamodule has in ``current_task``, if that is a whole number or a name."""
    number = getattr(host.datamodule_of(trainer), "current_task", None)
    if isinstance(number, Tensor) and number.numel() == 1:
        number = number.item()
    if isinstance(number, Integral):  # numpy's too
        return int(number)
    return str(number) if isinstance(number, str) else None


def _not_finite(module: nn.Module) -> str | None:
    """Name of a weight or a statistic of batch norm that is not finite; ``None`` if all are."""
    named: dict[str, Tensor] = {n: p for n, p in module.named_parameters() if p.is_floating_point() or p.is_complex()}
    statistics = {id(b) for layer in module.modules() if isinstance(layer, BatchNorm) for b in layer.buffers()}
    named |= {name: b for name, b in module.named_buffers() if id(b) in statistics and b.is_floating_point()}
    if all_finite(list(named.values())):
        return None
    return next((plain_name(name) for name, value in named.items() if not value.isfinite().all()), None)
