"""OVOR: a head that is told, at the end of each task, what lies outside the task's data."""

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.continual._tasks import TaskTechnique
from lightning_reg.continual.ovor._head_inputs import HeadInputs
from lightning_reg.continual.ovor.core import boundary_points, energy, energy_hinge_loss, synthesize_outliers
from lightning_reg.engine.host import distributed
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_choice, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.layers.named import layer_named
from lightning_reg.engine.run.periods import Period
from lightning_reg.engine.run.phases import OnLayers, OnModules, phases_of
from lightning_reg.engine.technique import LayerTechnique, LossTechnique

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.layers.edits import LayerCall
    from lightning_reg.engine.loss.call import LossCall
    from lightning_reg.engine.run.part import Part
    from lightning_reg.engine.run.phases import Member
    from lightning_reg.engine.step import Step

__all__ = ["VirtualOutliers"]


class VirtualOutliers(TaskTechnique, LayerTechnique, LossTechnique):
    r"""Trains the head alone in the last epochs of a task, on the data and on made-up features around them (OVOR).

    When these epochs begin, one pass over the task's data gives what the head gets of them. The points at the border
    of the data (far from their neighbours) are moved by noise, and what lies farthest from the data is kept: virtual
    outliers. The energy :math:`E(z) = -\log \sum_{c \in S} e^{h_c(z)}` over the task's classes S is to be low for data
    and high for outliers:

    .. math:: \ell + \lambda \bigl(\overline{\rho((E(z) - \tau)_+)} + \overline{\rho((\tau_o - E(v))_+)}\bigr)

    with Huber's :math:`\rho`. Everything but the head is frozen meanwhile, prompts of :class:`OnePrompt` included. With
    ``new_classes`` your cross-entropy is one over the task's own classes, from the first step on, as the authors' is;
    rows of other classes then get no gradient. So classes of different tasks, which are compared only at test time, are
    confused less.

    ``train_head_on_outliers`` (``lightning_reg.functional``) is the same after a fit, with an optimizer of its own.

    Use it for class-incremental training without old samples, with a linear head over features that hardly move. Leave
    it where the task is told at test time, or for heads on normalized features. The thresholds are lengths in your
    logits: look at the logged ``energy`` and ``outlier_energy``. Where both hinges are far from them, so is the effect
    from the paper's. A task is a fit that came to its end, or a number in the datamodule's ``current_task``; keep the
    object from fit to fit.

    Source:
        Huang et al., "OVOR: OnePrompt with Virtual Outlier Regularization for Rehearsal-Free Class-Incremental
        Learning", ICLR 2024, arXiv 2402.04129; the loss and the numbers by the authors' code, jpmorganchase/ovor.

    Differs:
        The wording of the synthesis was not read in the paper: ``"paper"`` is border points plus noise, all compared
        at length 1. The authors' code (``"released"``) leaves the border points out of the sum and uses the same draws
        for each, so few outliers differ. Features are taken once, in evaluation mode, in place of once in each of the
        epochs, since what makes them is frozen; outliers are new in each. The data's energy is of the features as the
        step has them.

    Memory: the features of the data for the time of the synthesis, and the outliers of all these epochs. Neighbours
    cost :math:`(N + SM) N D` for N samples, S points of the border and M draws, on the module's device.

    Args:
        head: The classifier, named as in ``named_modules()``; it gets ``(B, D)`` and gives logits ``(B, C)``.
        epochs: Last epochs of the fit in which the head alone is trained, at least 1 and at most all. Paper: 10 of 50
            for ImageNet-R, 4 of 20 for CIFAR-100.
        weight: lambda, at least 0. Paper: 0.1. Neutral: 0, without ``new_classes``.
        threshold: tau, which energies of the data are to be below. Paper: -15. ``None``: the median of the data's when
            the epochs begin.
        outlier_threshold: tau_o, which energies of outliers are to be above, larger than tau. Paper: -3. ``None``: that
            of features of 0, which the head's bias gives; tau if that is larger.
        sigma: Standard deviation of the noise, above 0. Paper: 0.1 (authors' configurations). Try 0.5 to 2 times the
            features' own.
        k: Which neighbour says how far a point is from the data, from 1 on (itself). Paper: 50.
        select: How many points make the border, at least 1. Paper: 50.
        sample_from: Candidates for each of them, at least 1. Paper: 600.
        per_class: Outliers that are kept for each class, at least 1. Paper: 40.
        candidates: ``"paper"`` or ``"released"``, see above.
        feature_noise: Whether sigma is a length (``"absolute"``), or in units of each feature's standard deviation
            (``"relative"``).
        new_classes: How many classes each task adds, in the order of the tasks, each at least 0. ``None``: your loss is
            left as it is, and the task's classes are those that occur in its data.
        label_key: Where ``new_classes`` is not given: entry of the batch with class numbers, a key or a position.
        loss: Which loss call it works on, if there are several: position, ``"last"``, function name, or
            ``"model.py:42"``.
        name: Tells several instances in one Trainer apart.
        seed: Seed of the noise.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> outliers = VirtualOutliers("head", epochs=10, new_classes=[20] * 10)
        >>> trainer = Trainer(max_epochs=50, callbacks=[outliers], logger=False, enable_checkpointing=False)

    """

    reads_data_of_task = True
    watched = ("energy", "outlier_energy")

    def __init__(
        self,
        head: str,
        epochs: int = 10,
        weight: float = 0.1,
        threshold: float | None = -15.0,
        outlier_threshold: float | None = -3.0,
        sigma: float = 0.1,
        k: int = 50,
        select: int = 50,
        sample_from: int = 600,
        per_class: int = 40,
        candidates: Literal["paper", "released"] = "paper",
        feature_noise: Literal["absolute", "relative"] = "absolute",
        new_classes: list[int] | None = None,
        label_key: str = "1",
        loss: int | str | None = None,
        name: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(loss=loss, name=name, seed=seed)
        counts = {"epochs": epochs, "k": k, "select": select, "sample_from": sample_from, "per_class": per_class}
        for argument, count in counts.items():
            check_number(self, argument, count, low=1, integer=True)
        check_number(self, "weight", weight, low=0)
        check_number(self, "sigma", sigma, low=0, low_open=True)
        check_number(self, "threshold", threshold, optional=True)
        if outlier_threshold is not None:
            low = -math.inf if threshold is None else threshold
            check_number(self, "outlier_threshold", outlier_threshold, low=low, low_open=True)
        check_choice(self, "candidates", candidates, ("paper", "released"))
        check_choice(self, "feature_noise", feature_noise, ("absolute", "relative"))
        for count in new_classes or ():
            check_number(self, "new_classes", count, low=0, integer=True)
        self.head, self.epochs, self.weight, self.sigma = head, epochs, weight, sigma
        self.threshold, self.outlier_threshold = threshold, outlier_threshold
        self.k, self.select, self.sample_from, self.per_class = k, select, sample_from, per_class
        self.candidates, self.feature_noise = candidates, feature_noise
        self.new_classes, self.label_key = new_classes, label_key
        self._first_epoch = 0
        self._made: dict[str, Any] = {}

    @property
    @override
    def is_neutral(self) -> bool:
        return self.weight == 0 and self.new_classes is None

    @property
    @override
    def acts(self) -> bool:
        return True

    @override
    def describe(self) -> str:
        if self.is_neutral:
            return "weight=0: inactive"
        softmax = [] if self.new_classes is None else ["your loss over the task's own classes"]
        if self.weight == 0:
            return "; ".join(["weight=0", *softmax, self._tasks.so_far])
        below = "the median" if self.threshold is None else f"{self.threshold:g}"
        above = "that of the bias" if self.outlier_threshold is None else f"{self.outlier_threshold:g}"
        unit = " of the features'" if self.feature_noise == "relative" else ""
        made = f"{self.per_class} outliers a class ({self.candidates}, sigma={self.sigma:g}{unit})"
        said = [f"{self.head} alone in the last {self.epochs} epochs, weight={self.weight:g}, {made}"]
        said += [f"energies below {below}, of outliers above {above}", *softmax, self._tasks.so_far]
        return "; ".join(said)

    @override
    def conflict_with(self, other: "Member") -> str | None:
        if isinstance(other, VirtualOutliers) and self.weight and other.weight:
            return "each trains its head alone, so that neither head would be trained. Remove one of them."
        if self.weight and "map_weights" in phases_of(other):
            return (
                f"in its last epochs the head alone is trained, and {type(other).__name__} trains weights through a map"
                " of its own. Let that training end first, or remove one of them."
            )
        if self.weight and isinstance(other, OnLayers) and not isinstance(other, OnModules) and len(other.stages) > 1:
            return (
                f"{type(other).__name__} changes layers in evaluation as well, so that outliers would be made of other"
                " features than the head is trained on. Remove one of them."
            )
        replaces = {"change_losses", "change_targets"}.intersection(phases_of(other)) and other.loss == self.loss
        if self.new_classes is not None and replaces:
            return (
                f"with `new_classes` your cross-entropy is one over the task's own classes, and {type(other).__name__}"
                " replaces it. Leave out `new_classes`: energies are then over the classes that occur in the task."
            )
        if self.is_neutral or other.mixes == "none":
            return None
        return (
            "what the head gets of a mixed sample lies between classes, where it is to tell the data from outliers."
            " Remove one of them."
        )

    @property
    @override
    def feature_layers(self) -> "Sequence[str]":
        return () if self.weight == 0 else (self.head,)

    @property
    @override
    def periods(self) -> "Sequence[Period]":
        return () if self.weight == 0 else (Period(self._first_epoch, trained=[self.head]),)

    @override
    def check(self, trainer: "Trainer", module: "LightningModule") -> None:
        if self.weight == 0:
            return
        super().check(trainer, module)
        if not module.automatic_optimization:
            raise MisconfigurationException(
                "VirtualOutliers runs `training_step` over the data once more, which would train under"
                " automatic_optimization=False. Leave optimization to Lightning, or call `train_head_on_outliers` after"
                " the fit."
            )
        last = trainer.max_epochs
        if last is None or last < self.epochs:
            found = "has no number of epochs" if last is None or last < 0 else f"trains {last} epochs"
            raise MisconfigurationException(
                f"VirtualOutliers(epochs={self.epochs}) trains the head alone in the last epochs of a fit, and the"
                f" Trainer {found}. Give it `max_epochs`, at least as many."
            )
        self._first_epoch = last - self.epochs

    @override
    def parts(self, trainer: "Trainer", module: "LightningModule") -> "Sequence[Part]":
        if self.weight == 0:
            return ()
        label_key = self.label_key if self.new_classes is None else None
        return (HeadInputs(trainer, module, self, self.head, label_key, self._is_due, self._synthesize),)

    @override
    def begin(self, step: "Step") -> None:
        if not self._tasks.goes_on:
            self._made = {}

    @override
    def features_to_edit(self, module: nn.Module) -> "Sequence[str]":
        return () if self.new_classes is None else (self.head,)

    @override
    def edit_features(self, call: "LayerCall") -> Any:
        first, last = self._range_of_task()
        logits: Tensor = call.output
        if logits.shape[-1] < last:
            raise MisconfigurationException(
                f"VirtualOutliers(new_classes={self.new_classes}): there are {last} classes by task {self.tasks + 1},"
                f" and {self.head!r} has {logits.shape[-1]} outputs."
            )
        positions = torch.arange(logits.shape[-1], device=logits.device)
        return logits.masked_fill((positions < first) | (positions >= last), -torch.inf)

    @override
    def loss_term(self, call: "LossCall") -> Tensor | None:
        if self.new_classes is not None:
            self._check_target(call)
        if not self.weight:
            return None
        logits = self._logits_of_head(call)  # from the first step on, so that a wrong name is told there
        return self.weight * self._hinges(call.step, logits) if self._is_head_phase(call.step) else None

    @override
    def keep(self, trainer: "Trainer", module: "LightningModule") -> dict[str, Any]:
        if self.weight and not self._made:
            host.rank_zero_warn(
                f"VirtualOutliers(epochs={self.epochs}): the fit ended before its last {self.epochs} epochs, those from"
                f" {self._first_epoch} on, so the head learned from no outliers. Let it train all of `max_epochs`, or"
                " give the Trainer fewer."
            )
        self._made = {}
        return {}

    @override
    def forget(self) -> None:
        """Keeps what was made: a fit that is resumed goes on with it."""

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"tasks": super().state_dict(), **self._made}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._made = {name: value for name, value in state_dict.items() if name != "tasks"}
        super().load_state_dict(state_dict["tasks"])

    def _is_head_phase(self, step: "Step") -> bool:
        return step.epoch >= self._first_epoch

    def _is_due(self, step: "Step") -> bool:
        return self._is_head_phase(step) and not self._made

    @torch.no_grad()
    def _synthesize(self, step: "Step", features: Tensor, classes: list[int], batches: int) -> None:
        """Makes the outliers of all epochs that are left."""
        classes = classes if self.new_classes is None else list(range(*self._range_of_task()))
        if not classes:
            raise MisconfigurationException(
                f"VirtualOutliers(new_classes={self.new_classes}): task {self.tasks + 1} has no class of its own."
            )
        rows = features.to(step.module.device)
        boundary = boundary_points(rows, self.select, self.k)
        generator = self.generator(step, rows.device, same_on_ranks=True)
        copies = () if self.candidates == "released" else (len(boundary),)
        shape = (*copies, self.sample_from, rows.shape[1])
        each = [
            synthesize_outliers(
                rows,
                boundary,
                torch.randn(shape, generator=generator, device=rows.device),
                self.per_class * len(classes),
                self.sigma,
                self.k,
                self.candidates,
                self.feature_noise,
            )
            for _ in range(self._first_epoch + self.epochs - step.epoch)
        ]
        self._made = {
            "outliers": torch.stack(each),
            "thresholds": self._thresholds(step, rows, classes),
            "classes": torch.tensor(classes, device=rows.device),
            "since": step.batches_so_far,
            "batches": batches,
        }

    def _thresholds(self, step: "Step", rows: Tensor, classes: list[int]) -> Tensor:
        """What was given, or what the head says of the data and of features of 0."""
        positions = torch.tensor(classes, device=rows.device)
        below, above = self.threshold, self.outlier_threshold
        if below is None:
            below = float(energy(self._seen_by_head(step, rows), positions).median())
        if above is None:
            above = max(float(energy(self._seen_by_head(step, rows.new_zeros(1, rows.shape[1])), positions)), below)
        return torch.tensor([below, above], device=rows.device)

    def _hinges(self, step: "Step", logits: Tensor) -> Tensor:
        """Of each sample: its own, and the mean of this batch's outliers."""
        made = {n: v.to(logits.device) if isinstance(v, Tensor) else v for n, v in self._made.items()}
        self._made = made
        energies = energy(logits, made["classes"])
        of_outliers = energy(self._seen_by_head(step, self._outliers(step)), made["classes"])
        if step.is_logging:
            step.log(self, "energy", energies.mean())
            step.log(self, "outlier_energy", of_outliers.mean())
        below, above = made["thresholds"].unbind()
        return energy_hinge_loss(energies, of_outliers, below, above, reduction="none")

    def _outliers(self, step: "Step") -> Tensor:
        """Those of this batch: as many for each batch of the epoch, on all ranks together, the farthest first."""
        epoch, batch = divmod(step.batches_so_far - self._made["since"], self._made["batches"])
        of_epochs: Tensor = self._made["outliers"]
        rows = of_epochs[min(epoch, len(of_epochs) - 1)]
        group = host.data_parallel_group(step.trainer)
        ranks, rank = (1, 0) if group is None else (distributed.world_size(group), distributed.rank(group))
        count = max(len(rows) // (self._made["batches"] * ranks), 1)
        start = (batch * ranks + rank) * count
        return rows[torch.arange(start, start + count, device=rows.device) % len(rows)]

    def _seen_by_head(self, step: "Step", rows: Tensor) -> Tensor:
        head = layer_named(step.module, self.head)
        kind = next((p.dtype for p in head.parameters()), rows.dtype)
        # Not by calling it: hooks are for what passes the whole network.
        logits: Tensor = head.forward(rows.to(kind))
        return logits

    def _logits_of_head(self, call: "LossCall") -> Tensor:
        logits = call.step.features.get(self.head)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != call.batch_size:
            found = f"a tensor {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise MisconfigurationException(
                f"VirtualOutliers(head={self.head!r}): its output must be the logits (B, C) of the {call.batch_size}"
                f" samples of the loss, got {found}. Name the classifier itself."
            )
        return logits

    def _range_of_task(self) -> tuple[int, int]:
        counts = self.new_classes or []
        if self.tasks >= len(counts):
            raise MisconfigurationException(
                f"VirtualOutliers(new_classes={counts}): this is task {self.tasks + 1}, and there are numbers for"
                f" {len(counts)}."
            )
        return sum(counts[: self.tasks]), sum(counts[: self.tasks + 1])

    def _check_target(self, call: "LossCall") -> None:
        """Refuses what a softmax over the task's own classes has no value for."""
        soft = call.given_target is not None and call.given_target.is_floating_point()
        if soft or call.arguments.get("label_smoothing", 0.0):
            raise MisconfigurationException(
                f"VirtualOutliers(new_classes={self.new_classes}): {call} gives weight to classes of other tasks, whose"
                " logits are -inf. Give it class numbers without `label_smoothing`, or leave out `new_classes`."
            )
        if call.step.is_logging:
            first, last = self._range_of_task()
            labels = call.labels if call.sample_mass is None else call.labels[call.sample_mass > 0]
            strange = labels[(labels < first) | (labels >= last)]
            if len(strange):
                raise MisconfigurationException(
                    f"VirtualOutliers(new_classes={self.new_classes}): task {self.tasks + 1} has the classes {first} to"
                    f" {last - 1}, and a label is {int(strange[0])}. Classes of a task must come after those of the"
                    " tasks before."
                )
