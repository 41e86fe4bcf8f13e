"""Item SSL: an item encoder knows an item by either half of its features."""

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.data.side_batches import side_rows
from lightning_reg.engine.host import distributed
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_choice, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.user_functions import user_function
from lightning_reg.engine.networks.named_calls import call_named, check_named
from lightning_reg.engine.technique import StepTechnique
from lightning_reg.engine.weights.strategies import check_whole
from lightning_reg.retrieval.item_ssl.core import (
    complementary_views,
    correlated_features,
    item_ssl_loss,
    mutual_information,
)

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.step import Step

__all__ = ["ItemSSL"]


class ItemSSL(StepTechnique):
    r"""Beside its own loss an item encoder must recognise items from complementary halves of their features.

    In each step N items are drawn uniformly from the catalogue, whatever the training data are like. One view of an
    item lacks a feature and those that say most about it, the other has these alone; both pass through the encoder, and
    each first view is to find its second one among all:

    .. math:: \ell + \alpha L, \qquad L = -\frac1N \sum_i \log \frac{e^{\hat z_i \cdot \hat z'_i / \tau}}{\sum_j
        e^{\hat z_i \cdot \hat z'_j / \tau}}

    Which features go together is told by their mutual information over the catalogue, computed once: were correlated
    features in different views, an item could be found by what is nearly a copy. The seed feature is drawn for each
    step. The loss :math:`\ell` is whatever ``training_step`` returns.

    Use it for encoders of several categorical features with a long tail of items that have little feedback. Leave it
    where an item is a single id, or has fewer than about four features. On a made catalogue
    (``benchmarks/effects/item_ssl.py``) masking helped, at random more than by correlation: compare.

    Source:
        Yao et al., "Self-supervised Learning for Large-scale Item Recommendations", CIKM 2021, arXiv 2007.12865.

    Differs:
        The authors' code was not found. They take about half of the features, ceil(k / 2) beside the seed by one
        reading; the default here is k // 2 - 1 beside it, with which both views have as many for even k. The masking is
        the same for all items of a step, as in the paper. Items with the same features, which no encoder of them tells
        apart, are not each other's negatives; the paper sums over all. Buffers of the encoder (statistics of batch
        norm) do not see the masked items.

    Memory: the catalogue on the module's device; two passes of the encoder with N / ranks items, and N^2 / ranks
    cosines. Under DDP one collective forward and one backward.

    Args:
        encode: What makes embeddings ``(n, D)`` of category numbers ``(n, columns)``: a layer or method of the module
            (``"item_tower"``), called with them; or where a function can be imported from (``"my_project.encode"``),
            called with the module and them.
        items: What returns the catalogue, whole numbers ``(N, columns)``: a method of the module or the datamodule, or
            where a function without arguments can be imported from. Rows that are equal in all columns are no negatives
            of one another.
        missing: The category that stands for a masked one: one for all columns, or one for each.
        weight: :math:`\alpha`, at least 0. Neutral: 0; sensible: 0.1 to 3.
        temperature: :math:`\tau`, above 0; sensible: 0.05 to 0.5.
        size: N, over all ranks, at least 2; the paper draws as many as the batch has samples.
        masking: ``"correlated"``; or what the paper compares it with: ``"random"`` (halves at random), ``"dropout"``
            (each category of each item and view by itself, with ``rate``), ``"none"`` (both views are the item: items
            are spread out).
        correlated: How many features go with the seed, 0 to k - 2; ``None``: k // 2 - 1.
        rate: Share of categories that ``"dropout"`` masks; with the other ways, of the values of fields that have
            several. In [0, 1).
        fields: The field of each column, from 0 without gaps, where fields have several values; ``None``: each column
            is a field.
        unranked: Fields that say all about the others, such as an id: they are no seed and go with none, but are in
            either view by chance.
        loss: Under manual optimization, which of several losses that are handed over it joins: the position.
        name: Tells several instances in one Trainer apart.
        seed: Of the draws.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> technique = ItemSSL(encode="item_tower", items="catalogue", missing=0)
        >>> trainer = Trainer(max_epochs=10, callbacks=[technique], logger=False, enable_checkpointing=False)

    """

    def __init__(
        self,
        encode: str,
        items: str,
        missing: int | list[int],
        weight: float = 0.3,
        temperature: float = 0.1,
        size: int = 256,
        masking: Literal["correlated", "random", "dropout", "none"] = "correlated",
        correlated: int | None = None,
        rate: float = 0.0,
        fields: list[int] | None = None,
        unranked: list[int] | None = None,
        loss: int | None = None,
        name: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(loss=loss, name=name, seed=seed)
        check_number(self, "loss", loss, low=0, integer=True, optional=True)
        check_number(self, "weight", weight, low=0)
        check_number(self, "temperature", temperature, low=0, low_open=True)
        check_number(self, "size", size, low=2, integer=True)
        check_choice(self, "masking", masking, ("correlated", "random", "dropout", "none"))
        check_number(self, "correlated", correlated, low=0, integer=True, optional=True)
        check_number(self, "rate", rate, low=0, high=1, high_open=True)
        for column in missing if isinstance(missing, list) else [missing]:
            check_number(self, "missing", column, integer=True)
        for argument, numbers in (("fields", fields), ("unranked", unranked)):
            for number in numbers or ():
                check_number(self, argument, number, low=0, integer=True)
        if fields is not None and {*fields} != {*range(max(fields, default=0) + 1)}:
            raise ValueError(f"ItemSSL: `fields` must be numbers from 0 without gaps, got {fields!r}.")
        self.encode, self.items, self.missing, self.weight = encode, items, missing, weight
        self.temperature, self.size, self.masking = temperature, size, masking
        self.correlated, self.rate = correlated, rate
        self.fields, self.unranked = fields, unranked
        self._catalogue = self._information = torch.empty(0)
        self._ids: Tensor | None = None
        self._has_trained = False
        self._fields = self._ranked = self._missing = torch.empty(0, dtype=torch.long)

    @override
    def describe(self) -> str:
        if not self.weight:
            return "weight=0: inactive"
        rate = f", rate {self.rate:g}" if self.rate else ""
        return f"{self.encode} on {self.size} of {self.items}, {self.masking} masking{rate}, weight {self.weight:g}"

    @override
    def is_active(self, step: "Step") -> bool:
        return self.weight > 0

    @override
    def check(self, trainer: "Trainer", module: "LightningModule") -> None:
        super().check(trainer, module)
        check_whole(self, trainer, "runs an encoder once more in each step, with")
        check_named(self, trainer, module, self.encode, "encode")
        items = user_function(self.items, trainer, module, "ItemSSL(items=...)")()
        if not isinstance(items, Tensor) or items.dim() != 2 or items.is_floating_point() or len(items) < 2:
            found = f"{items.dtype} {tuple(items.shape)}" if isinstance(items, Tensor) else type(items).__name__
            raise MisconfigurationException(
                f"ItemSSL(items={self.items!r}) must return the categories of at least 2 items, whole numbers"
                f" (N, columns), found {found}."
            )
        self._prepare(items)

    @override
    def step_term(self, step: "Step") -> Tensor | None:
        self._catalogue, self._missing = (kept.to(step.module.device) for kept in (self._catalogue, self._missing))
        rows = side_rows(self.generator(step, same_on_ranks=True), len(self._catalogue), self.size)
        rows = rows.to(self._catalogue.device, non_blocking=True)
        first, second = self._views(step, self._catalogue[rows])
        # One pass for both views: layers that draw or normalise treat them as one batch.
        embedded = call_named(self, step, self.encode, "encode", torch.cat([first, second]))
        has_gradient = embedded.requires_grad or self._has_trained  # later it may be frozen for a time
        self._has_trained |= embedded.requires_grad
        if embedded.dim() != 2 or len(embedded) != 2 * len(first) or not has_gradient:
            raise MisconfigurationException(
                f"ItemSSL(encode={self.encode!r}) must make an embedding with a gradient for each of {2 * len(first)}"
                f" items, found {tuple(embedded.shape)}{'' if embedded.requires_grad else ' without gradient'}."
            )
        group = host.data_parallel_group(step.trainer)
        capacity = -(-self.size // distributed.world_size())
        views, others = embedded.chunk(2)
        ids = None if self._ids is None else self._ids.to(rows.device)[rows]
        loss = item_ssl_loss(views, others, self.temperature, ids=ids, group=group, capacity=capacity)
        if step.is_logging:
            step.log(self, "contrast", loss)
        return self.weight * loss

    def _prepare(self, items: Tensor) -> None:
        columns = items.shape[1]
        fields = torch.arange(columns) if self.fields is None else torch.tensor(self.fields)
        count = int(fields.max()) + 1 if len(fields) == columns else 0
        ranked = count - len(self.unranked or ())
        if len(fields) != columns or (isinstance(self.missing, list) and len(self.missing) != columns):
            raise MisconfigurationException(
                f"ItemSSL: the catalogue has {columns} columns, and `fields` or `missing` are given for another number."
            )
        if max(self.unranked or (), default=0) >= count or (self.correlated or 0) > ranked - 2 or ranked < 2:
            raise MisconfigurationException(
                f"ItemSSL: of {count} fields {ranked} are ranked, of which `correlated`={self.correlated!r} and a seed"
                " are masked and at least one must be left. Give fewer, or a catalogue with more fields."
            )
        self._catalogue, self._fields, self._has_trained = items, fields, False
        numbers = torch.unique(items, dim=0, return_inverse=True)[1]
        self._ids = numbers if int(numbers.max()) + 1 < len(items) else None  # no item stands twice
        self._missing = torch.as_tensor(self.missing, dtype=items.dtype)
        self._ranked = torch.tensor([field for field in range(count) if field not in (self.unranked or ())])
        if self.masking == "correlated":
            self._information = mutual_information(items.cpu(), fields)[self._ranked][:, self._ranked]

    def _views(self, step: "Step", items: Tensor) -> tuple[Tensor, Tensor]:
        generator, device, missing = self.generator(step, same_on_ranks=True), items.device, self._missing
        if self.masking in ("correlated", "random"):
            masked = self._masked(generator)[self._fields].to(device, non_blocking=True)
            views = complementary_views(items, masked, missing)
        else:
            views = items, items
        if not self.rate:
            return views
        several = self._fields.bincount()[self._fields] > 1 if self.masking != "dropout" else torch.tensor(True)
        drawn = torch.rand(2, min(self.size, len(self._catalogue)), items.shape[1], generator=generator) < self.rate
        own = (drawn & several)[:, distributed.rank() :: distributed.world_size()].to(device, non_blocking=True)
        one, two = (torch.where(dropped, missing, view) for dropped, view in zip(own, views, strict=True))
        return one, two

    def _masked(self, generator: torch.Generator) -> Tensor:
        """Which fields the first view lacks, ``(k,)``."""
        count = len(self._ranked)
        masked = torch.rand(int(self._fields.max()) + 1, generator=generator) < 0.5  # unranked ones: by chance
        if self.masking == "random":
            chosen = torch.zeros(count, dtype=torch.bool)
            chosen[torch.randperm(count, generator=generator)[: count // 2]] = True
        else:
            seed = int(torch.randint(count, (1,), generator=generator))
            others = max(count // 2 - 1, 0) if self.correlated is None else self.correlated
            chosen = correlated_features(self._information, seed, others)
        masked[self._ranked] = chosen
        return masked
