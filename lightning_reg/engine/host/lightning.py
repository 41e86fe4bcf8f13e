"""Every touch of Lightning's non-public surface in one place, and the choice between its two packages."""

import copy
import importlib
import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from lightning_reg.engine.host import distributed, modules
from lightning_reg.engine.host.generators import isolated_randomness
from lightning_reg.engine.host.replacement import Replacement

# `lightning.pytorch` and `pytorch_lightning` are twins that do not know each other's classes. A program of the older
# name need not pay for importing the other one, and its LightningCLI accepts only subclasses of its own Callback.
if TYPE_CHECKING or "pytorch_lightning" not in sys.modules:
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import Callback
    from lightning.pytorch.loggers.logger import DummyLogger
    from lightning.pytorch.utilities import rank_zero_warn
elif "lightning.pytorch" not in sys.modules:
    from lightning_fabric.utilities.exceptions import MisconfigurationException
    from pytorch_lightning import Callback
    from pytorch_lightning.loggers.logger import DummyLogger
    from pytorch_lightning.utilities import rank_zero_warn
else:
    import lightning.fabric.utilities.exceptions
    import lightning.pytorch
    import lightning_fabric.utilities.exceptions
    import pytorch_lightning
    from lightning.pytorch.loggers.logger import DummyLogger
    from lightning.pytorch.utilities import rank_zero_warn

    class Callback(lightning.pytorch.Callback, pytorch_lightning.Callback):
        """A callback to both twins."""

    class MisconfigurationException(
        lightning.fabric.utilities.exceptions.MisconfigurationException,
        lightning_fabric.utilities.exceptions.MisconfigurationException,
    ):
        """Caught as either twin's."""


if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer

__all__ = [
    "STEP_HOOKS",
    "Callback",
    "DummyLogger",
    "IdleHooks",
    "MisconfigurationException",
    "Replacement",
    "adds_epoch_for_statistics",
    "arguments_of_training_step",
    "batch_on_device",
    "batches_of_epoch",
    "batches_so_far",
    "callbacks",
    "combined_loader",
    "data_parallel_group",
    "datamodule_of",
    "gradient_scale",
    "is_compiled",
    "is_logging_step",
    "joined_like",
    "log_beside",
    "metrics_kept",
    "new_scaler",
    "nominal_batch_size",
    "on_module_device",
    "optimizers_of",
    "prints_summary",
    "rank_zero_warn",
    "reaches_step_through_call",
    "rerun_validation",
    "scaled_as_loss",
    "set_callbacks",
    "silenced_metrics",
    "skips_step",
    "stage_of_trainer",
    "validates_in_fit",
    "validation_loaders",
    "without_compiled_steps",
]


# What Lightning calls on every callback in every step, by way of its profiler.
STEP_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


class IdleHooks:
    """Hooks of the step that callbacks do not override are not even called, until :meth:`undo`.

    Args:
        callbacks: The callbacks; Lightning calls the hooks that are callable.

    """

    def __init__(self, callbacks: "Sequence[Callback]") -> None:
        self._idle = [
            (callback, hook)
            for callback in callbacks
            for hook in STEP_HOOKS
            if getattr(callback, hook, None) is not None and getattr(type(callback), hook) is getattr(Callback, hook)
        ]
        for callback, hook in self._idle:
            setattr(callback, hook, None)

    def undo(self) -> None:
        """Puts the hooks back; may be called twice."""
        for callback, hook in self._idle:
            vars(callback).pop(hook, None)
        self._idle = []


def is_logging_step(trainer: "Trainer") -> bool:
    """Whether Lightning writes ``on_step`` values after the present batch: every ``log_every_n_steps``."""
    # Lightning also writes when `trainer.should_stop` is set, which may be so on one rank only; logging takes a
    # collective that all ranks must enter, so that is left out.
    steps = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by the logger connector
    return every > 0 and steps % every == 0


def batches_so_far(trainer: "Trainer") -> int:
    """Training batches begun since the start of training, over resumes: the present one included."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.ready)


def batches_of_epoch(trainer: "Trainer") -> int:
    """Training batches begun in the present epoch, the present one included."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.current.ready)


def optimizers_of(module: "LightningModule") -> tuple[list[Any], list[Any]]:
    """Optimizers and scheduler configurations from the module's ``configure_optimizers``, read as Lightning reads it.

    Args:
        module: A module with a Trainer.

    Returns:
        Optimizers, and Lightning's ``LRSchedulerConfig`` objects.

    """
    package = "lightning.pytorch" if type(module.trainer).__module__.startswith("lightning.") else "pytorch_lightning"
    read = importlib.import_module(f"{package}.core.optimizer")._init_optimizers_and_lr_schedulers
    optimizers, schedulers = read(module)
    return list(optimizers), list(schedulers)


def is_compiled(module: "LightningModule") -> bool:
    """Whether the module, or one inside it, went through ``torch.compile``."""
    if getattr(module, "_compiler_ctx", None) is not None:
        return True
    return any(modules.is_compiled(layer) for layer in module.modules())


def prints_summary(trainer: "Trainer") -> bool:
    """Whether the user lets Lightning print its model summary (``enable_model_summary``), our table's precedent."""
    return any(type(callback).__name__.endswith("ModelSummary") for callback in callbacks(trainer))


def combined_loader(trainer: "Trainer") -> Any:
    """The CombinedLoader behind ``trainer.train_dataloader``, ``None`` before it is made."""
    return trainer.fit_loop._combined_loader


def datamodule_of(trainer: "Trainer") -> Any:
    """The LightningDataModule of the present fit, ``None`` without one."""
    # `trainer.datamodule` stays that of an earlier fit of the same Trainer.
    return trainer._data_connector._datahook_selector.datamodule  # type: ignore[union-attr]  # there while it fits


def nominal_batch_size(trainer: "Trainer") -> int | None:
    """Batch size of the training loader, ``None`` if it has none or there are several."""
    loader = trainer.train_dataloader
    size = getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return size if isinstance(size, int) else None


def on_module_device(module: "LightningModule", batch: Any) -> Any:
    """A batch on the module's device, through its own hooks for that."""
    return module._apply_batch_transfer_handler(batch, device=module.device)


def data_parallel_group(trainer: "Trainer") -> "ProcessGroup | None":
    """The ranks that see different samples and average their gradients; ``None`` where there is one process."""
    if distributed.world_size() == 1:
        return None
    # With tensor parallelism (ModelParallelStrategy) the ranks of one row of the device mesh hold the same samples.
    mesh = getattr(trainer.strategy, "_device_mesh", None)
    if mesh is not None and "data_parallel" in (mesh.mesh_dim_names or ()):
        group: ProcessGroup = mesh["data_parallel"].get_group()
        return group
    return dist.group.WORLD


def gradient_scale(trainer: "Trainer", optimizer: "Optimizer") -> "Tensor | None":
    """What gradients are still multiplied by in ``on_before_optimizer_step``; ``None`` for 1."""
    # Lightning has them unscaled by then, unless the optimizer (a fused one) does that itself in its step.
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return None
    scale: Tensor | None = scaler._scale
    return scale


def scaled_as_loss(trainer: "Trainer", value: "Tensor") -> "tuple[Tensor, Tensor | None]":
    """A value as the loss of half precision is before its backward pass, and what it was multiplied by if it was."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None:
        return value, None
    return scaler.scale(value), scaler._scale  # which it has once it has scaled something


def skips_step(trainer: "Trainer", optimizer: "Optimizer") -> bool:
    """Whether the scaler of half precision has found gradients that are not finite, as it reads itself in its step."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None:
        return False
    found = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    return any(bool(value.item()) for value in found.values())


def callbacks(trainer: "Trainer") -> "list[Callback]":
    """The Trainer's callbacks; the attribute is public, but Lightning does not declare it."""
    return list(trainer.callbacks)  # type: ignore[attr-defined]  # set by the callback connector


def set_callbacks(trainer: "Trainer", callbacks: "list[Callback]") -> None:
    """Gives the Trainer a new list; the one that Lightning may be iterating over stays as it is."""
    trainer.callbacks = callbacks  # type: ignore[attr-defined]  # set by the callback connector


@contextmanager
def silenced_metrics(trainer: "Trainer") -> Iterator[None]:
    """Metrics start empty, go to no logger, and are what they were at the end."""
    connector = trainer._logger_connector
    before, loggers = dict(vars(connector)), trainer.loggers
    connector.reset_metrics()
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers
        vars(connector).clear()
        vars(connector).update(before)


@contextmanager
def metrics_kept(module: nn.Module) -> Iterator[None]:
    """Metrics of the module are at the end what they were."""
    from torchmetrics import Metric

    metrics = [metric for metric in module.modules() if isinstance(metric, Metric)]
    before = [(metric, {name: copy.deepcopy(getattr(metric, name)) for name in metric._defaults}) for metric in metrics]
    counts = [(metric._update_count, metric._computed) for metric in metrics]
    try:
        yield
    finally:
        for (metric, states), (count, computed) in zip(before, counts, strict=True):
            for name, state in states.items():
                setattr(metric, name, state)
            metric._update_count, metric._computed = count, computed


def reaches_step_through_call(trainer: "Trainer", module: "LightningModule") -> bool:
    """Whether the strategy wraps the module (DDP, FSDP), and so reaches ``training_step`` through its ``__call__``."""
    return trainer.strategy.model is not module


@contextmanager
def without_compiled_steps(module: "LightningModule") -> Iterator[None]:
    """The module without the methods that Lightning replaced if it went through ``torch.compile`` as a whole."""
    replaced = ("forward", "training_step", "validation_step", "test_step", "predict_step", "_compiler_ctx")
    compiled = getattr(module, "_compiler_ctx", None) is not None
    aside = {name: module.__dict__.pop(name) for name in replaced if compiled and name in module.__dict__}
    if compiled:
        module._compiler_ctx = None
    try:
        yield
    finally:
        module.__dict__.update(aside)


def log_beside(trainer: "Trainer", metrics: dict[str, float], epoch: int | None = None) -> None:
    """Logs where the module's own ``log`` may not be called, as of an epoch if one is given; callbacks see it, too."""
    values = {name: torch.tensor(value) for name, value in metrics.items()}
    trainer._logger_connector.log_metrics(values if epoch is None else values | {"epoch": torch.tensor(epoch)})
    trainer._logger_connector._callback_metrics.update(values)


def validates_in_fit(trainer: "Trainer") -> bool:
    """Whether the validation under way is one of a fit, and not its sanity check."""
    return trainer.state.fn == "fit" and bool(trainer.validating)


@contextmanager
def stage_of_trainer(trainer: "Trainer", stage: str) -> Iterator[None]:
    """The Trainer says that it trains (``"train"``) or validates, to the module's hooks for batches."""
    before = trainer.state.stage
    try:
        if stage == "train":
            trainer.training = True
        else:
            trainer.validating = True
        yield
    finally:
        trainer.state.stage = before


def validation_loaders(trainer: "Trainer") -> tuple[list[Any], list[float]]:
    """The loaders that a fit validates with, and how many batches of each count; made ready if they are not yet."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    if loop._combined_loader is None:
        with stage_of_trainer(trainer, "validate"):
            loop.setup_data()
    combined = loop._combined_loader
    return ([], []) if combined is None else (list(combined.flattened), list(loop.max_batches))


def arguments_of_training_step(module: "LightningModule") -> int:
    """How many of ``(batch, batch_idx)`` the module's ``training_step`` takes."""
    return min(2, len(inspect.signature(module.training_step).parameters))


def batch_on_device(trainer: "Trainer", batch: Any) -> Any:
    """A batch as Lightning hands it to ``training_step``: converted, through the module's hooks, on its device."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def joined_like(combined: Any, iterables: Any) -> Any:
    """Loaders joined as Lightning has joined others: in the same mode, with the same limits.

    Args:
        combined: The CombinedLoader of the others.
        iterables: Loaders in the structure of the others.

    Returns:
        Another CombinedLoader, begun.

    """
    fresh = type(combined)(iterables, combined._mode)
    fresh.limits = combined.limits
    return fresh


def new_scaler(trainer: "Trainer") -> Any:
    """A scaler of losses with the settings of the Trainer's, at its present scale; ``None`` if there is none."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None:
        return None
    own = type(scaler)(scaler._device) if hasattr(scaler, "_device") else type(scaler)()
    state = scaler.state_dict()
    if state:
        own.load_state_dict(state)
    return own


def rerun_validation(trainer: "Trainer", kept: "Sequence[Callback]") -> dict[str, float]:
    """Runs the user's validation loop once more on the module as it is; nothing else notices.

    Args:
        trainer: A Trainer that fits; at the earliest in ``on_validation_end`` if it validates.
        kept: The callbacks that are called.

    Returns:
        What the module logged, by name.

    """
    loop, before, stage = trainer.fit_loop.epoch_loop.val_loop, callbacks(trainer), trainer.state.stage
    kept_by_loop = {
        "batch_progress": copy.deepcopy(loop.batch_progress),
        "_seen_batches_per_dataloader": copy.copy(loop._seen_batches_per_dataloader),
        "_module_mode": loop._module_mode,
        **{name: getattr(loop, name) for name in ("_restarting", "_restart_stage") if hasattr(loop, name)},
    }
    with ExitStack() as undo:
        undo.enter_context(isolated_randomness())
        undo.enter_context(silenced_metrics(trainer))
        undo.enter_context(metrics_kept(trainer.lightning_module))
        undo.callback(set_callbacks, trainer, before)
        undo.callback(setattr, trainer.state, "stage", stage)
        for name, value in kept_by_loop.items():
            undo.callback(setattr, loop, name, value)
        set_callbacks(trainer, [*kept, *undo.enter_context(_idle_bar(trainer))])
        loop._module_mode = type(loop._module_mode)()
        loop._restarting = False  # one that goes on from a checkpoint would begin in the midst of the data
        trainer.validating = True
        trainer._logger_connector.reset_results()  # metric objects of a validation that is about to end
        loop.run()
        return {name: float(value) for name, value in trainer.callback_metrics.items()}


@contextmanager
def _idle_bar(trainer: "Trainer") -> "Iterator[list[Callback]]":
    """The progress bar, which does nothing meanwhile: the thread that draws it looks for it among the callbacks."""
    bar = trainer.progress_bar_callback
    if bar is None:
        yield []
        return
    with ExitStack() as undo:
        for name in dir(type(bar)):
            if name.startswith("on_"):
                undo.callback(Replacement(bar, name, None).undo)
        yield [bar]


def adds_epoch_for_statistics(trainer: "Trainer") -> bool:
    """Whether Lightning's SWA adds an epoch for batch norm statistics, which trains nothing."""
    return any(getattr(callback, "_model_contains_batch_norm", False) for callback in callbacks(trainer))
