"""CutMix and mixup."""

from functools import partial

from lightning_reg import CutMix, Mixup
from tests.conformance.case import Case

_INVALID = [
    ({"alpha": 0.0}, "alpha"),
    ({"prob": -0.1}, "prob"),
    ({"prob": 1.1}, "prob"),
    ({"num_classes": 0}, "num_classes"),
    ({"start_epoch": -1}, "start_epoch"),
    ({"start_epoch": 2, "stop_epoch": 2}, "stop_epoch"),
    ({"loss": -1}, "loss"),
    ({"seed": -1}, "seed"),
]
_RANKS = {
    "ranks_agree": "a rank mixes within its own batch, so samples that meet in a joined batch do not meet on two ranks"
}

CASE = (
    Case(
        make=partial(CutMix, prob=0.75),
        neutral=partial(CutMix, prob=0.0),
        data="images",
        variants=[
            partial(CutMix, prob=1.0, per_sample=True, correct_lam=False, input_key="0", loss="cross_entropy"),
            partial(CutMix, form="soft", num_classes=4, target_key="1"),
            partial(CutMix, prob=1.0, start_epoch=1, alpha=0.3, form="pair", loss="last"),
        ],
        invalid=_INVALID,
        exempt=_RANKS,
    ),
    Case(
        make=partial(Mixup, prob=0.75),
        neutral=partial(Mixup, prob=0.0),
        variants=[
            partial(Mixup, per_sample=True, input_key="0", loss=0),
            partial(Mixup, prob=0.5, form="soft", num_classes=4, target_key="1", stop_epoch=1),
        ],
        invalid=_INVALID,
        exempt=_RANKS,
    ),
)
