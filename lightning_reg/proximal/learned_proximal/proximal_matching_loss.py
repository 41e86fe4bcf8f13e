"""The loss of proximal matching, with its schedule."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.engine.host.arguments import check_bool, check_choice, check_number
from lightning_reg.proximal.learned_proximal.core import proximal_matching_gamma, proximal_matching_loss

__all__ = ["ProximalMatchingLoss"]


class ProximalMatchingLoss(nn.Module):
    r"""Turns a denoiser, or any regression, from the mean to the mode: it counts what is missed by more than a width.

    .. math:: 1 - \exp\bigl(-\|f(y) - x\|_2^2 / \gamma^2\bigr)

    averaged over the samples. Its gradient vanishes far from the target, so the first steps are on the mean absolute
    error, and the width is halved from stage to stage: hand over the step, ``self.loss(predictions, targets,
    self.global_step)``. The learning rate of the second part is a tenth of the first's in the paper (1e-3, 1e-4, Adam):
    a ``MultiStepLR`` with ``milestones=[pretrain_steps]`` and ``"interval": "step"``.

    Use it to train a :class:`LPN`, whose prior is then the logarithm of the data's density, or to let a regression find
    modes. Leave it where the mean squared error is what is asked for: its minimizer has the higher PSNR.

    Source:
        Fang, Buchanan and Sulam, "What's in a Prior? Learned Proximal Networks for Inverse Problems", ICLR 2024, arXiv
        2310.14344; schedule of the released code.

    Differs:
        The factor in front of the exponential is 1, as in the released code, so that the loss is in [0, 1]; the theory
        has a factor that depends on the width.

    Args:
        gamma_min: Width of the last stage, above 0, in the unit of the distance of a whole sample. Paper: 0.08 times
            the root of the number of elements of a sample (2.24 for 28 x 28, 17.7 for 3 x 128 x 128); one that is
            right for small images gives no gradient on large ones.
        stages: Number of widths, each half of the one before, at least 1. Paper: 4.
        steps: Optimizer steps of the whole training. Paper: 40,000.
        pretrain_steps: Of them those on the mean absolute error, less than ``steps``. Paper: 20,000.
        elementwise: Whether each element is a sample of its own: one dimension, or a prior that factorizes.
        reduction: ``"mean"`` or ``"sum"`` over the samples.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> import torch
        >>> loss = ProximalMatchingLoss(gamma_min=2.24, steps=2_000, pretrain_steps=1_000)
        >>> x = torch.zeros(4, 1, 28, 28)
        >>> loss(x + 0.1, x, step=0), loss(x + 0.1, x)
        (tensor(0.1000), tensor(0.7904))

    """

    def __init__(
        self,
        gamma_min: float,
        stages: int = 4,
        steps: int = 40_000,
        pretrain_steps: int = 20_000,
        elementwise: bool = False,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        super().__init__()
        check_number(self, "gamma_min", gamma_min, low=0, low_open=True)
        check_number(self, "stages", stages, low=1, integer=True)
        check_number(self, "steps", steps, low=1, integer=True)
        check_number(self, "pretrain_steps", pretrain_steps, low=0, high=steps, high_open=True, integer=True)
        check_bool(self, "elementwise", elementwise)
        check_choice(self, "reduction", reduction, ("mean", "sum"))
        self.gamma_min, self.stages, self.elementwise, self.reduction = gamma_min, stages, elementwise, reduction
        self.steps, self.pretrain_steps = steps, pretrain_steps

    def gamma(self, step: int | None = None) -> float | None:
        """The width at a step, the last one without; ``None`` for the mean absolute error."""
        if step is None:
            return self.gamma_min
        return proximal_matching_gamma(step, self.gamma_min, self.steps, self.pretrain_steps, self.stages)

    @override
    def forward(self, predictions: Tensor, targets: Tensor, step: int | None = None) -> Tensor:
        """The loss, ``()``, of predictions and targets ``(B, ...)`` at a step; without one that of the last stage."""
        gamma = self.gamma(step)
        if gamma is None:
            return F.l1_loss(predictions, targets, reduction=self.reduction)
        return proximal_matching_loss(predictions, targets, gamma, self.elementwise, self.reduction)
