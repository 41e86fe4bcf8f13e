"""Weights that multiply inputs, also in layers of other libraries: by what the weight is given to."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_reg.engine.weights.multiplied import multiplied_weights


class Foreign(nn.Module):
    """A layer of another library with a 2-D weight."""

    def __init__(self, use, rows=6, columns=4):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(rows, columns))
        self.use, self.calls = use, 0

    def forward(self, x):
        self.calls += 1
        return self.use(x + torch.rand(1), self.weight)


def two_uses(x, w):
    return F.linear(x, w) @ w


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize(
    ("use", "dim"),
    [
        (F.linear, 1),
        (lambda x, w: F.linear(x, weight=w.to(torch.float32)), 1),
        (lambda x, w: x @ w.t(), 1),
        (lambda x, w: torch.mm(x, w.T), 1),
        (lambda x, w: (w @ x.t()).t(), 1),
        (lambda x, w: x @ w, 0),
        (torch.matmul, 0),
        (lambda x, w: torch.addmm(torch.zeros(w.shape[1]), x, w), 0),
        (lambda x, w: F.linear(x, w.transpose(0, 1)), 0),
        (lambda x, w: x * w[0], None),
        (lambda x, w: F.embedding(x.long(), w), None),
        (two_uses, None),
        (lambda x, w: 1 / 0, None),
    ],
)
def test_a_foreign_weight_is_asked_and_nothing_notices(use, dim, square):
    layer, before = Foreign(use, 4 if square else 6), torch.get_rng_state()
    old = layer.weight.detach().clone()
    assert multiplied_weights(layer) == ({} if dim is None else {"weight": dim})
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(layer.weight, old)
    assert layer.calls == 0
    assert layer.training


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Linear(2, 3), {"weight": 1}),
        (nn.Conv2d(2, 3, 3), {"weight": 1}),
        (nn.ConvTranspose1d(2, 3, 3), {"weight": 0}),
        (nn.MultiheadAttention(4, 2), dict.fromkeys(("in_proj_weight", *(f"{x}_proj_weight" for x in "qkv")), 1)),
        (nn.Embedding(4, 2), {}),
        (nn.LayerNorm((2, 3)), {}),
        (nn.LSTM(2, 3), {}),
        (nn.ReLU(), {}),
    ],
)
def test_layers_of_torch_are_known(layer, expected):
    assert multiplied_weights(layer) == expected
