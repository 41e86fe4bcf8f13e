"""Digits turned by 90 degrees: a network trained on upright ones is fine-tuned for six epochs in each way.

MLP 64-128-128-10, trained on 1,000 upright digits for 10 epochs; then six epochs of batch 20 on 400 others, turned. The
head is trained as well, factors have rank 4. SGD 0.01 with momentum 0.9 and AdamW 2e-3, the same rates for all. Tested
on 397 others, turned, and upright: what is forgotten. Compared is a row's scale in the gradient and in the
update, under both.
"""

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from _shared import Arm, fit
from lightning.pytorch import LightningModule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import ALLoRA

RATES = {"SGD": 0.01, "AdamW": 2e-3}
WAYS: dict[str, dict[str, Any] | None] = {
    "full": None,
    "LoRA": {"scale": "fixed"},
    "rsLoRA": {"scale": "rank"},
    "LoRA+ (B at 16)": {"scale": "fixed", "b_lr_factor": 16.0},
    "ALLoRA, eta=2": {"eta": 2.0},
    "ALLoRA, eta=4": {"eta": 4.0},
    "ALLoRA, eta=4, update": {"eta": 4.0, "mode": "update"},
}


class Classifier(LightningModule):
    """An ordinary classifier: nothing in it knows about lightning_reg."""

    def __init__(self, optimizer: str = "SGD", rate: float = 0.1) -> None:
        super().__init__()
        self.optimizer, self.rate = optimizer, rate
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        if self.optimizer == "SGD":
            return torch.optim.SGD(self.parameters(), self.rate, momentum=0.9)
        return torch.optim.AdamW(self.parameters(), self.rate, weight_decay=0.0)


def digits(seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Images ``(N, 8, 8)`` and labels: those to train on upright, to fine-tune on, to test on."""
    found, generator = load_digits(), torch.Generator().manual_seed(seed)
    x, y = torch.tensor(found.images, dtype=torch.float32) / 16, torch.tensor(found.target)
    order = torch.randperm(len(x), generator=generator)
    parts = order[:1000], order[1000:1400], order[1400:]
    return [x[part] for part in parts], [y[part] for part in parts]


def accuracy(module: Classifier, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return 100 * float((module.net(x.flatten(1)).argmax(1) == y).float().mean())


def run(seeds: Sequence[int]) -> list[Arm]:
    """All arms over all seeds.

    Args:
        seeds: Of the data, the network and the order of samples.

    Returns:
        The arms.

    """
    arms = {f"{name}, {optimizer}": Arm(f"{name}, {optimizer}") for optimizer in RATES for name in WAYS}
    before = Arm("before fine-tuning")
    for seed in seeds:
        (old, new, test), (of_old, of_new, of_test) = digits(seed)
        torch.manual_seed(seed)
        base = Classifier()
        fit(base, [], DataLoader(TensorDataset(old.flatten(1), of_old), 20, shuffle=True), max_epochs=10)
        turned, tested = (x.rot90(1, (1, 2)).flatten(1) for x in (new, test))
        before.add(turned_accuracy=accuracy(base, tested, of_test), upright_accuracy=accuracy(base, test, of_test))
        for optimizer in RATES:
            for name, options in WAYS.items():
                torch.manual_seed(seed)
                module = copy.deepcopy(base)
                module.optimizer, module.rate = optimizer, RATES[optimizer]
                callbacks = [] if options is None else [ALLoRA(rank=4, exclude="net.4", train="net.4", **options)]
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "ALLoRA.*divides")
                    fit(module, callbacks, DataLoader(TensorDataset(turned, of_new), 20, shuffle=True), max_epochs=6)
                arms[f"{name}, {optimizer}"].add(
                    turned_accuracy=accuracy(module, tested, of_test), upright_accuracy=accuracy(module, test, of_test)
                )
    return [*arms.values(), before]
