"""Layers that cannot run on several copies of the rows, noticed while they run."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_reg.engine.host.autograd import version_of
from lightning_reg.engine.host.modules import BatchNorm
from lightning_reg.engine.layers.named import LayerHook

__all__ = ["NormWatch", "watch_order"]


class NormWatch:
    """Notices which batch normalizations run with statistics of the batch, between start and check.

    By the version of their count of batches, which needs no hook and is kept by compiled code as well; by a hook where
    there is none.
    """

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        self._norms = {name: layer for name, layer in layers.items() if isinstance(layer, BatchNorm)}
        self._versions: dict[str, int] = {}
        self._handles: list[RemovableHandle] = []

    def start(self, refuse: Callable[[str], None]) -> None:
        """Notices from here on; ``refuse`` gets the name of a normalization that is seen at once."""
        for name, norm in self._norms.items():
            if norm.num_batches_tracked is None:
                self._handles.append(norm.register_forward_pre_hook(lambda *_, name=name: refuse(name)))
            elif norm.training:
                self._versions[name] = version_of(norm.num_batches_tracked)

    def check(self, refuse: Callable[[str], None]) -> None:
        """Hands over the name of each that has run, and notices no more."""
        versions = dict(self._versions)
        self.stop()
        for name, version in versions.items():
            count = self._norms[name].num_batches_tracked
            if count is not None and version_of(count) != version:
                refuse(name)

    def stop(self) -> None:
        """Notices no more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._versions.clear()


def watch_order(layers: Mapping[str, nn.Module], check: Callable[[str, Any], None]) -> list[RemovableHandle]:
    """Has the inputs of all layers looked at that take the samples as second dimension (``batch_first=False``).

    Args:
        layers: Layers by name.
        check: Gets the name of a layer that is called, and its input.

    Returns:
        Handles of the hooks.

    """
    second = {name: layer for name, layer in layers.items() if getattr(layer, "batch_first", None) is False}
    return [layer.register_forward_pre_hook(_Order(name, check), with_kwargs=True) for name, layer in second.items()]


class _Order(LayerHook):
    def __init__(self, name: str, check: Callable[[str, Any], None]) -> None:
        self.name, self.check = name, check

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's
    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.check(self.name, args[0] if args else kwargs.get("query", kwargs.get("input")))
