"""Named calls of the user's module, made in chunks while ``training_step`` runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from typing_extensions import override

from lightning_reg.engine.data.batches import join_outputs, samples_of, tensors_of
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.generators import replayed_randomness
from lightning_reg.engine.run.part import Part
from lightning_reg.retrieval.grad_cache._refusals import (
    Place,
    check_place,
    check_reentrant,
    check_rows,
    check_weight,
    place_of,
    unchanged_buffers,
)
from lightning_reg.retrieval.grad_cache.core import recomputed, row_chunks

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.step import Step
    from lightning_reg.engine.technique import Technique

__all__ = ["ChunkedCalls"]


class ChunkedCalls(Part):
    """Makes the calls in chunks.

    Args:
        owner: The technique.
        trainer: Its Trainer.
        module: The user's module.
        names: Layers or methods of the module.
        size: Most rows of a chunk.

    """

    def __init__(
        self, owner: "Technique", trainer: "Trainer", module: "LightningModule", names: Sequence[str], size: int
    ) -> None:
        self._owner, self._trainer, self._module, self._names, self._size = owner, trainer, module, names, size
        self._replaced: list[host.Replacement] = []
        self._places: list[Place] = []
        self._unseen: set[str] = set()
        self._unchecked: set[str] = set()
        self._devices: dict[str, set[torch.device]] = {}
        self._step: Step | None = None
        self._runs = False
        self._count = 0

    @override
    def prepare(self) -> None:
        self._places = [place_of(self._module, name) for name in self._names]
        self._unseen, self._unchecked = {*self._names}, {*self._names}
        for place in self._places:
            check_place(place, self._trainer, self._module)

    @override
    @contextmanager
    def around(self, step: "Step") -> Iterator[None]:
        self.close()
        if self._owner not in step.active:
            yield
            return
        self._step, self._count = step, 0
        for place in self._places:
            called = _eager(partial(self._call, place, getattr(place.module, place.attribute)))
            self._replaced.append(host.Replacement(place.module, place.attribute, called))
        yield
        if step.is_logging:
            step.log(self._owner, "chunks", torch.tensor(float(self._count)))
        if self._unseen == {*self._names}:
            raise MisconfigurationException(
                f"GradCache: {', '.join(map(repr, self._names))} was not called with gradient in the first step, so"
                " nothing is in chunks. Name the layer or method that `training_step` calls; `encode` of"
                " sentence-transformers runs without gradient: call the model itself; a network that ran under"
                " `torch.compile` before runs as it did then: call `torch.compiler.reset()` first."
            )

    @override
    def rest(self) -> None:
        # Not earlier: in the backward pass a checkpoint of the user's runs a call once more, which is to be the same.
        self.close()

    @override
    def close(self) -> None:
        self._step = None
        for each in self._replaced[::-1]:
            each.undo()
        self._replaced.clear()

    # -- one call -----------------------------------------------------------------------------------------------------

    def _call(self, place: Place, original: Callable[..., Any], *args: Any, **named: Any) -> Any:
        step = self._step
        check_reentrant(place)
        if step is None or not torch.is_grad_enabled() or self._runs:
            return original(*args, **named)
        self._unseen.discard(place.name)
        check_weight(place, self._trainer)
        given = args, named
        rows = next((len(one) for one in tensors_of(given) if one.dim()), 0)
        chunks = row_chunks(rows, self._size)
        parts = [samples_of(given, rows, chunk) for chunk in chunks]
        if not rows or parts[0] is None:
            raise MisconfigurationException(
                f"GradCache cannot cut what {place.name!r} is given into chunks: {_kinds(given)}. Give it tensors with"
                " a row for each sample, lists and dictionaries of such, and plain values."
            )
        self._count += len(chunks)
        counts, sizes, outputs = [_counts(step)], [chunk.stop - chunk.start for chunk in chunks], []
        anchors = self._anchors_of(place, given)
        run = partial(self._run, original)
        for number, part in enumerate(parts, 1):
            is_checked = number == len(parts) and (place.name in self._unchecked or step.is_logging)
            with unchanged_buffers(place, checked=is_checked):
                outputs.append(recomputed(run, part, anchors=anchors, contexts=replayed_randomness))
            counts.append(_counts(step))
        result = _joined(place, "returns", outputs, sizes)
        _join_passes(place, step, counts, sizes)
        if len(parts) > 1 and place.name in self._unchecked:
            two = samples_of(given, rows, slice(0, chunks[1].stop))
            check_rows(self._owner, place, step, run, [parts[0], two])
            self._unchecked.discard(place.name)
        return result

    def _run(self, original: Callable[..., Any], given: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        """One chunk, now or once more; a method may call a layer that is named too, which is then left alone."""
        before, self._runs = self._runs, True
        try:
            args, named = tree_map_only(Tensor, _same, given)  # dictionaries of its own, for calls that write into them
            return original(*args, **named)
        finally:
            self._runs = before

    def _anchors_of(self, place: Place, given: Any) -> list[Tensor]:
        """A tensor on each device on which random numbers may be drawn."""
        if place.name not in self._devices:
            self._devices[place.name] = {tensor.device for tensor in place.module.parameters()}
        devices = self._devices[place.name] | {tensor.device for tensor in tensors_of(given)}
        return [torch.empty(0, device=device) for device in sorted(devices, key=str)]


def _eager(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps a function out of compiled graphs; what is compiled within it runs so."""
    kept: Callable[..., Any] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]  # torch's
    return kept


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _kinds(given: tuple[tuple[Any, ...], dict[str, Any]]) -> str:
    args, named = given
    kinds = [type(one).__name__ for one in args] + [f"{key}: {type(one).__name__}" for key, one in named.items()]
    return ", ".join(kinds) or "nothing"


def _joined(place: Place, what: str, outputs: Sequence[Any], sizes: Sequence[int]) -> Any:
    try:
        return join_outputs(outputs, sizes)
    except ValueError as error:
        raise MisconfigurationException(
            f"GradCache: what {place.name!r} {what} for chunks of {', '.join(map(str, dict.fromkeys(sizes)))} rows"
            f" cannot be joined to that for all rows: {error}. It must be a row per sample, in tensors, lists,"
            " dictionaries and the like; a value over all rows or a cache of keys (`use_cache=False` in transformers)"
            " has to be left out."
        ) from error


def _counts(step: "Step") -> dict[str, int]:
    return {name: len(found) for name, found in step.passes.items()}


def _join_passes(place: Place, step: "Step", counts: Sequence[dict[str, int]], sizes: Sequence[int]) -> None:
    """Joins what observed layers within a call have put out chunk by chunk, as if they had run once.

    Args:
        place: The call.
        step: The present step.
        counts: How many outputs of each layer there were before the first chunk, and after each one.
        sizes: Rows of each chunk.

    """
    for name, found in step.passes.items():
        ends = [count.get(name, 0) for count in counts]
        chunks = [found[start:end] for start, end in pairwise(ends)]
        if not any(chunks):
            continue
        found[ends[0] :] = _joined(place, f"puts out in its layer {name!r}", chunks, sizes)
        last = found[-1]
        step.features[name] = last if step.views is None else step.views.own(last)
