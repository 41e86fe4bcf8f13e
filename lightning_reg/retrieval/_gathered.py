"""Columns of other ranks behind those of a contrastive call: who adds them says where they are and what they are of."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.errors import MisconfigurationException

if TYPE_CHECKING:
    from lightning_reg.engine.host.owner import Owner
    from lightning_reg.engine.loss.call import LossCall

__all__ = ["GathersColumns", "OtherRanks", "other_ranks"]


@dataclass(frozen=True, eq=False)
class OtherRanks:
    """What a technique has added to a call.

    Args:
        first: The first of its columns in :attr:`LossCall.loss_input`.
        rows: Embeddings of them in their order, with gradient to the ranks that they are of, ``(n, D)``.
        scores: As they were added, ``(B, n)``; -inf where a rank has fewer.

    """

    first: int
    rows: Tensor
    scores: Tensor

    @property
    def columns(self) -> slice:
        """Where they are."""
        return slice(self.first, self.first + self.scores.shape[1])


class GathersColumns:
    """Marks who adds columns of other ranks: where there are any, it leaves :class:`OtherRanks` in its note."""


def other_ranks(call: "LossCall", reader: "Owner") -> OtherRanks | None:
    """The columns that a technique has added to a call before another one reads it.

    Args:
        call: As the reader has it.
        reader: Works on it.

    Returns:
        ``None`` where nobody adds any.

    Raises:
        MisconfigurationException: If who adds them comes later.

    """
    step = call.step
    if host.data_parallel_group(step.trainer) is None:
        return None
    gathering = [owner for owner in step.active if isinstance(owner, GathersColumns) and owner.loss == reader.loss]
    for owner in gathering:
        found: OtherRanks | None = step.notes.get(owner)
        if found is None:
            names = type(reader).__name__, type(owner).__name__
            raise MisconfigurationException(
                f"{names[0]} stands before {names[1]} in the list of callbacks, and the documents of other ranks, which"
                f" it would work on as well, are not there yet. Let {names[1]} stand before {names[0]}."
            )
        return found
    return None
