"""Loss-based sample reweighting."""

from functools import partial

from lightning_reg.reweighting.loss_reweighting import LossReweighting
from tests.conformance.case import Case

CASE = Case(
    make=partial(LossReweighting, warmup_steps=0),
    neutral=partial(LossReweighting, strategy="uniform", warmup_steps=0),
    variants=[
        partial(LossReweighting, strategy="quadratic", r=1.0, warmup_steps=5),
        partial(LossReweighting, strategy="extremes", warmup="high_r", r_start=10.0, warmup_steps=3),
        partial(LossReweighting, warmup_steps=2, schedule="linear", r_start=5.0, schedule_steps=15),
        partial(LossReweighting, warmup_steps=0, schedule="cosine", schedule_steps=10, max_weight=1.5),
        partial(LossReweighting, warmup_steps=0, objective="sample_mean", level="token", loss="last"),
    ],
    invalid=[
        ({"r": 0.0}, "r"),
        ({"r_start": 0.0}, "r_start"),
        ({"delta": 0.0}, "delta"),
        ({"eps": 0.0}, "eps"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"warmup_steps": 0.5}, "warmup_steps"),
        ({"schedule_steps": 1}, "schedule_steps"),
        ({"schedule": "linear"}, "schedule_steps"),
        ({"max_weight": 0.99}, "max_weight"),
        ({"loss": -1}, "loss"),
    ],
)
