"""GradCache: encoders in chunks, with the gradient of the whole batch."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_reg import GradCache
from lightning_reg.engine.host.errors import MisconfigurationException
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.toys import QUIET, Classifier, fit, make_loader, same_weights

pytestmark = QUIET

CASE = Case(
    make=partial(GradCache, "net.body", 2),
    neutral=partial(GradCache, "net.body", None),
    by_hand=Hand,  # nothing: the loss and its gradient are those of the batch
    says=("net.body in chunks of 2 rows", "chunk_size=None: inactive", "net.first, net.body in chunks of 1 rows"),
    variants=[partial(GradCache, ["net.first", "net.body"], 1)],
    invalid=[({"chunk_size": 0}, "chunk_size"), ({"layers": []}, "layers"), ({"layers": ""}, "layers")],
)
