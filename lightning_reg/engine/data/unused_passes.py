"""A pass over a loader that is given up before a batch has left it: what it took from the samplers' state comes back.

Lightning begins the first pass over a loader when it makes the loader ready, and worker processes draw batches ahead at
once. If the epoch is then made of other samples, a sampler with a state would be a pass further than without workers.
"""

import copy
import weakref
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from lightning_reg.engine.host.generators import noted_generators

__all__ = ["UnusedPass"]


class UnusedPass:
    """States of a loader and its samplers before a pass.

    Known are states with ``state_dict`` and ``load_state_dict``, and random generators.

    Args:
        loader: The user's loader.
        twin: The copy of it that is iterated, held weakly: torch's iterator over worker processes waits for ten seconds
            if it goes as part of a circle.

    """

    def __init__(self, loader: Any, twin: Any) -> None:
        self._loader, self._twin = loader, weakref.ref(twin)
        self._generators = noted_generators(loader)
        behind = {id(owner): owner for owner in _behind(loader, depth=4)}.values()
        self._samplers = [(one, copy.deepcopy(one.state_dict())) for one in behind if _has_state(one)]
        self._state = copy.deepcopy(twin.state_dict()) if _has_state(twin) else None
        own = [one for one in behind if not _has_state(one) and not type(one).__module__.startswith("torch.")]
        self._unknown = [(one, dict(vars(one))) for one in own if hasattr(one, "__dict__")]

    def put_back(self, epoch: int) -> list[str]:
        """Puts the states back.

        Args:
            epoch: The present one, which samplers have been told since.

        Returns:
            Attributes that have changed and were not put back: those of samplers without ``state_dict``.

        """
        self._generators()
        for sampler, state in self._samplers:
            sampler.load_state_dict(state)
        twin = self._twin()
        if twin is not None and self._state is not None:
            twin.load_state_dict(self._state)
        for owner in self._loader, self._loader.batch_sampler:  # as Lightning does it
            tell = getattr(getattr(owner, "sampler", None), "set_epoch", None)
            if callable(tell):
                tell(epoch)
        return [f"`{name}` of {type(one).__name__}" for one, noted in self._unknown for name in _changed(one, noted)]


def _changed(owner: Any, noted: dict[str, Any]) -> Iterator[str]:
    for name, value in vars(owner).items():
        before = noted.get(name)
        is_same = value is before or (isinstance(value, int | float | str) and value == before)
        if not is_same and not (hasattr(owner, "set_epoch") and "epoch" in name):
            yield name


def _has_state(owner: Any) -> bool:
    return all(callable(getattr(owner, name, None)) for name in ("state_dict", "load_state_dict"))


def _behind(owner: Any, depth: int) -> Iterator[Any]:
    """The samplers behind a loader or a sampler; those inside of one first."""
    for name in ("sampler", "batch_sampler", "_sampler", "dataset") if depth else ():
        behind = getattr(owner, name, None)
        if behind is not None and (name != "dataset" or not isinstance(owner, DataLoader)):
            yield from _behind(behind, depth - 1)
            if name != "dataset":
                yield behind
