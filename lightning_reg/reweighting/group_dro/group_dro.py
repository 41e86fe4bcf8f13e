"""Group DRO: the loss of each group counts by how bad it is."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.host.arguments import check_choice, check_number
from lightning_reg.reweighting._group_weights import GroupWeights
from lightning_reg.reweighting._groups import Groups

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.loss.call import LossCall

__all__ = ["GroupDRO"]


class GroupDRO(GroupWeights):
    r"""Trains against the worst group: each group's mean loss counts by a weight that rises with it.

    .. math::

        q_g \leftarrow \frac{q_g \exp(\eta\, (L_g + C / \sqrt{n_g}))}{\sum_{g'} \dots}, \qquad L = \sum_g q_g L_g

    in this order in each step, without gradient into q. :math:`L_g` is the mean over the samples of a group in the
    global batch, of all data-parallel ranks; :math:`n_g` counts the group's training samples. A group without a sample
    in the batch is skipped: it keeps its weight before all are normalized, and adds nothing to the loss. Every sample
    has one group, or several, or none (then it does not count). Every rank must make a loss in every step. With
    ``accumulate_grad_batches`` each micro-batch is a step of q. Other terms of the loss, validation and test are left
    alone.

    Use it when the training data name their groups and some of them are learned last; with strong regularization or
    early stopping, and with batches in which groups are balanced (``draws="balanced"``). Leave it when the
    network fits all training data: then all losses are near 0 and no group is worse than another. On coloured digits
    (``benchmarks/effects/group_dro.py``) the accuracy of the worst group rose from 18 to 70 %, with the adjustment to
    78 %, as high as by drawing the groups alike.

    Source:
        Sagawa et al., "Distributionally Robust Neural Networks for Group Shifts: On the Importance of Regularization
        for Worst-Case Generalization", ICLR 2020, arXiv 1911.08731, algorithm 1 and section 3.3; ``mode="max"`` and
        overlapping groups: Zhang et al., "Rich Feature Construction for the Optimization-Generalization Dilemma",
        ICML 2022, arXiv 2203.15516.

    Differs:
        All groups of a batch move in a step, as in the authors' code, where the paper draws one. In that code a group
        that is not in the batch moves by its adjustment alone; here it does not move. q is kept as its logarithm, which
        does not underflow. A group whose loss is not finite does not move.

    Memory: one number per group, and the group of each sample if groups go by sample. A step costs one collective of
    2 G floats.

    Args:
        num_groups: Number of groups G, at least 1. Neutral: 1, with all samples in it.
        group_key: Entry of the batch with the groups: keys and positions, separated by dots (``"group"``, ``"2"``);
            whole numbers ``(B,)``, negative for none, or bool ``(B, G)`` for groups that overlap.
        groups: In its place, groups by sample index: the name of a function, a method of your module or datamodule or
            an import path, which is called without arguments at the start of fit and returns the same for all N
            training samples, ``(N,)`` or ``(N, G)``. Just one of the two must be given.
        mode: ``"online"``: q moves step by step (Sagawa et al.). ``"max"``: the worst group of the batch alone counts,
            for full batches; with small ones it is biased.
        eta: Step of q, at least 0. Authors' code: 0.01. 0: groups count alike.
        generalization_adjustment: C, at least 0: small groups count as worse, for they generalize worse. Paper: 0
            to 5. 0: none.
        group_counts: Training samples of each group, at least 1 each; needed for the adjustment with ``group_key``.
        draws: ``"balanced"``: each epoch is made of as many samples, drawn with replacement so that all groups come as
            often, in place of your sampler's; needs ``groups``. Authors' code for unbalanced groups; the group sizes of
            the adjustment stay those of the training data. ``None``: those of your sampler. Neutral: ``None``.
        loss: Which loss call it works on, if there are several: position, ``"last"``, function name, or
            ``"model.py:42"``.
        index_key: Batch entry with the sample indices; ``None`` to follow them from the DataLoader.
        dataloader: Key of the training loader in a CombinedLoader.
        name: Tells several instances in one Trainer apart.
        seed: Seed of the draws.

    Raises:
        ValueError: If an argument is outside its range, both or none of ``group_key`` and ``groups`` are given, or
            ``draws`` without ``groups``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> dro = GroupDRO(num_groups=4, group_key="group", eta=0.01)
        >>> trainer = Trainer(callbacks=[dro], logger=False, enable_checkpointing=False)

    """

    def __init__(
        self,
        num_groups: int,
        group_key: str | None = None,
        groups: str | None = None,
        mode: Literal["online", "max"] = "online",
        eta: float = 0.01,
        generalization_adjustment: float = 0.0,
        group_counts: Sequence[int] | None = None,
        draws: Literal["balanced"] | None = None,
        loss: int | str | None = None,
        index_key: str | None = None,
        dataloader: str | None = None,
        name: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(loss=loss, index_key=index_key, dataloader=dataloader, name=name, seed=seed)
        check_number(self, "num_groups", num_groups, low=1, integer=True)
        check_choice(self, "mode", mode, ("online", "max"))
        check_number(self, "eta", eta, low=0)
        check_number(self, "generalization_adjustment", generalization_adjustment, low=0)
        advice = "Leave it out, or train the model whose errors make the groups for a shorter time."
        self._groups = Groups(self, num_groups, group_key, groups, advice)
        for count in group_counts or ():
            check_number(self, "group_counts", count, low=1, integer=True)
        if group_counts is not None and (groups is not None or len(group_counts) != num_groups):
            raise ValueError(
                f"GroupDRO: `group_counts` must be {num_groups} numbers, beside `group_key`, got {group_counts!r}."
            )
        if generalization_adjustment and groups is None and group_counts is None:
            raise ValueError(
                "GroupDRO: `group_counts` must be given with `group_key` for a `generalization_adjustment`, got None."
            )
        check_choice(self, "draws", draws, ("balanced", None))
        if draws is not None and groups is None:
            raise ValueError(
                f"GroupDRO: `draws` needs the groups of all samples by `groups`, got {draws!r} with"
                f" group_key={group_key!r}."
            )
        self.num_groups, self.group_key, self.groups, self.mode, self.eta = num_groups, group_key, groups, mode, eta
        self.generalization_adjustment, self.group_counts = generalization_adjustment, group_counts
        self.draws = draws
        self._log_weights: Tensor | None = None
        self._table: Tensor | None = None
        self._adjustment = self._adjusted(torch.tensor(group_counts or [1] * num_groups))

    @property
    @override
    def needs_indices(self) -> bool:  # type: ignore[override]  # of the class elsewhere; here an argument says it
        return self.groups is not None

    @override
    def describe(self) -> str:
        how = "the worst alone" if self.mode == "max" else f"eta={self.eta:g}"
        adjusted = self.generalization_adjustment
        said = f"{self._groups}, {how}" + (f", adjusted by {adjusted:g}" if adjusted else "")
        return said + (", drawn alike" if self.draws else "")

    @override
    def check(self, trainer: "Trainer", module: "LightningModule") -> None:
        counts = self._groups.read(trainer, module)
        if counts is not None:
            self._table, self._adjustment = self._groups.table, self._adjusted(counts)

    @override
    def on_train_epoch_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._groups.say_missing(trainer)

    def _adjusted(self, sizes: Tensor) -> Tensor:
        return self.generalization_adjustment / sizes.sqrt()

    @override
    def _adjusted_losses(self, losses: Tensor) -> Tensor:
        if not self.generalization_adjustment:
            return losses
        self._adjustment = self._adjustment.to(losses)  # once: it stays there
        return losses + self._adjustment

    @override
    def _of_batch(self, call: "LossCall") -> Tensor:
        return self._groups.of_batch(self, call)

    @override
    def _table_source(self) -> tuple[str, str]:
        return f"{self.groups!r} returns the groups of", "Return one for each sample of the dataset."
