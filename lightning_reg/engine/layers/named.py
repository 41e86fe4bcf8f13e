"""Observing the outputs of layers that are named as in ``named_modules()``."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_reg.engine.host.autograd import is_reentrant
from lightning_reg.engine.host.errors import MisconfigurationException, refuse_layer
from lightning_reg.engine.host.names import plain_name

__all__ = ["FeatureTap", "LayerHook", "find_layer", "is_frozen", "layer_named", "named_layers"]


def named_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Layers by the names the user knows: without the ``_orig_mod.`` that ``torch.compile`` puts in between."""
    layers = ((plain_name(f"{name}.")[:-1], layer) for name, layer in module.named_modules())
    return {name: layer for name, layer in layers if name}


def find_layer(layers: Mapping[str, nn.Module], name: str, owner: str = "") -> nn.Module:
    """The layer of a name.

    Args:
        layers: As :func:`named_layers` gives them.
        name: What the user wrote.
        owner: Class to name in the error.

    Returns:
        The layer.

    Raises:
        MisconfigurationException: If there is none; the message lists near names.

    """
    if name not in layers:
        refuse_layer(name, layers, owner)
    return layers[name]


def layer_named(module: nn.Module, name: str, owner: str = "") -> nn.Module:
    """The same for one name of a module, without a look at all its layers: for every step.

    Args:
        module: The module.
        name: What the user wrote.
        owner: Class to name in the error.

    Returns:
        The layer.

    Raises:
        MisconfigurationException: As above.

    """
    try:
        return module.get_submodule(name or "?")
    except AttributeError:  # behind an `_orig_mod.`, or nowhere
        return find_layer(named_layers(module), name, owner)


def is_frozen(module: nn.Module, name: str) -> bool:
    """Whether a layer has parameters and none is trained now, as where a fit trains a head alone for a time.

    Args:
        module: The user's module.
        name: The layer's name.

    Returns:
        ``False`` for a layer without parameters, too.

    """
    params = [*find_layer(named_layers(module), name).parameters()]
    return bool(params) and not any(p.requires_grad for p in params)


class FeatureTap:
    """Keeps the outputs of named layers while it is open: the last of each, and those of all passes in order.

    Args:
        module: The user's module.
        names: Layer names.

    Attributes:
        view: What is kept of an output; set anew for each step.
        own: What is kept, of that, of the last output; set anew for each step.
        learners: Who learns from the output of a layer, by the layer's name; set anew for each step.

    Raises:
        MisconfigurationException: If a name matches no layer; the message lists near ones.

    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        layers = named_layers(module)
        self.view: Callable[[Any], Any] = _all_of_it
        self.own: Callable[[Any], Any] = _all_of_it
        self.outputs: dict[str, Any] = {}
        self.passes: dict[str, list[Any]] = {}
        self.learners: Mapping[str, str] = {}
        self.open = False
        self._handles: list[RemovableHandle] = []
        for name, layer in [(name, find_layer(layers, name)) for name in dict.fromkeys(names)]:
            self._handles.append(layer.register_forward_hook(_Keep(self, name)))

    def shut(self) -> None:
        """Keeps no more, and forgets the outputs."""
        self.open, self.view, self.own, self.learners = False, _all_of_it, _all_of_it, {}
        self.outputs.clear()
        self.passes.clear()

    def close(self) -> None:
        """Takes the hooks off and forgets the outputs."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.shut()


def _all_of_it(output: Any) -> Any:
    return output


class LayerHook:
    """A hook of the suite's on a layer; copies of the module are made without it."""


class _Keep(LayerHook):
    def __init__(self, tap: FeatureTap, name: str) -> None:
        self.tap, self.name = tap, name

    def __call__(self, layer: nn.Module, args: Any, output: Any) -> None:
        if self.tap.open:
            if self.name in self.tap.learners and not torch.is_grad_enabled():
                _refuse_reentrant(self.tap.learners[self.name], self.name)
            kept = self.tap.view(output)
            self.tap.outputs[self.name] = self.tap.own(kept)
            self.tap.passes.setdefault(self.name, []).append(kept)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's
def _refuse_reentrant(learner: str, name: str) -> None:
    if is_reentrant():
        raise MisconfigurationException(
            f"{learner} learns from what {name!r} returns, and that layer runs without gradient under a checkpoint that"
            " is reentrant, so nothing would be learned. Pass `use_reentrant=False` to the checkpoint"
            ' (`gradient_checkpointing_enable({"use_reentrant": False})` in transformers).'
        )
