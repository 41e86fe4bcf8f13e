"""Updates of averages of a billion parameters against a copy on the device, and the swap for validation."""

import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from soups import Tensors, averager, stand_in
from torch import Tensor
from turns import ratio

from gpu_sections.setting import Part, Setting, interval

__all__ = ["SECONDS", "parts", "times_of"]

SECONDS = 75
ELEMENTS = 1_000_000_000
TENSORS = 300
WIDE = {"ema": 4, "swa": 8}  # bytes of an element of the average
OF_FLOAT = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parts(setting: Setting) -> list[Part]:
    """The two averages of weights of two types. The number of elements stands in for a batch, in millions."""
    millions = 1 if setting.small else ELEMENTS // 1_000_000
    names = [(method, dtype) for dtype in OF_FLOAT for method in WIDE]
    return [Part(f"{m}, {d} weights", partial(update, m, d), millions) for m, d in names]


def times_of(ways: dict[str, Callable[[], object]], setting: Setting, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, in turns; the first round, which makes buffers, is left out."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(1 + rounds):
        order = list(ways)
        random.shuffle(order)
        for name in order:
            wait(setting)
            started = time.perf_counter()
            ways[name]()
            wait(setting)
            if number:
                times[name].append(time.perf_counter() - started)
        if number > 3 and setting.left() < 0:
            break
    return times


def wait(setting: Setting) -> None:
    if setting.on_gpu:
        torch.cuda.synchronize()


def update(method: str, dtype: str, setting: Setting) -> dict[str, Any]:
    """One update, as the whole hook, and the swap."""
    with torch.device(setting.device):
        module = Tensors(TENSORS, setting.batch * 1_000_000 // TENSORS).to(OF_FLOAT[dtype])
    given = {"swap_for_validation": True, "load_at_end": False}
    soup = averager(module, method, 0.999 if method == "ema" else None, **given)
    trainer: Any = stand_in()

    def after_step() -> None:
        trainer.global_step += 1
        soup.on_train_batch_end(trainer, module, None, None, 0)

    after_step()  # the average begins as a copy
    weights = [p.detach() for p in module.parameters()]
    copies = [w.clone() for w in weights]
    ways: dict[str, Callable[[], object]] = {
        "device copy": lambda: copy_all(weights, copies),
        "update": after_step,
        "swap": lambda: (soup.on_validation_start(trainer, module), soup._live.restore()),
    }
    times = times_of(ways, setting, 5 if setting.small else 50)
    bytes_of = {"device copy": 2 * weights[0].element_size(), "update": weights[0].element_size() + 2 * WIDE[method]}
    elements = sum(w.numel() for w in weights)
    moved = {way: elements * each for way, each in bytes_of.items()}
    # Of speeds, so upside down.
    middle, low, high = (1 / value for value in ratio(times, "update", "device copy", skip=0))
    share = moved["update"] / moved["device copy"]
    figures = {
        "elements, millions": setting.batch,
        "update, ms": 1e3 * statistics.median(times["update"]),
        "update, GB/s": moved["update"] / statistics.median(times["update"]) / 1e9,
        "device copy, GB/s": moved["device copy"] / statistics.median(times["device copy"]) / 1e9,
        "speed / device copy": interval((middle * share, high * share, low * share)),
        "swap for validation, ms": 1e3 * statistics.median(times["swap"]),
    }
    return {"figures": figures}


def copy_all(weights: list[Tensor], copies: list[Tensor]) -> None:
    torch._foreach_copy_(copies, weights)
