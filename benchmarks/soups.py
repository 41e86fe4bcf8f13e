"""Averages measured: what an update costs, what averaging files costs, what soups do for accuracy.

    python benchmarks/soups.py updates --timm-ema PATH/model_ema.py --save benchmarks/results/soups_updates.txt
    python benchmarks/soups.py files --save benchmarks/results/soups_files.txt
    python benchmarks/soups.py digits --save benchmarks/results/soups_digits.txt
    python benchmarks/soups.py cifar --data PATH --save benchmarks/results/soups_cifar.txt

All ratios are of one process or one run, in turns. ``--timm-ema`` is ``timm/utils/model_ema.py`` of
pytorch-image-models, which need not be installed; ``--data`` is a folder with CIFAR-10 as parquet files (columns
``image`` and ``label``).
"""

import argparse
import copy
import importlib.util
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
from soups_sweep import accuracy, sweep
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_reg import SoupAverager
from lightning_reg.averaging.model_soups._live_weights import LiveWeights, averaged_tensors
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


def stand_in() -> Any:
    """What the callbacks ask a Trainer for."""
    epoch_loop = SimpleNamespace(_batches_that_stepped=0)
    return SimpleNamespace(
        is_global_zero=True,
        sanity_checking=False,
        global_step=0,
        current_epoch=0,
        log_every_n_steps=50,
        fit_loop=SimpleNamespace(epoch_loop=epoch_loop),
    )


def averager(module: LightningModule, method: Any, decay: float | None = None, **given: Any) -> SoupAverager:
    """As it is when a fit has begun."""
    soup = SoupAverager(method=method, decay=decay, **given)
    soup._live = LiveWeights(module, averaged_tensors(module))
    return soup


def update_ways(module: Tensors, timm_ema: Path | None) -> dict[str, Callable[[], object]]:
    parameters = [p.detach() for p in module.parameters()]
    averages = [p.clone() for p in parameters]
    trainer = stand_in()
    soup = averager(module, "ema", DECAY)
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
    "make_soup, sums in float32": """
soup = make_soup(paths, check_ancestry=False, accumulate_dtype=torch.float32)
""",
    "make_soup, with the check of ancestry": """
soup = make_soup(paths)
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
import os, sys, time, torch
from lightning_reg.functional import make_soup
def used(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024
cold, *paths = sys.argv[1:]
for path in paths if cold == "cold" else ():
    handle = os.open(path, os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)
before, started = used("VmRSS"), time.perf_counter()
{way}
print(time.perf_counter() - started, used("VmHWM") - before)
"""


def files(options: argparse.Namespace) -> Table:
    table = Table("form", "cache", "way", "median", "GB/s", "ratio of speed to reading", "peak memory")
    table.title = f"mean of {options.files} files of {options.megabytes} MB"
    with tempfile.TemporaryDirectory() as name:
        for suffix in ("ckpt", "safetensors"):
            paths = write_models(Path(name), suffix, options)
            ways = {k: v for k, v in FILE_WAYS.items() if suffix == "ckpt" or k.startswith(("read", "make_soup"))}
            for cache in ("cold", "warm"):
                add_files(table, suffix, cache, ways, paths, options)
            for path in paths:
                path.unlink()
    return table


def add_files(
    table: Table, suffix: str, cache: str, ways: dict[str, str], paths: list[Path], options: argparse.Namespace
) -> None:
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    peaks: dict[str, float] = {}
    for _ in range(options.rounds):
        for way, text in ways.items():
            command = [sys.executable, "-W", "ignore", "-c", FILE_PROGRAM.format(way=text), cache, *map(str, paths)]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            seconds[way].append(float(printed[0]))
            peaks[way] = float(printed[1])
    reading = statistics.median(seconds["read alone"])
    for way in ways:
        median = statistics.median(seconds[way])
        speed = options.files * options.megabytes / 1e3 / median
        numbers = (f"{median:.2f} s", f"{speed:.2f}", f"{reading / median:.2f}", f"{peaks[way]:.0f} MiB")
        table.add_row(suffix, cache, way, *numbers)
    table.add_section()


def write_models(folder: Path, suffix: str, options: argparse.Namespace) -> list[Path]:
    from lightning_reg.averaging._written_files import save_weights

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
    # A weak start and small batches, so that members of a high rate leave its basin.
    train(net, x[clean], y[clean], 0.05, 3)
    members = []
    for seed in range(8):
        torch.manual_seed(1000 * repeat + seed)
        member = copy.deepcopy(net)
        train(member, shifted[tune], y[tune], lr, 20, batch=16)
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


# -- main -------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("updates", "files", "digits", "cifar"))
    parser.add_argument("--save", type=Path)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--timm-ema", type=Path)
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--repeats", type=int, help="6 for digits, 3 for cifar")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--start-epochs", type=int, default=15)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    options.rounds = options.rounds or {"updates": 203, "files": 3}.get(options.what, 1)
    options.repeats = options.repeats or {"digits": 6}.get(options.what, 3)
    warnings.filterwarnings("ignore")
    started = time.perf_counter()
    table = {"updates": updates, "files": files, "digits": digits, "cifar": sweep}[options.what](options)
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
