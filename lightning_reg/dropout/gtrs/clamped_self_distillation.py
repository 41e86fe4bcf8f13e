"""ClampedSelfDistillation: labels that an average of the network bends, within bounds."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_reg.dropout.gtrs._momentum import EpochAverage
from lightning_reg.dropout.gtrs.core import clamped_soft_labels
from lightning_reg.engine.data.entries import find_entry, replace_entry
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_list, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.generators import own_randomness
from lightning_reg.engine.host.user_functions import user_function
from lightning_reg.engine.networks.moving import AverageReferenceTechnique
from lightning_reg.engine.run.phases import Member
from lightning_reg.engine.technique import LossTechnique

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.loss.call import LossCall
    from lightning_reg.engine.networks.references import Reference
    from lightning_reg.engine.step import Step

__all__ = ["ClampedSelfDistillation"]

_PROBABILITIES = (F.binary_cross_entropy_with_logits, F.binary_cross_entropy)
_REGRESSIONS = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)


class ClampedSelfDistillation(AverageReferenceTechnique, LossTechnique):
    r"""Trains beside the given labels on labels that a moving average of the network bends, but not by much.

    .. math:: \ell(f(x), y) + w\, \ell(f(x), y') + \frac{v}{V} \sum_{j=1}^{V} \ell(f(a_j(x)), y_j), \qquad
        y' = y + \operatorname{clamp}(p_T - y,\ -\delta,\ \delta)

    where :math:`p_T` is what the teacher predicts, the average of the network's weights, in evaluation mode and without
    gradient. Hard labels that are wrong or too sure give way to what the network has learned elsewhere, and bounds keep
    it from believing itself. Perturbed views :math:`a_j(x)`, if there are any,
    are trained on with the given labels, :math:`y_j = y`, or with labels of their own. All three are your own loss,
    with its reduction, its weights and its mask.

    A view that changes what is asked for, as a turned picture does where the target is a direction, brings its labels
    along: let ``input_key`` name an entry that holds inputs and labels (``""``: the batch), and ``augment`` return
    another one of the same structure, or ``view_keys`` name others.

    For ``F.binary_cross_entropy_with_logits`` and ``F.binary_cross_entropy``, with any targets in [0, 1], and
    regression: ``F.mse_loss``, ``F.l1_loss``, ``F.smooth_l1_loss``, ``F.huber_loss``. Not for a softmax, where labels
    that are bent one by one no longer sum to 1.

    Use it for scores of several labels that are noisy, simulated or too sure. Leave it where labels are right, and
    where a second forward pass per step is too dear. :attr:`teacher_weights` are those to predict with.

    What it gains may be the average's alone. On digits with ten labels each, a fifth of them wrong
    (``benchmarks/effects/clamped_self_distillation.py``, five seeds), it had no effect on the accuracy of the network.
    The teacher was 1.9 points above the same average of a plain network; so was, by 1.7, the average of a network that
    is given its loss twice, as ``delta=0`` does. Bent labels as such did nothing there: compare with an average and
    twice the loss. The network fits given labels no less. In 60 epochs in place of 30, the two seeds that were tried
    fell 5 and 3 points below a plain fit: stop early.

    Source:
        Li et al., "Generalized Trajectory Scoring for End-to-end Multimodal Planning", 2025, arXiv 2506.06664; bounds,
        weights and momentum are those of the authors' code, NVlabs/GTRS, ``gtrs_aug``.

    Differs:
        The teacher starts as a copy of the network; in the authors' code it starts from other random weights, of which
        0.8 % go with each step. Buffers, such as statistics of batch norm, are the network's; in the authors' code they
        are so for CNN backbones alone. Rotations of stitched cameras, and scores simulated for them, are not here: what
        makes views is yours. The refinement of the best candidates is apart
        (:func:`~lightning_reg.functional.refinement_loss`).

    Memory: one copy of the parameters and buffers in float32, a forward pass per step, and the views' activations.

    Args:
        delta: :math:`\delta`, by how much a probability may bend, at least 0. Paper: 0.15; sensible: 0.05 to 0.3. 0:
            the given labels once more; 1: the teacher's.
        delta_regression: The same for targets of a regression, in their unit. Paper: 1 (metres and radians).
        weight: w, at least 0. Paper: 1. Neutral: 0, without views.
        momentum: What the teacher keeps of itself at each optimizer step of the first epoch, in [0, 1]. Authors' code:
            0.992.
        momentum_end: The same in the end. Authors' code: 0.998.
        momentum_epochs: Epochs until then, at least 1. Authors' code: 3.
        copy_epochs: Epochs before these in which the teacher is a copy of the network. Authors' code: 0, 3 (ResNet).
        augment: Function that perturbs what is at ``input_key``, as an import path (``"package.module.function"``) or
            the name of a method of your module; its draws are the technique's own. ``None``: none.
        views: V, number of views that ``augment`` makes, at least 1. Paper: 3.
        view_keys: Entries of the batch that are further views, which your data set makes.
        view_weight: v, at least 0. Paper: 1.
        input_key: Entry of the batch that views take the place of: keys and positions, separated by dots. A tensor is
            inputs alone, and its views have the batch's labels, what other techniques make of them included. Labels
            that stand in the entry come from each view.
        clean_key: Entry of the batch that the teacher sees in that place, such as inputs before the augmentation that
            your data set makes. ``None``: the teacher sees what the network sees. In the authors' code it sees images
            without the changes of colour that the network's have.
        loss: Which loss call it works on, if there are several: its position in the step, its function's name, or its
            place in the code. ``None``: there must be just one.
        name: Tells several instances in one Trainer apart.
        seed: Seed of the views' draws.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> distillation = ClampedSelfDistillation(delta=0.15)
        >>> trainer = Trainer(max_epochs=6, callbacks=[distillation], logger=False, enable_checkpointing=False)

    """

    watched = ("bent",)

    def __init__(
        self,
        delta: float = 0.15,
        delta_regression: float = 1.0,
        weight: float = 1.0,
        momentum: float = 0.992,
        momentum_end: float = 0.998,
        momentum_epochs: int = 3,
        copy_epochs: int = 0,
        augment: str | None = None,
        views: int = 3,
        view_keys: Sequence[str] = (),
        view_weight: float = 1.0,
        input_key: str = "0",
        clean_key: str | None = None,
        loss: int | str | None = None,
        name: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(loss=loss, name=name, seed=seed)
        self.delta, self.delta_regression, self.weight = delta, delta_regression, weight
        self.momentum, self.momentum_end, self.momentum_epochs = momentum, momentum_end, momentum_epochs
        self.copy_epochs, self.augment, self.views = copy_epochs, augment, views
        self.view_weight, self.input_key, self.clean_key = view_weight, input_key, clean_key
        for argument in ("delta", "delta_regression", "weight", "view_weight"):
            check_number(self, argument, getattr(self, argument), low=0)
        for argument in ("momentum", "momentum_end"):
            check_number(self, argument, getattr(self, argument), low=0, high=1)
        for argument, low in (("momentum_epochs", 1), ("copy_epochs", 0), ("views", 1)):
            check_number(self, argument, getattr(self, argument), low=low, integer=True)
        check_list(self, "view_keys", view_keys)
        self.view_keys = list(view_keys)
        self._teacher = EpochAverage(momentum, momentum_end, momentum_epochs, copy_epochs)

    @property
    def teacher_weights(self) -> dict[str, Tensor] | None:
        """The teacher's parameters and buffers, for the module's ``load_state_dict``; ``None`` before a fit."""
        weights = self._teacher.weights
        return None if weights is None else {name: value.clone() for name, value in weights.items()}

    @property
    def _view_count(self) -> int:
        made = 0 if self.augment is None else self.views
        return made + len(self.view_keys) if self.view_weight else 0

    @override
    def describe(self) -> str:
        views = f"{self._view_count} views, weight {self.view_weight:g}" if self._view_count else "no views"
        if not self.weight:
            return f"weight=0; {views}" if self._view_count else "weight=0: inactive"
        bounds = f"delta={self.delta:g} (regression: {self.delta_regression:g}), weight={self.weight:g}"
        seen = "" if self.clean_key is None else f", which sees {self.clean_key}"
        return f"{bounds}; {self._teacher.describe()}{seen}; {views}"

    @override
    def conflict_with(self, other: Member) -> str | None:
        return super().conflict_with(other) if self.weight else None

    @override
    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        if host.batches_so_far(trainer) == 0:  # a new training, not a resumed or continued one
            self._teacher.clear()

    @override
    def is_active(self, step: "Step") -> bool:
        return self.weight > 0 or self._view_count > 0

    @property
    @override
    def references(self) -> "Sequence[Reference]":
        return [self._teacher] if self.weight else []

    @override
    def reference_batch(self, step: "Step") -> Any:
        if self.clean_key is None:
            return step.batch
        clean = find_entry(step.batch, self.clean_key, "ClampedSelfDistillation: clean_key")
        return replace_entry(step.batch, self.input_key, clean)

    @override
    def extra_views(self, batch: Any, step: "Step") -> Sequence[Any]:
        if not self._view_count:
            return []
        given = [find_entry(batch, key, "ClampedSelfDistillation: view_keys") for key in self.view_keys]
        if self.augment is not None:
            x = find_entry(batch, self.input_key, "ClampedSelfDistillation: input_key")
            augment = user_function(self.augment, step.trainer, step.module, "ClampedSelfDistillation(augment=...)")
            seed = int(torch.randint(2**32, (), generator=self.generator(step)))
            with own_randomness(seed), torch.no_grad():
                given = [*(augment(x) for _ in range(self.views)), *given]
        return [replace_entry(batch, self.input_key, view) for view in given]

    @override
    def loss_term(self, call: "LossCall") -> Tensor | None:
        target = call.target
        if target is None or call.function not in (*_PROBABILITIES, *_REGRESSIONS):
            raise MisconfigurationException(
                f"ClampedSelfDistillation bends each label by itself, and {call} is no binary cross-entropy"
                " (F.binary_cross_entropy_with_logits) and no regression (F.mse_loss, F.l1_loss, F.smooth_l1_loss,"
                " F.huber_loss). If there is such a call too, choose it with `loss=...`."
            )
        terms = [self.weight * self._soft_losses(call, target)] if self.weight else []
        if self._view_count:
            terms.append(self.view_weight * self._view_losses(call))
        return torch.stack(terms).sum(0)

    def _soft_losses(self, call: "LossCall", target: Tensor) -> Tensor:
        seen = self.sight(call.step, self._teacher).call
        predicted = None if seen is None else seen.input
        if predicted is None or predicted.shape != target.shape:
            found = "no such call" if predicted is None else f"predictions {tuple(predicted.shape)}"
            raise MisconfigurationException(
                f"ClampedSelfDistillation: the teacher's step has {found}, and {call} has targets"
                f" {tuple(target.shape)}: both must have one value for each label. Does another technique change layers"
                " of the network, which the teacher has as they are?"
            )
        if call.function is F.binary_cross_entropy_with_logits:
            predicted = predicted.float().sigmoid()
        delta = self.delta if call.function in _PROBABILITIES else self.delta_regression
        soft = clamped_soft_labels(target, predicted, delta)
        if call.step.is_logging:
            call.step.log(self, "bent", (soft - target).abs().mean())
            call.step.log(self, "clamped", ((predicted.float() - target).abs() > delta).float().mean())
        return call.with_target(soft.to(target.dtype)).learned_losses

    def _view_losses(self, call: "LossCall") -> Tensor:
        """Mean over the views."""
        views, target = call.of_views(self), call.target
        inputs_alone = isinstance(find_entry(call.step.batch, self.input_key, "input_key"), Tensor)
        if inputs_alone and target is not None:  # the batch's labels, whatever others have made of them
            views = [view.with_target(target) for view in views]
        return torch.stack([view.learned_losses for view in views]).mean(0)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._teacher.state_dict() if self.weight else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            self._teacher.load_state_dict(state_dict)
