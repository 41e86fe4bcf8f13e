"""WiSEFT: the weights end between those before and those after fine-tuning."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.averaging.weight_merging.core import wise_ft, wise_ft_curve
from lightning_reg.engine.host.arguments import check_number
from lightning_reg.engine.networks.named_weights import load_weights_, weights_of
from lightning_reg.engine.networks.references import Reference
from lightning_reg.engine.run.phases import Member, has_prompts, phases_of
from lightning_reg.engine.technique import BatchTechnique
from lightning_reg.engine.weights.strategies import check_whole

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.step import Step

__all__ = ["WiSEFT"]


class WiSEFT(BatchTechnique):
    r"""Ends a fine-tuning between the weights that it began with and those that it reached.

    .. math:: \theta = (1 - \alpha)\, \theta_0 + \alpha\, \theta_1

    The first weights are those of the first batch, after every load, and stay so from fit to fit and when a run is
    resumed. When the fit ends the module holds the mix; :meth:`curve` tries other alphas on it, without training again.
    A run that is resumed from a checkpoint of the end goes on with the weights that were reached.

    Use it as the first thing to try where fine-tuning has made a pretrained model worse on what it was not tuned on.
    Leave it where training began from nothing: the two ends are then in no common valley. Statistics of batch norm are
    mixed too and may fit neither end; networks with batch norm are reported to fail (mlfoundations/wise-ft #10).
    A small CLIP tuned on five digits was 14 points better on the other five at alpha 0.5 than at 1, and no worse on the
    five (``benchmarks/effects/weight_merging.py``).

    Source:
        Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022, arXiv 2109.01903, equation 1; code:
        mlfoundations/wise-ft, ``src/wise_ft.py``.

    Differs:
        Nothing: all weights are mixed, the head's too.

    Logged: ``distance``, the Euclidean distance from the first weights.

    Memory: the first weights once, in host memory and in each checkpoint; at the end the fine-tuned ones once more.

    Args:
        alpha: 0 is the first weights, 1 those that were reached. Paper: 0.5. Neutral: 1.
        exclude: Patterns of weights that are not mixed (``["*.running_*"]``), or one pattern: they stay as the nearer
            end has them. ``None``: all are.
        name: Tells several instances in one Trainer apart.

    Raises:
        ValueError: If ``alpha`` is outside [0, 1].

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(max_epochs=10, callbacks=[WiSEFT(0.5)], logger=False, enable_checkpointing=False)

    """

    def __init__(self, alpha: float = 0.5, exclude: list[str] | str | None = None, name: str | None = None) -> None:
        super().__init__(name=name)
        check_number(self, "alpha", alpha, low=0, high=1)
        self.alpha, self.exclude = alpha, exclude
        self._first = Reference(place="cpu")
        self._reached: dict[str, Tensor] = {}
        self._resumed = False

    @override
    def describe(self) -> str:
        return f"ends at alpha={self.alpha:g} between first and fine-tuned weights; {self._first.describe()}"

    @override
    def check(self, trainer: "Trainer", module: "LightningModule") -> None:
        super().check(trainer, module)
        check_whole(self, trainer, "mixes")

    @override
    def conflict_with(self, other: Member) -> str | None:
        if self.alpha < 1 and getattr(other, "load_at_end", False):
            return (
                f"{type(other).__name__} puts its average into the module when the fit ends, and this one its mix. Give"
                f" {type(other).__name__} `load_at_end=False`, or WiSEFT `alpha=1` and ask for `mixed`."
            )
        if self.alpha < 1 and has_prompts(other):
            return (
                f"what {type(other).__name__} trains beside the module is not among the weights that are mixed, and"
                " would stay as it was reached. Remove one of them."
            )
        if self.alpha < 1 and "edit_weights" in phases_of(other):
            return (
                f"the first weights are not as {type(other).__name__} makes weights, and a mix with them would not be"
                " either. Remove one of them, or give WiSEFT `alpha=1`."
            )
        if isinstance(other, WiSEFT) and self.alpha < 1 and other.alpha < 1:
            return "each puts its mix into the module when the fit ends. Keep one; `curve` tries other alphas."
        return None

    @override
    def is_active(self, step: "Step") -> bool:
        return self._first.weights is None or step.is_logging

    @override
    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        if self._resumed and self._reached:  # the checkpoint's weights are a mix; training goes on without it
            load_weights_(pl_module, self._reached, self)
        self._resumed, self._reached = False, {}

    @override
    def observe_batch(self, step: "Step") -> None:
        now = weights_of(step.module)
        if self._first.weights is None:
            self._first.weights = self._first.stored(now)
        if step.is_logging:
            step.log(self, "distance", self._distance(now))

    def _distance(self, now: Mapping[str, Tensor]) -> Tensor:
        first = self._first.weights or {}
        pairs = [(first[name], value.cpu()) for name, value in now.items() if value.is_floating_point()]
        alike = [one.float() - two.float() for one, two in pairs if one.shape == two.shape]
        return torch.stack([difference.square().sum() for difference in alike]).sum().sqrt()

    @override
    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        if self._first.weights is None:
            return  # there was no batch
        self._reached = self._first.stored(weights_of(pl_module))
        if self.alpha < 1:
            load_weights_(pl_module, self.mixed(self.alpha), self)

    def mixed(self, alpha: float) -> dict[str, Tensor]:
        """The weights between the ends.

        Args:
            alpha: In [0, 1].

        Returns:
            By the names of the module, on the CPU.

        Raises:
            RuntimeError: If no fit has ended yet.
            ValueError: If ``alpha`` is outside its range, or a weight has grown during the fit.

        """
        if self._first.weights is None or not self._reached:
            raise RuntimeError("WiSEFT: there are no two ends to mix before a fit has ended.")
        return wise_ft(self._first.weights, self._reached, alpha, exclude=self.exclude)

    def curve(
        self,
        module: "LightningModule",
        evaluate: Callable[[], Mapping[str, float]],
        alphas: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    ) -> dict[str, list[float]]:
        """What the module scores with each mix; it holds its own weights again afterwards.

        Args:
            module: The module that was trained.
            evaluate: Gives the scores of the module as it is, by name, such as
                ``lambda: trainer.validate(module, loader)[0]``.
            alphas: The mixes, in [0, 1]; at least one.

        Returns:
            ``"alpha"`` and each score, a value for each mix; ``lightning_reg.plots.interpolation`` draws it.

        Raises:
            RuntimeError: If no fit has ended yet.
            ValueError: If an alpha is outside its range, or the scores have other names than before.

        """
        self.mixed(1.0)
        ends, own = (self._first.weights or {}, self._reached), self._first.stored(weights_of(module))

        def score(weights: dict[str, Any]) -> Mapping[str, float]:
            load_weights_(module, weights, self)
            return evaluate()

        try:
            return wise_ft_curve(*ends, score, alphas, exclude=self.exclude)
        finally:
            load_weights_(module, own, self)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"first": self._first.state_dict(), "reached": dict(self._reached)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._first.load_state_dict(state_dict["first"])
        self._reached, self._resumed = dict(state_dict["reached"]), True
