"""Passes over validation and training data in the middle of a fit, of which the fit notices nothing."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.generators import isolated_randomness, kept_generators
from lightning_reg.engine.host.lightning import Callback
from lightning_reg.engine.run.hooks import FirstHooks
from lightning_reg.engine.run.watching import progress

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["replay_step", "training_batches", "validation_metrics"]


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
    limit = None if trainer.num_training_batches == math.inf else int(trainer.num_training_batches)
    twins = dict(zip(map(id, combined.flattened), map(_fresh, loaders), strict=True))
    iterables = tree_map(lambda loader: twins[id(loader)], combined.iterables, is_leaf=lambda x: id(x) in twins)
    fresh = host.joined_like(combined, iterables)
    with ExitStack() as undo:
        undo.enter_context(isolated_randomness())
        undo.enter_context(host.metrics_kept(trainer.lightning_module))
        for loader in loaders:
            undo.enter_context(kept_generators(loader))
        yield (host.batch_on_device(trainer, batch) for batch, *_ in islice(fresh, limit))


def _fresh(loader: Any) -> Any:
    if not isinstance(loader, DataLoader):
        return loader
    twin = copy.copy(loader)
    changes: dict[str, Any] = {"_iterator": None, "persistent_workers": False}
    for name in ("sampler", "batch_sampler"):
        changes[name] = copy.copy(getattr(loader, name))
    if hasattr(changes["batch_sampler"], "sampler"):
        changes["batch_sampler"].sampler = copy.copy(changes["batch_sampler"].sampler)
    twin.__dict__.update(changes)  # torch forbids to set them
    return twin


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
