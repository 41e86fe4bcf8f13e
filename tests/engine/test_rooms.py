"""The order of the engine's rooms: imports go downwards, nothing in a circle, no technique is known."""

import ast
import inspect
import re

import pytest
import torch
from torch import nn

from lightning_reg import registry
from lightning_reg.engine import ROOMS
from lightning_reg.engine.technique import Technique
from tests.structure import MODULES, SOURCES, foreign_private_names, imports_of, name_of, tree_of

ENGINE = {module: path for module, path in MODULES.items() if module.startswith("lightning_reg.engine.")}


def room_of(module):
    return module.split(".")[2]


def test_every_file_is_in_a_room():
    assert {room_of(module) for module in ENGINE} == set(ROOMS)


@pytest.mark.parametrize("module", ENGINE)
def test_a_room_knows_those_before_it_and_no_technique(module):
    known = imports_of(module)
    assert sorted(other for other in known if not other.startswith("lightning_reg.engine")) == []
    later = ROOMS[ROOMS.index(room_of(module)) + 1 :]
    assert sorted(other for other in known & set(ENGINE) if room_of(other) in later) == []


def test_no_file_imports_itself_by_a_circle():
    left = {module: imports_of(module) & set(MODULES) for module in MODULES}
    while free := [module for module, known in left.items() if not known & set(left)]:
        for module in free:
            del left[module]
    assert sorted(left) == []


def test_no_message_of_the_engine_names_an_argument_of_one_technique():
    shared = set(inspect.signature(Technique.__init__).parameters)
    owners = {}
    for unit in registry.units():
        for cls in unit.techniques():
            for argument in set(inspect.signature(cls.__init__).parameters) - shared:
                owners.setdefault(argument, set()).add(unit.key)
    single = {argument for argument, units in owners.items() if len(units) == 1}
    named = []
    for module, path in ENGINE.items():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Raise):
                text = " ".join(
                    n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)
                )
                named += [(module, word) for word in re.findall(r"\b(\w+)=", text) if word in single]
    assert named == []


# -- private names of Lightning and torch stand in one room ------------------------------------------------------------

HOST = [path for path in SOURCES if name_of(path).startswith("lightning_reg.engine.host.")]
# Python's own, and those of named tuples.
PUBLIC_ENOUGH = {"_getframe", "_fields", "_replace", "_asdict"}


@pytest.mark.parametrize("path", [p for p in SOURCES if p not in HOST], ids=name_of)
def test_private_names_of_others_are_touched_in_the_host_alone(path):
    assert foreign_private_names(path) - PUBLIC_ENOUGH == set()


def private_names_of_the_host():
    return sorted({name for path in HOST for name in foreign_private_names(path)})


def owners_of_private_names():
    """An object of each kind that the host knows private names of."""
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import StochasticWeightAveraging
    from lightning.pytorch.core import optimizer
    from lightning.pytorch.strategies import ModelParallelStrategy
    from lightning.pytorch.utilities import CombinedLoader
    from torch.nn.modules import batchnorm, conv, dropout
    from torch.sparse import SparseSemiStructuredTensor
    from torchmetrics import MeanMetric

    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    rows = torch.zeros(2, 3, requires_grad=True)
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
        optimizer,
        CombinedLoader([]),
        batchnorm,
        conv,
        dropout,
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


@pytest.mark.filterwarnings("ignore")
def test_every_private_name_of_the_host_exists():
    owners = owners_of_private_names()
    missing = [name for name in private_names_of_the_host() if not any(hasattr(owner, name) for owner in owners)]
    assert missing == [], "a new release of Lightning or torch has moved these"
