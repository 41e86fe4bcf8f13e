"""A sound technique in the style of the package, for the laws to pass on."""

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_choice, check_number
from lightning_reg.engine.host.distributed import all_reduce_mean
from lightning_reg.engine.technique import LossTechnique
from tests.conformance.by_hand import Hand

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.loss.call import LossCall
    from lightning_reg.engine.step import Step

__all__ = ["Sound", "SoundByHand", "spread_loss"]


def spread_loss(logits: Tensor, mean: Tensor) -> Tensor:
    """Squared distance of the logits from their moving mean.

    Args:
        logits: ``(B, C)``.
        mean: ``(C,)``, constant.

    Returns:
        ``(B,)``.

    """
    return (logits - mean).square().mean(1)


class Sound(LossTechnique):
    """Keeps logits near their moving mean, more or less so at random.

    Source:
        Nobody, "A toy for tests", ICML 2031, arXiv 3101.00001, eq. 1.

    Differs:
        Nothing.

    Args:
        strength: Weight of the term, at least 0. Neutral: 0.
        decay: Decay of the mean, in [0, 1).
        noise: Whether the weight is drawn anew in each step.
        loss: Which loss call it works on.
        name: Tells instances apart.

    """

    def __init__(
        self,
        strength: float = 0.3,
        decay: float = 0.9,
        noise: Literal["uniform", "none"] = "uniform",
        loss: int | str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(loss=loss, name=name)
        check_number(self, "strength", strength, low=0)
        check_number(self, "decay", decay, low=0, high=1, high_open=True)
        check_choice(self, "noise", noise, ("uniform", "none"))
        self.strength, self.decay, self.noise = strength, decay, noise
        self._mean: Tensor | None = None

    @override
    def describe(self) -> str:
        return f"strength={self.strength:g}, decay={self.decay:g}, noise={self.noise}"

    @override
    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        if host.batches_so_far(trainer) == 0:
            self._mean = None

    @override
    def is_active(self, step: "Step") -> bool:
        return self.strength > 0

    @override
    def loss_term(self, call: "LossCall") -> Tensor | None:
        logits = call.logits.float()
        mean = self._update(logits.detach().mean(0))
        call.step.log(self, "mean", mean.mean())
        return self.strength * self._draw(call.step) * spread_loss(logits, mean)

    def _update(self, mean: Tensor) -> Tensor:
        mean = all_reduce_mean(mean)
        self._mean = mean if self._mean is None else self.decay * self._mean + (1 - self.decay) * mean
        return self._mean

    def _draw(self, step: "Step") -> Tensor:
        if self.noise == "none":
            return torch.ones(())
        return 0.5 + torch.rand((), generator=self.generator(step, same_on_ranks=True))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self._mean is None else {"mean": self._mean.clone()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._mean = state_dict["mean"].clone() if state_dict else None


class SoundByHand(Hand):
    """The same in the plain loop."""

    mean = None

    def term(self, loop, moment):
        logits = moment.logits
        now = logits.detach().mean(0)
        self.mean = now if self.mean is None else 0.9 * self.mean + 0.1 * now
        strength = 0.3 * (0.5 + torch.rand((), generator=moment.draws(self.technique)))
        return strength * (logits - self.mean).square().sum() / logits.numel()
