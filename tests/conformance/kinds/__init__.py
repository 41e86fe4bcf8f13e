"""What is no technique: the cases that test files declare, and the laws, by kind."""

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

from tests.conformance.kinds import lightning_module, metric, network, procedure, sampler
from tests.conformance.kinds.lightning_module import DataModuleCase, LightningModuleCase
from tests.conformance.kinds.metric import MetricCase
from tests.conformance.kinds.network import NetworkCase
from tests.conformance.kinds.procedure import ProcedureCase
from tests.conformance.kinds.sampler import SamplerCase
from tests.conformance.words import check_docstring, check_refused

__all__ = ["CASES", "LAWS", "NEED_TWO_PROCESSES", "AnyCase"]

AnyCase: TypeAlias = MetricCase | NetworkCase | LightningModuleCase | DataModuleCase | ProcedureCase | SamplerCase


def documented(case: AnyCase) -> None:
    """The docstring gives the paper, what differs and every argument; what is refused is refused by name."""
    subject = case.subject
    own = subject.__init__ if inspect.isclass(subject) else subject
    arguments = list(inspect.signature(own).parameters)
    check_docstring(subject, arguments[1:] if inspect.isclass(subject) else arguments)
    for kwargs, argument in case.invalid:
        check_refused(case.make, dict(kwargs), argument, subject.__name__)


CASES: dict[str, type[Any]] = {
    "metric": MetricCase,
    "loss": NetworkCase,
    "network": NetworkCase,
    "lightning_module": LightningModuleCase,
    "datamodule": DataModuleCase,
    "procedure": ProcedureCase,
    "sampler": SamplerCase,
}
LAWS: dict[str, dict[str, Callable[..., None]]] = {
    kind: {**laws, "documented": documented}
    for kind, laws in (
        ("metric", metric.LAWS),
        ("loss", network.LOSS_LAWS),
        ("network", network.LAWS),
        ("lightning_module", lightning_module.LAWS),
        ("datamodule", lightning_module.DATAMODULE_LAWS),
        ("procedure", procedure.LAWS),
        ("sampler", sampler.LAWS),
    )
}
NEED_TWO_PROCESSES = ("ranks_agree",)
