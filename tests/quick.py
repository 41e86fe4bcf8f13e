"""What makes many tiny fits quicker and leaves them what they are; for the tests and the processes that they start."""

import functools
from typing import Any

import torch
from lightning.fabric.utilities import registry
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultMetric
from torch._dynamo import guards

__all__ = ["make_fits_quick"]

_move = _ResultMetric.to


def make_fits_quick() -> None:
    """Takes away what Lightning does anew in each fit and step, although it comes to nothing here."""
    # Every Trainer looks through all installed distributions for callbacks, a tenth of a tiny fit.
    if not hasattr(registry.entry_points, "cache_info"):
        registry.entry_points = functools.cache(registry.entry_points)
    # Every `log` moves what was logged before to the device where it is, a fifth of a tiny fit.
    _ResultMetric.to = _to
    # Each compiled frame is timed for the log, behind a flush of the processor's caches, a quarter of a tiny one.
    if hasattr(guards, "profile_guard_manager"):
        guards.profile_guard_manager = lambda *_: 0.0


def _to(result: _ResultMetric, device: torch.device | str, **options: Any) -> _ResultMetric:
    is_there = result.is_tensor and result.value.device == torch.device(device) == torch.device("cpu")
    return result if is_there else _move(result, device, **options)
