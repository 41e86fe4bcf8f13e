"""Multi-scale consistency: predictions at several scales of an image agree."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.data.entries import find_entry, replace_entry
from lightning_reg.engine.host.arguments import check_bool, check_choice, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.loss.call import loss_call
from lightning_reg.engine.networks.further_pass import check_runs_again, run_step
from lightning_reg.engine.technique import BatchTechnique, LossTechnique
from lightning_reg.noisy_labels.multi_scale_consistency.core import multiscale_consistency, resized, scaled_size

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.loss.call import LossCall
    from lightning_reg.engine.step import Step

__all__ = ["MultiScaleConsistency"]


class MultiScaleConsistency(BatchTechnique, LossTechnique):
    r"""Lets the predictions for an image at several scales agree, where they are confident together.

    The consistency term of ADELE, on its own: it keeps predictions trustworthy while labels are noisy, so that they can
    serve as labels. The image (and its mask) is resized to each of the other scales, ``training_step`` runs on it once
    more, and the scores are resized back. With q the mean of the K predictions the loss is

    .. math:: \ell(f(x), y) + s \sum_{k \ne 1} \ell(f_k(x), y)
        + \lambda\, \operatorname{mean}_n\, [\max q_n \ge \rho] \sum_k \mathrm{KL}(p^k_n \,\|\, q_n)

    whose last part is K times the Jensen-Shannon divergence. The losses of the other scales are your own loss function
    on the resized scores with the same targets, those that another technique has corrected included. Works for maps
    (logits ``(B, C, H, W)``) and for classification of images (logits ``(B, C)``, which are not resized). Ignored
    pixels do not count. Further passes log nothing; other terms of your loss (Dice) are those of the batch alone.

    Use it for segmentation from noisy or weak masks, with a network that takes images of any size. Leave it where a
    pass is dear: scales 0.7 and 1.5 make a step 3.7 times as long. On digits with dilated masks the scales disagreed
    less, and no gain in test IoU was shown.

    Source:
        Liu et al., "Adaptive Early-Learning Correction for Segmentation from Noisy Annotations", CVPR 2022, arXiv
        2110.03740, the consistency term; formulas and constants are those of the authors' code.

    Differs:
        Each pixel is confident or not, as the paper says (``mask="pixel"``); the authors' code has one bit for an
        image (``"image"``). Their cross-entropy has a temperature of 3, ours is yours; they clamp q at 1e-3, which is
        not needed here. Ignored pixels count in their means as zeros, and not at all in ours. For organs (SegTHOR) they
        divide the sum by the number of scales: divide your learning rate. The running statistics of batch norm are
        those of the batch alone unless ``norms_follow``.

    Memory: activations of the passes at all scales at once.

    Args:
        lam: Weight of the consistency (lambda), at least 0. Authors' code: 1.
        rho: Confidence from which a pixel counts, in [0, 1]. Authors' code: 0.8.
        scales: Factors of height and width, different ones above 0, with 1 among them. Authors' code: 0.7, 1, 1.5.
        supervised: Factor s of the other scales' losses, at least 0. Authors' code: 1. Neutral: 0, with ``lam=0``.
        mask: What is confident or not: each ``"pixel"`` (paper), or the whole ``"image"`` (authors' code).
        multiple_of: What height and width of resized images are multiples of, at least 1: 32 for many encoders.
        input_key: Entry of the batch with the images ``(B, C, H, W)``: keys and positions, separated by dots.
        target_key: Entry of the batch with the masks, which are resized by their nearest pixel where they have the
            images' height and width. ``None``: there is none.
        norms_follow: Whether the running statistics of batch norm count the other scales too, as in the authors' code.
        loss: Which loss call it works on, if there are several: position, ``"last"``, function name, or
            ``"model.py:42"``.
        name: Tells several instances in one Trainer apart.
        seed: Seed of the further passes' draws (dropout).

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> consistency = MultiScaleConsistency(lam=1.0, rho=0.8)
        >>> trainer = Trainer(max_epochs=100, callbacks=[consistency], logger=False, enable_checkpointing=False)

    """

    runs_again: ClassVar[bool] = True
    watched = ("consistency",)

    def __init__(
        self,
        lam: float = 1.0,
        rho: float = 0.8,
        scales: Sequence[float] = (0.7, 1.0, 1.5),
        supervised: float = 1.0,
        mask: Literal["pixel", "image"] = "pixel",
        multiple_of: int = 1,
        input_key: str = "0",
        target_key: str | None = "1",
        norms_follow: bool = False,
        loss: int | str | None = None,
        name: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(loss=loss, name=name, seed=seed)
        check_number(self, "lam", lam, low=0)
        check_number(self, "rho", rho, low=0, high=1)
        check_number(self, "supervised", supervised, low=0)
        given: object = scales
        several = isinstance(given, Sequence) and not isinstance(given, str)
        for scale in scales if several else ():
            check_number(self, "scales", scale, low=0, low_open=True)
        if not several or 1 not in scales or len(scales) < 2 or len(set(scales)) < len(scales):
            raise ValueError(
                "MultiScaleConsistency: `scales` must be at least two different numbers, with 1 among them, got"
                f" {scales!r}."
            )
        check_choice(self, "mask", mask, ("pixel", "image"))
        check_number(self, "multiple_of", multiple_of, low=1, integer=True)
        check_bool(self, "norms_follow", norms_follow)
        self.lam, self.rho, self.scales, self.supervised, self.mask = lam, rho, list(scales), supervised, mask
        self.multiple_of, self.input_key, self.target_key = multiple_of, input_key, target_key
        self.norms_follow = norms_follow

    @override
    def describe(self) -> str:
        if not (self.lam or self.supervised):
            return "lam=0, supervised=0: inactive"
        scales = ", ".join(f"{scale:g}" for scale in self.scales)
        return f"scales {scales}; lam={self.lam:g}, rho={self.rho:g} per {self.mask}, supervised={self.supervised:g}"

    @override
    def check(self, trainer: "Trainer", module: "LightningModule") -> None:
        check_runs_again(self, trainer, module)

    @override
    def is_active(self, step: "Step") -> bool:
        return self.lam > 0 or self.supervised > 0

    @override
    def observe_batch(self, step: "Step") -> None:
        x = find_entry(step.batch, self.input_key, "MultiScaleConsistency: input_key")
        if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
            found = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise MisconfigurationException(
                f"MultiScaleConsistency resizes images (B, C, H, W), and the entry {self.input_key!r} of the batch is"
                f" {found}. Name the images: `MultiScaleConsistency(input_key=...)`."
            )
        with torch.no_grad():
            step.notes[self] = [self._at(scale, x, step) for scale in self.scales if scale != 1]

    @override
    def loss_term(self, call: "LossCall") -> Tensor | None:
        if call.function not in (F.cross_entropy, F.nll_loss):
            raise MisconfigurationException(
                f"MultiScaleConsistency: {call} has no class scores (F.cross_entropy or F.nll_loss): several labels for"
                " a pixel, or a loss written by hand. If there is such a call too, choose it with"
                " `loss='cross_entropy'`."
            )
        own = call.input
        others = [self._seen(batch, own, call) for batch in call.step.notes.pop(self)]
        valid = None if call.mass is None else call.mass > 0
        consistency = multiscale_consistency([own, *others], self.rho, valid, self.mask)
        if call.step.is_logging:
            call.step.log(self, "consistency", consistency.mean())
        term = self.lam * consistency
        if self.supervised:
            arguments = dict(call.arguments)
            each = [loss_call(call.function, arguments | {"input": scores}, call.step) for scores in others]
            term = term + self.supervised * torch.stack([one.learned_losses for one in each]).sum(0)
        return term

    def _at(self, scale: float, x: Tensor, step: "Step") -> object:
        size = scaled_size(x.shape[-2:], scale, self.multiple_of)
        batch = replace_entry(step.batch, self.input_key, resized(x, size))
        if self.target_key is None:
            return batch
        y = find_entry(batch, self.target_key, "MultiScaleConsistency: target_key")
        if not isinstance(y, Tensor) or y.dim() < 3 or y.shape[-2:] != x.shape[-2:]:
            return batch
        return replace_entry(batch, self.target_key, resized(y, size))

    def _seen(self, batch: object, own: Tensor, call: "LossCall") -> Tensor:
        """Scores of the batch at another scale, in the size of its own."""
        seen = run_step(call.step, self, batch, norms_follow=self.norms_follow).call
        scores = own if seen is None else seen.input
        scores = resized(scores, own.shape[-2:]) if own.dim() == 4 and scores.dim() == 4 else scores
        if scores.shape != own.shape:
            raise MisconfigurationException(
                f"MultiScaleConsistency: the scores of the batch are {tuple(own.shape)}, and at another scale"
                f" {tuple(scores.shape)}: pixels that are flattened cannot be put in another size. Keep logits"
                " (B, C, H, W) and masks (B, H, W) in the loss."
            )
        return scores
