"""What counts as a task, and what is kept from one to the next."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.engine.host import lightning as host
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

    Attributes:
        finished: Number of tasks that came to their end.
        kept: What the present task works with, or what the last one left: tensors and plain values.
        begun: Whether the present fit has begun its task.
        resumed: Whether a state was loaded that is of the midst of a task, which the present fit goes on with.

    """

    def __init__(self) -> None:
        self.finished = 0
        self.kept: dict[str, Any] = {}
        self.begun = self.resumed = False

    def end(self, kept: dict[str, Any]) -> None:
        """Counts a task as finished, which leaves this for the next one."""
        self.kept = kept
        self.finished += 1

    def leave(self) -> None:
        """No task is under way any more."""
        self.begun = self.resumed = False

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {"finished": self.finished, "in_task": self.begun or self.resumed, **self.kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave."""
        kept = dict(state)
        self.finished, self.resumed, self.begun = kept.pop("finished"), kept.pop("in_task"), False
        self.kept = kept


class TaskTechnique(Technique, ABC):
    """A technique that carries something from one task to the next; the user keeps the object between the fits.

    A task is a fit that came to its end: not one that an exception or Ctrl-C ended, no ``fast_dev_run``, and not one
    that ended with weights or statistics of batch norm that are not finite, which would spoil every later task. What is
    kept is taken in ``on_fit_end``, when averages and masks are in the module for good. A fit that is resumed from a
    checkpoint written while it ran goes on with the same task, and ends it even if no step was left.

    Args:
        loss: See :class:`Technique`.
        name: See :class:`Technique`.
        seed: See :class:`Technique`.

    """

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
        self._tasks.begun = False
        self.forget()

    @override
    def is_active(self, step: "Step") -> bool:
        if self.is_neutral:
            return False
        if not self._tasks.begun:
            # Not in `on_train_start`: other callbacks may put other weights into the module there.
            self.begin(step)
            self._tasks.begun, self._tasks.resumed = True, False
        return self.acts

    @override
    def on_fit_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        in_task = self._tasks.begun or (self._tasks.resumed and not self.is_neutral)
        if in_task and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by Lightning's debugging setup
            spoiled = _not_finite(pl_module)
            if spoiled is None:
                self._tasks.end(self.keep(trainer, pl_module))
            else:
                host.rank_zero_warn(
                    f"{type(self).__name__}: the fit ended with {spoiled!r} not finite. Nothing is kept of its task,"
                    " and what was kept before stays."
                )
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

    def _leave(self) -> None:
        self._tasks.leave()
        self.forget()


def _not_finite(module: nn.Module) -> str | None:
    """Name of a weight or a statistic of batch norm that is not finite; ``None`` if all are."""
    named: dict[str, Tensor] = {n: p for n, p in module.named_parameters() if p.is_floating_point() or p.is_complex()}
    statistics = {id(b) for layer in module.modules() if isinstance(layer, BatchNorm) for b in layer.buffers()}
    named |= {name: b for name, b in module.named_buffers() if id(b) in statistics and b.is_floating_point()}
    if all_finite(list(named.values())):
        return None
    return next((plain_name(name) for name, value in named.items() if not value.isfinite().all()), None)
