"""The first step of a fit as a technique will have it that does nothing in it: after a warm-up, in another batch."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from lightning_reg.engine.host.errors import MisconfigurationException, in_the_name_of
from lightning_reg.engine.loss.call_mixed import check_mixed
from lightning_reg.engine.loss.choice import Selection
from lightning_reg.engine.run.phases import Member, OnBatch, OnLoss, taking_part

if TYPE_CHECKING:
    from lightning_reg.engine.data.mixing import Mixing
    from lightning_reg.engine.loss.call import LossCall
    from lightning_reg.engine.step import Step

__all__ = ["Rehearsal", "rehearsals"]


class Rehearsal:
    """Which loss calls a technique would take, and whether it could work on them.

    Args:
        technique: The technique.
        step: The step.
        mixing: How it would mix the batch, if the loss is to follow that.

    """

    def __init__(self, technique: Member, step: "Step", mixing: "Mixing | None") -> None:
        self.technique, self._step, self._mixing = technique, step, mixing
        self._selection: Selection[Member] = Selection([technique], technique if mixing is not None else None)

    def takes(self, call: "LossCall", description: str) -> bool:
        """Notes a call of the user's code; whether it is one for the technique.

        Args:
            call: The call.
            description: The call for an error message.

        Returns:
            Whether the technique would work on it; of ``loss="last"`` that is known at the end.

        Raises:
            MisconfigurationException: If the technique could not.

        """
        taken = bool(self._selection.take(call.name, call.site, description))
        if self._mixing is not None:
            concerned = self._mixing.concerns(call.given_target, self._step.batch, self._step.given_batch)
            self._selection.recognized += concerned is not None
            taken = bool(concerned) or (concerned is None and taken)
            if taken:
                check_mixed(call, self._mixing, certain=concerned is not None)
        elif taken and isinstance(self.technique, OnLoss):
            _check_call(self.technique, call)
        return taken

    @property
    def takes_last(self) -> bool:
        """Whether it is the last call that the technique works on."""
        return bool(self._selection.late)

    def check(self) -> None:
        """Refuses what the technique would refuse when it is active, as :meth:`Selection.check` does."""
        self._selection.check()


def rehearsals(step: "Step", techniques: Sequence[Member], on_loss: Collection[Member]) -> list[Rehearsal]:
    """The techniques that do nothing to the losses of this step, and will to those of later ones.

    Args:
        step: A fit's first step.
        techniques: All of them.
        on_loss: Those that take part in a phase on the loss.

    Returns:
        Those that wait, and those that leave this batch as it is and mix others.

    """
    mixed_by = None if step.mixing is None else step.mixing.by
    idle = [t for t in techniques if t is not mixed_by and (t in step.active or t.waits(step))]
    mixings = {t: t.rehearse(step) for t in taking_part(idle, OnBatch, "transform_batch")}
    followed: dict[Member, Mixing] = {t: m for t, m in mixings.items() if m is not None and not m.in_targets}
    waiting = [t for t in idle if t in followed or (t in on_loss and (t not in step.active or t in step.resting))]
    return [Rehearsal(technique, step, followed.get(technique)) for technique in waiting]


def _check_call(technique: OnLoss, call: "LossCall") -> None:
    try:
        technique.check_call(call)
    except MisconfigurationException as error:
        raise in_the_name_of(technique, error) from error
