"""Methods that something stands in for: copies of a module leave it behind."""

import torch

from lightning_reg.engine.host.replacement import Replacement
from lightning_reg.engine.networks.peer import copy_of
from tests.toys import Classifier


def test_a_copy_runs_its_own_layers_and_the_module_keeps_what_stands_in():
    module = Classifier()
    layer = next(each for each in module.modules() if isinstance(each, torch.nn.Linear))
    own = layer.forward
    first = Replacement(layer, "forward", lambda rows: own(rows) + 1)
    second = Replacement(layer, "forward", lambda rows: own(rows) + 2)
    twin = copy_of(module)
    copied = next(each for each in twin.modules() if isinstance(each, torch.nn.Linear))
    rows = torch.randn(2, layer.in_features)
    with torch.no_grad():
        copied.weight.zero_()
        assert torch.equal(copied(rows), copied.bias.expand(2, -1)), "a copy ran the module's layer"
        assert torch.equal(layer(rows), own(rows) + 2)
        second.undo()
        assert torch.equal(layer(rows), own(rows) + 1)
        first.undo()
    assert "forward" not in vars(layer)
