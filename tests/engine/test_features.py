"""Outputs of named layers, kept while the tap is open and only then."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_reg.engine.host.autograd import is_checkpointed, is_reentrant
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.names import near_names
from lightning_reg.engine.layers.named import FeatureTap, layer_named, named_layers

X = torch.tensor([[1.0, -2.0]])


def network() -> nn.Module:
    net = nn.Sequential()
    net.add_module("body", nn.Sequential(nn.Identity(), nn.ReLU()))
    net.add_module("head", nn.Flatten(0))
    return net


def test_outputs_of_named_layers():
    net = network()
    tap = FeatureTap(net, ["body.1", "head", "body.1"])
    tap.open = True
    output = net(X)
    assert list(tap.outputs) == ["body.1", "head"]
    assert tap.outputs["body.1"].tolist() == [[1.0, 0.0]]
    assert tap.outputs["head"] is output


def test_the_last_pass_counts():
    net = network()
    tap = FeatureTap(net, ["body.1"])
    tap.open = True
    net(X)
    net(-X)
    assert tap.outputs["body.1"].tolist() == [[0.0, 2.0]]


def test_all_passes_are_kept_in_order_until_they_are_forgotten():
    net = network()
    tap = FeatureTap(net, ["body.1"])
    tap.open = True
    net(X)
    net(-X)
    assert [output.tolist() for output in tap.passes["body.1"]] == [[[1.0, 0.0]], [[0.0, 2.0]]]
    tap.shut()
    assert tap.passes == tap.outputs == {}
    tap.open = True
    net(X)
    assert len(tap.passes["body.1"]) == 1


def test_a_shut_tap_keeps_nothing():
    net = network()
    tap = FeatureTap(net, ["head"])
    net(X)
    assert tap.outputs == {}


def test_closing_leaves_no_hook_and_no_output():
    net = network()
    tap = FeatureTap(net, ["body", "head"])
    tap.open = True
    net(X)
    tap.close()
    tap.close()
    net(X)
    assert tap.outputs == {}
    assert [len(layer._forward_hooks) for layer in net.modules()] == [0] * 5


def test_an_unknown_name_lists_near_ones_and_leaves_no_hook():
    net = network()
    with pytest.raises(MisconfigurationException) as raised:
        FeatureTap(net, ["head", "body.7"])
    assert str(raised.value) == (
        "No layer is named 'body.7'. Near names: 'body.1', 'body.0', 'body'. Layers are named as in"
        " `module.named_modules()`."
    )
    assert [len(layer._forward_hooks) for layer in net.modules()] == [0] * 5


@pytest.mark.parametrize(
    ("name", "names", "text"),
    [
        ("heda", ["body", "head"], "'head'"),
        ("xyz", ["a1", "a2", "a3", "a4", "a5", "a6"], "'a1', 'a2', 'a3', 'a4', 'a5'"),
        ("layer", [f"layer{i}" for i in range(9)], "'layer8', 'layer7', 'layer6', 'layer5', 'layer4'"),
        ("x", [], "none at all"),
    ],
)
def test_near_names(name, names, text):
    assert near_names(name, iter(names)) == text


def compiled() -> nn.Module:
    return nn.Sequential(torch.compile(nn.Sequential(nn.Identity(), nn.ReLU()), backend="eager"), nn.Flatten(0))


def test_layers_behind_torch_compile_have_their_own_names():
    assert {"0", "0.0", "0.1", "1"} <= set(named_layers(compiled()))


def test_layers_behind_torch_compile_have_no_other_names():
    assert list(named_layers(compiled())) == ["0", "0.0", "0.1", "1"]


def test_layers_of_a_module_that_is_compiled_as_a_whole_have_their_own_names():
    whole = torch.compile(nn.Sequential(nn.Identity(), nn.Sequential(nn.ReLU())), backend="eager")
    assert list(named_layers(whole)) == ["0", "1", "1.0"]


# Dynamo hides this warning in a way that "error" prevents.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("name", ["0", "0.1"])
def test_outputs_of_layers_behind_torch_compile(name):
    torch._dynamo.reset()
    net = compiled()
    tap = FeatureTap(net, [name])
    tap.open = True
    for x in (X, -X):
        net(x)
        assert tap.outputs[name].tolist() == x.relu().tolist()
    torch._dynamo.reset()


def test_layers_know_what_kind_of_checkpoint_is_around_them():
    found = []
    layer, x = nn.Linear(2, 2), torch.ones(1, 2, requires_grad=True)
    layer.register_forward_pre_hook(lambda *_: found.append((is_checkpointed(), is_reentrant())))
    layer(x)
    with torch.no_grad():
        layer(x)
    for reentrant in (False, True):
        checkpoint(layer, x, use_reentrant=reentrant).sum().backward()  # again, when no checkpoint is around
    assert found == [(False, False)] * 2 + [(True, False), (False, False), (True, True), (False, False)]


def test_a_layer_by_its_name_is_the_one_of_the_list():
    model = nn.Module()
    model.net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert layer_named(model, "net.1") is model.net[1]
    model.net = torch.compile(model.net)
    assert layer_named(model, "net.1") is named_layers(model)["net.1"]
    for name in ("", "net.9", "nets"):
        with pytest.raises(MisconfigurationException):
            layer_named(model, name, "Someone")
