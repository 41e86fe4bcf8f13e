"""What ResNet-50 keeps for the backward pass when it is fine-tuned in full, by PEFT's LoRA, by the same as a map.

Two steps on 16 random images of 224 x 224, rank 8 on all convolutions, the classifier trained as it is; figures are
counts of bytes, as in adapters.py, and do not go by the machine.

    python benchmarks/adapters_resnet.py --save benchmarks/results/adapters_resnet.txt
"""

import argparse
from pathlib import Path

import torch
from adapters import RANK, memory
from lightning.pytorch import LightningModule
from overhead import quiet
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset
from transformers import ResNetConfig, ResNetForImageClassification

from lightning_reg import ALLoRA


class Tuned(LightningModule):
    """An ordinary module around the network."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        return self.net(pixel_values=batch[0], labels=batch[1])["loss"]

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.0)


def network():
    torch.manual_seed(0)
    return ResNetForImageClassification(ResNetConfig(num_labels=10))  # transformers' default sizes are ResNet-50's


def arms():
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=r".*\.convolution", modules_to_save=["classifier"])
    ours = ALLoRA("net.*.convolution", rank=RANK, scale="fixed", train="*classifier*")
    return {
        "full": (Tuned(network()), []),
        "PEFT": (Tuned(get_peft_model(network(), config)), []),
        "map": (Tuned(network()), [ours]),
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--side", type=int, default=224, help="of the images")
    parser.add_argument("--save", type=Path, help="file for what is printed")
    options = parser.parse_args(argv)
    quiet()
    images = torch.randn(2 * options.batch, 3, options.side, options.side)
    data = TensorDataset(images, torch.randint(10, (len(images),)))
    title = f"ResNet-50, batch {options.batch}, {options.side} x {options.side}: bytes of a step"
    table = Table("arm", "trained", "saved MB", "held MB", title=title)
    for arm, (module, callbacks) in arms().items():
        saved, held, trained = memory(module, callbacks, DataLoader(data, options.batch))
        table.add_row(arm, f"{trained:,}", f"{saved:.1f}", f"{held:.1f}")
    console = Console(record=True, width=100)
    console.print(table)
    if options.save:
        options.save.write_text(console.export_text())


if __name__ == "__main__":
    main()
