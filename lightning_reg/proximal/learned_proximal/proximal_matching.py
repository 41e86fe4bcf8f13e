"""Proximal matching as a callback: the loss of an unchanged regression, in stages."""

from math import isfinite
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_bool, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.technique import LossTechnique
from lightning_reg.proximal.learned_proximal.core import proximal_matching_gamma, proximal_matching_loss

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.loss.call import LossCall
    from lightning_reg.engine.step import Step

__all__ = ["ProximalMatching"]

_REGRESSIONS = (F.l1_loss, F.mse_loss, F.smooth_l1_loss, F.huber_loss)


class ProximalMatching(LossTechnique):
    r"""Trains a denoiser, or any regression, to the mode in place of the mean: what is missed by a width counts 1.

    .. math:: 1 - \exp\bigl(-\|f(y) - x\|_2^2 / \gamma^2\bigr)

    in the place of each sample's loss. The gradient vanishes far from the target, so the first part of the training is
    on your own loss: write ``F.l1_loss(self.net(noisy), clean)`` in ``training_step``. Then the width is halved from
    stage to stage. The paper's learning rate of the second part is a tenth of that of the first (1e-3, 1e-4, Adam).

    Use it beside :class:`NonNegative` to train a :class:`LPN`, whose prior is then the logarithm of the data's density,
    or to let a regression find modes. Leave it where the mean squared error is what is asked for. Where
    ``training_step`` computes its loss by hand, :class:`ProximalMatchingLoss` is the same as a module.

    Source:
        Fang, Buchanan and Sulam, "What's in a Prior? Learned Proximal Networks for Inverse Problems", ICLR 2024, arXiv
        2310.14344; schedule of the released code.

    Differs:
        The factor in front of the exponential is 1, as in the released code; the theory has a factor that depends on
        the width. The first part is on the loss of your code, which is the mean absolute error in the paper. Under
        ``reduction="sum"`` a sample counts once per element, as in your loss.

    Args:
        gamma_min: Width of the last stage, above 0, in the unit of the distance of a whole sample. Paper: 0.08 times
            the root of the number of elements of a sample (2.24 for 28 x 28, 17.7 for 3 x 128 x 128); one that is
            right for small images gives no gradient on large ones.
        widths: Number of widths, each half of the one before, at least 1. Paper: 4.
        pretrain: Share of the training's optimizer steps (under manual optimization batches) on your own loss, in
            [0, 1]. Paper: 0.5. Neutral: 1.
        elementwise: Whether each element is a sample of its own: one dimension, or a prior that factorizes. Losses are
            then the mean over a sample's elements.
        loss: Which loss call it works on.
        name: Tells several instances in one Trainer apart.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> matching = ProximalMatching(gamma_min=2.24)
        >>> trainer = Trainer(max_steps=40_000, callbacks=[matching], logger=False, enable_checkpointing=False)

    """

    def __init__(
        self,
        gamma_min: float,
        widths: int = 4,
        pretrain: float = 0.5,
        elementwise: bool = False,
        loss: int | str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(loss=loss, name=name)
        check_number(self, "gamma_min", gamma_min, low=0, low_open=True)
        check_number(self, "widths", widths, low=1, integer=True)
        check_number(self, "pretrain", pretrain, low=0, high=1)
        check_bool(self, "elementwise", elementwise)
        self.gamma_min, self.widths, self.pretrain, self.elementwise = gamma_min, widths, pretrain, elementwise
        self._steps: int | None = None

    @override
    def describe(self) -> str:
        if self.pretrain == 1:
            return "pretrain=1: inactive"
        first = self.gamma_min * 2 ** (self.widths - 1)
        stages = f" to {self.gamma_min:g} in {self.widths} stages" if self.widths > 1 else ""
        return f"gamma {first:g}{stages}, after {self.pretrain:g} of the training on the module's own loss"

    @override
    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        steps = trainer.estimated_stepping_batches
        if self.pretrain < 1 and (not isfinite(steps) or steps < 0):
            raise MisconfigurationException(
                "ProximalMatching has stages in shares of the training, whose length is not known. Give the Trainer"
                " `max_steps`."
            )
        self._steps = int(steps) if isfinite(steps) else None

    def gamma(self, step: int) -> float | None:
        """The width after so many optimizer steps of the present training; ``None`` on the module's own loss."""
        if self._steps is None or self.pretrain == 1:
            return None
        first = round(self.pretrain * self._steps)
        return proximal_matching_gamma(step, self.gamma_min, self._steps, first, self.widths)

    @override
    def is_active(self, step: "Step") -> bool:
        return self.gamma(_steps_so_far(step)) is not None

    @override
    def waits(self, step: "Step") -> bool:
        return self.pretrain < 1

    @override
    def check_call(self, call: "LossCall") -> None:
        _check_regression(call)

    @override
    def change_losses(self, call: "LossCall") -> Tensor | None:
        gamma, targets = self.gamma(_steps_so_far(call.step)), _check_regression(call)
        if gamma is None:
            return None
        if call.step.is_logging:
            call.step.log(self, "gamma", torch.tensor(gamma))
        losses = proximal_matching_loss(call.input, targets, gamma, self.elementwise, reduction="none")
        return losses.flatten(1).mean(1) if losses.dim() > 1 else losses


def _steps_so_far(step: "Step") -> int:
    if step.module.automatic_optimization:
        return step.global_step
    return host.batches_so_far(step.trainer) - 1  # Lightning's count is of the steps of all optimizers


def _check_regression(call: "LossCall") -> Tensor:
    """The targets of a call that compares numbers with as many numbers of a sample."""
    targets = call.target
    if call.function not in _REGRESSIONS or targets is None or targets.shape != call.input.shape:
        found = "no targets" if targets is None else f"{tuple(call.input.shape)} and {tuple(targets.shape)}"
        raise MisconfigurationException(
            f"ProximalMatching compares predictions with targets of the same shape, in F.l1_loss, F.mse_loss,"
            f" F.smooth_l1_loss or F.huber_loss, found {found} in {call}. If there is such a call too, choose it with"
            " `loss=...`; a loss by hand becomes `ProximalMatchingLoss`."
        )
    return targets
