"""Gradients of factors at the layer: the same as through the weight, for every layer that can."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_reg.engine.weights.factors import Factors, Layout, product, pulled_back, write_product_
from lightning_reg.engine.weights.layer_products import LayerTap, layer_gradients, use_of
from lightning_reg.engine.weights.places import layout_in, layouts_of

ROWS = {
    "linear": (lambda: nn.Linear(5, 4), (3, 2, 5)),
    "linear of one row": (lambda: nn.Linear(5, 4), (5,)),
    "Conv1D of transformers": (lambda: Conv1D(4, 5), (3, 2, 5)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 8)),
    "of one image": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (4, 7, 8)),
    "grouped": (lambda: nn.Conv2d(4, 6, (3, 2), dilation=(2, 1), groups=2), (2, 4, 9, 8)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), (2, 4, 6, 5)),
    "along one": (lambda: nn.Conv1d(4, 6, 3, stride=3, groups=2), (2, 4, 11)),
    "in three": (lambda: nn.Conv3d(2, 4, 2, padding=1), (2, 2, 3, 4, 3)),
    "embedding": (lambda: nn.Embedding(7, 4), "indices"),
    "embedding with padding": (lambda: nn.Embedding(7, 4, padding_idx=2), "indices"),
}


def factors_for(weight, layout, rank=2):
    rows, columns = layout.matrix(weight).shape
    left = torch.randn(rows, rank, dtype=weight.dtype, requires_grad=True)
    right = torch.randn(rank, columns, dtype=weight.dtype, requires_grad=True)
    return Factors(left, right, 0.7, torch.rand(rows, dtype=weight.dtype) + 0.5)


@pytest.mark.parametrize("name", ROWS)
def test_the_layers_gradients_are_those_of_the_weight_pulled_back(name):
    torch.manual_seed(0)
    make, shape = ROWS[name]
    layer = make().double()
    x = torch.randint(7, (3, 5)) if shape == "indices" else torch.randn(shape).double().requires_grad_()
    layout, use = layout_in(layer, "weight"), use_of(layer, "weight")
    factors = factors_for(layer.weight, layout)
    output = layer(x)
    at_output = torch.randn_like(output)
    gradients = torch.autograd.grad(output, [layer.weight, *([x] if x.is_floating_point() else [])], at_output)
    dense = pulled_back(layout.matrix(gradients[0]), factors)
    for got, want in zip(layer_gradients(use, x.detach(), at_output, factors), dense, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    # The same through the hook, with the gradient of the input as it was.
    layer.requires_grad_(False)
    tap = LayerTap(use)
    tap.factors = factors
    layer.register_forward_hook(tap, with_kwargs=True)
    tapped = layer(input=x) if name == "linear" else layer(x)
    assert torch.equal(tapped, output)
    tapped.backward(at_output)
    torch.testing.assert_close(factors.left.grad, dense[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(factors.right.grad, dense[1], rtol=1e-12, atol=1e-12)
    if x.is_floating_point():
        torch.testing.assert_close(x.grad, gradients[1], rtol=1e-12, atol=1e-12)
    assert layer.weight.grad is None


@pytest.mark.parametrize("name", ROWS)
def test_who_asks_for_the_gradient_of_the_weight_itself_gets_it_and_nobody_else(name):
    torch.manual_seed(0)
    make, shape = ROWS[name]
    layer = make().double()
    x = torch.randint(7, (3, 5)) if shape == "indices" else torch.randn(shape).double().requires_grad_()
    want = torch.randn_like(layer(x))
    weight, output = layer.weight, layer(x)
    # Of a loss that bends, so that its gradient can be differentiated.
    plain = torch.autograd.grad((output - want).square().sum(), weight, create_graph=True)[0]
    at_input = torch.autograd.grad(plain.square().sum(), x)[0] if x.is_floating_point() else None
    tap = LayerTap(use_of(layer, "weight"), weight)
    tap.factors = factors_for(weight, layout_in(layer, "weight"))
    tap.attach(layer)
    loss = (layer(x) - want).square().sum()
    found = torch.autograd.grad(loss, weight, create_graph=True)[0]
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12)
    if at_input is not None:
        by_input = torch.autograd.grad(found.square().sum(), x, retain_graph=True)[0]
        torch.testing.assert_close(by_input, at_input, rtol=1e-12, atol=1e-12)
        # Who asks for that of the input alone makes none of the weight or of factors.
        torch.autograd.grad(loss, x, retain_graph=True)
    assert tap.factors.left.grad is None
    loss.backward(inputs=[weight], retain_graph=True)
    torch.testing.assert_close(weight.grad, plain.detach(), rtol=1e-12, atol=1e-12)
    weight.grad = None
    loss.backward()
    assert weight.grad is None
    dense = pulled_back(layout_in(layer, "weight").matrix(plain.detach()), tap.factors)
    torch.testing.assert_close(tap.factors.left.grad, dense[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tap.factors.right.grad, dense[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("turned", "shape"), [(False, (4, 5)), (True, (5, 4)), (False, (4, 3, 2, 2)), (True, (3, 4, 2))]
)
def test_gradients_and_products_by_hand(turned, shape):
    torch.manual_seed(0)
    layout, v = Layout(turned), torch.randn(shape).double()
    factors = factors_for(v, layout)
    left, right, c, scale = (value.detach() if isinstance(value, torch.Tensor) else value for value in factors)
    matrix = (v.transpose(0, 1) if turned else v).reshape(len(left), -1)
    want = torch.empty_like(matrix)
    for i, j in ((i, j) for i in range(len(left)) for j in range(right.shape[1])):
        want[i, j] = matrix[i, j] + c * sum(left[i, k] * right[k, j] for k in range(2))
    w = torch.empty_like(v)
    with torch.no_grad():
        write_product_(w, v, factors, layout)
    torch.testing.assert_close(layout.matrix(w), want, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(layout.weight(layout.matrix(v), shape), v, rtol=0, atol=0)
    # dL/dB = c diag(s) G A' and dL/dA = c B' diag(s) G.
    g = torch.randn_like(matrix)
    at_left, at_right = pulled_back(g, factors)
    torch.testing.assert_close(at_left, c * torch.diag(scale) @ g @ right.T, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(at_right, c * left.T @ torch.diag(scale) @ g, rtol=1e-13, atol=1e-13)


def test_a_weight_in_bfloat16_is_rounded_once():
    torch.manual_seed(0)
    v = torch.randn(64, 32).bfloat16()
    factors = Factors(torch.randn(64, 3), torch.randn(3, 32))
    w = torch.empty_like(v)
    write_product_(w, v, factors, Layout())
    assert torch.equal(w, (v.double() + factors.left.double() @ factors.right.double()).bfloat16())


def test_a_stack_of_matrices():
    torch.manual_seed(0)
    layout, v = Layout(stacked=True), torch.randn(3, 4, 5)
    factors = Factors(torch.randn(3, 4, 2), torch.randn(3, 2, 5), 1.0, torch.rand(3, 4))
    w, g = torch.empty_like(v), torch.randn_like(v)
    write_product_(w, v, factors, layout)
    at_left, at_right = pulled_back(g, factors)
    for e in range(3):
        one = Factors(factors.left[e], factors.right[e], 1.0, factors.scale[e])
        torch.testing.assert_close(w[e], v[e] + product(one))
        torch.testing.assert_close(at_left[e], pulled_back(g[e], one)[0])
        torch.testing.assert_close(at_right[e], pulled_back(g[e], one)[1])


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


class Plain(nn.Module):
    """A layer of somebody's own."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.weight, self.factor = nn.Parameter(torch.randn(4, 5)), factor

    def forward(self, x):
        return self.factor * F.linear(x, self.weight) + 1.0


def test_which_layers_are_known():
    assert use_of(Plain(), "weight").kind == "linear"
    for layer in (
        Plain(2.0),
        Halved(5, 4),
        nn.ConvTranspose2d(4, 6, 3),
        nn.Conv2d(4, 6, 3, padding="same"),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        nn.Embedding(7, 4, sparse=True),
        nn.Embedding(7, 4, max_norm=1.0),
        nn.Embedding(7, 4, scale_grad_by_freq=True),
        nn.MultiheadAttention(4, 2),
        nn.LayerNorm(4),
    ):
        assert use_of(layer, "weight") is None
    plain = Plain()
    before = plain.weight.detach().clone()
    use_of(plain, "weight")
    assert torch.equal(plain.weight, before)
    assert layouts_of(nn.ModuleList([nn.ConvTranspose1d(4, 6, 3)]))["0.weight"] == Layout(turned=True)
    tied = nn.ModuleDict({"table": nn.Embedding(7, 4), "head": nn.Linear(4, 7)})
    tied.head.weight = tied.table.weight
    assert layouts_of(tied) == {"table.weight": Layout()}
    assert layouts_of(nn.ModuleList([nn.Embedding(7, 4)])) == {"0.weight": Layout(turned=True)}


def test_a_layer_whose_output_is_changed_in_place():
    torch.manual_seed(0)
    layer = nn.Linear(5, 4).requires_grad_(False)
    tap = LayerTap(use_of(layer, "weight"))
    tap.factors = factors_for(layer.weight, Layout())
    layer.register_forward_hook(tap, with_kwargs=True)
    x = torch.randn(3, 5)  # needs no gradient either
    F.relu_(layer(x)).sum().backward()
    g = (layer(x) > 0).float()
    want = layer_gradients(tap.use, x, g, tap.factors)
    torch.testing.assert_close(tap.factors.left.grad, want[0])
    with torch.no_grad():
        assert not layer(x).requires_grad
    tap.factors = None
    assert not layer(x).requires_grad
