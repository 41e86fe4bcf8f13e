"""What AdaWAC stores of each sample, the same on all ranks."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.data.memory import SampleMemory
from lightning_reg.engine.host.distributed import RowExchange, world_size
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.reweighting.adawac.core import weight_ascent

if TYPE_CHECKING:
    from lightning_reg.engine.step import Samples

__all__ = ["WeightTable"]


class WeightTable:
    """``a`` and the number of visits of all training samples.

    Args:
        owner: Name of the technique, for errors.
        num_samples: Number of training samples; ``None`` for the length of the training dataset.

    """

    def __init__(self, owner: str, num_samples: int | None) -> None:
        self._owner, self._num_samples = owner, num_samples
        self._memory: SampleMemory | None = None
        self._exchange = RowExchange()

    @property
    def is_empty(self) -> bool:
        """Whether no step was made yet."""
        return self._memory is None

    def clear(self) -> None:
        """Forgets everything."""
        self._memory, self._exchange = None, RowExchange()

    def update(
        self,
        samples: "Samples",
        supervised: Tensor,
        consistency: Tensor,
        eta: float,
        limit: float | None,
        mass: Tensor | None,
    ) -> Tensor:
        """Moves the weights of a batch; to be called on all ranks in the same steps.

        Args:
            samples: Dataset indices of the batch.
            supervised: ``(B,)``.
            consistency: ``(B,)``.
            eta: Step.
            limit: Largest ``|a|``.
            mass: Mass of each sample ``(B,)``; one of mass 0 has no label, and its weight stays.

        Returns:
            New weights ``(B,)``, float32, constant.

        """
        memory = self._of(samples)
        self.receive()
        indices = samples.indices if mass is None else torch.where(mass > 0, samples.indices, -1)
        rows = memory.read(samples.indices)
        moved = weight_ascent(rows[:, 0], supervised, consistency, eta, limit)
        if mass is not None:
            moved = torch.where(mass > 0, moved, rows[:, 0])
        rows = torch.stack([moved, rows[:, 1] + 1], 1)
        memory.write(indices, rows, distinct=samples.distinct and mass is None)
        if world_size() > 1:
            self._exchange.start(indices, rows, capacity=samples.capacity)
        return moved.sigmoid()

    @override
    def __getstate__(self) -> dict[str, Any]:
        self.receive()  # a collective under way cannot be pickled
        return self.__dict__.copy()

    def receive(self) -> None:
        """Takes in what the other ranks sent. A sample that several ranks have drawn has moved once."""
        received = self._exchange.finish()
        if received is not None and self._memory is not None:
            self._memory.write(received[0], received[1])

    def all(self) -> Tensor:
        """``a`` and visits of all samples, ``(N, 2)`` on the CPU.

        Returns:
            The table.

        Raises:
            RuntimeError: If nothing was trained yet.

        """
        self.receive()
        if self._memory is None:
            raise RuntimeError(f"{self._owner}: there are no weights yet; fit first, or load a checkpoint.")
        return self._memory.all()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values; empty before the first step."""
        self.receive()
        if self._memory is None:
            return {}
        return {"num_samples": self._memory.num_samples, "rows": self._memory.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave."""
        if state:
            self._memory = SampleMemory(state["num_samples"], 2)
            self._memory.load_state_dict(state["rows"])

    def _of(self, samples: "Samples") -> SampleMemory:
        size = samples.total(self._owner, self._num_samples)
        if self._memory is None:
            self._memory = SampleMemory(size, 2)
        if self._memory.num_samples != size or (samples.size or 0) > size:
            raise MisconfigurationException(
                f"{self._owner}: the weights are for {self._memory.num_samples} samples, the training dataset has"
                f" {samples.size or size}. Sample indices must mean the same throughout a training; of data that grow"
                f" write how many there will be at most, `{self._owner}(num_samples=...)`."
            )
        return self._memory
