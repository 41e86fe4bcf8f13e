"""InvariancePenalty: IRMv1, V-REx, spectral decoupling, IGA, Fishr or CLOvE beside the loss."""

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_bool, check_choice, check_number
from lightning_reg.engine.host.distributed import all_reduce_sum
from lightning_reg.engine.host.errors import MisconfigurationException, check_patterns
from lightning_reg.engine.host.names import Patterns, is_selected
from lightning_reg.engine.run.phases import Member, phases_of
from lightning_reg.engine.technique import LossTechnique
from lightning_reg.engine.weights.strategies import check_whole
from lightning_reg.engine.weights.swap import named_weights
from lightning_reg.reweighting._groups import Groups
from lightning_reg.reweighting.invariance_penalty._rows import (
    HeadInput,
    global_rows,
    scores_and_targets,
    squared_scores,
)
from lightning_reg.reweighting.invariance_penalty.core import (
    clove_penalty,
    fishr_average,
    fishr_penalty,
    head_gradient_moments,
    iga_penalty,
    irm_penalty,
    logit_gradients,
    sd_penalty,
    vrex_penalty,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.loss.call import LossCall
    from lightning_reg.engine.run.part import Part
    from lightning_reg.engine.step import Step

__all__ = ["InvariancePenalty"]

_METHODS = ("irm", "vrex", "sd", "iga", "fishr", "clove")
_KEEPS = ("pull_back", "map_weights", "own_modules")


class InvariancePenalty(LossTechnique):
    r"""Adds a penalty that wants the network to be alike in all training environments, so that it holds in new ones.

    With :math:`L_e` the mean loss of an environment's samples in the global batch, of all data-parallel ranks:

    .. math:: \ell + \lambda\, P, \quad P_{vrex} = \mathrm{Var}_e(L_e), \quad
        P_{irm} = \frac1E \sum_e \bigl(\partial_w L_e(w z)|_{w=1}\bigr)^2, \quad P_{sd} = \overline{z^2}, \quad
        P_{iga} = \sum_e \lVert \nabla L_e - \overline{\nabla L} \rVert^2

    ``"fishr"`` compares the variances of per-sample gradients of the linear head, ``"clove"`` calibration errors
    (MMCE); the functions of :mod:`lightning_reg.functional` have the formulas of all six. Your loss stays as it is: the
    mean over the batch. An environment without a sample in the batch is skipped, and one with a single sample by the
    halves of ``"irm"``. Every sample has one environment, or several, or none (then it does not enter the penalty).
    Every rank must make a loss in every step. With ``accumulate_grad_batches`` environments are compared within a
    micro-batch. Penalties are computed in float32 at least, outside autocast; the gradients of ``"iga"`` pass the
    network in its own precision. ``"vrex"`` and ``"iga"`` take any loss, ``"sd"`` any whose input is what the network
    puts out, the others F.cross_entropy, F.nll_loss and F.binary_cross_entropy_with_logits.

    Use it where environments are known, each batch has samples of all of them (a ``WeightedRandomSampler``), and the
    network has already learned more than the shortcut (a few hundred annealed steps, or rich features). Leave it from
    random weights: the penalty then keeps the network from learning at all (authors' table: 44 to 54 % on coloured
    digits, where chance is 50 and the best possible 75). On small coloured digits
    (``benchmarks/effects/invariance_penalty.py``) no penalty learned the shape: in the unseen environment it was 23 %
    without, 16 to 36 % with those that learned something, and towards 50 % with those that learned nothing. With
    features frozen and the head alone trained (``benchmarks/effects/rich_penalties.py``) SD reached 57 % in the worst
    group on those of :class:`FeatureSynthesis` and 50 % on those of a plain fit, which itself reached 18 %; for the
    other five no effect over the plain fit was shown. Choose the weight by validation in an environment left out, never
    by the test.

    Source:
        Arjovsky et al., "Invariant Risk Minimization", arXiv 1907.02893 (IRMv1); Krueger et al., ICML 2021, arXiv
        2003.00688 (V-REx); Pezeshki et al., NeurIPS 2021, arXiv 2011.09468, equation 25 (SD); Koyama and Yamaguchi,
        arXiv 2008.01883 (IGA); Rame et al., ICML 2022, arXiv 2109.02934 (Fishr); Wald et al., NeurIPS 2021, arXiv
        2102.10395 (CLOvE); all six compared by Zhang et al., "Rich Feature Construction for the
        Optimization-Generalization Dilemma", ICML 2022, arXiv 2203.15516. Forms and constants:
        facebookresearch/DomainBed at b93c22a, TjuJianyu/RFC at de4a5a4.

    Differs:
        The published loops take one batch of each environment; here it is an ordinary batch. ``form="rfc"`` has RFC's
        penalties, not its loss, a sum over environments that is divided by the weight if that is above 1: this is E
        times the mean, so that its weight :math:`\lambda` is :math:`\lambda / E` here, and the factor on both
        together is left to the learning rate. RFC's tenfold smaller steps after annealing (SD) are left to it as well.
        At the end of annealing the optimizer's state is emptied, which is that of a new Adam; learning rates stay.
        Fishr's gradients are products of matrices, without BackPACK. CLOvE's confidence of C classes is the largest
        probability (the authors' code for more than one output mixes up its indices).

    Memory: ``"clove"``: some matrices of N by N samples; ``"iga"``: E gradients, and the graph of a second backward
    pass, about twice the time of a step for each environment; ``"fishr"``: E times the head's weights, and one such
    average. Under DDP one collective forward and one backward, of a few numbers per sample (``"fishr"``: D + C; its
    features); ``"iga"``: one of E times all weights.

    Args:
        method: ``"irm"`` (IRMv1), ``"vrex"``, ``"sd"`` (spectral decoupling), ``"iga"``, ``"fishr"`` or ``"clove"``.
        num_groups: Number of environments E, at least 1; those of the training data.
        weight: :math:`\lambda`, at least 0. DomainBed: 100 (IRM), 10 (V-REx), 0.1 (SD), 1000 (IGA, Fishr); RFC on
            coloured digits: 1e3 to 1e5, SD 10 to 1000. Neutral: 0, with ``anneal_steps=0``.
        group_key: Entry of the batch with the environments: keys and positions, separated by dots (``"env"``,
            ``"2"``); whole numbers ``(B,)``, negative for none, or bool ``(B, E)`` for environments that overlap.
        groups: In its place, environments by sample index: the name of a function, a method of your module or
            datamodule or an import path, which is called without arguments at the start of fit and returns those of all
            N training samples, ``(N,)`` or ``(N, E)``. Just one of the two must be given.
        form: Which published form, where the two differ: ``"domainbed"`` or ``"rfc"``. IRM: product of the slopes of
            even and odd samples, or the square of the slope of all. V-REx: variance over E, or over E - 1. SD: mean
            over all samples, or sum over the environments. Fishr: centred, smoothed over the steps, mean over
            coordinates and environments, or mean squares of this step alone, summed. CLOvE: mean over the environments
            (the authors' code for WILDS), or their sum. IGA: the same.
        anneal_steps: Optimizer steps with ``anneal_weight``, at least 0. DomainBed: 500 (IRM, V-REx), 1500 (Fishr);
            sensible: until the training loss is near its floor.
        anneal_weight: Weight in these steps, at least 0. ``None``: the published one, 1 for IRM and V-REx and 0 for
            the others.
        reset_optimizer: Whether all optimizers forget their moments at the end of annealing, as in DomainBed: the jump
            of the gradients' size fits none of them.
        head: The linear layer that makes the logits, as in ``named_modules()``, for ``"fishr"``. ``None``: the last
            linear layer. The first step tells if the loss does not get its output.
        params: Patterns of names of the weights whose gradients ``"iga"`` compares. ``None``: all that are trained.
        decay: Of Fishr's average with ``form="domainbed"``, at least 0 and below 1. DomainBed: 0.95. Neutral: 0.
        kernel_width: h of CLOvE's kernel, above 0. Authors' code: 0.4.
        loss: Which loss call it works on, if there are several: position, ``"last"``, function name, or
            ``"model.py:42"``.
        index_key: Batch entry with the sample indices; ``None`` to follow them from the DataLoader.
        dataloader: Key of the training loader in a CombinedLoader.
        name: Tells several instances in one Trainer apart.

    Raises:
        ValueError: If an argument is outside its range, or both or none of ``group_key`` and ``groups`` are given.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> penalty = InvariancePenalty("vrex", num_groups=2, weight=10.0, group_key="env", anneal_steps=500)
        >>> trainer = Trainer(callbacks=[penalty], logger=False, enable_checkpointing=False)

    """

    watched = ("penalty",)

    def __init__(
        self,
        method: Literal["irm", "vrex", "sd", "iga", "fishr", "clove"],
        num_groups: int,
        weight: float,
        group_key: str | None = None,
        groups: str | None = None,
        form: Literal["domainbed", "rfc"] = "domainbed",
        anneal_steps: int = 0,
        anneal_weight: float | None = None,
        reset_optimizer: bool = True,
        head: str | None = None,
        params: Patterns = None,
        decay: float = 0.95,
        kernel_width: float = 0.4,
        loss: int | str | None = None,
        index_key: str | None = None,
        dataloader: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(loss=loss, index_key=index_key, dataloader=dataloader, name=name)
        check_choice(self, "method", method, _METHODS)
        check_choice(self, "form", form, ("domainbed", "rfc"))
        check_number(self, "num_groups", num_groups, low=1, integer=True)
        check_number(self, "weight", weight, low=0)
        check_number(self, "anneal_steps", anneal_steps, low=0, integer=True)
        check_number(self, "anneal_weight", anneal_weight, low=0, optional=True)
        check_bool(self, "reset_optimizer", reset_optimizer)
        check_number(self, "decay", decay, low=0, high=1, high_open=True)
        check_number(self, "kernel_width", kernel_width, low=0, low_open=True)
        advice = "Leave it out, and count the environments of the training data."
        self._groups = Groups(self, num_groups, group_key, groups, advice)
        self.method, self.num_groups, self.weight, self.form = method, num_groups, weight, form
        self.group_key, self.groups, self.head, self.params = group_key, groups, head, params
        self.anneal_steps, self.anneal_weight, self.reset_optimizer = anneal_steps, anneal_weight, reset_optimizer
        self.decay, self.kernel_width = decay, kernel_width
        self._average: Tensor | None = None
        self._is_checked = False

    @property
    @override
    def needs_indices(self) -> bool:  # type: ignore[override]  # of the class elsewhere; here an argument says it
        return self.groups is not None

    @override
    def describe(self) -> str:
        if not self.weight and not self.anneal_steps:
            return "weight=0: inactive"
        annealed = f" after {self.anneal_steps} steps with {self._annealed:g}" if self.anneal_steps else ""
        return f"{self.method} ({self.form}), weight={self.weight:g}{annealed}, {self._groups}"

    @override
    def check(self, trainer: "Trainer", module: "LightningModule") -> None:
        if self.method == "iga":
            check_whole(self, trainer, "compares gradients of")
            if host.is_compiled(module):
                raise MisconfigurationException(
                    'InvariancePenalty: method="iga" differentiates gradients, which torch.compile cannot. Leave out'
                    " the compilation, or choose another method."
                )
        if self._resets:
            check_whole(self, trainer, "resets the optimizer's state of")
        self._is_checked = False
        self._groups.read(trainer, module)

    @override
    def conflict_with(self, other: Member) -> str | None:
        if other.mixes != "none":
            return "a mixed sample is of two environments. Remove one of them."
        if self._resets and any(phase in phases_of(other) for phase in _KEEPS):
            return (
                "the one resets the optimizer at the end of annealing, and the other keeps the optimizer's state of its"
                " own weights apart. Write `reset_optimizer=False`, or remove one of them."
            )
        return None

    @override
    def is_active(self, step: "Step") -> bool:
        return self._weight(step) > 0 or (self.method == "fishr" and self.weight > 0)  # whose average goes on

    @override
    def waits(self, step: "Step") -> bool:
        return self.weight > 0

    @override
    def parts(self, trainer: "Trainer", module: "LightningModule") -> "Sequence[Part]":
        return (HeadInput(module, self, self.head),) if self.method == "fishr" else ()

    @override
    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        if host.batches_so_far(trainer) == 0:  # a new training, not a resumed or continued one
            self._average = None

    @override
    def on_train_batch_start(
        self, trainer: "Trainer", pl_module: "LightningModule", batch: Any, batch_idx: int
    ) -> None:
        if self._resets and trainer.global_step == self.anneal_steps:
            for optimizer in trainer.optimizers:
                optimizer.state.clear()

    @override
    def loss_term(self, call: "LossCall") -> Tensor | None:
        membership = self._groups.of_batch(self, call)
        with torch.autocast(call.input.device.type, enabled=False):
            if self.method == "iga":
                penalty = self._iga(call, membership)
            else:
                rows, membership = global_rows(call.step, self._rows(call), membership)
                penalty = self._penalty(call, rows, membership)
        if call.step.is_logging:
            call.step.log(self, "penalty", penalty)
        weight = self._weight(call.step)
        return weight * penalty if weight else None

    @override
    def on_train_epoch_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._groups.say_missing(trainer)

    @property
    def _resets(self) -> bool:
        return self.reset_optimizer and self.anneal_steps > 0

    @property
    def _annealed(self) -> float:
        if self.anneal_weight is not None:
            return self.anneal_weight
        return 1.0 if self.method in ("irm", "vrex") else 0.0

    def _weight(self, step: "Step") -> float:
        return self.weight if step.global_step >= self.anneal_steps else self._annealed

    def _rows(self, call: "LossCall") -> Tensor:
        """What the penalty needs of each sample, ``(B, K)``."""
        if self.method == "vrex":
            return call.learned_losses[:, None]
        name = type(self).__name__
        if self.method == "sd":
            return squared_scores(name, call)[:, None]
        logits, targets, binary = scores_and_targets(name, call)
        if self.method == "clove":
            return _confidences(call, logits, targets, binary)
        deltas = logit_gradients(logits, targets, binary=binary)
        if self.method == "irm":
            return (deltas * logits).sum(1, keepdim=True)
        return torch.cat([deltas, call.step.notes[self].features(call.step, logits)], 1)

    def _penalty(self, call: "LossCall", rows: Tensor, membership: Tensor) -> Tensor:
        if self.method == "vrex":
            return vrex_penalty(rows[:, 0], membership, self.form)
        if self.method == "sd":
            return sd_penalty(rows[:, 0], membership, self.form)
        if self.method == "irm":
            return irm_penalty(rows[:, 0], membership, self.form)
        if self.method == "clove":
            return clove_penalty(rows[:, 0], rows[:, 1], membership, self.form, self.kernel_width)
        present, centred = membership.sum(0) > 0, self.form == "domainbed"
        deltas, features = rows.tensor_split([call.step.notes[self].classes], 1)
        variances = head_gradient_moments(deltas, features, membership, centred=centred)
        if centred:
            kept = None if self._average is None else self._average.to(variances)
            variances, self._average = fishr_average(variances, kept, present, self.decay)
        return fishr_penalty(variances, present, self.form)

    def _iga(self, call: "LossCall", membership: Tensor) -> Tensor:
        trainer, group = call.step.trainer, host.data_parallel_group(call.step.trainer)
        params = self._compared(call.step.module)
        sums, counts = call.learned_losses @ membership, membership.sum(0)
        if group is not None:
            counts = all_reduce_sum(counts, group)
        own = torch.stack([_gradient(trainer, loss, params) for loss in (sums / counts.clamp(min=1)).unbind()])
        if group is None:
            return iga_penalty(own, counts > 0)
        # The value is that of the sums over the ranks; a rank's own share of them has the gradient.
        gradients = all_reduce_sum(own, group) + (own - own.detach()) * group.size()
        return iga_penalty(gradients, counts > 0)

    def _compared(self, module: "LightningModule") -> "list[Tensor]":
        trained = {name: p for name, p in named_weights(module).items() if p.requires_grad}
        if not self._is_checked:
            check_patterns(self, "params", self.params, trained, "trainable parameter")
        self._is_checked = True
        return [p for name, p in trained.items() if is_selected(name, self.params)]

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self._average is None else {"average": self._average}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            self._average = state_dict["average"].clone()


def _confidences(call: "LossCall", logits: Tensor, targets: Tensor, binary: bool) -> Tensor:
    """Probability of the predicted class, and whether it is the given one, ``(B, 2)``."""
    if not binary:
        probability, predicted = logits.softmax(1).max(1)
        right = predicted == targets.argmax(1)
    elif logits.shape[1] == 1:
        p = logits[:, 0].sigmoid()
        probability, right = torch.where(p < 0.5, 1 - p, p), (logits[:, 0] > 0) == (targets[:, 0] > 0.5)
    else:
        raise MisconfigurationException(
            f'InvariancePenalty: {call} has {logits.shape[1]} labels for each sample, and method="clove" compares the'
            " confidence in one. Choose another method."
        )
    return torch.stack([probability, right.to(probability)], 1)


def _gradient(trainer: "Trainer", loss: Tensor, params: "Sequence[Tensor]") -> Tensor:
    """Gradient of a loss by all weights in a row, with a graph; scaled meanwhile as half precision needs it."""
    scaled, scale = host.scaled_as_loss(trainer, loss)
    found = torch.autograd.grad(scaled, params, create_graph=True, allow_unused=True)
    flat = torch.cat([
        _or_zeros(g, p).flatten().to(torch.promote_types(p.dtype, torch.float32))
        for g, p in zip(found, params, strict=True)
    ])  # fmt: skip
    return flat if scale is None else flat / scale


def _or_zeros(gradient: Tensor | None, param: Tensor) -> Tensor:
    return torch.zeros_like(param) if gradient is None else gradient
