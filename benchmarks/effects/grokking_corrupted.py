"""Sums modulo 59 with wrong labels: accuracy when the neurons that memorise are pruned, or weight decay is strong.

Three quarters of all pairs are trained on, of which a fifth has labels drawn anew. QuadraticMLP with 300 neurons, mean
squared error, the whole set as one batch, AdamW 0.01 with betas 0.9 and 0.98, 500 steps without weight decay (100 with
5). Pruned: a share of the neurons by their inverse participation ratio, without training again. In per cent: wrong
labels that are given back, right labels of the training set, and pairs never seen. Chance is 1.7.
"""

import sys

import torch
import torch.nn.functional as F
from _shared import Arm

from lightning_reg import CorruptedModularArithmetic, QuadraticMLP
from lightning_reg.functional import prune_memorising

P, SHARES = 59, [0.0, 0.1, 0.3, 0.5]
NAMES = ["all neurons", *(f"{order} {100 * s:.0f} % pruned" for order in ("lowest", "highest") for s in SHARES[1:])]


def trained(data, seed, weight_decay, steps):
    torch.manual_seed(seed)
    net = QuadraticMLP(P, 300)
    optimizer = torch.optim.AdamW(net.parameters(), 0.01, betas=(0.9, 0.98), weight_decay=weight_decay)
    ((x, y, *_),) = data.train_dataloader()
    wanted = F.one_hot(y, P).float()
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(net(x), wanted).backward()
        optimizer.step()
    return net


def run(seeds):
    arms = {name: Arm(name) for name in [*NAMES, "weight decay 5"]}
    for seed in seeds:
        data = CorruptedModularArithmetic(P, train_fraction=0.75, corruption=0.2, seed=seed)

        def evaluate(net, data=data):
            found = data.accuracies(net)._asdict()
            return {name: 100 * float(value) for name, value in found.items()}

        net = trained(data, seed, 0.0, 500)
        for order in ("lowest", "highest"):
            scores = prune_memorising(net, torch.tensor(SHARES), evaluate, order=order).scores
            for row, share in enumerate(SHARES):
                if share or order == "lowest":
                    name = f"{order} {100 * share:.0f} % pruned" if share else "all neurons"
                    arms[name].add(**{key: column[row] for key, column in scores.items()})
        arms["weight decay 5"].add(**evaluate(trained(data, seed, 5.0, 100)))
        print(f"seed {seed}", file=sys.stderr, flush=True)
    return list(arms.values())
