"""Bars with the time left, for work on files from the command line: scores, bytes, batches."""

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from torch import Tensor
from typing_extensions import override

from lightning_reg.averaging._checkpoint_files import CheckpointFile

__all__ = ["Evaluate", "counted_batches", "counted_files", "evaluations"]

Evaluate = Callable[[dict[str, Any]], float]


@contextmanager
def evaluations(evaluate: Evaluate, most: int, *, shown: bool) -> Iterator[Evaluate]:
    """A bar of scores that are taken.

    Args:
        evaluate: Scores a state dict.
        most: How many will be taken at most.
        shown: Whether there is a bar.

    Yields:
        The same function, telling the bar.

    """
    if not shown:
        yield evaluate
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # On a console of its own: the evaluation may have a display of Lightning's on the common one.
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("scoring candidates", total=most)

        def scored(state: dict[str, Any]) -> float:
            value = evaluate(state)
            bar.advance(task)
            return value

        yield scored


@contextmanager
def counted_files(files: Sequence[CheckpointFile], what: str, *, shown: bool) -> Iterator[Sequence[CheckpointFile]]:
    """A bar of the bytes that are read of files.

    Args:
        files: The files.
        what: What is done with them.
        shown: Whether there is a bar.

    Yields:
        The files, telling the bar.

    """
    if not shown:
        yield files
        return
    columns = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), BarColumn(), *columns) as bar:
        task = bar.add_task(what, total=sum(file.nbytes for file in files))
        yield [_CountedFile(file, lambda read: bar.advance(task, read)) for file in files]


class _CountedFile(CheckpointFile):
    """A file that tells how much of it has been used."""

    def __init__(self, file: CheckpointFile, advance: Callable[[int], None]) -> None:
        super().__init__(file.path, file.extra)
        self._file, self._advance = file, advance

    @override
    def __getitem__(self, key: str) -> Any:
        value = self._file[key]
        if isinstance(value, Tensor):
            self._advance(value.numel() * value.itemsize)
        return value

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    @override
    def __len__(self) -> int:
        return len(self._file)

    @override
    def shape_and_dtype(self, key: str) -> tuple[tuple[int, ...], torch.dtype] | None:
        return self._file.shape_and_dtype(key)

    @override
    def fault(self, key: str) -> str:
        return self._file.fault(key)

    @override
    def place(self, key: str) -> tuple[Any, ...]:
        return self._file.place(key)

    @override
    def read(self, key: str, start: int, buffer: Tensor) -> Tensor:
        part = self._file.read(key, start, buffer)
        self._advance(part.numel() * part.itemsize)
        return part


@contextmanager
def counted_batches(batches: Iterable[Any], epochs: int, what: str) -> Iterator[Iterable[Any]]:
    """A bar of batches, over all passes.

    Args:
        batches: To be gone through once in each epoch.
        epochs: How many passes there will be.
        what: What is done with them.

    Yields:
        The batches, telling the bar.

    """
    total = epochs * len(batches) if isinstance(batches, Sized) else None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(what, total=total)
        yield _CountedBatches(batches, lambda: bar.advance(task))


class _CountedBatches:
    """Batches that tell of each that has been used."""

    def __init__(self, batches: Iterable[Any], advance: Callable[[], None]) -> None:
        self._batches, self._advance = batches, advance

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            yield batch
            self._advance()
