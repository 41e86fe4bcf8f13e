"""What SoupAverager does around the average: the validation of candidates, decisions, records."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.averaging._batch_norm import reestimate_batchnorm, tracking_layers
from lightning_reg.averaging._checkpoint_files import open_checkpoint
from lightning_reg.averaging._collectors import Ingredient, MovingAverage, RunningMean, Shelf, Weights
from lightning_reg.averaging._greedy import Candidate, accepts, greedy_soup
from lightning_reg.averaging._state_dicts import average_state_dicts
from lightning_reg.engine.host import distributed
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.run import passes as extra_passes
from lightning_reg.engine.run.engine import attached_engine

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.averaging.model_soups import SoupAverager

__all__ = [
    "Outcome",
    "average_of_state",
    "copy_into",
    "decide",
    "exchange_in_checkpoint",
    "finish",
    "record",
    "score_in",
]


# -- scores -----------------------------------------------------------------------------------------------------------


def score_in(soup: "SoupAverager", metrics: Mapping[str, Any], module: "LightningModule") -> float:
    """The metric to decide by.

    Returns:
        The same on all ranks: the mean, if the module logged it without ``sync_dist``.

    Raises:
        MisconfigurationException: If validation did not log it.

    """
    if soup.monitor not in metrics:
        raise MisconfigurationException(
            f"SoupAverager(monitor={soup.monitor!r}): validation logged no such metric, but"
            f" {sorted(name for name in metrics if not name.startswith('reg/')) or 'none at all'}."
        )
    score = float(metrics[soup.monitor])
    if distributed.world_size() == 1:
        return score
    scores = distributed.all_gather(torch.tensor(score, dtype=torch.float64, device=module.device)).tolist()
    return score if len(set(scores)) == 1 else sum(scores) / len(scores)


def evaluate(soup: "SoupAverager", trainer: "Trainer", module: "LightningModule", weights: Weights | None) -> float:
    """Score of other weights in the module (of its own, if ``None``), by the user's own validation."""
    if weights is not None:
        soup._exchange.put(soup._live, weights)
    try:
        if weights is not None:
            reestimate(soup, trainer, module)
        return score_in(soup, extra_passes.validation_metrics(trainer), module)
    finally:
        soup._exchange.undo()


def reestimate(soup: "SoupAverager", trainer: "Trainer", module: "LightningModule") -> int:
    """Estimates batch statistics anew on training batches, through the module's own step."""
    if soup.bn_update_batches == 0 or not tracking_layers(module):
        return 0
    steps = count()
    # The counters are of training: where the momentum is None they are the weight of its next batch.
    counters = [
        (layer.num_batches_tracked, layer.num_batches_tracked.clone())
        for layer in tracking_layers(module)
        if layer.num_batches_tracked is not None
    ]
    with attached_engine(trainer).training_batches() as batches:
        used = reestimate_batchnorm(
            module, batches, soup.bn_update_batches, lambda b: extra_passes.replay_step(trainer, module, b, next(steps))
        )
    for counter, value in counters:
        counter.copy_(value)
    return used


# -- decisions --------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a fit's average is made of.

    Args:
        ingredients: Names, where it is one of snapshots.
        count: How many snapshots or updates are in it.
        score: Of the greedy soup; of another average if it has batch statistics and the metric is logged.
        trace: Decisions of the greedy soup.
        before_batch_norm: The score before batch statistics were estimated anew.

    """

    ingredients: list[str]
    count: int
    score: float | None = None
    trace: list[Candidate] = field(default_factory=list)
    before_batch_norm: float | None = None

    def state(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def of(cls, state: Mapping[str, Any] | None) -> "Outcome | None":
        """From its plain values."""
        if state is None:
            return None
        return cls(**{**state, "trace": [Candidate(**candidate) for candidate in state["trace"]]})


def decide(soup: "SoupAverager", trainer: "Trainer", module: "LightningModule", ingredient: Ingredient) -> None:
    """Lets a snapshot join the greedy soup, replace it, or go, whichever scores best."""
    mean = soup._gathered
    if not isinstance(mean, RunningMean):
        raise TypeError(f"greedy_at='snapshot' gathers in a RunningMean, not in a {type(mean).__name__}.")
    own = ingredient.score if ingredient.score is not None else evaluate(soup, trainer, module, None)
    ingredient.score = own
    options: dict[str, Any] = {"strict": soup.strict, "min_delta": soup.min_delta, "mode": soup.mode}
    full = soup.max_ingredients is not None and mean.taken >= soup.max_ingredients
    joined = None if mean.taken == 0 or full else evaluate(soup, trainer, module, mean.average(soup._live))
    best = soup._soup_score
    joins = joined is not None and best is not None and accepts(joined, best, **options)
    better_alone = best is None or accepts(
        own, joined if joins and joined is not None else best, strict=True, min_delta=0.0, mode=soup.mode
    )
    soup._trace.append(Candidate(ingredient.name, own, joined, joins or better_alone))
    if better_alone:
        soup._gathered = mean = RunningMean(on_cpu=True, with_names=True)
    if joins or better_alone:
        mean.take(ingredient, soup._live)
        soup._soup_score = own if better_alone else joined


def finish(
    soup: "SoupAverager", trainer: "Trainer", module: "LightningModule"
) -> tuple[Outcome | None, dict[str, Tensor]]:
    """The average that the fit ends with, batch statistics included, and what is in it."""
    source = _KeptCheckpoints(soup, trainer) if soup.from_checkpoints else soup._gathered
    if isinstance(source, Shelf):
        trainer.strategy.barrier("the last ingredient is written")
    if not source.taken:
        host.rank_zero_warn(
            f"SoupAverager: the fit ended before the first snapshot (start_step={soup.start_step},"
            f" every_n_epochs={soup.every_n_epochs}, every_n_steps={soup.every_n_steps}): the module keeps its weights."
        )
        return None, {}
    if soup.method == "greedy" and not isinstance(source, MovingAverage):
        outcome, average = _greedy(soup, trainer, module, source)
    else:
        outcome, average = Outcome(list(source.names), source.taken), source.average()
    average = {name: average[name].to(tensor, copy=True) for name, tensor in soup._live.items()}
    if outcome.count > 1 and tracking_layers(module) and soup.bn_update_batches != 0:
        _settle_batch_norm(soup, trainer, module, average, outcome)
    _log(soup, trainer, outcome)
    return outcome, average


def _greedy(
    soup: "SoupAverager",
    trainer: "Trainer",
    module: "LightningModule",
    source: "RunningMean | Shelf | _KeptCheckpoints",
) -> tuple[Outcome, dict[str, Tensor]]:
    if isinstance(source, RunningMean):
        return Outcome(source.names, source.taken, soup._soup_score, list(soup._trace)), source.average()
    for position, ingredient in enumerate(source.ingredients):
        if ingredient.score is None:
            soup._exchange.put(soup._live, source[position])
            try:
                ingredient.score = score_in(soup, extra_passes.validation_metrics(trainer), module)
            finally:
                soup._exchange.undo()
    result = greedy_soup(
        source,
        [i.score if i.score is not None else math.nan for i in source.ingredients],
        lambda weights: evaluate(soup, trainer, module, weights),
        strict=soup.strict,
        min_delta=soup.min_delta,
        mode=soup.mode,
        names=[ingredient.name for ingredient in source.ingredients],
        max_ingredients=soup.max_ingredients,
    )
    outcome = Outcome(list(result.ingredients), len(result.ingredients), result.score, result.trace)
    return outcome, result.state_dict


def _settle_batch_norm(
    soup: "SoupAverager", trainer: "Trainer", module: "LightningModule", average: dict[str, Tensor], outcome: Outcome
) -> None:
    """Estimates the statistics of the final average, in ``average`` itself, with its score before and after."""
    scored = trainer.enable_validation and soup.monitor in trainer.callback_metrics
    soup._exchange.put(soup._live, average)
    try:
        if scored:
            outcome.before_batch_norm = score_in(soup, extra_passes.validation_metrics(trainer), module)
        reestimate(soup, trainer, module)
        for name, tensor in soup._live.items():  # where values were copied in, so are the statistics back
            average[name].copy_(tensor)
        if scored and soup.method != "greedy":
            outcome.score = score_in(soup, extra_passes.validation_metrics(trainer), module)
    finally:
        soup._exchange.undo()


def _log(soup: "SoupAverager", trainer: "Trainer", outcome: Outcome) -> None:
    values = {f"{soup.log_key}/ingredients": float(outcome.count)}
    if outcome.score is not None:
        values[f"{soup.log_key}/score"] = outcome.score
    if outcome.before_batch_norm is not None:
        values[f"{soup.log_key}/score_before_batch_norm"] = outcome.before_batch_norm
    for logger in trainer.loggers:
        logger.log_metrics(values, step=trainer.global_step)


class _KeptCheckpoints(Sequence[dict[str, Tensor]]):
    """The averaged tensors of the checkpoints that ModelCheckpoint keeps, by file name."""

    def __init__(self, soup: "SoupAverager", trainer: "Trainer") -> None:
        trainer.strategy.barrier("the last checkpoint is written")
        self._names = list(soup._live)
        scores: dict[str, float | None] = {}
        for saver in host.callbacks(trainer):
            same = getattr(saver, "monitor", None) == soup.monitor
            for path, value in getattr(saver, "best_k_models", {}).items():
                scores[str(path)] = float(value) if same else None
        self._paths = sorted(scores, key=lambda path: Path(path).name)
        self.ingredients = [Ingredient(Path(path).name, 0, scores[path]) for path in self._paths]
        self.names = [ingredient.name for ingredient in self.ingredients]
        self.taken = len(self.names)

    def average(self) -> dict[str, Tensor]:
        """The mean of all."""
        return average_state_dicts(self)

    @override
    def __len__(self) -> int:
        return len(self._paths)

    @override
    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        file = open_checkpoint(self._paths[position])
        keys = {key.replace("_orig_mod.", ""): key for key in file}
        missing = [name for name in self._names if name not in keys]
        if missing:
            raise MisconfigurationException(
                f"SoupAverager: the checkpoint {self._paths[position]} lacks {missing[:5]}, so it cannot be averaged."
            )
        return {name: file[keys[name]] for name in self._names}


# -- weights and records ----------------------------------------------------------------------------------------------


@torch.no_grad()
def copy_into(live: Weights, values: Weights) -> None:
    """Copies values into the module's tensors."""
    for name, tensor in live.items():
        tensor.copy_(values[name])


def exchange_in_checkpoint(checkpoint: dict[str, Any], average: Weights) -> dict[str, Tensor]:
    """Puts the average into a checkpoint's ``state_dict`` and returns what was there."""
    weights = dict(checkpoint["state_dict"])
    keys = {key.replace("_orig_mod.", ""): key for key in weights}
    tied: dict[tuple[Any, ...], list[str]] = {}
    for key, value in weights.items():
        if isinstance(value, Tensor):
            tied.setdefault(_place(value, key), []).append(key)
    raw = {}
    for name, value in average.items():
        old = raw[name] = weights[keys[name]]
        new = value.to(old)
        weights.update(dict.fromkeys(tied[_place(old, keys[name])], new))
    checkpoint["state_dict"] = weights
    return raw


def _place(value: Tensor, key: str) -> tuple[Any, ...]:
    return (value.data_ptr(), tuple(value.shape), value.stride()) if value.numel() else (key,)


def record(soup: "SoupAverager", *, averaged: bool) -> dict[str, Any]:
    """What a checkpoint says about its weights, in plain values."""
    outcome = soup._outcome
    count = outcome.count if outcome is not None else soup._gathered.taken
    what = f"{count} {'updates' if soup.method in ('ema', 'swa') else 'snapshots'}"
    holds = f"{soup.method} average of {what}" if averaged else f"raw weights; {what} are in the callback's state"
    return {
        "holds": holds,
        "averaged": averaged,
        "method": soup.method,
        "ingredients": list(soup.ingredients),
        "score": soup.score,
        "trace": [asdict(candidate) for candidate in soup.trace],
    }


def average_of_state(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The average that a callback's state holds.

    Returns:
        Averaged tensors by name.

    Raises:
        RuntimeError: If there is none.

    """
    gathered = state["gathered"]
    if state["soup"]:
        return dict(state["soup"])
    if state["method"] == "greedy" and "weights" in gathered:
        raise RuntimeError(
            "SoupAverager: a greedy soup is decided when the fit ends; this state is from before. Take"
            " `greedy_at='snapshot'` to have one all along."
        )
    if gathered.get("average"):
        return {name: value.clone() for name, value in gathered["average"].items()}
    if gathered.get("sums"):
        return {name: value / gathered["count"] for name, value in gathered["sums"].items()}
    shelf = Shelf(None, None)
    if gathered.get("ingredients"):
        shelf.load(gathered)
        return shelf.average()
    raise RuntimeError("SoupAverager: there is no average yet.")
