"""Digits with noise and a ghost: a network trained on clean ones is fine-tuned on few such, 20 % of its weights.

MLP 64-128-128-10, trained on 1,000 digits for 10 epochs (SGD 0.1, momentum 0.9); then 300 steps of batch 32 with Adam
1e-3 on 16 others of each class, with the image itself added two pixels to the right at 0.4 and noise of 0.15. Tested on
397 others in that form (new) and clean (old): what is kept. All arms but the first train 20 % of the weights and no
bias. The last arms are the network before fine-tuning, as it is and with 20 % of its weights at zero.
"""

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _shared import Arm, fit
from lightning.pytorch import LightningModule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import SaRA
from lightning_reg.functional import importance_curve

PLAIN: dict[str, Any] = {"rank_weight": 0.0, "readjust_at": None}
WAYS: dict[str, dict[str, Any] | None] = {
    "full": None,
    "largest": {"select": "largest", **PLAIN},
    "random (SHiRA)": {"select": "random", **PLAIN},
    "smallest": PLAIN,
    "smallest, chosen again": {"rank_weight": 0.0},
    "smallest, nuclear norm": {"readjust_at": None},
    "SaRA: smallest, both": {},
}


class Classifier(LightningModule):
    """An ordinary classifier: nothing in it knows about lightning_reg."""

    def __init__(self) -> None:
        super().__init__()
        self.is_new = False
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        if self.is_new:
            return torch.optim.Adam(self.parameters(), 1e-3)
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def digits(seed: int) -> tuple[dict[str, TensorDataset], Tensor, Tensor, Tensor]:
    """Data sets to train on, clean and changed; the test images in both forms, and their labels."""
    found, draw = load_digits(), torch.Generator().manual_seed(seed)
    x, y = torch.tensor(found.images, dtype=torch.float32) / 16, torch.tensor(found.target)
    order = torch.randperm(len(x), generator=draw)
    old, rest, test = order[:1000], order[1000:1400], order[1400:]
    few = torch.cat([rest[y[rest] == label][:16] for label in range(10)])

    def changed(images: Tensor) -> Tensor:
        return images + 0.4 * images.roll(2, 2) + 0.15 * torch.randn(images.shape, generator=draw)

    sets = {"old": TensorDataset(x[old].flatten(1), y[old]), "new": TensorDataset(changed(x[few]).flatten(1), y[few])}
    return sets, changed(x[test]).flatten(1), x[test].flatten(1), y[test]


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return 100 * float((net(x).argmax(1) == y).float().mean())


def run(seeds: Sequence[int]) -> list[Arm]:
    """All arms over all seeds.

    Args:
        seeds: Of the data, the network and the order of samples.

    Returns:
        The arms.

    """
    arms = {name: Arm(name) for name in WAYS}
    before = {select: Arm(f"before, {select} 20 % at zero") for select in ("smallest", "random", "largest")}
    as_it_is = Arm("before")
    for seed in seeds:
        sets, new, old, y = digits(seed)
        torch.manual_seed(seed)
        base = Classifier()
        fit(base, [], DataLoader(sets["old"], 20, shuffle=True), max_epochs=10)
        as_it_is.add(new_accuracy=accuracy(base.net, new, y), old_accuracy=accuracy(base.net, old, y))
        for select, arm in before.items():
            curves = [
                importance_curve(base.net, partial(accuracy, x=x, y=y), torch.tensor([0.2]), select, seed)
                for x in (new, old)
            ]
            arm.add(new_accuracy=curves[0][0], old_accuracy=curves[1][0])
        for name, options in WAYS.items():
            torch.manual_seed(seed)
            module = copy.deepcopy(base)
            module.is_new = True
            # The smaller side of a matrix here is 10 at least.
            callbacks = [] if options is None else [SaRA(0.2, min_side=10, seed=seed, **options)]
            fit(module, callbacks, DataLoader(sets["new"], 32, shuffle=True), max_steps=300, max_epochs=-1)
            arms[name].add(new_accuracy=accuracy(module.net, new, y), old_accuracy=accuracy(module.net, old, y))
    return [*arms.values(), as_it_is, *before.values()]
