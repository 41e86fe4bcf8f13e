"""The law for layers that run twice."""

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_reg.engine.run.phases import phases_of
from tests.conformance.case import Case
from tests.conformance.harness import demand, difference, fit

__all__ = ["recomputation", "touches_layers"]

# Phases in which something is done to layers, or to the weights that they read; a part may do anything.
_ON_LAYERS = {"edit_inputs", "edit_features", "edit_weights", "map_weights", "parts"}


def touches_layers(case: Case) -> bool:
    """Whether the law is about the technique."""
    technique = case.make()
    return bool(getattr(technique, "feature_layers", ()) or _ON_LAYERS.intersection(phases_of(technique)))


def recomputation(case: Case) -> None:
    """Under activation checkpoints, whose layers run twice, a fit is that without them; reentrant ones may be refused.

    What a technique counts and draws in the forward pass counts once.
    """
    plain = fit([case.make()], case.problem, limit_val_batches=0)
    for kind in ("saved", "reentrant"):
        try:
            run = fit([case.make()], case.problem, limit_val_batches=0, checkpoint=kind)
        except MisconfigurationException as error:
            demand(kind == "reentrant", f"checkpoints with `use_reentrant=False` are refused: {error}")
            told = case.cls.__name__ in str(error) and "use_reentrant=False" in str(error)
            demand(told, f"reentrant checkpoints are refused, but not by name and with what to write: {error}")
            continue
        for what, one, two in (
            ("the weights", plain.weights, run.weights),
            ("the gradients", plain.gradients, run.gradients),
            ("the technique's state", plain.techniques[0].state_dict(), run.techniques[0].state_dict()),
            ("the log", plain.logged, run.logged),
            ("the global random states", plain.watch.random, run.watch.random),
        ):
            found = difference(one, two)
            assert not found, f"Not the same: {what} without checkpoints and with {kind} ones: {found}"
