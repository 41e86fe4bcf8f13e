"""Weight Compander: weights as a bounded function of what is trained."""

from functools import partial

from lightning_reg import WeightCompander
from tests.conformance.case import Case

CASE = Case(
    make=partial(WeightCompander, a=0.5, b=0.3),
    neutral=partial(WeightCompander, fn="identity"),
    variants=[
        partial(WeightCompander, a=0.5, b=0.3, learn=True, shape_lr_factor=0.1),
        partial(WeightCompander),
        partial(WeightCompander, fn="tanh", layers=["body"], preserve_init=False),
        partial(WeightCompander, fn="softsign", b=0.3, exclude=["head"], learn=True),
    ],
    invalid=[
        ({"a": 0.0}, "a"),
        ({"b": 0.0}, "b"),
        ({"shape_lr_factor": -0.1}, "shape_lr_factor"),
        ({"layers": "("}, "layers"),
        ({"exclude": ["("]}, "exclude"),
    ],
)
