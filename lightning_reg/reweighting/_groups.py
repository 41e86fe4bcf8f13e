"""The groups of a batch's samples, by an entry of the batch or by a table of all samples."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.data.entries import find_entry
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.distributed import all_reduce_sum
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.user_functions import user_function
from lightning_reg.reweighting._membership import group_membership

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.loss.call import LossCall
    from lightning_reg.engine.technique import Technique

__all__ = ["Groups"]


class Groups:
    """Where the groups of the samples come from.

    Args:
        owner: Whose arguments they are; its class is named in errors.
        num_groups: Number of groups.
        group_key: Entry of the batch with the groups of its samples.
        groups: In its place, the name of a function that returns those of all samples.
        advice: What to do about a group without a sample, a sentence.

    Raises:
        ValueError: If both or none of ``group_key`` and ``groups`` are given.

    """

    def __init__(
        self, owner: "Technique", num_groups: int, group_key: str | None, groups: str | None, advice: str
    ) -> None:
        self._name, self._num_groups, self._advice = type(owner).__name__, num_groups, advice
        self._group_key, self._groups = group_key, groups
        if (group_key is None) == (groups is None):
            raise ValueError(
                f"{self._name}: `group_key` or `groups` must be given, the one or the other, got"
                f" group_key={group_key!r} and groups={groups!r}."
            )
        self._table: Tensor | None = None
        self._checked = False
        self._seen: Tensor | None = None  # which groups the batches of an epoch have had
        self._batches, self._told = 0, False

    @override
    def __str__(self) -> str:
        source = f"entry {self._group_key!r}" if self._groups is None else f"{self._groups} by sample"
        return f"{self._num_groups} groups from {source}"

    @property
    def table(self) -> Tensor | None:
        """Which samples of the dataset are in which group, ``(N, G)``; ``None`` where the batch says it."""
        return self._table

    def read(self, trainer: "Trainer", module: "LightningModule") -> Tensor | None:
        """Reads the table at the start of a fit.

        Args:
            trainer: The Trainer.
            module: The user's module.

        Returns:
            Training samples of each group ``(G,)``; ``None`` without a table.

        Raises:
            MisconfigurationException: If it is of another form, or a group has no sample.

        """
        self._checked, self._seen, self._batches, self._told = False, None, 0, False
        if self._groups is None:
            return None
        asked_by = f"{self._name}(groups=...)"
        given = torch.as_tensor(user_function(self._groups, trainer, module, asked_by)())
        self._table = self._membership(given, f"what {self._groups!r} returns")
        self._check_numbers(given)
        if not self._table.any(0).all():
            empty = (~self._table.any(0)).nonzero().flatten().tolist()
            raise MisconfigurationException(f"{asked_by}: no training sample is of group {empty}. {self._advice}")
        return self._table.sum(0)

    @override
    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_table": None, "_seen": None}  # the user's data, read again at each fit

    def of_batch(self, owner: "Technique", call: "LossCall") -> Tensor:
        """The groups of a call's samples, without those that the user's loss ignores.

        Args:
            owner: Who asks.
            call: The loss call.

        Returns:
            ``(B, G)``, 1 where a sample is in a group and 0 elsewhere.

        Raises:
            MisconfigurationException: If there are not as many groups as samples.

        """
        membership, mass = self._given(owner, call), call.sample_mass
        return membership if mass is None else membership * (mass > 0)[:, None]

    def _given(self, owner: "Technique", call: "LossCall") -> Tensor:
        if self._table is None:
            given = torch.as_tensor(find_entry(call.step.batch, self._group_key or "", f"{self._name}: group_key"))
            if not self._checked:
                self._check_numbers(given)
            self._checked = True
            membership = self._membership(given, f"the entry {self._group_key!r}").to(call.input.device)
            if len(membership) != call.batch_size:
                raise MisconfigurationException(
                    f"{self._name}: the entry {self._group_key!r} has {len(membership)} groups, and {call} has"
                    f" {call.batch_size} samples. Name the entry with one group per sample."
                )
            present = membership.any(0)
            self._seen = present if self._seen is None else self._seen.logical_or_(present)
            self._batches += 1
            return membership
        samples = call.samples(owner)
        if samples.size not in (None, len(self._table)):
            raise MisconfigurationException(
                f"{self._name}: {self._groups!r} returns the groups of {len(self._table)} samples, the training dataset"
                f" has {samples.size}. Return one for each sample of the dataset."
            )
        self._table = self._table.to(call.input.device)
        return self._table[samples.indices]

    def say_missing(self, trainer: "Trainer") -> None:
        """Warns at the end of an epoch if an entry of the batch never had a group; of a table that is refused.

        It is told once, of an epoch in all batches of which the groups were asked for.

        Args:
            trainer: The Trainer.

        """
        own, batches, self._seen, self._batches = self._seen, self._batches, None, 0
        if self._told or own is None or batches < trainer.num_training_batches:
            return
        self._told, group = True, host.data_parallel_group(trainer)
        seen = own if group is None else all_reduce_sum(own.float(), group)
        missing = (seen == 0).nonzero().flatten().tolist()
        if missing:
            host.rank_zero_warn(
                f"{self._name}: no sample of an epoch was of group {missing} by the entry {self._group_key!r}, and"
                f" num_groups={self._num_groups}. {self._advice}"
            )

    def _membership(self, given: Tensor, what: str) -> Tensor:
        try:
            return group_membership(given, self._num_groups)
        except ValueError as error:
            raise MisconfigurationException(f"{self._name}: {what}: {error}") from error

    def _check_numbers(self, given: Tensor) -> None:
        if given.dtype != torch.bool and given.numel() and int(given.max()) >= self._num_groups:
            raise MisconfigurationException(
                f"{self._name}: there is a group {int(given.max())}, and num_groups={self._num_groups} counts from 0."
                " Raise `num_groups`."
            )
