"""Label smoothing: a share of the target goes to all classes."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.host.arguments import check_number
from lightning_reg.engine.run.phases import Member
from lightning_reg.engine.technique import LossTechnique
from tests.tutorial.label_smoothing.core import label_smoothing_term

if TYPE_CHECKING:
    from lightning_reg.engine.loss.call import LossCall

__all__ = ["LabelSmoothing"]


class LabelSmoothing(LossTechnique):
    r"""Trains on :math:`(1 - \epsilon)\,[y = c] + \epsilon / C` in place of the labels.

    Source:
        Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016, arXiv 1512.00567,
        section 7.

    Differs:
        Nothing. The smoothed part is added as a term of each sample, so class weights count as in the user's loss.

    Args:
        epsilon: Share that goes to all classes, in [0, 1). Paper: 0.1. Neutral: 0.
        loss: Which loss call it works on, if there are several.
        name: Tells several instances in one Trainer apart.

    Raises:
        ValueError: If ``epsilon`` is outside [0, 1).

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[LabelSmoothing(0.1)], logger=False, enable_checkpointing=False)

    """

    def __init__(self, epsilon: float = 0.1, loss: int | str | None = None, name: str | None = None) -> None:
        super().__init__(loss=loss, name=name)
        check_number(self, "epsilon", epsilon, low=0, high=1, high_open=True)
        self.epsilon = epsilon

    @override
    def describe(self) -> str:
        return f"epsilon={self.epsilon:g}"

    @override
    def conflict_with(self, other: Member) -> str | None:
        if other.mixes == "none":
            return None
        return "a mixed sample has two labels, which are smooth already. Remove one of them."

    @override
    def loss_term(self, call: "LossCall") -> Tensor | None:
        if not self.epsilon:
            return None
        terms = [label_smoothing_term(copy.logits, call.labels) for copy in call.copies()]
        return self.epsilon * torch.stack(terms).mean(0)
