"""Loss calls are seen however they are reached, by the mode and by the gate, and torch is put back."""

import functools
import inspect
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_reg.engine.loss import watch as interception
from lightning_reg.engine.loss.elements import bind
from lightning_reg.engine.loss.watch import Interception, call_site

# Dynamo looks at the gradient of every tensor, and hides the warning in a way that "error" prevents.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
HAD = F.has_torch_function_variadic
HANDLED = F.handle_torch_function
BOUND = {"loss": F.cross_entropy}
G = torch.Generator().manual_seed(2)
X = torch.randn(6, 4, generator=G)
Y = torch.randint(4, (6,), generator=G)
Z = torch.randn(6, 4, generator=G)


class Watcher:
    """Notes the calls and doubles what the user's code gets, so that the way back shows too."""

    def __init__(self, *, compiled: bool = False) -> None:
        self.calls: list[tuple[str, tuple, dict]] = []
        self.sites: list[str] = []
        self.interception = Interception(compiled=compiled)

    def handle(self, function, args, kwargs) -> Tensor:
        self.calls.append((function.__name__, args, kwargs))
        self.sites.append(call_site())
        return 2 * function(*args, **kwargs)

    def watch(self, function, *args) -> tuple[list[str], Tensor]:
        """Names of the calls seen in one step, and what the step returned."""
        self.calls.clear()
        with self.interception.watch(self.handle):
            value = function(*args)
        return [name for name, _, _ in self.calls], value

    def learned(self) -> "Watcher":
        assert self.watch(F.mse_loss, X, Z)[0] == ["mse_loss"]
        assert self.interception.by_gate
        return self


# The engine's handler lies in the package, so its frame is none of the user's.
Watcher.handle.__code__ = Watcher.handle.__code__.replace(co_filename=interception.__file__)


@pytest.fixture(params=["mode", "gate"])
def watcher(request):
    return Watcher() if request.param == "mode" else Watcher().learned()


class Subclass(Tensor):
    """As torch's own subclasses of Tensor: its operations are torch's."""


class Aloof(Tensor):
    """As Parameter and torch's functional tensors: takes no part in overriding."""

    __torch_function__ = torch._C._disabled_torch_function_impl


class InForward(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(input=x, target=y)


WAYS = {
    "F.cross_entropy": (F.cross_entropy, F.cross_entropy),
    "nn.CrossEntropyLoss": (F.cross_entropy, nn.CrossEntropyLoss()),
    "from import": (F.cross_entropy, cross_entropy),
    "partial": (F.cross_entropy, functools.partial(F.cross_entropy, label_smoothing=0.1)),
    "bound before": (F.cross_entropy, lambda x, y: BOUND["loss"](x, target=y)),
    "in forward": (F.cross_entropy, InForward()),
    "gaussian_nll": (F.gaussian_nll_loss, lambda x, y: F.gaussian_nll_loss(x, Z, torch.ones(6, 4))),
    "GaussianNLLLoss": (F.gaussian_nll_loss, lambda x, y: nn.GaussianNLLLoss()(x, Z, torch.ones(6, 4))),
    "multilabel_soft_margin": (
        F.multilabel_soft_margin_loss,
        lambda x, y: F.multilabel_soft_margin_loss(x, Z.sigmoid()),
    ),
    "triplet_with_distance": (
        F.triplet_margin_with_distance_loss,
        lambda x, y: F.triplet_margin_with_distance_loss(x, Z, Z + 1),
    ),
    "TripletMarginWithDistanceLoss": (
        F.triplet_margin_with_distance_loss,
        lambda x, y: nn.TripletMarginWithDistanceLoss(distance_function=F.mse_loss)(x, Z, Z + 1),
    ),
}
if hasattr(F, "linear_cross_entropy"):  # torch >= 2.12; calls cross_entropy inside
    WAYS["linear_cross_entropy"] = (F.linear_cross_entropy, lambda x, y: F.linear_cross_entropy(x, Z[:5], y))


@pytest.mark.parametrize(("function", "way"), WAYS.values(), ids=WAYS)
def test_seen_once_however_it_is_reached(watcher, function, way):
    names, value = watcher.watch(way, X, Y)
    assert names == [function.__name__]  # what a composed loss calls inside is not seen
    assert torch.equal(value, 2 * way(X, Y))
    _, args, kwargs = watcher.calls[0]
    assert next(iter(bind(function, args, kwargs).values())) is X


@pytest.mark.parametrize("name", ["mode", "gate"])
def test_options_arrive(name):
    watcher = Watcher() if name == "mode" else Watcher().learned()
    watcher.watch(functools.partial(F.cross_entropy, ignore_index=2, reduction="sum"), X, Y)
    arguments = bind(F.cross_entropy, *watcher.calls[0][1:])
    assert (arguments["ignore_index"], arguments["reduction"]) == (2, "sum")
    assert arguments["target"] is Y


@pytest.mark.parametrize("kind", [Tensor, Subclass])
def test_what_is_no_loss_is_left_alone(watcher, kind):
    def step(x: Tensor) -> Tensor:
        return F.normalize(F.softmax(F.linear(x, Z), dim=1))

    names, value = watcher.watch(step, X.as_subclass(kind))
    assert names == []
    assert type(value) is kind
    assert torch.equal(value.as_subclass(Tensor), step(X))


def test_several_calls_in_order(watcher):
    names, value = watcher.watch(lambda: F.mse_loss(X, Z) + F.cross_entropy(X, Y) + F.mse_loss(Z, X))
    assert names == ["mse_loss", "cross_entropy", "mse_loss"]
    assert torch.equal(value, 2 * F.mse_loss(X, Z) + 2 * F.cross_entropy(X, Y) + 2 * F.mse_loss(Z, X))


def test_nothing_is_seen_afterwards(watcher):
    watcher.watch(F.cross_entropy, X, Y)
    watcher.calls.clear()
    F.cross_entropy(X, Y)
    assert watcher.calls == []


def test_losses_that_the_handler_calls_are_not_seen(watcher):
    plain = watcher.handle

    def handle(function, args, kwargs):
        return plain(function, args, kwargs) + F.l1_loss(X, Z) + F.mse_loss(X, Z)

    watcher = Watcher()
    watcher.handle = handle
    for _ in ("mode", "gate"):
        assert torch.equal(watcher.watch(F.cross_entropy, X, Y)[1], handle(F.cross_entropy, (X, Y), {}))


# -- mode first, then gate --------------------------------------------------------------------------------------------


def asked_by_torch() -> tuple:
    return F.has_torch_function_variadic, F.handle_torch_function


def test_first_step_by_mode_the_next_by_gate():
    watcher = Watcher()
    assert not watcher.interception.by_gate
    assert watcher.watch(asked_by_torch)[1] == (HAD, HANDLED)  # nothing seen, nothing learned
    assert not watcher.interception.by_gate
    watcher.watch(F.cross_entropy, X, Y)
    assert watcher.interception.by_gate
    assert watcher.watch(asked_by_torch)[1] != (HAD, HANDLED)


def test_compiled_stays_in_mode():
    watcher = Watcher(compiled=True)
    for _ in range(3):
        assert watcher.watch(lambda: (F.cross_entropy(X, Y), asked_by_torch())[1]) == (
            ["cross_entropy"],
            (HAD, HANDLED),
        )
        assert not watcher.interception.by_gate


@pytest.mark.parametrize("kind", [Subclass, Aloof])
def test_a_loss_that_the_gate_would_not_see_stays_in_mode(kind):
    watcher = Watcher()
    for _ in range(2):
        names, value = watcher.watch(F.mse_loss, X.as_subclass(kind), Z)
        assert names == ["mse_loss"]
        assert torch.equal(value.as_subclass(Tensor), 2 * F.mse_loss(X, Z))
        assert not watcher.interception.by_gate


def test_one_call_that_the_gate_would_not_see_keeps_the_mode_for_all():
    watcher = Watcher()
    watcher.watch(lambda: (F.mse_loss(X.as_subclass(Subclass), Z), F.mse_loss(X, Z)))
    assert not watcher.interception.by_gate


@pytest.mark.parametrize(("kind", "factor"), [(Subclass, 2), (Aloof, 1)])
def test_a_subclass_met_by_the_gate_is_seen_or_left_to_torch(kind, factor):
    names, value = Watcher().learned().watch(F.mse_loss, X.as_subclass(kind), Z)
    assert names == ["mse_loss"] * (factor - 1)
    assert torch.equal(value.as_subclass(Tensor), factor * F.mse_loss(X, Z))


def test_parameters_are_seen_by_the_gate():
    assert Watcher().learned().watch(F.mse_loss, nn.Parameter(X), Z)[0] == ["mse_loss"]


def test_calls_on_another_thread_are_left_alone():
    watcher, values = Watcher().learned(), []

    def step() -> Tensor:
        thread = threading.Thread(target=lambda: values.append(F.cross_entropy(X, Y)))
        thread.start()
        thread.join()
        return F.cross_entropy(X, Y)

    names, value = watcher.watch(step)
    assert names == ["cross_entropy"]
    assert torch.equal(values[0], F.cross_entropy(X, Y))
    assert torch.equal(value, 2 * values[0])


def test_the_gate_follows_the_thread_that_enters_it():
    watcher, found = Watcher().learned(), []
    thread = threading.Thread(target=lambda: found.append(watcher.watch(F.cross_entropy, X, Y)[0]))
    thread.start()
    thread.join()
    assert found == [["cross_entropy"]]


# -- put back ---------------------------------------------------------------------------------------------------------


def test_torch_is_put_back_after_the_step(watcher):
    watcher.watch(F.cross_entropy, X, Y)
    assert F.has_torch_function_variadic is HAD
    assert F.handle_torch_function is HANDLED


@pytest.mark.parametrize("where", ["step", "handler", "torch"])
def test_torch_is_put_back_after_an_exception(watcher, where, monkeypatch):
    def fail(*args):
        raise ZeroDivisionError

    if where == "handler":
        monkeypatch.setattr(watcher, "handle", fail)
    step = {"step": fail, "handler": F.cross_entropy, "torch": lambda x, y: F.cross_entropy(x, y[:2])}[where]
    with pytest.raises(ValueError if where == "torch" else ZeroDivisionError):
        watcher.watch(step, X, Y)
    assert F.has_torch_function_variadic is HAD
    assert F.handle_torch_function is HANDLED
    monkeypatch.undo()
    assert watcher.watch(F.cross_entropy, X, Y)[0] == ["cross_entropy"]


def test_the_gate_sees_on_after_a_handler_failed_within_a_step():
    watcher = Watcher().learned()

    def step(x, y):
        with pytest.raises(ValueError, match="batch_size"):
            F.cross_entropy(x, y[:2])
        return F.cross_entropy(x, y)

    assert watcher.watch(step, X, Y)[0] == ["cross_entropy", "cross_entropy"]


def test_an_earlier_stand_in_is_put_back(monkeypatch):
    watcher, asked = Watcher().learned(), []

    def stand_in(*args):
        asked.append(args)
        return HAD(*args)

    monkeypatch.setattr(F, "has_torch_function_variadic", stand_in)
    watcher.watch(F.cross_entropy, X, Y)
    assert F.has_torch_function_variadic is stand_in
    assert asked[0][0] is X  # and it is asked about what the handler calls


# -- missed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_is_missed_while_the_mode_watches(compiled):
    assert Watcher(compiled=compiled).interception.missed(0) is False


def test_missed_warns_once_and_returns_to_the_mode():
    watcher = Watcher().learned()
    with pytest.warns(UserWarning, match="lightning_reg") as warned:
        assert watcher.interception.missed(41) is True
    assert [str(w.message) for w in warned] == [
        "lightning_reg: the loss call seen until now was not seen in the step after global step 41 (a part of the model"
        " compiled since?): that one step went without the techniques that need it. All"
        " calls are looked at from here on, which costs a little more per operation."
    ]
    assert not watcher.interception.by_gate
    assert watcher.watch(F.mse_loss, X.as_subclass(Aloof), Z)[0] == ["mse_loss"]
    assert watcher.watch(F.cross_entropy, X, Y)[0] == ["cross_entropy"]
    assert not watcher.interception.by_gate
    assert watcher.interception.missed(42) is False  # and no second warning, which would be an error here


# -- call site --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [F.cross_entropy, nn.CrossEntropyLoss()], ids=["function", "module"])
def test_call_site_is_the_line_of_the_users_code(watcher, loss):
    def step() -> tuple[Tensor, int]:
        return loss(X, Y), inspect.currentframe().f_lineno

    _, (_, line) = watcher.watch(step)
    assert watcher.sites[-1] == f"test_interception.py:{line}"


def test_call_site_without_any_code_outside(monkeypatch):
    monkeypatch.setattr(interception, "_OUTSIDE", ("",))
    assert call_site() == ""


# -- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def linear() -> nn.Linear:
    net = nn.Linear(4, 4)
    with torch.no_grad():
        net.weight.copy_(Z[:4])
        net.bias.zero_()
    return net


def net_only(net, backend):
    compiled = torch.compile(net, backend=backend)
    return lambda x, y: F.cross_entropy(compiled(x), y)


def whole(net, backend):
    return torch.compile(lambda x, y: F.cross_entropy(net(x), y), backend=backend)


def whole_with_module(net, backend):
    loss = nn.CrossEntropyLoss()
    return torch.compile(lambda x, y: loss(net(x), y), backend=backend)


def loss_only(net, backend):
    loss = torch.compile(F.cross_entropy, backend=backend)
    return lambda x, y: loss(net(x), y)


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize(
    ("compiled_step", "backend", "known"),
    [
        (net_only, "eager", False),
        (net_only, "eager", True),
        (whole, "eager", True),
        (whole, "aot_eager", False),
        (whole_with_module, "eager", False),
        (loss_only, "eager", False),
    ],
)
def test_seen_under_compile(compiled_step, backend, known):
    net, watcher = linear(), Watcher(compiled=known)
    step = compiled_step(net, backend)
    expected = 2 * F.cross_entropy(net(X), Y)
    (slope,) = torch.autograd.grad(expected, net.weight)
    for _ in range(3):
        names, value = watcher.watch(step, X, Y)
        assert names == ["cross_entropy"]
        assert type(watcher.calls[0][1][0]) is Tensor  # not the compiler's fake
        # The compiled graph may round differently from eager code, in float32.
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(torch.autograd.grad(value, net.weight)[0], slope, rtol=1e-5, atol=1e-6)
    assert watcher.interception.by_gate is (compiled_step is net_only and not known)
    assert watcher.sites[-1].startswith("test_interception.py:")
    assert torch.equal(watcher.watch(lambda: F.cross_entropy(X, Y))[1], 2 * F.cross_entropy(X, Y))  # eager code too


@pytest.mark.usefixtures("dynamo")
def test_a_loss_compiled_after_the_gate_was_learned_is_missed_once():
    net, watcher = linear(), Watcher().learned()
    step = whole(net, "aot_eager")
    step(X, Y)
    names, value = watcher.watch(step, X, Y)
    assert names == []
    torch.testing.assert_close(value, F.cross_entropy(net(X), Y))  # default tolerance: compiled float32 against eager
    with pytest.warns(UserWarning, match=r"step after global step 7 \(a part of the model compiled since"):
        watcher.interception.missed(7)
    names, value = watcher.watch(step, X, Y)
    assert names == ["cross_entropy"]
    torch.testing.assert_close(value, 2 * F.cross_entropy(net(X), Y))  # as above


@pytest.mark.parametrize("labels", [Y, Y - 100])
def test_the_gate_is_learned_where_nobody_calls_the_function(labels):
    """A technique that replaces all losses never does; the function is asked without numbers, so none can be wrong."""
    seen, interception_ = [], Interception(compiled=False)

    def replaced(function, args, kwargs):
        seen.append(function.__name__)
        return args[0].sum()

    for by_gate in (False, True):
        assert interception_.by_gate is by_gate
        with interception_.watch(replaced):
            assert F.cross_entropy(X, labels) == X.sum()
    assert seen == ["cross_entropy"] * 2


def test_a_function_that_knows_no_tensors_without_numbers_is_asked_all_the_same():
    interception_ = Interception(compiled=False)
    log_p, lengths = torch.randn(5, 2, 3).log_softmax(2), torch.tensor([5, 5])
    with interception_.watch(lambda function, args, kwargs: torch.zeros(())):
        F.ctc_loss(log_p, torch.ones(2, 2, dtype=torch.long), lengths, lengths - 3)
    assert interception_.by_gate
