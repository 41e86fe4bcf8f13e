"""What a fit leaves behind: on the module, the Trainer, the loader, and in torch itself."""

import os
import threading
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.data import DataLoader

from tests.conformance.harness import Model, Run

__all__ = ["footprint", "globals_of_torch"]


def footprint(run: Run) -> dict[str, Any]:
    """What can be compared between a plain fit and one with techniques: attributes, their types, and hooks."""
    trainer, loader = run.trainer, run.loader
    loops = {"fit_loop": trainer.fit_loop, "epoch_loop": trainer.fit_loop.epoch_loop}
    return {
        "modules": {name: _module(m) for name, m in run.model.named_modules()},
        "parameters": {name: _parameter(p) for name, p in run.model.named_parameters()},
        "state_dict": {name: (type(v), v.dtype, tuple(v.shape)) for name, v in run.model.state_dict().items()},
        "callbacks": [type(c).__name__ for c in trainer.callbacks if all(c is not t for t in run.techniques)],
        "techniques among the callbacks": sum(c is t for c in trainer.callbacks for t in run.techniques)
        - len(run.techniques),
        "trainer": _attributes(trainer),
        "strategy": _attributes(trainer.strategy),
        **{name: _attributes(loop) for name, loop in loops.items()},
        "optimizers": [(_attributes(o), _hooks(o)) for o in trainer.optimizers],
        "loader": (type(loader), _attributes(loader), _attributes(loader.sampler), _attributes(loader.batch_sampler)),
        "loader of the Trainer": trainer.train_dataloader is loader,
        "module attached": run.model._trainer is trainer,
    }


def globals_of_torch() -> dict[str, Any]:
    """What a technique could have patched or switched: functions of torch and Lightning, modes, threads, variables."""
    owners = (F, Tensor, nn.Module, nn.Linear, torch.optim.Optimizer, torch.optim.SGD, torch.autograd, DataLoader)
    owners += (LightningModule, Trainer, Strategy, SingleDeviceStrategy, Model)
    return {
        # `copy` notes a class's slots on the class when it first copies one, whoever asks for the copy.
        **{one.__name__: {k: id(v) for k, v in vars(one).items() if k != "__slotnames__"} for one in owners},
        "function modes": len(_get_current_function_mode_stack()),
        "grad enabled": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "default dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": threading.active_count(),
        "environment": dict(os.environ),
    }


def _attributes(owner: Any) -> dict[str, Any]:
    return {"class": type(owner), **{name: type(value).__name__ for name, value in vars(owner).items()}}


def _hooks(owner: Any) -> dict[str, int]:
    return {name: len(value) for name, value in vars(owner).items() if name.endswith("_hooks") and value is not None}


def _module(module: nn.Module) -> tuple[Any, ...]:
    return _attributes(module), _hooks(module), module.training, list(module._parameters), list(module._buffers)


def _parameter(parameter: Tensor) -> tuple[Any, ...]:
    hooks = [len(getattr(parameter, name) or ()) for name in ("_backward_hooks", "_post_accumulate_grad_hooks")]
    return type(parameter), parameter.dtype, tuple(parameter.shape), parameter.requires_grad, hooks, vars(parameter)
