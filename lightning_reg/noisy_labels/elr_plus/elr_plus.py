"""ELR+: early-learning regularization with two networks, averaged teachers and mixup."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_bool, check_choice, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.left_out import LeftOut
from lightning_reg.engine.networks.trained import PeerInit
from lightning_reg.engine.run.phases import Member
from lightning_reg.noisy_labels._early_learning import (
    agreement_with,
    clamped_probabilities,
    log_disagreement,
)
from lightning_reg.noisy_labels._target_table import TargetTable, check_arguments
from lightning_reg.noisy_labels._two_networks import TwoNetworks
from lightning_reg.noisy_labels.elr_plus._mixup import mix_batch, mix_rows
from lightning_reg.noisy_labels.elr_plus._networks import Networks, Notes
from lightning_reg.noisy_labels.elr_plus.core import one_hot_labels, refine_labels, sigmoid_rampup

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

    from lightning_reg.engine.loss.call import LossCall
    from lightning_reg.engine.step import Step

__all__ = ["ELRPlusCallback"]


class ELRPlusCallback(TwoNetworks):
    r"""ELR+: two networks, each regularized towards what a weight average of the other one predicts.

    A second network of the module's class is trained beside the module, with its own weights, optimizer, schedulers and
    order of the data: an epoch of it follows each epoch of the module, before validation. A step of network k, with o
    the other one and :math:`\bar\theta` averages of weights:

    1. :math:`\lambda \sim \text{Beta}(a, a)`, :math:`\lambda \leftarrow \max(\lambda, 1 - \lambda)`, one for the batch,
       and a permutation; images, labels and targets are mixed with the same two;
    2. :math:`t_k[i] \leftarrow \beta\, t_k[i] + (1 - \beta) \operatorname{softmax}(f_{\bar\theta_o}(x_i))` on the
       images before mixing, without gradient;
    3. loss of the mixed images and labels :math:`+\; r(s)\, \lambda_\text{ELR} \log(1 - \langle q, p \rangle)`, q the
       mixed targets, p the clamped softmax of network k;
    4. after the optimizer step :math:`\bar\theta_k \leftarrow a(s)\,\bar\theta_k + (1 - a(s))\,\theta_k`.

    The module stays network 1, in checkpoints too; :meth:`ensemble` gives the paper's predictor, the mean of the logits
    of both networks. Other techniques act on network 1 only. Network 2 follows what hooks and callbacks set on the
    module at each step's start (modes of layers, ``requires_grad``, groups added to the optimizer, as by
    BackboneFinetuning); what they do to its gradients, weights, or learning rates of other groups (a callback that
    zeroes or clips gradients, say) does not reach network 2: write it as ``configure_gradient_clipping``, a scheduler
    or into ``training_step``, which both have.

    Use it when 10-80 % of the labels of a single-label classification may be wrong and double time is no obstacle.

    Source:
        Liu et al., "Early-Learning Regularization Prevents Memorization of Noisy Labels", NeurIPS 2020,
        arXiv 2007.00151, algorithm 2; order of the updates, clamp, ramps and label refinement are the authors' code's,
        which made the published numbers.

    Differs:
        The averages start as copies of their networks, not at an independent random initialization (nor at 0, as in the
        paper's algorithm 2); with the ramp their first decay is 0.0067, so nothing is left of either after a few steps.
        Predictions of a teacher and weights that are not finite leave targets and averages as they are, and are counted
        (``not_finite`` in the log). Batch-norm statistics of a teacher, which its train mode does not use, stay as they
        are. Label refinement is an option and does not follow from the number of classes; with it an ignored sample
        counts as one of loss 0. Under DDP each rank mixes its own batch with a lambda of its own.

    Memory: three more copies of the parameters (network 2 and two averages), one more of gradients and optimizer state,
    two tables of N x C float32. Time: two training passes and two forward passes of a teacher for each batch. The
    second network is not compiled. It prints nothing while it trains, and Lightning writes no checkpoint meanwhile.

    Args:
        lam: Weight of the regularizer (lambda), at least 0. Paper: 3 (CIFAR-10, symmetric noise; Clothing1M,
            WebVision), 1 (CIFAR-10, asymmetric), 7 (CIFAR-100). Neutral: 0, together with ``mixup_alpha=0``.
        beta: Momentum of the targets, in [0, 1). Paper: 0.7, 0.9 (CIFAR-10 asymmetric, CIFAR-100).
        clamp: Floor of the probabilities, in [1e-6, 0.5). Authors' code: 1e-4.
        lam_rampup_steps: Optimizer steps over which ``lam`` grows to its value, at least 0. Authors' code: 0, 40000
            (CIFAR-100, ``coef_step``).
        mixup_alpha: Parameter a of the Beta distribution that lambda is drawn from, at least 0; 0 leaves images as they
            are. Paper: 1.
        decay: Decay of the averages (gamma), in [0, 1). Paper: 0.997, 0.9999 (Clothing1M).
        decay_rampup_steps: Optimizer steps over which the decay grows to its value, at least 0. Authors' code: 40000
            (CIFAR, about half of the training; scale it with yours), 0 (Clothing1M, WebVision): the decay is then
            min(1 - 1/(s + 1), gamma).
        refine: Whether labels are re-weighted by the targets. Authors' code: for 100 classes only.
        networks: 2, or 1 to leave out the second: the module's own average is then its teacher. Paper: 2.
        averaging: Whether teachers are averages; otherwise they are the networks as they are. Paper: yes.
        teacher: ``"train"`` runs teachers in the modes that the module's layers train in: on the statistics of the
            batch, with dropout, as the authors' code does, but for layers that are set to eval mode; ``"eval"`` on the
            running statistics of their networks, without.
        peer_init: First weights of network 2. ``"reset"``: drawn anew by the layers' own ``reset_parameters``, but for
            frozen ones. ``"copy"``: those of the module, for pretrained weights; order of the data and mixup then tell
            the two apart.
        validation: ``"network"`` validates the module as it is. ``"ensemble"`` lets ``logits_layer`` answer for both
            networks in validation, for metrics of the paper's predictor; inside an epoch the second one lags behind.
        logits_layer: Layer whose output are the logits, for ``validation`` and :meth:`ensemble`, named as in
            ``named_modules()``; "" for ``forward`` of the module itself.
        input_key: Entry of the batch with the images, for mixup: key, position or both (``"labelled.0"``). ``None``:
            the first of a sequence, the only floating-point tensor of a mapping.
        num_samples: Number of training samples N; ``None`` for the length of the training dataset. Needed with
            ``index_key``.
        num_classes: Number of classes C; ``None`` to read it off the logits.
        table_dtype: Type the targets are kept in, ``"float16"`` for half the memory. The loss is computed in float32.
        table_device: ``"module"`` keeps the targets where the module is; ``"cpu"`` in host memory, for one host sync
            per step.
        loss: Which loss call it works on, if there are several: position, ``"last"``, function name, or
            ``"model.py:42"``.
        index_key: Batch entry with the sample indices; ``None`` to follow them from the DataLoader.
        name: Tells several instances in one Trainer apart.
        seed: Seed of network 2, its order of the data, and mixup.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> elr_plus = ELRPlusCallback(lam=3.0, beta=0.7, decay_rampup_steps=20_000)
        >>> trainer = Trainer(max_epochs=200, callbacks=[elr_plus], logger=False, enable_checkpointing=False)

    """

    takes_mixed: ClassVar[bool] = True  # its own mixing; that of others is a conflict
    _without: ClassVar[str] = "the second network and averages lack"

    _networks: Networks

    def __init__(
        self,
        lam: float = 3.0,
        beta: float = 0.7,
        clamp: float = 1e-4,
        lam_rampup_steps: int = 0,
        mixup_alpha: float = 1.0,
        decay: float = 0.997,
        decay_rampup_steps: int = 40_000,
        refine: bool = False,
        networks: Literal[1, 2] = 2,
        averaging: bool = True,
        teacher: Literal["train", "eval"] = "train",
        peer_init: PeerInit = "reset",
        validation: Literal["network", "ensemble"] = "network",
        logits_layer: str = "",
        input_key: str | None = None,
        num_samples: int | None = None,
        num_classes: int | None = None,
        table_dtype: Literal["float32", "float16", "bfloat16"] = "float32",
        table_device: Literal["module", "cpu"] = "module",
        loss: int | str | None = None,
        index_key: str | None = None,
        name: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(loss=loss, index_key=index_key, name=name, seed=seed)
        check_arguments(self, lam, beta, clamp, num_samples, num_classes, table_dtype, table_device)
        check_number(self, "mixup_alpha", mixup_alpha, low=0)
        check_number(self, "decay", decay, low=0, high=1, high_open=True)
        for argument, value in (("lam_rampup_steps", lam_rampup_steps), ("decay_rampup_steps", decay_rampup_steps)):
            check_number(self, argument, value, low=0, integer=True)
        check_bool(self, "refine", refine)
        check_bool(self, "averaging", averaging)
        check_choice(self, "networks", networks, (1, 2))
        check_choice(self, "teacher", teacher, ("train", "eval"))
        check_choice(self, "peer_init", peer_init, ("reset", "copy"))
        check_choice(self, "validation", validation, ("network", "ensemble"))
        self.lam, self.beta, self.clamp, self.lam_rampup_steps = lam, beta, clamp, lam_rampup_steps
        self.mixup_alpha, self.decay, self.decay_rampup_steps = mixup_alpha, decay, decay_rampup_steps
        self.refine, self.networks, self.averaging, self.teacher = refine, networks, averaging, teacher
        self.peer_init, self.validation, self.logits_layer = peer_init, validation, logits_layer
        self.input_key, self.num_samples, self.num_classes = input_key, num_samples, num_classes
        self.table_dtype, self.table_device = table_dtype, table_device
        used, length = (decay, decay_rampup_steps) if averaging else (0.0, 0)
        train = teacher == "train"
        self._networks = Networks(networks, init=peer_init, in_train_mode=train, decay=used, rampup_steps=length)
        self._tables = [
            TargetTable(type(self).__name__, num_samples, num_classes, table_dtype, on_cpu=table_device == "cpu")
            for _ in range(networks)
        ]
        self._has_stepped = False

    @override
    def describe(self) -> str:
        if not self._works():
            return "lam=0, mixup_alpha=0: inactive"
        start = {"reset": "two networks, the second initialized anew", "copy": "two networks, equal at the start"}
        who = start[self.peer_init] if self.networks == 2 else "one network"
        ramp = f" from step {self.decay_rampup_steps:,} on" if self.decay_rampup_steps else ""
        averages = f"averages of decay {self.decay:g}{ramp}" if self.averaging else "no averages"
        mixup = f"mixup {self.mixup_alpha:g}" if self.mixup_alpha else "no mixup"
        return f"lam={self.lam:g}, beta={self.beta:g}, {mixup}; {who}, {averages}; validates the {self.validation}"

    @override
    def check(self, trainer: "Trainer", module: "LightningModule") -> None:
        super().check(trainer, module)
        if self.validation == "ensemble" and host.is_compiled(module):
            raise MisconfigurationException(
                "ELRPlusCallback(validation='ensemble') replaces a layer's `forward` during validation, which compiled"
                " code does not notice. Write `validation='network'`, and use `ensemble` after the fit."
            )

    @override
    def conflict_with(self, other: Member) -> str | None:
        if self._works() and other.mixes != "none":
            name = type(other).__name__
            return f"its teachers see the images that it mixes itself, and {name} mixes them too. Remove {name}."
        return super().conflict_with(other)

    @property
    @override
    def mixes(self) -> Literal["none", "some", "all"]:
        """Every batch, unless ``mixup_alpha`` is 0."""
        return "all" if self.mixup_alpha else "none"

    @property
    @override
    def trains_second(self) -> bool:
        return self.networks == 2 and self._works()

    # -- the fit ------------------------------------------------------------------------------------------------------

    @override
    def transform_batch(self, batch: Any, step: "Step") -> Any:
        self._networks.begin_step(step)
        step.notes[self] = Notes(self._networks.teacher_of(step).see(step, self).call)
        if not self.mixup_alpha:
            return batch
        return mix_batch(batch, step, self, alpha=self.mixup_alpha, input_key=self.input_key, in_targets=self.refine)

    @override
    def change_targets(self, call: "LossCall") -> Tensor | None:
        if not self.refine:
            return None
        targets = self._mixed_targets(call)
        if call.function is not F.cross_entropy or targets is None:
            raise MisconfigurationException(
                f"ELRPlusCallback(refine=True) gives probabilities as labels, which {call.name} does not take. Use"
                " cross_entropy, or leave `refine` out."
            )
        return refine_labels(mix_rows(one_hot_labels(call.labels, targets.shape[1]), call.step), targets)

    @override
    def loss_term(self, call: "LossCall") -> Tensor | None:
        targets = self._mixed_targets(call)
        if targets is None:
            return None
        ramp = sigmoid_rampup(self._networks.steps_of(call.step) + 1, self.lam_rampup_steps)
        if call.step.is_logging:
            for name, value in agreement_with(call.step.notes[self].targets, call.labels).items():
                call.step.log(self, name, value)
            self._log_networks(call)
        return ramp * self.lam * log_disagreement(clamped_probabilities(call.logits, self.clamp), targets)

    @override
    def on_before_optimizer_step(
        self, trainer: "Trainer", pl_module: "LightningModule", optimizer: "Optimizer"
    ) -> None:
        self._has_stepped = True

    @override
    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._has_stepped and self._works():
            self._networks.after_step()
        self._has_stepped = False
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_validation_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        if self.validation == "ensemble":
            self._networks.begin_joint_validation(self.logits_layer)

    @override
    def on_validation_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        if self._networks.end_joint_validation() == 0:
            raise MisconfigurationException(
                "ELRPlusCallback(validation='ensemble') averages the outputs of"
                f" {self.logits_layer or 'the module itself'!r}, which `validation_step` did not call. Name the layer"
                " that gives it the logits (`logits_layer='net'`), or write `validation='network'`."
            )

    # -- afterwards ---------------------------------------------------------------------------------------------------

    def ensemble(self, module: "LightningModule") -> nn.Module:
        """The paper's predictor: the mean of the logits of both networks.

        Args:
            module: The module, as it was trained or loaded from a checkpoint.

        Returns:
            A module in eval mode with copies of both networks, called as ``logits_layer`` is.

        Raises:
            RuntimeError: If there is no second network.

        """
        return self._networks.ensemble(module, self, self.logits_layer)

    @override
    def _works(self) -> bool:
        return self.lam > 0 or self.mixup_alpha > 0

    def _mixed_targets(self, call: "LossCall") -> Tensor | None:
        """Moves the targets of the batch and mixes them as its images, once in a step; ``None`` without a teacher."""
        notes: Notes = call.step.notes[self]
        if notes.targets is None and notes.teacher is not None:
            table = self._tables[self._networks.number_of(call.step)]
            predicted = notes.teacher.logits.float().softmax(1)
            notes.targets = table.update(call.samples(self), predicted, call.labels, self.beta, call.sample_mass)
        return None if notes.targets is None else mix_rows(notes.targets, call.step)

    @override
    def _left_out(self) -> list[LeftOut]:
        return [*super()._left_out(), self._networks.left_out]
