"""What procedures on diffusion models share: the denoiser, and the conditions of its rows."""

from lightning_reg.diffusion._conditions import Condition, can_join, count_of, joined, repeated, rows_of, spread
from lightning_reg.diffusion._schedule import Path
from lightning_reg.diffusion.denoiser import Denoiser, NoiseSchedule, Prediction, guided_prediction

__all__ = [
    "Condition",
    "Denoiser",
    "NoiseSchedule",
    "Path",
    "Prediction",
    "can_join",
    "count_of",
    "guided_prediction",
    "joined",
    "repeated",
    "rows_of",
    "spread",
]
