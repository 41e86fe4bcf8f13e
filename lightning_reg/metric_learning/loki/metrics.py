"""How far predicted labels are from the true ones."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_reg.engine.host.arguments import check_number
from lightning_reg.metric_learning.loki._space import LabelSpace
from lightning_reg.metric_learning.loki.core import powered

__all__ = ["MeanSquaredDistance"]


class MeanSquaredDistance(Metric):
    r"""Mean of the squared distance between the predicted and the true label, in a metric space of labels.

    .. math:: \frac1n \sum_i d(\hat y_i, y_i)^2

    It is what :class:`Loki` makes small, and what accuracy does not see: a near miss counts less than a far one. With
    all labels 1 apart it is one minus the accuracy.

    Source:
        Roberts et al., "Geometry-Aware Adaptation for Pretrained Models", NeurIPS 2023, arXiv 2307.12226.

    Differs:
        Nothing.

    Args:
        distances: ``(N, N)`` between the labels, a list of rows or a tensor, not squared; or the rows ``(K, N)`` of the
            classes that are predicted. A tree's are :func:`tree_distances`.
        observed: For a classifier of K classes whose predictions are its own columns (what there is without Loki): the
            label of each column. Targets are labels in any case. ``None``: predictions are labels too.
        power: Exponent of the distances, above 0.

    Raises:
        ValueError: If ``distances`` are none, ``observed`` names a label twice or one that is not there, or ``power``
            is not above 0.

    Example:
        >>> metric = MeanSquaredDistance([[0, 1, 2], [1, 0, 1], [2, 1, 0]])
        >>> metric.update(torch.tensor([0, 1, 2]), torch.tensor([0, 0, 0]))
        >>> metric.compute()
        tensor(1.6667)

    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False

    def __init__(
        self,
        distances: Tensor | Sequence[Sequence[float]],
        observed: Sequence[int] | None = None,
        power: float = 2.0,
    ) -> None:
        super().__init__()
        check_number(self, "power", power, low=0, low_open=True)
        space = LabelSpace(self, distances, observed)
        self.observed, self.power = None if observed is None else list(observed), power
        self.register_buffer("distances", space.rows.clone(), persistent=False)
        self.distances: Tensor
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
        self.total: Tensor
        self.count: Tensor

    @override
    def update(self, preds: Tensor, target: Tensor) -> None:
        """Takes a batch.

        Args:
            preds: Predicted labels of the target's shape, int; or scores with a dimension more, the second, whose
                largest counts: ``(B, K)``, ``(B, K, T)``.
            target: True labels, ``(B, ...)`` int64.

        Raises:
            ValueError: If the shapes do not fit.

        """
        if preds.dim() == target.dim() + 1 and preds.shape[1] == len(self.distances):
            preds = preds.argmax(1)
        if preds.shape != target.shape or preds.is_floating_point():
            raise ValueError(
                f"MeanSquaredDistance: `preds` must be labels of the target's shape {tuple(target.shape)}, or scores of"
                f" {len(self.distances)} classes in their second dimension, got {preds.dtype} {tuple(preds.shape)}."
            )
        away = powered(self.distances[preds.long(), target.long()], self.power)
        self.total += away.sum()
        self.count += target.numel()

    @override
    def compute(self) -> Tensor:
        """The mean; NaN without samples."""
        return self.total / self.count
