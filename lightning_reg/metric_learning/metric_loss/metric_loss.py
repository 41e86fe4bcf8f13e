"""MetricLoss: a loss of another library on a layer's output, with what it trains of its own."""

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_bool, check_choice, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.user_functions import user_function
from lightning_reg.engine.layers.embeddings import Pooling, class_numbers, embeddings
from lightning_reg.engine.loss.contrastive import rows_with_labels
from lightning_reg.engine.technique import ModuleTechnique, StepTechnique

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.step import Step

__all__ = ["MetricLoss"]


class MetricLoss(ModuleTechnique, StepTechnique):
    r"""Adds a loss of embeddings and classes, from whatever library, and trains what it has of its own.

    .. math:: \ell + w\, L\bigl(z(x_1), \dots, z(x_B);\, y_1, \dots, y_B\bigr)

    with the output z of a named layer and the class numbers y. Losses with parameters (the class centres of ArcFace,
    the proxies of ProxyNCA) are the reason why this is no line of ``training_step``: their parameters need a place in
    the optimizer, in the checkpoint and in the average over ranks. Here they are the technique's. The module's
    optimizer trains them in a group of its own that nobody sees, with its schedules; they are float32 whatever the
    precision is, so their norm does not overflow in half precision; gradients are averaged over the ranks, also where
    a rank has made none. The module's keys stay as they are, and the loss itself stays what ``training_step`` returns::

        arcface = MetricLoss("embed", "pytorch_metric_learning.losses.ArcFaceLoss",
                             {"num_classes": 100, "embedding_size": 128}, lr_factor=10.0)
        trainer = Trainer(callbacks=[arcface])
        trainer.fit(model, loader)
        arcface.own["criterion"].W  # the centres, after the fit as well

    Use it for a metric loss beside a classifier's, or beside none (``training_step`` may return a zero with gradient).
    Leave it where the loss has no parameters and you can write it into ``training_step``.

    The loss is called as ``criterion(embeddings, labels)``, with float32 embeddings out of autocast, which it
    normalises itself if it wants to, and must give one number. What it keeps in parameters and buffers is saved; what
    it keeps in plain attributes (a queue of past batches) is not.

    Source:
        That of the loss you name. ArcFace: Deng et al., CVPR 2019, arXiv 1801.07698. ProxyNCA: Movshovitz-Attias et
        al., ICCV 2017, arXiv 1703.07464. ``supervised_contrastive_loss``: Khosla et al., NeurIPS 2020, arXiv
        2004.11362, the sum outside the logarithm.

    Differs:
        From pytorch-metric-learning in training: a parameter group and the ``DistributedLossWrapper`` are not needed,
        and rows of all ranks are gathered with gradient to each rank's own part, so that W ranks of batch b train as
        one process of batch W b does.

    Memory: the criterion with its gradients and the optimizer's state of it. With ``gather`` each rank computes the
    loss of the rows of all ranks, after one collective forward and one backward of D + 3 numbers per row, and one host
    sync where there are several; every rank must make a loss in every step.

    Args:
        layer: Layer whose output is the embedding, as in ``named_modules()`` (``"embed"``, ``"model.pooler"``).
        criterion: Import path of the loss: a class of modules (``"pytorch_metric_learning.losses.ArcFaceLoss"``,
            ``"__main__.MyLoss"``), or a function (``"lightning_reg.functional.supervised_contrastive_loss"``).
        criterion_args: What the class is made with, or what the function gets besides, by name.
        weight: Weight of the term (w), at least 0. Neutral: 0.
        label_key: Entry of the batch with the class number of each sample, ``(B,)``: keys and positions, separated by
            dots (``"labels"``).
        pooling: What counts of an output ``(B, T, D)``: ``"flatten"`` all of it, ``"first"`` the first of T (the class
            token), ``"mean"`` their mean.
        gather: Whether the loss is that of the rows of all ranks, or the mean of each rank's own. Without it a loss
            that is a mean over rows (ArcFace) is the same where batches are equal, and one over pairs is not.
        lr_factor: Learning rate of the criterion's parameters, as a multiple of that of the optimizer's first group, at
            least 0. Proxies usually want 10 to 100.
        weight_decay: Their weight decay, at least 0.
        own_optimizer: Position of the optimizer that trains them, if there are several.
        loss: Under manual optimization, which of several losses that are handed over it joins: the position.
        name: Tells several instances in one Trainer apart.
        seed: Seed of the criterion's first parameters.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> contrast = MetricLoss("embed", "lightning_reg.functional.supervised_contrastive_loss", {"temperature": 0.2})
        >>> trainer = Trainer(callbacks=[contrast], logger=False, enable_checkpointing=False)

    """

    def __init__(
        self,
        layer: str,
        criterion: str,
        criterion_args: dict[str, Any] | None = None,
        weight: float = 1.0,
        label_key: str = "1",
        pooling: Pooling = "flatten",
        gather: bool = True,
        lr_factor: float = 1.0,
        weight_decay: float = 0.0,
        own_optimizer: int | None = None,
        loss: int | None = None,
        name: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(loss=loss, name=name, seed=seed)
        check_number(self, "weight", weight, low=0)
        check_choice(self, "pooling", pooling, ("flatten", "first", "mean"))
        check_bool(self, "gather", gather)
        self.train_own(lr_factor, weight_decay, own_optimizer)
        check_number(self, "loss", loss, low=0, integer=True, optional=True)
        if "." not in str(criterion):
            raise ValueError(
                f"MetricLoss: `criterion` must be an import path such as 'my_project.losses.MyLoss', got {criterion!r}."
            )
        self.layer, self.criterion, self.criterion_args, self.weight = layer, criterion, criterion_args, weight
        self.label_key, self.pooling, self.gather = label_key, pooling, gather
        self.lr_factor, self.weight_decay = lr_factor, weight_decay

    @override
    def describe(self) -> str:
        if not self.weight:
            return "weight=0: inactive"
        return f"{self.criterion.rpartition('.')[2]} on {self.layer}, weight={self.weight:g}"

    @override
    def check(self, trainer: "Trainer", module: "LightningModule") -> None:
        self._found(trainer, module)

    def _found(self, trainer: "Trainer", module: "LightningModule") -> Callable[..., Any]:
        return user_function(self.criterion, trainer, module, "MetricLoss(criterion=...)")

    @override
    def is_active(self, step: "Step") -> bool:
        return self.weight > 0

    @property
    @override
    def feature_layers(self) -> "Sequence[str]":
        return [self.layer]

    @override
    def own_modules(self, module: "LightningModule") -> Mapping[str, nn.Module]:
        found, given = self._found(module.trainer, module), self.criterion_args or {}
        if not inspect.isclass(found):
            return {}
        try:
            made = found(**given)
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(
                f"MetricLoss: {self.criterion} cannot be made with criterion_args={given!r}: {error}. It takes"
                f" {inspect.signature(found)}."
            ) from error
        if not isinstance(made, nn.Module):
            raise MisconfigurationException(
                f"MetricLoss(criterion={self.criterion!r}) must name a class of torch modules or a function, found a"
                f" class of {type(made).__name__}."
            )
        return {"criterion": made}

    @override
    def step_term(self, step: "Step") -> Tensor | None:
        labels = class_numbers(self, step, self.label_key)
        passes = embeddings(self, step, self.layer, len(labels), self.pooling)
        rows, labels = torch.cat(passes), labels.repeat(len(passes))
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        with torch.autocast(rows.device.type, enabled=False):  # centres and cosines in float32
            if self.gather:
                group = host.data_parallel_group(step.trainer)
                capacity = None if step.capacity is None else step.capacity * len(passes)
                found, labels = rows_with_labels(rows, labels, group, capacity)
                rows = found.rows
                if found.there is not None and found.ranks > 1:
                    rows, labels = rows[found.there], labels[found.there]
            value = self._loss(step, rows, labels)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            shape = f"{tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise MisconfigurationException(
                f"MetricLoss: {self.criterion} must return one number with a gradient for embeddings"
                f" {tuple(rows.shape)} and labels {tuple(labels.shape)}, returned {shape}. Give it a reduction, or wrap"
                " it in a function of yours."
            )
        return self.weight * value.reshape(())

    def _loss(self, step: "Step", rows: Tensor, labels: Tensor) -> object:
        if "criterion" in self.own.modules:
            return self.own["criterion"](rows, labels)
        return self._found(step.trainer, step.module)(rows, labels, **(self.criterion_args or {}))
