"""What the techniques that tie weights to anchors have in common, and what those with a teacher have."""

from itertools import compress
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.continual._anchors import anchored_weights, pair_up, parts_like, quadratic_penalty
from lightning_reg.continual._tasks import TaskTechnique
from lightning_reg.engine.host.arguments import check_choice, check_number
from lightning_reg.engine.networks.peer import Peer, Sight, check_runs_on_copy, load_weights_, weights_of
from lightning_reg.engine.technique import BatchTechnique, LossTechnique, PenaltyTechnique

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import nn

    from lightning_reg.engine.loss.call import LossCall
    from lightning_reg.engine.step import Step

__all__ = ["Anchor", "TaughtTechnique", "TyingTechnique"]

Anchor = Literal["start_of_fit", "end_of_task"]


class TyingTechnique(TaskTechnique, PenaltyTechnique):
    """Ties parameters to anchors by a quadratic penalty; ``self._kept["slots"]`` has anchors and their weights.

    Args:
        weight: Weight of the penalty.
        params: Patterns of names.
        exclude: Patterns of names.
        name: See :class:`Technique`.
        loss: See :class:`Technique`.
        seed: See :class:`Technique`.

    """

    ties_frozen: ClassVar[bool] = False  # whether parameters are tied that may be trained later only

    def __init__(
        self,
        weight: float,
        params: list[str] | None,
        exclude: list[str] | None,
        name: str | None,
        loss: int | str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(loss=loss, name=name, seed=seed)
        check_number(self, "weight", weight, low=0)
        self.weight, self.params, self.exclude = weight, params, exclude
        self._tied: list[tuple[list[nn.Parameter], list[Tensor], list[Tensor] | None]] = []

    @property
    @override
    def is_neutral(self) -> bool:
        return self.weight == 0

    @property
    @override
    def acts(self) -> bool:
        return bool(self._tied)

    @override
    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_tied": []}  # the module's parameters; the anchors are kept

    @override
    def forget(self) -> None:
        self._tied = []

    @override
    def begin(self, step: "Step") -> None:
        self._tied = []
        # Asked in the first task too, so that a pattern without a match is not found out at its end.
        self.chosen(step.module)
        for slot in self._kept.get("slots", ()):
            params, anchors = pair_up(self, step.module, slot["anchors"])
            weights = (
                [slot["weights"][name].to(a.device) for name, a in zip(slot["anchors"], anchors, strict=True)]
                if slot["weights"]
                else None
            )
            self._tied.append((params, anchors, weights))

    @override
    def penalty(self, module: "LightningModule") -> Tensor | None:
        values = []
        for params, anchors, weights in self._tied:
            trained = [p.requires_grad for p in params]
            if any(trained):
                near = list(compress(anchors, trained))
                factors = None if weights is None else list(compress(weights, trained))
                values.append(quadratic_penalty(parts_like(list(compress(params, trained)), near), near, factors))
        return self.weight * torch.stack(values).sum() if values else None

    def chosen(self, module: "nn.Module") -> dict[str, "nn.Parameter"]:
        """The parameters to tie, by name."""
        return anchored_weights(self, module, self.params, self.exclude, frozen=self.ties_frozen)


class TaughtTechnique(TaskTechnique, BatchTechnique, LossTechnique):
    """Has a teacher: the module as it was when the task before ended; ``self._kept["teacher"]`` has its weights.

    Args:
        weight: Weight of the term.
        anchor: When the teacher is taken.
        layers: Layers whose outputs the teacher gives.
        loss: See :class:`Technique`.
        name: See :class:`Technique`.

    """

    def __init__(
        self, weight: float, anchor: Anchor, layers: list[str], loss: int | str | None, name: str | None
    ) -> None:
        super().__init__(loss=loss, name=name)
        check_number(self, "weight", weight, low=0)
        check_choice(self, "anchor", anchor, ("start_of_fit", "end_of_task"))
        self.weight, self._anchor, self._layers = weight, anchor, layers
        self._teacher: Peer | None = None

    @override
    def check(self, trainer: "Trainer", module: "LightningModule") -> None:
        super().check(trainer, module)
        check_runs_on_copy(module, self)

    @override
    def begin(self, step: "Step") -> None:
        if self._anchor == "start_of_fit" and not self._resumed:
            self._kept = {"teacher": weights_of(step.module)}
        if "teacher" in self._kept:
            self._teacher = Peer(step.module, layers=self._layers, owner=self)
            load_weights_(self._teacher.module, self._kept["teacher"], self)
            # The same memory, and by the shapes that the module has now.
            self._kept["teacher"] = weights_of(self._teacher.module)

    @override
    def observe_batch(self, step: "Step") -> None:
        if self._teacher is not None:
            step.notes[self] = self._teacher.see(step, None if self._layers else self)

    @override
    def keep(self, trainer: "Trainer", module: "LightningModule") -> dict[str, Any]:
        return {"teacher": {name: value.clone() for name, value in weights_of(module).items()}}

    @override
    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_teacher": None}  # its weights are kept

    @override
    def forget(self) -> None:
        self._teacher = None

    def seen(self, call: "LossCall") -> Sight | None:
        """What the teacher made of the batch; ``None`` without a teacher."""
        return call.step.notes.get(self)
