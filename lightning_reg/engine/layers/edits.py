"""Changing the outputs of named layers while the training step runs, by hooks of ``nn.Module``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_reg.engine.host.errors import refuse_layer
from lightning_reg.engine.layers.named import named_layers

if TYPE_CHECKING:
    from lightning_reg.engine.copies import Copies
    from lightning_reg.engine.host.owner import Owner
    from lightning_reg.engine.step import Step

__all__ = ["FeatureEdits", "LayerCall"]


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer whose output a technique may change.

    Args:
        name: Name of the layer, as in ``named_modules()``.
        layer: The layer; it is in training mode, and gradients are recorded.
        input: Its first argument, untouched by a layer that works in place.
        output: What it returned, already changed if an earlier technique has changed it.
        step: The training step that it happened in.
        number: How many outputs were changed before in this pass through ``training_step``.
        after_copies: Whether it follows the layer that makes the copies of :meth:`Technique.copy_plan`. Where the
            copies are rows, ``input`` holds all of them, and ``output`` is that of the first copy.
        run: Number of this pass through ``training_step``, where the copies are passes.

    """

    name: str
    layer: nn.Module
    input: Any
    output: Any
    step: "Step"
    number: int
    after_copies: bool
    run: int


class FeatureEdits:
    """The hooks on the layers that techniques edit.

    Args:
        module: The user's module.
        layers: For each technique the names of its layers.
        copies: Follows the copies that one of the techniques makes, if one does.

    Raises:
        MisconfigurationException: If a name matches no layer; the message lists near ones.

    """

    def __init__(self, module: nn.Module, layers: "Mapping[Owner, Sequence[str]]", copies: "Copies | None") -> None:
        named = named_layers(module)
        for technique, names in layers.items():
            for name in names:
                if name not in named:
                    refuse_layer(name, named, type(technique).__name__)
        self._layers, self._copies = layers, copies
        self._step: Step | None = None
        self._active: list[Owner] = []
        self._inputs: dict[str, tuple[Any, bool]] = {}
        self._number = self.run = 0
        self._handles: list[RemovableHandle] = []
        for name in dict.fromkeys(name for names in layers.values() for name in names):
            self._handles.append(named[name].register_forward_pre_hook(_Before(self, name)))
            self._handles.append(named[name].register_forward_hook(_After(self, name)))

    def open(self, step: "Step", active: "list[Owner]", run: int = 0) -> None:
        """Edits from here on, for the techniques that are active in the step."""
        self._step, self._active, self.run, self._number = step, active, run, 0
        self._inputs.clear()

    def shut(self) -> None:
        """Edits no more."""
        self._step = None
        self._inputs.clear()

    def close(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def before(self, name: str, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Keeps the input of a layer, and says what the layer gets in its place; ``None`` for the same."""
        if self._step is None or not args:
            return None
        if self._copies is not None and name == self._copies.plan.layer:
            self._copies.called(active=layer.training and torch.is_grad_enabled())
        if not (layer.training and torch.is_grad_enabled()):
            return None
        given, editors = args[0], self._editors(name)
        after = self._copies is not None and self._copies.owner in editors and self._copies.reached(name, given)
        self._inputs[name] = given, after
        # The layer's own output is given up where the rows are copies. It runs on the first copy alone, so that what it
        # draws is what it would have drawn.
        first = self._copies.first(given) if after and self._copies is not None else given
        if getattr(layer, "inplace", False) and isinstance(first, Tensor):
            first = first.clone()
        return None if first is given else (first, *args[1:])

    def after(self, name: str, layer: nn.Module, output: Any) -> Any:
        """The output after the techniques' changes; ``None`` for the same."""
        if self._step is None or name not in self._inputs:
            return None
        given, after = self._inputs.pop(name)
        result = output
        for technique in self._editors(name):
            call = LayerCall(name, layer, given, result, self._step, self._number, after, self.run)
            answer = technique.edit_features(call)
            if answer is not None:
                result = answer
        self._number += result is not output
        if self._copies is not None and not after and name == self._copies.plan.layer:
            self._copies.made(given, result, self._step)
        return None if result is output else result

    def _editors(self, name: str) -> "list[Owner]":
        return [t for t in self._active if name in self._layers.get(t, ())]


class _Hook:
    def __init__(self, edits: FeatureEdits, name: str) -> None:
        self.edits, self.name = edits, name


class _Before(_Hook):
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's
    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> Any:
        return self.edits.before(self.name, layer, args)


class _After(_Hook):
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's
    def __call__(self, layer: nn.Module, args: Any, output: Any) -> Any:
        return self.edits.after(self.name, layer, output)
