"""Train a digits classifier from a file: ``python examples/cli.py fit --config examples/configs/elr.yaml``.

The module and the data are ordinary ones. Which techniques act on them stands in the file, under
``trainer.callbacks``; ``--print_config`` after it prints everything that can be set, and
``--trainer.callbacks.help lightning_reg.ELRCallback`` explains the arguments of one technique.
"""

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Digits(LightningModule):
    """A small convolutional network.

    Args:
        lr: Learning rate.
        width: Channels of the first layer.
        dropout: Share of the features that the head does not see.

    """

    def __init__(self, lr: float = 2e-3, width: int = 16, dropout: float = 0.2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * width, 64),
            nn.ReLU(),
        )
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(64, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        logits = self(batch[0])
        values = {
            "val_loss": F.cross_entropy(logits, batch[1]),
            "val_acc": (logits.argmax(1) == batch[1]).float().mean(),
        }
        self.log_dict(values, prog_bar=True, batch_size=len(batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


class DigitsData(LightningDataModule):
    """The digits of scikit-learn, some with a wrong label if that is wanted.

    Args:
        noise: Share of the training labels that are drawn anew.
        batch_size: Digits per batch.

    """

    def __init__(self, noise: float = 0.0, batch_size: int = 64) -> None:
        super().__init__()
        self.noise, self.batch_size = noise, batch_size

    def setup(self, stage: str) -> None:
        digits = load_digits()
        images = torch.tensor(digits.data / 16, dtype=torch.float32).view(-1, 1, 8, 8)
        labels = torch.tensor(digits.target)
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(labels), generator=generator)
        train, rest = order[:1200], order[1200:]
        given = labels.clone()
        redrawn = train[torch.rand(len(train), generator=generator) < self.noise]
        given[redrawn] = torch.randint(10, (len(redrawn),), generator=generator)
        self.train_set = TensorDataset(images[train], given[train])
        self.val_set = TensorDataset(images[rest], labels[rest])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_set, 256)


def main(arguments: list[str] | None = None) -> LightningCLI:
    return LightningCLI(Digits, DigitsData, args=arguments, seed_everything_default=0)


if __name__ == "__main__":
    main()
