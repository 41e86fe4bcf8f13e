"""What a step costs: plain, the map written by hand as a parametrization, and the map attached by the engine.

Arms take turns step by step in one process; figures are medians over rounds of the ratio within a round.

    python benchmarks/weight_compander.py --model transformer --steps 600 --save benchmarks/results/weight_compander.txt
    python benchmarks/weight_compander.py --model resnet18 --steps 100 --save benchmarks/results/weight_compander.txt

The bar: engine / by hand <= 1.02.
"""

import argparse
from pathlib import Path

import torch
from overhead import Plain, ResNet18, SmallTransformer, data, in_turns, quiet, show
from torch import nn
from torch.nn.utils import parametrize

from lightning_reg import WeightCompander

A, B = 2.0, 1.0


class ByHand(nn.Module):
    """w = a arctan(v / b), as a user would write it."""

    def __init__(self, learn):
        super().__init__()
        self.log_a, self.log_b = (nn.Parameter(torch.tensor(x).log(), requires_grad=learn) for x in (A, B))

    def forward(self, v):
        return self.log_a.exp() * (v / self.log_b.exp()).atan()

    def right_inverse(self, w):
        return self.log_b.exp() * (w / self.log_a.exp()).tan()


class Parametrized(Plain):
    def __init__(self, net, learn):
        super().__init__(net)
        weights = WeightCompander().weights_to_map(net)
        layers = {name.rpartition(".")[0]: name.rpartition(".")[2] for name in weights}
        for layer, name in layers.items():
            parametrize.register_parametrization(net.get_submodule(layer), name, ByHand(learn))

    def configure_optimizers(self):
        shapes = {id(p) for m in self.modules() if isinstance(m, ByHand) for p in m.parameters()}
        groups = [[p for p in self.parameters() if (id(p) in shapes) is own] for own in (False, True)]
        return torch.optim.SGD([{"params": groups[0]}, {"params": groups[1], "lr": 1e-5}], 1e-3)


def measure(model, batch, steps):
    """Step times of all arms, in seconds."""
    dataset = data(model, batch, steps)
    net = ResNet18 if model == "resnet18" else SmallTransformer
    arms = {
        "plain": (Plain(net()), []),
        "by hand": (Parametrized(net(), learn=False), []),
        "engine": (Plain(net()), [WeightCompander(a=A, b=B)]),
        "by hand, learned": (Parametrized(net(), learn=True), []),
        "engine, learned": (Plain(net()), [WeightCompander(a=A, b=B, learn=True)]),
    }
    return in_turns(arms, dataset, batch, steps)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("resnet18", "transformer"), default="transformer")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1, help="torch threads per step")
    parser.add_argument("--save", type=Path, help="append the table to this file")
    options = parser.parse_args(argv)
    quiet()
    torch.set_num_threads(options.threads)
    times = measure(options.model, options.batch, options.steps)
    pairs = [("engine", "by hand"), ("engine, learned", "by hand, learned"), ("engine", "plain"), ("by hand", "plain")]
    show(times, pairs, f"{options.model}, batch {options.batch}, {options.steps} rounds", options.save)


if __name__ == "__main__":
    main()
