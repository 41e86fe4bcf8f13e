"""Progressive N:M sparsity."""

import copy
import csv
import io
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from rich.console import Console
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import NMSparsity
from lightning_reg.engine.errors import MisconfigurationException
from lightning_reg.functional import (
    check_nm,
    decay_factor,
    nm_mask,
    pack_mask,
    pattern_at,
    sparsify_weight,
    unpack_mask,
)
from tests.conformance.case import Case
from tests.toys import QUIET, make_loader, make_trainer

# D depends on the optimizer step by definition, so `make` has a constant one: the law of precision compares runs with
# different numbers of optimizer steps. The recipes that decay are among the variants.
CASE = Case(
    make=partial(NMSparsity, 1, 4, recipe="srste", lambda_w=0.1, dense_fraction=0.0),
    neutral=partial(NMSparsity, 4, 4),
    variants=[
        partial(NMSparsity, 2, 4, recipe="mdgf_exp"),
        partial(NMSparsity, 1, 4, recipe="mdgf_linear", beta=0.04, dense_steps=1, finetune_steps=14, layers=["body"]),
        partial(NMSparsity, 1, 4, recipe="sdgf_stepwise", refresh_every=3, exclude=["head"]),
        partial(NMSparsity, 1, 2, recipe="sdgf_geometric", geometric_k=4, dense_steps=4, dim="out"),
        partial(NMSparsity, 1, 8, recipe="one_shot", dense_fraction=0.4, harden_at_end=False),
        partial(NMSparsity, 1, 8, recipe="ste", dense_fraction=0.6, on_indivisible="error"),
        partial(NMSparsity, 2, 4, layers=["body", "head"], patterns={"head": [1, 2]}, grad="masked"),
    ],
    invalid=[
        ({"n": 0}, "n"),
        ({"n": 5}, "n"),
        ({"m": 0}, "m"),
        ({"beta": 0.0}, "beta"),
        ({"dense_fraction": -0.1}, "dense_fraction"),
        ({"dense_fraction": 1.0}, "dense_fraction"),
        ({"finetune_fraction": -0.1}, "finetune_fraction"),
        ({"finetune_fraction": 1.0}, "finetune_fraction"),
        ({"dense_fraction": 0.5, "finetune_fraction": 0.5}, "finetune_fraction"),
        ({"lambda_w": -1e-4}, "lambda_w"),
        ({"geometric_k": 0}, "geometric_k"),
        ({"geometric_k": 6}, "geometric_k"),
        ({"dense_steps": -1}, "dense_steps"),
        ({"finetune_steps": -1}, "finetune_steps"),
        ({"refresh_every": 0}, "refresh_every"),
        ({"patterns": {"fc": [2]}}, "patterns"),
        ({"patterns": {"fc": [4, 2]}}, "patterns"),
        ({"patterns": {"fc": [1, 0]}}, "patterns"),
        ({"n": 3, "m": 8, "recipe": "sdgf_stepwise"}, "n"),
        ({"recipe": "sdgf_stepwise", "patterns": {"fc": [1, 6]}}, "patterns"),
    ],
)

pytestmark = QUIET
