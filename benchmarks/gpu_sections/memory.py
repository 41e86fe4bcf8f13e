"""Peak memory of each technique against plain training."""

from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from gpu_sections.arms import MODELS, arms_of, loader_of, new_net
from gpu_sections.setting import NO_GPU, Part, Setting, free_memory

__all__ = ["SECONDS", "parts"]

SECONDS = 120
STEPS = 5


def parts(setting: Setting) -> list[Part]:
    """Each technique on each network; one in small."""
    found = []
    for name, model in MODELS.items():
        keys = ("loss_reweighting",) if setting.small else model.keys
        found += [Part(f"{name}/{key}", partial(peaks, name, key), model.batch_of(setting)) for key in keys]
    return found


class Peak(Callback):
    """The most memory of the third step and those after it."""

    def __init__(self) -> None:
        self.bytes = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if pl_module.device.type == "cuda":
            if trainer.global_step == 2:
                torch.cuda.reset_peak_memory_stats()
            self.bytes = torch.cuda.max_memory_allocated()


def peaks(name: str, key: str, setting: Setting) -> dict[str, Any]:
    """GiB of each arm, and the ratios."""
    model, found = MODELS[name], {}
    for arm in ("plain", "by hand", "engine"):
        # One at a time in memory.
        make_loader, samples = loader_of(model, setting)
        module, callbacks = arms_of(key, new_net(model, setting), samples).pop(arm)
        peak = Peak()
        free_memory(setting)  # of the arms that are not trained
        options = setting.trainer_options(max_steps=STEPS, max_epochs=-1, log_every_n_steps=50)
        Trainer(callbacks=[*callbacks, peak], **options).fit(module, make_loader())
        found[arm] = peak.bytes / 2**30
        del module, callbacks
    if not setting.on_gpu:
        names = ["plain, GiB", "by hand / plain", "engine / plain", "engine / by hand"]
        return {"figures": dict.fromkeys(names), "notes": [f"peak memory: {NO_GPU}"]}
    figures = {
        "plain, GiB": found["plain"],
        "by hand / plain": found["by hand"] / found["plain"],
        "engine / plain": found["engine"] / found["plain"],
        "engine / by hand": found["engine"] / found["by hand"],
    }
    return {"figures": figures}
