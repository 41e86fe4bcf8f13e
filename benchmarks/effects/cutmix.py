"""CIFAR-10 with 4,000 training images: CutMix and Mixup on a small convolutional network that overfits.

2,000 test images; three convolutions of stride 2 (32, 64, 128 channels) with batch norm, global average pooling and one
linear layer; AdamW (2e-3, one cycle, weight decay 0.05), batch 128, mirrored images, 60 epochs. Accuracies in percent.
The clean training accuracy is that on the unmixed training images when the fit has ended.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from _shared import Arm, cifar10, fit
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_reg import CutMix, Mixup

TRAIN, TEST, EPOCHS, BATCH = 4_000, 2_000, 60, 128
MEAN, STD = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
ARMS = {
    "plain": [],
    "CutMix(prob=0.5)": [CutMix(prob=0.5)],
    "CutMix(prob=1)": [CutMix(prob=1.0)],
    "Mixup(prob=1)": [Mixup(prob=1.0)],
}


class Images(Dataset):
    """Images in memory; a batch is one gather."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.images[indices], self.labels[indices]


class Classifier(LightningModule):
    """An ordinary image classifier: nothing in it knows about lightning_reg."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in ((3, 32), (32, 64), (64, 128)):
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))

    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        images, labels = batch
        mirrored = torch.rand(len(images), 1, 1, 1) < 0.5
        return torch.where(mirrored, images.flip(-1), images), labels

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=0.05)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def images(split: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    columns = cifar10(split)
    rows = torch.randperm(len(columns["label"]), generator=torch.Generator().manual_seed(seed))[:count]
    pixels = columns["image"][rows].float() / 255
    return (pixels - MEAN[:, None, None]) / STD[:, None, None], columns["label"][rows].long()


@torch.no_grad()
def scores(module: Classifier, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Accuracy in percent and mean loss."""
    module.eval()
    logits = torch.cat([module.net(part) for part in x.split(1_000)])
    return 100 * (logits.argmax(1) == y).float().mean().item(), F.cross_entropy(logits, y).item()


def run(seeds: Sequence[int]) -> list[Arm]:
    test = images("test", TEST, seed=0)
    arms = [Arm(name) for name in ARMS]
    for seed in seeds:
        train = images("train", TRAIN, seed)
        for arm in arms:
            torch.manual_seed(seed)
            module = Classifier()
            loader = DataLoader(Images(*train), BATCH, shuffle=True, drop_last=True, collate_fn=list)
            fit(module, ARMS[arm.name], loader, max_epochs=EPOCHS)
            accuracy, loss = scores(module, *test)
            arm.add(test_accuracy=accuracy, test_loss=loss, clean_training_accuracy=scores(module, *train)[0])
            print(f"seed {seed}, {arm.name}: {accuracy:.1f} %, {loss:.3f}", flush=True)
    return arms
