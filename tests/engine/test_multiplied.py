"""Weights that multiply inputs, also in layers of other libraries: by what the weight is given to."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_reg.engine.weights.multiplied import is_router, multiplied_weights, other_matrices


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


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.stacked, self.bias = nn.Parameter(torch.rand(2, 3, 4)), nn.Parameter(torch.rand(4))
        self.nothing, self.inner = nn.Parameter(None), nn.Linear(2, 2)
        self.register_parameter("absent", None)


class SomeNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(2, 3))


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (Experts(), ["stacked"]),
        (nn.LSTM(2, 3), ["weight_ih_l0", "weight_hh_l0"]),
        (Foreign(lambda x, w: x * w[0]), ["weight"]),
        (Foreign(F.linear), []),
        (nn.Linear(2, 3), []),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), ["bias_k", "bias_v"]),
        (nn.Embedding(4, 2), []),
        (nn.LayerNorm((2, 3)), []),
        (SomeNorm(), []),
        (nn.LazyLinear(3), []),
    ],
)
def test_other_matrices_are_listed(layer, expected):
    assert list(other_matrices(layer)) == expected


class TopKRouter(Foreign):
    pass


@pytest.mark.parametrize(
    ("name", "layer", "expected"),
    [
        ("mlp.router", nn.Linear(8, 8), True),
        ("mlp.router.classifier", nn.Linear(8, 4), True),
        ("mlp.gate", TopKRouter(F.linear, 4, 4), True),
        ("mlp.gate", nn.Linear(8, 4), True),
        ("moe.gate.wg", nn.Linear(8, 4), True),
        ("gate", Foreign(torch.matmul, 8, 4), True),
        ("gate", Foreign(torch.matmul, 4, 8), False),
        ("gate", nn.Linear(8, 8), False),
        ("mlp.shared_expert_gate", nn.Linear(8, 1), True),
        ("cell.input_gate", nn.Linear(16, 8), False),
        ("mlp.gate_proj", nn.Linear(16, 8), False),
        ("gate", nn.Conv2d(8, 4, 1), False),
        ("mlp", nn.Linear(8, 4), False),
    ],
)
def test_routers_are_told_by_name_and_size(name, layer, expected):
    assert is_router(name, layer) == expected
