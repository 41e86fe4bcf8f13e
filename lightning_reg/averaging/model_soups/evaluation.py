"""Held-out scores of state dicts by the user's own validation."""

from collections.abc import Iterable
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_reg.averaging.model_soups.core import reestimate_batchnorm, tracking_layers
from lightning_reg.engine.host.generators import isolated_randomness
from lightning_reg.engine.host.lightning import metrics_kept, on_module_device
from lightning_reg.engine.host.names import plain_name
from lightning_reg.engine.run.passes import replay_step

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer

__all__ = ["TrainerEvaluation"]


class TrainerEvaluation:
    """Scores a state dict by ``trainer.validate``; the ``evaluate`` of ``make_soup`` and ``greedy_soup``.

    Before the score is taken the statistics of batch-norm layers are estimated anew, by the module's own
    ``training_step``, if there are such layers and ``train_batches``. Choose on data that was not trained on.

    Args:
        trainer: Runs the validation. Give it ``logger=False`` and no checkpoints.
        model: Gets the weights.
        monitor: Name of the metric that its validation logs.
        dataloaders: For ``trainer.validate``.
        datamodule: In their place.
        train_batches: A loader of training batches for batch statistics; ``None`` leaves the statistics averaged.
        bn_update_batches: How many of them, at least 1; ``None`` for all.

    """

    def __init__(
        self,
        trainer: "Trainer",
        model: "LightningModule",
        monitor: str,
        dataloaders: Iterable[Any] | None = None,
        datamodule: "LightningDataModule | None" = None,
        train_batches: Iterable[Any] | None = None,
        bn_update_batches: int | None = None,
    ) -> None:
        self.trainer, self.model, self.monitor = trainer, model, monitor
        self.dataloaders, self.datamodule = dataloaders, datamodule
        self.train_batches, self.bn_update_batches = train_batches, bn_update_batches
        self.scores_before_batch_norm: list[float] = []

    def __call__(self, state_dict: dict[str, Any]) -> float:
        """The score.

        Args:
            state_dict: Must fit the model exactly.

        Returns:
            The monitored metric.

        Raises:
            ValueError: If validation did not log it.

        """
        self._load(state_dict)
        if self.train_batches is not None and tracking_layers(self.model):
            self.scores_before_batch_norm.append(self._validate())
            self._reestimate()
        return self._validate()

    def settle(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The weights as they are scored: with the statistics estimated anew.

        Args:
            state_dict: Weights.

        Returns:
            Them, or a copy with other statistics.

        """
        if self.train_batches is None or not tracking_layers(self.model):
            return state_dict
        self._load(state_dict)
        self._reestimate()
        estimated = {plain_name(name): value for name, value in self.model.state_dict().items()}
        return {
            key: value.clone() if isinstance(value := estimated.get(key, old), Tensor) and _is_statistic(key) else old
            for key, old in state_dict.items()
        }

    def _load(self, state_dict: dict[str, Any]) -> None:
        own = {plain_name(key): key for key in self.model.state_dict()}  # with `_orig_mod.` where it is compiled
        self.model.load_state_dict({own.get(plain_name(key), key): value for key, value in state_dict.items()})

    def _validate(self) -> float:
        self.trainer.validate(self.model, self.dataloaders, datamodule=self.datamodule, verbose=False)
        metrics = self.trainer.callback_metrics
        if self.monitor not in metrics:
            raise ValueError(
                f"TrainerEvaluation: validation logged no {self.monitor!r}, but {sorted(metrics) or 'nothing'}."
            )
        return float(metrics[self.monitor])

    def _reestimate(self) -> None:
        steps, model = count(), self.model

        def run(batch: Any) -> None:  # noqa: ANN401 # the user's
            with torch.no_grad():
                replay_step(self.trainer, model, on_module_device(model, batch), next(steps))

        with isolated_randomness(), metrics_kept(model):
            reestimate_batchnorm(model, self.train_batches or (), self.bn_update_batches, run)


def _is_statistic(key: str) -> bool:
    return key.endswith(("running_mean", "running_var"))
