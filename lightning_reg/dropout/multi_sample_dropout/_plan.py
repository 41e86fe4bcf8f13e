"""How a technique lets a part of the network run on several copies of the rows."""

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import nn

if TYPE_CHECKING:
    from lightning_reg.engine.step import Step

__all__ = ["CopyPlan", "LayerCopies"]


class CopyPlan(NamedTuple):
    """How what follows a layer runs on several copies of the rows.

    Attributes:
        number: Copies M of each row.
        layer: The layer whose output holds them.
        way: ``"rows"``: the output has ``M * B`` rows, copy after copy. ``"passes"``: ``training_step`` runs M times.
        outputs: With ``"rows"``, what the user's code gets of the output of ``head``: the rows of the ``"first"`` copy,
            or of ``"all"``.
        head: With ``"rows"``, the layer at whose output that is; ``None`` for the outermost module that is running.
        backbone: With ``"passes"``, the layer that runs in the first pass only.

    """

    number: int
    layer: str
    way: Literal["rows", "passes"] = "rows"
    outputs: Literal["first", "all"] = "first"
    head: str | None = None
    backbone: str | None = None


class LayerCopies(NamedTuple):
    """One call of a layer whose output is to be that of copies.

    Attributes:
        name: Name of the layer.
        layer: The layer.
        input: What it got, all copies if it comes after the layer that makes them.
        step: The training step.
        number: How many outputs were changed before in this pass through ``training_step``.
        after: Whether it comes after the layer that makes the copies.
        run: Number of this pass through ``training_step``, where the copies are passes.

    """

    name: str
    layer: nn.Module
    input: Any
    step: "Step"
    number: int
    after: bool
    run: int
