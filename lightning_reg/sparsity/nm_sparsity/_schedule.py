"""When an N:M constraint comes in: dense, sparsifying, fine-tuning; the decay and the frames between."""

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.sparsity.nm_sparsity._layers import Weight
from lightning_reg.sparsity.nm_sparsity.core import decay_factor

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = [
    "NEVER",
    "Schedule",
    "check_phases",
    "length_of_training",
    "make_schedule",
    "pattern_scalars",
    "say_it_goes_back",
]

NEVER = 1 << 62  # a step that no training gets to
_DONE_AT = 0.7  # share of the training at which the decay is over: the paper's advice
_NEGLIGIBLE = 1e-3


@dataclass(frozen=True)
class Schedule:
    """Phases of a training, in optimizer steps.

    Args:
        recipe: The recipe.
        dense: First step that is not dense.
        final: First step of fine-tuning with the target pattern; ``None`` if the length of training is not known and
            not needed.
        beta: Rate of the decay per step; infinite for none.

    """

    recipe: str
    dense: int
    final: int | None
    beta: float

    def phase(self, step: int) -> Literal["dense", "sparsify", "finetune"]:
        """Phase of the step with this number, from 0."""
        if step < self.dense:
            return "dense"
        return "finetune" if self.final is not None and step >= self.final else "sparsify"

    def factor(self, step: int) -> float:
        """What pruned weights are multiplied by in this step (D)."""
        phase = self.phase(step)
        if phase == "dense":
            return 1.0
        if phase == "finetune" or not self.recipe.startswith("mdgf") or math.isinf(self.beta):
            return 0.0
        return decay_factor("linear" if self.recipe == "mdgf_linear" else "exp", step - self.dense, self.beta)

    def frame(self, step: int, frames: int) -> int:
        """Which of so many equally long frames the step is in; the last one goes on through fine-tuning."""
        if self.final is None or frames == 1:
            return 0
        length = (self.final - self.dense) / frames
        starts = [self.dense + int(frame * length) for frame in range(1, frames)]
        return bisect_right(starts, step)

    def pattern(self, patterns: Sequence[tuple[int, int]], step: int) -> tuple[int, int]:
        """N and M in this step of a weight that goes through these patterns."""
        return patterns[self.frame(step, len(patterns))]

    def is_final(self, frames: Iterable[Sequence[tuple[int, int]]], step: int) -> bool:
        """Whether weights that go through these patterns have reached the last one, and pruned weights are zero."""
        return self.factor(step) == 0.0 and all(self.pattern(p, step) == p[-1] for p in frames)


def check_phases(owner: object, shares: Mapping[str, float], steps: Mapping[str, int | None]) -> None:
    """Refuses lengths of phases outside their range.

    Args:
        owner: Whose they are; its class is named in messages.
        shares: Shares of the training by argument.
        steps: Numbers of steps by argument.

    Raises:
        ValueError: Naming class, argument, range and value.

    """
    for argument, share in shares.items():
        check_number(owner, argument, share, low=0, high=1, high_open=True)
    if sum(shares.values()) >= 1:
        arguments, values = (" and ".join(map(str, x)) for x in ([f"`{k}`" for k in shares], shares.values()))
        raise ValueError(f"{type(owner).__name__}: {arguments} must be less than 1 together, got {values}.")
    for argument, length in steps.items():
        check_number(owner, argument, length, low=0, integer=True, optional=True)


def make_schedule(
    recipe: str,
    total: float,
    beta: float | None,
    dense_phase: tuple[float, int | None],
    last_phase: tuple[float, int | None],
) -> Schedule:
    """The phases of a training.

    Args:
        recipe: The recipe.
        total: Optimizer steps of the training; infinite or negative if not known.
        beta: Rate of the decay per step; ``None`` to solve it.
        dense_phase: Length of the dense phase as a share, and in steps, which count if they are given.
        last_phase: Length of fine-tuning in the same way.

    Returns:
        The schedule.

    Raises:
        MisconfigurationException: If the length is needed and not known, or too short.

    """
    known = 0 < total < math.inf
    needs_total = recipe.startswith(("mdgf", "sdgf")) or (dense_phase[1] is None and dense_phase[0] > 0)
    if not known and needs_total:
        raise MisconfigurationException(
            f"NMSparsity(recipe={recipe!r}) counts its phases from the length of the training, which is not known. Give"
            " the Trainer `max_steps`, or `max_epochs` with a loader that has a length."
        )
    steps = int(total) if known else 0
    dense, last = (round(share * steps) if given is None else given for share, given in (dense_phase, last_phase))
    if not known:
        return Schedule(recipe, dense, None, math.inf)
    if dense + last > steps:
        raise MisconfigurationException(
            f"NMSparsity: {dense} dense steps and {last} of fine-tuning are more than the {steps} of the training."
            " Write smaller `dense_steps` and `finetune_steps`."
        )
    final = steps - last
    if beta is None:
        beta = _solved_beta(recipe, steps, dense, final) if recipe.startswith("mdgf") else math.inf
    return Schedule(recipe, dense, final, beta)


def _solved_beta(recipe: str, total: int, dense: int, final: int) -> float:
    """The rate at which D is 1e-3 (exponential) or 0 (linear) after 70 % of the training, or earlier if that is final.

    Args:
        recipe: The recipe.
        total: Optimizer steps of the training.
        dense: First step that is not dense.
        final: First step of fine-tuning.

    Returns:
        The rate per step; infinite if there is no step left to decay in.

    """
    steps = min(round(_DONE_AT * total), final) - dense
    if steps <= 0:
        return math.inf
    # The next float up, so that 1 - beta * steps is not a rounding error above 0.
    return math.nextafter(1.0 / steps, math.inf) if recipe == "mdgf_linear" else -math.log(_NEGLIGIBLE) / steps


def pattern_scalars(factor: float, patterns: Mapping[Weight, tuple[int, int]]) -> dict[str, Any]:
    """What is logged of a step.

    Args:
        factor: What pruned weights are multiplied by.
        patterns: N and M now of each sparse weight; at least one.

    Returns:
        ``factor``; ``n`` and ``m`` of the first weight; ``kept``, the share of sparse weights that are not pruned.

    """
    n, m = next(iter(patterns.values()))
    size = sum(math.prod(weight.shape) for weight in patterns)
    kept = sum(math.prod(weight.shape) * a / b for weight, (a, b) in patterns.items()) / size
    return {"factor": factor, "n": float(n), "m": float(m), "kept": kept if factor < 1.0 else 1.0}


def length_of_training(trainer: "Trainer") -> float:
    """Optimizer steps of the training; infinite or negative if not known. Says where that count may be wrong."""
    total, limited, epochs = trainer.estimated_stepping_batches, trainer.max_steps > 0, trainer.max_epochs
    if host.adds_epoch_for_statistics(trainer) and not limited and epochs is not None and epochs > 1:
        total = total * (epochs - 1) / epochs
    accumulates = any(type(c).__name__ == "GradientAccumulationScheduler" for c in host.callbacks(trainer))
    several = len(trainer.optimizers) > 1
    if accumulates and not limited:
        _warn(
            f"phases are counted from {total} optimizer steps, which is not what a training with"
            " GradientAccumulationScheduler will have. Give the Trainer `max_steps`."
        )
    elif several and limited:
        _warn(
            f"phases are counted from max_steps={total}, which counts the steps of all {len(trainer.optimizers)}"
            " optimizers, and masks count once for a batch. Give the Trainer `max_epochs` in its place, or write"
            " `dense_steps` and `finetune_steps` for it."
        )
    return total


def say_it_goes_back(before: float, now: float) -> None:
    """Warns of a resumed training that falls back into an earlier phase.

    Args:
        before: What pruned weights were multiplied by in the last step before.
        now: What they will be multiplied by.

    """
    _warn(
        f"the checkpoint was written with pruned weights multiplied by {before:.3g}, and in this training, which is"
        f" longer or has other phases, they are multiplied by {now:.3g} again: it goes back to an earlier phase. Resume"
        " with the length that the training began with, or give phases in steps."
    )


def _warn(sentence: str) -> None:
    host.rank_zero_warn(f"NMSparsity: {sentence}")
