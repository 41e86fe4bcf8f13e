"""L2-SP: weights tied to what they were when the fit began, or when the task before ended."""

from typing import TYPE_CHECKING, Any, Literal, final

import torch
from torch import Tensor, nn
from torch.optim import LBFGS
from typing_extensions import override

from lightning_reg.continual._tasks import TaskTechnique
from lightning_reg.continual.weight_anchors._ties import Ties
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_choice, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.names import as_patterns
from lightning_reg.engine.technique import PenaltyTechnique
from lightning_reg.engine.weights.chosen import chosen_weights, saved_tensors

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

    from lightning_reg.engine.step import Step

__all__ = ["L2ToStart"]


@final
class L2ToStart(TaskTechnique, PenaltyTechnique):
    r"""Ties weights to their values at the start of the fit (L2-SP): pre-trained ones, those of the task before.

    .. math:: \lambda \sum_j (\theta_j - \theta^*_j)^2, \qquad \lambda \sum_j F_j (\theta_j - \theta^*_j)^2

    Use it to fine-tune pre-trained networks, once or task after task; the paper's best choice for vision transformers,
    on query, key and value weights. Leave it in class-incremental training from scratch without
    :class:`PredictionDistillation`. Set ``weight_decay`` to 0 on tied weights, it pulls to 0. Statistics of batch norm
    drift all the same. A task is a fit that came to its end, or a number in the datamodule's ``current_task``; keep the
    object from fit to fit.

    Source:
        Smith et al., "A Closer Look at Rehearsal-Free Continual Learning", CVPR Workshops 2023, arXiv 2203.17269.

    Differs:
        ``mode="decoupled"`` and ``importance`` are additions. The paper's values of lambda are not published.

    Memory: the parameters that match once more, frozen ones too; in the optimizer's step two temporary copies of those
    that are trained.

    Args:
        weight: lambda, at least 0. Sensible: 1e-3 to 10. Neutral: 0.
        params: Patterns of parameter names as in ``named_parameters()``, one of which must match (``"*.qkv.weight"``);
            ``None`` for all. Frozen ones are tied from the step on that trains them.
        exclude: Patterns of names to leave free: those of a new head (``"head.*"``), and of one that has outputs for
            classes to come from the start on, which would be tied as well. Parameters that are new since the last task,
            and rows by which one has grown, are free anyway.
        anchor: ``"start_of_fit"`` (paper), of a task that has a number the start of its first fit; or
            ``"end_of_task"``: to the weights when the task before ended, whatever was done to the module since, and in
            the first task to nothing.
        mode: ``"gradient"`` adds :math:`2 \lambda (\theta - \theta^*)` to the gradient (paper); ``"decoupled"`` moves
            weights by :math:`\eta \lambda (\theta^* - \theta)` before each step, with the learning rate :math:`\eta`;
            where that would be beyond the anchor (:math:`\eta \lambda > 1`) to the anchor, with a warning.
        importance: File with how much each weight matters, F: tensors by the parameters' names, written by
            ``torch.save`` (:func:`generator_fisher` gives them). Parameters that are not in it are free. ``None``: all
            count alike. With the start of a fit and ``"gradient"`` alone.
        name: Tells several instances in one Trainer apart.

    Raises:
        ValueError: If an argument is outside its range, or does not go with ``importance``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> tie = L2ToStart(weight=0.1, exclude=["head.*"])
        >>> trainer = Trainer(max_epochs=20, callbacks=[tie], logger=False, enable_checkpointing=False)

    """

    def __init__(
        self,
        weight: float = 0.1,
        params: list[str] | str | None = None,
        exclude: list[str] | str | None = None,
        anchor: Literal["start_of_fit", "end_of_task"] = "start_of_fit",
        mode: Literal["gradient", "decoupled"] = "gradient",
        importance: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        check_number(self, "weight", weight, low=0)
        check_choice(self, "anchor", anchor, ("start_of_fit", "end_of_task"))
        check_choice(self, "mode", mode, ("gradient", "decoupled"))
        self.weight, self.params, self.exclude = weight, params, exclude
        if importance is not None and (anchor, mode) != ("start_of_fit", "gradient"):
            raise ValueError(
                "L2ToStart: `importance` must be None unless anchor='start_of_fit' and mode='gradient', got"
                f" {importance!r}."
            )
        self.anchor, self.mode, self.importance = anchor, mode, importance
        self._ties = Ties()
        self._has_said = False

    @property
    @override
    def is_neutral(self) -> bool:
        return self.weight == 0

    @property
    @override
    def acts(self) -> bool:
        return bool(self._ties)

    @property
    @override
    def remembers_channels(self) -> bool:
        """Whether it ties to an earlier task, or may go on with one."""
        of_earlier_fit = self._tasks.has_numbers if self.anchor == "start_of_fit" else self.tasks > 0
        return of_earlier_fit and not self.is_neutral

    @override
    def describe(self) -> str:
        if self.is_neutral:
            return "weight=0: inactive"
        to = f"to the {self.anchor.replace('_', ' ')}"
        if self.anchor == "end_of_task" and not self.tasks:
            to = "nothing to tie to in the first task"
        free = ", ".join(as_patterns(self.exclude)) or "nothing, not classes to come"
        mode = self.mode + (f", importance of {self.importance}" if self.importance else "")
        return f"weight={self.weight:g}, {mode}; {to}; {self._tasks.so_far}; free: {free}"

    @override
    def begin(self, step: "Step") -> None:
        # Asked in the first task too, so that a pattern without a match is not found out at its end.
        chosen = self._chosen(step.module)
        if self.anchor == "start_of_fit" and not self._tasks.goes_on:
            rows: dict[str, int] | None = self._tasks.kept.get("rows")
            named = {name: p.detach() for name, p in chosen.items() if rows is None or name in rows}
            anchors = {n: (p[: rows[n]] if rows and p.dim() else p).clone() for n, p in named.items()}
            weights = self._weights_of(anchors) if self.importance else {}
            anchors = {name: anchors[name] for name in weights} if self.importance else anchors
            self._tasks.kept = {"slots": [{"anchors": anchors, "weights": weights}], "rows": rows}
        if self.mode == "decoupled" and any(isinstance(o, LBFGS) for o in step.trainer.optimizers):
            raise MisconfigurationException(
                "L2ToStart(mode='decoupled') pulls once in each step of the optimizer, and LBFGS evaluates the loss"
                " several times in one. Write `mode='gradient'`, or choose another optimizer."
            )
        self._ties.tie(self, step.module, self._tasks.kept.get("slots", ()))

    def _weights_of(self, anchors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the file says of the anchored parameters, of those rows that have an anchor."""
        where = f"L2ToStart(importance={self.importance!r})"
        found = saved_tensors(self, "importance", str(self.importance))
        weights = {
            name: found[name][: len(a)] if a.dim() else found[name] for name, a in anchors.items() if name in found
        }
        if not weights:
            raise MisconfigurationException(
                f"{where}: the file has none of the parameters that are tied. It has"
                f" {', '.join(map(repr, list(found)[:3]))}, and the module {', '.join(map(repr, list(anchors)[:3]))}."
            )
        for name, weight in weights.items():
            if weight.shape != anchors[name].shape or not bool((weight.isfinite() & (weight >= 0)).all()):
                raise MisconfigurationException(
                    f"{where}: {name!r} must be finite numbers of at least 0 in shape {tuple(anchors[name].shape)}, got"
                    f" shape {tuple(weight.shape)}, from {float(weight.min()):g} to {float(weight.max()):g}."
                )
        return {name: weight.to(anchors[name].device, torch.float32) for name, weight in weights.items()}

    @override
    def penalty(self, module: "LightningModule") -> Tensor | None:
        value = self._ties.penalty() if self.mode == "gradient" else None
        return None if value is None else self.weight * value

    @override
    def on_before_optimizer_step(
        self, trainer: "Trainer", pl_module: "LightningModule", optimizer: "Optimizer"
    ) -> None:
        if self.mode == "decoupled":
            for group in optimizer.param_groups:
                rate = float(group["lr"])
                share = rate * self.weight
                if share > 1:
                    self._say_it_overshoots(rate, share)
                self._ties.pull_(group["params"], min(share, 1.0))

    def _say_it_overshoots(self, rate: float, share: float) -> None:
        if not self._has_said:
            self._has_said = True
            host.rank_zero_warn(
                f"L2ToStart(weight={self.weight:g}, mode='decoupled'): at the learning rate {rate:g} each step would"
                f" pull weights {share:g} times the way to their anchors, so they are put on them. Write a `weight`"
                " below 1 / learning rate."
            )

    @override
    def keep(self, trainer: "Trainer", module: "LightningModule") -> dict[str, Any]:
        chosen = self._chosen(module)
        if self.anchor == "start_of_fit":
            return {"rows": {name: len(p) if p.dim() else 1 for name, p in chosen.items()}}
        return {"slots": [{"anchors": {name: p.detach().clone() for name, p in chosen.items()}, "weights": {}}]}

    @override
    def forget(self) -> None:
        self._ties.clear()

    def _chosen(self, module: nn.Module) -> dict[str, nn.Parameter]:
        # Frozen ones too: they may be trained later.
        return chosen_weights(self, module, self.params, self.exclude, frozen=True)
