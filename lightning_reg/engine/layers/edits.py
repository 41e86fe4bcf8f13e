"""Changing what named layers are given and what they return while a step runs, by hooks of ``nn.Module``."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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

__all__ = ["InputCall", "LayerCall", "LayerEdit", "LayerEdits"]


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
        number: How many inputs and outputs were changed before in this pass through the step; where a checkpointed
            layer runs once more in the backward pass, what it was when the layer ran first.
        again: Whether it is such a further run: what a technique counts it has counted in the first.

    """

    name: str
    layer: nn.Module
    input: Any
    output: Any
    step: "Step"
    number: int
    again: bool = False


@dataclass(frozen=True)
class InputCall:
    """One call of a layer whose inputs a technique may change, before the layer runs.

    Args:
        name: Name of the layer, as in ``named_modules()``.
        layer: The layer, in the mode and under the conditions of :class:`LayerCall`.
        args: Its arguments by position, already changed if an earlier technique has changed them; they may be nested,
            and stay as they are.
        named: Its arguments by name, likewise.
        step: The step that it happens in; ``step.stage`` tells training from evaluation.
        number: As in :class:`LayerCall`.
        again: As in :class:`LayerCall`.

    """

    name: str
    layer: nn.Module
    args: tuple[Any, ...]
    named: Mapping[str, Any]
    step: "Step"
    number: int
    again: bool = False

    @property
    def input(self) -> Any:
        """The first argument, by position or else by name; ``None`` if there is none."""
        return self.args[0] if self.args else next(iter(self.named.values()), None)

    def with_input(self, value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """All arguments, with another one in place of the first."""
        if self.args or not self.named:
            return (value, *self.args[1:]), dict(self.named)
        return (), {**self.named, next(iter(self.named)): value}


class LayerEdit(NamedTuple):
    """Who edits which layers.

    Args:
        owner: Whose edit it is; its class is named in errors.
        layers: Names of the layers.
        edit: Gets a :class:`LayerCall` and returns what a layer returns in its place, ``None`` for its own output; of
            inputs it gets an :class:`InputCall` and returns arguments by position and by name, ``None`` for its own.
        of_inputs: Whether it changes what layers are given.
        in_any_mode: Whether layers that are in the other mode are changed too.

    """

    owner: "Owner"
    layers: Sequence[str]
    edit: Callable[[Any], Any]
    of_inputs: bool = False
    in_any_mode: bool = False

    @property
    def sentence(self) -> str:
        """What it does, to begin an error with."""
        verbs = ("is given", "are given") if self.of_inputs else ("returns", "return")
        names = ", ".join(map(repr, self.layers))
        return f"{type(self.owner).__name__} changes what {names} {verbs[len(self.layers) > 1]}"


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
        self._returning = {name for edit in edits if not edit.of_inputs for name in edit.layers}
        self._unseen = [edit for edit in edits if edit.layers]
        self._step: Step | None = None
        self._last: Step | None = None  # whose backward pass may follow
        self._numbers: dict[tuple[str, bool], int] = {}
        self._seen: set[str] = set()
        self._inputs: dict[str, Any] = {}
        self._number = 0
        self._handles: list[RemovableHandle] = []
        for name in dict.fromkeys(name for edit in edits for name in edit.layers):
            self._handles.append(named[name].register_forward_pre_hook(_Before(self, name), with_kwargs=True))
            if name in self._returning:
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
                    f"{edit.sentence}, and none of them ran in the first {step.stage} step. Are they used there? Layers"
                    " of a network that ran under `torch.compile` before the technique was there run without it: call"
                    " `torch.compiler.reset()` first."
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
        """Says what a layer gets in place of its arguments, ``None`` for the same; and keeps its input."""
        step, again = self._step or self._last, runs_backward()
        if step is None or (self._step is None and not again):
            return None
        if self._unseen:
            self._seen.add(name)
        if not self._are_at(name, layer) or (self._training and not torch.is_grad_enabled()):
            return None
        if again and (name, True) not in self._numbers:
            self._refuse_reentrant(name)
            return None
        call = InputCall(name, layer, args, named, step, self._numbers[name, True] if again else self._number, again)
        for edit in self._acting(name, layer, step, of_inputs=True):
            answer = edit.edit(call)
            call = call if answer is None else replace(call, args=answer[0], named=answer[1])
        changed = call.args is not args or call.named is not named
        self._count(name, again, of_inputs=True, changed=changed)
        if name in self._returning:
            self._inputs[name] = given = call.input
            if call.args and getattr(layer, "inplace", False) and isinstance(given, Tensor):
                return call.with_input(given.clone())
        return (call.args, dict(call.named)) if changed else None

    def after(self, name: str, layer: nn.Module, output: Any) -> Any:
        """The output after the techniques' changes; ``None`` for the same."""
        step, again = self._step or self._last, runs_backward()
        if step is None or name not in self._inputs:
            return None
        given, result = self._inputs.pop(name), output
        number = self._numbers[name, False] if again else self._number
        for edit in self._acting(name, layer, step, of_inputs=False):
            answer = edit.edit(LayerCall(name, layer, given, result, step, number, again))
            result = result if answer is None else answer
        self._count(name, again, of_inputs=False, changed=result is not output)
        return None if result is output else result

    def _are_at(self, name: str, layer: nn.Module) -> bool:
        """Whether any edit of a layer is made in the mode that it is in."""
        return layer.training is self._training or any(e.in_any_mode for e in self._edits if name in e.layers)

    def _acting(self, name: str, layer: nn.Module, step: "Step", *, of_inputs: bool) -> list[LayerEdit]:
        its = [edit for edit in self._edits if edit.of_inputs is of_inputs and name in edit.layers]
        its = [edit for edit in its if edit.in_any_mode or layer.training is self._training]
        return [edit for edit in its if edit.owner in step.active]

    def _count(self, name: str, again: bool, *, of_inputs: bool, changed: bool) -> None:
        if not again:
            self._numbers.setdefault((name, of_inputs), self._number)
            self._number += changed

    def _refuse_reentrant(self, name: str) -> None:
        edits = [edit for edit in self._edits if name in edit.layers and self._last and edit.owner in self._last.active]
        if edits:
            does = edits[0]._replace(layers=[name]).sentence
            raise MisconfigurationException(
                f"{does}, and that layer ran without gradient in the step and runs again in the backward pass, as under"
                " a checkpoint that is reentrant: it was not changed when it ran first. Pass `use_reentrant=False` to"
                ' the checkpoint (`gradient_checkpointing_enable({"use_reentrant": False})` in transformers).'
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
