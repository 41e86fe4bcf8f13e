"""Reweighting of a GPT on tiny Shakespeare, alone and in near-duplicate boilerplate: tokens to equal loss.

12 layers, d = 768: GPT-2's 124M without the embedding of its vocabulary, which would need a download; tokens are bytes.
"""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from redundant_text import Validation, share_of_tokens, window_places
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from gpu_sections.arms import as_it_is
from gpu_sections.networks import GPT
from gpu_sections.setting import Part, Setting
from gpu_sections.training import TIMED, WARM, Clock
from lightning_reg import LossReweighting

__all__ = ["SECONDS", "parts"]

SECONDS = 210
STEPS, LENGTH = 3000, 512
SMALL = (6, 16)


def parts(setting: Setting) -> list[Part]:
    """Both arms of a part train for as many steps."""
    batch = 4 if setting.small else 32
    return [Part(name, partial(compare, name == "mixture"), batch) for name in ("text", "mixture")]


class Windows(Dataset):
    """Windows of a text on the device; a batch is one gather."""

    def __init__(self, text: Tensor, starts: Tensor, length: int) -> None:
        self.text, self.starts = text, starts
        self.offsets = torch.arange(length + 1, device=text.device)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitems__(self, indices: list[int]) -> Tensor:
        return self.text[self.starts[indices].to(self.text.device)[:, None] + self.offsets].long()


class LanguageModel(LightningModule):
    """An ordinary language model: nothing in it knows about lightning_reg."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def loss(self, tokens: Tensor) -> Tensor:
        return F.cross_entropy(self.net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def training_step(self, tokens: Tensor, batch_idx: int) -> Tensor:
        return self.loss(tokens)

    def validation_step(self, tokens: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(tokens), batch_size=len(tokens))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-4, weight_decay=0.1, betas=(0.9, 0.95))


def data_of(redundant: bool, wanted: int, length: int, setting: Setting) -> tuple[Windows, Windows]:
    """Training windows, of so many steps, and held-out ones."""
    if setting.small:
        text = torch.randint(256, (2000,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    else:
        content = (setting.data / "tinyshakespeare" / "input.txt").read_bytes()
        text = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    places = window_places(text, redundant, setting.seed, wanted * setting.batch, length, 4 if setting.small else 1)
    windows = Windows(places[0].to(setting.device), places[1], length)
    return windows, Windows(text.to(setting.device), places[2], length)


def fit(callbacks: list[Any], steps: int, loaders: tuple[DataLoader, ...], setting: Setting, **more: Any) -> None:
    """From the same weights each time."""
    torch.manual_seed(setting.seed)
    net = GPT(256, SMALL[1], 32, 1) if setting.small else GPT(256, LENGTH)
    options = setting.trainer_options(max_steps=steps, max_epochs=-1, log_every_n_steps=1000, **more)
    Trainer(callbacks=callbacks, **options).fit(LanguageModel(net), *loaders)


def compare(redundant: bool, setting: Setting) -> dict[str, Any]:
    """Uniform weights and linupper, r = 0.4."""
    wanted, length = SMALL if setting.small else (STEPS, LENGTH)
    windows, held_out = data_of(redundant, wanted, length, setting)
    loader = DataLoader(windows, setting.batch, collate_fn=as_it_is)
    steps = wanted
    if not setting.small:
        clock = Clock(WARM, TIMED)
        fit([clock], WARM + TIMED, (loader,), setting)
        steps = max(100, min(wanted, int(0.8 * setting.left() / 2 / clock.seconds)))
    curves = {}
    for arm in ("uniform", "linupper"):
        technique = [LossReweighting("linupper", r=0.4, warmup_steps=steps // 20)] if arm == "linupper" else []
        validation = Validation()
        loaders = (loader, DataLoader(held_out, setting.batch, collate_fn=as_it_is))
        every = {"val_check_interval": max(1, steps // 20), "check_val_every_n_epoch": None}
        fit([*technique, validation], steps, loaders, setting, **every)
        curves[arm] = validation.curve
    best = {arm: min(loss for _, loss in curve) for arm, curve in curves.items()}
    tokens = share_of_tokens(curves["linupper"], best["uniform"])
    notes = [f"{steps} of {wanted} steps, as time allows"] if steps < wanted else []
    if tokens == math.inf:
        notes.append("linupper does not reach the least loss of uniform")
    figures = {
        "steps": steps,
        "uniform, least validation loss": best["uniform"],
        "linupper": best["linupper"],
        "tokens to equal loss": None if tokens == math.inf else tokens,
    }
    return {"figures": figures, "notes": notes, "curves": curves}
