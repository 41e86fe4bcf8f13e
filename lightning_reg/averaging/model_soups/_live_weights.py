"""The tensors of a module that are averaged, split over processes or not, and other values in their place."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_reg.averaging._state_dicts import is_averaged
from lightning_reg.averaging.model_soups.core import tracking_layers
from lightning_reg.engine.host.names import plain_name
from lightning_reg.engine.weights.shards import Layout, layout_of, local, own_rows, reshard_, whole_like

__all__ = ["Layouts", "LiveWeights", "Weights", "averaged_tensors", "own_parts"]

Weights = Mapping[str, Tensor]
Layouts = Mapping[str, Layout]  # of the tensors that are split over processes


def averaged_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What can be averaged: floating-point parameters, and the running statistics of batch norm.

    Other buffers are masks, counters, memories of samples: they stay the module's own. Tied parameters count once.

    Args:
        module: The user's.

    Returns:
        The live tensors by name, without ``_orig_mod.``.

    """
    names: dict[Tensor, str] = {p: plain_name(name) for name, p in module.named_parameters()}
    names |= {b: plain_name(name) for name, b in module.named_buffers()}
    statistics = [b for layer in tracking_layers(module) for b in (layer.running_mean, layer.running_var)]
    candidates = [*module.parameters(), *(b for b in statistics if b is not None)]
    return {names[tensor]: tensor for tensor in candidates if is_averaged(tensor)}


class LiveWeights:
    """Tensors of a module; of those that are split over processes, this process's shards.

    Other values are put into tensors by pointers: nothing is copied. FSDP2 knows its shards by their memory, so there
    the values are copied into it and back.

    Args:
        module: The user's; ``None`` for no tensors.
        tensors: Those of its tensors that are averaged, by name.
        masks: Of weights that were pruned before.

    """

    def __init__(
        self, module: nn.Module | None = None, tensors: Weights | None = None, masks: Weights | None = None
    ) -> None:
        self._given = dict(tensors or {})
        self.layouts: Layouts = {n: layout for n, t in self._given.items() if (layout := layout_of(t)) is not None}
        self._module, self._split_module = module, module if self.layouts else None
        self._masks: dict[str, Tensor] = dict(masks or {})
        self._own: list[tuple[Tensor, Tensor]] = []
        self.tensors: dict[str, Tensor] = {}
        self._take_local_parts()

    def _take_local_parts(self) -> None:
        self.tensors = {name: local(t) if name in self.layouts else t for name, t in self._given.items()}

    def find_shards(self) -> None:
        """Looks anew where shards lie: FSDP2 settles in its first forward pass where they lie in memory."""
        if self.layouts:
            self._take_local_parts()

    def find_masks(self) -> None:
        """Notes the masks of pruned weights (``torch.nn.utils.prune``), which are gone once pruning is permanent."""
        names = {} if self._module is None else {id(tensor): name for name, tensor in self._given.items()}
        for layer in self._module.modules() if self._module is not None else ():
            for place, mask in layer.named_buffers(recurse=False):
                stem = place.removesuffix("_mask")
                name = names.get(id(getattr(layer, f"{stem}_orig", None))) if stem != place else None
                if name is not None:
                    self._masks[name] = mask

    def masks(self) -> dict[str, Tensor]:
        """Which weights are kept, booleans on the CPU, of those that are pruned."""
        self.find_masks()
        return {name: mask.detach().bool().cpu() for name, mask in self._masks.items()}

    def pruned(self, values: Weights) -> dict[str, Tensor]:
        """Values with zeros where weights are pruned."""
        self.find_masks()
        return {name: self._pruned(values, name) for name in values}

    def _pruned(self, values: Weights, name: str) -> Tensor:
        """A value, with zeros where the weight is pruned: averages know of values from before."""
        return values[name] * self._masks[name].to(values[name]) if name in self._masks else values[name]

    def let_go(self) -> None:
        """Puts the module's own values back; of it there stay masks, and how its tensors were laid out."""
        self.restore()
        self._given, self.tensors, self._module, self._split_module = {}, {}, None, None

    @contextmanager
    def exchanged(self, values: Weights) -> Iterator[None]:
        """Other values in the tensors for a time."""
        self.put(values)
        try:
            yield
        finally:
            self.restore()

    @torch.no_grad()
    def put(self, values: Weights) -> None:
        """Puts ``values`` in until :meth:`restore`; only those of another type or device are copied."""
        if self._split_module is not None:
            self._own = [(tensor, tensor.clone()) for tensor in self.tensors.values()]
            self.overwrite(values)
            return
        for name, tensor in self.tensors.items():
            self._own.append((tensor, tensor.data))
            tensor.data = self._pruned(values, name).to(tensor)

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the module's own values back, unless they are in."""
        for tensor, own in self._own:
            if self._split_module is not None:
                tensor.copy_(own)
            else:
                tensor.data = own
        if self._own and self._split_module is not None:
            reshard_(self._split_module)
        self._own = []

    @torch.no_grad()
    def overwrite(self, values: Weights) -> None:
        """Copies values into the tensors for good; those without a value stay as they are."""
        for name, tensor in self.tensors.items():
            if name in values:
                tensor.copy_(self._pruned(values, name))
        if self._split_module is not None:
            reshard_(self._split_module)

    def on_cpu(self) -> dict[str, Tensor]:
        """A copy of the present values in host memory."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.tensors.items()}

    def alike(self, values: Weights) -> dict[str, Tensor]:
        """A copy of values in the tensors' types, on their devices."""
        return {name: self._pruned(values, name).to(tensor, copy=True) for name, tensor in self.tensors.items()}

    def whole(self, state: dict[str, Any]) -> dict[str, Any]:
        """The same state with whole tensors, on the CPU, in place of shards, and zeros where weights are pruned.

        All processes must take part.

        Args:
            state: Shards under the tensors' names, in it or in mappings and lists of mappings in it.

        Returns:
            A new state, or the given one where nothing is split or pruned.

        """
        self.find_masks()
        return self._whole(state) if self.layouts or self._masks else state

    def _whole(self, state: dict[str, Any]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, value in state.items():
            if name in self.layouts and isinstance(value, Tensor):
                layout = self.layouts[name]
                result[name] = whole_like(value.to(layout.device_mesh.device_type), layout).cpu()
            elif isinstance(value, Tensor):
                result[name] = self._pruned(state, name)
            elif isinstance(value, dict):
                result[name] = self._whole(value)
            elif isinstance(value, list) and value and isinstance(value[0], dict):
                result[name] = [self._whole(each) for each in value]
            else:
                result[name] = value
        return result


def own_parts(values: Weights, layouts: Layouts) -> dict[str, Tensor]:
    """This process's shards of whole tensors; others as they are."""
    return {name: own_rows(v, layouts[name]).clone() if name in layouts else v for name, v in values.items()}
