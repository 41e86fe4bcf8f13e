"""Weights kept away from weights that are known to be bad."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import LBFGS
from typing_extensions import override

from lightning_reg.engine.host.arguments import check_bool, check_choice, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.names import as_patterns
from lightning_reg.engine.technique import PenaltyTechnique
from lightning_reg.engine.weights.chosen import chosen_weights
from lightning_reg.engine.weights.strategies import check_whole
from lightning_reg.unlearning.adapt_then_unlearn._adapted import adapted_weights, check_same_weights
from lightning_reg.unlearning.adapt_then_unlearn.core import joint_reference, repulsion, weight_distance

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

    from lightning_reg.engine.step import Step

__all__ = ["WeightRepulsion"]


class WeightRepulsion(PenaltyTechnique):
    r"""Keeps weights away from others: those of a generator that was adapted to what is to be unlearned.

    .. math:: \lambda\, e^{-\alpha d}, \qquad -\lambda\, \alpha d, \qquad \frac{\lambda}{\alpha d}, \qquad
        d = \frac1K \sum_{k=1}^K \|\theta - \theta_k\|^2

    First a copy of the generator is fine-tuned on a few samples that show what is unwanted
    (:func:`generator_fisher` says which weights are to stay). Its weights minus the original ones point to more of it.
    Then the original generator is trained on wanted samples with this term, which leads the other way, while the
    adversarial loss keeps the quality. :func:`split_pool` sorts generated samples, so no training data are needed.

    It joins the generator's step alone, under manual optimization too: choose its weights by ``params``. Use it for any
    network that is to keep away from known weights. The adapted weights must come from a fine-tuning of these: between
    unrelated runs the distance means nothing. Compare like with like, moving averages with a generator that starts from
    its own. Leave it where there are wanted data and time enough: training on these alone may do most of the work. It
    gives no guarantee of privacy. Statistics of batch norm are not repelled.

    On digits of 8 x 8 pixels (three seeds) the share of sevens fell from 7.7 % to 0.7 % with EL2, to 2.7 % on wanted
    samples alone: no effect is shown between these. Extrapolation as far led to 0.2 %, at twice the Fréchet distance.

    Source:
        Tiwary et al., "Adapt then Unlearn: Exploring Parameter Space Semantics for Unlearning in Generative Adversarial
        Networks", TMLR 2025, arXiv 2309.14054.

    Differs:
        All three terms are of the scaled distance, by default relative to that at the start; ``alpha=1`` gives the
        paper's NL2 and IL2. Several sets are averaged; the released code has :math:`K^2 / 2` times their mean distance,
        by ``distance="mean_per_tensor"``. ``max_ratio`` is an addition.

    Memory: the chosen weights once more, however many sets there are (a mean of squared distances is the distance from
    the mean, and a constant); in the optimizer's step two temporary copies.

    Args:
        away_from: Files with the adapted weights, checkpoints of Lightning or a ``state_dict`` by ``torch.save`` with
            the module's names; several are averaged, paper: 5. ``None``: the weights that the fit begins with.
        kind: ``"el2"``, which fades as it succeeds; ``"nl2"``, which grows without bound: give ``max_ratio``;
            ``"il2"``, the steepest near the adapted weights.
        weight: lambda, at least 0. Sensible: so large that the first gradient of the term is 5 to 50 % of that of the
            other loss. Released code: 100 for EL2; 1.2 for NL2 and 10 for IL2, with ``alpha=1``. Neutral: 0.
        alpha: Scale of the distance, above 0; ``None``: 1 over that at the start, or, where this is 0 since
            ``away_from`` is ``None``, over the squared norm of the weights. Released code: 0.8 to 1.2 for EL2.
        params: Patterns of parameter names as in ``named_parameters()``, each of which must match
            (``"generator.*"``); ``None`` for all, if there is one optimizer.
        exclude: Patterns of names to leave free.
        distance: ``"l2"``: the sum over all weights (paper); ``"mean_per_tensor"``: the mean of each tensor's squares,
            averaged over the tensors (released code).
        max_ratio: How many times the distance at the start (or the squared norm, as for ``alpha``) is enough: beyond it
            nothing is repelled any more. ``None``: no bound.
        optimizer: Position of the optimizer in whose steps it counts, if weights are in several; ``None`` for all.
        first_step_only: Whether of several steps of an optimizer within one batch only the first counts, as in the
            paper, whose generator steps once more for the lengths of its paths.
        name: Tells several instances in one Trainer apart.

    Raises:
        ValueError: If an argument is outside its range, and for IL2 away from the weights that the fit begins with.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> away = WeightRepulsion(["adapted.ckpt"], weight=20.0, params="generator.*")
        >>> trainer = Trainer(max_steps=3000, callbacks=[away], logger=False, enable_checkpointing=False)

    """

    def __init__(
        self,
        away_from: list[str] | str | None = None,
        kind: Literal["el2", "nl2", "il2"] = "el2",
        weight: float = 1.0,
        alpha: float | None = None,
        params: list[str] | str | None = None,
        exclude: list[str] | str | None = None,
        distance: Literal["l2", "mean_per_tensor"] = "l2",
        max_ratio: float | None = None,
        optimizer: int | None = None,
        first_step_only: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        check_choice(self, "kind", kind, ("el2", "nl2", "il2"))
        check_choice(self, "distance", distance, ("l2", "mean_per_tensor"))
        check_number(self, "weight", weight, low=0)
        for argument, value in (("alpha", alpha), ("max_ratio", max_ratio)):
            check_number(self, argument, value, low=0, low_open=True, optional=True)
        check_number(self, "optimizer", optimizer, low=0, integer=True, optional=True)
        check_bool(self, "first_step_only", first_step_only)
        if away_from is not None and not as_patterns(away_from):
            raise ValueError("WeightRepulsion: `away_from` must be a file, several or None, got [].")
        if away_from is None and kind == "il2":
            raise ValueError(
                "WeightRepulsion: `kind` must be 'el2' or 'nl2' with away_from=None, got 'il2', which is infinite at"
                " the weights that the fit begins with."
            )
        self.away_from, self.kind, self.weight, self.alpha = away_from, kind, weight, alpha
        self.params, self.exclude, self.distance, self.max_ratio = params, exclude, distance, max_ratio
        self.optimizer, self.first_step_only = optimizer, first_step_only
        self._kept: dict[str, Any] = {}
        self._is_resumed = False
        self._now: Sequence[nn.Parameter] = ()  # the chosen weights, once the fit has begun
        self._stepped: set[int] = set()

    @property
    @override
    def remembers_channels(self) -> bool:
        """Whether the adapted weights are those of a file."""
        return self.away_from is not None and self.weight > 0

    @override
    def describe(self) -> str:
        if self.weight == 0:
            return "weight=0: inactive"
        files = len(as_patterns(self.away_from))
        source = f"{files} set{'s' * (files > 1)} of weights" if files else "the weights at the start"
        alpha = "" if self.alpha is None else f", alpha={self.alpha:g}"
        bound = "" if self.max_ratio is None else f", up to {self.max_ratio:g} times the distance"
        return f"{self.kind}, weight={self.weight:g}{alpha}; away from {source}{bound}"

    @override
    def check(self, trainer: "Trainer", module: "LightningModule") -> None:
        check_whole(self, trainer, "compares")

    @override
    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._now = ()

    @override
    def is_active(self, step: "Step") -> bool:
        if self.weight == 0:
            return False
        if not self._now:
            # Not in `on_train_start`: other callbacks may put other weights into the module there.
            self._begin(step.module, step.trainer.optimizers)
        self._stepped.clear()
        if step.is_logging:
            with torch.no_grad():
                step.log(self, "distance", self._distance(self._now) / self._kept["unit"])
        return True

    def _begin(self, module: "LightningModule", optimizers: "Sequence[Optimizer]") -> None:
        if len(optimizers) > 1 and self.params is None:
            raise MisconfigurationException(
                f"WeightRepulsion: there are {len(optimizers)} optimizers, and the weights of all would be repelled."
                ' Write in `params` which ones are meant: "generator.*", or "*" for all.'
            )
        if self.first_step_only and any(isinstance(optimizer, LBFGS) for optimizer in optimizers):
            raise MisconfigurationException(
                "WeightRepulsion(first_step_only=True): LBFGS evaluates the loss several times in a step, and only"
                " the first would have the term. Write `first_step_only=False`."
            )
        chosen = chosen_weights(self, module, self.params, self.exclude, frozen=True)
        if not self._is_resumed:
            self._kept = self._references(chosen)
        anchors: dict[str, Tensor] = self._kept["anchors"]
        check_same_weights(self, anchors, chosen)
        self._now = list(chosen.values())
        self._kept["anchors"] = {name: anchors[name].to(p.device) for name, p in chosen.items()}
        if not self._is_resumed:
            self._kept["unit"] = self._unit()
        self._is_resumed = False

    def _references(self, chosen: dict[str, nn.Parameter]) -> dict[str, Any]:
        files = as_patterns(self.away_from)
        sets = [adapted_weights(self, file, chosen) for file in files]
        sets = sets or [[p.detach().clone() for p in chosen.values()]]
        means, spread = joint_reference(sets, self._is_per_tensor)
        return {"anchors": dict(zip(chosen, means, strict=True)), "spread": float(spread)}

    def _unit(self) -> float:
        """The distance at the start; where it is zero the squared norm of the weights."""
        with torch.no_grad():
            unit = float(self._distance(self._now))
            if self.away_from is None:
                zeros = [torch.zeros((), device=p.device).expand_as(p) for p in self._now]
                unit = float(weight_distance(self._now, zeros, self._is_per_tensor)) or 1.0
        if unit == 0:
            raise MisconfigurationException(
                f"WeightRepulsion(away_from={self.away_from!r}): the fit begins with the adapted weights themselves,"
                " which gives no direction to leave them in. Begin it with those from which they were adapted."
            )
        if not unit < math.inf:
            raise MisconfigurationException(
                "WeightRepulsion: the adapted weights, or those that the fit begins with, are not finite. Write a"
                " checkpoint of an earlier step in `away_from`."
            )
        return unit

    @property
    def _is_per_tensor(self) -> bool:
        return self.distance == "mean_per_tensor"

    def _distance(self, params: Sequence[Tensor]) -> Tensor:
        distance = weight_distance(params, list(self._kept["anchors"].values()), self._is_per_tensor)
        return distance + float(self._kept["spread"])

    @override
    def penalty(self, module: "LightningModule") -> Tensor | None:
        if not self._now:
            return None
        distance = self._distance([p.detach() if id(p) in self._stepped else p for p in self._now])
        unit = self._kept["unit"]
        if self.max_ratio is not None:
            distance = distance.clamp(max=self.max_ratio * unit)
        return self.weight * repulsion(distance, self.kind, 1.0 / unit if self.alpha is None else self.alpha)

    @override
    def on_before_optimizer_step(
        self, trainer: "Trainer", pl_module: "LightningModule", optimizer: "Optimizer"
    ) -> None:
        if self.first_step_only and self.optimizer in (None, *_positions(optimizer, trainer.optimizers)):
            self._stepped |= {id(p) for group in optimizer.param_groups for p in group["params"]}

    @override
    def teardown(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        self._leave()

    @override
    def on_exception(self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException) -> None:
        self._leave()

    def _leave(self) -> None:
        self._now, self._is_resumed = (), False
        self._stepped.clear()

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_now": (), "_stepped": set()}  # they are the module's

    @override
    def state_dict(self) -> dict[str, Any]:
        return dict(self._kept)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # It may come in the middle of a fit: Lightning's learning-rate finder puts the old one back.
        self._kept = {name: state_dict[name] for name in ("anchors", "spread", "unit")}
        self._now, self._is_resumed = (), True


def _positions(optimizer: "Optimizer", optimizers: "Sequence[Optimizer]") -> list[int]:
    return [position for position, one in enumerate(optimizers) if one is optimizer]
