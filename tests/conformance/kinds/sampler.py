"""Laws of samplers: they draw as many as they say, the same for the same seed, and share an epoch over ranks."""

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Sampler

from tests.conformance.problems import seeded

__all__ = ["LAWS", "SamplerCase"]


@dataclass(frozen=True)
class SamplerCase:
    """A sampler as its laws see it.

    Args:
        make: Makes one from ``num_replicas`` and ``rank``, as torch's ``DistributedSampler`` takes them.
        invalid: Constructor arguments that are refused, and the argument that the error names.

    """

    make: Callable[..., Sampler[Any]]
    invalid: Sequence[tuple[Mapping[str, Any], str]] = ()

    @property
    def subject(self) -> type[Sampler[Any]]:
        """The class."""
        return type(self.make(num_replicas=1, rank=0))


def as_many_as_it_says(case: SamplerCase) -> None:
    """Its length is the number of its draws."""
    sampler = case.make(num_replicas=1, rank=0)
    drawn = len(list(sampler))
    assert drawn == len(sampler), f"{case.subject.__name__} has length {len(sampler)} and draws {drawn}"


def same_for_the_same_seed(case: SamplerCase) -> None:
    """Whatever the global random state, a sampler and its pickled copy draw the same, each epoch something else."""
    with seeded(0):
        before = torch.get_rng_state()
        one = case.make(num_replicas=1, rank=0)
        first = list(one)
        assert torch.equal(before, torch.get_rng_state()), f"{case.subject.__name__} draws from the global state"
    with seeded(1):
        two = pickle.loads(pickle.dumps(case.make(num_replicas=1, rank=0)))
        assert list(two) == first, f"{case.subject.__name__}: the same seed does not draw the same"
    two.set_epoch(1)
    second = list(two)
    assert second != first, f"{case.subject.__name__} draws the same in every epoch"
    one.set_epoch(1)
    assert list(one) == second, (
        f"{case.subject.__name__}: an epoch's draws depend on those before, so no resume is exact"
    )


def shared_by_ranks(case: SamplerCase) -> None:
    """Two ranks draw equally many, and together what one process draws."""
    whole = list(case.make(num_replicas=1, rank=0))
    parts = [list(case.make(num_replicas=2, rank=rank)) for rank in range(2)]
    assert len(parts[0]) == len(parts[1]), f"{case.subject.__name__}: ranks draw {[len(part) for part in parts]}"
    joined = sorted(map(str, [*parts[0], *parts[1]]))
    assert joined == sorted(map(str, whole)), f"{case.subject.__name__}: two ranks draw other samples than one process"


LAWS: dict[str, Callable[..., None]] = {
    law.__name__: law for law in (as_many_as_it_says, same_for_the_same_seed, shared_by_ranks)
}
