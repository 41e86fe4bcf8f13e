"""The calls that are named, and what cannot run in chunks: told when the fit starts, or in the first call."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_reg.engine.data.batches import tensors_of
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.autograd import is_reentrant, version_of
from lightning_reg.engine.host.errors import MisconfigurationException, refuse_layer
from lightning_reg.engine.host.generators import own_generators
from lightning_reg.engine.host.modules import BatchNorm
from lightning_reg.engine.layers.named import named_layers
from lightning_reg.engine.networks.sight import beside_the_step
from lightning_reg.engine.run.phases import OnLayers, ThroughMap
from lightning_reg.engine.run.step_parts import observed_as_before
from lightning_reg.engine.weights.layer_products import hides_weight

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.step import Step
    from lightning_reg.engine.technique import Technique

__all__ = [
    "Place",
    "check_place",
    "check_reentrant",
    "check_rows",
    "check_weight",
    "place_of",
    "unchanged_buffers",
]


class Place(NamedTuple):
    """A call that was named: the method ``attribute`` of ``module``, for a layer its ``forward``."""

    name: str
    module: nn.Module
    attribute: str


def place_of(module: "LightningModule", name: str) -> Place:
    """Where a layer or method of the module is called."""
    layers = named_layers(module)
    try:  # before the names without `_orig_mod.`: of a compiled layer it is the compiled one that runs in chunks
        found: Any = attrgetter(name)(module)
    except AttributeError:
        found = layers.get(name)
    if isinstance(found, nn.Module):
        return Place(name, found, "forward")
    where, _, attribute = name.rpartition(".")
    if not callable(found):
        refuse_layer(name, layers, "GradCache")
    return Place(name, module.get_submodule(where), attribute)


def check_place(place: Place, trainer: "Trainer", module: "LightningModule") -> None:
    """Refuses layers with draws of their own, and layers that other techniques change."""
    for name, layer in place.module.named_modules():
        if place.attribute == "forward" and own_generators(layer):
            raise MisconfigurationException(
                f"GradCache: the layer {name or place.name!r} in {place.name!r} draws from a generator of its own,"
                " whose numbers would be others when it runs again. Let it draw from the global one."
            )
    for other in host.callbacks(trainer):
        if not isinstance(other, OnLayers):
            continue
        edited = {*other.inputs_to_edit(module), *other.features_to_edit(module)}
        inside = sorted(n for n in edited if place.attribute != "forward" or n.startswith(f"{place.name}."))
        if inside:
            raise MisconfigurationException(
                f"GradCache runs {place.name!r} in chunks, and {type(other).__name__} changes the layer"
                f" {inside[0]!r} in it, with draws and counts of whole batches. Remove one of them, or name layers"
                " outside of it."
            )


def check_reentrant(place: Place) -> None:
    """Refuses a call under a checkpoint that draws other numbers when it runs once more."""
    if not torch.is_grad_enabled() and is_reentrant():
        raise MisconfigurationException(
            f"GradCache: {place.name!r} runs without gradient under a checkpoint that is reentrant, so what it"
            " draws when it runs again in chunks would be other numbers. Pass `use_reentrant=False` to the"
            " checkpoint, or leave it out: chunks need none around them."
        )


def check_weight(place: Place, trainer: "Trainer") -> None:
    """Refuses a layer whose weight another technique trains as factors."""
    if hides_weight(place.module) and place.attribute == "forward":
        mapping = [type(one).__name__ for one in host.callbacks(trainer) if isinstance(one, ThroughMap)]
        raise MisconfigurationException(
            f"GradCache runs the layer {place.name!r} once more, past what {' or '.join(mapping)} has put around it"
            " for the gradient of its weight. Name the encoder that this layer lies in."
        )


@contextmanager
def unchanged_buffers(place: Place, *, checked: bool) -> Iterator[None]:
    """Refuses a call that moves statistics of its own."""
    before = _versions(place.module) if checked else {}
    yield
    changed = [name for name, found in _versions(place.module).items() if found != before[name]] if checked else []
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


def _versions(module: nn.Module) -> dict[str, tuple[int, int]]:
    return {name: (id(buffer), version_of(buffer)) for name, buffer in module.named_buffers()}


def check_rows(owner: "Technique", place: Place, step: "Step", run: Callable[[Any], Any], given: Sequence[Any]) -> None:
    """Refuses a call in which rows depend on other rows, by a chunk alone and with the next one; a host sync."""

    def seen(seed: str, part: object) -> list[Tensor]:
        with torch.no_grad(), beside_the_step(owner, step, f"compare rows {seed}"), observed_as_before(step):
            return tensors_of(run(part))

    modes = [(layer, layer.training) for layer in place.module.modules()]
    chunk, two = given
    try:
        place.module.eval()
        alone, again, beside = seen("1", chunk), seen("2", chunk), seen("1", two)
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


def _are_first(one: Tensor, both: Tensor) -> bool:
    """Whether rows are the first ones of a tensor, but for what another batch size changes in the last digits."""
    if not one.is_floating_point():
        return torch.equal(one, both[: len(one)])
    first, wide = both[: len(one)], torch.promote_types(one.dtype, torch.float32)
    is_coarse = one.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(one.device.type)
    distance = (one.to(wide) - first.to(wide)).norm()
    return not bool(distance > (0.05 if is_coarse else 1e-3) * first.to(wide).norm() + 1e-6)
