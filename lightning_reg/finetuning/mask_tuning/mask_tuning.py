"""Mask tuning: weights of a trained network are switched off, and none is changed; with gradient dropout."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_bool, check_choice, check_number
from lightning_reg.engine.networks.first_network import FirstNetwork
from lightning_reg.engine.networks.peer import check_runs_on_copy
from lightning_reg.engine.run.engine import attached_engine
from lightning_reg.engine.technique import BatchTechnique, LossTechnique
from lightning_reg.engine.weights.entries import entries_of, write_entries_
from lightning_reg.engine.weights.latents import Latents
from lightning_reg.engine.weights.second import second_gradients
from lightning_reg.engine.weights.summed import names_said
from lightning_reg.engine.weights.swap import named_weights
from lightning_reg.finetuning._choice import FineTuning
from lightning_reg.finetuning.mask_tuning._selection import importance
from lightning_reg.finetuning.mask_tuning.core import (
    gradient_dropout,
    knowledge_loss,
    most_important,
    norm_gradient,
)

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.loss.call import LossCall
    from lightning_reg.engine.step import Step

__all__ = ["MaskTuning"]


class MaskTuning(BatchTechnique, LossTechnique, FineTuning):
    r"""Learns which weights of a trained network to switch off for a task; none of them is changed.

    Each chosen weight is :math:`w = v \odot [\,m > \alpha\,]` with v frozen and a real mask m, which all begin at s
    unless they are spread: the network starts as it was, to the last bit. The gradient at a mask is
    :math:`v \odot \partial L / \partial w` (straight-through), with that of :math:`\omega \lVert m \rVert_2`. Gradient
    dropout keeps the network from forgetting: a second gradient b, of the cross-entropy with what the network said
    before it was tuned, is compared entry by entry with the task's, a, and where both do not agree a is dropped by
    chance:

    .. math:: P = \frac12 \Bigl(1 + \operatorname{sign}(a)\,\frac{a + b}{|a| + |b| + 10^{-8}}\Bigr), \qquad
        g = \bigl((1 - \lambda) + \lambda\,[P > u]\bigr)\,a, \qquad u \sim U(0, 1)

    The module stays the user's: no layer is wrapped, no key renamed, and the parameter holds w at all times. All other
    parameters are frozen unless ``train`` names them. :func:`mask_bits` gives the masks, :func:`save_bits` writes them
    with one bit for each weight, :func:`apply_bits_` and :func:`bits_applied` put them on the network they are of:
    many tasks share one network.

    Use it with few samples, where the network's answers already make sense on the new data: gradient dropout compares
    with these, so with a head that is new write ``gradient_dropout=0``. A mask moves by learning rate times steps (of
    an Adam), and no weight is off before that is :math:`s - \alpha`. Leave it where the task needs what the network
    has not: weights can only be taken away.

    Source:
        Zheng, Wu et al., "Regularized Mask Tuning: Uncovering Hidden Knowledge in Pre-trained Vision-Language Models",
        ICCV 2023, arXiv 2307.15049.

    Differs:
        Of accumulated batches and several processes the sums of a and of b are compared, once in a step, so they train
        as one large batch does. The network of before is the module in evaluation mode with its first weights, a head
        that is trained among them. The parameters that matter to the task are found by
        :math:`|v\,\partial L/\partial v|`, since how the authors found theirs was not read; theirs are the image
        encoder's attention and first convolution.

    Memory: v, m and b of the chosen weights (12 bytes a number in float32), and what the optimizer keeps of m; with
    ``select="gradient"`` v of all of them and the rest of the chosen share. Weights that are trained otherwise, and
    buffers, once more. A step has a further forward pass and a further backward pass.

    Args:
        layers: Patterns of names, of layers as in ``named_modules()`` (``"*.attn*"``) or of weights themselves
            (``"*.in_proj_weight"``). ``"auto"``: all linear, convolution and attention layers, and layers of other
            libraries whose ``weight`` multiplies the input, without weights shared with a layer of another kind and
            without routers of experts. Others of two dimensions or more by pattern only.
        select: ``"all"`` entries of these weights have a mask, or those that matter most to the task, by the mean of
            :math:`|v\,\partial L/\partial v|` over training batches (``"gradient"``).
        fraction: Share of all entries that ``select="gradient"`` chooses, in (0, 1].
        select_batches: Training batches that it reads for that when the training begins, at least 1.
        init: s, above ``threshold``. Paper: 0.01.
        spread: Whether all masks begin at ``"one"`` value s (paper), or each at its own in ``"uniform"`` draws from
            [0, s), as the code can as well: the share ``threshold / init`` of the weights is off at first.
        threshold: :math:`\alpha`, at least 0. Paper: 0.005.
        gradient_dropout: :math:`\lambda` in [0, 1]. Paper: 1, and 0.3 for some data sets. Neutral: 0.
        norm_weight: :math:`\omega`, at least 0. Code: 0.0001. Neutral: 0. Under an Adam it takes weights away that have
            no gradient of the task, at its full rate.
        temperature: T of the cross-entropy with what the network said before, above 0. Code: 1.
        lr_factor: Learning rate of the masks, as a multiple of that of the weights, at least 0.
        train: Patterns of names of parameters, and of layers that hold them, that are trained as they are
            (``"classifier*"``, ``"*.bias"``).
        exclude: Patterns of names of layers and weights that stay as they are (``"lm_head"``).
        rest_norms: Whether batch norm that is not trained is in evaluation mode meanwhile. Code: true.
        save: ``"full"`` checkpoints are those of the plain module and the callback's state beside it; ``"delta"`` ones
            hold what was trained, buffers and a hash of all else, and load where the module begins with the same.
        loss: Which loss call gradient dropout goes by, if there are several: position, ``"last"``, function name, or
            ``"model.py:42"``.
        name: Tells several instances in one Trainer apart; they must not share a weight.
        seed: Seed of the draws.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> masks = MaskTuning(layers="*attn*", gradient_dropout=0.3)
        >>> trainer = Trainer(max_epochs=30, callbacks=[masks], logger=False, enable_checkpointing=False)

    """

    takes_mixed = True  # what both networks say of a mixed sample is compared

    def __init__(
        self,
        layers: list[str] | str = "auto",
        select: Literal["all", "gradient"] = "all",
        fraction: float = 0.1,
        select_batches: int = 16,
        init: float = 1e-2,
        spread: Literal["one", "uniform"] = "one",
        threshold: float = 5e-3,
        gradient_dropout: float = 1.0,
        norm_weight: float = 1e-4,
        temperature: float = 1.0,
        lr_factor: float = 1.0,
        train: list[str] | str | None = None,
        exclude: list[str] | str | None = None,
        rest_norms: bool = True,
        save: Literal["full", "delta"] = "full",
        loss: int | str | None = None,
        name: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(loss=loss, name=name, seed=seed)
        check_choice(self, "select", select, ("all", "gradient"))
        check_number(self, "fraction", fraction, low=0, high=1, low_open=True)
        check_number(self, "select_batches", select_batches, low=1, integer=True)
        check_number(self, "threshold", threshold, low=0)
        check_number(self, "init", init, low=threshold, low_open=True)
        check_choice(self, "spread", spread, ("one", "uniform"))
        check_number(self, "gradient_dropout", gradient_dropout, low=0, high=1)
        check_number(self, "norm_weight", norm_weight, low=0)
        check_number(self, "temperature", temperature, low=0, low_open=True)
        check_number(self, "lr_factor", lr_factor, low=0)
        check_bool(self, "rest_norms", rest_norms)
        check_choice(self, "save", save, ("full", "delta"))
        self.layers, self.select, self.fraction, self.select_batches = layers, select, fraction, select_batches
        self.init, self.spread, self.threshold, self.gradient_dropout = init, spread, threshold, gradient_dropout
        self.norm_weight, self.temperature, self.lr_factor = norm_weight, temperature, lr_factor
        self.train, self.exclude, self.rest_norms, self.save = train, exclude, rest_norms, save
        self.latents = Latents(lr_factor, frozen=True, has_second=gradient_dropout > 0)
        self._reference = FirstNetwork()
        self._positions: dict[str, Tensor] = {}
        self._steps: dict[str, int] = {}
        self._left: dict[str, list[str]] = {}
        self._sizes = ""

    @override
    def describe(self) -> str:
        share = f", {100 * self.fraction:g} % by gradient" if self.select == "gradient" else ""
        dropout = f", gradient dropout {self.gradient_dropout:g}" if self.gradient_dropout else ""
        norm = f", norm by {self.norm_weight:g}" if self.norm_weight else ""
        left = "".join(f"; left alone, {why}: {names_said(names)}" for why, names in self._left.items())
        sizes = f"; {self._sizes}" if self._sizes else ""
        start = "from" if self.spread == "one" else "uniform below"
        return (
            f"{start} {self.init:g}, off at {self.threshold:g}{share}{dropout}{norm}, layers {self.layers}{sizes}{left}"
        )

    @override
    def check(self, trainer: "Trainer", module: "LightningModule") -> None:
        if self.gradient_dropout or self.select == "gradient":
            check_runs_on_copy(module, self)

    @override
    def is_active(self, step: "Step") -> bool:
        return bool(self.latents.own and self.gradient_dropout) or super().is_active(step)

    @override
    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        if self.select == "gradient" and host.batches_so_far(trainer) == 0:
            scores = importance(self, trainer, pl_module, self.weights_to_map(pl_module), self.select_batches)
            self._positions = most_important(scores, self.fraction) if scores else {}
        rates = [g["lr"] for o in trainer.optimizers if "Adam" in type(o).__name__ for g in o.param_groups]
        way = max(rates, default=0.0) * self.lr_factor * trainer.estimated_stepping_batches
        reaches = self.spread == "uniform" or way >= self.init - self.threshold
        if rates and not trainer.lr_scheduler_configs and way >= 0 and not reaches:
            host.rank_zero_warn(
                f"MaskTuning: an Adam moves a mask by its learning rate in each step, {way:.2g} in this training, and"
                f" no weight is off before that is {self.init - self.threshold:.2g}. Write a larger `lr_factor`, or"
                " train for longer."
            )

    @override
    def teardown(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        self._reference.rest()

    # -- the second gradient ------------------------------------------------------------------------------------------

    @override
    def observe_batch(self, step: "Step") -> None:
        weights = named_weights(step.module)
        first = {name: self.latents.values[name] for name in self.latents.values if name not in self.latents.index}
        for name in self.latents.index if not self._reference.is_there else ():
            first[name] = self.latents.whole(name, weights[name])
        self._reference.observe(step, self, first)

    @override
    def loss_term(self, call: "LossCall") -> Tensor | None:
        teacher = call.step.notes[self].call
        if teacher is None:
            return None
        losses = [knowledge_loss(_scores(c), _scores(teacher), self.temperature, "none") for c in call.copies()]
        each = torch.stack(losses).mean(0).flatten()
        counted = call.element_mass
        loss = each.mean() if counted is None else each[counted > 0].sum() / (counted > 0).sum().clamp_min(1)
        weights = named_weights(call.step.module)
        own = {name: weights[name] for name in self.latents.own}
        for name, gradient in second_gradients(loss, own, call.step.trainer, self).items():
            self.latents.add_second_gradients(name, {"mask": self._at_mask(name, gradient)})
        if call.step.is_logging:
            call.step.log(self, "knowledge", loss)
        return None

    @override
    def change_part_gradients(self, names: Sequence[str]) -> None:
        for name in names:
            mask, second = self.latents.own[name]["mask"], self.latents.second.get(name)
            if mask.grad is None:
                continue
            gradient = mask.grad.add(norm_gradient(mask), alpha=self.norm_weight) if self.norm_weight else mask.grad
            if second is not None:
                draw = torch.Generator(mask.device)
                draw.manual_seed(self.derived_seed(f"step {self._steps.get(name, 0)} of {name}"))
                gradient = gradient_dropout(gradient, second["mask"], self.gradient_dropout, draw)
            mask.grad = gradient

    # -- the map ------------------------------------------------------------------------------------------------------

    @override
    def weights_to_map(self, module: nn.Module) -> list[str]:
        return self.choose_numbers(module, "mask")

    @override
    def begin_map(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        self._steps = {}
        self._reference.forget()
        values = {}
        for name, weight in weights.items():
            at = self._positions.get(name)
            values[name] = weight.clone() if at is None else self.latents.take(name, weight, at.to(weight.device))
            kind = torch.promote_types(weight.dtype, torch.float32)
            mask = torch.full_like(values[name], self.init, dtype=kind)
            if self.spread == "uniform":
                draw = torch.Generator().manual_seed(self.derived_seed(f"masks of {name}"))
                mask.mul_(torch.rand(mask.shape, generator=draw, dtype=kind).to(mask.device))
            self.latents.own[name] = {"mask": mask.requires_grad_()}
        self._positions = {}
        return values

    @override
    def latents_of(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What is zero in a weight that somebody wrote is off, and all else on."""
        found = {}
        for name, weight in weights.items():
            mask, value, now = self.latents.own[name]["mask"], self.latents.values[name], self._entries(name, weight)
            was_on, is_on = (mask > self.threshold) & (value != 0), now != 0
            mask.masked_fill_(is_on & ~was_on, self.init).masked_fill_(was_on & ~is_on, self.threshold)
            found[name] = torch.where(is_on, now, value)
        return found

    @override
    def map_weights(self, latents: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            mapped = torch.where(self.latents.own[name]["mask"] > self.threshold, latents[name], 0)
            if name in self.latents.index:
                write_entries_(weight, self.latents.index[name], mapped)
            else:
                weight.copy_(mapped)

    @override
    def pull_back(
        self, latents: Mapping[str, Tensor], weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
    ) -> None:
        for name, gradient in gradients.items():
            self.latents.add_gradients(name, {"mask": self._at_mask(name, gradient)})

    def _at_mask(self, name: str, gradient: Tensor) -> Tensor:
        value = self.latents.values[name]
        return self._entries(name, gradient).to(self.latents.own[name]["mask"].dtype) * value

    def _entries(self, name: str, whole: Tensor) -> Tensor:
        return entries_of(whole, self.latents.index[name]) if name in self.latents.index else whole

    @override
    def follow_step(self, names: Sequence[str]) -> None:
        for name in names:
            self._steps[name] = self._steps.get(name, 0) + 1

    # -- what is logged, and state ------------------------------------------------------------------------------------

    @override
    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if host.is_logging_step(trainer) and self.latents.own:
            off = [(mask <= self.threshold).sum() for _, _, mask in self.latents.parts()]
            attached_engine(trainer).log_own(self, {"off": torch.stack(off).sum() / max(1, self.latents.size)})

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"steps": dict(self._steps), "first": dict(self._reference.kept)} | self.latents.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._steps = dict(state_dict["steps"])
        self._reference.load(state_dict["first"])
        self.latents.load_state_dict(state_dict)


def _scores(call: "LossCall") -> Tensor:
    """Scores ``(N, C, ...)`` of classes, of each position of a text or an image as well."""
    return call.input if call.function in (F.cross_entropy, F.nll_loss) else call.logits
