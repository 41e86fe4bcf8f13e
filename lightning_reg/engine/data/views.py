"""Views: further versions of a batch that pass the network together with it, while the user's loss stays the batch's.

The user's ``training_step`` gets the batch and its views as one batch of ``k * B`` samples, block after block. Every
loss call that has a row for each of them is narrowed to the first block, so all that is made of it (losses per sample,
weights, targets, terms) is about the batch alone; the views' predictions and features are there for whoever made them.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lightning_reg.engine.data.batches import join_batches, lies_by_sample
from lightning_reg.engine.host.autograd import lies_by_row

if TYPE_CHECKING:
    from lightning_reg.engine.host.owner import Owner

__all__ = ["Views"]

# Arguments of the loss functions that have a row for each row of the input. A `weight` is one if it has the input's
# number of dimensions; else it belongs to the classes.
_PER_ROW = ("input", "target", "weight", "var", "input1", "input2", "anchor", "positive", "negative")


class Views:
    """A batch and its views, joined.

    Args:
        batch: The batch.
        size: Its number of samples B.
        views: Views of the batch that each technique made, of the same structure.

    Attributes:
        batch: What ``training_step`` gets.
        count: Number of blocks: the batch's and the views'.

    Raises:
        MisconfigurationException: If batch and views cannot be joined.

    """

    def __init__(self, batch: Any, size: int, views: Mapping[Any, Sequence[Any]]) -> None:
        self._size = size
        self._blocks: dict[Owner, list[int]] = {}
        parts = [batch]
        for technique, own in views.items():
            self._blocks[technique] = list(range(len(parts), len(parts) + len(own)))
            parts += own
        self.count = len(parts)
        self.batch = join_batches(parts, size)

    def narrow(self, arguments: Mapping[str, Any], block: int = 0) -> dict[str, Any] | None:
        """Arguments of a loss call for the batch, or for one view, alone.

        Args:
            arguments: The arguments by name.
            block: Which: 0 is the batch, others are in :meth:`blocks_of`.

        Returns:
            ``None`` if the call has no row for each sample and view, or several and it is not certain whose they are.

        """
        given = arguments.get("input", arguments.get("input1", arguments.get("anchor")))
        if not isinstance(given, Tensor) or not self._has_blocks(given):
            return None
        if given.is_leaf and given.requires_grad:  # a parameter, whatever its number of rows
            return None
        samples, target = self.count * self._size, arguments.get("target")
        flat = isinstance(target, Tensor) and len(target) == len(given) and lies_by_sample(target, self.batch, samples)
        if len(given) != samples and not flat and not lies_by_row(given, samples):
            return None
        narrowed = dict(arguments)
        for name in _PER_ROW:
            value = arguments.get(name)
            if isinstance(value, Tensor) and value.dim() and len(value) == len(given):
                of_classes = name == "weight" and value.dim() != given.dim()
                narrowed[name] = value if of_classes else self.block(value, block)
        return narrowed

    def block(self, rows: Tensor, block: int = 0) -> Tensor:
        """The rows of the batch, or of one view, of a tensor with rows for all; any other tensor as it is."""
        if not self._has_blocks(rows):
            return rows
        size = len(rows) // self.count
        return rows[block * size : (block + 1) * size]

    def blocks_of(self, technique: "Owner") -> Sequence[int]:
        """Which blocks are the technique's views."""
        return self._blocks[technique]

    def own(self, output: Any) -> Any:
        """The batch's own part of what a layer put out for all blocks: a tensor, or a nest of them."""
        return tree_map_only(Tensor, self.block, output)

    def spread(self, value: Tensor, reduction: str) -> Tensor:
        """A narrowed call's value as the user's code expects it, as if each view were the batch itself.

        A mean stays. Losses per row are repeated, and a sum is multiplied, so that a division by the number of rows,
        or a mean with weights per row, gives what it would give for the batch alone.

        Args:
            value: The value for the batch alone.
            reduction: The user's.

        Returns:
            The value to hand out.

        """
        if reduction == "none":
            return value.repeat(self.count, *[1] * (value.dim() - 1))
        return value * self.count if reduction == "sum" else value

    def of(self, technique: "Owner", rows: Tensor, *, with_batch: bool) -> Tensor:
        """Rows of the technique's views, one view after the other.

        Args:
            technique: Who made them.
            rows: ``(k * R, ...)``.
            with_batch: Whether the batch's own rows come first.

        Returns:
            ``(v * R, ...)``.

        """
        blocks = rows.chunk(self.count)
        return torch.cat([blocks[i] for i in ([0] if with_batch else []) + self._blocks[technique]])

    def _has_blocks(self, rows: Tensor) -> bool:
        samples = self.count * self._size
        return rows.dim() > 0 and len(rows) > 0 and len(rows) % samples == 0
