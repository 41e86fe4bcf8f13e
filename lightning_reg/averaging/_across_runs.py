"""Averages of the files of several runs, and out of the files of one."""

from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_reg.averaging._in_fit import average_of_state, exchange_in_checkpoint
from lightning_reg.engine.checkpoint_files import RECORD, open_checkpoint

__all__ = ["load_averaged"]


def load_averaged(path: str | Path, name: str | None = None) -> dict[str, Any]:
    """The averaged weights in a file of ours: a checkpoint of a fit with ``SoupAverager``, or a soup of several runs.

    It needs no Trainer. A checkpoint from the middle of a fit holds the raw weights and the state of the average, one
    from its end the average itself; both give the average.

    Args:
        path: The file.
        name: Which average, if there are several: the state key of the callback (``"SoupAverager[fast]"``).

    Returns:
        A complete state dict, to load with ``strict=True``.

    Raises:
        ValueError: If the file says nothing of an average, or of several.
        RuntimeError: If there is no average yet.

    """
    file = open_checkpoint(path)
    records = file.extra.get(RECORD) or {}
    if not records:
        raise ValueError(
            f"{path} says nothing of an average. Its weights may be one or not: files written with"
            " `save_weights_only=True` hold no callback's word. Read them with `torch.load(path, weights_only=True)`."
        )
    if name is None and len(records) > 1:
        raise ValueError(f"{path} has several averages; give `name`, one of {sorted(records)}.")
    chosen = next(iter(records)) if name is None else name
    if chosen not in records:
        raise ValueError(f"{path} has no average {chosen!r}, but {sorted(records)}.")
    weights = {"state_dict": dict(file)}
    if not records[chosen]["averaged"]:
        exchange_in_checkpoint(weights, average_of_state(file.extra["callbacks"][chosen]))
    copies: dict[int, Tensor] = {}
    result: dict[str, Any] = {}
    for key, value in weights["state_dict"].items():
        if isinstance(value, Tensor):  # tied weights are one tensor still, and no file stays mapped
            result[key] = copies.setdefault(id(value), value.clone())
        else:
            result[key] = value
    return result
