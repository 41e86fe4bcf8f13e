"""Kernels that a step launches, and how often the host waits for the device in it."""

import re
import warnings
from collections import Counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from gpu_sections.setting import Setting

__all__ = ["count_step"]

FIRST, STEPS = 4, 3  # the first steps choose kernels and make buffers
SMALL = (1, 1)


class Counts(Callback):
    """Profiles some steps, and counts torch's warnings of waiting in as many others; none of them logs."""

    def __init__(self, on_gpu: bool, first: int, steps: int) -> None:
        self.on_gpu, self.first, self.steps = on_gpu, first, steps
        self.profiler, self.caught = None, None
        self.kernels = 0
        self.places: Counter[str] = Counter()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        step = trainer.global_step
        if step == self.first:
            self._wait()
            kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.on_gpu
            self.profiler = profile(activities=kinds)
            self.profiler.start()
        elif step == self.first + self.steps:
            self._wait()
            self.profiler.stop()
            self.kernels = sum(_is_kernel(event) for event in self.profiler.events())
            self.start_warning()
        elif step == self.first + 2 * self.steps:
            self.stop_warning()

    def start_warning(self) -> None:
        self.caught = warnings.catch_warnings(record=True)
        self.found = self.caught.__enter__()
        warnings.simplefilter("always")
        if self.on_gpu:
            torch.cuda.set_sync_debug_mode("warn")

    def stop_warning(self) -> None:
        """Also where a step failed."""
        if self.caught is None:
            return
        if self.on_gpu:
            torch.cuda.set_sync_debug_mode("default")
        for warning in self.found:
            if "synchronizing" in str(warning.message):
                place = re.sub(r".*?((lightning_reg|benchmarks|site-packages)/)", r"\1", warning.filename)
                self.places[f"{place}:{warning.lineno}"] += 1
        self.caught.__exit__(None, None, None)
        self.caught = None

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def _is_kernel(event: Any) -> bool:
    if event.device_type != DeviceType.CUDA or getattr(event, "is_user_annotation", False):
        return False
    return not event.name.startswith(("Memcpy", "Memset", "Optimizer.", "ProfilerStep"))


def count_step(module: LightningModule, callbacks: list[Any], loader: DataLoader, setting: Setting) -> dict[str, Any]:
    """Of one step: ``kernels`` and ``syncs``, ``None`` without a GPU; ``notes`` say where the host waited."""
    first, steps = SMALL if setting.small else (FIRST, STEPS)
    counts = Counts(setting.on_gpu, first, steps)
    options = setting.trainer_options(max_steps=first + 2 * steps + 1, max_epochs=-1, log_every_n_steps=1000)
    try:
        Trainer(callbacks=[*callbacks, counts], **options).fit(module, loader)
    finally:
        counts.stop_warning()
    if not setting.on_gpu:
        return {"kernels": None, "syncs": None, "notes": []}
    notes = [f"the host waits at {place}, {number / steps:g} times a step" for place, number in counts.places.items()]
    return {"kernels": round(counts.kernels / steps), "syncs": sum(counts.places.values()) / steps, "notes": notes}
