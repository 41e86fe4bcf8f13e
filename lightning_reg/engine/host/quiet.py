"""A module that logs nothing for a while, with a Trainer that is not its own or that is."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_reg.engine.host.lightning import DummyLogger, Replacement

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["lent_trainer", "silenced"]


@contextmanager
def lent_trainer(module: "LightningModule", trainer: "Trainer") -> Iterator[None]:
    """A module that is attached to no Trainer has one, with nothing logged from it."""
    parts = _parts_that_log(module)
    with ExitStack() as undo:
        for part in parts:
            undo.callback(setattr, part, "_trainer", None)
            setattr(part, "_trainer", trainer)  # noqa: B010 # mypy takes what modules have for tensors
        undo.enter_context(_silenced(parts, trainer))
        yield


@contextmanager
def silenced(module: "LightningModule", trainer: "Trainer") -> Iterator[None]:
    """Nothing is logged from a module."""
    with _silenced(_parts_that_log(module), trainer):
        yield


@contextmanager
def _silenced(parts: list[nn.Module], trainer: "Trainer") -> Iterator[None]:
    with ExitStack() as undo:
        for part in parts:
            for name in ("log", "log_dict"):
                undo.callback(Replacement(part, name, _ignore).undo)
        undo.callback(setattr, trainer, "loggers", trainer.loggers)
        trainer.loggers = [DummyLogger() for _ in trainer.loggers]
        yield


def _parts_that_log(module: "LightningModule") -> list[nn.Module]:
    # Not by `hasattr` first, which asks every layer of a network for what it does not have.
    return [part for part in module.modules() if "_trainer" in vars(part) and hasattr(part, "log_dict")]


def _ignore(*args: Any, **kwargs: Any) -> None:
    pass
