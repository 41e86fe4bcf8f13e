"""Multi-sample dropout."""

from collections import OrderedDict
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_reg import MultiSampleDropout
from tests.conformance.case import Case
from tests.conformance.problems import KINDS, Problem
from tests.toys import QUIET


def net():
    return nn.Sequential(
        OrderedDict(
            first=nn.Linear(8, 16),
            act=nn.Tanh(),
            body=nn.Linear(16, 16),
            act_body=nn.Tanh(),
            drop=nn.Dropout(0.5),
            head=nn.Linear(16, 4),
        )
    )


SAMPLED = partial(MultiSampleDropout, "net.drop", num_samples=4)
CASE = Case(
    make=SAMPLED,
    neutral=partial(MultiSampleDropout, "net.drop", num_samples=1),
    data=Problem(net, KINDS["classification"].data, F.cross_entropy, serves=["classification"]),
    variants=[
        partial(SAMPLED, p=0.3),
        partial(SAMPLED, outputs="all"),
        partial(SAMPLED, head="net.head"),
        partial(SAMPLED, mode="replay", backbone="net.body"),
    ],
    invalid=[
        ({"dropout": "net.drop", "num_samples": 0}, "num_samples"),
        ({"dropout": "net.drop", "num_samples": 2.0}, "num_samples"),
        ({"dropout": "net.drop", "p": -0.1}, "p"),
        ({"dropout": "net.drop", "p": 1.0}, "p"),
        ({"dropout": "net.drop", "p": 0.5, "num_samples": 1}, "p"),
        ({"dropout": "net.drop", "mode": "replay"}, "backbone"),
        ({"dropout": "net.drop", "backbone": "net.body"}, "backbone"),
        ({"dropout": "net.drop", "mode": "replay", "backbone": "net.body", "outputs": "all"}, "outputs"),
        ({"dropout": "net.drop", "mode": "replay", "backbone": "net.body", "head": "net"}, "head"),
        ({"dropout": "net.drop", "outputs": "all", "head": "net"}, "head"),
        ({"dropout": "net.drop", "seed": -1}, "seed"),
    ],
)

pytestmark = QUIET
