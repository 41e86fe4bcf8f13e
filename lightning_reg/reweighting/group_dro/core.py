"""The formulas of group distributionally robust optimization, for any training loop."""

from lightning_reg.reweighting._group_losses import (
    group_ascent,
    group_draws,
    group_losses,
    group_sample_weights,
    worst_group_weights,
)
from lightning_reg.reweighting._membership import group_membership

__all__ = [
    "group_ascent",
    "group_draws",
    "group_losses",
    "group_membership",
    "group_sample_weights",
    "worst_group_weights",
]
