"""Changing the outputs of named layers while a step runs, by hooks of ``nn.Module``."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_reg.engine.host.autograd import runs_backward
from lightning_reg.engine.host.errors import MisconfigurationException, refuse_layer
from lightning_reg.engine.layers.named import LayerHook, named_layers

if TYPE_CHECKING:
    from lightning_reg.engine.host.owner import Owner
    from lightning_reg.engine.step import Step

__all__ = ["LayerCall", "LayerEdit", "LayerEdits"]


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer whose output a technique may change.

    Args:
        name: Name of the layer, as in ``named_modules()``.
        layer: The layer; in a training step it is in training mode and gradients are recorded, in others neither need
            be so.
        input: Its first argument, by position or else by name, untouched by a layer that works in place.
        output: What it returned, already changed if an earlier technique has changed it.
        step: The step that it happened in; ``step.stage`` tells training from evaluation.
        number: How many outputs were changed before in this pass through the step; where a checkpointed layer runs once
            more in the backward pass, what it was when the layer ran first.

    """

    name: str
    layer: nn.Module
    input: Any
    output: Any
    step: "Step"
    number: int


class LayerEdit(NamedTuple):
    """Who edits which layers.

    Args:
        owner: Whose edit it is; its class is named in errors.
        layers: Names of the layers.
        edit: Returns what a layer returns in its place, ``None`` for its own output.

    """

    owner: "Owner"
    layers: Sequence[str]
    edit: Callable[[LayerCall], Any]


class LayerEdits:
    """The hooks on the layers that are edited.

    Args:
        module: The user's module.
        edits: In the order in which they act.
        training: Whether layers are edited in training, or in evaluation.

    Raises:
        MisconfigurationException: If a name matches no layer; the message lists near ones.

    """

    def __init__(self, module: nn.Module, edits: Sequence[LayerEdit], *, training: bool = True) -> None:
        named = named_layers(module)
        for edit in edits:
            for name in edit.layers:
                if name not in named:
                    refuse_layer(name, named, type(edit.owner).__name__)
        self._edits, self._training = edits, training
        self._unseen = [edit for edit in edits if edit.layers]
        self._step: Step | None = None
        self._last: Step | None = None  # whose backward pass may follow
        self._numbers: dict[str, int] = {}
        self._seen: set[str] = set()
        self._inputs: dict[str, Any] = {}
        self._number = 0
        self._handles: list[RemovableHandle] = []
        for name in dict.fromkeys(name for edit in edits for name in edit.layers):
            self._handles.append(named[name].register_forward_pre_hook(_Before(self, name), with_kwargs=True))
            self._handles.append(named[name].register_forward_hook(_After(self, name)))

    def open(self, step: "Step") -> None:
        """Edits from here on, for the owners that are active in the step."""
        self._step, self._last, self._number = step, step, 0
        self._inputs.clear()
        self._numbers.clear()

    def shut(self) -> None:
        """Edits no more, but where layers run again in the backward pass of the step."""
        self._step = None
        self._inputs.clear()

    def rest(self) -> None:
        """The step is over, with its backward pass."""
        self._last = None
        self._inputs.clear()

    def check(self, step: "Step") -> None:
        """Refuses, after the first step of each owner, that none of its layers has run in it.

        Args:
            step: What has run.

        Raises:
            MisconfigurationException: Naming the owner and its layers.

        """
        for edit in [edit for edit in self._unseen if edit.owner in step.active]:
            self._unseen.remove(edit)
            if self._seen.isdisjoint(edit.layers):
                raise MisconfigurationException(
                    f"{type(edit.owner).__name__} changes what {', '.join(map(repr, edit.layers))} return, and none of"
                    f" them ran in the first {step.stage} step. Are they used there? Layers of a network that ran under"
                    " `torch.compile` before the technique was there run without it: call `torch.compiler.reset()`"
                    " first."
                )

    def close(self) -> None:
        """Takes the hooks off."""
        self.rest()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def before(
        self, name: str, layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Keeps the input of a layer, and says what the layer gets in its place; ``None`` for the same."""
        again = self._last is not None and runs_backward()
        if self._step is None and not again:
            return None
        if self._unseen:
            self._seen.add(name)
        if layer.training is not self._training or (self._training and not torch.is_grad_enabled()):
            return None
        if again and name not in self._numbers:
            self._refuse_reentrant(name)
        given = self._inputs[name] = args[0] if args else next(iter(named.values()), None)
        if args and getattr(layer, "inplace", False) and isinstance(given, Tensor):
            return (given.clone(), *args[1:]), named
        return None

    def after(self, name: str, layer: nn.Module, output: Any) -> Any:
        """The output after the techniques' changes; ``None`` for the same."""
        step = self._step or self._last
        if step is None or name not in self._inputs:
            return None
        again = runs_backward()
        given, result = self._inputs.pop(name), output
        number = self._numbers[name] if again else self._number
        for edit in self._edits:
            if name in edit.layers and edit.owner in step.active:
                answer = edit.edit(LayerCall(name, layer, given, result, step, number))
                result = result if answer is None else answer
        if not again:
            self._numbers.setdefault(name, number)
            self._number += result is not output
        return None if result is output else result

    def _refuse_reentrant(self, name: str) -> None:
        owners = [
            edit.owner for edit in self._edits if name in edit.layers and self._last and edit.owner in self._last.active
        ]
        if owners:
            raise MisconfigurationException(
                f"{type(owners[0]).__name__} changes what {name!r} returns, and that layer ran without gradient in the"
                " step and runs again in the backward pass, as under a checkpoint that is reentrant: what it returned"
                " first was not changed. Pass `use_reentrant=False` to the checkpoint"
                ' (`gradient_checkpointing_enable({"use_reentrant": False})` in transformers).'
            )


class _Hook(LayerHook):
    def __init__(self, edits: LayerEdits, name: str) -> None:
        self.edits, self.name = edits, name


class _Before(_Hook):
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's
    def __call__(self, layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        return self.edits.before(self.name, layer, args, named)


class _After(_Hook):
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's
    def __call__(self, layer: nn.Module, args: Any, output: Any) -> Any:
        return self.edits.after(self.name, layer, output)
