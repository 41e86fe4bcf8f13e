"""Averages measured: what an update costs, what averaging files costs, what soups do for accuracy.

    python benchmarks/soups.py updates --timm-ema PATH/model_ema.py --save benchmarks/results/soups_updates.txt
    python benchmarks/soups.py files --save benchmarks/results/soups_files.txt
    python benchmarks/soups.py digits --save benchmarks/results/soups_digits.txt
    python benchmarks/soups.py cifar --data PATH --save benchmarks/results/soups_cifar.txt

All ratios are of one process or one run, in turns. ``--timm-ema`` is ``timm/utils/model_ema.py`` of
pytorch-image-models, which need not be installed. ``--data`` names a folder with ``train.parquet`` and
``test.parquet`` (columns ``image``, encoded, and ``label``).
"""

import argparse
import copy
import importlib.util
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_reg import LearnedSoup, SoupAverager
from lightning_reg.averaging._collectors import averaged_tensors
from lightning_reg.functional import average_state_dicts, greedy_soup, reestimate_batchnorm

DECAY = 0.999


# -- updates ----------------------------------------------------------------------------------------------------------


class Tensors(LightningModule):
    """So many parameters of such a size."""

    def __init__(self, count: int, size: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(size) for _ in range(count))


def updates(options: argparse.Namespace) -> Table:
    table = Table("tensors", "elements", "way", "median", "ratio to bare", title="one EMA update, CPU")
    for count, size in ((98, 50_000), (2_000, 2_500), (98, 2_500)):
        ways = update_ways(Tensors(count, size), options.timm_ema)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(options.rounds):
            for name, way in ways.items():
                started = time.perf_counter()
                way()
                if turn >= 3:
                    times[name].append(time.perf_counter() - started)
        for name, values in times.items():
            pairs = [value / bare for value, bare in zip(values, times["bare _foreach_lerp_"], strict=True)]
            median, ratio = statistics.median(values), statistics.median(pairs)
            table.add_row(str(count), f"{count * size:,}", name, f"{median * 1e3:.3f} ms", f"{ratio:.2f}")
        table.add_section()
    return table


def update_ways(module: Tensors, timm_ema: Path | None) -> dict[str, Callable[[], object]]:
    parameters = [p.detach() for p in module.parameters()]
    averages = [p.clone() for p in parameters]
    epoch_loop = SimpleNamespace(_batches_that_stepped=0)
    trainer: Any = SimpleNamespace(
        is_global_zero=True,
        global_step=0,
        current_epoch=0,
        log_every_n_steps=50,
        fit_loop=SimpleNamespace(epoch_loop=epoch_loop),
    )
    soup = SoupAverager(method="ema", decay=DECAY)
    soup._live = averaged_tensors(module)
    theirs = EMAWeightAveraging(decay=DECAY)
    theirs.setup(trainer, module, "fit")
    swa = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=False)

    def after_step(callback: Any) -> None:
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, module, None, None, 0)

    ways: dict[str, Callable[[], object]] = {
        "bare _foreach_lerp_": lambda: torch._foreach_lerp_(averages, parameters, 1 - DECAY),
        "SoupAverager, whole hook": lambda: after_step(soup),
        "Lightning EMAWeightAveraging, whole hook": lambda: after_step(theirs),
        "torch AveragedModel, multi_avg_fn": lambda: swa.update_parameters(module),
    }
    if timm_ema is not None:
        spec = importlib.util.spec_from_file_location("timm_model_ema", timm_ema)
        source = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(source)
        ema = source.ModelEmaV3(module, decay=DECAY)
        ways["timm ModelEmaV3"] = lambda: ema.update(module)
    return ways


# -- files ------------------------------------------------------------------------------------------------------------

FILE_WAYS = {
    "read alone": """
buffer = bytearray(1 << 20)
for path in paths:
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
""",
    "make_soup": """
soup = make_soup(paths, check_ancestry=False)
""",
    "torch.load and sum by hand": """
total = None
for path in paths:
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    total = state if total is None else {key: total[key] + value for key, value in state.items()}
soup = {key: value / len(paths) for key, value in total.items()}
""",
    "as timm's avg_checkpoints (aa4b5850)": """
total = {}
for path in paths:
    for key, value in torch.load(path, map_location="cpu", weights_only=True)["state_dict"].items():
        if key not in total:
            total[key] = value.clone().to(dtype=torch.float64)
        else:
            total[key] += value.to(dtype=torch.float64)
for value in total.values():
    value.div_(len(paths))
limits = torch.finfo(torch.float32)
soup = {key: value.clamp(limits.min, limits.max).to(dtype=torch.float32) for key, value in total.items()}
""",
}
FILE_PROGRAM = """
import sys, time, torch
from lightning_reg.functional import make_soup
def used(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024
paths = sys.argv[1:]
before, started = used("VmRSS"), time.perf_counter()
{way}
print(time.perf_counter() - started, used("VmHWM") - before)
"""


def files(options: argparse.Namespace) -> Table:
    table = Table("form", "way", "median", "GB/s", "ratio of speed to reading", "peak memory")
    table.title = f"mean of {options.files} files of {options.megabytes} MB (page cache warm)"
    with tempfile.TemporaryDirectory() as name:
        for suffix in ("ckpt", "safetensors"):
            paths = write_models(Path(name), suffix, options)
            ways = {k: v for k, v in FILE_WAYS.items() if suffix == "ckpt" or k in ("read alone", "make_soup")}
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            peaks: dict[str, float] = {}
            for _ in range(options.rounds):
                for way, text in ways.items():
                    command = [sys.executable, "-W", "ignore", "-c", FILE_PROGRAM.format(way=text), *map(str, paths)]
                    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
                    seconds[way].append(float(printed[0]))
                    peaks[way] = float(printed[1])
            reading = statistics.median(seconds["read alone"])
            for way in ways:
                median = statistics.median(seconds[way])
                speed = options.files * options.megabytes / 1e3 / median
                row = (
                    suffix,
                    way,
                    f"{median:.2f} s",
                    f"{speed:.2f}",
                    f"{reading / median:.2f}",
                    f"{peaks[way]:.0f} MiB",
                )
                table.add_row(*row)
            table.add_section()
            for path in paths:
                path.unlink()
    return table


def write_models(folder: Path, suffix: str, options: argparse.Namespace) -> list[Path]:
    from lightning_reg.engine.checkpoint_files import save_weights

    paths = []
    for number in range(options.files):
        generator = torch.Generator().manual_seed(number)
        rows = options.megabytes * 1_000_000 // 4 // 40 // 1024
        weights = {f"layer{i}.weight": torch.randn(rows, 1024, generator=generator) for i in range(40)}
        paths.append(folder / f"{number}.{suffix}")
        save_weights(paths[-1], weights, {})
    return paths


# -- digits -----------------------------------------------------------------------------------------------------------


def digits(options: argparse.Namespace) -> Table:
    table = Table(
        "learning rate", "mean member", "best on val", "uniform + BN", "uniform, BN averaged", "greedy + BN", "in"
    )
    table.title = f"digits, 8 fine-tunings by seed, test accuracy, {options.repeats} repeats"
    for lr in (0.01, 0.05, 0.15):
        rows = [digits_once(lr, repeat) for repeat in range(options.repeats)]
        means = [statistics.mean(column) for column in zip(*rows, strict=True)]
        table.add_row(f"{lr:g}", *(f"{mean:.3f}" for mean in means[:-1]), f"{means[-1]:.1f} of 8")
    return table


def digits_once(lr: float, repeat: int) -> list[float]:
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(data.target)
    generator = torch.Generator().manual_seed(repeat)
    order = torch.randperm(len(x), generator=generator)
    shifted = torch.roll(x, 1, dims=3) + 0.3 * torch.randn(x.shape, generator=generator)
    clean, tune, val, test = order[:600], order[600:750], order[750:1050], order[1050:]
    torch.manual_seed(repeat)
    net = digits_net()
    train(net, x[clean], y[clean], 0.05, 15)
    members = []
    for seed in range(8):
        torch.manual_seed(1000 * repeat + seed)
        member = copy.deepcopy(net)
        train(member, shifted[tune], y[tune], lr, 20)
        members.append(member.state_dict())

    def scored(state: dict[str, Any], where: Tensor, *, new_statistics: bool) -> float:
        net.load_state_dict(state)
        if new_statistics:
            reestimate_batchnorm(net, shifted[tune].split(32))
        return accuracy(net, shifted[where], y[where])

    on_val = [scored(m, val, new_statistics=False) for m in members]
    on_test = [scored(m, test, new_statistics=False) for m in members]
    uniform = average_state_dicts(members)
    greedy = greedy_soup(members, on_val, lambda s: scored(s, val, new_statistics=True))
    alone = len(greedy.ingredients) == 1
    return [
        statistics.mean(on_test),
        on_test[max(range(8), key=lambda i: on_val[i])],
        scored(uniform, test, new_statistics=True),
        scored(uniform, test, new_statistics=False),
        scored(greedy.state_dict, test, new_statistics=not alone),
        len(greedy.ingredients),
    ]


def digits_net() -> nn.Module:
    first = (nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))
    second = (nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(128, 10))


def train(net: nn.Module, x: Tensor, y: Tensor, lr: float, epochs: int, batch: int = 32, decay: float = 0.0) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=decay)
    net.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()


@torch.no_grad()
def logits_of(net: nn.Module, x: Tensor) -> Tensor:
    net.eval()
    return torch.cat([net(part) for part in x.split(500)])


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    return (logits_of(net, x).argmax(1) == y).float().mean().item()


# -- CIFAR-10 ---------------------------------------------------------------------------------------------------------


def cifar(options: argparse.Namespace) -> Table:
    x, y = cifar_images(options.data / "train.parquet", 13_000)
    test_x, test_y = cifar_images(options.data / "test.parquet", 4_000)
    start, tune = slice(0, 5_000), slice(5_000, 11_000)
    val_x, val_y = x[11_000:], y[11_000:]
    torch.manual_seed(0)
    net = cifar_net()
    train(net, x[start], y[start], 0.05, options.start_epochs, 100, 5e-4)
    at_start = accuracy(net, test_x, test_y)
    members, recipes = [], [(lr, decay) for lr in (0.003, 0.01, 0.02, 0.05) for decay in (5e-4, 5e-3)]
    for seed, (lr, decay) in enumerate(recipes):
        torch.manual_seed(seed + 1)
        member = copy.deepcopy(net)
        train(member, x[tune], y[tune], lr, options.epochs, 100, decay)
        members.append(copy.deepcopy(member.state_dict()))

    def load(state: dict[str, Any], *, new_statistics: bool) -> nn.Module:
        net.load_state_dict(state)
        if new_statistics:
            reestimate_batchnorm(net, x[tune].split(100))
        return net

    on_val = [accuracy(load(m, new_statistics=False), val_x, val_y) for m in members]
    all_logits = [logits_of(load(m, new_statistics=False), test_x) for m in members]
    on_test = [(z.argmax(1) == test_y).float().mean().item() for z in all_logits]
    uniform = average_state_dicts(members)
    greedy = greedy_soup(members, on_val, lambda s: accuracy(load(s, new_statistics=True), val_x, val_y))
    module = cifar_net().eval()
    learned = LearnedSoup(module, members)
    learned.fit(list(zip(val_x.split(256), val_y.split(256), strict=True)))
    ensemble = (torch.stack(all_logits).mean(0).argmax(1) == test_y).float().mean().item()
    best = max(range(8), key=lambda i: on_val[i])
    table = Table(
        "way", "validation", "test", title=f"CIFAR-10, 8 fine-tunings of {options.epochs} epochs from one start"
    )
    table.add_row("start", "-", f"{at_start:.4f}")
    for (lr, decay), a, b in zip(recipes, on_val, on_test, strict=True):
        table.add_row(f"learning rate {lr:g}, weight decay {decay:g}", f"{a:.4f}", f"{b:.4f}")
    table.add_section()
    table.add_row("best single", f"{on_val[best]:.4f}", f"{on_test[best]:.4f}")
    for name, state in (
        ("uniform", uniform),
        (f"greedy ({len(greedy.ingredients)} in)", greedy.state_dict),
        ("learned", learned.soup()),
    ):
        load(state, new_statistics=True)
        table.add_row(name, f"{accuracy(net, val_x, val_y):.4f}", f"{accuracy(net, test_x, test_y):.4f}")
    table.add_row("ensemble of 8 (logits)", "-", f"{ensemble:.4f}")
    return table


def cifar_images(path: Path, count: int) -> tuple[Tensor, Tensor]:
    import numpy as np
    import pyarrow.parquet as pq
    from PIL import Image

    columns = pq.read_table(path, columns=["image", "label"])
    rows = torch.randperm(len(columns), generator=torch.Generator().manual_seed(0))[:count].tolist()
    images, labels = columns["image"].take(rows).to_pylist(), columns["label"].take(rows).to_pylist()
    encoded = [image["bytes"] if isinstance(image, dict) else image for image in images]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(e)).convert("RGB")) for e in encoded])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (x - x.mean((0, 2, 3), keepdim=True)) / 0.25, torch.tensor(labels).long()


def cifar_net() -> nn.Module:
    layers: list[nn.Module] = []
    for into, out in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(into, out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 10))


# -- main -------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("updates", "files", "digits", "cifar"))
    parser.add_argument("--save", type=Path)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--timm-ema", type=Path)
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--start-epochs", type=int, default=15)
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    options.rounds = options.rounds or {"updates": 203, "files": 3}.get(options.what, 1)
    warnings.filterwarnings("ignore")
    started = time.perf_counter()
    table = {"updates": updates, "files": files, "digits": digits, "cifar": cifar}[options.what](options)
    threads, seconds = torch.get_num_threads(), time.perf_counter() - started
    table.caption = f"{os.cpu_count()} CPU cores, {threads} threads, torch {torch.__version__}; {seconds:.0f} s in all"
    Console().print(table)
    if options.save is not None:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        with options.save.open("w") as file:
            words = [Path(w).name if "/" in w and not w.startswith("benchmarks") else w for w in sys.argv[1:]]
            file.write("python benchmarks/soups.py " + " ".join(words) + "\n\n")
            Console(file=file, width=120).print(table)


if __name__ == "__main__":
    main()
