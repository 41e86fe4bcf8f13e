"""Accuracy of the worst group, and accuracy at the group shares of the training data."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_reg.engine.host.arguments import check_number

__all__ = ["AdjustedAverageAccuracy", "WorstGroupAccuracy"]


class _GroupAccuracy(Metric):
    full_state_update = False

    def __init__(self, num_groups: int) -> None:
        super().__init__()
        check_number(self, "num_groups", num_groups, low=1, integer=True)
        self.num_groups = num_groups
        # Groups that were not announced are counted in one more place: `compute` tells of them, so that no update waits
        # for the device.
        for name in ("right", "tested"):
            self.add_state(name, torch.zeros(num_groups + 1, dtype=torch.long), dist_reduce_fx="sum")
        self.right: Tensor
        self.tested: Tensor

    @override
    def update(self, preds: Tensor, target: Tensor, groups: Tensor) -> None:
        """Takes a batch.

        Args:
            preds: Predicted classes ``(B,)``, whole numbers or bool, or logits ``(B, C)``.
            target: Classes ``(B,)``.
            groups: Group of each sample ``(B,)``, whole numbers; a negative one is left out.

        Raises:
            ValueError: If ``preds`` are floating numbers of shape ``(B,)``, whose threshold is not known.

        """
        if preds.dim() == 1 and preds.is_floating_point():
            raise ValueError(
                f"{type(self).__name__}: `preds` must be classes (B,) or logits (B, C), got {preds.dtype} of shape"
                f" {tuple(preds.shape)}. Write `logits > 0` for one logit per sample."
            )
        hit = (preds.argmax(1) if preds.dim() == 2 else preds) == target
        known = (groups >= 0).long()
        place = groups.long().clamp(0, self.num_groups)
        self.right.index_add_(0, place, hit.long() * known)
        self.tested.index_add_(0, place, known)

    def _accuracies(self) -> Tensor:
        """Accuracy of each group ``(G,)``, NaN where no sample was seen."""
        if self.tested[-1]:
            raise ValueError(
                f"{type(self).__name__}: {int(self.tested[-1])} samples are of groups above {self.num_groups - 1}."
                " Raise `num_groups`."
            )
        return self.right[:-1] / self.tested[:-1]


class WorstGroupAccuracy(_GroupAccuracy):
    r"""Accuracy of the group in which it is lowest, :math:`\min_g \frac{\text{right}_g}{n_g}`.

    Groups without samples do not count; without any sample it is NaN. Choose checkpoints of all methods by it
    (``ModelCheckpoint(monitor=..., mode="max")``): a table in which one is chosen by its average and another by its
    worst group compares two rules.

    Source:
        Sagawa et al., "Distributionally Robust Neural Networks for Group Shifts: On the Importance of Regularization
        for Worst-Case Generalization", ICLR 2020, arXiv 1911.08731, section 3.

    Differs:
        Nothing.

    Args:
        num_groups: Number of groups, at least 1.

    Raises:
        ValueError: If ``num_groups`` is below 1.

    Example:
        >>> metric = WorstGroupAccuracy(num_groups=2)
        >>> metric.update(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), torch.tensor([0, 1, 1]))
        >>> metric.compute()
        tensor(0.5000)

    """

    higher_is_better = True

    @override
    def compute(self) -> Tensor:
        """The accuracy of the worst group."""
        accuracies = self._accuracies()
        lowest = torch.where(accuracies.isnan(), torch.inf, accuracies).min()
        return torch.where(lowest.isinf(), torch.nan, lowest)


class AdjustedAverageAccuracy(_GroupAccuracy):
    r"""Average accuracy at the group shares of the training data.

    .. math:: \sum_g \frac{N_g}{N}\,\frac{\text{right}_g}{n_g}

    Test sets with subgroups often hold as many samples of rare groups as of frequent ones, and their plain average is
    then that of no population; this one is that of the training data. It is NaN while a group of the training data has
    no sample.

    Source:
        Sagawa et al., "Distributionally Robust Neural Networks for Group Shifts: On the Importance of Regularization
        for Worst-Case Generalization", ICLR 2020, arXiv 1911.08731 (average accuracy of Waterbirds, appendix).

    Differs:
        Nothing.

    Args:
        group_counts: Number of training samples of each group, at least 0, one of them above.

    Raises:
        ValueError: If a number is below 0 or not whole, or none is above 0.

    Example:
        >>> metric = AdjustedAverageAccuracy(group_counts=[90, 10])
        >>> metric.update(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), torch.tensor([0, 1, 1]))
        >>> metric.compute()
        tensor(0.9500)

    """

    higher_is_better = True

    def __init__(self, group_counts: Sequence[int]) -> None:
        if not group_counts or max(group_counts) < 1:
            raise ValueError(
                "AdjustedAverageAccuracy: `group_counts` must be the number of training samples of each group, one of"
                f" them above 0, got {group_counts!r}."
            )
        super().__init__(len(group_counts))
        for count in group_counts:
            check_number(self, "group_counts", count, low=0, integer=True)
        self.group_counts = list(group_counts)

    @override
    def compute(self) -> Tensor:
        """The adjusted average."""
        counts = torch.tensor(self.group_counts, dtype=torch.float64, device=self.right.device)
        shares = (counts / counts.sum()).float()
        return torch.where(shares > 0, shares * self._accuracies(), 0.0).sum()
