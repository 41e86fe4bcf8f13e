"""What the engine tells: a table at the start of the fit, scalars while it runs. Rank zero only, through rich."""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from lightning_reg.engine.host import distributed
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.run.periods import Period
from lightning_reg.engine.run.phases import LOSS_PHASES, Member, OnModules, ThroughMap, draws_samples, phases_of
from lightning_reg.engine.weights.summed import names_said

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

__all__ = [
    "log_scalars",
    "note_empty_states",
    "show_table",
    "techniques_table",
    "warn_of_missing_states",
    "what_is_trained",
]

log = logging.getLogger(__name__)

# What a technique changes in a step, in words that need no knowledge of the engine.
_CHANGES = {
    "own_modules": "modules of its own",
    "draw_samples": "which samples are drawn",
    "transform_batch": "the batch",
    "observe_batch": "a second network",
    "extra_views": "versions of the batch",
    "edit_weights": "weights in the step",
    "edit_inputs": "a layer's input",
    "edit_features": "a layer's output",
    "parts": "how often a layer runs",
    "change_input": "logits in the loss",
    "change_targets": "targets",
    "change_losses": "losses of samples",
    "sample_weights": "weights of samples",
    "loss_term": "the loss",
    "step_term": "the step's loss",
    "penalty": "gradients",
    "change_gradients": "gradients",
    "after_step": "weights after the step",
    "map_weights": "what weights are made of",
}


def techniques_table(techniques: Sequence[Member], samples: Mapping[Any, int], trained: str = "") -> Table:
    """The table at the start of the fit.

    Args:
        techniques: In the order they act.
        samples: Number of samples whose indices are followed, for the techniques that need them.
        trained: What is trained, see :func:`what_is_trained`.

    Returns:
        A rich table, one row per technique.

    """
    table = Table(title="lightning_reg", title_justify="left", caption=escape(trained), caption_justify="left")
    for column in ("technique", "changes", "samples", "settings"):
        table.add_column(column, overflow="fold")
    for technique in techniques:
        count = f"{samples[technique]:,}" if technique in samples else "-"
        idle = () if draws_samples(technique) else ("draw_samples",)
        changes = ", ".join(_CHANGES[phase] for phase in phases_of(technique) if phase not in idle)
        name = type(technique).__name__ + (f" [{technique.name}]" if technique.name else "")
        table.add_row(escape(name), changes or "nothing in the step", count, escape(_settings(technique, techniques)))
    return table


def _settings(technique: Member, techniques: Sequence[Member]) -> str:
    said = [technique.describe()]
    if isinstance(technique, OnModules):
        said.append(f"trains {technique.own.size:,} numbers of its own")
    if isinstance(technique, ThroughMap) and technique.latents.ways:
        said.append(f"gradients of {_ways(technique.latents.ways)}")
    for period in technique.periods:
        resting = [type(t).__name__ for t in techniques if t is not technique and _ON_LOSS.intersection(phases_of(t))]
        rests = f" ({', '.join(resting)} without effect on it)" if period.loss == "own" and resting else ""
        said.append(f"{period}{rests}")
    return "; ".join(said)


def _ways(ways: Mapping[str, str]) -> str:
    by_way: dict[str, list[str]] = {}
    for name, way in ways.items():
        by_way.setdefault(way, []).append(name)
    return ", ".join(f"{len(names)} weights {way}: {names_said(names)}" for way, names in by_way.items())


_ON_LOSS = LOSS_PHASES | {"step_term"}


def what_is_trained(module: nn.Module, optimizers: "Sequence[Optimizer]", techniques: Sequence[Member]) -> str:
    """What is trained, frozen and lent, in numbers.

    Args:
        module: The user's module.
        optimizers: Those of the fit.
        techniques: In the order they act.

    Returns:
        A line.

    """
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    sizes = {p: 0 if isinstance(p, nn.UninitializedParameter) else p.numel() for p in module.parameters()}
    trained = sum(size for p, size in sizes.items() if p.requires_grad and id(p) in held)
    said = [f"trained: {trained:,} of the module's {sum(sizes.values()):,} numbers"]
    off = sum(size for p, size in sizes.items() if not p.requires_grad)
    rest = sum(sizes.values()) - trained - off
    said += [f"frozen: {off:,}"] + ([f"in no optimizer: {rest:,}"] if rest else [])
    said += [
        f"frozen by {type(t).__name__} in {str(period).partition(':')[0]}: {_count(period, module):,}"
        for t in techniques
        for period in t.periods
        if period.freezes
    ]
    lent = [f"{type(t).__name__} {t.own.size:,}" for t in techniques if isinstance(t, OnModules) and t.own.size]
    return "; ".join([*said, f"lent to the optimizer: {', '.join(lent) or '0'}"])


def _count(period: Period, module: nn.Module) -> int:
    return sum(p.numel() for p in period.chosen(module)[0] if not isinstance(p, nn.UninitializedParameter))


def show_table(trainer: "Trainer", module: nn.Module, techniques: Sequence[Member], samples: Mapping[Any, int]) -> None:
    """Prints the table where Lightning prints its model summary (``enable_model_summary``); else it goes to the log."""
    if not trainer.is_global_zero:
        return
    trained = what_is_trained(module, trainer.optimizers, techniques)
    if host.prints_summary(trainer):
        Console().print(techniques_table(techniques, samples, trained))
    log.info("%s", trained)
    for technique in techniques:
        log.info("%s: %s", type(technique).__name__, _settings(technique, techniques))


def note_empty_states(techniques: Sequence[Member], checkpoint: Mapping[str, Any]) -> None:
    """Notes in a checkpoint those that have no state yet: Lightning drops states that are empty.

    Args:
        techniques: Those of the fit.
        checkpoint: Gets an empty state for each.

    """
    for callback in _keeping_state(techniques):
        checkpoint.get("callbacks", {}).setdefault(callback.state_key, {})


def _keeping_state(techniques: Sequence[Member]) -> list[host.Callback]:
    callbacks = [technique for technique in techniques if isinstance(technique, host.Callback)]
    return [callback for callback in callbacks if type(callback).state_dict is not host.Callback.state_dict]


def warn_of_missing_states(techniques: Sequence[Member], checkpoint: Mapping[str, Any]) -> None:
    """Says which techniques start anew in the middle of a training, because a checkpoint has no state of theirs.

    Args:
        techniques: Those of the fit that is resumed.
        checkpoint: What it is resumed from.

    """
    step, known = checkpoint.get("global_step", 0), checkpoint.get("callbacks") or {}
    missing = [callback.state_key for callback in _keeping_state(techniques) if callback.state_key not in known]
    if step > 0 and missing:
        verb, its = ("starts", "its") if len(missing) == 1 else ("start", "their")
        host.rank_zero_warn(
            f"{' and '.join(missing)} {verb} anew in the middle of this training: the checkpoint, of step {step}, holds"
            f" nothing of {its} state, but of {sorted(map(str, known)) or 'no callback'}. To go on where a run was,"
            " give the callbacks (and their `name`) that the run had."
        )


def log_scalars(
    module: "LightningModule", values: Mapping[str, Tensor], batch_size: int, *, by_epoch: bool = False
) -> None:
    """Hands scalars to the user's loggers through the module's own ``log``, as means over the ranks.

    Args:
        module: The user's module.
        values: Scalars by name.
        batch_size: Number of samples, which a mean over an epoch weighs by.
        by_epoch: Whether an epoch's mean is logged, in place of each step's value.

    """
    module.log_dict(
        dict(values),
        on_step=not by_epoch,
        on_epoch=by_epoch,
        batch_size=batch_size or 1,
        sync_dist=distributed.world_size() > 1,
    )
