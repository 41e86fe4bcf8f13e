"""Named calls of the user's module, made in chunks while ``training_step`` runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from typing_extensions import override

from lightning_reg.engine.data.batches import join_outputs, samples_of, tensors_of
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.autograd import is_reentrant, version_of
from lightning_reg.engine.host.errors import MisconfigurationException, refuse_layer
from lightning_reg.engine.host.generators import own_generators, replayed_randomness
from lightning_reg.engine.host.modules import BatchNorm
from lightning_reg.engine.layers.named import named_layers
from lightning_reg.engine.networks.sight import beside_the_step
from lightning_reg.engine.run.part import Part
from lightning_reg.engine.run.phases import OnLayers, ThroughMap
from lightning_reg.engine.weights.layer_products import hides_weight
from lightning_reg.retrieval.grad_cache.core import recomputed, row_chunks

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.step import Step
    from lightning_reg.engine.technique import Technique

__all__ = ["ChunkedCalls"]


class _Place(NamedTuple):
    """A call that was named: the method ``attribute`` of ``module``, for a layer its ``forward``."""

    name: str
    module: nn.Module
    attribute: str


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
        self._places: list[_Place] = []
        self._unseen: set[str] = set()
        self._unchecked: set[str] = set()
        self._devices: dict[str, set[torch.device]] = {}
        self._step: Step | None = None
        self._runs = False
        self._count = 0

    @override
    def prepare(self) -> None:
        self._places = [_place_of(self._module, name) for name in self._names]
        self._unseen, self._unchecked = {*self._names}, {*self._names}
        for place in self._places:
            self._check_draws(place)
            self._check_edits(place)

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

    def _call(self, place: _Place, original: Callable[..., Any], *args: Any, **named: Any) -> Any:
        step = self._step
        if not torch.is_grad_enabled() and is_reentrant():
            raise MisconfigurationException(
                f"GradCache: {place.name!r} runs without gradient under a checkpoint that is reentrant, so what it"
                " draws when it runs again in chunks would be other numbers. Pass `use_reentrant=False` to the"
                " checkpoint, or leave it out: chunks need none around them."
            )
        if step is None or not torch.is_grad_enabled() or self._runs:
            return original(*args, **named)
        self._unseen.discard(place.name)
        if hides_weight(place.module) and place.attribute == "forward":
            mapping = [type(one).__name__ for one in host.callbacks(self._trainer) if isinstance(one, ThroughMap)]
            raise MisconfigurationException(
                f"GradCache runs the layer {place.name!r} once more, past what {' or '.join(mapping)} has put around it"
                " for the gradient of its weight. Name the encoder that this layer lies in."
            )
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
        joins, sizes, outputs = _Joins(place, step), [chunk.stop - chunk.start for chunk in chunks], []
        anchors = self._anchors_of(place, given)
        run = partial(self._run, original)
        for number, part in enumerate(parts, 1):
            with self._unchanged_buffers(place, step, checked=number == len(parts)):
                outputs.append(recomputed(run, part, anchors=anchors, contexts=replayed_randomness))
            joins.next_chunk()
        result = _joined(place, "returns", outputs, sizes)
        joins.join(sizes)
        if len(parts) > 1 and place.name in self._unchecked:
            two = samples_of(given, rows, slice(0, chunks[1].stop))
            self._check_rows(place, step, run, [parts[0], two])
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

    def _anchors_of(self, place: _Place, given: Any) -> list[Tensor]:
        """A tensor on each device on which random numbers may be drawn."""
        if place.name not in self._devices:
            self._devices[place.name] = {tensor.device for tensor in place.module.parameters()}
        devices = self._devices[place.name] | {tensor.device for tensor in tensors_of(given)}
        return [torch.empty(0, device=device) for device in sorted(devices, key=str)]

    # -- what cannot be in chunks -------------------------------------------------------------------------------------

    @contextmanager
    def _unchanged_buffers(self, place: _Place, step: "Step", *, checked: bool) -> Iterator[None]:
        """Refuses a call that moves statistics of its own."""
        checked = checked and (place.name in self._unchecked or step.is_logging)
        before = _versions(place.module) if checked else {}
        yield
        changed = [
            name for name, found in (_versions(place.module) if checked else {}).items() if found != before[name]
        ]
        if not changed:
            return
        name = changed[0]
        is_norm = isinstance(place.module.get_submodule(name.rpartition(".")[0]), BatchNorm)
        what = "its statistics would be those of single chunks" if is_norm else "it would change once more for each"
        raise MisconfigurationException(
            f"GradCache: the buffer {name!r} of {place.name!r} changes when that runs, and {what}, with a gradient that"
            f" is not that of the whole batch. {'Put the batch norm' if is_norm else 'Put that layer'} into evaluation"
            " mode, or use one that keeps nothing (LayerNorm, GroupNorm)."
        )

    def _check_rows(self, place: _Place, step: "Step", run: Callable[[Any], Any], given: Sequence[Any]) -> None:
        """Refuses a call in which rows depend on other rows, by a chunk alone and with the next one; a host sync."""
        modes = [(layer, layer.training) for layer in place.module.modules()]
        chunk, two = given
        try:
            place.module.eval()
            alone, again, beside = (
                self._seen_of(step, seed, run, part) for seed, part in (("1", chunk), ("2", chunk), ("1", two))
            )
        finally:
            for layer, mode in modes:
                layer.training = mode
        for one, other, both in zip(alone, again, beside, strict=True):
            draws = not _are_first(one, other)  # in evaluation mode too, so that nothing can be seen
            if not draws and not _are_first(one, both):
                raise MisconfigurationException(
                    f"GradCache: what {place.name!r} returns for a row depends on the other rows, so that chunks are"
                    " not the whole batch: it compares or normalizes rows, or an argument that is no row per sample"
                    " was cut because it has as many. Name a layer or method that takes each row by itself."
                )

    def _seen_of(self, step: "Step", seed: str, run: Callable[[Any], Any], part: Any) -> list[Tensor]:
        with torch.no_grad(), beside_the_step(self._owner, step, f"compare rows {seed}"), _unseen_by_taps(step):
            return tensors_of(run(part))

    def _check_draws(self, place: _Place) -> None:
        for name, layer in place.module.named_modules():
            if place.attribute == "forward" and own_generators(layer):
                raise MisconfigurationException(
                    f"GradCache: the layer {name or place.name!r} in {place.name!r} draws from a generator of its own,"
                    " whose numbers would be others when it runs again. Let it draw from the global one."
                )

    def _check_edits(self, place: _Place) -> None:
        for other in host.callbacks(self._trainer):
            if not isinstance(other, OnLayers):
                continue
            edited = {*other.inputs_to_edit(self._module), *other.features_to_edit(self._module)}
            inside = sorted(name for name in edited if place.attribute != "forward" or _is_in(name, place.name))
            if inside:
                raise MisconfigurationException(
                    f"GradCache runs {place.name!r} in chunks, and {type(other).__name__} changes the layer"
                    f" {inside[0]!r} in it, with draws and counts of whole batches. Remove one of them, or name layers"
                    " outside of it."
                )


def _place_of(module: "LightningModule", name: str) -> _Place:
    layers = named_layers(module)
    try:  # before the names without `_orig_mod.`: of a compiled layer it is the compiled one that runs in chunks
        found: Any = attrgetter(name)(module)
    except AttributeError:
        found = layers.get(name)
    if isinstance(found, nn.Module):
        return _Place(name, found, "forward")
    where, _, attribute = name.rpartition(".")
    if not callable(found):
        refuse_layer(name, layers, "GradCache")
    return _Place(name, module.get_submodule(where), attribute)


def _eager(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps a function out of compiled graphs; what is compiled within it runs so."""
    kept: Callable[..., Any] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]  # torch's
    return kept


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _is_in(name: str, outer: str) -> bool:
    return name.startswith(f"{outer}.")


def _versions(module: nn.Module) -> dict[str, tuple[int, int]]:
    return {name: (id(buffer), version_of(buffer)) for name, buffer in module.named_buffers()}


def _kinds(given: tuple[tuple[Any, ...], dict[str, Any]]) -> str:
    args, named = given
    kinds = [type(one).__name__ for one in args] + [f"{key}: {type(one).__name__}" for key, one in named.items()]
    return ", ".join(kinds) or "nothing"


def _joined(place: _Place, what: str, outputs: Sequence[Any], sizes: Sequence[int]) -> Any:
    try:
        return join_outputs(outputs, sizes)
    except ValueError as error:
        raise MisconfigurationException(
            f"GradCache: what {place.name!r} {what} for chunks of {', '.join(map(str, dict.fromkeys(sizes)))} rows"
            f" cannot be joined to that for all rows: {error}. It must be a row per sample, in tensors, lists,"
            " dictionaries and the like; a value over all rows or a cache of keys (`use_cache=False` in transformers)"
            " has to be left out."
        ) from error


def _are_first(one: Tensor, both: Tensor) -> bool:
    """Whether rows are the first ones of a tensor, but for what another batch size changes in the last digits."""
    if not one.is_floating_point():
        return torch.equal(one, both[: len(one)])
    first, wide = both[: len(one)], torch.promote_types(one.dtype, torch.float32)
    allowed = (
        0.05 if one.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(one.device.type) else 1e-3
    )
    distance = (one.to(wide) - first.to(wide)).norm()
    return not bool(distance > allowed * first.to(wide).norm() + 1e-6)


@contextmanager
def _unseen_by_taps(step: "Step") -> Iterator[None]:
    counts, last = {name: len(found) for name, found in step.passes.items()}, dict(step.features)
    yield
    for name, found in step.passes.items():
        del found[counts.get(name, 0) :]
    step.features.clear()
    step.features.update(last)


class _Joins:
    """What observed layers within a call put out, chunk by chunk: joined, as if they had run once.

    Args:
        place: The call.
        step: The present step.

    """

    def __init__(self, place: _Place, step: "Step") -> None:
        self._place, self._step = place, step
        self._counts = [{name: len(found) for name, found in step.passes.items()}]

    def next_chunk(self) -> None:
        """A chunk has run."""
        self._counts.append({name: len(found) for name, found in self._step.passes.items()})

    def join(self, sizes: Sequence[int]) -> None:
        """All have run.

        Args:
            sizes: Rows of each chunk.

        """
        step = self._step
        for name, found in step.passes.items():
            ends = [counts.get(name, 0) for counts in self._counts]
            chunks = [found[start:end] for start, end in pairwise(ends)]
            if not any(chunks):
                continue
            what = f"puts out in its layer {name!r}"
            passes = _joined(self._place, what, chunks, sizes)
            found[ends[0] :] = passes
            last = passes[-1]
            step.features[name] = last if step.views is None else step.views.own(last)
