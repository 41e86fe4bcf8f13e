"""One sampling under a policy: makes the prediction of each step, and counts what it cost."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lightning_reg.diffusion._service import (
    Condition,
    Denoiser,
    Prediction,
    can_join,
    guided_prediction,
    joined,
    rows_of,
    spread,
)

__all__ = ["Run"]


class Run:
    """The state of one sampling.

    Args:
        denoiser: The denoiser.
        condition: A row for each sample.
        null: What stands for no condition, or a negative prompt.
        count: Samples.
        steps: Of the sampler.

    """

    def __init__(self, denoiser: Denoiser, condition: Condition, null: Condition, count: int, steps: int) -> None:
        denoiser.check_guidable()
        _check_null_stays(condition, null)
        self.denoiser, self.steps = denoiser, steps
        self.condition, self.null = spread(condition, count), spread(null, count)
        self.calls = torch.zeros(count, dtype=torch.long)
        self.similarity = torch.full((count, steps), torch.nan)

    def guide(self, x: Tensor, time: Tensor, number: int) -> Prediction:
        """The prediction of a step, from x, the time and the number of the step."""
        raise NotImplementedError

    def conditional(self, x: Tensor, time: Tensor) -> Prediction:
        """The prediction under the condition alone."""
        self.calls += 1
        return self.denoiser.predict(x, time, self.condition)

    def unconditional(self, x: Tensor, time: Tensor) -> Prediction:
        """The prediction without the condition."""
        self.calls += 1
        return self.denoiser.predict(x, time, self.null)

    def both(self, x: Tensor, time: Tensor, rows: Tensor) -> tuple[Prediction, Prediction]:
        """The conditional predictions of all, and the unconditional ones of some rows, in one pass."""
        self.calls += 1
        self.calls[rows.cpu()] += 1
        null = rows_of(self.null, rows)
        if not can_join(self.condition, null):
            return self.denoiser.predict(x, time, self.condition), self.denoiser.predict(x[rows], time, null)
        count = len(x)
        made = self.denoiser.predict(torch.cat([x, x[rows]]), time, joined([self.condition, null]))
        return made.rows(slice(count)), made.rows(slice(count, None))

    def guided_rows(
        self, x: Tensor, time: Tensor, rows: Tensor, scale: float, rescale: float
    ) -> tuple[Prediction, Prediction, Prediction]:
        """Guidance for some rows, the others conditional; and the two predictions of these rows."""
        everywhere, without = self.both(x, time, rows)
        with_it = everywhere.rows(rows)
        guided = guided_prediction(with_it, without, scale, rescale).output
        return replace(everywhere, output=everywhere.output.index_copy(0, rows, guided)), with_it, without


def _check_null_stays(condition: Condition, null: object) -> None:
    is_condition = null is None or isinstance(null, Tensor | Mapping)
    is_longer = isinstance(null, Tensor) and isinstance(condition, Tensor) and null.dim() == condition.dim() + 1
    if not is_condition or is_longer:
        found = f"shape {tuple(null.shape)}" if isinstance(null, Tensor) else type(null).__name__
        raise ValueError(
            "AdaptiveGuidance: `null` must stand still from step to step, got that of a null-text inversion"
            f" ({found}), which moves so that every step is guided: one that is skipped or forecast leaves its pivots."
            " Write `null_text_sample(denoiser, inversion, condition)`."
        )
