"""Scores of weights by the user's own validation in the middle of a fit, with batch statistics of their own."""

import math
from collections.abc import Callable, Mapping
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_reg.averaging.model_soups._live_weights import LiveWeights, Weights
from lightning_reg.averaging.model_soups.core import reestimate_batchnorm, tracking_layers
from lightning_reg.engine.host import distributed
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.run import passes
from lightning_reg.engine.run.engine import attached_engine
from lightning_reg.engine.run.watching import progress, told

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["Validation", "agreed_score"]


def agreed_score(metrics: Mapping[str, Any], monitor: str, module: "LightningModule") -> float:
    """The metric to decide by.

    Args:
        metrics: What validation logged.
        monitor: Name of the metric.
        module: The user's.

    Returns:
        The same on all ranks: the mean, if the module logged it without ``sync_dist``.

    Raises:
        MisconfigurationException: If validation did not log it.

    """
    if monitor not in metrics:
        raise MisconfigurationException(
            f"SoupAverager(monitor={monitor!r}): validation logged no such metric, but"
            f" {sorted(name for name in metrics if not name.startswith('reg/')) or 'none at all'}."
        )
    score = float(metrics[monitor])
    if distributed.world_size() == 1:
        return score
    scores = distributed.all_gather(torch.tensor(score, dtype=torch.float64, device=module.device)).tolist()
    return score if len(set(scores)) == 1 else sum(scores) / len(scores)


class Validation:
    """Runs the user's validation on weights that are put into the module for it.

    Args:
        trainer: A Trainer that fits.
        module: The user's.
        live: Its averaged tensors.
        score_by: Chooses the metric that scores, of those that validation has logged.
        bn_update_batches: Training batches for batch statistics; ``None`` for an epoch.

    """

    def __init__(
        self,
        trainer: "Trainer",
        module: "LightningModule",
        live: LiveWeights,
        score_by: Callable[[Mapping[str, Any]], str],
        bn_update_batches: int | None,
    ) -> None:
        self._trainer, self._module, self._live = trainer, module, live
        self._score_by, self._bn_update_batches = score_by, bn_update_batches

    @property
    def estimates(self) -> bool:
        """Whether there are batch statistics to estimate."""
        return self._bn_update_batches != 0 and bool(tracking_layers(self._module))

    def own_score(self, weights: Weights | None = None, *, shown: str = "") -> float:
        """Score of weights as they are; of the module's own for ``None``. ``shown``: what the progress bar says."""
        if weights is None:
            metrics = passes.validation_metrics(self._trainer, shown)
            return agreed_score(metrics, self._score_by(metrics), self._module)
        with self._live.exchanged(weights):
            return self.own_score()

    def score_of(self, weights: Weights | None) -> float:
        """Score of weights with batch statistics estimated for them; of the module's own, as they are, for ``None``."""
        if weights is None:
            return self.own_score()
        with self._live.exchanged(weights):
            self._reestimate()
            return self.own_score()

    def settle(self, average: dict[str, Tensor], *, rescore: bool) -> tuple[float | None, float | None]:
        """Estimates the batch statistics of an average, in it.

        Args:
            average: Gets the statistics.
            rescore: Whether to score it again with them.

        Returns:
            Its scores before and after; ``None`` where it was not scored, the first if the metric is not logged.

        """
        logged = self._trainer.callback_metrics if self._trainer.enable_validation else {}
        scored = self._score_by(logged) in logged
        with self._live.exchanged(average):
            before = self.own_score(shown="SoupAverager: validation") if scored else None
            self._reestimate(shown=True)
            for name, tensor in self._live.tensors.items():  # where values were copied in, so are the statistics back
                average[name].copy_(tensor)
            after = self.own_score(shown="SoupAverager: validation") if scored and rescore else None
        return before, after

    def _reestimate(self, *, shown: bool = False) -> None:
        """Estimates batch statistics anew on training batches, through the module's own step."""
        if not self.estimates:
            return
        trainer, module, steps = self._trainer, self._module, count()
        # The counters are of training: where the momentum is None they are the weight of its next batch.
        counters = [layer.num_batches_tracked for layer in tracking_layers(module)]
        values = [None if counter is None else counter.clone() for counter in counters]
        most = min(self._bn_update_batches or math.inf, trainer.num_training_batches)
        total = None if most == math.inf else most
        with (
            attached_engine(trainer).training_batches() as batches,
            progress(trainer, "SoupAverager: batch statistics", total if shown else 0) as advance,
        ):
            replay = told(lambda b: passes.replay_step(trainer, module, b, next(steps)), advance)
            reestimate_batchnorm(module, batches, self._bn_update_batches, replay)
        for counter, value in zip(counters, values, strict=True):
            if counter is not None and value is not None:
                counter.copy_(value)
