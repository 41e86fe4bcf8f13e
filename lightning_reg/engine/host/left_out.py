"""What is left out of a memory because it is not finite: counted on the device, and said once."""

import warnings
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

__all__ = ["LeftOut"]


class LeftOut:
    """Counts what a technique leaves out because it is not finite.

    Counting costs no host sync; :meth:`read` and :meth:`say` cost one, so they are asked at the end of an epoch.

    Args:
        owner: Name of the technique.
        what: What is left out, and of what, in the plural: ``"rows of predictions"``.

    """

    def __init__(self, owner: str, what: str) -> None:
        self._owner, self._what = owner, what
        self._count: Tensor | int = 0
        self._said = False

    def add(self, number: Tensor | int) -> None:
        """Counts more, a scalar on any device."""
        if isinstance(number, Tensor) and isinstance(self._count, Tensor):
            self._count = self._count.to(number.device)
        self._count = self._count + number

    def read(self) -> int:
        """The number so far, on the host."""
        return int(self._count)

    def scalar(self, device: torch.device) -> Tensor:
        """The number so far, for the log."""
        return torch.as_tensor(self._count, dtype=torch.float32, device=device)

    def say(self) -> None:
        """Warns, once, if anything was left out."""
        if not self._said and (count := self.read()):
            self._said = True
            warnings.warn(
                f"{self._owner}: {count} {self._what} were not finite, and are left out. Later ones are counted under"
                " `not_finite` in the log.",
                stacklevel=2,
            )

    def restore(self, count: int) -> None:
        """Goes on from a number that was read before."""
        self._count, self._said = count, False

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_count": self.read()}
