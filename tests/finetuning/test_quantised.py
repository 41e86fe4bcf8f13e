"""Quantised layers: one as libraries make them, and those of bitsandbytes and torchao where these are installed."""

import pytest
import torch
from torch import nn

from lightning_reg import ALLoRA, MaestroLowRank, MaskTuning, SaRA
from lightning_reg.engine.host.errors import MisconfigurationException
from tests.toys import QUIET, Classifier, fit, weights_of

pytestmark = QUIET


class Codes(nn.Parameter):
    """Whole numbers that carry what they are multiplied by, as the Int8Params of bitsandbytes do."""

    def __new__(cls, codes, scale):
        made = super().__new__(cls, codes, requires_grad=False)
        made.scale = scale
        return made

    def __deepcopy__(self, memo):
        return type(self)(self.data.clone(), self.scale)


class StandIn(nn.Linear):
    """A layer in eight bits."""

    def __init__(self, layer):
        super().__init__(32, 32)
        scale = layer.weight.detach().abs().max() / 127
        self.weight, self.bias = Codes((layer.weight.detach() / scale).round().to(torch.int8), scale), layer.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.data.float() * self.weight.scale, self.bias)


def eight_bits(layer):
    made = pytest.importorskip("bitsandbytes").nn.Linear8bitLt(32, 32, has_fp16_weights=False)
    made.load_state_dict(layer.state_dict())
    return made.to("cpu")


def four_bits(layer):
    made = pytest.importorskip("bitsandbytes").nn.Linear4bit(32, 32, compute_dtype=torch.float32)
    made.load_state_dict(layer.state_dict())
    return made.to("cpu")


def packed(layer):
    quantization = pytest.importorskip("torchao.quantization")
    net = nn.Sequential(layer)
    quantization.quantize_(net, quantization.Int8WeightOnlyConfig())
    return net[0]


KINDS = {
    StandIn: "StandIn is quantised, or no plain tensor",
    eight_bits: "Linear8bitLt is quantised, or no plain tensor",
    four_bits: "Linear4bit is quantised, or no plain tensor",
    packed: "Linear is quantised, or no plain tensor but Int8Tensor",
}


class Quantised(Classifier):
    """A frozen layer in few bits between two that are whole."""

    def __init__(self, make):
        super().__init__(lr=0.1)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net[0], self.net[3] = nn.Linear(6, 32), nn.Sequential(make(nn.Linear(32, 32)), nn.Linear(32, 3))


@pytest.mark.parametrize("technique", [ALLoRA, SaRA, MaskTuning, MaestroLowRank])
@pytest.mark.parametrize("make", KINDS)
def test_quantised_layers_are_refused_by_name_and_others_beside_them_are_trained(make, technique):
    options = {"rank_weight": 0.0} if technique is SaRA else {}
    with pytest.raises(MisconfigurationException, match=rf"'net\.3\.0\.weight' of {KINDS[make]}") as raised:
        fit(Quantised(make), technique(**options))
    assert "Exclude it, or train it with PEFT." in str(raised.value)
    module = Quantised(make)
    start = weights_of(module)
    tuned = technique(exclude="net.3.0", **options)
    fit(module, tuned)
    assert tuned.latents.own.keys() == {"net.0.weight", "net.3.1.weight"}
    if technique is not MaskTuning:  # whose masks have not yet reached the threshold
        assert all(not torch.equal(start[name], module.get_parameter(name)) for name in tuned.latents.own)
    assert torch.equal(module.get_parameter("net.3.0.bias"), start["net.3.0.bias"]) or technique is MaestroLowRank
