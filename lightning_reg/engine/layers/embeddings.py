"""What a metric loss compares: the embeddings of a step's samples, and their classes."""

from typing import TYPE_CHECKING, Literal

from torch import Tensor

from lightning_reg.engine.data.entries import find_entry
from lightning_reg.engine.host.errors import MisconfigurationException

if TYPE_CHECKING:
    from lightning_reg.engine.step import Step

__all__ = ["Pooling", "class_numbers", "embeddings", "pooled"]

Pooling = Literal["flatten", "first", "mean"]


def class_numbers(owner: object, step: "Step", label_key: str) -> Tensor:
    """The class of each sample of the batch.

    Args:
        owner: Who asks; its class is named in the error.
        step: The step.
        label_key: Entry of the batch.

    Returns:
        Whole numbers ``(B,)``.

    Raises:
        MisconfigurationException: If there is no such entry, or it is something else.

    """
    name = type(owner).__name__
    labels = find_entry(step.batch, label_key, f"{name}: label_key")
    if isinstance(labels, Tensor):
        columns = labels[:, 0] if labels.dim() == 2 and labels.shape[1] == 1 else labels
        if columns.dim() == 1 and not columns.is_floating_point():
            return columns.detach()
    found = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
    raise MisconfigurationException(
        f"{name}(label_key={label_key!r}) must name a class number for each sample, whole numbers (B,), found"
        f" {found}. Mixed and soft labels say of no pair whether it is of one class."
    )


def embeddings(owner: object, step: "Step", layer: str, rows: int, pooling: Pooling) -> list[Tensor]:
    """The output of a layer in each pass of the step that trains it.

    Args:
        owner: Who asks; its class is named in the error.
        step: The step.
        layer: Name of the layer.
        rows: Number of samples.
        pooling: What counts of an output ``(B, T, D)``.

    Returns:
        ``(B, D)`` each.

    Raises:
        MisconfigurationException: If none has a gradient, or one has not as many rows.

    """
    given = step.passes.get(layer, ())
    own = given if step.views is None else [step.views.own(features) for features in given]
    tensors = [features for features in own if isinstance(features, Tensor)]
    trained = [features for features in tensors if features.requires_grad]
    fine = bool(trained) and all(features.dim() > 1 and len(features) == rows for features in trained)
    if not fine or (pooling != "flatten" and any(features.dim() != 3 for features in trained)):
        shapes = ", ".join(f"{tuple(f.shape)}{'' if f.requires_grad else ' without gradient'}" for f in tensors)
        wanted = "(B, D)" if pooling == "flatten" else f"(B, T, D) for pooling={pooling!r}"
        raise MisconfigurationException(
            f"{type(owner).__name__}: layer {layer!r} gave {shapes or 'no tensor'} in this step, where a trained"
            f" embedding {wanted} of each of {rows} labels is needed. Name a layer that puts out one tensor with a row"
            " per sample; views of a batch must pass it one after the other, or have labels of their own in the batch."
        )
    return [pooled(features, pooling) for features in trained]


def pooled(output: Tensor, pooling: Pooling) -> Tensor:
    """What counts of a layer's output ``(B, T, D)``, or of ``(B, ...)`` where it is flattened: ``(B, D)``."""
    if pooling == "first":
        return output[:, 0]
    return output.mean(1) if pooling == "mean" else output.flatten(1)
