"""Networks that answer together: the mean of their logits."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.layers.named import find_layer, named_layers
from lightning_reg.engine.networks.named_weights import load_weights_
from lightning_reg.engine.networks.peer import copy_of

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    from lightning_reg.engine.technique import Technique

__all__ = ["JointForward", "MeanOfTwo", "layer_or_module", "mean_of_layers", "mean_of_outputs", "two_copies"]


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


def two_copies(
    module: "LightningModule", owner: "Technique", second: Mapping[str, Tensor]
) -> "tuple[LightningModule, LightningModule]":
    """Copies of a module, the second of them with the weights of another network.

    Args:
        module: The module.
        owner: Whose networks they are; its class is named in errors.
        second: Weights of the other network, by the module's names.

    Returns:
        The copies.

    """
    copies = copy_of(module), copy_of(module)
    load_weights_(copies[1], second, owner)
    return copies


def layer_or_module(module: nn.Module, name: str) -> nn.Module:
    """The layer of a name; the module itself for ""."""
    return find_layer(named_layers(module), name) if name else module


def mean_of_layers(networks: Sequence[nn.Module], name: str) -> MeanOfTwo:
    """A layer of two networks, or both themselves, as one in eval mode."""
    first, second = (layer_or_module(network, name) for network in networks)
    return MeanOfTwo(first, second).eval()


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
