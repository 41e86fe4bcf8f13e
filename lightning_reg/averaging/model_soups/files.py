"""Averages of the files of several runs, and out of the files of one."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_reg.averaging._checkpoint_files import RECORD, CheckpointFile, open_checkpoint
from lightning_reg.averaging._file_bars import counted_files, evaluations
from lightning_reg.averaging._plain_numbers import fault_of, place_of
from lightning_reg.averaging._soup_results import SoupResult, own_scores, save_soup
from lightning_reg.averaging._state_dicts import key_of, plain_keys, unique
from lightning_reg.averaging.model_soups._soup import (
    average_of_state,
    fault_of_shapes,
    fault_of_state,
    weights_of_state,
)
from lightning_reg.averaging.model_soups.ancestry import ancestry
from lightning_reg.averaging.model_soups.core import average_state_dicts, greedy_soup_of_numbers
from lightning_reg.engine.host.names import Patterns

__all__ = ["load_averaged", "make_soup"]


def make_soup(
    checkpoints: Sequence[str | Path],
    method: Literal["uniform", "greedy"] = "uniform",
    evaluate: Callable[[dict[str, Any]], float] | None = None,
    *,
    out: str | Path | None = None,
    start: str | Path | None = None,
    key: str | None = None,
    weights: Sequence[float] | None = None,
    mode: Literal["max", "min"] = "max",
    strict: bool = True,
    min_delta: float = 0.0,
    max_ingredients: int | None = None,
    accumulate_dtype: torch.dtype = torch.float64,
    check_ancestry: bool = True,
    progress: bool = False,
    exclude: Patterns = None,
    factors: Literal["mean", "stack"] = "mean",
) -> SoupResult:
    r"""Averages the checkpoints of several runs from one start.

    Files are Lightning checkpoints, plain state dicts, safetensors, or indices of shards. No code in them is run. A
    uniform soup reads them a piece of a tensor at a time: memory for one model and a few MB.

    Source: Wortsman et al., "Model soups", ICML 2022, arXiv 2203.05482, recipe 1 and its uniform version.

    Args:
        checkpoints: The files, at least one.
        method: ``"uniform"`` for all, ``"greedy"`` for those that improve the held-out score.
        evaluate: Held-out score of a state dict, :class:`TrainerEvaluation` for one. Needed for ``"greedy"``; for
            ``"uniform"`` it is asked about each file and the soup. Choose on data that neither trained a member nor
            will be reported.
        out: Where to write the soup, atomically: ``.safetensors``, or a file in the form of a Lightning checkpoint.
        start: File that all runs started from, to check that they did; ``None`` if there is none.
        key: Entry with the weights in files that hold several things.
        weights: Weights of a uniform soup, positive in sum; ``None`` for equal ones.
        mode: Whether larger or smaller scores are better.
        strict: Whether a candidate must beat the best score, or may equal it.
        min_delta: By how much, at least 0.
        max_ingredients: Largest number in a greedy soup; ``None`` for no limit.
        accumulate_dtype: Type of a uniform soup's sums.
        check_ancestry: Whether to measure, on a sample of each tensor, if the files share a basin, and to warn if not.
        progress: Whether to show a bar with the time left, of bytes that are averaged or candidates that are scored.
        exclude: Patterns of keys to leave as the first file has them (the best one, in a greedy soup). Those may
            differ, or be in one file alone.
        factors: ``"stack"`` puts factors of low-rank updates (LoRA) side by side in a uniform soup, see
            :func:`average_state_dicts`: their product is the mean of the products, at a larger rank.

    Returns:
        The soup; ingredients are named by their paths.

    Raises:
        ValueError: If ``evaluate`` is missing, an argument is out of its range, or the files differ.
        UntrustedFileError: If a file holds more than tensors and plain values.

    """
    if not checkpoints:
        raise ValueError("make_soup: `checkpoints` must name at least one file, got none.")
    if method not in ("uniform", "greedy"):
        raise ValueError(f"make_soup: `method` must be 'uniform' or 'greedy', got {method!r}.")
    if method == "greedy" and (evaluate is None or weights is not None):
        raise ValueError("make_soup: method='greedy' needs `evaluate`, the held-out score, and takes no `weights`.")
    if method == "greedy" and factors != "mean":
        raise ValueError("make_soup: method='greedy' must have factors='mean': its candidates are of one rank.")
    rules: dict[str, Any] = {"mode": mode, "strict": strict, "min_delta": min_delta, "max_ingredients": max_ingredients}
    names = unique(str(path) for path in checkpoints)
    files = [open_checkpoint(path, key) for path in checkpoints]
    if check_ancestry and len(files) > 1:
        ancestry(files, None if start is None else open_checkpoint(start, key), names=names, exclude=exclude)
    if method == "greedy" and evaluate is not None:
        with evaluations(evaluate, 2 * len(files) - 1, shown=progress) as scored:
            scores = own_scores(files, names, scored, exclude)
            result = greedy_soup_of_numbers("make_soup", files, scores, scored, names=names, exclude=exclude, **rules)
        if not result.ingredients:
            raise ValueError("make_soup: no file has a score that is a number, so none can be chosen.")
    else:
        if evaluate is None:
            scores = []
        else:
            with evaluations(evaluate, len(files), shown=progress) as scored:
                scores = own_scores(files, names, scored, exclude)
        with counted_files(files, f"averaging {len(files)} files", shown=progress) as members:
            mean = average_state_dicts(
                members, weights, accumulate_dtype, exclude=exclude, names=names, factors=factors
            )
        result = SoupResult.of_all(mean, names, scores, None if evaluate is None else float(evaluate(mean)))
    _settle(result, evaluate)
    if out is not None:
        save_soup(out, result, method, files[0].extra)
    return result


def _settle(result: SoupResult, evaluate: object) -> None:
    """Gives a soup the batch statistics that it was scored with; one of a single ingredient too."""
    settle = getattr(evaluate, "settle", None)
    if settle is not None:
        result.state_dict = settle(result.state_dict)
        result.scores_before_batch_norm = list(getattr(evaluate, "scores_before_batch_norm", []))


def load_averaged(path: str | Path, name: str | None = None) -> dict[str, Any]:
    """The averaged weights in a file of ours: a checkpoint of a fit with ``SoupAverager``, or a soup of several runs.

    It needs no Trainer. A checkpoint from the middle of a fit holds the raw weights and the state of the average, one
    from its end the average itself; both give the average. Keys are without the ``_orig_mod.`` of ``torch.compile``:
    load them before you compile.

    Args:
        path: The file.
        name: Which average, if there are several: the state key of the callback (``"SoupAverager[fast]"``).

    Returns:
        A complete state dict, to load with ``strict=True``; of what the user's own ``state_dict`` leaves out, nothing.

    Raises:
        ValueError: If the file says nothing of an average, or of several; if its state holds none of these weights, one
            of other shapes, or one that is not finite.
        RuntimeError: If there is no average yet.
        FileNotFoundError: If there is no such file, or a checkpoint's snapshots lie in files that are gone.

    """
    file = open_checkpoint(path)
    records = file.extra.get(RECORD) or {}
    if not isinstance(records, Mapping) or not all(
        isinstance(r, Mapping) and "averaged" in r for r in records.values()
    ):
        raise ValueError(f"{path}: what it says of an average is broken: {records!r:.80}.")
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
    weights = {"state_dict": file.load()}
    if not records[chosen]["averaged"]:
        exchange_in_checkpoint(weights, _average_in(file, chosen))
    copies: dict[int, Tensor] = {}
    result: dict[str, Any] = {}
    for key, original in plain_keys(weights["state_dict"], str(path)).items():
        value = weights["state_dict"][original]
        if isinstance(value, Tensor):  # tied weights are one tensor still, and no file stays mapped
            result[key] = copies.setdefault(id(value), value.clone())
        else:
            result[key] = value
    return result


def _average_in(file: CheckpointFile, name: str) -> dict[str, Tensor]:
    """The average that a callback's state in a checkpoint holds, checked to be one of the checkpoint's weights."""
    callbacks, keys = file.extra.get("callbacks"), plain_keys(file, str(file.path))
    state = callbacks.get(name) if isinstance(callbacks, Mapping) else None
    fault = fault_of_state(state)
    if not fault and state is not None:
        held = {held: key_of(held, keys) for values in weights_of_state(state) for held in values}
        known = {held: file.shape_and_dtype(key) for held, key in held.items() if key is not None}
        fault = fault_of_shapes(state, {held: shape[0] for held, shape in known.items() if shape is not None})
        if held and not known:
            fault = f"none of its weights is in the file: {sorted(held)[:3]}."
    if fault:
        raise ValueError(f"{file.path}: the state of {name} gives no average: {fault}")
    try:
        return average_of_state(state or {})
    except RuntimeError as error:
        raise RuntimeError(f"{file.path}: {error}") from error
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file.path}: the state of {name} is broken: {type(error).__name__}: {error}") from error


def exchange_in_checkpoint(checkpoint: dict[str, Any], average: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Puts the average into a checkpoint's ``state_dict`` where it has those tensors, and returns what was there."""
    weights = dict(checkpoint["state_dict"])
    keys = plain_keys(weights, "the checkpoint")
    tied: dict[tuple[Any, ...], list[str]] = {}
    for key, value in weights.items():
        if isinstance(value, Tensor):
            tied.setdefault(_place(value, key), []).append(key)
    raw = {}
    for name, value in average.items():
        key = key_of(name, keys)
        if key is not None:
            old = raw[name] = weights[key]
            new = value.to(old)
            weights.update(dict.fromkeys(tied[_place(old, key)], new))
    checkpoint["state_dict"] = weights
    return raw


def _place(value: Tensor, key: str) -> tuple[Any, ...]:
    return place_of(value) if value.numel() and not fault_of(value) else (key,)
