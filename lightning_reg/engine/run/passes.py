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

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.generators import kept_generators
from lightning_reg.engine.run.hooks import FirstHooks

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["on_device", "replay_step", "training_batches", "validation_metrics"]


def validation_metrics(trainer: "Trainer") -> dict[str, float]:
    """Runs the user's validation loop once more on the module as it is.

    Metrics, loggers, progress, random states and all callbacks but the engine's stay as they are.

    Args:
        trainer: A Trainer that fits; at the earliest in ``on_validation_end`` if it validates.

    Returns:
        What the module logged, by name.

    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    progress, seen = copy.deepcopy(loop.batch_progress), copy.copy(loop._seen_batches_per_dataloader)
    callbacks = host.callbacks(trainer)
    stage = trainer.state.stage
    with ExitStack() as undo:
        undo.enter_context(host.isolated_randomness())
        undo.enter_context(host.silenced_metrics(trainer))
        undo.enter_context(host.metrics_kept(trainer.lightning_module))
        undo.callback(host.set_callbacks, trainer, callbacks)
        undo.callback(setattr, trainer.state, "stage", stage)
        undo.callback(setattr, loop, "batch_progress", progress)
        undo.callback(setattr, loop, "_seen_batches_per_dataloader", seen)
        host.set_callbacks(trainer, [callback for callback in callbacks if isinstance(callback, FirstHooks)])
        undo.callback(setattr, loop, "_module_mode", loop._module_mode)
        loop._module_mode = type(loop._module_mode)()
        trainer.validating = True
        trainer._logger_connector.reset_results()  # metric objects of a validation that is about to end
        loop.run()
        return {name: float(value) for name, value in trainer.callback_metrics.items()}


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
    fresh = type(combined)(
        tree_map(lambda loader: twins[id(loader)], combined.iterables, is_leaf=lambda x: id(x) in twins), combined._mode
    )
    with ExitStack() as undo:
        undo.enter_context(host.isolated_randomness())
        undo.enter_context(host.metrics_kept(trainer.lightning_module))
        for loader in loaders:
            undo.enter_context(kept_generators(loader))
        fresh.limits = combined.limits
        yield (on_device(trainer, batch) for batch, *_ in islice(fresh, limit))


def on_device(trainer: "Trainer", batch: Any) -> Any:
    """A batch as Lightning hands it to ``training_step``: converted, through the module's hooks, on its device."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


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
