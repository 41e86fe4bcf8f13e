"""What the engine is made of: parts, each of which does one thing around the steps of a fit."""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lightning_reg.engine.step import Step

__all__ = ["Part", "overriding"]


class Part:
    """One thing that the engine does in a fit; a technique may bring its own (:meth:`Technique.parts`).

    The engine calls what a part overrides, and nothing else. Contexts are entered in the order of the parts, those of
    techniques between the edits of layers and the observed layers, and left in reverse. What follows the forward pass
    goes in reverse too (``before_optimizer``, ``gradients_are_final``, ``before_closure``, ``rest``, ``close``).
    """

    prepares_first: ClassVar[bool] = False  # before the other parts, which then find the module as it has left it

    def prepare_model(self) -> None:
        """The module is about to be wrapped for several processes, and its optimizers to be made."""

    def prepare(self) -> None:
        """The module is configured: finds layers and parameters, puts hooks on them."""

    def start(self) -> None:
        """The loaders and optimizers of the fit are there."""

    def begin_step(self) -> None:
        """A training step begins, whether a technique is active in it or not."""

    def begin_epoch(self) -> None:
        """An epoch is about to begin: before the hooks of callbacks, and before its first batch is fetched."""

    def around(self, step: "Step") -> AbstractContextManager[Any]:
        """Stands around the user's ``training_step``.

        It may change what the step gets (``step.batch``), how it is run (``step.network``), what its loss calls become
        (``step.call_changes``) and, on the way out, what it has returned (``step.output``).
        """
        raise NotImplementedError

    def before_network(self) -> None:
        """The user's ``training_step`` is about to run, whether a technique is active or not; the batch is final."""

    def before_optimizer(self, optimizer: Any) -> None:
        """Gradients are there, unscaled and not yet clipped; all other callbacks come after this."""

    def gradients_are_final(self, optimizer: Any) -> None:
        """All other callbacks have changed the gradients; clipping and the optimizer's step follow."""

    def around_optimizer(self, optimizer: Any) -> AbstractContextManager[Any]:
        """Stands around the step of an optimizer, which may evaluate the loss within it."""
        raise NotImplementedError

    def before_closure(self) -> None:
        """An optimizer is about to evaluate the loss, perhaps once more in the same step."""

    def after_closure(self) -> None:
        """An optimizer has evaluated the loss: its gradients are there, accumulated and still scaled."""

    def rest(self) -> None:
        """Between two steps: a batch or a validation is over."""

    def begin_validation(self) -> None:
        """A validation begins; all other callbacks have been told."""

    def close(self) -> None:
        """Takes everything off again; may be called at any time, and twice."""


def overriding(parts: "Sequence[Part]", method: str) -> "list[Callable[..., Any]]":
    """The bound methods of the parts that override it, in the order of the parts."""
    return [getattr(part, method) for part in parts if getattr(type(part), method) is not getattr(Part, method)]
