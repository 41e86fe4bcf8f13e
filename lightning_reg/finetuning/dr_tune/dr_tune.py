"""DR-Tune: the head must also classify what the encoder made of images before fine-tuning."""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.engine.host import distributed
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_bool, check_choice, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.layers.embeddings import Pooling, class_numbers, embeddings, pooled
from lightning_reg.engine.loss.contrastive import rows_in_turn
from lightning_reg.engine.networks.records import Wanted, record
from lightning_reg.engine.networks.references import PLACES, Reference, ReferenceTechnique
from lightning_reg.engine.technique import StepTechnique
from lightning_reg.finetuning._head import linear_head
from lightning_reg.finetuning.dr_tune.core import FeatureBank, calibrate, dr_loss, kabsch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_reg.engine.step import Step

__all__ = ["DRTune"]


class DRTune(ReferenceTechnique, StepTechnique):
    r"""Fine-tunes an encoder freely, while its head must also classify features of the encoder as it was.

    A bank holds, of the last K images, what the encoder made of them before fine-tuning, :math:`v^p`, and what it made
    of them in their own step, :math:`v^d`. The former are brought to the latter by a rotation and a translation for
    each class (``calibrate`` in ``lightning_reg.functional``), and the head's cross-entropy on them joins the loss:

    .. math:: \ell + \frac{\lambda}{K} \sum_k \operatorname{CE}(g(\hat v_k), y_k)

    No gradient of the second term reaches the encoder, which nothing ties to its start.

    Use it to fine-tune a good pretrained encoder for classification with few labelled images. Leave it where the
    pretrained features do not separate the classes somewhat, or where a second forward pass is too dear. On digits and
    a small perceptron (``benchmarks/effects/dr_tune.py``) it cost accuracy with two images of a class, and with five
    no gain is shown beyond the spread of seeds: compare.

    Source:
        Zhou, Chen, Huang, "DR-Tune: Improving Fine-tuning of Pretrained Visual Models by Distribution Regularization
        with Semantic Calibration", ICCV 2023, arXiv 2308.12058; code: weeknan/DR-Tune.

    Differs:
        The term is added as in the paper's formula; the authors' code takes one mean over B + K rows, which is this
        with ``weight=K / B`` times B / (B + K), and has learning rates for that. Between two rotations the last one
        stays; in the code there is none in nine of ten steps. The pass that fills the bank before the first step takes
        each sample once, and of more than K those that are drawn; the code keeps the last K of a shuffled epoch. The
        bank holds rows of all ranks, and batches need not divide it.

    Memory: the module's parameters and buffers once more (see ``reference``), and ``2 * bank_size * D`` numbers; a
    forward pass of the first network per step. A rotation decomposes a ``(D, D)`` matrix: about a second on a CPU for
    D = 2048, with a host sync on a GPU. Under DDP two collectives per step, one of 2 D + 2 numbers per row.

    Args:
        layer: Layer whose output is the features that the head gets, as in ``named_modules()``.
        head: The linear layer behind it, which puts out the logits of the classes.
        weight: lambda, at least 0. Neutral: 0. Paper: K / B with a head that learns 1 + K / B times as fast; sensible
            beside one learning rate: 1 to 4.
        bank_size: K, at least 1. Paper: 2048; sensible: several images for each class, no more than there are.
        calibration: Whether the first features are brought to the present ones, or are taken as they were.
        warm_up: Whether the bank is filled with what the first encoder makes of the training data, in a pass before
            the first step; else it fills in the first steps. Such a pass needs a DataLoader with sample indices.
        rotate_every: Batches between two rotations, at least 0; 0: none. Authors' code: 10.
        label_key: Entry of the batch with the class number of each sample, ``(B,)``: keys and positions, separated by
            dots (``"labels"``).
        pooling: What the head gets of an output ``(B, T, D)``: ``"flatten"`` all of it, ``"first"`` the first of T (the
            class token), ``"mean"`` their mean.
        reference: Where the first weights lie: ``"device"``, ``"cpu"`` (copied there in each step), ``"bfloat16"``
            (half the bytes, rounded) or ``"cpu_bfloat16"``.
        name: Tells several instances in one Trainer apart.
        seed: Of the draw among more samples than the bank holds.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> technique = DRTune(layer="model.pooler", head="model.fc")
        >>> trainer = Trainer(max_epochs=10, callbacks=[technique], logger=False, enable_checkpointing=False)

    """

    without_prompts = True

    def __init__(
        self,
        layer: str,
        head: str,
        weight: float = 1.0,
        bank_size: int = 2048,
        calibration: bool = True,
        rotate_every: int = 10,
        warm_up: bool = True,
        label_key: str = "1",
        pooling: Pooling = "flatten",
        reference: str = "device",
        name: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(name=name, seed=seed)
        check_number(self, "weight", weight, low=0)
        check_number(self, "bank_size", bank_size, low=1, integer=True)
        check_number(self, "rotate_every", rotate_every, low=0, integer=True)
        check_bool(self, "calibration", calibration)
        check_bool(self, "warm_up", warm_up)
        check_choice(self, "pooling", pooling, ("flatten", "first", "mean"))
        check_choice(self, "reference", reference, PLACES)
        self.layer, self.head, self.weight, self.bank_size = layer, head, weight, bank_size
        self.calibration, self.rotate_every, self.warm_up = calibration, rotate_every, warm_up
        self.label_key, self.pooling, self.reference = label_key, pooling, reference
        self._reference = Reference([layer], reference)
        self._bank = FeatureBank(bank_size)
        self._rotation: Tensor | None = None

    @override
    def describe(self) -> str:
        if not self.weight:
            return "weight=0: inactive"
        turns = f"rotated every {self.rotate_every} batches" if self.rotate_every else "no rotation"
        form = f"calibrated, {turns}" if self.calibration else "not calibrated"
        return (
            f"{self.layer} to {self.head}, weight={self.weight:g}, {self.bank_size} features, {form};"
            f" {self._reference.describe()}"
        )

    @override
    def is_active(self, step: "Step") -> bool:
        return self.weight > 0

    @property
    @override
    def feature_layers(self) -> "Sequence[str]":
        return [self.layer] if self.weight else []

    @property
    @override
    def references(self) -> "Sequence[Reference]":
        return [self._reference]

    @override
    def observe_batch(self, step: "Step") -> None:
        super().observe_batch(step)
        if self.warm_up and not self._bank.filled:
            self._fill_bank(step)

    @override
    def step_term(self, step: "Step") -> Tensor | None:
        labels = class_numbers(self, step, self.label_key)
        present = embeddings(self, step, self.layer, len(labels), self.pooling)[0].detach().float()
        head = linear_head(self, step.module, self.layer, self.head, present.shape[1])
        first = self._first_features(step, present)
        term = self._term(step, present, head) if self._bank.filled else None
        self._bank.add(*self._of_all_ranks(step, first, present, labels))
        return term

    @override
    def state_dict(self) -> dict[str, Any]:
        rotation = None if self._rotation is None else self._rotation.clone()
        return {"reference": self._reference.state_dict(), "bank": self._bank.state_dict(), "rotation": rotation}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._reference.load_state_dict(state_dict["reference"])
        self._bank.load_state_dict(state_dict["bank"])
        self._rotation = state_dict["rotation"]

    def _fill_bank(self, step: "Step") -> None:
        wanted = Wanted([self.layer], [self.label_key], view=partial(pooled, pooling=self.pooling))
        try:  # both encoders are the same still, so one draw of an augmented image is as good as another
            found = record(step.trainer, self, wanted, augmented=True, weights=self._reference.weights)
        except MisconfigurationException as error:
            raise MisconfigurationException(f"{error} Or write DRTune(warm_up=False).") from error
        drawn = torch.randperm(len(found.indices), generator=self.generator(step, same_on_ranks=True))
        features = found.features[self.layer][drawn].to(step.module.device)
        labels = found.entries[self.label_key].flatten()[drawn].to(step.module.device)
        self._bank.add(features, features, labels)

    def _term(self, step: "Step", present: Tensor, head: nn.Linear) -> Tensor:
        first, then, labels = (kept.to(present.device) for kept in self._bank.entries())
        if self.calibration:
            if self.rotate_every and (self._rotation is None or step.batches_so_far % self.rotate_every == 0):
                self._rotation = kabsch(F.normalize(first, dim=1), F.normalize(then, dim=1))
            if self._rotation is not None:
                self._rotation = self._rotation.to(present.device)
            first = calibrate(first, then, labels, head.weight, self._mean_length(step, present), self._rotation)
        return self.weight * dr_loss(first, labels, head.weight, head.bias)

    def _mean_length(self, step: "Step", present: Tensor) -> Tensor:
        lengths = present.square().sum(1).sqrt()
        group = host.data_parallel_group(step.trainer)
        if group is None:
            return lengths.mean()
        sums = distributed.all_reduce_sum(torch.stack([lengths.sum(), torch.ones_like(lengths).sum()]), group)
        mean: Tensor = sums[0] / sums[1]
        return mean

    def _of_all_ranks(self, step: "Step", first: Tensor, present: Tensor, labels: Tensor) -> "Sequence[Tensor]":
        group = host.data_parallel_group(step.trainer)
        if group is None:
            return first, present, labels
        both, labels, _ = rows_in_turn(torch.cat([first, present], dim=1), labels, group, step.capacity)
        return both[:, : first.shape[1]], both[:, first.shape[1] :], labels

    def _first_features(self, step: "Step", present: Tensor) -> Tensor:
        first = pooled(self.sight(step, self._reference).features[self.layer], self.pooling).float()
        if first.shape != present.shape:
            raise MisconfigurationException(
                f"DRTune: layer {self.layer!r} gives {tuple(present.shape)} in this step, and {tuple(first.shape)} in"
                " the network as it was. Both must see the same batch in the same way."
            )
        return first
