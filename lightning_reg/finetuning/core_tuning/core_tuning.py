"""Core-tuning: cross-entropy on mixed features, and a contrast with hard pairs that are made by mixing."""

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from lightning_reg.engine.data.blend import draw_lam
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_bool, check_choice, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.layers.embeddings import Pooling, embeddings
from lightning_reg.engine.loss.contrastive import rows_in_turn, unit_rows
from lightning_reg.engine.run.phases import Member, phases_of
from lightning_reg.engine.technique import LossTechnique, ModuleTechnique
from lightning_reg.engine.weights.strategies import check_whole
from lightning_reg.finetuning._head import linear_head
from lightning_reg.finetuning.core_tuning.core import (
    MixedRows,
    focal_contrastive_loss,
    foreign_rows,
    hard_pairs,
    mix_pairs,
    positive_pairs,
    two_label_losses,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.loss.call import LossCall
    from lightning_reg.engine.step import Step

__all__ = ["CoreTuning"]


class CoreTuning(ModuleTechnique, LossTechnique):
    r"""Fine-tunes with hard pairs that are mixed of features, by a contrast and by the classifier.

    Of each sample's feature h, its least similar companion of the class and its most similar stranger give a hard
    positive, and a random stranger gives a semi-hard negative:

    .. math:: h^+ = \lambda h_{\mathrm{hp}} + (1 - \lambda) h_{\mathrm{hn}}, \quad h^- = (1 - \mu) h + \mu h_r,
        \quad \lambda, \mu \sim \mathrm{Beta}(\alpha, \alpha),\ \mu \ge \mu_0

    with labels mixed alike. The loss of the step becomes the cross-entropy of the head on all three rows of each
    sample, which smooths the border between classes, plus a supervised contrast of their projections in which pairs
    that are close already count less:

    .. math:: \frac1{3n} \sum_i \operatorname{CE}(g(\tilde h_i), \tilde y_i) -
        \frac{\eta}{n'} \sum_i \frac1{|P_i|} \sum_{j \in P_i} (1 - p_{ij}) \log p_{ij}

    The projection, two layers, is the technique's own; nothing is left of it at inference.

    Use it to fine-tune an encoder that was pretrained by contrast, for classification with several samples of a class
    in a batch (64 or more). Leave it for tiny batches or hundreds of classes in one, where hardly anybody has a
    companion; a cross-entropy with a plain supervised contrast (``MetricLoss``) has most of it. On few digits and a
    small perceptron (``benchmarks/effects/core_tuning.py``) differences are about one standard deviation.

    It is of whole images: maps of labels (segmentation) are refused. A mixed batch (Mixup, CutMix) is refused too.

    Source:
        Zhang et al., "Unleashing the Power of Contrastive Self-Supervised Visual Models via Contrast-Regularized
        Fine-Tuning", NeurIPS 2021, arXiv 2102.06605; code: Vanint/Core-tuning.

    Differs:
        ``variant="paper"`` is our reading of the paper's method, whose denominators and pairs its code does not have:
        rows are positives whose larger share is of one class, a semi-hard negative is mixed with another class, and the
        contrast is divided by the number of positives. ``variant="released"`` computes what the code does: no gradient
        reaches the encoder from the samples themselves; zeros stand for what is no pair when hard positives are looked
        for, so of features that are not negative hardly any is one; any sample is mixed in for a negative; only equal
        mixed labels are positives; the contrast is divided by 3 n, so its ``eta`` is on another scale. In both, classes
        are compared and not coded as sums of powers of 10, which overflow beyond 18 classes. Pairs come from all ranks.

    Memory: the projection (D by D and D by its size) with its gradients and optimizer state; some ten matrices of 3 n
    by 3 n. Under DDP one collective forward and one backward of D + 3 numbers per row and a host sync; each rank
    computes the contrast of all rows. With ``accumulate_grad_batches`` pairs are found within a micro-batch.

    Args:
        layer: Layer whose output is the feature that the head gets, as in ``named_modules()``.
        head: The linear layer behind it, which puts out the logits of the classes.
        eta: Weight of the contrast, at least 0. Authors' code: 0.1 with its own scale; sensible: 0.1 to 10.
        alpha: Parameter of the Beta distribution, above 0. Paper: 1.
        min_share: The least share of the stranger in a semi-hard negative (mu_0), in [0, 1]. Paper: 0.8.
        temperature: Divides the cosines, above 0. Paper: 0.07.
        projection_size: Numbers in a projection, at least 1. Paper: 256.
        focal: Whether pairs that are close already count less.
        smooth_classifier: Whether the head trains on mixed rows too, in place of your loss; else that one stays.
            Neutral: ``False`` with ``eta=0``.
        variant: ``"paper"`` (our reading) or ``"released"`` (the authors' code).
        gather: Whether pairs come from all ranks, or each rank's own rows.
        pooling: What the head gets of an output ``(B, T, D)``: ``"flatten"`` all of it, ``"first"`` the first of T (the
            class token), ``"mean"`` their mean.
        lr_factor: Learning rate of the projection, as a multiple of that of the optimizer's first group, at least 0.
        weight_decay: Its weight decay, at least 0. Paper: 1e-4, that of all.
        own_optimizer: Position of the optimizer that trains it, if there are several.
        loss: Which loss call is the classification, if there are several.
        name: Tells several instances in one Trainer apart.
        seed: Seed of its draws and of the projection's first weights.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> technique = CoreTuning(layer="model.pooler", head="model.fc")
        >>> trainer = Trainer(max_epochs=10, callbacks=[technique], logger=False, enable_checkpointing=False)

    """

    def __init__(
        self,
        layer: str,
        head: str,
        eta: float = 1.0,
        alpha: float = 1.0,
        min_share: float = 0.8,
        temperature: float = 0.07,
        projection_size: int = 256,
        focal: bool = True,
        smooth_classifier: bool = True,
        variant: Literal["paper", "released"] = "paper",
        gather: bool = True,
        pooling: Pooling = "flatten",
        lr_factor: float = 1.0,
        weight_decay: float = 0.0,
        own_optimizer: int | None = None,
        loss: int | str | None = None,
        name: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(loss=loss, name=name, seed=seed)
        check_number(self, "eta", eta, low=0)
        check_number(self, "alpha", alpha, low=0, low_open=True)
        check_number(self, "min_share", min_share, low=0, high=1)
        check_number(self, "temperature", temperature, low=0, low_open=True)
        check_number(self, "projection_size", projection_size, low=1, integer=True)
        for argument, flag in (("focal", focal), ("smooth_classifier", smooth_classifier), ("gather", gather)):
            check_bool(self, argument, flag)
        check_choice(self, "variant", variant, ("paper", "released"))
        check_choice(self, "pooling", pooling, ("flatten", "first", "mean"))
        self.train_own(lr_factor, weight_decay, own_optimizer)
        self.layer, self.head, self.eta, self.alpha, self.min_share = layer, head, eta, alpha, min_share
        self.temperature, self.projection_size, self.focal = temperature, projection_size, focal
        self.smooth_classifier, self.variant, self.gather, self.pooling = smooth_classifier, variant, gather, pooling
        self.lr_factor, self.weight_decay = lr_factor, weight_decay

    @override
    def describe(self) -> str:
        if not (self.eta or self.smooth_classifier):
            return "eta=0, smooth_classifier=False: inactive"
        parts = [f"eta={self.eta:g}"] + ["smooth classifier"] * self.smooth_classifier
        return f"{self.layer} to {self.head}, {', '.join(parts)}, as {self.variant}"

    @override
    def check(self, trainer: "Trainer", module: "LightningModule") -> None:
        check_whole(self, trainer, "reads")

    @override
    def conflict_with(self, other: Member) -> str | None:
        if self.smooth_classifier and "change_targets" in phases_of(other):
            return (
                f"its classifier is trained on mixed rows with the given labels, and those that {type(other).__name__}"
                " puts in their place would be lost. Remove one of them, or write `smooth_classifier=False`."
            )
        arguments = {key: value for key, value in vars(other).items() if key[0] != "_"}
        edits = {"edit_inputs", "edit_features"} & set(phases_of(other))
        if not (self.smooth_classifier and edits and self.head in tree_leaves(arguments)):
            return None
        return (
            f"the head {self.head!r} gets mixed features from CoreTuning(smooth_classifier=True), past what"
            f" {type(other).__name__} does at it. Write smooth_classifier=False, or remove one of them."
        )

    @override
    def is_active(self, step: "Step") -> bool:
        return self.eta > 0 or self.smooth_classifier

    @property
    @override
    def feature_layers(self) -> "Sequence[str]":
        return [self.layer]

    @override
    def own_modules(self, module: "LightningModule") -> "Mapping[str, nn.Module]":
        if not self.eta:
            return {}
        width = linear_head(self, module, self.layer, self.head).in_features
        layers = nn.Linear(width, width), nn.ReLU(), nn.Linear(width, self.projection_size)
        return {"projection": nn.Sequential(*layers)}

    @override
    def change_losses(self, call: "LossCall") -> Tensor | None:
        if not self.smooth_classifier:
            return None
        if call.arguments.get("label_smoothing", 0.0):
            raise MisconfigurationException(
                f"CoreTuning: {call} has `label_smoothing`, and the smooth classifier's labels are mixed in its place."
                " Leave it out, or write `smooth_classifier=False`."
            )
        mixed, own = self._mixed(call)
        head = linear_head(self, call.step.module, self.layer, self.head, mixed.features.shape[1])
        with torch.autocast(mixed.features.device.type, enabled=False):
            bias: Tensor | None = getattr(head, "bias", None)
            bias = None if bias is None else bias.to(mixed.features)
            logits = F.linear(mixed.features, head.weight.to(mixed.features), bias)
            return two_label_losses(logits, mixed).view(3, -1)[:, own].mean(0)

    @override
    def loss_term(self, call: "LossCall") -> Tensor | None:
        if not self.eta:
            return None
        mixed, _ = self._mixed(call)
        released = self.variant == "released"
        with torch.autocast(mixed.features.device.type, enabled=False):
            projected = unit_rows(self.own["projection"](mixed.features))
        known = (mixed.first[: len(mixed.first) // 3] >= 0).repeat(3)
        contrast = focal_contrastive_loss(
            projected,
            positive_pairs(mixed, released=released),
            self.temperature,
            focal=self.focal,
            keys=known,
            per_positive=not released,
        )
        if call.step.is_logging:
            call.step.log(self, "contrast", contrast)
        return self.eta * contrast

    def _mixed(self, call: "LossCall") -> tuple[MixedRows, Tensor]:
        """Rows of all ranks and what is mixed of them; and which of the n are this rank's own."""
        step = call.step
        if self not in step.notes:
            step.notes[self] = self._mix(call)
        mixed: tuple[MixedRows, Tensor] = step.notes[self]
        return mixed

    def _mix(self, call: "LossCall") -> tuple[MixedRows, Tensor]:
        step, released = call.step, self.variant == "released"
        if call.kind != "row":
            raise MisconfigurationException(
                f"CoreTuning contrasts whole samples, each with one class, and {call} has a class for each"
                f" {'pixel' if call.kind == 'map' else 'position'} of a sample. There is no per-pixel form of it here:"
                " name a loss of whole images by `loss=...`, or leave it out."
            )
        rows = embeddings(self, step, self.layer, call.batch_size, self.pooling)[0]
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        group = host.data_parallel_group(step.trainer) if self.gather else None
        features, labels, own = rows_in_turn(rows, call.labels, group, step.capacity)
        generator, count, device = self.generator(step, same_on_ranks=group is not None), len(features), rows.device
        shares = torch.as_tensor(draw_lam(self.alpha, generator, 2 * count)).view(2, count)
        draws = torch.randperm(count, generator=generator) if released else torch.rand(count, generator=generator)
        shares, draws = (drawn.to(device, non_blocking=True) for drawn in (shares.to(rows.dtype), draws))
        partners = draws if released else foreign_rows(labels, draws)
        pairs = hard_pairs(features, labels, released=released)
        at_least = shares[1].clamp(min=self.min_share)
        return mix_pairs(features, labels, pairs, partners, shares[0], at_least, detach=released), own
