"""TCM: absolute cosine margins beside any metric loss."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_bool, check_choice, check_number
from lightning_reg.engine.layers.embeddings import Pooling, class_numbers, embeddings
from lightning_reg.engine.technique import StepTechnique
from lightning_reg.metric_learning.tcm_loss.core import margin_terms

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_reg.engine.step import Step

__all__ = ["TCM"]


class TCM(StepTechnique):
    r"""Threshold-consistent margins: pulls cosines of one class up to a margin, pushes those of two below another.

    A metric loss orders pairs; how alike two samples of a class are differs from class to class, so one threshold
    accepts too much here and too little there. Two hinges with absolute margins, over the hard pairs of the batch
    alone, bring all classes into the same range:

    .. math:: \ell + \lambda_+ \operatorname{mean}_{s \in S_+,\, s \le m_+} (m_+ - s) +
        \lambda_- \operatorname{mean}_{s \in S_-,\, s \ge m_-} (s - m_-)

    with the cosines of pairs of one class, :math:`S_+`, and of two, :math:`S_-`. The loss :math:`\ell` stays what your
    ``training_step`` returns, whatever made it: a loss of pytorch-metric-learning, a model that returns its own, a
    formula. :class:`OPIS` measures what this is for.

    Use it where one threshold decides about classes that training has not seen (verification, retrieval), on top of a
    metric loss and with batches of at least two samples per class (a class-balanced sampler). Leave it where only the
    ranking counts, or embeddings are not compared by cosine. Alone it is no loss: it is 0 once all pairs satisfy their
    margin.

    Where the layer is passed several times in a step (two views, an image and its partner), with as many rows as there
    are labels each time, all rows are compared, each with its sample's label; passes without gradient (a teacher) are
    left out. Labels are whole numbers; a batch with mixed labels is refused.

    Source:
        Zhang et al., "Threshold-Consistent Margin Loss for Open-World Deep Metric Learning", ICLR 2024,
        arXiv 2307.04047. The defaults are those of ``ThresholdConsistentMarginLoss`` in pytorch-metric-learning.

    Differs:
        The authors' code was not found; the formula is that of pytorch-metric-learning, which gives the same values.
        Pairs come from all ranks, and the means are over all their hard pairs. A term without hard pairs is 0 with a
        gradient of 0. A feature of zeros has cosine 0 with all others, and no gradient.

    Memory: about ten matrices of the rank's rows by those of all ranks. Under DDP one collective forward and one
    backward, of D + 3 numbers per row, and one of two numbers; every rank must make a loss in every step. With
    ``accumulate_grad_batches`` pairs are found within a micro-batch.

    Args:
        layer: Layer whose output is the embedding, as in ``named_modules()`` (``"embed"``, ``"model.pooler"``).
            Normalised here.
        margin_plus: Cosine that pairs of one class are to reach (m+), in (margin_minus, 1]; sensible: 0.7 to 0.95.
        margin_minus: Cosine that pairs of two classes are to stay below (m-), in [-1, 1]; sensible: 0.2 to 0.6.
        lambda_plus: Weight of the pairs of one class, at least 0; sensible: 0.1 to 5. Neutral: 0, with the other.
        lambda_minus: Weight of the pairs of two classes, at least 0.
        label_key: Entry of the batch with the class number of each sample, ``(B,)``: keys and positions, separated by
            dots (``"labels"``).
        pooling: What counts of an output ``(B, T, D)``: ``"flatten"`` all of it, ``"first"`` the first of T (the class
            token), ``"mean"`` their mean.
        gather: Whether pairs come from all ranks, or each rank's own rows.
        start_step: Number of optimizer steps before the term joins, at least 0.
        loss: Under manual optimization, which of several losses that are handed over it joins: the position.
        name: Tells several instances in one Trainer apart.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[TCM(layer="embed")], logger=False, enable_checkpointing=False)

    """

    def __init__(
        self,
        layer: str,
        margin_plus: float = 0.9,
        margin_minus: float = 0.5,
        lambda_plus: float = 1.0,
        lambda_minus: float = 1.0,
        label_key: str = "1",
        pooling: Pooling = "flatten",
        gather: bool = True,
        start_step: int = 0,
        loss: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(loss=loss, name=name)
        check_number(self, "margin_minus", margin_minus, low=-1, high=1)
        check_number(self, "margin_plus", margin_plus, low=margin_minus, low_open=True, high=1)
        check_number(self, "lambda_plus", lambda_plus, low=0)
        check_number(self, "lambda_minus", lambda_minus, low=0)
        check_number(self, "start_step", start_step, low=0, integer=True)
        check_choice(self, "pooling", pooling, ("flatten", "first", "mean"))
        check_bool(self, "gather", gather)
        check_number(self, "loss", loss, low=0, integer=True, optional=True)
        self.layer, self.label_key, self.pooling, self.gather = layer, label_key, pooling, gather
        self.margin_plus, self.margin_minus = margin_plus, margin_minus
        self.lambda_plus, self.lambda_minus = lambda_plus, lambda_minus
        self.start_step = start_step

    @override
    def describe(self) -> str:
        if not (self.lambda_plus or self.lambda_minus):
            return "lambda_plus=lambda_minus=0: inactive"
        start = f", from step {self.start_step} on" if self.start_step else ""
        return (
            f"{self.layer}, margins {self.margin_minus:g} and {self.margin_plus:g}, lambdas {self.lambda_minus:g} and"
            f" {self.lambda_plus:g}{start}"
        )

    @override
    def is_active(self, step: "Step") -> bool:
        return self.lambda_plus > 0 or self.lambda_minus > 0

    @property
    @override
    def feature_layers(self) -> "Sequence[str]":
        return [self.layer]

    @override
    def step_term(self, step: "Step") -> Tensor | None:
        labels = class_numbers(self, step, self.label_key)
        passes = embeddings(self, step, self.layer, len(labels), self.pooling)
        if step.global_step < self.start_step:
            return None  # after the checks: the first step tells what is wrong
        group = host.data_parallel_group(step.trainer) if self.gather else None
        capacity = None if step.capacity is None else step.capacity * len(passes)
        terms = margin_terms(
            torch.cat(passes), labels.repeat(len(passes)), self.margin_plus, self.margin_minus, group=group,
            capacity=capacity,
        )  # fmt: skip
        if step.is_logging:
            step.log(self, "positive", terms.positive)
            step.log(self, "negative", terms.negative)
            step.log(self, "hard_positives", terms.hard_positives / 2)
            step.log(self, "hard_negatives", terms.hard_negatives / 2)
        return self.lambda_plus * terms.positive + self.lambda_minus * terms.negative
