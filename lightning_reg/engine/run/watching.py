"""What one sees of a run: values beside Lightning's own bar, work of ours in that bar, a table at the end."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.run.phases import Member

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["Watch", "counted", "progress", "told"]


_A = TypeVar("_A")
_T = TypeVar("_T")


class Watch:
    """The values that techniques log: the last one stands beside Lightning's own bar, first and last in a table.

    The bar asks for its columns by ``get_metrics``, which is extended on the one object. A value is read from its
    device once after each step that logs, when the bar is drawn: steps between pay nothing.

    Args:
        trainer: The Trainer.
        techniques: In the order of the Trainer's callbacks.

    """

    def __init__(self, trainer: "Trainer", techniques: Sequence[Member]) -> None:
        self._trainer, self._techniques = trainer, techniques
        self._first: dict[str, Tensor | float] = {}
        self._last: dict[str, Tensor | float] = {}
        self._columns: dict[str, float] | None = None
        self._replaced: host.Replacement | None = None

    def begin(self) -> None:
        """Joins the bar, if there is one."""
        bar = self._trainer.progress_bar_callback
        if bar is not None and self._replaced is None:
            self._replaced = host.Replacement(bar, "get_metrics", self.get_metrics)

    def end(self) -> None:
        """Leaves the bar as it was; may be called twice."""
        if self._replaced is not None:
            self._replaced.undo()
            self._replaced = None

    def take(self, scalars: Mapping[str, Tensor | float]) -> None:
        """Takes what a step has logged, by its name in the log."""
        self._first = {**scalars, **self._first}
        self._last.update(scalars)
        self._columns = None

    def get_metrics(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What the bar calls in place of its own."""
        own: dict[str, Any] = self._replaced.original(*args, **kwargs) if self._replaced is not None else {}
        if self._columns is None:
            self._columns = {name.removeprefix("reg/"): float(self._last[name]) for name in self._shown()}
        return {**own, **self._columns}

    def show(self) -> None:
        """Prints the table where Lightning prints its model summary (``enable_model_summary``)."""
        rows = [(technique, name) for technique in self._techniques for name in self._names(technique)]
        if not rows or not self._trainer.is_global_zero or not host.prints_summary(self._trainer):
            return
        table = Table("technique", "value", "first", "last", title="lightning_reg, at the end", title_justify="left")
        for technique, name in rows:
            first, last = (f"{float(values[name]):.4g}" for values in (self._first, self._last))
            title = type(technique).__name__ + (f" [{technique.name}]" if technique.name else "")
            table.add_row(escape(title), escape(name.removeprefix(f"{technique.log_key}/")), first, last)
        bar = _rich_progress(self._trainer)
        (Console() if bar is None else bar.console).print(table)

    def _names(self, technique: Member) -> list[str]:
        start = f"{technique.log_key}/"  # what is told of each layer, behind a further stroke, is for the log alone
        return [name for name in self._last if name.startswith(start) and "/" not in name.removeprefix(start)]

    def _shown(self) -> Iterator[str]:
        for technique in self._techniques:
            names = self._names(technique)
            chosen = [f"{technique.log_key}/{name}" for name in technique.watched]
            yield from [name for name in chosen if name in names] or names[:1]


@contextmanager
def progress(trainer: "Trainer", what: str, total: float | None) -> Iterator[Callable[[], None]]:
    """Shows work of a technique's in Lightning's own bar, with the time left; where the bar is off nothing is shown.

    Before Lightning's display by rich is live, and after, there is one of ours in its place, so that there is never a
    second one beside it.

    Args:
        trainer: A Trainer that fits.
        what: What is done.
        total: How many steps it has; ``None`` if that is not known, 0 for nothing to show.

    Yields:
        Called after each step.

    """
    bar: Any = trainer.progress_bar_callback
    live = _rich_progress(trainer)
    if total == 0:
        yield _nothing
    elif live is not None:
        with _task(live, what, math.inf if total is None else total) as advance:
            yield advance
    elif bar is not None and bar.is_enabled and hasattr(bar, "progress"):  # Lightning's is not there yet, or no more
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, transient=True) as ours, _task(ours, what, total) as advance:
            yield advance
    elif bar is not None and bar.is_enabled and hasattr(bar, "init_validation_tqdm"):
        with bar.init_validation_tqdm() as line:
            line.set_description(what)
            line.reset(total)
            yield line.update
    else:
        yield _nothing


@contextmanager
def _task(live: Any, what: str, total: float | None) -> Iterator[Callable[[], None]]:
    task = live.add_task(what, total=total)
    try:
        yield lambda: live.advance(task)
    finally:
        live.update(task, visible=False)  # Lightning 2.6.0 takes numbers of tasks for positions: none may be removed


def counted(items: Iterable[_T], advance: Callable[[], None]) -> Iterator[_T]:
    """The items, each of which is told of when it is done with.

    Args:
        items: Any.
        advance: Of :func:`progress`.

    Yields:
        The items.

    """
    for item in items:
        yield item
        advance()


def told(function: Callable[[_A], _T], advance: Callable[[], None]) -> Callable[[_A], _T]:
    """A function, each call of which is told of when it is over.

    Args:
        function: Of one argument.
        advance: Of :func:`progress`.

    Returns:
        The same, telling.

    """

    def telling(argument: _A) -> _T:
        result = function(argument)
        advance()
        return result

    return telling


def _rich_progress(trainer: "Trainer") -> Any:
    """Lightning's display by rich while it is live, ``None`` without one."""
    shown: Any = getattr(trainer.progress_bar_callback, "progress", None)
    with suppress(AttributeError):
        return shown if shown.live.is_started else None
    return None


def _nothing() -> None:
    pass
