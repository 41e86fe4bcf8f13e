"""What the experiments on few-shot tuning of the digit CLIP share: the module, the data, known and unknown accuracy."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.finetuning.digit_clip import DIGITS, TEMPLATES, few_shots, hugging_face, shifted, tokens, unseen

__all__ = ["TEXTS", "Tuned", "accuracies", "loader_of", "test_images"]

TEXTS = tokens(*(TEMPLATES[0].format(name) for name in DIGITS))


class Tuned(LightningModule):
    """The digit CLIP, tuned to tell the digits 0 to 4 apart by their names.

    Args:
        lr: Of SGD with momentum 0.9.
        trained: What is trained: beginnings of names of weights.

    """

    def __init__(self, lr, trained):
        super().__init__()
        self.clip, self.lr = hugging_face(), lr
        for name, p in self.clip.named_parameters():
            p.requires_grad_(name.startswith(tuple(trained)))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.clip(input_ids=TEXTS[:5], pixel_values=x).logits_per_image, y)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], self.lr, momentum=0.9)


def loader_of(seed, shots=8, batch=8):
    """Images of another domain, a few of each of the digits 0 to 4."""
    images, labels = unseen()
    few = few_shots(labels[:200], shots, range(5), seed)
    return DataLoader(TensorDataset(shifted(images)[few], labels[few]), batch, shuffle=True)


def test_images():
    """200 images of that domain, and labels."""
    images, labels = unseen()
    return shifted(images)[200:], labels[200:]


@torch.no_grad()
def accuracies(model):
    """Of the digits 0 to 4 among each other, and of 5 to 9; in per cent."""
    x, y = test_images()
    logits, found = model.clip(input_ids=TEXTS, pixel_values=x).logits_per_image, {}
    for name, first in (("known", 0), ("unknown", 5)):
        chosen = (y >= first) & (y < first + 5)
        right = logits[chosen, first : first + 5].argmax(1) + first == y[chosen]
        found[f"{name}_accuracy_(%)"] = 100 * right.float().mean()
    return found
