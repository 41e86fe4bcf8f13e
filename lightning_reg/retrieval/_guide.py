"""Embeddings of a better model that the batch has, for the rows and the columns of a contrastive call."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine.data.entries import find_entry
from lightning_reg.engine.host.errors import MisconfigurationException

if TYPE_CHECKING:
    from lightning_reg.engine.loss.call import LossCall

__all__ = ["check_count", "keys_of", "names_of", "unit_rows_of_batch"]


def unit_rows_of_batch(call: "LossCall", owner: str, queries: str, documents: "list[str] | str") -> Sequence[Tensor]:
    """Unit rows of the embeddings in the batch.

    Args:
        call: Of logits ``(B, C)``.
        owner: Name of who asks, for errors.
        queries: Entry with those of the rows.
        documents: Entries with those of the columns, in their order.

    Returns:
        ``(B, E)`` and ``(C, E)``, float32, without gradient.

    Raises:
        MisconfigurationException: If they are no embeddings, or not as many as rows and columns.

    """
    keys = [queries, *keys_of(documents)]
    found = [find_entry(call.step.batch, key, f"{owner}: embeddings") for key in keys]
    for key, entry in zip(keys, found, strict=True):
        if not isinstance(entry, Tensor) or entry.dim() < 2 or not entry.is_floating_point():
            shape = f"{entry.dtype} {tuple(entry.shape)}" if isinstance(entry, Tensor) else type(entry).__name__
            raise MisconfigurationException(
                f"{owner}: the entry {key!r} of the batch must be embeddings (n, E), found {shape}."
            )
    flat = (entry.detach().to(call.input.device).float().flatten(0, -2) for entry in found)
    rows, *columns = (F.normalize(each, dim=1) for each in flat)
    check_count(call, owner, names_of(documents), sum(map(len, columns)), call.logits.shape[-1])
    check_count(call, owner, queries, len(rows), len(call.labels), "rows")
    return rows, torch.cat(columns)


def check_count(call: "LossCall", owner: str, names: str, found: int, wanted: int, what: str = "columns") -> None:
    """Refuses entries of the batch that have not one for each row or column of the call.

    Args:
        call: The call.
        owner: Name of who asks.
        names: What the entries are called.
        found: How many they have.
        wanted: How many there have to be.
        what: Of what.

    Raises:
        MisconfigurationException: If there are not as many.

    """
    if found != wanted:
        raise MisconfigurationException(
            f"{owner}: {names} of the batch has {found} for {wanted} {what} of {call}. Name the entries of all of them,"
            " in their order, hard negatives included."
        )


def keys_of(given: "list[str] | str | None") -> list[str]:
    """Keys that were given as a list, as one, or not."""
    return [given] if isinstance(given, str) else [*(given or ())]


def names_of(given: "list[str] | str | None") -> str:
    """The keys, to be read."""
    return " and ".join(keys_of(given))
