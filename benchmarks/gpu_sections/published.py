"""Published figures: ELR on CIFAR-10, CutMix and Mixup, a soup of 8 fine-tunings, N:M on a ViT; plain beside each."""

import argparse
import time
from functools import partial
from typing import Any

import torch
from noisy_labels import redraw, resnet34
from overhead import ResNet18
from soups_sweep import RECIPES, network, once
from soups_sweep import train as fine_tune
from torch import Tensor, nn

from gpu_sections.averages import wait
from gpu_sections.networks import Layers, ViT
from gpu_sections.setting import Part, Setting
from gpu_sections.training import Classifier, cifar10, train
from lightning_reg import CutMix, ELRCallback, Mixup, NMSparsity

__all__ = ["SECONDS", "parts"]

SECONDS = 450
SIDE_BY_SIDE = True  # a small network does not fill a large GPU
EPOCHS = {"elr": 120, "mixing": 60, "nm": 60}
START_EPOCHS, TUNE_EPOCHS = 15, 10
# Mean of five, from the paper: cross-entropy and ELR with 40 % of the labels redrawn (table 1).
PAPER = {("symmetric", "plain"): 81.88, ("symmetric", "ELR"): 89.15}
MIXERS = {
    "plain": [],
    "CutMix, prob 0.5": [CutMix(prob=0.5)],
    "CutMix, prob 1": [CutMix(prob=1.0)],
    "Mixup": [Mixup(prob=1.0)],
}
RECIPE_NAMES = ("mdgf_linear", "mdgf_exp", "sdgf_stepwise", "sdgf_geometric", "srste", "ste", "one_shot")


def parts(setting: Setting) -> list[Part]:
    """The runs; of one seed, ``setting.seed``."""
    batch = 8 if setting.small else 128
    found = [
        Part(f"elr/{labels}/{arm}", partial(elr, labels, arm), batch, share=6.0)
        for labels in ("symmetric", "worse")
        for arm in ("ELR", "plain")
    ]
    found += [Part(f"mixing/{arm}", partial(mixing, arm), batch, share=2.0) for arm in MIXERS]
    found.append(Part("soups", soups, share=3.0))
    found.append(Part("nm/dense", partial(sparse, "", 0), 4 * batch))
    recipes = ("srste", "sdgf_stepwise") if setting.small else RECIPE_NAMES
    found += [Part(f"nm/1:{m}/{recipe}", partial(sparse, recipe, m), 4 * batch) for m in (16, 32) for recipe in recipes]
    return found


def elr(labels: str, arm: str, setting: Setting) -> dict[str, Any]:
    """The paper's: ResNet-34, 45,000 images, SGD 0.02, weight decay 1e-3, a hundredth after 40 and 80 of 120 epochs."""
    train_set, test_set = cifar10(setting, "worse" if labels == "worse" else "label")
    generator = torch.Generator().manual_seed(setting.seed)
    rows = torch.randperm(len(train_set["label"]), generator=generator)[:45_000]
    train_set = {name: value[rows] for name, value in train_set.items()}
    if labels == "symmetric":
        train_set["given"] = redraw(train_set["label"], 0.4, generator)

    def optimizers(module: Any, epochs: int, steps: int) -> Any:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3)
        milestones = [max(1, round(epochs / 3)), max(2, round(2 * epochs / 3))]
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.01)]

    net = small_net() if setting.small else Layers(*resnet34())
    technique = [ELRCallback(lam=3.0, beta=0.7)] if arm == "ELR" else []
    result = train(Classifier(net, optimizers), technique, (train_set, test_set), EPOCHS["elr"], setting)
    wrong = train_set["given"] != train_set["label"]
    figures = result["figures"] | {"of the paper, %": PAPER.get((labels, arm)), "wrong labels, %": share(wrong)}
    figures |= dict.fromkeys(["suspects: precision, %", "recall, %"])
    if technique and wrong.any():
        suspects = technique[0].suspected_label_errors()
        figures["suspects: precision, %"], figures["recall, %"] = share(wrong[suspects]), share(suspects[wrong])
    return result | {"figures": figures}


def share(flags: Tensor) -> float | None:
    """In percent; ``None`` of nothing."""
    return 100 * float(flags.float().mean()) if len(flags) else None


def small_net() -> nn.Module:
    return Layers(nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))


def mixing(arm: str, setting: Setting) -> dict[str, Any]:
    """ResNet-18, SGD with one cycle, all 50,000 images."""

    def optimizers(module: Any, epochs: int, steps: int) -> Any:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        return one_cycle(optimizer, 0.1, steps)

    net = small_net() if setting.small else Layers(*ResNet18())
    return train(Classifier(net, optimizers), list(MIXERS[arm]), cifar10(setting), EPOCHS["mixing"], setting)


def one_cycle(optimizer: torch.optim.Optimizer, lr: float, steps: int) -> Any:
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(steps, 2))
    return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def sparse(recipe: str, m: int, setting: Setting) -> dict[str, Any]:
    """ViT with patches of 4 x 4, 6 blocks, d = 192, feed-forward blocks sparse; the pattern is verified at the end."""

    def optimizers(module: Any, epochs: int, steps: int) -> Any:
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.05)
        return one_cycle(optimizer, 1e-3, steps)

    net: Any = ViT(32, 8, 32, 1, 10) if setting.small else ViT(32, 4, 192, 6, 10)
    module = Classifier(net, optimizers)
    technique = [NMSparsity(1, m, recipe=recipe, layers="*.fc[12]")] if recipe else []  # type: ignore[arg-type]
    result = train(module, technique, cifar10(setting), EPOCHS["nm"], setting)
    if technique and any(violations for _, violations in technique[0].verify(module).values()):
        raise RuntimeError("the pattern is violated")
    return result


def soups(setting: Setting) -> dict[str, Any]:
    """8 fine-tunings of one start, as soups_sweep.py makes them, on all images."""
    train_set, test_set = cifar10(setting)
    x, y = train_set["image"].to(setting.device).float() / 127.5 - 1, train_set["label"].to(setting.device)
    test = test_set["image"].to(setting.device).float() / 127.5 - 1, test_set["label"].to(setting.device)
    fifth = len(x) // 5
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(setting.seed)).to(setting.device)
    start, tune, val = ((x[rows], y[rows]) for rows in order.split([2 * fifth, 2 * fifth, len(x) - 4 * fifth]))
    make = network if setting.small else ResNet18
    net = make().to(setting.device)
    for count in (1000, 2000):  # the first chooses kernels
        began = time.perf_counter()
        fine_tune(net, start[0][:count], start[1][:count], 0.0, 1, 0.0)
        wait(setting)
    epoch = (time.perf_counter() - began) * len(start[0]) / min(2000, len(start[0]))
    wanted = START_EPOCHS + len(RECIPES) * TUNE_EPOCHS
    fits = min(1.0, 0.6 * setting.left() / (epoch * wanted))  # the rest is for validation and the learned soups
    lengths = [1, 1] if setting.small else [max(1, int(fits * epochs)) for epochs in (START_EPOCHS, TUNE_EPOCHS)]
    options = argparse.Namespace(start_epochs=lengths[0], epochs=lengths[1])
    found = once(start, tune, val, test, options, setting.seed, make)
    figures: dict[str, Any] = {f"{way}, %": 100 * scores[1] for way, scores in found.items()}
    notes = [f"greedy: {found['greedy'][2]} of {len(RECIPES)} in"]
    if lengths != [START_EPOCHS, TUNE_EPOCHS]:
        notes.append(
            f"{lengths[0]} epochs for the start and {lengths[1]} for each, of {START_EPOCHS} and {TUNE_EPOCHS}"
        )
    return {"figures": figures, "notes": notes}
