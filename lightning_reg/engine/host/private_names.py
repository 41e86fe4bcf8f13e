"""Which private names of Lightning and torch this room touches, and whether the installed releases have them."""

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["missing_names", "owners", "private_names"]

_HERE = Path(__file__).parent


def private_names() -> list[str]:
    """The names, read off the source of this folder: what the package defines itself is none of them."""
    own: set[str] = set()
    for path in _HERE.parents[1].rglob("*.py"):
        own |= set(_defined(ast.parse(path.read_text())))
    found = {name for path in _HERE.glob("*.py") for name in _touched(ast.parse(path.read_text()))}
    return sorted(name for name in found - own if not name.startswith("_foreach_"))


def missing_names() -> list[str]:
    """Those that no object has which could: a new release has moved them, and something will not work."""
    having = owners()
    return [name for name in private_names() if not any(hasattr(owner, name) for owner in having)]


def _defined(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
            yield from [node.attr] if node.value.id in ("self", "cls") else []
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        yield from (inner.id for one in targets for inner in ast.walk(one) if isinstance(inner, ast.Name))


def _touched(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.match(r"_[A-Za-z]", node.attr):
            yield node.attr
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("lightning_reg"):
            yield from (alias.name for alias in node.names if re.match(r"_[A-Za-z]", alias.name))


def owners() -> list[Any]:
    """An object of each kind that this folder knows private names of."""
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import StochasticWeightAveraging
    from lightning.pytorch.strategies import ModelParallelStrategy
    from lightning.pytorch.utilities import CombinedLoader
    from torch.sparse import SparseSemiStructuredTensor
    from torchmetrics import MeanMetric

    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    rows = torch.zeros(2, 3, requires_grad=True)
    modules = ["lightning.pytorch.core.optimizer", *(f"torch.nn.modules.{name}" for name in _LAYERS)]
    return [
        torch,
        torch._C,
        trainer,
        trainer.fit_loop,
        trainer.fit_loop.epoch_loop,
        trainer.fit_loop.epoch_loop.val_loop,
        trainer._data_connector,
        trainer._logger_connector,
        LightningModule(),
        StochasticWeightAveraging(1e-3),
        *map(import_module, modules),
        CombinedLoader([]),
        SparseSemiStructuredTensor,
        MeanMetric(),
        nn.Linear(1, 1),
        torch.compile(nn.Linear(1, 1)),
        torch.zeros(1),
        rows.view(6).grad_fn,
        rows[:, 1:].grad_fn,
        torch.amp.GradScaler("cpu"),
        torch.optim.SGD([rows], fused=True),
        ModelParallelStrategy(),
    ]


_LAYERS = ("batchnorm", "conv", "dropout")
