"""How the samples of a batch were mixed in pairs, and whether a loss is about them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_reg.engine.data.batches import place_of, tensors_of
from lightning_reg.engine.data.blend import blend
from lightning_reg.engine.host.errors import MisconfigurationException

if TYPE_CHECKING:
    from lightning_reg.engine.host.owner import Owner

__all__ = ["Mixing"]


@dataclass(frozen=True, eq=False)
class Mixing:
    """How the samples of a batch were mixed in pairs; a technique leaves it in ``step.mixing``.

    Args:
        by: The technique that did it.
        permutation: Partner of each sample, ``(B,)`` int64.
        weights: Share of the sample itself: a number, or one for each sample ``(B,)``.
        inputs: The mixed inputs as they stand in the batch.
        part: The batch, or of several loaders' batches the one that was mixed, with its targets as they were.
        in_targets: Whether the batch's targets are mixed as well; then the loss is left as it is.
        advice: What the user may write to have the labels follow, where it is not certain whether a loss is about them;
            "" where nothing helps but choosing the loss.
        replaced: Gives the positions of the inputs that are the partner's, bool ``(B, *space)`` or ``(1, *space)`` for
            inputs ``(B, C, *space)``; ``None`` where the whole of each sample is blended.

    """

    by: "Owner"
    permutation: Tensor
    weights: float | Tensor
    inputs: Tensor
    part: Any
    in_targets: bool = False
    advice: str = ""
    replaced: Callable[[], Tensor] | None = None

    def rows(self, values: Tensor) -> Tensor:
        """What a mixed sample has of a row per sample, ``(B, ...)``: its own and its partner's, by their shares."""
        return blend(values, self.permutation, self.weights)

    def pasted(self, target: Tensor, what: str) -> Tensor | None:
        """A target with a value for each position of the inputs, with the partner's where the inputs are the partner's.

        Args:
            target: The target: ``(B, *space)``, ``(B, ..., *space)``, or one of these flattened sample after sample.
            what: Whose it is, for the error.

        Returns:
            In its shape and type; ``None`` if it is about the samples as a whole.

        Raises:
            MisconfigurationException: If it has a value for each position of a grid of another size.

        """
        space, samples = self.inputs.shape[2:], len(self.permutation)
        if self.replaced is None or not target.dim():
            return None
        if target.shape[0] == samples and target.dim() > len(space) and target.shape[-len(space) :] == space:
            between = [1] * (target.dim() - 1 - len(space))
            inside = self.replaced()
            return self._chosen(inside.reshape(len(inside), *between, *space), target)
        if target.shape[0] == samples * space.numel():
            inside, by_position = self.replaced(), target.reshape(samples, *space, *target.shape[1:])
            inside = inside.reshape(*inside.shape, *[1] * (target.dim() - 1))
            return self._chosen(inside, by_position).flatten(0, len(space))
        self._check_grid(target, what)
        return None

    def _chosen(self, inside: Tensor, target: Tensor) -> Tensor:
        return torch.where(inside, target[self.permutation], target)

    def _check_grid(self, target: Tensor, what: str) -> None:
        space = self.inputs.shape[2:]
        labels = target.dim() == 1 + len(space) and not target.is_floating_point()
        grid = target.shape[-len(space) :]
        if len(space) > 1 and (labels or target.dim() == 2 + len(space)) and grid.numel() > 1:
            raise MisconfigurationException(
                f"{type(self.by).__name__}: {what} is a map of {tuple(grid)} for inputs of {tuple(space)}: which of its"
                " positions belong to the part that was replaced is not known. Compare in the size of the inputs, as"
                f" with `F.interpolate` on the predictions, or leave {type(self.by).__name__} out."
            )

    def concerns(self, target: Tensor | None, batch: Any, joined: Any = None) -> bool | None:
        """Whether a loss's target is one of the labels that go with the mixed inputs.

        Args:
            target: The target.
            batch: The batch that ``training_step`` got.
            joined: What it got in its place, the batch together with its views, if there are any.

        Returns:
            ``True`` if it is an entry of the batch beside the inputs or a view of one, ``False`` if it is the mixed
            inputs or comes with another loader's batch, ``None`` if that cannot be known (a converted copy, say).

        """
        if target is None:
            return None
        entries = [place_of(entry) for entry in tensors_of(batch)]
        given = entries if joined is None else [place_of(entry) for entry in tensors_of(joined)]
        place = dict(zip(given, entries, strict=True)).get(place_of(target), place_of(target))
        if place == place_of(self.inputs):
            return False
        if place in map(place_of, tensors_of(self.part)):
            return True
        return False if place in entries else None

    def two_targets(self, reader: "Owner") -> MisconfigurationException:
        """The error for a technique that reads the target of each sample and has no rule for two of them."""
        names = type(reader).__name__, type(self.by).__name__
        return MisconfigurationException(
            f"{names[0]} and {names[1]} cannot stand together: {names[0]} reads the target of each sample, and a sample"
            f" that {names[1]} has mixed has two."
        )
