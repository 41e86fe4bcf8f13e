"""Weight Compander: weights as a bounded function of what is trained."""

import math
import pickle
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import Compander, Companding, WeightCompander
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import (
    bake_companders,
    compand,
    compand_gradients,
    companding_refusal,
    expand,
    weight_stats,
)
from lightning_reg.regularization.weight_compander.core import compand_all, figures, pull_back_all_, shapes_for
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.conformance.kinds.network import NetworkCase
from tests.conformance.laws import LAWS
from tests.toys import (
    BATCH,
    QUIET,
    TWO_RANKS,
    Callback,
    Classifier,
    fit,
    make_loader,
    make_trainer,
    same_weights,
    weights_of,
)


def algebraic(x):
    return x / (1 + x * x).sqrt()


ALGEBRAIC = Companding.of(algebraic, lambda y: y / (1 - y * y).sqrt(), bound=1.0)  # its derivative is autograd's
PATH = f"{__name__}.ALGEBRAIC"


class CompandedByHand(Hand):
    layer, a, b = "net.", 0.5, 0.3

    def latent(self, name, weight):
        if weight.dim() < 2 or not name.startswith(self.layer):
            return None
        return self.b * (weight / self.a).tan(), lambda v: self.a * (v / self.b).atan()


CASE = (
    Case(
        make=partial(WeightCompander, a=0.5, b=0.3),
        neutral=partial(WeightCompander, fn="identity"),
        by_hand=CompandedByHand,
        says=(
            "arctan, a=0.5, b=0.3, fixed, layers auto",
            "identity: inactive",
            "arctan, a=0.5, b=0.3, learned at 0.1 of the learning rate, layers auto",
            "arctan, a=from the weights, b=from the weights, fixed, layers auto",
            "tanh, a=from the weights, b=from the weights, fixed, layers ['*.body']",
            "softsign, a=from the weights, b=0.3, learned at 0.01 of the learning rate, layers auto",
            f"{PATH}, a=from the weights, b=from the weights, learned at 0.01 of the learning rate, layers auto",
        ),
        also=["regression"],
        variants=[
            partial(WeightCompander, a=0.5, b=0.3, learn=True, shape_lr_factor=0.1),
            partial(WeightCompander),
            partial(WeightCompander, fn="tanh", layers=["*.body"], preserve_init=False),
            partial(WeightCompander, fn="softsign", b=0.3, exclude=["*.head"], learn=True),
            partial(WeightCompander, fn=PATH, learn=True),
        ],
        invalid=[
            ({"a": 0.0}, "a"),
            ({"b": 0.0}, "b"),
            ({"fn": "sine"}, "fn"),
            ({"shape_lr_factor": -0.1}, "shape_lr_factor"),
        ],
    ),
    NetworkCase(
        make=partial(Compander, a=0.7, b=0.4, learn=True),
        inputs=(torch.linspace(-1.0, 1.0, 10).reshape(2, 5),),
        invalid=[({"a": 0.0}, "a"), ({"b": 0.0}, "b"), ({"fn": "sine"}, "fn")],
    ),
)

pytestmark = QUIET
FUNCTIONS = ["arctan", "tanh", "softsign"]
BOUNDS = {"arctan": math.pi / 2, "tanh": 1.0, "softsign": 1.0}

# -- the functional core ----------------------------------------------------------------------------------------------

PSI = {
    "arctan": (math.atan, lambda x: 1 / (1 + x * x)),
    "tanh": (math.tanh, lambda x: 1 / math.cosh(x) ** 2),
    "softsign": (lambda x: x / (1 + abs(x)), lambda x: 1 / (1 + abs(x)) ** 2),
}


@pytest.mark.parametrize("fn", FUNCTIONS)
def test_values_and_gradients_by_hand(fn):
    a, b, latents, at_w = 0.7, 0.4, [-3.0, -0.4, 0.0, 0.1, 1.5], [0.3, -2.0, 1.0, 0.5, -0.1]
    psi, slope = PSI[fn]
    v, gradient = torch.tensor(latents, dtype=torch.double), torch.tensor(at_w, dtype=torch.double)
    weights = [a * psi(x / b) for x in latents]
    assert compand(v, a, b, fn).tolist() == pytest.approx(weights, rel=1e-14)
    at_v = [g * a / b * slope(x / b) for x, g in zip(latents, at_w, strict=True)]
    # dL/da = sum g psi(v/b) and dL/db = -sum g a psi'(v/b) v / b^2; times a and b for the logarithms.
    at_log_a = a * sum(g * psi(x / b) for x, g in zip(latents, at_w, strict=True))
    at_log_b = -b * sum(g * a * slope(x / b) * x / b**2 for x, g in zip(latents, at_w, strict=True))
    got = compand_gradients(v, gradient, a, b, fn)
    assert got[0].tolist() == pytest.approx(at_v, rel=1e-14)
    assert (float(got[1]), float(got[2])) == pytest.approx((at_log_a, at_log_b), rel=1e-13)
    # In the arctan's own words: -sum g a v / (b^2 + v^2).
    if fn == "arctan":
        of_b = -sum(g * a * x / (b * b + x * x) for x, g in zip(latents, at_w, strict=True))
        assert at_log_b == pytest.approx(b * of_b, rel=1e-13)


@pytest.mark.parametrize("fn", FUNCTIONS)
def test_autograd_agrees(fn):
    v = torch.linspace(-2, 2, 6, dtype=torch.double).add(0.1).requires_grad_()
    shape = [torch.tensor(x, dtype=torch.double, requires_grad=True) for x in (0.7, 0.4)]
    assert torch.autograd.gradcheck(lambda v, a, b: compand(v, a, b, fn), (v, *shape))


@pytest.mark.parametrize("fn", FUNCTIONS)
def test_the_contract_of_the_function(fn):
    a, b = 1.0, 0.5
    far = torch.logspace(-3, 4, 400, dtype=torch.double)
    w = compand(far[far < 5], a, b, fn)
    assert bool((w.diff() > 0).all())
    assert float(compand(far, a, b, fn).max()) <= a * BOUNDS[fn]  # tanh is rounded to 1
    torch.testing.assert_close(compand(-far, a, b, fn), -compand(far, a, b, fn), rtol=0, atol=0)
    h = 1e-6
    slope_at_zero = float(compand(torch.tensor(h, dtype=torch.double), a, b, fn)) / h
    assert slope_at_zero == pytest.approx(a / b, rel=1e-5)
    near = torch.linspace(-0.9, 0.9, 50) * a * BOUNDS[fn]
    torch.testing.assert_close(compand(expand(near, a, b, fn), a, b, fn), near, rtol=1e-5, atol=1e-7)
    # a = b = s towards infinity: the identity, up to v^3 / s^2 (softsign: v^2 / s).
    v = torch.linspace(-1, 1, 20)
    torch.testing.assert_close(compand(v, 1e5, 1e5, fn), v, rtol=0, atol=2e-5)


def test_the_arctan_stays_below_its_bound():
    assert round(float(compand(torch.tensor(1e4, dtype=torch.double), 1.0, 0.2)), 5) < 1.57080
    assert float(compand(torch.tensor(1e4, dtype=torch.double), 1.0, 0.2)) == pytest.approx(1.57078, abs=5e-6)


def test_expand_refuses_what_the_function_does_not_reach():
    with pytest.raises(
        ValueError, match=r"^expand: tanh with a=0.5 reaches magnitudes below 0.5, and a weight has 0.5"
    ):
        expand(torch.tensor([0.1, -0.5]), 0.5, 0.5, "tanh")
    with pytest.raises(ValueError, match="a weight has nan"):
        expand(torch.tensor([math.nan]), 0.5, 0.5)
    assert expand(torch.empty(0, 3), 0.5, 0.5).shape == (0, 3)


def test_many_weights_are_computed_in_float32_at_least():
    latents = [torch.tensor([0.1, 3.0], dtype=torch.bfloat16), torch.tensor([[0.2]])]
    weights = compand_all(latents, [0.5, 0.6], [0.3, 0.2], "arctan")
    exact = [compand(v.double(), a, b) for v, a, b in zip(latents, (0.5, 0.6), (0.3, 0.2), strict=True)]
    assert torch.equal(weights[0], exact[0].bfloat16())
    torch.testing.assert_close(weights[1], exact[1].float())
    gradients = [torch.ones_like(v) for v in latents]
    shapes = torch.tensor([[0.5, 0.3], [0.6, 0.2]])
    of_shapes = pull_back_all_(latents, weights, gradients, shapes[:, 0], shapes[:, 1], "arctan", learned=True)
    for v, a, b, at_v, of_shape in zip(latents, (0.5, 0.6), (0.3, 0.2), gradients, of_shapes, strict=True):
        wanted = compand_gradients(v.double(), torch.ones_like(v).double(), a, b)
        tolerance = {"rtol": 2**-7, "atol": 0} if v.dtype is torch.bfloat16 else {}
        torch.testing.assert_close(at_v, wanted[0].to(v.dtype), **tolerance)
        torch.testing.assert_close(of_shape, torch.stack(wanted[1:]).float(), rtol=1e-2, atol=1e-6)


def test_shapes_from_the_weights():
    uniform = torch.rand(40, 50, generator=torch.Generator().manual_seed(0)) - 0.5
    peaked = torch.zeros(10, 10)
    peaked[0, 0] = 2.0
    (a, one, two), (b, _, _) = shapes_for([uniform, peaked, torch.zeros(3, 12)], None, None)
    assert a == pytest.approx(4 * float(uniform.square().mean().sqrt()) / (math.pi / 2), rel=1e-6)
    assert b == a / 2
    assert one == pytest.approx(1.25 * 2 / (math.pi / 2))
    assert two == pytest.approx(4 / 6 / (math.pi / 2))  # uniform in +-1/sqrt(12) has the deviation 1/6
    assert shapes_for([uniform, peaked], 0.3, None, "tanh") == ([0.3, 0.3], [0.15, 0.15])
    assert shapes_for([peaked], None, 0.7, "tanh") == ([2.5], [0.7])


def test_the_parametrization_leaves_the_function_and_bakes():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Conv1d(4, 2, 1))
    x = torch.randn(4, 4, 5)
    before, keys = net[0](x), net.state_dict().keys()
    for layer in (net[0], net[2]):
        parametrize.register_parametrization(layer, "weight", Compander(1.0, 0.5, learn=layer is net[0]))
    torch.testing.assert_close(net[0](x), before, rtol=0, atol=1e-6)
    net[0](x).sum().backward()
    v = net[0].parametrizations.weight.original
    wanted = compand_gradients(v.detach(), x.sum((0, 1)).expand(4, 5), 1.0, 0.5)
    got = net[0].parametrizations.weight[0]
    torch.testing.assert_close([v.grad, got.log_a.grad, got.log_b.grad], list(wanted), rtol=1e-4, atol=1e-5)
    assert not net[2].parametrizations.weight[0].log_a.requires_grad
    during = net[0](x)
    stats = weight_stats(net)
    assert bake_companders(net) is net
    assert net.state_dict().keys() == keys
    assert type(net[0]) is nn.Linear
    assert torch.equal(net[0](x), during)
    assert weight_stats(net) == stats
    for arguments in ((0.0, 1.0), (1.0, -1.0), (1.0, 1.0, "sine")):
        with pytest.raises(ValueError, match=r"^Compander: `a` and `b` must be above 0, `fn` one of"):
            Compander(*arguments)


def test_statistics_of_weights():
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.LayerNorm(2), nn.Linear(2, 2))
    net[2].weight = net[0].weight  # tied: counted once
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, -1.0], [0.001, 3.0]]))
    values = [1.0, -1.0, 0.001, 3.0]
    mean = sum(values) / 4
    second, fourth = (sum((x - mean) ** k for x in values) / 4 for k in (2, 4))
    wanted = {"max": 3.0, "std": math.sqrt(second), "kurtosis": fourth / second**2, "near_zero": 0.25}
    assert weight_stats(net) == pytest.approx(wanted, rel=1e-6)
    assert weight_stats(net, near_zero=0.5)["near_zero"] == 0.75


# -- a function of one's own ------------------------------------------------------------------------------------------


def test_a_function_of_ones_own_by_hand():
    a, b, latents, at_w = 0.7, 0.4, [-3.0, -0.4, 0.0, 0.1], [0.3, -2.0, 1.0, 0.5]
    v, gradient = torch.tensor(latents, dtype=torch.double), torch.tensor(at_w, dtype=torch.double)
    weights = [a * (x / b) / math.sqrt(1 + (x / b) ** 2) for x in latents]
    at_v = [g * a / b * (1 + (x / b) ** 2) ** -1.5 for x, g in zip(latents, at_w, strict=True)]
    assert companding_refusal(ALGEBRAIC) == ""
    w = compand(v, a, b, ALGEBRAIC)
    assert w.tolist() == pytest.approx(weights, rel=1e-14)
    torch.testing.assert_close(expand(w, a, b, ALGEBRAIC), v, rtol=1e-12, atol=0)
    with torch.no_grad():  # as in the optimizer's step
        got = compand_gradients(v, gradient, a, b, ALGEBRAIC)
    assert got[0].tolist() == pytest.approx(at_v, rel=1e-13)
    assert float(got[1]) == pytest.approx(sum(g * x for g, x in zip(at_w, weights, strict=True)))
    assert float(got[2]) == pytest.approx(-sum(g * x for g, x in zip(at_v, latents, strict=True)))
    with pytest.raises(ValueError, match=r"^expand: the function with a=0.5 reaches magnitudes below 0.5"):
        expand(torch.tensor([0.6]), 0.5, 0.5, ALGEBRAIC)
    layer = nn.Linear(5, 4)
    before = layer.weight.detach().clone()
    parametrize.register_parametrization(layer, "weight", Compander(1.0, 0.5, ALGEBRAIC))
    torch.testing.assert_close(layer.weight, before)


def test_a_fit_with_a_function_of_ones_own_is_the_loop_by_hand():
    module, compander = Module(), WeightCompander(fn=PATH, a=0.8, b=0.4)
    fit(module, compander, max_epochs=3)
    hand, batches = PlainLoop(sgd, a=0.8, b=0.4, learn=False), list(make_loader())
    for name in WEIGHTS:
        w = Module().get_parameter(name).detach() / 0.8
        with torch.no_grad():
            hand.params[name].copy_(0.4 * w / (1 - w * w).sqrt())
    hand.weights = lambda: hand.params | {n: 0.8 * algebraic(hand.params[n] / 0.4) for n in WEIGHTS}
    for _ in range(3):
        for batch in batches:
            hand.step(batch)
    agree(module, hand)
    assert compander.describe().startswith(f"{PATH}, a=0.8, b=0.4, fixed")
    assert pickle.loads(pickle.dumps(compander)).fn == PATH


def of_tanh(**changes):
    return Companding.of(**{"psi": torch.tanh, "inverse": torch.atanh, "bound": 1.0} | changes)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (of_tanh(), ""),
        (of_tanh(slope=lambda x: 1 - torch.tanh(x) ** 2), ""),
        (of_tanh(bound=2.0), "its magnitude grows to 1, and `bound` is 2.0"),
        (of_tanh(bound=0.5), "its magnitude grows to 1, and `bound` is 0.5"),
        (of_tanh(psi=torch.asinh, inverse=torch.sinh), "its magnitude grows to 28.3242, and `bound` is 1.0"),
        (of_tanh(psi=lambda x: torch.tanh(x) + 0.01), "it is not odd"),
        (of_tanh(psi=lambda x: torch.tanh(x) / x), "it is not odd"),
        (of_tanh(psi=lambda x: -torch.tanh(x)), "its magnitude grows to 1, and `bound` is 1.0"),
        (
            of_tanh(psi=lambda x: torch.tanh(x) - 0.5 * x.sign() * torch.exp(-4 * (x.abs() - 2) ** 2)),
            "it is not strictly increasing",
        ),
        (of_tanh(psi=lambda x: torch.tanh(2 * x)), "its slope, which must be 1 at 0 and nowhere larger, is 2 at 0 and"),
        (of_tanh(slope=lambda x: 1 / torch.cosh(x)), "`slope` is not its derivative"),
        (of_tanh(inverse=torch.asin), "`inverse` is not its inverse"),
        (of_tanh(psi=torch.tanh_), "`psi` changes the tensors that it is given"),
        (of_tanh(inverse=lambda y: y.sum()), "`inverse` of a list of tensors does not give a list of tensors of"),
        (of_tanh(psi=lambda x: x.tangent), "`psi` of a list of tensors ends in AttributeError: 'Tensor' object has no"),
        (of_tanh(slope=lambda x: 1 / x.abs().clamp(max=1).log()), "it or its slope is not finite everywhere"),
    ],
)
def test_what_cannot_compand_is_found(function, why):
    found = companding_refusal(function)
    assert found.startswith(why)
    assert bool(found) == bool(why)
    if why:
        with pytest.raises(ValueError, match=r"^Compander: `fn` cannot compand: "):
            Compander(1.0, 1.0, function)


TOO_STEEP = of_tanh(psi=lambda x: torch.tanh(2 * x))


def test_a_function_is_tried_at_construction():
    with pytest.raises(ValueError, match=r"^WeightCompander: `fn`, '.*TOO_STEEP', cannot compand: its slope, which"):
        WeightCompander(fn=f"{__name__}.TOO_STEEP")
    wanted = (
        "WeightCompander: `fn` must be one of 'arctan', 'tanh', 'softsign', 'identity', or the import path of a"
        ' Companding of your own ("my_project.functions.psi"), got '
    )
    for fn, got in [
        ("sine", "'sine'."),
        (None, "None."),
        ("no_such_place.psi", "'no_such_place.psi': No module named 'no_such_place'."),
        ("math.psi", "'math.psi': module 'math' has no attribute 'psi'."),
        ("torch.tanh", "'torch.tanh', which is a builtin_function_or_method."),
    ]:
        with pytest.raises(ValueError) as raised:  # noqa: PT011 # compared below
            WeightCompander(fn=fn)
        assert str(raised.value) == wanted + got


# -- training, against loops by hand ----------------------------------------------------------------------------------

WEIGHTS = ("net.0.weight", "net.3.weight")
A, B = 0.5, 0.4  # both layers begin within +-0.41; the bound is 0.785


class PlainLoop:
    """The same training in plain PyTorch: latents, and log a and log b with an optimizer of their own."""

    def __init__(self, optimizer, factor=0.01, a=A, b=B, learn=True):
        self.net, self.learn = Classifier(), learn
        start = dict(self.net.named_parameters())
        self.params = {n: p.detach().clone() for n, p in start.items()}
        for name in WEIGHTS:
            self.params[name] = b * (self.params[name] / a).tan()
        self.params = {name: p.requires_grad_() for name, p in self.params.items()}
        self.shapes = {name: torch.tensor([a, b]).log().requires_grad_(learn) for name in WEIGHTS}
        self.optimizer = optimizer(list(self.params.values()))
        self.factor = factor
        settings = {k: v for k, v in self.optimizer.param_groups[0].items() if k in ("lr", "momentum", "betas")}
        self.own = type(self.optimizer)([{"params": [s]} for s in self.shapes.values()], **settings, weight_decay=0.0)

    def weights(self):
        mapped = {}
        for name in WEIGHTS:
            a, b = self.shapes[name].exp()
            mapped[name] = a * (self.params[name] / b).atan()
        return {**self.params, **mapped}

    def loss(self, batch):
        x, y = batch
        return F.cross_entropy(functional_call(self.net, self.weights(), (x,)), y)

    def step(self, *batches, clip=None):
        self.optimizer.zero_grad()
        self.own.zero_grad()
        for batch in batches:
            (self.loss(batch) / len(batches)).backward()
        if clip:
            nn.utils.clip_grad_norm_([*self.params.values(), *self.shapes.values()], clip)
        self.optimizer.step()
        groups = self.optimizer.param_groups  # one, or one for each layer
        for own, group in zip(self.own.param_groups, (groups[0], groups[-1]), strict=True):
            own["lr"] = group["lr"] * self.factor
        if self.learn:
            self.own.step()


def sgd(params):
    return torch.optim.SGD(params, lr=0.3, momentum=0.9, weight_decay=0.01)


def adamw(params):
    return torch.optim.AdamW(params, lr=0.03, weight_decay=0.1)


class Module(Classifier):
    def __init__(self, optimizer=sgd, configure=None, **kwargs):
        super().__init__(**kwargs)
        self.optimizer, self.configure = optimizer, configure

    def configure_optimizers(self):
        return self.configure(self) if self.configure else self.optimizer(self.parameters())


def agree(module, hand, atol=2e-6):
    wanted = {name: value.detach() for name, value in hand.weights().items()}
    assert not same_weights(module, Module(), atol=1e-2)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=atol)


@pytest.mark.parametrize("learn", [True, False], ids=["learned", "fixed"])
@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_fit_is_the_loop_by_hand(optimizer, learn, accumulate):
    module, compander = Module(optimizer), WeightCompander(a=A, b=B, learn=learn, shape_lr_factor=0.5)
    fit(module, compander, max_epochs=3, accumulate_grad_batches=accumulate)
    hand, batches = PlainLoop(optimizer, 0.5, learn=learn), list(make_loader())
    for _ in range(3):
        for start in range(0, len(batches), accumulate):
            hand.step(*batches[start : start + accumulate])
    agree(module, hand)
    state = compander.state_dict()
    for name in WEIGHTS:
        torch.testing.assert_close(state["values"][name], hand.params[name].detach(), rtol=1e-4, atol=1e-5)
        if learn:
            assert not torch.allclose(hand.shapes[name], torch.tensor([A, B]).log(), atol=1e-3)
            torch.testing.assert_close(state["own"][name], hand.shapes[name].detach(), rtol=1e-5, atol=1e-6)


def test_clipping_counts_the_shapes_in():
    module = Module()
    fit(module, WeightCompander(a=A, b=B, learn=True), gradient_clip_val=0.1)
    hand, without = PlainLoop(sgd), PlainLoop(sgd, learn=False)
    for _ in range(2):
        for batch in make_loader():
            hand.step(batch, clip=0.1)
            without.step(batch, clip=0.1)
    agree(module, hand)
    assert not torch.allclose(hand.weights()["net.0.bias"], without.weights()["net.0.bias"], atol=1e-4)


def two_groups(module):
    first = list(module.net[0].parameters())
    groups = [{"params": first, "lr": 0.2}, {"params": list(module.net[3].parameters()), "lr": 0.1}]
    return torch.optim.SGD(groups, momentum=0.9)


def schedule(kind, optimizer):
    lr = torch.optim.lr_scheduler
    return {
        "step": lambda: lr.StepLR(optimizer, 2, gamma=0.5),
        "lambdas": lambda: lr.LambdaLR(optimizer, [lambda k: 1 / (1 + k), lambda k: 0.9**k]),
        "one cycle": lambda: lr.OneCycleLR(optimizer, [0.3, 0.2], total_steps=12, cycle_momentum=False),
        "cosine": lambda: lr.CosineAnnealingLR(optimizer, 8),
        "plateau": lambda: lr.ReduceLROnPlateau(optimizer, patience=0, min_lr=[0.01, 0.02], threshold=1e3),
        "sequence": lambda: lr.SequentialLR(
            optimizer, [lr.LinearLR(optimizer, 0.1, total_iters=2), lr.ExponentialLR(optimizer, 0.8)], [2]
        ),
    }[kind]()


@pytest.mark.filterwarnings("ignore:The epoch parameter in")  # of torch's own SequentialLR, up to 2.7
@pytest.mark.parametrize("kind", ["step", "lambdas", "one cycle", "cosine", "plateau", "sequence"])
def test_schedules_are_followed_and_never_meet_the_group(kind):
    def configure(module):
        optimizer = two_groups(module)
        scheduler = {"scheduler": schedule(kind, optimizer), "interval": "epoch" if kind == "plateau" else "step"}
        return {"optimizer": optimizer, "lr_scheduler": {**scheduler, "monitor": "train"}}

    class Logging(Module):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train", loss)
            return loss

    module = Logging(configure=configure)
    trainer = fit(module, WeightCompander(a=A, b=B, learn=True, shape_lr_factor=0.05), max_epochs=3)
    hand = PlainLoop(sgd, 0.05)
    names = list(hand.params)
    groups = [
        {"params": [hand.params[n] for n in names if n[:5] == p], "lr": r} for p, r in (("net.0", 0.2), ("net.3", 0.1))
    ]
    hand.optimizer = torch.optim.SGD(groups, momentum=0.9)
    scheduler = schedule(kind, hand.optimizer)
    for _ in range(3):
        for batch in make_loader():
            loss = hand.loss(batch)
            hand.step(batch)
            if kind != "plateau":
                scheduler.step()
        if kind == "plateau":
            scheduler.step(loss.item())
    agree(module, hand)
    wanted, got = ([g["lr"] for g in o.param_groups] for o in (hand.optimizer, trainer.optimizers[0]))
    assert got == pytest.approx(wanted)
    assert wanted[0] != 0.2


class Manual(Module):
    """Two optimizers, one per layer; the second steps every other batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [sgd(self.net[0].parameters()), sgd(self.net[3].parameters())]

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        first.step()
        first.zero_grad()
        if batch_idx % 2:
            second.step()
            second.zero_grad()


def test_manual_optimization_with_two_optimizers():
    module = Manual()
    fit(module, WeightCompander(a=A, b=B, learn=True))
    hand = PlainLoop(sgd)
    parts = [[hand.params[n] for n in hand.params if n.startswith(layer)] for layer in ("net.0", "net.3")]
    shapes = list(hand.shapes.values())
    optimizers = [(sgd(part), torch.optim.SGD([s], 0.003, momentum=0.9)) for part, s in zip(parts, shapes, strict=True)]
    for _ in range(2):
        for index, batch in enumerate(make_loader()):
            hand.loss(batch).backward()
            for pair in optimizers[: 1 + index % 2]:
                for optimizer in pair:
                    optimizer.step()
                    optimizer.zero_grad()
    agree(module, hand)


class ManualClosure(Module):
    def __init__(self):
        super().__init__(lbfgs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


def lbfgs(params):
    return torch.optim.LBFGS(params, lr=0.1, max_iter=3)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")  # of torch's own LBFGS, in 2.8
def test_an_optimizer_that_calls_its_closure_several_times():
    module = Module(lbfgs)
    fit(module, WeightCompander(a=A, b=B))
    hand = PlainLoop(sgd, learn=False)
    optimizer = lbfgs(list(hand.params.values()))
    for _ in range(2):
        for batch in make_loader():

            def closure(batch=batch):
                optimizer.zero_grad()
                loss = hand.loss(batch)
                loss.backward()
                return loss

            optimizer.step(closure)
    agree(module, hand, atol=1e-4)  # the steps of LBFGS divide by differences of gradients


def test_a_closure_of_the_users_own_is_called_as_often():
    ours, manual = Module(lbfgs), ManualClosure()
    for module in (ours, manual):
        fit(module, WeightCompander(a=A, b=B))
    assert same_weights(ours, manual, atol=1e-6)  # float32
    assert not same_weights(ours, Module(), atol=1e-2)


def split_over_ranks(learn):
    from torch.distributed.optim import ZeroRedundancyOptimizer  # here: the import warns

    module = Module(lambda params: ZeroRedundancyOptimizer(params, torch.optim.SGD, lr=0.1, momentum=0.9))
    try:
        fit(module, WeightCompander(a=A, b=B, learn=learn), loader=make_loader(batch_size=BATCH // 2), **TWO_RANKS)
    except MisconfigurationException as error:
        return str(error)
    return weights_of(module)


def not_split(learn):
    module = Module(lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9))
    fit(module, WeightCompander(a=A, b=B, learn=learn), loader=make_loader(batch_size=BATCH // 2), **TWO_RANKS)
    return weights_of(module)


def test_optimizer_states_that_are_split_over_ranks(two_processes):
    for split, whole in zip(
        two_processes.run(split_over_ranks, False), two_processes.run(not_split, False), strict=True
    ):
        assert same_weights(split, whole, atol=1e-6)  # float32
        assert not same_weights(split, Module(), atol=1e-2)
    for refusal in two_processes.run(split_over_ranks, True):
        assert refusal.startswith("WeightCompander: ZeroRedundancyOptimizer takes no further group of parameters")


def test_its_shape_cannot_be_learned_with_one_group_only():
    with pytest.raises(
        MisconfigurationException, match=r"^WeightCompander: LBFGS takes no further group of parameters"
    ):
        fit(Module(lbfgs), WeightCompander(a=A, b=B, learn=True))


def test_a_step_that_overflows_changes_nothing():
    class First(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 1:
                state = compander.state_dict()
                seen.append((weights_of(pl_module), {n: s.clone() for n, s in state["own"].items()}))

    seen, module, compander = [], Module(), WeightCompander(a=A, b=B, learn=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=3e38, backoff_factor=1e-36)
    fit(module, compander, First(), plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    ((weights, shapes),) = seen
    assert same_weights(weights, Module(), atol=1e-7)  # by the inverse and back
    assert all(torch.equal(s, torch.tensor([A, B]).log()) for s in shapes.values())
    hand = PlainLoop(sgd)
    for index, batch in enumerate([*make_loader(), *make_loader()]):
        if index:
            hand.step(batch)
    agree(module, hand, atol=2e-2)  # half precision


LEARNED = replace(CASE[0], make=CASE[0].variants[0], exempt={})


@pytest.mark.parametrize("law", ["precision", "leaves_no_trace", "own_randomness"])
def test_laws_of_learned_shapes(law):
    LAWS[law](LEARNED)


def test_ranks_agree_on_learned_shapes(two_processes):
    LAWS["ranks_agree"](LEARNED, two_processes)


def test_far_out_the_function_is_the_identity():
    module, plain = Module(), Module()
    fit(module, WeightCompander(a=1e3, b=1e3))
    fit(plain)
    assert same_weights(module, plain, atol=1e-5)


# -- checkpoints, and who else touches weights ------------------------------------------------------------------------


def test_checkpoints_hold_the_network_itself(tmp_path):
    module, compander = Module(adamw), WeightCompander(a=A, b=B, learn=True)
    savers = [
        ModelCheckpoint(tmp_path, filename="whole", save_on_train_epoch_end=True),
        ModelCheckpoint(tmp_path, filename="weights", save_weights_only=True, every_n_train_steps=4),
    ]
    fit(module, compander, *savers, max_epochs=1, enable_checkpointing=True)
    whole, weights = (torch.load(tmp_path / f"{n}.ckpt", weights_only=True) for n in ("whole", "weights"))
    for checkpoint in (whole, weights):
        assert same_weights(checkpoint["state_dict"], module)
    state = whole["callbacks"]["WeightCompander"]
    a, b = state["own"]["net.3.weight"].exp()
    torch.testing.assert_close(a * (state["values"]["net.3.weight"] / b).atan(), module.net[3].weight.detach())
    plain = Module(adamw)
    optimizer = plain.configure_optimizers()
    optimizer.load_state_dict(whole["optimizer_states"][0])
    assert len(optimizer.state) == 4


def test_resuming_is_exact_from_a_file_written_after_the_fit(tmp_path):
    def run(epochs, ckpt=None, state=None):
        module, compander = Module(adamw), WeightCompander(a=A, b=B, learn=True)
        trainer = make_trainer(callbacks=[compander], max_epochs=epochs)
        trainer.fit(module, make_loader(), ckpt_path=ckpt, weights_only=True if ckpt else None)
        return trainer, module, compander

    trainer, *_ = run(1)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    (_, resumed, one), (_, whole, two) = run(3, tmp_path / "end.ckpt"), run(3)
    assert same_weights(resumed, whole)
    for part in ("values", "own"):
        assert same_weights(one.state_dict()[part], two.state_dict()[part])


@pytest.mark.parametrize(
    ("before", "now", "what"),
    [
        ("net.0", "auto", "'net.3.weight' is trained here, and is not in it"),
        ("auto", "net.3", "'net.0.weight' is in it, and is not trained here"),
    ],
)
def test_the_state_of_other_layers_is_refused_and_not_dropped(before, now, what, tmp_path):
    trainer = fit(Module(), WeightCompander(before, a=A, b=B), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    with pytest.raises(MisconfigurationException) as raised:
        make_trainer(callbacks=[WeightCompander(now, a=A, b=B)], max_epochs=2).fit(
            Module(), make_loader(), ckpt_path=tmp_path / "end.ckpt"
        )
    assert str(raised.value).startswith(
        f"WeightCompander: the state that it goes on from is of other weights: {what}. Choose the layers that were"
    )


@pytest.mark.parametrize("learn", [True, False])
def test_learning_is_neither_begun_nor_ended_by_a_resume(learn):
    compander = WeightCompander(a=A, b=B, learn=learn)
    fit(Module(), compander, max_steps=1)
    with pytest.raises(MisconfigurationException) as raised:
        WeightCompander(learn=not learn).load_state_dict(compander.state_dict())
    assert str(raised.value) == (
        f"WeightCompander(learn={not learn}): the checkpoint is of a training with learn={learn}. Go on with that, or"
        " train without `ckpt_path` from its weights."
    )


def test_a_second_fit_goes_on_from_the_latents_and_a_new_training_begins_anew():
    module, compander = Module(), WeightCompander(a=A, b=B, learn=True)
    trainer = fit(module, compander)
    before = {name: value.clone() for name, value in compander.latents.values.items()}
    own = {name: parts["shape"].detach().clone() for name, parts in compander.latents.own.items()}
    module.lr = 0.0
    module.optimizer = lambda params: torch.optim.SGD(params, lr=0.0)
    trainer.fit_loop.max_epochs += 1
    trainer.fit(module, make_loader())
    assert same_weights(before, compander.latents.values)
    assert same_weights(own, {name: parts["shape"].detach() for name, parts in compander.latents.own.items()})
    again, first = Module(), Module()
    fit(again, compander)
    fit(first, WeightCompander(a=A, b=B, learn=True))
    assert same_weights(again, first)


class Writes(Callback):
    def __init__(self, factor):
        self.factor = factor

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with torch.no_grad():
            pl_module.net[3].weight.mul_(self.factor)


def test_what_somebody_else_writes_goes_through_the_inverse():
    module = Module()
    fit(module, WeightCompander(a=A, b=B), Writes(0.9))
    hand = PlainLoop(sgd, learn=False)
    for _ in range(2):
        for batch in make_loader():
            hand.step(batch)
            v = hand.params["net.3.weight"]
            with torch.no_grad():
                v.copy_(B * (0.9 * (v / B).atan()).tan())
    agree(module, hand)


def test_the_same_values_written_again_change_nothing():
    module, untouched = Module(), Module()
    fit(module, WeightCompander(a=A, b=B), Writes(1.0))
    fit(untouched, WeightCompander(a=A, b=B))
    assert same_weights(module, untouched)


def test_what_the_function_does_not_reach_is_refused():
    with pytest.raises(MisconfigurationException) as raised:
        fit(Module(), WeightCompander(a=A, b=B), Writes(100.0))
    assert str(raised.value).startswith("WeightCompander: 'net.3.weight' cannot be the value of the function. expand:")
    with pytest.raises(
        MisconfigurationException, match=r"'net.0.weight' cannot .* Give a larger `a`, or preserve_init"
    ):
        fit(Module(), WeightCompander(a=0.2))


def test_latents_that_begin_as_the_weights():
    module = Module(lambda params: torch.optim.SGD(params, lr=0.0))
    compander = WeightCompander(a=0.2, b=0.1, preserve_init=False)
    losses = []
    module.step = lambda module, batch: (losses.append(F.cross_entropy(module(batch[0]), batch[1])), losses[-1])[1]
    start = Module()
    with torch.no_grad():
        for name in WEIGHTS:
            start.get_parameter(name).copy_(0.2 * (start.get_parameter(name) / 0.1).atan())
    x, y = next(iter(make_loader()))
    fit(module, compander)
    assert losses[0].item() == pytest.approx(F.cross_entropy(start(x), y).item(), abs=1e-6)
    assert same_weights(module, start, atol=1e-7)


# -- which weights ----------------------------------------------------------------------------------------------------


class Mixed(Classifier):
    def __init__(self, tied=False):
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.out = nn.Linear(4, 5, bias=False)
        self.attention = nn.MultiheadAttention(4, 2)
        self.odd = nn.MultiheadAttention(4, 2, kdim=3)
        self.net.append(nn.LayerNorm(3))
        self.conv = nn.ConvTranspose1d(2, 2, 3)
        if tied:
            self.out.weight = self.table.weight


def chosen(module, **arguments):
    return WeightCompander(**arguments).weights_to_map(module)


def test_weights_of_sums_are_chosen():
    attention = ["attention.in_proj_weight", "attention.out_proj.weight"]
    odd = [f"odd.{n}_proj_weight" for n in "qkv"] + ["odd.out_proj.weight"]
    rest = [*attention, *odd, "conv.weight"]
    assert sorted(chosen(Mixed())) == sorted([*WEIGHTS, "out.weight", *rest])
    assert sorted(chosen(Mixed(tied=True))) == sorted([*WEIGHTS, *rest])
    assert chosen(Mixed(tied=True), layers="table") == ["table.weight"]
    assert chosen(Mixed(), layers=["net.*", "conv"], exclude=["net.3"]) == ["net.0.weight", "conv.weight"]
    assert chosen(Mixed(), fn="identity") == []


class ForeignLinear(nn.Module):
    """Of another library, with its weight (in, out)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, 4))

    def forward(self, x):
        return x @ self.weight


def test_linear_layers_of_other_libraries_are_chosen():
    class Table(ForeignLinear):
        def forward(self, index):
            return self.weight[index]

    net = nn.Sequential(ForeignLinear(), Table(), nn.Linear(4, 2))
    assert WeightCompander().weights_to_map(net) == ["0.weight", "2.weight"]
    assert WeightCompander("0").weights_to_map(net) == ["0.weight"]


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.stacked = nn.Linear(4, 2), nn.Parameter(torch.rand(2, 4, 4))
        self.position = nn.Parameter(torch.rand(4, 4))


def test_what_may_multiply_and_is_left_alone_is_said():
    net = nn.Sequential(nn.Linear(4, 4), Mixture(), Mixture(), nn.Embedding(3, 4), nn.LayerNorm(4))
    compander = WeightCompander()
    assert compander.weights_to_map(net) == ["0.weight"]
    assert compander.describe() == (
        "arctan, a=from the weights, b=from the weights, fixed, layers auto; 1 weights; left alone, of Mixture, no"
        " linear layer known: 1.stacked, 1.position, 2.stacked and 1 more; left alone, routers of experts:"
        " 1.router.weight, 2.router.weight"
    )
    assert compander.weights_to_map(nn.Sequential(nn.Linear(4, 4))) == ["0.weight"]
    assert "left alone" not in compander.describe()
    exclude = WeightCompander(exclude=["1", "1.*", "2.position"])
    exclude.weights_to_map(net)
    assert exclude.describe().endswith("known: 2.stacked; left alone, routers of experts: 2.router.weight")
    named = WeightCompander(["0", "*.router"])
    assert named.weights_to_map(net) == ["0.weight", "1.router.weight", "2.router.weight"]
    assert "left alone" not in named.describe()
    tied = Mixed(tied=True)
    compander.weights_to_map(tied)
    assert compander.describe().endswith("left alone, shared with another layer: table.weight")


def test_a_pattern_is_of_whole_names_and_a_plain_string_is_one_pattern():
    assert chosen(Mixed(), layers="net.?", exclude="*.0") == ["net.3.weight"]
    assert chosen(Mixed(), layers="net.0.weight") == ["net.0.weight"]
    assert chosen(Mixed(), layers="odd.[qv]_*") == ["odd.q_proj_weight", "odd.v_proj_weight"]
    assert chosen(Mixed(), layers="attention") == ["attention.in_proj_weight"]  # not those of the layers in it
    assert chosen(Mixed(), layers=["net.*"], exclude=["net.4"]) == list(WEIGHTS)  # which is a norm
    for name in ("out", "out.weight", "table", "table.weight"):
        assert chosen(Mixed(tied=True), layers=name) == ["table.weight"]
    assert chosen(nn.Linear(2, 2)) == chosen(nn.Linear(2, 2), layers="weight") == ["weight"]
    compiled = nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager"), nn.Linear(2, 2))
    assert chosen(compiled, layers="0") == ["0.weight"]


def test_a_choice_of_nothing_is_refused():
    with pytest.raises(MisconfigurationException) as raised:
        chosen(Mixed(), layers=["net.*", "atention"])
    assert str(raised.value) == (
        "WeightCompander(layers=['atention']): no linear, convolution or attention layer has such a name. Near names:"
        " 'attention', 'attention.out_proj', 'attention.in_proj_weight', 'attention.out_proj.weight'."
    )
    with pytest.raises(MisconfigurationException) as raised:
        chosen(Mixed(), exclude=["net"])
    assert str(raised.value).startswith(
        "WeightCompander(exclude=['net']): no layer with parameters has such a name. Near names: 'net.4', 'net.3'"
    )
    with pytest.raises(
        MisconfigurationException, match=r"no weight to compand; `layers` 'auto' and `exclude` \['\*'\]"
    ):
        chosen(Mixed(), exclude=["*"])


def test_the_same_weight_twice_is_refused():
    with pytest.raises(
        MisconfigurationException, match=r"^WeightCompander and WeightCompander cannot .* 'net.0.weight'"
    ):
        fit(Module(), WeightCompander(name="one"), WeightCompander(name="two", layers="net.0"))
    module = Module()
    fit(module, WeightCompander(name="one", layers="net.3", a=A), WeightCompander(name="two", layers="net.0", a=A))
    both = Module()
    fit(both, WeightCompander(a=A))
    assert same_weights(module, both)


def test_what_it_says():
    compander = WeightCompander(a=0.5, learn=True)
    assert compander.describe() == "arctan, a=0.5, b=0.25, learned at 0.01 of the learning rate, layers auto"
    assert WeightCompander(fn="identity").describe() == "identity: inactive"
    compander = WeightCompander()
    fit(Module(), compander)
    assert compander.describe() == "arctan, a=from the weights, b=from the weights, fixed, layers auto; 2 weights"


# -- the effect -------------------------------------------------------------------------------------------------------


def test_digits_show_companded_weights():
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:400]
    noisy = y[order].clone()
    noisy[:80] = torch.randint(10, (80,), generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(x[order], noisy), 50)
    stats = []
    for callbacks in ([], [WeightCompander(a=0.2, b=0.1)]):
        torch.manual_seed(0)
        module = Classifier()
        module.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
        module.configure_optimizers = lambda module=module: torch.optim.SGD(
            module.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4
        )
        fit(module, *callbacks, loader=loader, max_epochs=25)
        stats.append(
            {
                **weight_stats(module),
                "small": float(torch.cat([p.flatten() for p in module.parameters()]).abs().lt(0.01).double().mean()),
            }
        )
    plain, companded = stats
    assert companded["max"] < 0.8 * plain["max"]
    assert companded["small"] < 0.9 * plain["small"]
    assert companded["kurtosis"] < 0.9 * plain["kurtosis"]


def test_figures_by_hand():
    latents = [torch.tensor([0.5, -0.5, 0.75, -2.0]), torch.tensor([1.0, 1.5])]
    weights = [torch.tensor([0.25, -0.25, 0.3, -0.625]), torch.tensor([0.5, 0.5])]
    found = figures(latents, weights, [2.0, 1.0], [0.5, 1.0])  # at the knee is not beyond it
    assert found["saturated"].item() == 3 / 6
    assert {name: float(found[name]) for name in ("max", "a", "b")} == {"max": 0.625, "a": 1.5, "b": 0.75}
