"""Early-learning regularization."""

from functools import partial

from lightning_reg.noisy_labels.elr import ELRCallback
from tests.conformance.case import Case

CASE = Case(
    make=partial(ELRCallback, lam=3.0, beta=0.7),
    neutral=partial(ELRCallback, lam=0.0),
    variants=[
        partial(ELRCallback, warmup_epochs=1),
        partial(ELRCallback, table_dtype="float16", table_device="cpu"),
        partial(ELRCallback, table_dtype="bfloat16", top_k=2, num_classes=4),
        partial(ELRCallback, index_key="2", num_samples=30, loss="cross_entropy"),
        partial(ELRCallback, sync="local", loss="last"),
    ],
    invalid=[
        ({"lam": -0.1}, "lam"),
        ({"beta": -0.1}, "beta"),
        ({"beta": 1.0}, "beta"),
        ({"clamp": 0.0}, "clamp"),
        ({"clamp": 0.5}, "clamp"),
        ({"warmup_epochs": -1}, "warmup_epochs"),
        ({"warmup_epochs": 0.5}, "warmup_epochs"),
        ({"num_samples": 0}, "num_samples"),
        ({"num_classes": 0}, "num_classes"),
        ({"top_k": 0}, "top_k"),
        ({"loss": -1}, "loss"),
        ({"index_key": "index"}, "num_samples"),
    ],
)
