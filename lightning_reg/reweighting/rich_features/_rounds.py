"""Files that tell what the network of a round has made of the training samples."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_reg.engine.host.checkpoints import read_checkpoint
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.written import write_atomically

__all__ = ["check_paths", "read_rounds", "write_round"]


def check_paths(owner: object, rounds: object) -> list[str]:
    """The files that an argument names; a ``ValueError`` if it is no list of strings."""
    if isinstance(rounds, str) or not isinstance(rounds, Sequence) or not all(isinstance(p, str) for p in rounds):
        raise ValueError(f"{type(owner).__name__}: `rounds` must be a list of files, got {rounds!r}.")
    return list(rounds)


def write_round(path: str, correct: Tensor, predictions: Tensor) -> None:
    """Writes a file for the next rounds, whole or not at all."""
    write_atomically(path, partial(torch.save, {"correct": correct, "predictions": predictions}))


def read_rounds(owner: object, rounds: Sequence[str]) -> tuple[Tensor, Tensor]:
    """What the networks of earlier rounds have made of the samples.

    Args:
        owner: Whose rounds they are; its class is named in errors.
        rounds: The files.

    Returns:
        Whether each is right, bool ``(R, N)``, and what it predicts, int64 ``(N, R)``.

    Raises:
        MisconfigurationException: If a file cannot be read, is no such file, or is of another dataset than the first.

    """
    name, found = type(owner).__name__, []
    for path in rounds:
        try:
            content = read_checkpoint(path)
        except ValueError as error:
            raise MisconfigurationException(f"{name}(rounds=...): {error}") from error
        if not {"correct", "predictions"} <= content.keys():
            raise MisconfigurationException(
                f"{name}(rounds=...): {path} is no record of a round. `RichFeatures(record=...)` writes them."
            )
        found.append((content["correct"].bool(), content["predictions"].long()))
    sizes = [len(correct) for correct, _ in found]
    if len({*sizes}) > 1:
        raise MisconfigurationException(
            f"{name}(rounds=...): the files are records of {', '.join(map(str, sizes))} samples. Record all rounds on"
            " the same training dataset."
        )
    return torch.stack([correct for correct, _ in found]), torch.stack([guess for _, guess in found], 1)
