"""SoupAverager before the fit: its arguments, what it gathers weights in, setups that it refuses."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_reg.averaging._collectors import MovingAverage, RunningMean, Shelf
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_choice, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.run.phases import phases_of
from lightning_reg.engine.technique import Technique

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_reg.averaging.model_soups import SoupAverager

__all__ = ["check_arguments", "check_setup", "conflict", "describe", "new_collector", "new_folder", "schedule"]

_LAWA_K = 10
Collector = MovingAverage | RunningMean | Shelf


def check_arguments(soup: "SoupAverager") -> None:
    """Refuses arguments outside their range, and those that contradict one another."""
    check_choice(soup, "method", soup.method, ("uniform", "greedy", "lawa", "ema", "swa"))
    check_choice(soup, "mode", soup.mode, ("max", "min"))
    check_choice(soup, "greedy_at", soup.greedy_at, ("end", "snapshot"))
    check_choice(soup, "keep", soup.keep, ("cpu", "disk"))
    check_number(soup, "min_delta", soup.min_delta, low=0)
    for name, low in (("start_step", 0), ("warmup_steps", 0)):
        check_number(soup, name, getattr(soup, name), low=low, integer=True)
    for name, low in (("every_n_epochs", 1), ("every_n_steps", 1), ("last_k", 1), ("max_ingredients", 1)):
        if getattr(soup, name) is not None:
            check_number(soup, name, getattr(soup, name), low=low, integer=True)
    if soup.bn_update_batches is not None:
        check_number(soup, "bn_update_batches", soup.bn_update_batches, low=0, integer=True)
    if soup.decay is not None:
        check_number(soup, "decay", soup.decay, low=0, high=1, high_open=True)
    if soup.half_life_steps is not None:
        check_number(soup, "half_life_steps", soup.half_life_steps, low=0, low_open=True)
    for fault, sentence in _contradictions(soup):
        if fault:
            raise ValueError(f"SoupAverager: {sentence}")


def _contradictions(soup: "SoupAverager") -> list[tuple[bool, str]]:
    ema, greedy = soup.method == "ema", soup.method == "greedy"
    return [
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


def schedule(soup: "SoupAverager") -> tuple[int | None, int | None]:
    """Every how many epochs, or steps, weights are taken."""
    if soup.from_checkpoints:
        return None, None
    if soup.every_n_epochs is None and soup.every_n_steps is None:
        return (None, 1) if soup.method in ("ema", "swa") else (1, None)
    return soup.every_n_epochs, soup.every_n_steps


def new_collector(soup: "SoupAverager") -> Collector:
    """What the method gathers weights in."""
    if soup.method == "ema":
        decay = 0.999 if soup.decay is None else soup.decay
        if soup.half_life_steps is not None:
            decay = 0.5 ** (1 / soup.half_life_steps)
        return MovingAverage(decay, soup.warmup_steps)
    if soup.method == "swa":
        return RunningMean(on_cpu=False, with_names=False)
    if soup.method == "uniform" or soup.greedy_at == "snapshot":
        return RunningMean(on_cpu=True, with_names=True)
    return Shelf(None, soup.last_k or (_LAWA_K if soup.method == "lawa" else None))


def new_folder(soup: "SoupAverager", trainer: "Trainer") -> Path:
    """A new folder, the same on all ranks."""
    root = Path(soup.dirpath or trainer.default_root_dir)
    name = ""
    if trainer.is_global_zero:
        root.mkdir(parents=True, exist_ok=True)
        name = tempfile.mkdtemp(prefix="soup-", dir=root)
    return Path(trainer.strategy.broadcast(name))


def describe(soup: "SoupAverager") -> str:
    """One line for the table."""
    epochs, steps = schedule(soup)
    when = "checkpoints" if soup.from_checkpoints else f"every {epochs} epochs" if epochs else f"every {steps} steps"
    extras = [when.replace(" 1 epochs", " epoch").replace(" 1 steps", " step")]
    extras += [f"after step {soup.start_step}"] if soup.start_step else []
    extras += [f"latest {soup.last_k or _LAWA_K}"] if soup.method == "lawa" else []
    if soup.method == "greedy":
        extras.append(f"by {soup.monitor} ({soup.mode})")
    if isinstance(collector := new_collector(soup), MovingAverage):
        extras.append(f"decay {collector.decay:g}")
    extras.append("loaded at the end" if soup.load_at_end else "not loaded at the end")
    return f"{soup.method}: {', '.join(extras)}"


def check_setup(soup: "SoupAverager", trainer: "Trainer") -> None:
    """Refuses setups in which the average would be wrong or never made."""
    _check_strategy(soup, type(trainer.strategy).__name__)
    if soup.method == "greedy" and not trainer.enable_validation:
        raise MisconfigurationException(
            f"SoupAverager(method='greedy') decides by the validation metric {soup.monitor!r}, but this fit has no"
            " validation. Give `fit` validation data and the module a `validation_step` that logs it, or take"
            " method='uniform' or 'lawa'."
        )
    savers = [callback for callback in host.callbacks(trainer) if hasattr(callback, "best_k_models")]
    if soup.from_checkpoints and not savers:
        raise MisconfigurationException(
            "SoupAverager(from_checkpoints=True) takes the checkpoints that ModelCheckpoint keeps, but there is none"
            " among the callbacks. Add `ModelCheckpoint(monitor=..., save_top_k=5)`."
        )
    if any(getattr(saver, "save_weights_only", False) for saver in savers):
        host.rank_zero_warn(
            "SoupAverager: Lightning calls no callback for files of ModelCheckpoint(save_weights_only=True), so those"
            " written while training runs hold the raw weights, without the average and without a word about it. The"
            " average is in the module when the fit ends: `trainer.save_checkpoint(path, weights_only=True)`."
        )


def _check_strategy(soup: "SoupAverager", strategy: str) -> None:
    if strategy.startswith(("FSDP", "DeepSpeed", "XLAFSDP")):
        raise MisconfigurationException(
            f"SoupAverager: {strategy} splits parameters into pieces that are no tensors of their own."
            " Use DDP or ModelParallelStrategy (`fully_shard`), or average consolidated checkpoints afterwards:"
            " `lightning-reg soup uniform A.ckpt B.ckpt --out soup.ckpt`."
        )
    if not strategy.startswith("ModelParallel"):
        return
    for name, is_set in (
        ('keep="disk"', soup.keep == "disk"),
        ("from_checkpoints=True", soup.from_checkpoints),
        ("swap_for_validation=True", soup.swap_for_validation),
    ):
        if is_set:
            raise MisconfigurationException(
                f"SoupAverager({name}) works on files of whole models; under {strategy} each process has shards only."
                " Leave that argument out: the shards' average is kept in memory, and checkpoints hold it whole."
            )


def conflict(soup: "SoupAverager", other: Technique) -> str | None:
    """Why it cannot stand beside another technique."""
    if type(other) is type(soup) and soup.load_at_end and getattr(other, "load_at_end", False):
        return "each puts its average into the module when the fit ends. Give all but one `load_at_end=False`."
    if soup.swap_for_validation and "edit_weights" in phases_of(other):
        return "`swap_for_validation` would validate the average without the other's edits. Set it to False."
    return None
