"""What makes many tiny fits quicker and leaves them what they are; for the tests and the processes that they start."""

import functools
import inspect
from contextlib import nullcontext
from enum import Enum
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.fabric.utilities import registry
from lightning.pytorch import LightningModule
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultMetric
from lightning.pytorch.utilities import signature_utils
from lightning_utilities.core.enums import StrEnum
from torch._dynamo import guards

__all__ = ["make_fits_quick"]

_move = _ResultMetric.to
_set_as_torch = LightningModule.__setattr__
_known_arguments: WeakKeyDictionary[Any, inspect.FullArgSpec] = WeakKeyDictionary()


def make_fits_quick() -> None:
    """Takes away what Lightning does anew in each fit and step, although it comes to nothing here."""
    # Every Trainer looks through all installed distributions for callbacks, a tenth of a tiny fit.
    if not hasattr(registry.entry_points, "cache_info"):
        registry.entry_points = functools.cache(registry.entry_points)
    # Every `log` moves what was logged before to the device where it is, a fifth of a tiny fit.
    _ResultMetric.to = _to
    # Every step reads the signature of each hook that is called in it, a twentieth of a tiny fit.
    signature_utils.inspect = SimpleNamespace(getfullargspec=_arguments_of)
    # Every hook is timed by a profiler that times nothing, in a context made of a generator, a twentieth as well.
    PassThroughProfiler.profile = lambda _, action: nullcontext(action)
    # The Trainer's states are compared dozens of times in a step, by their lower case, when they are the same, too.
    StrEnum.__eq__ = _is_equal
    # The module is told the name of each hook before and after it, through torch's search for parameters.
    LightningModule.__setattr__ = _set
    # Each compiled frame is timed for the log, behind a flush of the processor's caches, a quarter of a tiny one.
    if hasattr(guards, "profile_guard_manager"):
        guards.profile_guard_manager = lambda *_: 0.0


def _set(module: LightningModule, name: str, value: Any) -> None:
    if name == "_current_fx_name":
        module.__dict__[name] = value
    else:
        _set_as_torch(module, name, value)


def _to(result: _ResultMetric, device: torch.device | str, **options: Any) -> _ResultMetric:
    is_there = result.is_tensor and result.value.device == torch.device(device) == torch.device("cpu")
    return result if is_there else _move(result, device, **options)


def _is_equal(member: Enum, other: object) -> bool:
    if member is other:
        return True
    text = other._value_ if isinstance(other, Enum) else other
    return member._value_.lower() == str(text).lower()


def _arguments_of(hook: Any) -> inspect.FullArgSpec:
    function = getattr(hook, "__func__", hook)  # a method's arguments are those of its function
    try:
        found = _known_arguments.get(function)
    except TypeError:  # what neither hashes nor can be held weakly
        return inspect.getfullargspec(hook)
    if found is None:
        found = _known_arguments[function] = inspect.getfullargspec(hook)
    return found
