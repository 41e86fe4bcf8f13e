"""Loss-based sample reweighting: samples of a batch count by where their loss stands among the others."""

import math
from typing import TYPE_CHECKING, Literal

from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_choice, check_number
from lightning_reg.engine.host.distributed import world_size
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.run.phases import Member
from lightning_reg.engine.technique import LossTechnique
from lightning_reg.reweighting.loss_reweighting._weights import weight_statistics
from lightning_reg.reweighting.loss_reweighting.core import (
    Objective,
    Strategy,
    reweight,
    scheduled_temperature,
    weights_in_mean,
)

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.loss.call import LossCall
    from lightning_reg.engine.step import Step

__all__ = ["LossReweighting"]


class LossReweighting(LossTechnique):
    r"""Dynamic loss-based reweighting of the samples of each batch (LinUpper and its kin), for pretraining.

    The losses of the global batch are placed between the smallest and the largest (``h`` in [-delta, delta]), a shape
    turns the place into a score ``f``, and the samples' weights are :math:`\operatorname{softmax}(f / r)`, without
    gradient. ``"linupper"`` gives little weight to samples that are learned already and bounds that of very hard ones.

    A sample is what the loader counts: a row, a sequence of a flattened ``(B * T, V)`` or a ``(B, V, T)`` call, a map
    of pixels; rows that may lie otherwise (of views or loaders joined, time first) are refused. Its loss is the mean
    over its elements; ignored ones do not count, and a sample that has no others gets weight 0 and does not disturb
    the range. The global batch is that of all data-parallel ranks, which may hold different numbers of samples;
    every rank must make a loss in every step. With ``accumulate_grad_batches`` each micro-batch is weighted on its
    own, as in the authors' code. Other terms of the loss, validation and test are left alone. With
    ``reduction="none"`` your code must count all losses alike, as a mean or a sum does: a mask or weights belong into
    the function (``ignore_index``, ``weight``), and a loss that your code changes further (focal loss) is handed over
    by ``LossMixin``. Anything else is refused; under manual optimization it is not seen.

    Use it when heterogeneous, redundant data are seen about once and labels are right, with a global batch of a few
    dozen samples at least. Leave it when labels are noisy (a wrong label has a high loss and gets full weight), when
    the batch is tiny or losses have heavy outliers (one outlier presses all others to the low end), and where a sure
    gain is needed: a 0.8M GPT was 0.026 nats worse on plain text, and level where 4/5 of it was boilerplate.

    Source:
        Sow et al., "Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining", ICLR 2025,
        arXiv 2502.06733; formulas and constants are those of the authors' two code bases.

    Differs:
        Samples without a counted token are left out (0/0 there), the range is computed without cancellation, ranks are
        numbered globally (one code base takes the local rank), and no value is read on the host. ``max_weight`` and
        ``level="token"`` are additions: the paper's theory assumes weights of at most 2/M, which its code does not
        enforce.

    Memory: a float32 or two per element of the loss. Two collectives of two floats per rank in each step.

    Args:
        strategy: Shape of the score. Paper: ``"linupper"`` recommended; ``"quadratic"`` prefers middle losses,
            ``"extremes"`` both ends (a contrast). Neutral: ``"uniform"``.
        r: Temperature, above 0 (``r``; ``kl_reg`` in the code). Paper: 0.4 (GPT-2 210M, 684M), 1.0 (124M). Sensible:
            0.2 to 2. Large is uniform.
        warmup_steps: Optimizer steps before reweighting begins, at least 0. Paper: 1000 of 20000 (GPT-2), 2000 (1.4B
            and 7B). A run that is no longer than that is warned of.
        warmup: What happens in these steps: ``"plain"``, the user's own loss to the last bit (GPT-2 runs), or
            ``"high_r"``, weights at the temperature ``r_start`` (1.4B and 7B runs).
        r_start: Temperature of ``warmup="high_r"`` and at the start of a schedule, above 0. Paper: 100.
        schedule: How the temperature goes from ``r_start`` to ``r`` after the warm-up. Paper: ``"constant"``, at once.
        schedule_steps: Optimizer steps that this takes; 0 with ``"constant"``.
        delta: Half the width of ``h``, above 0. Paper: 1.
        eps: Floor of the range of the losses, above 0. Paper: 1e-6.
        objective: ``"token_share"``: samples keep their share of your own mean (by number of tokens, or class weight),
            so uniform weights give your own loss (GPT-2 runs). ``"sample_mean"``: samples count by their weight alone,
            :math:`\sum_i w_i L_i` (1.4B and 7B runs). The same where all samples are of one length.
        level: What is weighted: ``"sample"`` (paper), or ``"token"``: each element of the loss by itself, token or
            pixel, against all others of the global batch.
        max_weight: Cap of the weights in units of 1/M, at least 1; what is cut off goes to the others in proportion to
            their weights. ``None``: no cap (paper). Under several ranks a cap costs one host sync per step.
        loss: Which loss call it works on, if there are several: position, ``"last"``, function name, or
            ``"model.py:42"``.
        name: Tells several instances in one Trainer apart.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> reweighting = LossReweighting(strategy="linupper", r=0.4, warmup_steps=1000)
        >>> trainer = Trainer(max_steps=20_000, callbacks=[reweighting], logger=False, enable_checkpointing=False)

    """

    watched = ("effective_samples",)

    def __init__(
        self,
        strategy: Strategy = "linupper",
        r: float = 0.4,
        warmup_steps: int = 1000,
        warmup: Literal["plain", "high_r"] = "plain",
        r_start: float = 100.0,
        schedule: Literal["constant", "linear", "cosine"] = "constant",
        schedule_steps: int = 0,
        delta: float = 1.0,
        eps: float = 1e-6,
        objective: Objective = "token_share",
        level: Literal["sample", "token"] = "sample",
        max_weight: float | None = None,
        loss: int | str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(loss=loss, name=name)
        check_choice(self, "strategy", strategy, ("linupper", "quadratic", "extremes", "uniform"))
        for argument, value in (("r", r), ("r_start", r_start), ("delta", delta), ("eps", eps)):
            check_number(self, argument, value, low=0, low_open=True)
        check_number(self, "warmup_steps", warmup_steps, low=0, integer=True)
        check_choice(self, "warmup", warmup, ("plain", "high_r"))
        check_choice(self, "schedule", schedule, ("constant", "linear", "cosine"))
        constant = schedule == "constant"
        check_number(
            self,
            "schedule_steps",
            schedule_steps,
            low=int(not constant),
            high=0 if constant else math.inf,
            integer=True,
        )
        check_choice(self, "objective", objective, ("token_share", "sample_mean"))
        check_choice(self, "level", level, ("sample", "token"))
        check_number(self, "max_weight", max_weight, low=1, optional=True)
        self.strategy, self.r, self.warmup_steps, self.warmup, self.r_start = strategy, r, warmup_steps, warmup, r_start
        self.schedule, self.schedule_steps, self.delta, self.eps = schedule, schedule_steps, delta, eps
        self.objective, self.level, self.max_weight = objective, level, max_weight
        self._attached = False

    @override
    def describe(self) -> str:
        if self.strategy == "uniform":
            return "uniform: inactive"
        moving = self.schedule != "constant"
        way = f" from {self.r_start:g}, {self.schedule} in {self.schedule_steps} steps" if moving else ""
        before = "plain" if self.warmup == "plain" else f"r={self.r_start:g}"
        warmup = f"; first {self.warmup_steps} steps {before}" if self.warmup_steps else ""
        cap = "" if self.max_weight is None else f", weights <= {self.max_weight:g}/M"
        return f"{self.strategy} per {self.level}, r={self.r:g}{way}{cap}{warmup}; {self.objective}"

    @override
    def conflict_with(self, other: Member) -> str | None:
        if isinstance(other, LossReweighting) and other.loss == self.loss:
            return "the product of two weightings does not sum to 1. Let them work on different calls with `loss=...`."
        return None

    @override
    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        never = self.warmup == "plain" and trainer.estimated_stepping_batches <= self.warmup_steps
        if never and self.strategy != "uniform":
            host.rank_zero_warn(
                "LossReweighting: nothing is reweighted: the run ends after"
                f" {trainer.estimated_stepping_batches} optimizer steps, lower `warmup_steps`={self.warmup_steps}."
            )

    @override
    def is_active(self, step: "Step") -> bool:
        return self.strategy != "uniform" and (self.warmup == "high_r" or step.global_step >= self.warmup_steps)

    @override
    def waits(self, step: "Step") -> bool:
        return self.strategy != "uniform" and step.global_step < self.warmup_steps

    @override
    def check_call(self, call: "LossCall") -> None:
        if self.level == "sample":
            super().check_call(call)

    @override
    def sample_weights(self, call: "LossCall") -> Tensor | None:
        by_token = self.level == "token"
        losses, mass = (call.element_losses, call.element_mass) if by_token else (call.losses, call.sample_mass)
        group = host.data_parallel_group(call.step.trainer)
        ranks = 1 if group is None else world_size(group)
        if not self._attached and len(losses) * ranks == 1:
            if call.step.batch_sizes != (1,):
                raise MisconfigurationException(
                    f"LossReweighting: {call} is one sample, whose weight is always 1, so nothing would be reweighted;"
                    " the number of samples of the batch is not known (a detector's list of images?), or is another."
                    " Choose a call with a row per sample by `loss=...`, or hand over the losses of the samples:"
                    " `LossMixin.reduce_loss(...)`."
                )
            host.rank_zero_warn(
                "LossReweighting: the global batch is one sample, whose weight is always 1, so nothing is reweighted."
                ' Raise the batch size, or weight tokens with `level="token"`.'
            )
        self._attached = True
        step = call.step.global_step - self.warmup_steps
        r = scheduled_temperature(step, self.r, self.r_start, self.schedule_steps, self.schedule)
        counted = None if mass is None else mass > 0
        weights = reweight(losses, self.strategy, r, self.delta, self.eps, self.max_weight, counted, group)
        if call.step.is_logging:
            call.step.log(self, "r", weights.new_tensor(r))
            for statistic, value in weight_statistics(weights, losses, counted, group).items():
                call.step.log(self, statistic, value)
        return weights_in_mean(weights, mass, self.objective, ranks)
