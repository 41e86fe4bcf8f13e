"""A sound technique, and for each law techniques that break it in one place and are sound everywhere else."""

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.engine import host
from lightning_reg.engine.distributed import all_reduce_mean
from lightning_reg.engine.errors import check_choice, check_number
from lightning_reg.engine.technique import Technique
from tests.conformance.case import Case

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.loss_call import LossCall
    from lightning_reg.engine.step import Step

__all__ = ["BROKEN", "SOUND", "Sound", "spread_loss"]


def spread_loss(logits: Tensor, mean: Tensor) -> Tensor:
    """Squared distance of the logits from their moving mean.

    Args:
        logits: ``(B, C)``.
        mean: ``(C,)``, constant.

    Returns:
        ``(B,)``.

    """
    return (logits - mean).square().mean(1)


class Sound(Technique):
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


# -- 1 neutral_is_nothing ---------------------------------------------------------------------------------------------


class TouchesTheLossAtNeutral(Sound):
    @override
    def is_active(self, step):
        return True

    @override
    def loss_term(self, call):
        return super().loss_term(call) + 1e-6 * call.logits.square().mean(1)


class DoesNothing(Sound):
    @override
    def is_active(self, step):
        return False


# -- 2 resume_is_exact ------------------------------------------------------------------------------------------------


class ForgetsItsState(Sound):
    @override
    def state_dict(self):
        return {}


class CountsStepsUnsaved(Sound):
    steps = 0

    @override
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps += 1

    @override
    def _draw(self, step):
        return torch.tensor(1.0 + self.steps / 10)


class SavesAnObject(Sound):
    @override
    def state_dict(self):
        return {**super().state_dict(), "class": Sound}


# -- 3 leaves_no_trace ------------------------------------------------------------------------------------------------


def _look(module, args, output):
    return None


class LeavesAHook(Sound):
    @override
    def on_fit_start(self, trainer, pl_module):
        pl_module.net.head.register_forward_hook(_look)


class LeavesAHookOnException(Sound):
    _handle = None

    @override
    def on_fit_start(self, trainer, pl_module):
        self._handle = pl_module.net.head.register_forward_hook(_look)

    @override
    def on_fit_end(self, trainer, pl_module):
        self._handle.remove()
        self._handle = None


class PatchesTheModule(Sound):
    @override
    def on_fit_start(self, trainer, pl_module):
        pl_module.validation_step = pl_module.validation_step


class LeavesScaledWeights(Sound):
    @override
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        with torch.no_grad():
            pl_module.net.head.weight *= 2

    @override
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with torch.no_grad():
            pl_module.net.head.weight /= 2


# -- 4 ranks_agree ----------------------------------------------------------------------------------------------------


class UpdatesFromTheLocalRank(Sound):
    @override
    def _update(self, mean):
        self._mean = mean if self._mean is None else self.decay * self._mean + (1 - self.decay) * mean
        return self._mean


class SumsOverRanks(Sound):
    @override
    def _update(self, mean):
        return super()._update(mean * (torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1))


# -- 5 precision ------------------------------------------------------------------------------------------------------


class KeepsHalfState(Sound):
    @override
    def loss_term(self, call):
        term = super().loss_term(call)
        self._mean = self._mean.to(call.logits.dtype)
        return term


class ComputesInHalf(Sound):
    @override
    def loss_term(self, call):
        mean = self._update(call.logits.detach().float().mean(0))
        call.step.log(self, "mean", mean.mean())
        far = call.logits + 64  # in half precision the distance drowns in rounding errors
        return self.strength * spread_loss(far, (mean + 64).to(far.dtype))


class DividesByAccumulation(Sound):
    @override
    def loss_term(self, call):
        return super().loss_term(call) / call.step.trainer.accumulate_grad_batches


# -- 6 works_or_is_refused --------------------------------------------------------------------------------------------


class IsSilentInManualMode(Sound):
    @override
    def is_active(self, step):
        return step.module.automatic_optimization


class IsSilentWhenClipped(Sound):
    @override
    def is_active(self, step):
        return not step.trainer.gradient_clip_val


class IsSilentWhenCompiled(Sound):
    @override
    def is_active(self, step):
        return not host.is_compiled(step.module)


# -- 7 instances ------------------------------------------------------------------------------------------------------


class SharesState(Sound):
    means: ClassVar[dict[str, Tensor]] = {}

    @override
    def _update(self, mean):
        self.means["mean"] = super()._update(mean)
        return self.means["mean"]

    @override
    def state_dict(self):
        return dict(self.means)


class IgnoresItsName(Sound):
    @property
    @override
    def state_key(self):
        return "always the same"


class AllowsTwins(Sound):
    @property
    @override
    def log_key(self):
        return f"reg/broken_{id(self)}"

    @property
    @override
    def state_key(self):
        return f"broken_{id(self)}"


# -- 8 plain_data -----------------------------------------------------------------------------------------------------


class HoldsALambda(Sound):
    def __init__(self, strength=0.3, name=None):
        super().__init__(strength, name=name)
        self._function = lambda x: x


class SavesASet(Sound):
    @override
    def state_dict(self):
        return {**super().state_dict(), "seen": {1, 2}}


class LosesStateWhenCopied(Sound):
    @override
    def __getstate__(self):
        return {**self.__dict__, "_mean": None}


# -- 9 says_what_it_does ----------------------------------------------------------------------------------------------


class LogsUnderAnotherKey(Sound):
    @override
    def loss_term(self, call):
        call.step.scalars["mean"] = torch.zeros(())
        return super().loss_term(call)


class SaysNothing(Sound):
    @override
    def describe(self):
        return ""


class WritesMarkup(Sound):
    @override
    def describe(self):
        return "layers [red, head]"


class TakesAnything(Sound):
    def __init__(self, strength: float = 0.3, bins: int = 4, name: str | None = None) -> None:
        super().__init__(strength, name=name)
        self.bins = bins


# -- 10 own_randomness ------------------------------------------------------------------------------------------------


class DrawsGlobally(Sound):
    @override
    def _draw(self, step):
        return 0.5 + torch.rand(())


class DrawsFromAForkOfTheGlobal(Sound):
    @override
    def _draw(self, step):
        with torch.random.fork_rng():
            return 0.5 + torch.rand(())


# -- 11 cited ---------------------------------------------------------------------------------------------------------


class HasNoSource(Sound):
    """Keeps logits near their moving mean.

    Differs:
        Nothing.

    """


class DocumentsTooLittle(Sound):
    __doc__ = (Sound.__doc__ or "").replace("        decay: Decay of the mean, in [0, 1).\n", "")


# -- 12 order ---------------------------------------------------------------------------------------------------------


class FailsInPairs(Sound):
    @override
    def on_fit_start(self, trainer, pl_module):
        if sum(isinstance(c, Technique) for c in trainer.callbacks) > 1:
            raise KeyError("somebody else is here")


class GivesWayInSilence(Sound):
    @override
    def is_active(self, step):
        return sum(isinstance(c, Technique) for c in step.trainer.callbacks) == 1


def _case(cls: type[Technique]) -> Case:
    return Case(
        make=partial(cls, strength=0.3), neutral=partial(cls, strength=0.0), invalid=[({"strength": -1}, "strength")]
    )


SOUND = _case(Sound)
_BROKEN = {
    "neutral_is_nothing": (TouchesTheLossAtNeutral, DoesNothing),
    "resume_is_exact": (ForgetsItsState, CountsStepsUnsaved, SavesAnObject),
    "leaves_no_trace": (LeavesAHook, LeavesAHookOnException, PatchesTheModule, LeavesScaledWeights),
    "ranks_agree": (UpdatesFromTheLocalRank, SumsOverRanks),
    "precision": (KeepsHalfState, ComputesInHalf, DividesByAccumulation),
    "works_or_is_refused": (IsSilentInManualMode, IsSilentWhenClipped, IsSilentWhenCompiled),
    "instances": (SharesState, IgnoresItsName, AllowsTwins),
    "plain_data": (HoldsALambda, SavesASet, LosesStateWhenCopied),
    "says_what_it_does": (LogsUnderAnotherKey, SaysNothing, WritesMarkup, TakesAnything),
    "own_randomness": (DrawsGlobally, DrawsFromAForkOfTheGlobal),
    "cited": (HasNoSource, DocumentsTooLittle),
    "order": (FailsInPairs, GivesWayInSilence),
}
BROKEN = {law: [_case(cls) for cls in classes] for law, classes in _BROKEN.items()}
