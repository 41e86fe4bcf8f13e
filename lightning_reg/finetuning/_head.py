"""The linear layer that makes class scores of features."""

from torch import nn

from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.layers.named import layer_named

__all__ = ["linear_head"]


def linear_head(owner: object, module: nn.Module, layer: str, head: str, width: int | None = None) -> nn.Linear:
    """The layer of a name, which gets the features.

    Args:
        owner: Who asks; its class is named in the error.
        module: The user's module.
        layer: Where the features come from, for the error.
        head: Name of the head.
        width: Number of the features; ``None`` if it is not known yet.

    Returns:
        The head.

    Raises:
        MisconfigurationException: If it is no linear layer for so many features.

    """
    found = layer_named(module, head)
    if not isinstance(found, nn.Linear) or (width is not None and found.in_features != width):
        features = "features" if width is None else f"{width} features"
        raise MisconfigurationException(
            f"{type(owner).__name__}(head={head!r}) must name the linear layer that gets the {features} of {layer!r},"
            f" found {found}. Name the layer whose output the head gets as it is, and the head."
        )
    return found
