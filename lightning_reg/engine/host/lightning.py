"""Every touch of Lightning's non-public surface in one place, and the choice between its two packages."""

import copy
import importlib
import inspect
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from lightning_reg.engine.host import distributed

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
    "Callback",
    "MisconfigurationException",
    "Replacement",
    "arguments_of_training_step",
    "batches_of_epoch",
    "batches_so_far",
    "callbacks",
    "combined_loader",
    "data_parallel_group",
    "gradient_scale",
    "is_compiled",
    "is_logging_step",
    "isolated_randomness",
    "lent_trainer",
    "log_beside",
    "metrics_kept",
    "nominal_batch_size",
    "on_module_device",
    "optimizers_of",
    "own_randomness",
    "prints_summary",
    "rank_zero_warn",
    "reaches_step_through_call",
    "set_callbacks",
    "silenced_metrics",
    "validates_in_fit",
    "without_compiled_steps",
]


class Replacement:
    """A method of one object replaced by a function, until :meth:`undo`.

    Args:
        owner: The object; its class is not touched.
        name: The method.
        function: What stands in for it.

    """

    def __init__(self, owner: object, name: str, function: Callable[..., Any]) -> None:
        self.original: Callable[..., Any] = getattr(owner, name)
        self._owner, self._name = owner, name
        self._before = owner.__dict__.get(name)
        setattr(owner, name, function)

    def undo(self) -> None:
        """Puts back what was there, an earlier replacement by somebody else included."""
        if self._before is None:
            self._owner.__dict__.pop(self._name, None)
        else:
            setattr(self._owner, self._name, self._before)


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
    return any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in module.modules())


def prints_summary(trainer: "Trainer") -> bool:
    """Whether the user lets Lightning print its model summary (``enable_model_summary``), our table's precedent."""
    return any(type(callback).__name__.endswith("ModelSummary") for callback in callbacks(trainer))


def combined_loader(trainer: "Trainer") -> Any:
    """The CombinedLoader behind ``trainer.train_dataloader``, ``None`` before it is made."""
    return trainer.fit_loop._combined_loader


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


def callbacks(trainer: "Trainer") -> "list[Callback]":
    """The Trainer's callbacks; the attribute is public, but Lightning does not declare it."""
    return list(trainer.callbacks)  # type: ignore[attr-defined]  # set by the callback connector


def set_callbacks(trainer: "Trainer", callbacks: "list[Callback]") -> None:
    """Gives the Trainer a new list; the one that Lightning may be iterating over stays as it is."""
    trainer.callbacks = callbacks  # type: ignore[attr-defined]  # set by the callback connector


@contextmanager
def isolated_randomness() -> Iterator[None]:
    """Puts the global random states of torch, numpy and Python back at the end, after an exception as well."""
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]  # torch's
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002 # users draw from it
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002 # as above
        random.setstate(states[2])
        if on_devices:
            torch.cuda.set_rng_state_all(on_devices)


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """The global random states start from a seed, and are what they were at the end."""
    with isolated_randomness():
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 # users draw from it
        random.seed(seed)
        yield


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
def lent_trainer(module: "LightningModule", trainer: "Trainer") -> Iterator[None]:
    """A module that is attached to no Trainer has one, with nothing logged from it."""
    with ExitStack() as undo:
        for part in module.modules():
            if hasattr(part, "_trainer") and hasattr(part, "log_dict"):
                undo.callback(setattr, part, "_trainer", None)
                setattr(part, "_trainer", trainer)  # noqa: B010 # mypy takes what modules have for tensors
                for name in ("log", "log_dict"):
                    undo.callback(Replacement(part, name, _ignore).undo)
        undo.callback(setattr, trainer, "loggers", trainer.loggers)
        trainer.loggers = [DummyLogger() for _ in trainer.loggers]
        yield


def _ignore(*args: Any, **kwargs: Any) -> None:
    pass


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


def log_beside(trainer: "Trainer", metrics: dict[str, float]) -> None:
    """Logs at the end of a validation, where the module's own ``log`` may not be called; callbacks see it, too."""
    values = {name: torch.tensor(value) for name, value in metrics.items()}
    trainer._logger_connector.log_metrics(values)
    trainer._logger_connector._callback_metrics.update(values)


def validates_in_fit(trainer: "Trainer") -> bool:
    """Whether the validation under way is one of a fit, and not its sanity check."""
    return trainer.state.fn == "fit" and bool(trainer.validating)


def arguments_of_training_step(module: "LightningModule") -> int:
    """How many of ``(batch, batch_idx)`` the module's ``training_step`` takes."""
    return min(2, len(inspect.signature(module.training_step).parameters))
