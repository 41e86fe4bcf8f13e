"""Published training techniques as one-line additions to a PyTorch Lightning Trainer."""

from lightning_reg.engine.mixin import LossMixin as LossMixin
from lightning_reg.engine.technique import Technique as Technique
from lightning_reg.noisy_labels.elr import ELRCallback as ELRCallback
from lightning_reg.noisy_labels.elr import LabelErrors as LabelErrors
