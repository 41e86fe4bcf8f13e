"""The cores."""

from lightning_reg.noisy_labels.elr import elr_loss as elr_loss
from lightning_reg.noisy_labels.elr import elr_regularizer as elr_regularizer
from lightning_reg.noisy_labels.elr import elr_targets as elr_targets
from lightning_reg.noisy_labels.elr import elr_update_targets as elr_update_targets
