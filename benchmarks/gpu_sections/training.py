"""Training runs on CIFAR-10 whose data lies on the device, and whose length fits the time there is."""

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from noisy_labels import MEAN, STD, load, random_crop_flip
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gpu_sections.arms import Batches, as_it_is
from gpu_sections.networks import compile_
from gpu_sections.setting import Setting, first_line

__all__ = ["Classifier", "accuracy", "cifar10", "epochs_that_fit", "train"]

WARM, TIMED = 10, 20  # steps


def cifar10(setting: Setting, labels: str = "label") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Training and test columns: ``image`` uint8 ``(N, 3, 32, 32)``, ``label`` (clean) and ``given``, int64."""
    if setting.small:
        columns = []
        for size in (64, 32):
            generator = torch.Generator().manual_seed(size)
            image = torch.randint(0, 256, (size, 3, 32, 32), generator=generator, dtype=torch.uint8)
            label = torch.randint(10, (size,), generator=generator)
            columns.append({"image": image, "label": label, "given": label})
        return columns[0], columns[1]
    folder = setting.data / "cifar10n"
    found = []
    for name in ("train", "test"):
        read = load(folder / f"{name}.parquet")
        given = read[labels if name == "train" else "label"]
        found.append({"image": read["image"], "label": read["label"].long(), "given": given.long()})
    return found[0], found[1]


class Classifier(LightningModule):
    """An ordinary image classifier: nothing in it knows about lightning_reg."""

    def __init__(self, net: nn.Module, optimizers: Callable[[Any, int, int], Any], padding: int = 4) -> None:
        super().__init__()
        self.net, self.optimizers_of, self.padding = net.to(memory_format=torch.channels_last), optimizers, padding
        self.register_buffer("mean", 255 * torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", 255 * torch.tensor(STD)[:, None, None], persistent=False)

    def prepared(self, images: Tensor) -> Tensor:
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def on_after_batch_transfer(self, batch: tuple[Tensor, ...], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        images, labels, _ = batch
        return self.prepared(random_crop_flip(images, self.padding)), labels

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> Any:
        epochs = self.trainer.max_epochs or 1
        return self.optimizers_of(self, epochs, int(self.trainer.estimated_stepping_batches))


class Deadline(Callback):
    """Ends a run whose time is over, after an epoch."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.epochs = setting, 0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs += 1
        trainer.should_stop = self.setting.left() < 0


class Clock(Callback):
    """Seconds of a step, after some that choose kernels.

    Args:
        warm: How many those are.
        timed: How many are measured.

    """

    def __init__(self, warm: int, timed: int) -> None:
        self.warm, self.timed = warm, timed
        self.started = self.seconds = 0.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step in (self.warm, self.warm + self.timed):
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize()
            if trainer.global_step == self.warm:
                self.started = time.perf_counter()
            else:
                self.seconds = (time.perf_counter() - self.started) / self.timed


def epochs_that_fit(
    module: Classifier, technique: list[Any], loader: DataLoader, wanted: int, setting: Setting, backend: str
) -> tuple[int, float]:
    """How many epochs there is time for, at most those wanted; and the seconds of a step, measured on a copy."""
    trial = copy.deepcopy(module)
    if backend:
        compile_(trial.net, backend)
    clock = Clock(*((1, 1) if setting.small else (WARM, TIMED)))
    options = setting.trainer_options(max_steps=clock.warm + clock.timed, max_epochs=1000, log_every_n_steps=1000)
    Trainer(callbacks=[*copy.deepcopy(technique), clock], **options).fit(trial, loader)
    epoch = 1.05 * clock.seconds * len(loader)
    return max(1, min(wanted, int((setting.left() - 5) / epoch))), clock.seconds


def planned(
    module: Classifier, technique: list[Any], loader: DataLoader, wanted: int, setting: Setting
) -> tuple[int, float, list[str]]:
    """Epochs, seconds of a step, notes; the module is compiled if it can be and the setting says so."""
    given = (module, technique, loader, wanted, setting)
    if setting.compile:
        backend = "inductor" if setting.on_gpu else "eager"
        try:
            found = epochs_that_fit(*given, backend)
            compile_(module.net, backend)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 # whatever the compiler raises
            notes = [f"not compiled: {type(error).__name__}: {first_line(error)}"]
            return *epochs_that_fit(*given, ""), notes
        return *found, []
    return *epochs_that_fit(*given, ""), []


def train(
    module: Classifier,
    technique: list[Any],
    columns: tuple[dict[str, Tensor], dict[str, Tensor]],
    wanted: int,
    setting: Setting,
) -> dict[str, Any]:
    """Figures of a run: test accuracy at its end, its epochs, the step's time; notes on what was cut."""
    train_set, test_set = ({name: value.to(setting.device) for name, value in part.items()} for part in columns)
    loader = DataLoader(
        Batches(train_set["image"], train_set["given"], len(train_set["given"])),
        setting.batch,
        shuffle=True,
        drop_last=not setting.small,
        collate_fn=as_it_is,
    )
    wanted = 1 if setting.small else wanted
    epochs, seconds, notes = planned(module, technique, loader, wanted, setting)
    deadline = Deadline(setting)
    options = setting.trainer_options(max_epochs=epochs, log_every_n_steps=1000)
    Trainer(callbacks=[*technique, deadline], **options).fit(module, loader)
    if deadline.epochs < wanted:
        notes.append(f"{deadline.epochs} of {wanted} epochs, as time allows; the schedule is scaled to {epochs}")
    figures = {
        "test accuracy, %": accuracy(module.to(setting.device), test_set["image"], test_set["label"]),
        "epochs": deadline.epochs,
        "step, ms": 1e3 * seconds,
    }
    return {"figures": figures, "notes": notes}


@torch.inference_mode()
def accuracy(module: Classifier, images: Tensor, labels: Tensor) -> float:
    """In percent."""
    module.eval()
    hits = [
        (module.net(module.prepared(x)).argmax(1) == y).sum()
        for x, y in zip(images.split(1000), labels.split(1000), strict=True)
    ]
    return 100 * float(torch.stack(hits).sum()) / len(labels)
