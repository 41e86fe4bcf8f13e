"""A frozen sampler with the judges of what it makes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from lightning_reg.diffusion._service import Condition, Denoiser
from lightning_reg.diffusion.sage.core import residual_path
from lightning_reg.engine.host.procedures import left_as_found

__all__ = ["Judge", "JudgedSampler", "check_search", "frozen"]

Judge = Callable[[Tensor], Tensor]


class JudgedSampler:
    """Deterministic samples of a denoiser, and the logits that judges give them.

    Args:
        denoiser: The model, in evaluation mode.
        judges: Each gives class scores ``(B, C)`` to samples.
        null: What stands for no condition.
        scale: Of the guidance.
        steps: Of the sampler.

    """

    def __init__(self, denoiser: Denoiser, judges: Sequence[Judge], null: Condition, scale: float, steps: int) -> None:
        self.denoiser, self.judges, self.null, self.scale, self.steps = denoiser, judges, null, scale, steps

    def samples(self, noise: Tensor, condition: Condition, residual: float = 0.0, *, through: bool = False) -> Tensor:
        """Samples, with a gradient through the sampler or around it.

        Args:
            noise: ``(B, ...)``.
            condition: A row for each.
            residual: Weight of the way around.
            through: Whether the gradient goes through the sampler as well.

        Returns:
            ``(B, ...)``.

        """
        with torch.set_grad_enabled(through):
            made = self.denoiser.sample(noise, condition, self.null, self.scale, self.steps, checkpoint=through)
        return residual_path(made, noise, residual)

    def logits(self, samples: Tensor) -> list[Tensor]:
        """What the judges say, ``(B, C)`` each."""
        return [judge(samples) for judge in self.judges]


@contextmanager
def frozen(judges: Sequence[Judge]) -> Iterator[None]:
    """Judges that are networks run in evaluation mode, and are left as they were found."""
    with ExitStack() as stack:
        for judge in judges:
            if isinstance(judge, nn.Module):
                stack.enter_context(left_as_found(judge))
                judge.eval()
        yield


def check_search(
    name: str, judges: Sequence[Judge], counts: dict[str, int], positive: dict[str, float], threshold: float = 0.5
) -> None:
    """Refuses arguments outside their ranges.

    Args:
        name: Who asks.
        judges: At least one.
        counts: Numbers that are at least 1, by name.
        positive: Numbers above 0.
        threshold: Of a probability, in [0, 1].

    Raises:
        ValueError: If one is outside.

    """
    if not judges:
        raise ValueError(f"{name}: `judges` must be at least one classifier, got none.")
    for argument, count in counts.items():
        if not count >= 1:
            raise ValueError(f"{name}: `{argument}` must be at least 1, got {count!r}.")
    for argument, value in positive.items():
        if not value > 0:
            raise ValueError(f"{name}: `{argument}` must be above 0, got {value!r}.")
    if not 0 <= threshold <= 1:
        raise ValueError(f"{name}: `threshold` must be in [0, 1], got {threshold!r}.")
