"""Runs the README's first example where the package is installed from its wheel: ``make wheel``."""

import re
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import lightning_reg

ROOT = Path(__file__).resolve().parents[1]


class Model(LightningModule):
    """What the example calls any LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(4, 3)

    def training_step(self, batch, batch_idx):
        """The loss of a batch."""
        x, y = batch
        return cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        """Plain gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


if __name__ == "__main__":
    installed = Path(lightning_reg.__file__).parent
    assert not installed.is_relative_to(ROOT / "lightning_reg"), "the working copy is imported, not the wheel"
    assert (installed / "py.typed").exists()
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert example is not None
    loader = DataLoader(TensorDataset(torch.randn(64, 4), torch.randint(3, (64,))), 32, shuffle=True)
    names = {"model": Model(), "train_loader": loader}
    exec(example[1], names)
    assert names["trainer"].global_step == 240
    print(f"lightning_reg {lightning_reg.__version__}: the README's first example ran from {installed}")
