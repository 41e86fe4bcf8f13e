"""Laws of metrics, as torchmetrics tests its own: batch by batch, over ranks, copied, reset, in half precision."""

import copy
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from tests.conformance.harness import difference

__all__ = ["LAWS", "MetricCase"]

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class MetricCase:
    """A metric as its laws see it.

    Args:
        make: Makes one.
        batches: Keyword arguments of ``update``, an even number of batches, in an order that two ranks may share.
        expected: The value over batches, computed without the class.
        invalid: Constructor arguments that are refused, and the argument that the error names.
        tolerance: Of values in float32, and ten times as much in half precision against the same rounded inputs.

    """

    make: Callable[..., Metric]
    batches: Sequence[Batch]
    expected: Callable[[Sequence[Batch]], Any]
    invalid: Sequence[tuple[Mapping[str, Any], str]] = ()
    tolerance: float = 1e-6

    @property
    def subject(self) -> type[Metric]:
        """The class."""
        return type(self.make())


def as_by_hand(case: MetricCase) -> None:
    """Each batch alone has the value by hand, and so have all of them."""
    metric = case.make()
    for position, batch in enumerate(case.batches):
        alone = case.make()
        _same(case, f"batch {position} alone and by hand", alone(**batch), case.expected([batch]))
        metric.update(**batch)
    _same(case, "all batches and by hand", metric.compute(), case.expected(case.batches))


def ranks_agree(case: MetricCase, pool: Any) -> None:
    """Two processes that see half of the batches each have the value of all."""
    for rank, value in enumerate(pool.run(_on_rank, case.make(), list(case.batches))):
        _same(case, f"rank {rank} of two and one process", value, case.expected(case.batches))


def _on_rank(metric: Metric, batches: list[Batch]) -> Any:
    for batch in batches[torch.distributed.get_rank() :: 2]:
        metric.update(**batch)
    return metric.compute()


def copies(case: MetricCase) -> None:
    """A metric that is pickled, copied or cloned between two batches goes on, and leaves the first one alone."""
    half = len(case.batches) // 2
    metric = case.make()
    for batch in case.batches[:half]:
        metric.update(**batch)
    made = {"pickled": pickle.loads(pickle.dumps(metric)), "copied": copy.deepcopy(metric), "cloned": metric.clone()}
    for how, other in made.items():
        for batch in case.batches[half:]:
            other.update(**batch)
        _same(case, f"the {how} metric and by hand", other.compute(), case.expected(case.batches))
    _same(case, "the metric that was copied and by hand", metric.compute(), case.expected(case.batches[:half]))


def resets(case: MetricCase) -> None:
    """After ``reset`` it is as new."""
    metric = case.make()
    fresh = copy.deepcopy(metric.metric_state)
    for batch in case.batches:
        metric.update(**batch)
    assert difference(fresh, metric.metric_state), "no state changes, so that no law would test anything"
    metric.reset()
    found = difference(fresh, metric.metric_state)
    assert not found, f"the state after `reset` is not that of a new one: {found}"
    metric.update(**case.batches[0])
    _same(case, "the first batch after `reset` and by hand", metric.compute(), case.expected(case.batches[:1]))


def half_precision(case: MetricCase) -> None:
    """Inputs of half precision count as the same numbers do in full."""
    for dtype in (torch.bfloat16, torch.float16):
        batches = [{name: _rounded(value, dtype) for name, value in batch.items()} for batch in case.batches]
        metric = case.make()
        for batch in batches:
            metric.update(**batch)
        wide = [{name: _rounded(value, torch.float32) for name, value in batch.items()} for batch in batches]
        tolerance = 10 * case.tolerance
        _same(case, f"inputs in {dtype} and the same numbers", metric.compute(), case.expected(wide), tolerance)


def _rounded(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _same(case: MetricCase, what: str, one: Any, two: Any, tolerance: float | None = None) -> None:
    tolerance = case.tolerance if tolerance is None else tolerance
    found = difference(_numbers(one), _numbers(two), rtol=tolerance, atol=tolerance)
    assert not found, f"{case.subject.__name__}: not the same: {what}: {found}"


def _numbers(value: Any) -> Any:
    """Values as numbers of Python: their types are the metric's own affair."""
    if isinstance(value, Mapping):
        return {name: _numbers(one) for name, one in value.items()}
    return torch.as_tensor(value).double().tolist()


LAWS: dict[str, Callable[..., None]] = {
    law.__name__: law for law in (as_by_hand, ranks_agree, copies, resets, half_precision)
}
