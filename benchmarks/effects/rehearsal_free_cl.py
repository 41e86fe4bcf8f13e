"""Digits in five tasks of two classes, no old samples kept: which anchors remember, from scratch and pre-trained.

The small images of scikit-learn, two thirds to train on; a network 64-100-100-10 with one head for all classes; Adam
(1e-3, new for each task), batch 32, 10 epochs per task, no task told at test time. Pre-trained: 10 epochs of telling by
how many quarter turns a training image was rotated (all classes' images, no labels), then a new head. Weight anchors
leave the head free. Accuracy over all ten classes after the last task; forgetting as the paper defines it (F^G).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from _shared import Arm, fit
from lightning.pytorch import LightningModule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import EWC, ContinualMetrics, FeatureDistillation, L2ToStart, PredictionDistillation

CLASSES = [2] * 5
EPOCHS = 10


def outputs() -> PredictionDistillation:
    return PredictionDistillation(new_classes=CLASSES)


def l2() -> L2ToStart:
    return L2ToStart(0.03, exclude=["head.*"], anchor="end_of_task")


# Made anew for each run: a technique carries what it knows from task to task.
ARMS: dict[str, Callable[[], list[Any]]] = {
    "naive": list,
    "EWC(100)": lambda: [EWC(100.0, exclude=["head.*"])],
    "L2(0.03)": lambda: [l2()],
    "features(0.1)": lambda: [FeatureDistillation("body", 0.1)],
    "outputs, softmax": lambda: [PredictionDistillation("softmax", new_classes=CLASSES)],
    "outputs, BCE": lambda: [outputs()],
    "outputs, BCE + EWC(100)": lambda: [outputs(), EWC(100.0, exclude=["head.*"])],
    "outputs, BCE + L2(0.03)": lambda: [outputs(), l2()],
    "outputs, BCE + features(0.1)": lambda: [outputs(), FeatureDistillation("body", 0.1)],
}


class Net(LightningModule):
    """An ordinary classifier: nothing in it knows about lightning_reg."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU())
        self.head = nn.Linear(100, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def train(net: Net, techniques: Sequence[Any], images: Tensor, labels: Tensor, seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    loader = DataLoader(TensorDataset(images, labels), 32, shuffle=True, generator=draws)
    fit(net, techniques, loader, max_epochs=EPOCHS)


def rotated(images: Tensor) -> tuple[Tensor, Tensor]:
    square = images.reshape(-1, 8, 8)
    turned = torch.cat([square.rot90(k, (1, 2)) for k in range(4)]).flatten(1)
    return turned, torch.arange(4).repeat_interleave(len(images))


def run(seeds: Sequence[int]) -> list[Arm]:
    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    arms = {name: Arm(name) for name in ARMS}
    for seed in seeds:
        test = torch.rand(len(images), generator=torch.Generator().manual_seed(seed)) < 1 / 3
        starts = {}
        for start in ("scratch", "pre-trained"):
            torch.manual_seed(seed)
            net = Net()
            if start == "pre-trained":
                train(net, [], *rotated(images[~test]), seed)
                net.head.reset_parameters()
            starts[start] = {name: value.clone() for name, value in net.state_dict().items()}
        for name, make in ARMS.items():
            results = {}
            for start, weights in starts.items():
                net, techniques, metrics = Net(), make(), ContinualMetrics(CLASSES)
                net.load_state_dict(weights)
                for number in range(len(CLASSES)):
                    now = ~test & (labels // 2 == number)
                    train(net, techniques, images[now], labels[now], seed)
                    so_far = test & (labels // 2 <= number)
                    with torch.no_grad():
                        metrics.update(net(images[so_far]), labels[so_far], after_task=number + 1)
                values = metrics.compute()
                results[f"accuracy, {start}"] = values["accuracy"].item()
                results[f"forgetting, {start}"] = values["forgetting"].item()
            arms[name].add(**results)
            print(f"seed {seed}, {name}: {', '.join(f'{k} {v:.3f}' for k, v in results.items())}", flush=True)
    return list(arms.values())
