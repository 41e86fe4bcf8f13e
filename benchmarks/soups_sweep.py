"""A sweep of fine-tunings on CIFAR-10 and what soups make of it; ``python benchmarks/soups.py cifar`` runs it."""

import argparse
import copy
import io
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from lightning_reg.functional import LearnedSoup, average_state_dicts, greedy_soup, reestimate_batchnorm

RECIPES = [(lr, decay) for lr in (0.003, 0.01, 0.02, 0.05) for decay in (5e-4, 5e-3)]


def sweep(options: argparse.Namespace) -> Table:
    x, y = images(options.data / "train.parquet", 13_000)
    test = images(options.data / "test.parquet", 4_000)
    start, tune, val = (x[:5_000], y[:5_000]), (x[5_000:11_000], y[5_000:11_000]), (x[11_000:], y[11_000:])
    runs = [once(start, tune, val, test, options, seed, network) for seed in range(options.repeats)]
    table = Table("way", "validation", "test", "of which", title="CIFAR-10, 8 fine-tunings from one start")
    for name in runs[0]:
        columns = [[run[name][column] for run in runs] for column in range(3)]
        values = [column for column in columns[:2] if column[0] is not None]
        shown = [f"{statistics.mean(v):.4f}" for v in values]
        shown = ["-"] * (2 - len(shown)) + shown
        if name not in ("start", "mean of the 8"):
            gains = [run[name][1] - run["best single"][1] for run in runs]
            shown.append(f"{statistics.mean(gains):+.4f} to best single [{min(gains):+.4f}, {max(gains):+.4f}]")
        count = [c for c in columns[2] if c is not None]
        if count:
            shown[-1] += f"; {', '.join(str(c) for c in count)} in"
        table.add_row(name, *shown)
    return table


def once(
    start: tuple[Tensor, Tensor],
    tune: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    options: argparse.Namespace,
    seed: int,
    network: Callable[[], nn.Module],
) -> dict[str, tuple[float | None, float, int | None]]:
    torch.manual_seed(1000 * seed)
    net = network().to(start[0].device)
    train(net, *start, 0.05, options.start_epochs, 5e-4)
    at_start = accuracy(net, *test)
    members = []
    for position, (lr, decay) in enumerate(RECIPES):
        torch.manual_seed(1000 * seed + position + 1)
        member = copy.deepcopy(net)
        train(member, *tune, lr, options.epochs, decay)
        members.append(copy.deepcopy(member.state_dict()))

    def load(state: dict[str, Any], *, new_statistics: bool) -> nn.Module:
        net.load_state_dict(state)
        if new_statistics:
            reestimate_batchnorm(net, tune[0].split(100))
        return net

    def scores(state: dict[str, Any], *, new_statistics: bool = True) -> tuple[float, float]:
        load(state, new_statistics=new_statistics)
        return accuracy(net, *val), accuracy(net, *test)

    alone = [scores(member, new_statistics=False) for member in members]
    all_logits = {part: [logits_of(load(m, new_statistics=False), part[0]) for m in members] for part in (val, test)}
    ensemble = {part: (sum(z).argmax(1) == part[1]).float().mean().item() for part, z in all_logits.items()}
    greedy = greedy_soup(members, [a for a, _ in alone], lambda s: accuracy(load(s, new_statistics=True), *val))
    best = max(range(8), key=lambda i: alone[i][0])
    result: dict[str, tuple[float | None, float, int | None]] = {
        "start": (None, at_start, None),
        "mean of the 8": (*(statistics.mean(column) for column in zip(*alone, strict=True)), None),
        "best single": (*alone[best], None),
        "uniform": (*scores(average_state_dicts(members)), None),
        "uniform, statistics averaged": (*scores(average_state_dicts(members), new_statistics=False), None),
        "greedy": (*scores(greedy.state_dict, new_statistics=len(greedy.ingredients) > 1), len(greedy.ingredients)),
    }
    for per in ("tensor", "model"):
        learned = LearnedSoup(network().to(start[0].device).eval(), members, per)
        learned.fit(list(zip(val[0].split(256), val[1].split(256), strict=True)))
        result[f"learned per {per}"] = (*scores(learned.soup()), None)
    result["ensemble of 8 (logits)"] = (ensemble[val], ensemble[test], None)
    return result


def images(path: Path, count: int) -> tuple[Tensor, Tensor]:
    import numpy as np
    import pyarrow.parquet as pq
    from PIL import Image

    columns = pq.read_table(path, columns=["image", "label"])
    rows = torch.randperm(len(columns), generator=torch.Generator().manual_seed(0))[:count].tolist()
    encoded, labels = columns["image"].take(rows).to_pylist(), columns["label"].take(rows).to_pylist()
    contents = [image["bytes"] if isinstance(image, dict) else image for image in encoded]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(content)).convert("RGB")) for content in contents])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1, torch.tensor(labels).long()


def network() -> nn.Module:
    layers: list[nn.Module] = []
    for into, out in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(into, out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 10))


def train(net: nn.Module, x: Tensor, y: Tensor, lr: float, epochs: int, decay: float) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    net.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(100):
            flipped = torch.where(torch.rand(len(rows), 1, 1, 1, device=x.device) < 0.5, x[rows], x[rows].flip(3))
            optimizer.zero_grad()
            F.cross_entropy(net(flipped), y[rows]).backward()
            optimizer.step()
        schedule.step()


@torch.no_grad()
def logits_of(net: nn.Module, x: Tensor) -> Tensor:
    net.eval()
    return torch.cat([net(part) for part in x.split(500)])


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    return (logits_of(net, x).argmax(1) == y).float().mean().item()
