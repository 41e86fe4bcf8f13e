"""What the early-learning techniques share: targets per training sample, and the wrong labels that they tell of."""

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.data.memory import SampleMemory, last_occurrences
from lightning_reg.engine.host.arguments import check_choice, check_number
from lightning_reg.engine.host.distributed import RowExchange, world_size
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.left_out import LeftOut
from lightning_reg.noisy_labels._early_learning import finite_targets

if TYPE_CHECKING:
    from lightning_reg.engine.step import Samples
    from lightning_reg.engine.technique import Technique

__all__ = ["TargetTable", "check_arguments", "targets_in_state"]


def check_arguments(
    owner: "Technique",
    lam: float,
    beta: float,
    clamp: float,
    num_samples: int | None,
    num_classes: int | None,
    table_dtype: str,
    table_device: str,
) -> None:
    """Refuses values of the arguments of the term and of the table outside their ranges, by ``ValueError``."""
    check_number(owner, "lam", lam, low=0)
    check_number(owner, "beta", beta, low=0, high=1, high_open=True)
    # Below, 1 - <t, p> is lost to rounding in float32, and its logarithm is infinite.
    check_number(owner, "clamp", clamp, low=1e-6, high=0.5, high_open=True)
    for argument, value in (("num_samples", num_samples), ("num_classes", num_classes)):
        check_number(owner, argument, value, low=1, integer=True, optional=True)
    check_choice(owner, "table_dtype", table_dtype, ("float32", "float16", "bfloat16"))
    check_choice(owner, "table_device", table_device, ("module", "cpu"))
    if owner.index_key is not None and num_samples is None:
        name = type(owner).__name__
        raise ValueError(f"{name}: `num_samples` must be given with `index_key`, got None.")


_BATCHES_AT_ONCE = 64


class TargetTable:
    """Targets and given labels of all training samples, the same on all ranks.

    Attributes:
        left_out: How many predictions were not finite and taught nothing.

    Args:
        owner: Name of the technique, for errors.
        num_samples: Number of training samples; ``None`` for the length of the training dataset.
        num_classes: Number of classes; ``None`` to read it off the predictions.
        dtype: Type the targets are kept in.
        on_cpu: Whether to keep them in host memory.
        top_k: How many of the largest targets of a sample to keep; ``None`` for all.
        gather: Whether rows go to the other ranks.

    """

    def __init__(
        self,
        owner: str,
        num_samples: int | None,
        num_classes: int | None,
        dtype: Literal["float32", "float16", "bfloat16"],
        *,
        on_cpu: bool = False,
        top_k: int | None = None,
        gather: bool = True,
    ) -> None:
        self._owner, self._num_samples, self._num_classes = owner, num_samples, num_classes
        self._dtype, self._on_cpu, self._top_k, self._gather = dtype, on_cpu, top_k, gather
        self.targets: SampleMemory | None = None
        self.labels: SampleMemory | None = None
        self.left_out = LeftOut(owner, "rows of predictions")
        self._exchange = RowExchange()
        self._unwritten: list[tuple[Tensor, Tensor]] = []

    def clear(self) -> None:
        """Forgets everything."""
        self.targets = self.labels = None
        self.left_out.restore(0)
        self._exchange = RowExchange()
        self._unwritten = []

    def update(
        self, samples: "Samples", probabilities: Tensor, labels: Tensor, beta: float, mass: Tensor | None = None
    ) -> Tensor:
        """Moves the targets of a batch towards its predictions.

        Args:
            samples: Dataset indices of the batch.
            probabilities: ``(B, C)``; no gradient flows into them.
            labels: Given labels ``(B,)``.
            beta: Momentum of the targets.
            mass: Mass of each sample ``(B,)``; one of mass 0 is ignored and leaves its row as it is.

        Returns:
            The new targets of the batch, ``(B, C)`` float32, constant. A prediction that is not finite moves nothing,
            and is counted.

        """
        targets, _ = self._memories(samples, probabilities.shape[1])
        self.receive()
        indices = samples.indices
        kept = None if mass is None else mass > 0  # ignored samples have no label to be wrong
        places = targets.places(indices, kept)
        rows, finite = finite_targets(targets.read(indices, places), probabilities, beta)
        if not samples.distinct:
            rows = rows[last_occurrences(places, finite.to(places.device))]
        spoiled = ~finite if kept is None else kept & ~finite
        self.left_out.add(spoiled.sum())
        targets.write(indices, rows, places=places, distinct=True)
        # Nobody reads them while it trains: they are written many batches at once.
        self._unwritten.append((places, labels.to(torch.int32, copy=True)))
        if len(self._unwritten) == _BATCHES_AT_ONCE:
            self._write_labels()
        if world_size() > 1:
            sent = torch.where(finite if kept is None else finite & kept, indices, -1)
            self._send(sent, rows, labels, samples.capacity)
        return rows

    def read(self, samples: "Samples", num_classes: int) -> Tensor:
        """The targets of a batch as they are, ``(B, C)`` float32; to be called on all ranks, like :meth:`update`."""
        targets, _ = self._memories(samples, num_classes)
        self.receive()
        rows = targets.read(samples.indices)
        if world_size() > 1:
            self._send(torch.full_like(samples.indices, -1), rows, samples.indices, samples.capacity)
        return rows

    @override
    def __getstate__(self) -> dict[str, Any]:
        self.receive()  # a collective under way cannot be pickled
        return self.__dict__.copy()

    def receive(self) -> None:
        """Takes in what the other ranks sent."""
        received = self._exchange.finish()
        if received is not None and self.targets is not None and self.labels is not None:
            indices, rows, labels = received
            self.targets.write(indices, rows)
            self.labels.write(indices, labels.view(torch.int32))

    def all(self, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """All targets ``(N, C)`` and labels ``(N,)`` on the CPU.

        Args:
            labels: Labels in place of those seen in training.

        Returns:
            Targets and labels; the label of a sample never seen is -1.

        Raises:
            RuntimeError: If nothing was trained yet.
            ValueError: If ``labels`` are not one per sample.

        """
        self.receive()
        self._write_labels()
        if self.targets is None or self.labels is None:
            raise RuntimeError(f"{self._owner}: there are no targets yet; fit first, or load a checkpoint.")
        targets = self.targets.all()
        if labels is not None and labels.shape != (len(targets),):
            raise ValueError(f"{self._owner}: `labels` must have shape ({len(targets)},), got {tuple(labels.shape)}.")
        return targets, self.labels.all()[:, 0].long() if labels is None else labels.cpu()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values; empty before the first step."""
        self.receive()
        self._write_labels()
        if self.targets is None or self.labels is None:
            return {}
        return {
            "num_samples": self.targets.num_samples,
            "num_classes": self.targets.width,
            "left_out": self.left_out.read(),
            "targets": self.targets.state_dict(),
            "labels": self.labels.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave."""
        if state:
            targets, labels = self._new(state["num_samples"], state["num_classes"])
            self.left_out.restore(state["left_out"])
            targets.load_state_dict(state["targets"])
            labels.load_state_dict(state["labels"])

    def _write_labels(self) -> None:
        if self._unwritten and self.labels is not None:
            places, labels = (torch.cat(column) for column in zip(*self._unwritten, strict=True))
            self.labels.write(places, labels[:, None], places=places)
            self._unwritten = []

    def _send(self, indices: Tensor, rows: Tensor, labels: Tensor, capacity: int | None) -> None:
        if self._gather:
            self._exchange.start(indices, rows, labels[:, None].int(), capacity=capacity)

    def _memories(self, samples: "Samples", num_classes: int) -> tuple[SampleMemory, SampleMemory]:
        size = samples.total(self._owner, self._num_samples)
        if samples.size is not None and samples.size > size:
            raise MisconfigurationException(
                f"{self._owner}(num_samples={size}): the training dataset has {samples.size} samples."
            )
        if self._num_classes not in (None, num_classes):
            raise MisconfigurationException(
                f"{self._owner}(num_classes={self._num_classes}): the logits have {num_classes} classes."
            )
        if self.targets is None or self.labels is None:
            return self._new(size, num_classes)
        if (self.targets.num_samples, self.targets.width) != (size, num_classes):
            raise MisconfigurationException(
                f"{self._owner}: the targets are for {self.targets.num_samples} samples of {self.targets.width}"
                f" classes, the data now has {size} of {num_classes}. Sample indices must mean the same throughout a"
                f" training. Of data that grow or shrink between epochs write how many there will be at most,"
                f" `{self._owner}(num_samples=...)`, and leave each sample its index."
            )
        return self.targets, self.labels

    def _new(self, num_samples: int, num_classes: int) -> tuple[SampleMemory, SampleMemory]:
        self.targets = SampleMemory(num_samples, num_classes, dtype=self._dtype, top_k=self._top_k, on_cpu=self._on_cpu)
        self.labels = SampleMemory(num_samples, 1, dtype="int32", on_cpu=self._on_cpu, fill=-1)
        return self.targets, self.labels


def targets_in_state(state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Targets and labels from what :meth:`TargetTable.state_dict` gave, without the technique that it belongs to.

    Args:
        state: Of a checkpoint.

    Returns:
        Targets ``(N, C)`` float32 and labels ``(N,)``, -1 for a sample never seen.

    """
    kept = state["targets"]
    top_k = kept["values"].shape[1] if "columns" in kept else None
    table = TargetTable("checkpoint", None, None, "float32", on_cpu=True, top_k=top_k)
    table.load_state_dict(state)
    return table.all()
