"""Effective weights in, dense weights back, to the last bit."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.weights.swap import Surgery, named_weights


def network() -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
    with torch.no_grad():
        for value, parameter in enumerate(net.parameters(), start=1):
            parameter.fill_(value)
    return net


def values(net: nn.Module) -> list[float]:
    return [p.mean().item() for p in net.parameters()]


def times(factor: float):
    def edit(weights):
        for weight in weights.values():
            weight.mul_(factor)

    return edit


def test_effective_values_come_and_go():
    net = network()
    parameters = list(net.parameters())
    surgery = Surgery(net, [(["0.weight", "1.bias"], times(10))])
    for _ in range(2):
        surgery.apply()
        assert surgery.in_place
        assert values(net) == [10, 2, 3, 40]
        surgery.restore()
        assert not surgery.in_place
        assert values(net) == [1, 2, 3, 4]
    assert all(a is b for a, b in zip(parameters, net.parameters(), strict=True))


def test_applying_and_restoring_twice_is_once():
    net = network()
    surgery = Surgery(net, [(["0.weight"], times(10))])
    surgery.restore()
    surgery.apply()
    surgery.apply()
    assert values(net) == [10, 2, 3, 4]
    surgery.restore()
    with torch.no_grad():
        net[0].weight.fill_(7)  # an optimizer's step
    surgery.restore()
    assert values(net) == [7, 2, 3, 4]
    surgery.apply()
    assert values(net) == [70, 2, 3, 4]
    surgery.restore()
    assert values(net) == [7, 2, 3, 4]


def test_editors_act_in_order_on_what_the_one_before_left():
    def plus_one(weights):
        weights["0.weight"].add_(1)

    net = network()
    surgery = Surgery(net, [(["0.weight"], plus_one), (["1.weight", "0.weight"], times(10))])
    surgery.apply()
    assert values(net) == [20, 2, 30, 4]
    surgery.restore()
    assert values(net) == [1, 2, 3, 4]


def test_an_editor_gets_its_own_weights_by_name_without_gradient():
    seen = {}
    Surgery(network(), [(["1.bias", "0.weight"], seen.update)]).apply()
    assert {name: (w.shape, w.requires_grad) for name, w in seen.items()} == {
        "1.bias": ((1,), False),
        "0.weight": ((1, 2), False),
    }


def test_the_gradient_at_the_effective_value_arrives_at_the_dense_one():
    net, x = network(), torch.tensor([[1.0, 2.0]])
    surgery = Surgery(net, [(["0.weight", "1.weight"], times(10))])
    surgery.apply()
    net(x).sum().backward()
    surgery.restore()
    assert net[0].weight.grad.tolist() == [[30.0, 60.0]]  # 30 x
    assert net[1].weight.grad.tolist() == [[32.0]]  # 10 (1 + 2) + 2
    assert values(net) == [1, 2, 3, 4]


def test_an_editor_that_fails_half_way_can_be_undone():
    def fail(weights):
        weights["0.weight"].zero_()
        raise ZeroDivisionError

    net = network()
    surgery = Surgery(net, [(["0.weight"], fail)])
    with pytest.raises(ZeroDivisionError):
        surgery.apply()
    surgery.restore()
    assert values(net) == [1, 2, 3, 4]


def test_an_unknown_name_lists_near_ones():
    with pytest.raises(MisconfigurationException) as raised:
        Surgery(network(), [(["0.weight"], times(1)), (["0.wieght"], times(1))])
    assert str(raised.value) == (
        "No parameter is named '0.wieght'. Near names: '0.weight', '1.weight', '0.bias'. Parameters are named as in"
        " `module.named_parameters()`."
    )


def test_names_behind_torch_compile():
    net = network()
    compiled = nn.ModuleDict({"net": torch.compile(net, backend="eager")})
    assert list(named_weights(compiled)) == ["net.0.weight", "net.0.bias", "net.1.weight", "net.1.bias"]
    surgery = Surgery(compiled, [(["net.0.weight"], times(10))])
    surgery.apply()
    assert values(net) == [10, 2, 3, 4]


def test_nothing_to_edit():
    net = network()
    surgery = Surgery(net, [([], times(10))])
    surgery.apply()
    surgery.restore()
    assert values(net) == [1, 2, 3, 4]


def outputs_of_a_network_that_keeps_what_it_gathered():
    net = nn.Linear(3, 4, bias=False)
    nn.init.ones_(net.weight)
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=False)
    surgery, seen = Surgery(net, [(["weight"], times(10))]), []
    for change in (lambda: None, surgery.apply, surgery.restore, surgery.apply):
        change()
        with torch.no_grad():  # no backward pass follows, at whose end it would forget them
            seen.append(net(torch.ones(1, 3)).flatten().tolist())
    return seen


def test_split_weights_are_gathered_anew_when_values_come_and_go(two_processes):
    expected = [4 * [3.0], 4 * [30.0], 4 * [3.0], 4 * [30.0]]
    assert two_processes.run(outputs_of_a_network_that_keeps_what_it_gathered) == [expected, expected]
