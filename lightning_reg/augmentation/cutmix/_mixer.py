"""What CutMix and mixup share: when a batch is mixed, and how its labels follow."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.data.blend import mix_targets, problem_with_blending
from lightning_reg.engine.data.entries import contents, find_entry, find_inputs, replace_entry
from lightning_reg.engine.data.mixing import Mixing
from lightning_reg.engine.host.arguments import check_bool, check_choice, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.loss.mixin import LossMixin
from lightning_reg.engine.technique import BatchTechnique

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.step import Step

__all__ = ["Form", "Mix", "Mixer"]

Form = Literal["auto", "pair", "soft"]


class Mix(NamedTuple):
    """Mixed inputs and how they were made.

    Attributes:
        inputs: The mixed inputs.
        permutation: Partner of each sample, ``(B,)``.
        lam: Share of the sample itself: a number, or one for each sample ``(B,)``.
        replaced: Gives the positions that are the partner's, see :class:`Mixing`; ``None`` if samples are blended.

    """

    inputs: Tensor
    permutation: Tensor
    lam: float | Tensor
    replaced: Callable[[], Tensor] | None = None


class Mixer(BatchTechnique, ABC):
    """Mixes the samples of a batch, and has the loss or the batch's targets follow."""

    def __init__(
        self,
        alpha: float,
        prob: float,
        per_sample: bool,
        input_key: str | None,
        target_key: str | None,
        form: Form,
        num_classes: int | None,
        start_epoch: int,
        stop_epoch: int | None,
        loss: int | str | None,
        name: str | None,
        seed: int,
    ) -> None:
        super().__init__(loss=loss, name=name, seed=seed)
        check_number(self, "alpha", alpha, low=0, low_open=True)
        check_number(self, "prob", prob, low=0, high=1)
        check_bool(self, "per_sample", per_sample)
        check_choice(self, "form", form, ("auto", "pair", "soft"))
        check_number(self, "num_classes", num_classes, low=1, integer=True, optional=True)
        check_number(self, "start_epoch", start_epoch, low=0, integer=True)
        check_number(self, "stop_epoch", stop_epoch, low=start_epoch + 1, integer=True, optional=True)
        self.alpha, self.prob, self.per_sample, self.form, self.num_classes = alpha, prob, per_sample, form, num_classes
        self.input_key, self.target_key = input_key, target_key
        self.start_epoch, self.stop_epoch = start_epoch, stop_epoch

    @abstractmethod
    def _mix(self, inputs: Tensor, generator: torch.Generator) -> Mix:
        """The inputs mixed in pairs."""

    @property
    def _maps(self) -> str:
        """What becomes of targets per pixel, if they follow in another way than labels."""
        return ""

    def _problem_with(self, inputs: Tensor) -> str:
        """What kind of inputs it needs, if these are not of it; else ""."""
        return problem_with_blending(inputs)

    @override
    def describe(self) -> str:
        if not self.prob:
            return "prob=0: inactive"
        each = "sample" if self.per_sample else "batch"
        where = {"auto": "labels follow", "pair": "labels in the loss", "soft": "labels in the batch"}[self.form]
        last = "" if self.stop_epoch is None else f" to {self.stop_epoch}"
        epochs = f"; epochs {self.start_epoch}{last or ' on'}" if self.start_epoch or last else ""
        return f"alpha={self.alpha:g}, prob={self.prob:g}, one draw per {each}; {where}{self._maps}{epochs}"

    @property
    @override
    def mixes(self) -> Literal["none", "some", "all"]:
        if not self.prob:
            return "none"
        return "all" if self.prob == 1 and not self.start_epoch and self.stop_epoch is None else "some"

    @override
    def check(self, trainer: "Trainer", module: "LightningModule") -> None:
        if self.form == "pair" and isinstance(module, LossMixin):
            raise MisconfigurationException(
                f'{type(self).__name__}(form="pair"): the module computes its losses itself and hands them to'
                ' `reduce_loss`, so they cannot be computed for a second target. Use form="soft".'
            )

    @override
    def is_active(self, step: "Step") -> bool:
        stopped = self.stop_epoch is not None and step.epoch >= self.stop_epoch
        return self.prob > 0 and step.epoch >= self.start_epoch and not stopped

    @override
    def waits(self, step: "Step") -> bool:
        return self.prob > 0 and step.epoch < self.start_epoch

    @override
    def rehearse(self, step: "Step") -> Mixing:
        key, inputs = self._find_inputs(step.batch, step)
        mix = self._mix(inputs, torch.Generator())
        return self._followed(step.batch, step, key, mix._replace(inputs=inputs))[1]

    @override
    def transform_batch(self, batch: Any, step: "Step") -> Any:
        if step.mixing is not None:  # a batch is mixed once
            return batch
        generator = self.generator(step)
        lam: float | Tensor = 1.0
        if float(torch.rand((), generator=generator)) < self.prob:
            batch, lam = self._mixed(batch, step, generator)
        if step.is_logging:
            step.log(self, "lam", torch.as_tensor(lam).mean())
        return batch

    def _mixed(self, batch: object, step: "Step", generator: torch.Generator) -> tuple[object, float | Tensor]:
        key, inputs = self._find_inputs(batch, step)
        mix = self._mix(inputs, generator)
        if not isinstance(mix.lam, Tensor) and mix.lam == 1.0:  # an empty box: the batch stays the very one it was
            return batch, mix.lam
        batch, step.mixing = self._followed(batch, step, key, mix)
        return replace_entry(batch, key, mix.inputs), mix.lam

    def _find_inputs(self, batch: object, step: "Step") -> tuple[str, Tensor]:
        return find_inputs(batch, self, self.input_key, step.several, self._problem_with)

    def _followed(self, batch: object, step: "Step", key: str, mix: Mix) -> tuple[object, Mixing]:
        """The batch with targets that follow the mixed inputs, or as it is if the loss is to follow."""
        part = find_entry(batch, key.partition(".")[0], "input_key") if step.several else batch
        soft = self.form == "soft" or (self.form == "auto" and isinstance(step.module, LossMixin))
        advice = f'have them mixed in the batch, `{type(self).__name__}(form="soft")`'
        mixing = Mixing(self, mix.permutation, mix.lam, mix.inputs, part, soft, advice, mix.replaced)
        return self._with_soft_targets(batch, key, mixing) if soft else batch, mixing

    def _with_soft_targets(self, batch: object, input_key: str, mixing: Mixing) -> object:
        name, permutation, key = type(self).__name__, mixing.permutation, self.target_key
        if key is None:
            within, _, last = input_key.rpartition(".")
            if last != "0":
                raise MisconfigurationException(
                    f"{name}: to mix the targets in the batch it must be known where they are; the batch is"
                    f' {contents(batch)}. Name the entry: `{name}(target_key="...")`.'
                )
            key = f"{within}.1".lstrip(".")
        targets = find_entry(batch, key, f"{name}: target_key")
        if not isinstance(targets, Tensor) or targets.shape[:1] != permutation.shape:
            raise MisconfigurationException(
                f"{name}: target_key={key!r} must name a tensor with a row for each of the {len(permutation)} samples."
            )
        pasted = mixing.pasted(targets, f"target_key={key!r}")
        if pasted is not None:
            return replace_entry(batch, key, pasted)
        targets = targets.float() if targets.dtype == torch.bool else targets
        if not targets.is_floating_point() and (targets.dim() != 1 or self.num_classes is None):
            raise MisconfigurationException(
                f"{name}: the targets in the batch are {targets.dtype} {tuple(targets.shape)}; to mix them there they"
                f" must be floating point, or class indices (B,) with `{name}(num_classes=...)`. Of several labels let"
                " the data set return `y.float()`, or have the loss mixed by its name, as in"
                f' `{name}(form="pair", loss="binary_cross_entropy_with_logits")`.'
            )
        return replace_entry(batch, key, mix_targets(targets, permutation, mixing.weights, self.num_classes))
