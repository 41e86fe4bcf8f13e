"""Digits in five tasks of two classes, no old samples kept: a head that knows what lies outside each task.

The small images of scikit-learn, two thirds to train on; a perceptron 64-128-64 learns, without labels, by how many
quarter turns an image was rotated (20 epochs), and is frozen; a linear head for all ten classes is trained on its 64
features: Adam 1e-2 (new for each task), batch 32, 40 epochs, and 10 more in which VirtualOutliers acts (lambda 0.1,
thresholds -15 and -3, k 20, 100 draws for each point of the border). All arms have the softmax over the task's own
classes. Accuracy over all ten classes after the last task, no task told; within: the task told. The last arm is the
bound: all classes at once, 50 epochs.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from _shared import Arm, fit
from lightning.pytorch import LightningModule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import VirtualOutliers

CLASSES = [2] * 5
ARMS: dict[str, dict[str, Any]] = {
    "head alone": {"weight": 0.0},
    "released, sigma 0.1": {"candidates": "released", "sigma": 0.1},
    "released, sigma 1": {"candidates": "released", "sigma": 1.0},
    "paper, sigma 0.1": {"sigma": 0.1},
    "paper, sigma 1": {"sigma": 1.0},
    "paper, sigma 2": {"sigma": 2.0},
    "paper, sigma 1, thresholds of the trained head": {"sigma": 1.0, "threshold": None, "outlier_threshold": None},
}
BOUND = "all classes at once"


class Head(LightningModule):
    """An ordinary classifier: nothing in it knows about lightning_reg."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def turned_features(images: Tensor, known: Tensor) -> Tensor:
    """Features of all images by a network that has told quarter turns of the known ones."""
    body = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
    turns = nn.Linear(64, 4)
    square = known.reshape(-1, 8, 8)
    inputs = torch.cat([square.rot90(k, (1, 2)) for k in range(4)]).flatten(1)
    labels = torch.arange(4).repeat_interleave(len(known))
    optimizer = torch.optim.Adam([*body.parameters(), *turns.parameters()], lr=1e-3)
    for _ in range(20):
        for rows in torch.randperm(len(inputs)).split(64):
            loss = F.cross_entropy(turns(body(inputs[rows])), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return body(images)


def train(module: Head, techniques: Sequence[Any], features: Tensor, labels: Tensor, seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    loader = DataLoader(TensorDataset(features, labels), 32, shuffle=True, generator=draws)
    fit(module, techniques, loader, max_epochs=50)


def scores(module: Head, features: Tensor, labels: Tensor) -> dict[str, float]:
    with torch.no_grad():
        logits = module.head(features)
    every = (logits.argmax(1) == labels).float().mean().item()
    own = torch.stack([logits[torch.arange(len(labels)), labels // 2 * 2 + k] for k in range(2)], 1)
    return {"accuracy": every, "within": (own.argmax(1) == labels % 2).float().mean().item()}


def run(seeds: Sequence[int]) -> list[Arm]:
    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    arms = {name: Arm(name) for name in (*ARMS, BOUND)}
    for seed in seeds:
        test = torch.rand(len(images), generator=torch.Generator().manual_seed(seed)) < 1 / 3
        torch.manual_seed(seed)
        features = turned_features(images, images[~test])
        start = Head().state_dict()
        for name, arm in arms.items():
            module = Head()
            module.load_state_dict(start)
            if name == BOUND:
                train(module, [], features[~test], labels[~test], seed)
            else:
                technique = VirtualOutliers("head", k=20, sample_from=100, new_classes=CLASSES, seed=seed, **ARMS[name])
                for task in range(len(CLASSES)):
                    now = ~test & (labels // 2 == task)
                    train(module, [technique], features[now], labels[now], seed)
            results = scores(module, features[test], labels[test])
            arm.add(**results)
            print(f"seed {seed}, {name}: {', '.join(f'{k} {v:.3f}' for k, v in results.items())}", flush=True)
    return list(arms.values())
