"""ClassDropout: the softmax of a loss runs over a random subset of the classes."""

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_reg.dropout.gtrs.core import candidate_subset, masked_classes
from lightning_reg.engine.host.arguments import check_bool, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.run.phases import Member, phases_of
from lightning_reg.engine.technique import LossTechnique

if TYPE_CHECKING:
    from lightning_reg.engine.loss.call import LossCall
    from lightning_reg.engine.step import Step

__all__ = ["ClassDropout"]


class ClassDropout(LossTechnique):
    r"""Trains each step's softmax on a random subset of the classes, and on each row's own class.

    .. math:: \ell_i = -\log \frac{e^{z_{i y_i}}}{\sum_{c \in I \cup \{y_i\}} e^{z_{ic}}}

    with one I of :math:`\lfloor \kappa C \rfloor` classes for the batch, drawn anew in each step. Logits of other
    classes are minus infinity in the loss; what else looks at the logits (metrics, terms of other techniques) sees all
    of them. Logged is ``left_out``, the probability of the classes left out. So a class competes with ever other ones,
    and any subset of classes can be asked for at inference: ``logits[:, subset].argmax(1)``.

    Use it for many classes of which few are asked for at a time. Leave it for a handful of classes, where half of them
    say little. Losses only become smaller, since fewer classes compete: compare accuracies, not losses. Beside others
    that change the same logits the order of the callbacks counts: columns that one before it has added are left out as
    classes are, and one behind it does without those that are (``HardNegativeMixing`` mixes none). On digits, asked for
    among ten classes, five and two, three seeds showed no effect (``benchmarks/effects/class_dropout.py``).

    Source:
        Li et al., "Generalized Trajectory Scoring for End-to-end Multimodal Planning", 2025, arXiv 2506.06664, whose
        dropout of candidates this carries over to classes.

    Differs:
        An extension that is ours and not in the paper: its candidates are inputs of the network, and are left out of
        attention too (:class:`CandidateDropout`). A row's own class always stays, without which it has no loss.

    Args:
        keep: Share :math:`\kappa` of the classes that stay for all rows, in (0, 1]. Paper, of candidates: 0.5.
            Neutral: 1.
        same_on_ranks: Whether all ranks leave out the same classes.
        loss: Which loss call it works on, if there are several: its position in the step, its function's name, or its
            place in the code. ``None``: there must be just one.
        name: Tells several instances in one Trainer apart.
        seed: Seed of the draws.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> dropout = ClassDropout(keep=0.5)
        >>> trainer = Trainer(max_epochs=10, callbacks=[dropout], logger=False, enable_checkpointing=False)

    """

    def __init__(
        self,
        keep: float = 0.5,
        same_on_ranks: bool = False,
        loss: int | str | None = None,
        name: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(loss=loss, name=name, seed=seed)
        check_number(self, "keep", keep, low=0, low_open=True, high=1)
        check_bool(self, "same_on_ranks", same_on_ranks)
        self.keep, self.same_on_ranks = keep, same_on_ranks

    @override
    def describe(self) -> str:
        if self.keep == 1:
            return "keep=1: inactive"
        return f"keep={self.keep:g}; " + (
            "one subset for all ranks" if self.same_on_ranks else "a subset for each rank"
        )

    @override
    def conflict_with(self, other: Member) -> str | None:
        if self.keep == 1:
            return None
        if other.mixes != "none":
            return "a mixed sample has two classes, and ClassDropout would keep one of them. Remove one of the two."
        if "change_targets" in phases_of(other) and other.loss == self.loss:
            return (
                f"{type(other).__name__} replaces the targets of the same call, and ClassDropout would leave out"
                " classes that are asked for then. Remove one of them, or let them work on different calls with"
                " `loss=...`."
            )
        return None

    @override
    def is_active(self, step: "Step") -> bool:
        return self.keep < 1

    @override
    def change_input(self, call: "LossCall") -> Tensor | None:
        logits, labels = call.loss_input, call.target
        if call.function is not F.cross_entropy or labels is None:
            raise MisconfigurationException(
                f"ClassDropout leaves classes out of a softmax, and {call} has none. If there is such a call too,"
                " choose it with `loss='cross_entropy'`."
            )
        if labels.is_floating_point() or call.arguments.get("label_smoothing"):
            what = "probabilities as targets" if labels.is_floating_point() else "label smoothing"
            raise MisconfigurationException(
                f"ClassDropout: {call} has {what}, which ask every class for a share: of a class that is left out the"
                " loss would be infinite. Use class indices as targets without smoothing."
            )
        generator = self.generator(call.step, same_on_ranks=self.same_on_ranks)
        axis = min(logits.dim() - 1, 1)
        kept = candidate_subset(logits.shape[axis], self.keep, generator).to(logits.device, non_blocking=True)
        masked = masked_classes(logits, labels, kept)
        if call.step.is_logging:
            there = (masked.detach().float().logsumexp(axis) - logits.detach().float().logsumexp(axis)).exp()
            call.step.log(self, "left_out", 1 - there.mean())
        return masked
