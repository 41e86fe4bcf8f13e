"""What a step costs: plain, the map written by hand as a parametrization, and the map attached by the engine.

Arms take turns step by step in one process; figures are medians over rounds of the ratio within a round.

    python benchmarks/weight_compander.py --model transformer --steps 600 --save benchmarks/results/weight_compander.txt
    python benchmarks/weight_compander.py --model resnet18 --steps 100 --save benchmarks/results/weight_compander.txt

The bar: engine / by hand <= 1.02.
"""

import argparse
from pathlib import Path

import torch
from by_hand import Parametrized, Plain
from overhead import ResNet18, SmallTransformer, data, in_turns, quiet, show

from lightning_reg import WeightCompander

A, B = 2.0, 1.0


def measure(model, batch, steps):
    """Step times of all arms, in seconds."""
    dataset = data(model, batch, steps)
    net = ResNet18 if model == "resnet18" else SmallTransformer
    arms = {
        "plain": (Plain(net()), []),
        "by hand": (Parametrized(net(), A, B, learn=False), []),
        "engine": (Plain(net()), [WeightCompander(a=A, b=B)]),
        "by hand, learned": (Parametrized(net(), A, B, learn=True), []),
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
