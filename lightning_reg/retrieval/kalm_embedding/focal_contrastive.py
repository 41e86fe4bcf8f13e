"""Focal reweighting of a contrastive loss."""

from typing import TYPE_CHECKING

from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.host.arguments import check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.run.phases import Member, phases_of
from lightning_reg.engine.technique import LossTechnique
from lightning_reg.retrieval._candidates import tell_short_batch
from lightning_reg.retrieval.kalm_embedding.core import focal_weights

if TYPE_CHECKING:
    from lightning_reg.engine.loss.call import LossCall
    from lightning_reg.engine.step import Step

__all__ = ["FocalContrastive"]


class FocalContrastive(LossTechnique):
    r"""Queries whose document is still badly ranked count more than those that find it already.

    In a contrastive loss of queries and documents each query is a row of logits, similarities over a temperature, with
    its own document as the target:

    .. math:: L = \frac1B \sum_i (1 - P_i)^\gamma\, \ell_i, \qquad \ell_i = -\log P_i

    with the probability :math:`P_i` of the query's own document among all candidates of its row: those of the batch,
    hard negatives, mixtures of them, and whatever else your code puts there. The weights have no gradient, and are not
    brought to mean 1: the loss becomes smaller as queries are solved. A short last batch, whose queries have fewer
    candidates, is told once: give the loader ``drop_last=True``.

    Use it where the loss is ``F.cross_entropy`` of similarities ``(B, candidates)`` and many pairs are solved early.
    Leave it where pairs are mislabelled: those are the hard ones. On search over docstrings with a small encoder
    (``benchmarks/effects/kalm_embedding.py``) it cost a point of MRR at gamma 0.5, and with a real one 0.2 of NDCG@10
    (``benchmarks/effects/search.py``): compare.

    Source:
        Zhao et al., "KaLM-Embedding-V2: Superior Training Techniques and Data Inspire A Versatile Embedding Model",
        2025, arXiv 2506.20923.

    Differs:
        Reconstruction: the released code has no focal weights, and the formula is that of notes on the paper. Whether
        the authors let a gradient flow through the weights is not known.

    Args:
        gamma: At least 0. Neutral: 0. Sensible: 0.5 to 2.
        loss: Which loss call it works on, if there are several: its position in the step, its function's name, or its
            place in the code. ``None``: there must be just one.
        name: Tells several instances in one Trainer apart.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> technique = FocalContrastive(gamma=0.5)
        >>> trainer = Trainer(max_epochs=10, callbacks=[technique], logger=False, enable_checkpointing=False)

    """

    def __init__(self, gamma: float = 0.5, loss: int | str | None = None, name: str | None = None) -> None:
        super().__init__(loss=loss, name=name)
        check_number(self, "gamma", gamma, low=0)
        self.gamma = gamma

    @override
    def describe(self) -> str:
        return f"gamma={self.gamma:g}" if self.gamma else "gamma=0: inactive"

    @override
    def conflict_with(self, other: Member) -> str | None:
        changes = {"sample_weights", "change_losses", "change_targets"}.intersection(phases_of(other))
        if changes and other.loss == self.loss:
            return (
                f"FocalContrastive reads the target's probability off its cross-entropy, and {type(other).__name__}"
                " weighs or changes the losses or targets of the same call. Remove one of them, or let them work on"
                " different calls with `loss=...`."
            )
        if other.mixes != "none":
            return "a mixed sample has two targets, of which FocalContrastive would weigh one. Remove one of them."
        return None

    @override
    def is_active(self, step: "Step") -> bool:
        return self.gamma > 0

    @override
    def sample_weights(self, call: "LossCall") -> Tensor | None:
        given = [] if call.arguments.get("weight") is None else ["weight"]
        given += ["label_smoothing"] if call.arguments.get("label_smoothing") else []
        if call.name != "cross_entropy" or call.kind != "row" or given:
            what = f"has `{given[0]}`" if given else "is another loss"
            raise MisconfigurationException(
                "FocalContrastive reads the probability of each sample's target off a plain `F.cross_entropy` of logits"
                f" (B, candidates), and {call} {what}. Name the contrastive call by `loss=...`, or leave the argument"
                " out."
            )
        tell_short_batch(call, "FocalContrastive")
        weights = focal_weights(call.losses, self.gamma)
        if call.step.is_logging:
            call.step.log(self, "weight", weights.mean())
        return weights
