"""For each law techniques that break it in one place, and are the sound one everywhere else."""

import os
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.autograd import is_checkpointed
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.technique import LayerTechnique, Technique
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.conformance.sound import Sound, SoundByHand, spread_loss

__all__ = ["BROKEN", "COUNTS_ONCE", "SOUND", "spread_loss"]


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


class SetsAVariable(Sound):
    @override
    def on_fit_start(self, trainer, pl_module):
        os.environ["CONFORMANCE_TOY"] = "left behind"


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
        far = call.logits + 256  # in half precision the distance drowns in rounding errors
        return self.strength * spread_loss(far, (mean + 256).to(far.dtype))


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


class TakesAFunction(Sound):
    def __init__(self, strength=0.3, function=abs, name=None):
        super().__init__(strength, name=name)
        self.function = function


class SavesASet(Sound):
    @override
    def state_dict(self):
        return {**super().state_dict(), "seen": {1, 2}}


class LosesStateWhenCopied(Sound):
    @override
    def __getstate__(self):
        return {**self.__dict__, "_mean": None}


class KeepsTheParameters(Sound):
    @override
    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        self._parameters = list(pl_module.parameters())


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


class SaysTooMuch(Sound):
    @override
    def describe(self):
        return "strength\ndecay"


class SaysAnotherStrength(Sound):
    @override
    def describe(self):
        return super().describe().replace("strength=0,", "strength=0.3,")


class TakesAnything(Sound):
    def __init__(self, strength: float = 0.3, bins: int = 4, name: str | None = None) -> None:
        super().__init__(strength, name=name)
        self.bins = bins


class TakesTextForTruth(Sound):
    def __init__(self, strength: float = 0.3, squared: bool = False, name: str | None = None) -> None:
        super().__init__(strength, name=name)
        self.squared = bool(squared)


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


# -- 12 as_by_hand ----------------------------------------------------------------------------------------------------


class Halves(Sound):
    @override
    def loss_term(self, call):
        return super().loss_term(call) / 2


class WithoutHand(Sound):
    pass


class WithIdleHand(Sound):
    @override
    def loss_term(self, call):
        return 0.0 * super().loss_term(call)


# -- 13 order ---------------------------------------------------------------------------------------------------------


class FailsInPairs(Sound):
    @override
    def on_fit_start(self, trainer, pl_module):
        if sum(isinstance(c, Technique) for c in trainer.callbacks) > 1:
            raise KeyError("somebody else is here")


class GivesWayInSilence(Sound):
    @override
    def is_active(self, step):
        return sum(isinstance(c, Technique) for c in step.trainer.callbacks) == 1


class DoublesBesideOthers(Sound):
    @override
    def loss_term(self, call):
        others = sum(isinstance(c, Technique) for c in call.step.trainer.callbacks) - 1
        return super().loss_term(call) * (1 + others)


# -- 14 recomputation -------------------------------------------------------------------------------------------------


class _OnLayers(Sound, LayerTechnique):
    """Makes the body's output a little larger, the more so the more calls it has counted."""

    calls = 0

    @override
    def features_to_edit(self, module):
        return ["net.body"]

    @override
    def edit_features(self, call):
        self.count(call)
        return call.output * self.factor(call)

    def count(self, call):
        self.calls += not call.again

    def factor(self, call):
        return 1 + self.calls / 100 * torch.rand((), generator=self.generator(call.step))

    @override
    def state_dict(self):
        return {**super().state_dict(), "calls": self.calls}


class CountsOnce(_OnLayers):
    """Sound."""


class CountsTwice(_OnLayers):
    @override
    def factor(self, call):
        return 1.1

    @override
    def count(self, call):
        self.calls += 1


class DrawsTwice(_OnLayers):
    draws = None

    @override
    def factor(self, call):
        self.draws = self.draws or torch.Generator().manual_seed(0)
        return 1 + torch.rand((), generator=self.draws)


class RefusesCheckpoints(_OnLayers):
    @override
    def count(self, call):
        if is_checkpointed():
            raise MisconfigurationException("RefusesCheckpoints: no checkpoints, please.")


class RefusesReentrantOnesAnonymously(Sound):
    @override
    def loss_term(self, call):
        if call.step.module.checkpoint == "reentrant":
            raise MisconfigurationException("No checkpoints, please.")
        return super().loss_term(call)


def _case(cls: type[Technique]) -> Case:
    return Case(
        make=partial(cls, strength=0.3),
        neutral=partial(cls, strength=0.0),
        by_hand={WithoutHand: None, WithIdleHand: Hand}.get(cls, SoundByHand),
        says=[f"strength={strength}, decay=0.9, noise=uniform" for strength in (0.3, 0)],
        invalid=[({"strength": -1}, "strength")],
    )


SOUND, COUNTS_ONCE = _case(Sound), _case(CountsOnce)
# For each law the techniques that break it, with a part of the sentence that tells.
_BROKEN = {
    "neutral_is_nothing": {TouchesTheLossAtNeutral: "the neutral instance", DoesNothing: "changes nothing"},
    "resume_is_exact": {
        ForgetsItsState: "the log, resumed at epoch_end",
        CountsStepsUnsaved: "the log, resumed at epoch_end",
        SavesAnObject: "does not load with weights_only=True",
    },
    "leaves_no_trace": {
        LeavesAHook: "what a plain fit leaves.*_forward_hooks",
        LeavesAHookOnException: "what an exception in forward leaves.*_forward_hooks",
        PatchesTheModule: "what a plain fit leaves.*validation_step",
        SetsAVariable: "torch and Lightning before and after.*CONFORMANCE_TOY",
        LeavesScaledWeights: "the weights after an exception in forward.*net.head.weight",
    },
    "ranks_agree": {
        UpdatesFromTheLocalRank: "state on rank 0 and rank 1",
        SumsOverRanks: "of two processes and of one with the joined batch",
    },
    "precision": {
        KeepsHalfState: "is kept in torch.bfloat16",
        ComputesInHalf: "bf16-mixed.*the gradient of step 0 is off",
        DividesByAccumulation: "32-true.*accumulate_grad_batches=3: the gradient of step 0 is off",
    },
    "works_or_is_refused": {
        IsSilentInManualMode: "automatic_optimization=False.*off by",
        IsSilentWhenClipped: "gradient_clip_val.*off by",
        IsSilentWhenCompiled: "torch.compile of a network.*off by",
    },
    "instances": {
        SharesState: "state before and after another one was trained",
        IgnoresItsName: "before IgnoresItsName: RuntimeError",
        AllowsTwins: "were not refused",
    },
    "plain_data": {
        HoldsALambda: "does not pickle",
        SavesASet: "seen.*is a <class 'set'>",
        LosesStateWhenCopied: "state of a trained technique and of its copy",
        TakesAFunction: "function.*is a <class 'builtin_function_or_method'>",
        KeepsTheParameters: "carries the user's module along",
    },
    "says_what_it_does": {
        LogsUnderAnotherKey: r"logged \['mean'\]",
        SaysNothing: "is an empty line",
        SaysTooMuch: "has several lines",
        SaysAnotherStrength: r"write `says=\['strength=0.3.*', 'strength=0.3.*'\]`",
        TakesAnything: r"TakesAnything\(bins=nan\) is not refused",
        TakesTextForTruth: r"TakesTextForTruth\(squared=.False.\) is not refused",
    },
    "own_randomness": {
        DrawsGlobally: "the global random state of torch",
        DrawsFromAForkOfTheGlobal: "under two global seeds",
    },
    "cited": {HasNoSource: "no section `Source:`", DocumentsTooLittle: r"does not document \['decay'\]"},
    "as_by_hand": {
        Halves: "the loop by hand and the fit differ",
        WithoutHand: "write `by_hand=` into the CASE",
        WithIdleHand: "trains as one without the technique",
    },
    "order": {
        FailsInPairs: "KeyError",
        GivesWayInSilence: "nothing logged under",
        DoublesBesideOthers: "before DoublesBesideOthers: the loop by hand and the fit differ",
    },
    "recomputation": {
        CountsTwice: r"the technique's state without checkpoints and with saved ones: .*calls",
        DrawsTwice: "Not the same: the gradients|Not the same: the weights",
        RefusesCheckpoints: "`use_reentrant=False` are refused: RefusesCheckpoints",
        RefusesReentrantOnesAnonymously: "are refused, but not by name",
    },
}
BROKEN = [(law, _case(cls), sentence) for law, broken in _BROKEN.items() for cls, sentence in broken.items()]
