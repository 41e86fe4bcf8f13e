"""Parts on named layers: what they are given and return, changed and observed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from typing_extensions import override

from lightning_reg.engine.layers.edits import LayerEdit, LayerEdits
from lightning_reg.engine.layers.named import FeatureTap
from lightning_reg.engine.run.part import Part
from lightning_reg.engine.run.phases import Observer, OnLayers, phases_of

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    from lightning_reg.engine.step import Step

__all__ = ["EditPart", "TapPart", "edits_of"]


def edits_of(techniques: Sequence[OnLayers], module: "LightningModule") -> list[LayerEdit]:
    """What techniques change of which layers.

    Args:
        techniques: In the order in which they act.
        module: The user's module.

    Returns:
        Edits of inputs and outputs, in the order of the techniques.

    """
    edits: list[LayerEdit] = []
    for technique in techniques:
        phases = phases_of(technique)
        if "edit_inputs" in phases:
            inputs = LayerEdit(technique, technique.inputs_to_edit(module), technique.edit_inputs, of_inputs=True)
            edits.append(inputs._replace(in_any_mode=technique.in_any_mode))
        if "edit_features" in phases:
            outputs = LayerEdit(technique, technique.features_to_edit(module), technique.edit_features)
            edits.append(outputs._replace(in_any_mode=technique.in_any_mode))
    return edits


class EditPart(Part):
    """Inputs and outputs of named layers, changed.

    Args:
        module: The user's module.
        techniques: Those that take part.

    """

    def __init__(self, module: "LightningModule", techniques: Sequence[OnLayers]) -> None:
        self._module, self._techniques = module, techniques
        self._edits = LayerEdits(module, ())

    @override
    def prepare(self) -> None:
        self._edits = LayerEdits(self._module, edits_of(self._techniques, self._module))

    @override
    @contextmanager
    def around(self, step: "Step") -> Iterator[None]:
        self._edits.open(step)
        try:
            yield
        finally:
            self._edits.shut()
        self._edits.check(step)

    @override
    def rest(self) -> None:
        self._edits.rest()

    @override
    def close(self) -> None:
        self._edits.close()


class TapPart(Part):
    """Outputs of named layers, observed.

    Args:
        module: The user's module.
        observers: Those that read them.

    """

    def __init__(self, module: "LightningModule", observers: Sequence[Observer]) -> None:
        self._module, self._observers = module, observers
        self._tap = FeatureTap(module, ())

    @override
    def prepare(self) -> None:
        layers = [layer for observer in self._observers for layer in observer.feature_layers]
        self._tap = FeatureTap(self._module, layers)

    @override
    @contextmanager
    def around(self, step: "Step") -> Iterator[None]:
        tap = self._tap
        tap.open, step.features, step.passes = True, tap.outputs, tap.passes
        active = [observer for observer in self._observers if observer in step.active]
        tap.learners = {layer: type(observer).__name__ for observer in active for layer in observer.feature_layers}
        if step.feature_view is not None:
            tap.view = step.feature_view
        if step.views is not None:
            tap.own = step.views.own
        try:
            yield
        finally:
            tap.shut()

    @override
    def close(self) -> None:
        self._tap.close()
