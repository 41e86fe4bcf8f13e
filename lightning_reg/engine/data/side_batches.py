"""Rows of a second source of data, drawn for each step beside the batch."""

import torch
from torch import Tensor

from lightning_reg.engine.host import distributed

__all__ = ["distinct_rows", "side_rows"]


def side_rows(generator: torch.Generator, total: int, size: int) -> Tensor:
    """Positions of rows that are drawn uniformly, without repeating one, for all ranks together.

    From a technique's ``generator(step, same_on_ranks=True)`` they depend on its seed and the count of batches alone: a
    resumed run draws what the uninterrupted one would have drawn, and there is no state to save.

    Args:
        generator: Draws, on all ranks the same.
        total: How many rows there are.
        size: How many are drawn, over all ranks; all of them if there are fewer.

    Returns:
        Those of this rank, in turns with the others, on the CPU.

    """
    return distinct_rows(total, size, generator)[distributed.rank() :: distributed.world_size()]


def distinct_rows(total: int, size: int, generator: torch.Generator) -> Tensor:
    """``size`` of the numbers below ``total``, none twice, in random order.

    Args:
        total: How many numbers there are.
        size: How many are wanted; all of them if there are fewer.
        generator: Draws.

    Returns:
        ``(size,)``.

    """
    if 4 * size >= total:
        return torch.randperm(total, generator=generator)[:size]
    found = torch.empty(0, dtype=torch.long)
    while len(found) < size:  # once, nearly always; a permutation of a large catalogue would take longer than a step
        found = torch.unique(torch.cat([found, torch.randint(total, (2 * size,), generator=generator)]))
    return found[torch.randperm(len(found), generator=generator)[:size]]
