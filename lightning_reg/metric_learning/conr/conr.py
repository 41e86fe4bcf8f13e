r"""ConR: a contrastive regularizer for regression whose targets are imbalanced."""

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.data.entries import find_entry, replace_entry
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_bool, check_choice, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.generators import own_randomness
from lightning_reg.engine.host.user_functions import user_function
from lightning_reg.engine.loss.regression import features_per_row, regression_pairs
from lightning_reg.engine.technique import BatchTechnique, LossTechnique
from lightning_reg.metric_learning.conr.core import Distance, Push, conr_rows, label_distance

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.loss.call import LossCall
    from lightning_reg.engine.step import Step

__all__ = ["ConR"]


_DISTANCES: dict[str, Distance] = {
    "l1": label_distance,
    "l2": partial(label_distance, kind="l2"),
    "max": partial(label_distance, kind="max"),
}
_VIEWS = {"two": 2, "one": 1, "dropout": 1, "none": 0}


class ConR(BatchTechnique, LossTechnique):
    r"""ConR: pulls features of similar labels together, and apart what is mistaken for one another, in regression.

    Under a skewed continuous label (age, depth, price) rare labels collapse onto common ones. Of the rows of a batch
    those with similar labels attract each other in feature space; a pair repels only if the labels differ while the
    predictions agree. The repulsion grows with the distance of the labels and with the weight of the row.

    .. math:: \ell + \frac{\beta}{n} \sum_i \frac{q_i}{|P_i|} \sum_{p \in P_i} -\log
        \frac{e^{s_{ip}}}{\sum_{p' \in P_i} e^{s_{ip'}} + \sum_{j \in Q_i} q_i\, e^{\eta d_{ij}}\, e^{s_{ij}}}

    with the cosine over the temperature :math:`s_{ij}`, positives :math:`P_i` (labels within the window) and negatives
    :math:`Q_i` (labels apart, predictions within it); rows without a positive or a negative add 0. Early in training
    nearly every pair far apart is a negative, late hardly any is: the term fades, as it should.

    As in the paper, the views pass the network and only they enter the term, while your loss is that of the batch
    alone. They pass beside the batch in one call of ``training_step``: entries of the batch with a row per sample have
    k times as many there (k = 3 with two views), and metrics you compute in ``training_step`` see the views too. Every
    loss function of torch there is narrowed to the batch: means stay, losses by ``reduction="none"`` are repeated, and
    sums multiplied by k. Losses written by hand without :class:`LossMixin` see the views.

    Use it on top of any regression loss or weighting, with a label-preserving augmentation. Leave it when targets are
    balanced, when batches are tiny, and where labels have no meaningful distance. Tune ``beta`` first: too large is
    harmful. Expect little on small data: on digits as numbers the error was about that of the plain loss.

    Source:
        Keramati, Meng and Evans, "ConR: Contrastive Regularizer for Deep Imbalanced Regression", ICLR 2024,
        arXiv 2309.06651; formulas and constants are those of the authors' code.

    Differs:
        Batch and views share one pass, and so batch norm's statistics; the authors' code makes two passes, the views
        first. The authors' constant in the denominator is there only with ``compat``. Rows without a positive add 0
        (NaN there), and a feature of zeros gets no gradient. The push grows with the distance of the labels, as in the
        code; the paper's abstract speaks of similarity. The IMDB-WIKI script adds its term twice, so its weight is
        twice its ``beta``; the AgeDB function sets the temperature to 0.07, whatever the command line says. Negatives
        come from all ranks.

    Memory: about ten float32 matrices of n rows by those of all ranks, n = 2B with two views. Under DDP one collective
    forward and one backward, of D + 2K + 1 numbers per row; every rank must make a loss in every step. The extra views
    triple the network's cost. With ``accumulate_grad_batches`` pairs are found within a micro-batch.

    Args:
        layer: Layer whose output is the feature, before the regressor, as in ``named_modules()`` (``"net.avgpool"``).
            Flattened per row.
        window: Labels this close count as similar (w), in units of your labels (standardised ones too), at least 0: the
            noise of the label. Paper: 1 (years; AgeDB, IMDB-WIKI), 0.2 (m; NYUD2). Neutral: the range of the labels, at
            which there are no negatives.
        beta: Weight of the term, at least 0. Authors' code: 4 (AgeDB), 8 in effect (IMDB-WIKI), 0.2 (NYUD2).
            Neutral: 0.
        temperature: Temperature of the cosines (t), above 0. Authors' code: 0.07 (ages), 0.2 (NYUD2).
        eta: How fast the push grows with the distance of the labels (e), at least 0; sensible: 0.5 to 2 over the range
            of the labels. Authors' code: 0.01 (ages), 0.2 (NYUD2).
        views: ``"two"``: two augmented views (paper); ``"one"``: the batch and one augmented view; ``"dropout"``: the
            batch twice, which differ by the network's own dropout; ``"none"``: the rows as they are (NYUD2, and batches
            that hold two views already: rows of the loss, or passes of the network, one after the other).
        augment: Your label-preserving augmentation, by name: ``"augment"``, a method of your LightningModule or
            datamodule, or ``"my_project.transforms.augment"``, a function to import (``"__main__.augment"`` in a
            script). Called once per view as ``augment(x)`` with the whole batch's input on its device, without
            gradient; what it draws from the global random states of torch, numpy and Python is the technique's own.
        input_key: Entry of the batch that is augmented: keys and positions, separated by dots (``"image"``); ``""`` for
            a batch that is the input.
        weights: Entry of the batch with the weight of each sample (q), above 0, with mean 1 over the data, as
            ``inverse_density_weights`` gives. ``None``: 1 (authors' default).
        distance: Distance of labels and predictions that are vectors: ``"l1"``, ``"l2"``, ``"max"``, or an import path
            of a function from ``(n, K)`` and ``(m, K)`` to ``(n, m)``.
        push: ``"exponential"`` (ages), or ``"linear"``, the authors' form for depth maps, see ``conr_loss``. A map of
            labels counts by its mean.
        compat: Adds ``n - |P_i|`` to the denominator, as the authors' code does.
        gather: Whether negatives and positives come from all ranks, or each rank's own rows (authors' code).
        warmup_steps: Optimizer steps in which ``beta`` rises from 0, at least 0. Paper: 0.
        loss: Which loss call it works on, if there are several: position, ``"last"``, function name, or
            ``"model.py:42"``.
        name: Tells several instances in one Trainer apart.
        seed: Seed of the augmentation's draws.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> conr = ConR(layer="backbone.avgpool", window=1.0, beta=1.0, augment="augment")
        >>> trainer = Trainer(max_epochs=90, callbacks=[conr], logger=False, enable_checkpointing=False)

    """

    def __init__(
        self,
        layer: str,
        window: float,
        beta: float = 1.0,
        temperature: float = 0.07,
        eta: float = 0.01,
        views: Literal["two", "one", "dropout", "none"] = "two",
        augment: str | None = None,
        input_key: str = "0",
        weights: str | None = None,
        distance: str = "l1",
        push: Push = "exponential",
        compat: bool = False,
        gather: bool = True,
        warmup_steps: int = 0,
        loss: int | str | None = None,
        name: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(loss=loss, name=name, seed=seed)
        check_number(self, "window", window, low=0)
        check_number(self, "beta", beta, low=0)
        check_number(self, "temperature", temperature, low=0, low_open=True)
        check_number(self, "eta", eta, low=0)
        check_number(self, "warmup_steps", warmup_steps, low=0, integer=True)
        check_bool(self, "compat", compat)
        check_bool(self, "gather", gather)
        check_choice(self, "views", views, tuple(_VIEWS))
        check_choice(self, "push", push, ("exponential", "linear"))
        if "." not in distance:
            check_choice(self, "distance", distance, tuple(_DISTANCES))
        if (views in ("two", "one")) != (augment is not None):
            problem = "must be given" if augment is None else "has no use"
            raise ValueError(
                f"ConR: `augment` {problem} with views={views!r}, got {augment!r}. Augmented views need the name of"
                ' your augmentation, and views="dropout" or "none" need none.'
            )
        self.layer, self.window, self.beta, self.temperature, self.eta = layer, window, beta, temperature, eta
        self.views, self.augment, self.input_key, self.weights = views, augment, input_key, weights
        self.distance, self.push, self.compat, self.gather = distance, push, compat, gather
        self.warmup_steps = warmup_steps

    @override
    def describe(self) -> str:
        if not self.beta:
            return "beta=0: inactive"
        views = f"views={self.views}" + (f" by {self.augment}" if self.augment else "")
        ramp = f", rising over {self.warmup_steps} steps" if self.warmup_steps else ""
        return (
            f"{self.layer}, window={self.window:g}, beta={self.beta:g}{ramp}, temperature={self.temperature:g}; {views}"
        )

    @override
    def check(self, trainer: "Trainer", module: "LightningModule") -> None:
        if self.augment is not None:
            user_function(self.augment, trainer, module, "ConR(augment=...)")
        if "." in self.distance:
            user_function(self.distance, trainer, module, "ConR(distance=...)")

    @override
    def is_active(self, step: "Step") -> bool:
        return self._beta(step) > 0

    @override
    def waits(self, step: "Step") -> bool:
        return self.beta > 0

    @override
    def check_call(self, call: "LossCall") -> None:
        regression_pairs(call)

    @property
    @override
    def feature_layers(self) -> "Sequence[str]":
        return [self.layer]

    @override
    def extra_views(self, batch: Any, step: "Step") -> "Sequence[Any]":
        count = _VIEWS[self.views]
        if self.augment is None:
            return [batch] * count
        augment = user_function(self.augment, step.trainer, step.module, "ConR(augment=...)")
        x = find_entry(batch, self.input_key, "input_key")
        seed = int(torch.randint(2**32, (), generator=self.generator(step)))
        with own_randomness(seed), torch.no_grad():
            return [replace_entry(batch, self.input_key, augment(x)) for _ in range(count)]

    @override
    def loss_term(self, call: "LossCall") -> Tensor | None:
        predictions, targets = regression_pairs(call)
        features = features_per_row(call.step.passes.get(self.layer, ()), len(predictions), self.layer, call.input)
        if not features.requires_grad:
            raise MisconfigurationException(
                f"ConR: the output of layer {self.layer!r} has no gradient, so nothing would be learned from it."
            )
        weights, views = self._weights(call.step, len(targets)), 1
        if call.views is not None:
            with_batch = self.views != "two"
            features, predictions = (
                call.views.of(self, rows, with_batch=with_batch) for rows in (features, predictions)
            )
            views = len(predictions) // len(targets)
            targets = targets.repeat(views, 1)
            weights = None if weights is None else weights.repeat(views)
        group = host.data_parallel_group(call.step.trainer) if self.gather else None
        capacity = None if call.step.capacity is None else call.step.capacity * call.rows_per_sample * views
        rows = conr_rows(
            features, targets, predictions, self.window, self.temperature, self.eta, weights, self.compat, self.push,
            self._distance(call.step), group, capacity,
        )  # fmt: skip
        if call.step.is_logging:
            call.step.log(self, "anchors", rows.anchors.float().mean())
            call.step.log(self, "negatives", rows.negatives.float().mean())
        return self._beta(call.step) * rows.losses.sum()

    def _beta(self, step: "Step") -> float:
        return self.beta * min(1.0, step.global_step / self.warmup_steps) if self.warmup_steps else self.beta

    def _distance(self, step: "Step") -> Distance:
        if "." in self.distance:
            function: Distance = user_function(self.distance, step.trainer, step.module, "ConR(distance=...)")
            return function
        return _DISTANCES[self.distance]

    def _weights(self, step: "Step", rows: int) -> Tensor | None:
        if self.weights is None:
            return None
        weights = find_entry(step.batch, self.weights, "weights")
        if not isinstance(weights, Tensor) or weights.numel() != rows:
            shape = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise MisconfigurationException(
                f"ConR(weights={self.weights!r}) must name a tensor with a weight for each of {rows} predictions, found"
                f" {shape}."
            )
        return weights.detach().float().flatten()
