"""Digits with noise and a ghost: a network trained on clean ones loses weights until it reads few such.

MLP 64-256-128-10, trained on 1,000 digits for 10 epochs (SGD 0.1, momentum 0.9); then 300 steps of batch 32 with Adam
on 16 others of each class, with the image itself added one pixel to the right at 0.5 and noise of 0.55. Masks learn
at 2e-4, all weights of the arm "full" at 1e-3. Tested on 397 others in that form (new) and clean (old): what is kept;
`off` is the share of the masked weights. "by gradient" has masks for the fifth of the entries that matters most to the
new digits, "ALLoRA below" factors (plain LoRA of rank 4, at 1e-3) on the first layer and masks on the others.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from _shared import Arm, fit
from lightning.pytorch import LightningModule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import ALLoRA, MaskTuning

PLAIN: dict[str, Any] = {"gradient_dropout": 0.0, "norm_weight": 0.0}
WAYS: dict[str, dict[str, Any] | None] = {
    "masks": PLAIN,
    "masks, gradient dropout 0.3": {"gradient_dropout": 0.3, "norm_weight": 0.0},
    "masks, gradient dropout 1": {"norm_weight": 0.0},
    "paper: dropout 1, norm": {},
    "masks, dropout 1, by gradient": {"norm_weight": 0.0, "select": "gradient", "fraction": 0.2},
    "masks, dropout 1, ALLoRA below": {"norm_weight": 0.0, "exclude": "net.0"},
    "full": None,
}
RATE, OF_MASKS = 1e-3, 2e-4


class Classifier(LightningModule):
    """An ordinary classifier: nothing in it knows about lightning_reg."""

    def __init__(self) -> None:
        super().__init__()
        self.is_new = False
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        if self.is_new:
            return torch.optim.Adam(self.parameters(), RATE)
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def digits(seed: int) -> tuple[dict[str, TensorDataset], Tensor, Tensor, Tensor]:
    """Data sets to train on, clean and changed; the test images in both forms, and their labels."""
    found, draw = load_digits(), torch.Generator().manual_seed(seed)
    x, y = torch.tensor(found.images, dtype=torch.float32) / 16, torch.tensor(found.target)
    order = torch.randperm(len(x), generator=draw)
    old, rest, test = order[:1000], order[1000:1400], order[1400:]
    few = torch.cat([rest[y[rest] == label][:16] for label in range(10)])

    def changed(images: Tensor) -> Tensor:
        return images + 0.5 * images.roll(1, 2) + 0.55 * torch.randn(images.shape, generator=draw)

    sets = {"old": TensorDataset(x[old].flatten(1), y[old]), "new": TensorDataset(changed(x[few]).flatten(1), y[few])}
    return sets, changed(x[test]).flatten(1), x[test].flatten(1), y[test]


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return 100 * float((net(x).argmax(1) == y).float().mean())


def callbacks_of(name: str, options: dict[str, Any] | None, seed: int) -> list[Any]:
    if options is None:
        return []
    masks = MaskTuning(lr_factor=OF_MASKS / RATE, seed=seed, **options)
    below = [ALLoRA("net.0", rank=4, scale="fixed", seed=seed)] if "ALLoRA" in name else []
    return [masks, *below]


def off(callbacks: Sequence[Any]) -> float:
    """Share of the masks that are off, in per cent."""
    masks = [own["mask"] for c in callbacks if isinstance(c, MaskTuning) for own in c.latents.own.values()]
    return 100 * float(torch.cat([(m <= 5e-3).flatten() for m in masks]).float().mean()) if masks else 0.0


def run(seeds: Sequence[int]) -> list[Arm]:
    """All arms over all seeds.

    Args:
        seeds: Of the data, the network, the order of samples and the draws.

    Returns:
        The arms.

    """
    arms, before = {name: Arm(name) for name in WAYS}, Arm("before")
    for seed in seeds:
        sets, new, old, y = digits(seed)
        torch.manual_seed(seed)
        base = Classifier()
        fit(base, [], DataLoader(sets["old"], 20, shuffle=True), max_epochs=10)
        before.add(new_accuracy=accuracy(base.net, new, y), old_accuracy=accuracy(base.net, old, y), off=0.0)
        for name, options in WAYS.items():
            torch.manual_seed(seed)
            module = copy.deepcopy(base)
            module.is_new = True
            callbacks = callbacks_of(name, options, seed)
            fit(module, callbacks, DataLoader(sets["new"], 32, shuffle=True), max_steps=300, max_epochs=-1)
            scores = {"new_accuracy": accuracy(module.net, new, y), "old_accuracy": accuracy(module.net, old, y)}
            arms[name].add(**scores, off=off(callbacks))
    return [*arms.values(), before]
