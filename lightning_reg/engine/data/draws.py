"""The samples of an epoch as a technique has drawn them, in batches of the user's size, shared by the ranks."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_reg.engine.host import distributed
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.owner import Owner

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Draws"]


class Draws:
    """The batches of one epoch on this rank; what the loader gets in place of those of its batch sampler.

    The ranks take turns, sample by sample, so that all ranks' k-th batches together are the k-th batch of one process
    with the joined batch size. What cannot be shared evenly at the end, fewer samples than there are ranks, is left
    out: no sample counts twice.

    Args:
        indices: The samples of all ranks in the order of training, whole numbers ``(M,)``.
        loader: The user's loader, for its batch size and ``drop_last``.
        owner: Who drew them, for errors.
        group: The ranks that see different samples.

    Attributes:
        start: Batches that are left out, because an earlier fit has trained on them.

    Raises:
        MisconfigurationException: If they are no samples of the dataset, make no batch, or the loader has no batch
            size.

    """

    def __init__(self, indices: Any, loader: Any, owner: Owner, group: "ProcessGroup | None" = None) -> None:
        name, size = type(owner).__name__, len(loader.dataset)
        drawn = torch.as_tensor(indices)
        if drawn.dim() != 1 or drawn.is_floating_point() or drawn.dtype == torch.bool:
            raise MisconfigurationException(
                f"{name}: `draw_samples` must return whole numbers (M,), got {drawn.dtype} {tuple(drawn.shape)}."
            )
        if len(drawn) and not 0 <= int(drawn.min()) <= int(drawn.max()) < size:
            raise MisconfigurationException(
                f"{name}: `draw_samples` must return indices of the {size} training samples, got {int(drawn.min())} to"
                f" {int(drawn.max())}."
            )
        self._batch_size, self._drop_last = _batching(loader, name)
        ranks = distributed.world_size(group)
        kept = len(drawn) - len(drawn) % ranks
        self._drawn: Tensor = drawn.cpu()[distributed.rank(group) : kept : ranks]
        self.start = 0
        if not len(self):
            raise MisconfigurationException(
                f"{name} has drawn {len(drawn)} samples for an epoch, which make no batch of {self._batch_size} on"
                f" {ranks} rank{'s' * (ranks > 1)}. Make the batches smaller."
            )

    def __len__(self) -> int:
        whole, rest = divmod(len(self._drawn), self._batch_size)
        return whole + (rest > 0 and not self._drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.start, len(self)):
            yield self._drawn[batch * self._batch_size : (batch + 1) * self._batch_size].tolist()


def _batching(loader: Any, name: str) -> tuple[int, bool]:
    batches = loader.batch_sampler
    size = getattr(batches, "batch_size", None)
    if not isinstance(size, int):
        what = "batches no samples" if batches is None else f"has a {_class_of(batches)} without a `batch_size`"
        raise MisconfigurationException(
            f"{name} draws the samples of the epochs, but the DataLoader {what}, so the size of a batch is not known."
            " Give the DataLoader a `batch_size`."
        )
    return size, bool(getattr(batches, "drop_last", False))


def _class_of(sampler: Any) -> str:
    return type(sampler).__name__
