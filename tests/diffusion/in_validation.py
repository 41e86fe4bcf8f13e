"""What tests of callbacks on a denoiser in validation share: a module as a user writes it, and averaged weights."""

import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.diffusion.digits import NULL, class_model, scheduler

__all__ = ["LOADER", "Averaged", "Digits"]

LOADER = DataLoader(TensorDataset(torch.ones(4, 1)), batch_size=2)


class Digits(LightningModule):
    """What a user would write around a UNet and a scheduler of diffusers; a fit leaves the UNet alone."""

    def __init__(self):
        super().__init__()
        self.unet, self.scheduler, self.none = class_model(), scheduler(), torch.tensor([NULL])
        self.weight = nn.Parameter(torch.ones(()))

    def training_step(self, batch, batch_idx):
        return self.weight * batch[0].mean()

    def validation_step(self, batch, batch_idx):
        self.log("loss", batch[0].mean())

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], 0.1)


class Averaged(Callback):
    """Puts other weights in for a validation, as Lightning's WeightAveraging does, and takes them out at its end."""

    def on_validation_epoch_start(self, trainer, pl_module):
        self.kept = pl_module.unet.conv_out.bias.detach().clone()
        with torch.no_grad():
            pl_module.unet.conv_out.bias.add_(0.1)

    def on_validation_epoch_end(self, trainer, pl_module):
        with torch.no_grad():
            pl_module.unet.conv_out.bias.copy_(self.kept)
