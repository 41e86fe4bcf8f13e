"""SoupAverager's arguments: what is refused, and what they say about schedule and collector."""

import math
import re
from collections.abc import Container
from typing import Any, Literal, Protocol

from lightning_reg.averaging.model_soups._gathered import Gathered, MovingAverage, RunningMean, Shelf
from lightning_reg.averaging.model_soups._soup import GreedyRules, Soup
from lightning_reg.engine.host.arguments import check_bool, check_choice, check_number

__all__ = [
    "SoupArguments",
    "check_arguments",
    "describe",
    "mode_of",
    "new_soup",
    "schedule",
    "score_by",
    "share_of_epoch",
]

_LAWA_K = 10


class SoupArguments(Protocol):
    """The arguments of ``SoupAverager``, as attributes."""

    method: Literal["uniform", "greedy", "lawa", "ema", "swa", "gaussian"]
    monitor: str | None
    mode: Literal["max", "min"] | None
    every_n_epochs: int | None
    every_n_steps: int | None
    from_checkpoints: bool
    start_step: int
    last_k: int | None
    max_ingredients: int | None
    min_delta: float
    strict: bool
    greedy_at: Literal["end", "snapshot"]
    decay: float | None
    half_life_steps: float | None
    warmup_steps: int
    mean_epoch: float | None
    std_epochs: float | None
    bn_update_batches: int | None
    include: list[str] | str | None
    exclude: list[str] | str | None
    keep: Literal["cpu", "disk"]
    keep_files: bool
    swap_for_validation: bool
    load_at_end: bool


def check_arguments(soup: SoupArguments) -> None:
    """Refuses arguments outside their range, and those that contradict one another."""
    check_choice(soup, "method", soup.method, ("uniform", "greedy", "lawa", "ema", "swa", "gaussian"))
    check_choice(soup, "mode", soup.mode or "max", ("max", "min"))
    check_choice(soup, "greedy_at", soup.greedy_at, ("end", "snapshot"))
    check_choice(soup, "keep", soup.keep, ("cpu", "disk"))
    for flag in ("from_checkpoints", "strict", "keep_files", "swap_for_validation", "load_at_end"):
        check_bool(soup, flag, getattr(soup, flag))
    check_number(soup, "min_delta", soup.min_delta, low=0)
    for name, low in (("start_step", 0), ("warmup_steps", 0)):
        check_number(soup, name, getattr(soup, name), low=low, integer=True)
    for name, limits in _OPTIONAL.items():
        if getattr(soup, name) is not None:
            check_number(soup, name, getattr(soup, name), **limits)
    for fault, sentence in _contradictions(soup):
        if fault:
            raise ValueError(f"SoupAverager: {sentence}")


_OPTIONAL: dict[str, dict[str, Any]] = {
    **{name: {"low": 1, "integer": True} for name in ("every_n_epochs", "every_n_steps", "last_k", "max_ingredients")},
    "bn_update_batches": {"low": 0, "integer": True},
    "decay": {"low": 0, "high": 1, "high_open": True},
    # Above, the share of an update is below float32's resolution, and the average stays as it began.
    "half_life_steps": {"low": 0, "high": 1e7, "low_open": True},
    "mean_epoch": {"low": 1},
    "std_epochs": {"low": 0, "low_open": True},
}


def _contradictions(soup: SoupArguments) -> list[tuple[bool, str]]:
    ema, greedy, gaussian = soup.method == "ema", soup.method == "greedy", soup.method == "gaussian"
    both = soup.mean_epoch, soup.std_epochs
    return [
        (gaussian and None in both, "method='gaussian' needs `mean_epoch` and `std_epochs`."),
        (not gaussian and both != (None, None), "`mean_epoch` and `std_epochs` are for method='gaussian' only."),
        (gaussian and soup.every_n_steps is not None, "`every_n_steps` is not for 'gaussian', which weights epochs."),
        (
            None not in (soup.every_n_epochs, soup.every_n_steps),
            "`every_n_epochs` and `every_n_steps` exclude each other.",
        ),
        (
            None not in (soup.decay, soup.half_life_steps),
            "`decay` and `half_life_steps` say the same; give one of them.",
        ),
        (not ema and soup.decay is not None, "`decay` is for method='ema' only."),
        (not ema and soup.half_life_steps is not None, "`half_life_steps` is for method='ema' only."),
        (not ema and soup.warmup_steps > 0, "`warmup_steps` is for method='ema' only."),
        (
            soup.last_k is not None and soup.method not in ("greedy", "lawa"),
            "`last_k` is for 'greedy' and 'lawa' only.",
        ),
        (
            greedy and soup.swap_for_validation,
            "`swap_for_validation` would hide the snapshots' own score from 'greedy'.",
        ),
        (
            soup.from_checkpoints and (soup.method not in ("greedy", "uniform") or soup.greedy_at == "snapshot"),
            "`from_checkpoints` is for 'greedy' (at the end) and 'uniform' only.",
        ),
        (
            soup.from_checkpoints and (soup.every_n_epochs or soup.every_n_steps) is not None,
            "`from_checkpoints` leaves the schedule to ModelCheckpoint; drop `every_n_epochs` and `every_n_steps`.",
        ),
        (
            soup.from_checkpoints and soup.swap_for_validation,
            "`swap_for_validation` needs an average while training runs; `from_checkpoints` has one at the end only.",
        ),
    ]


def schedule(soup: SoupArguments) -> tuple[int | None, int | None]:
    """Every how many epochs, or steps, weights are taken."""
    if soup.from_checkpoints:
        return None, None
    if soup.every_n_epochs is None and soup.every_n_steps is None:
        return (None, 1) if soup.method in ("ema", "swa") else (1, None)
    return soup.every_n_epochs, soup.every_n_steps


def score_by(soup: SoupArguments, metrics: Container[str]) -> str:
    """The metric that counts, of those that validation has logged."""
    if soup.monitor is not None:
        return soup.monitor
    return "val_loss" if "val_loss" in metrics and "val_acc" not in metrics else "val_acc"


def mode_of(soup: SoupArguments, metric: str) -> Literal["max", "min"]:
    """Whether a larger metric is better; of one that is called a loss or an error it is a smaller one."""
    if soup.mode is not None:
        return soup.mode
    return "min" if re.search("loss|error", metric.lower()) else "max"


def share_of_epoch(soup: SoupArguments, epoch: int) -> float:
    """How much the weights at the end of an epoch count, the first being 1; 1 where that is the same for all."""
    if soup.mean_epoch is None or soup.std_epochs is None:
        return 1.0
    # Not 0: until epochs come that count, the mean is one of those that there are.
    return max(math.exp(-(((epoch - soup.mean_epoch) / soup.std_epochs) ** 2) / 2), 1e-200)


def new_soup(soup: SoupArguments) -> Soup:
    """An empty soup."""
    rules = GreedyRules(mode_of(soup, soup.monitor or "val_acc"), soup.strict, soup.min_delta, soup.max_ingredients)
    return Soup(soup.method, _new_collector(soup), rules)


def _new_collector(soup: SoupArguments) -> Gathered:
    if soup.method == "ema":
        decay = 0.999 if soup.decay is None else soup.decay
        if soup.half_life_steps is not None:
            decay = 0.5 ** (1 / soup.half_life_steps)
        return MovingAverage(decay, soup.warmup_steps)
    if soup.method == "swa":
        return RunningMean(on_cpu=False, with_names=False)
    if soup.method in ("uniform", "gaussian") or (soup.method == "greedy" and soup.greedy_at == "snapshot"):
        return RunningMean(on_cpu=True, with_names=True)
    last_k = soup.last_k or (_LAWA_K if soup.method == "lawa" else None)
    return Shelf(None, last_k, keep_files=soup.keep_files)


def describe(soup: SoupArguments) -> str:
    """One line for the table."""
    epochs, steps = schedule(soup)
    when = "checkpoints" if soup.from_checkpoints else f"every {epochs} epochs" if epochs else f"every {steps} steps"
    extras = [when.replace(" 1 epochs", " epoch").replace(" 1 steps", " step")]
    extras += [f"after step {soup.start_step}"] if soup.start_step else []
    extras += [f"latest {soup.last_k or _LAWA_K}"] if soup.method == "lawa" else []
    if soup.method == "greedy":
        scores = ("val_acc", "val_loss") if soup.monitor is None else (soup.monitor,)
        extras.append("by " + " or ".join(f"{name} ({mode_of(soup, name)})" for name in scores))
    if soup.method == "gaussian":
        extras.append(f"around epoch {soup.mean_epoch:g} (std {soup.std_epochs:g})")
    if isinstance(collector := _new_collector(soup), MovingAverage):
        extras.append(f"decay {collector.decay:g}")
    extras.append("loaded at the end" if soup.load_at_end else "not loaded at the end")
    return f"{soup.method}: {', '.join(extras)}"
