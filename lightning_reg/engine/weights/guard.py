"""Optimizers that are stepped past Lightning, while the module holds what they must not step."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer

from lightning_reg.engine.host.errors import MisconfigurationException

__all__ = ["StepGuard"]


class StepGuard:
    """Refuses steps of optimizers that the engine does not know of.

    Args:
        owner: Classes to name in the error.
        what: What they would step, for the error.
        holds: Whether the module holds it at present.

    """

    def __init__(self, owner: str, what: str, holds: Callable[[], bool]) -> None:
        self._owner, self._what, self._holds = owner, what, holds
        self._stepping: object = None
        self._handles: list[Any] = []

    def watch(self, optimizers: Sequence[Any]) -> None:
        """Looks at the steps of these optimizers from now on, and of no others."""
        self.close()
        self._handles = [o.register_step_pre_hook(self._check) for o in optimizers if isinstance(o, Optimizer)]

    @contextmanager
    def stepping(self, optimizer: object) -> Iterator[None]:
        """While an optimizer steps with the engine's knowledge."""
        self._stepping = optimizer
        try:
            yield
        finally:
            self._stepping = None

    def close(self) -> None:
        """Lets go of the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _check(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._stepping is not optimizer and self._holds():
            raise MisconfigurationException(
                f"{self._owner}: {type(optimizer).__name__}.step was called past Lightning, so it would step"
                f" {self._what}. Take the optimizer from `self.optimizers()`."
            )
