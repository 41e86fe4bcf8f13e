"""The network of an earlier task as a reference: what is kept of it, and where it is between tasks."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.engine.networks.named_weights import weights_of
from lightning_reg.engine.networks.references import Reference

__all__ = ["Teacher", "network"]


class Teacher(Reference):
    """A reference that never takes weights by itself: those that a task left.

    Args:
        layers: Layers whose outputs it gives; without any it gives its loss call.

    """

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "weights": None}  # they are kept elsewhere

    @property
    def there(self) -> Sequence[Reference]:
        """Itself, if it has weights in this task."""
        return () if self.weights is None else (self,)


def network(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers as they are now, by name."""
    return {name: value.clone() for name, value in weights_of(module).items()}
