"""Networks that answer together: the mean of their logits."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.errors import MisconfigurationException

__all__ = ["JointForward", "MeanOfTwo", "mean_of_outputs"]


def mean_of_outputs(first: Any, second: Any) -> Tensor:
    """Mean of the logits of two networks.

    Args:
        first: What one network's ``forward`` returned.
        second: What the other's returned.

    Returns:
        ``0.5 * (first + second)``.

    Raises:
        MisconfigurationException: If these are no tensors.

    """
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)):
        raise MisconfigurationException(
            f"Two networks answer by the mean of their logits, but `forward` returns a {type(first).__name__}. Name a"
            " layer that returns the logits."
        )
    return 0.5 * (first + second)


class MeanOfTwo(nn.Module):
    """Two networks as one: the mean of what their ``forward`` returns.

    Args:
        first: One network.
        second: The other one.

    """

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The mean of both networks' logits; arguments as the networks take them."""
        return mean_of_outputs(self.first(*args, **kwargs), self.second(*args, **kwargs))


class JointForward:
    """While it is on, a layer of the user's module answers for two networks, the second of them in eval mode.

    Args:
        layer: The layer of the user's module, or the module.
        other: The layer of the second network.

    Attributes:
        calls: How often it answered.

    """

    def __init__(self, layer: nn.Module, other: nn.Module) -> None:
        self._other, self._modes = other, [(part, part.training) for part in other.modules()]
        other.eval()
        self.calls = 0
        self._replaced = host.Replacement(layer, "forward", self._forward)
        self._own: Callable[..., Any] = self._replaced.original

    def undo(self) -> None:
        """Puts the layer's own ``forward`` and the modes of the second network back."""
        self._replaced.undo()
        for part, mode in self._modes:
            part.training = mode

    def _forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return mean_of_outputs(self._own(*args, **kwargs), self._other(*args, **kwargs))
