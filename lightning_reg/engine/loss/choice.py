"""Which loss call of a step each technique works on; an error that lists the calls wherever that is not certain."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.owner import Owner
from lightning_reg.engine.host.user_functions import place_of_code

__all__ = ["Selection", "constant_loss", "loss_in_checkpoint", "no_loss_seen"]

_MIXIN_EXAMPLE = """
    class MyModel(LossMixin, {base}):    # from lightning_reg import LossMixin
        def training_step(self, batch, batch_idx):{lines}
            return self.reduce_loss(per_sample_loss, logits=logits, targets=targets)    # instead of .mean()
"""
_LIBRARY_LINES = """
            ...    # as there; the library's own file stays as it is"""


Chooser = TypeVar("Chooser", bound=Owner)


@dataclass
class Selection(Generic[Chooser]):
    """The loss calls seen so far in one step, and who took which.

    Args:
        techniques: Active techniques that work on the loss.
        mixer: One of them whose mixing of the batch every loss on the batch's labels has to follow.
        seen: Descriptions of the calls, in order.
        recognized: How many of them certainly compare with labels of the mixed batch, or certainly do not.

    Attributes:
        late: Techniques that work on the last call.

    """

    techniques: Sequence[Chooser]
    mixer: Owner | None = None
    seen: list[str] = field(default_factory=list)
    recognized: int = 0

    def __post_init__(self) -> None:
        self._taken = dict.fromkeys(self.techniques, 0)
        self.late: list[Chooser] = []
        self._by_place = False
        for technique in self.techniques:
            if technique.loss == "last":
                self.late.append(technique)
            else:
                self._by_place |= isinstance(technique.loss, str)

    def needs_site(self) -> bool:
        """Whether the place of the call in the code matters: to choose, or because a second call needs explaining."""
        return bool(self.seen) or self._by_place

    def take(self, function: str, site: str, description: str) -> list[Chooser]:
        """Notes a call and says who works on it now; ``loss="last"`` is left for the end of the step.

        Args:
            function: Name of the loss function.
            site: ``file.py:line``.
            description: The call for an error message.

        Returns:
            Techniques, in order.

        """
        position = len(self.seen)
        self.seen.append(description)
        takers = [t for t in self.techniques if _chooses(t.loss, position, function, site)]
        for technique in takers:
            self._taken[technique] += 1
        return takers

    def check(self) -> None:
        """Raises unless every technique has had just one call.

        Raises:
            MisconfigurationException: If several calls were seen and a technique has not chosen, or its choice matched
                none or several.

        """
        for technique, taken in self._taken.items():
            if taken == 1 and len(self.seen) == 1:
                continue
            name, calls = type(technique).__name__, self._calls()
            if technique is self.mixer and technique.loss is None and self.recognized == len(self.seen):
                continue
            if technique.loss is None and len(self.seen) > 1:
                raise MisconfigurationException(
                    f"{name}: the training step calls {len(self.seen)} losses and it is not said which one the"
                    f' technique is for.{calls}\nChoose with `{name}(loss=...)`: a position as listed, "last", the'
                    ' name of the function, or its place in the code ("model.py:42").'
                )
            if technique.loss not in (None, "last") and taken != 1:
                raise MisconfigurationException(
                    f"{name}(loss={technique.loss!r}) matches {taken} of the {len(self.seen)} loss calls in this"
                    f" step; it must match one.{calls}"
                )

    def _calls(self) -> str:
        return "".join(f"\n  loss={position}: {description}" for position, description in enumerate(self.seen))

    def too_late(self, late: Owner, before: Owner) -> MisconfigurationException:
        """The error for ``loss="last"`` where others have worked with the targets that it changes."""
        names = type(late).__name__, type(before).__name__
        return MisconfigurationException(
            f'{names[0]}(loss="last") changes logits or targets of a loss call that {names[1]} has worked on before it'
            ' was known to be the last one. Give both `loss="last"`, or neither.'
        )

    def not_mixed(self) -> MisconfigurationException:
        """The error for a step whose batch was mixed and whose loss was made without a call that could be seen."""
        return MisconfigurationException(
            f"{type(self.mixer).__name__}: the samples of this batch are mixed, but its loss was made without a call"
            " that could be seen, unlike those of steps before it, so it would be trained on labels that are not mixed."
            " If part of the model was compiled since, compile it before `fit`."
        )

    def nothing_seen(self, *, by_mixin: bool, place: str = "", library: str = "") -> MisconfigurationException:
        """The error for a step that made a loss without a call that could be seen.

        Args:
            by_mixin: Whether the module hands its losses over.
            place: Where its ``training_step`` is written, as ``file.py:line``, or "".
            library: Name of the module's class if a library wrote it, so that it cannot be edited, or "".

        Returns:
            The error.

        """
        names = ", ".join(type(t).__name__ for t in self.techniques)
        if by_mixin:
            return MisconfigurationException(
                f"{names}: the module inherits LossMixin but `training_step` did not call `self.reduce_loss`, so there"
                " is nothing to attach to. Call it, or drop the mixin to have torch's loss functions watched."
            )
        at = f" at {place}" if place else ""
        example = _MIXIN_EXAMPLE.format(base=library or "LightningModule", lines=_LIBRARY_LINES if library else "")
        return MisconfigurationException(
            f"{names}: `training_step`{at} returned a loss, but none of torch's loss functions (torch.nn.functional and"
            " the modules of torch.nn) was called with a gradient, so there is nothing to attach to. If the loss is"
            f" written by hand or fused into a kernel, hand over its value per sample:\n{example}"
        )


def no_loss_seen(techniques: Sequence[Owner], module: Any, *, by_mixin: bool) -> MisconfigurationException:
    """The error for techniques in a step that made a loss without a call that could be seen.

    Args:
        techniques: Those that need one.
        module: The user's module.
        by_mixin: Whether it hands its losses over.

    Returns:
        :meth:`Selection.nothing_seen` with the place of the module's ``training_step``.

    """
    place, installed = place_of_code(module.training_step)
    library = type(module).__name__ if installed else ""
    return Selection(techniques).nothing_seen(by_mixin=by_mixin, place=place, library=library)


def constant_loss(techniques: Sequence[Owner], module: Any) -> MisconfigurationException:
    """The error for a step whose loss has no gradient.

    Args:
        techniques: Those that work on it.
        module: The user's module.

    Returns:
        The error.

    """
    names, (place, _) = ", ".join(type(t).__name__ for t in techniques), place_of_code(module.training_step)
    return MisconfigurationException(
        f"{names}: the loss that `training_step`{f' at {place}' if place else ''} returned has no gradient, so it would"
        " train nothing: what it is made of ran under `torch.no_grad` or `torch.inference_mode`, as `encode` of"
        ' sentence-transformers does. Call the model itself, as in `model(features)["sentence_embedding"]`.'
    )


def loss_in_checkpoint(techniques: Sequence[Owner], function: str, site: str) -> MisconfigurationException:
    """The error for a loss that is called in what the backward pass runs once more, where nobody watches.

    Args:
        techniques: Those that work on it.
        function: Name of the loss function.
        site: Where it is called, as ``file.py:line``, or "".

    Returns:
        The error.

    """
    names, at = ", ".join(type(t).__name__ for t in techniques), f" at {site}" if site else ""
    return MisconfigurationException(
        f"{names}: `{function}`{at} is called in a function that `torch.utils.checkpoint` runs again in the backward"
        " pass, where the loss would be the plain one. Let the checkpoint return what the loss is made of, and call the"
        " loss after it."
    )


def _chooses(loss: int | str | None, position: int, function: str, site: str) -> bool:
    if loss is None:
        return position == 0
    if isinstance(loss, int):
        return loss == position
    return loss != "last" and loss in (function, site)
