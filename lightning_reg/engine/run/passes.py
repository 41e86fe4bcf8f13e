"""Passes over validation and training data in the middle of a fit, of which the fit notices nothing."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map
from torch.utils.data import BatchSampler, DataLoader
from typing_extensions import override

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.generators import isolated_randomness, kept_generators
from lightning_reg.engine.host.lightning import Callback
from lightning_reg.engine.run.hooks import FirstHooks
from lightning_reg.engine.run.watching import progress

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.step import Stage

__all__ = ["ordered_batches", "replay_step", "training_batches", "validation_metrics"]


def validation_metrics(trainer: "Trainer", what: str = "") -> dict[str, float]:
    """Runs the user's validation loop once more on the module as it is.

    Metrics, loggers, progress, random states and all callbacks but the engine's stay as they are.

    Args:
        trainer: A Trainer that fits; at the earliest in ``on_validation_end`` if it validates.
        what: What it is done for, to be shown in the progress bar with the time left; "" for nothing to show.

    Returns:
        What the module logged, by name.

    """
    engines = [callback for callback in host.callbacks(trainer) if isinstance(callback, FirstHooks)]
    if not what:
        return host.rerun_validation(trainer, engines)
    batches = sum(trainer.num_val_batches)
    with progress(trainer, what, None if batches == math.inf else batches) as advance:
        return host.rerun_validation(trainer, [*engines, _AfterBatches(advance)])


class _AfterBatches(Callback):
    """Tells of each batch of a validation that it is done."""

    def __init__(self, advance: Callable[[], None]) -> None:
        self._advance = advance

    @override
    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._advance()


@contextmanager
def training_batches(trainer: "Trainer", original: Callable[[Any], Any]) -> Iterator[Iterator[Any]]:
    """A pass over the training loaders; batches are on the module's device.

    Args:
        trainer: A Trainer that fits.
        original: Gives the loader behind one that is followed.

    Yields:
        The batches, as many as an epoch of the fit has. Generators and samplers are put back at the end.

    """
    combined = host.combined_loader(trainer)
    loaders = [original(loader) for loader in combined.flattened]
    # Of `limit_train_batches` the loader knows in its length only.
    limit = _number(trainer.num_training_batches)
    twins = dict(zip(map(id, combined.flattened), map(_fresh, loaders), strict=True))
    iterables = tree_map(lambda loader: twins[id(loader)], combined.iterables, is_leaf=lambda x: id(x) in twins)
    fresh = host.joined_like(combined, iterables)
    with _unnoticed(trainer, loaders):
        yield (host.batch_on_device(trainer, batch) for batch, *_ in islice(fresh, limit))


@contextmanager
def _unnoticed(trainer: "Trainer", loaders: Iterable[Any]) -> Iterator[None]:
    with ExitStack() as undo:
        undo.enter_context(isolated_randomness())
        undo.enter_context(host.metrics_kept(trainer.lightning_module))
        for loader in loaders:
            undo.enter_context(kept_generators(loader))
            undo.enter_context(kept_generators(getattr(loader, "dataset", None)))
        yield


def _fresh(loader: Any) -> Any:
    if not isinstance(loader, DataLoader):
        return loader
    changes = {name: copy.copy(getattr(loader, name)) for name in ("sampler", "batch_sampler")}
    if hasattr(changes["batch_sampler"], "sampler"):
        changes["batch_sampler"].sampler = copy.copy(changes["batch_sampler"].sampler)
    return _with(loader, **changes)


def _with(loader: Any, **changes: Any) -> Any:
    """A copy of a loader that has not begun, with other samplers."""
    twin = copy.copy(loader)
    twin.__dict__.update({"_iterator": None, "persistent_workers": False, **changes})  # torch forbids to set them
    return twin


@contextmanager
def ordered_batches(
    trainer: "Trainer",
    loader: Any,
    limit: float,
    stage: "Stage",
    dataset: Any = None,
    *,
    one_by_one: bool = False,
    among: Iterable[int] | None = None,
) -> Iterator[tuple[list[list[int]], Callable[[], tuple[Any, Any]], Iterator[Any]]]:
    """A pass over the samples of one loader, each once and in the order of their indices, of which nobody notices.

    The samples are those that the loader's own sampler draws for an epoch, ``drop_last`` or not; a batch sampler of
    another class than torch's keeps its batches as they are.

    Args:
        trainer: A Trainer that fits.
        loader: A DataLoader with indices, on this rank.
        limit: Most batches.
        stage: ``"train"`` or ``"validate"``: what the module's hooks for batches are told.
        dataset: Gives the samples in place of the loader's own, which it is behind; ``None`` for that.
        one_by_one: Whether each sample is a batch of its own.
        among: Indices of the samples that are asked for, the others being left out; ``None`` for all.

    Yields:
        The indices of each batch; a function that fetches the first batch twice; the batches, on the module's device.

    """
    with _unnoticed(trainer, [loader]), host.stage_of_trainer(trainer, stage):
        drawn = _index_batches(loader, limit, None if among is None else set(among))
        if one_by_one:
            drawn = [[index] for indices in drawn for index in indices]
        here = loader if dataset is None else _with(loader, dataset=dataset)

        def on_device(draws: list[list[int]], **changes: Any) -> Iterator[Any]:
            place = "sampler" if loader.batch_sampler is None else "batch_sampler"
            return (host.batch_on_device(trainer, batch) for batch in _with(here, **{place: draws}, **changes))

        def twice() -> tuple[Any, Any]:
            alone: dict[str, Any] = {"num_workers": 0, "timeout": 0}
            return next(on_device(drawn[:1], **alone)), next(on_device(drawn[:1], **alone))

        yield drawn, twice, on_device(drawn)


def _index_batches(loader: Any, limit: float, among: set[int] | None) -> list[list[int]]:
    def asked(draw: Iterable[Any]) -> list[int]:
        return [index for index in map(int, draw) if among is None or index in among]

    sampler = _fresh(loader).batch_sampler
    if type(sampler) is not BatchSampler:
        return [kept for draw in islice(sampler, _number(limit)) if (kept := asked(draw)) or among is None]
    size = sampler.batch_size
    most = None if limit >= len(loader) else int(limit) * size
    indices = sorted(set(asked(islice(sampler.sampler, most))))
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def _number(limit: float) -> int | None:
    return None if limit == math.inf else int(limit)


def replay_step(trainer: "Trainer", module: "LightningModule", batch: Any, batch_idx: int) -> None:
    """Sends a training batch through the module's own ``training_step``, without gradient, logging or techniques.

    Under manual optimization, where the step would train, it is ``module(batch[0])``.
    """
    with ExitStack() as undo:
        undo.enter_context(torch.no_grad())
        undo.enter_context(trainer.precision_plugin.train_step_context())
        for name in ("log", "log_dict"):
            undo.callback(host.Replacement(module, name, _ignore).undo)
        if not module.automatic_optimization:
            module(batch[0] if isinstance(batch, tuple | list) else batch)
        else:
            module.training_step(*((batch, batch_idx)[: host.arguments_of_training_step(module)]))


def _ignore(*args: Any, **kwargs: Any) -> None:
    pass
