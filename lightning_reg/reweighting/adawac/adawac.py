"""AdaWAC: per-sample weights between the supervised loss and the consistency of two views."""

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from lightning_reg.engine.data.entries import find_entry, replace_entry
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_bool, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.generators import own_randomness
from lightning_reg.engine.host.user_functions import user_function
from lightning_reg.engine.networks.further_pass import check_runs_again, run_step
from lightning_reg.engine.run.phases import Member, phases_of
from lightning_reg.engine.technique import BatchTechnique, LossTechnique
from lightning_reg.reweighting.adawac._table import WeightTable
from lightning_reg.reweighting.adawac.core import (
    apply_symmetry,
    draw_symmetries,
    encoder_consistency,
    undo_symmetry,
)
from lightning_reg.reweighting.adawac.report import SampleWeights

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.loss.call import LossCall
    from lightning_reg.engine.step import Step

__all__ = ["AdaWAC"]

_BUILT_IN = ("symmetries", "flips")


class _Found(NamedTuple):
    """What the two views have given in a step."""

    weights: Tensor
    other: Tensor
    consistency: Tensor


class AdaWAC(BatchTechnique, LossTechnique):
    r"""Weighs for each training sample its supervised loss against the consistency of two views.

    Every sample has a pair of weights :math:`(b_i, 1 - b_i)`. The weights ascend by mirror descent towards the larger
    of two losses while the network descends, so samples with much to learn from their label end up supervised, and
    those with little (a slice with almost no foreground) train the encoder by consistency.

    .. math::

        \ell^{CE}_i &= \tfrac12 [\ell(f(x_i), y_i) + \ell(f(x'_i), y'_i)], \qquad
        \ell^{AC}_i = \lambda\, \operatorname{mean}\, (E(x_i) - E(x'_i))^2 \\
        b_i &\leftarrow \sigma(a_i), \quad a_i \leftarrow a_i + \eta\,(\ell^{CE}_i - \ell^{AC}_i), \qquad
        L = \tfrac1B \sum_i b_i\, \ell^{CE}_i + (1 - b_i)\, \ell^{AC}_i

    in this order in each step: the loss has the weights after their update, and no gradient flows into them. With
    constant losses :math:`b = \sigma(T \eta\,(\ell^{CE} - \ell^{AC}))` after T visits. ``training_step`` runs once more
    on the other view, with the same weights of the network, and logs nothing there. Works where a sample is a row, a
    sequence or a map (masks ``(B, H, W)``; ignored pixels do not count, and a sample without others keeps its weight).

    Use it when a finite dataset is visited many times and its labels are of two kinds, informative and nearly empty, as
    in volumes that are cut into slices. Leave it when labels are noisy: a wrong label has a high loss and gets more
    weight. Leave it when samples are seen once, and where the consistency is far below the supervised loss: then all
    weights go to 1 and it is plain training on two views. No gain in Dice was seen on digits.

    Source:
        Dong et al., "Adaptively Weighted Data Augmentation Consistency Regularization for Robust Optimization under
        Concept Shift", ICML 2023, arXiv 2210.01891; formulas and the order of the step are those of the authors' code.

    Differs:
        The features of a built-in view are turned back before they are compared; the authors' code compares positions
        as they are (``align=None``). ``a`` is stored in place of ``b``, which underflows in their code and stays 0
        then. Other terms of your loss (Dice) are those of the batch alone, where they take the mean of both views. The
        running statistics of batch norm are those of the batch alone unless ``norms_follow``. A loss that is not finite
        leaves the weight as it is.

    Memory: two float32 per sample. A step costs two passes. Under DDP a step sends ``batch * 4`` 32-bit words to the
    other ranks and waits for none of them until the next; a sample that padding has given to two ranks moves once.

    Args:
        layer: The encoder, by name: its output ``(B, C, h, w)`` is compared, or ``(B, D)``, ``(B, T, D)``. Of several
            tensors (stages of a backbone) it is the last.
        eta: Step of the weights, at least 0. Authors' scripts: 2 (TransUNet), 8 (U-Net). 0 keeps all at 1/2.
        lam: Factor of the consistency, at least 0. Authors' scripts: 2. To be chosen so that it lies between the
            supervised losses of the two kinds of samples.
        view: ``"symmetries"``: each sample is turned by quarters and flipped at random, its mask alike; ``"flips"`` for
            maps that are not square; or the name of your own function: a method of your module or datamodule, or an
            import path. It is called as ``view(x, y)`` with the batch's inputs and targets on their device, without
            gradient, and returns both; what it draws from global random states is the technique's own.
        align: What is made of the other view's features before they are compared: ``"auto"`` turns those of a built-in
            view back, if they are maps; ``None``: nothing; or the name of your own function, called as ``align(z)``.
        input_key: Entry of the batch with the inputs: keys and positions, separated by dots.
        target_key: Entry of the batch with the targets. ``None``: there is no such entry, and ``view(x, None)`` is
            asked.
        norms_follow: Whether the running statistics of batch norm count the other view too, as in the authors' code.
        limit: Largest ``|a|``, above 0: a weight that was sure for long can still turn. ``None`` (authors' code): none.
        num_samples: Number of training samples; ``None`` for the length of the training dataset. Needed with
            ``index_key``.
        loss: Which loss call it works on, if there are several: position, ``"last"``, function name, or
            ``"model.py:42"``.
        index_key: Batch entry with the sample indices; ``None`` to follow them from the DataLoader.
        dataloader: Key of the training loader in a CombinedLoader.
        name: Tells several instances in one Trainer apart.
        seed: Seed of the views.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> adawac = AdaWAC(layer="encoder", eta=2.0, lam=2.0)
        >>> trainer = Trainer(max_epochs=150, callbacks=[adawac], logger=False, enable_checkpointing=False)

    """

    needs_indices: ClassVar[bool] = True
    runs_again: ClassVar[bool] = True
    watched = ("weight",)

    def __init__(
        self,
        layer: str,
        eta: float = 2.0,
        lam: float = 2.0,
        view: str = "symmetries",
        align: str | None = "auto",
        input_key: str = "0",
        target_key: str | None = "1",
        norms_follow: bool = False,
        limit: float | None = None,
        num_samples: int | None = None,
        loss: int | str | None = None,
        index_key: str | None = None,
        dataloader: str | None = None,
        name: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(loss=loss, index_key=index_key, dataloader=dataloader, name=name, seed=seed)
        check_number(self, "eta", eta, low=0)
        check_number(self, "lam", lam, low=0)
        check_bool(self, "norms_follow", norms_follow)
        check_number(self, "limit", limit, low=0, low_open=True, optional=True)
        if num_samples is not None:
            check_number(self, "num_samples", num_samples, low=1, integer=True)
        elif index_key is not None:
            raise ValueError("AdaWAC: `num_samples` must be given with `index_key`, got None.")
        self.layer, self.eta, self.lam, self.view, self.align = layer, eta, lam, view, align
        self.input_key, self.target_key, self.norms_follow = input_key, target_key, norms_follow
        self.limit, self.num_samples = limit, num_samples
        self._table = WeightTable(type(self).__name__, num_samples)

    @override
    def describe(self) -> str:
        align = "as it is" if self.align is None or not self._turns_back else "turned back"
        align = align if self.align in (None, "auto") else f"by {self.align}"
        return f"{self.layer}, eta={self.eta:g}, lam={self.lam:g}; view {self.view}, compared {align}"

    @override
    def check(self, trainer: "Trainer", module: "LightningModule") -> None:
        check_runs_again(self, trainer, module)
        if self.view not in _BUILT_IN:
            user_function(self.view, trainer, module, "AdaWAC(view=...)")
        if self.align not in (None, "auto"):
            user_function(self.align, trainer, module, "AdaWAC(align=...)")

    @override
    def conflict_with(self, other: Member) -> str | None:
        if "sample_weights" in phases_of(other) and other.loss == self.loss:
            return (
                "both weigh the samples of the same loss, and what AdaWAC takes from a sample's loss it gives to its"
                " consistency. Remove one of them, or let them work on different calls with `loss=...`."
            )
        return None

    @property
    @override
    def feature_layers(self) -> "Sequence[str]":
        return [self.layer]

    @override
    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        if host.batches_so_far(trainer) == 0:  # a new training, not a resumed or continued one
            self._table.clear()

    @override
    def observe_batch(self, step: "Step") -> None:
        batch, draws = step.batch, None
        x = find_entry(batch, self.input_key, "AdaWAC: input_key")
        y = None if self.target_key is None else find_entry(batch, self.target_key, "AdaWAC: target_key")
        with torch.no_grad():
            if self.view in _BUILT_IN:
                draws = self._draws(x, step)
                x = apply_symmetry(x, draws)
                y = apply_symmetry(y, draws) if isinstance(y, Tensor) and y.dim() > 2 else y
            else:
                view = user_function(self.view, step.trainer, step.module, "AdaWAC(view=...)")
                with own_randomness(int(torch.randint(2**32, (), generator=self.generator(step)))):
                    x, y = view(x, y)
        other = replace_entry(batch, self.input_key, x)
        if self.target_key is not None:
            other = replace_entry(other, self.target_key, y)
        step.notes[self] = other, draws

    @override
    def sample_weights(self, call: "LossCall") -> Tensor | None:
        step = call.step
        other, draws = step.notes[self]
        features = _encoded(step.features.get(self.layer), self.layer, call)
        if self._table.is_empty and not features.requires_grad:  # later it may be frozen for a while
            raise MisconfigurationException(
                f"AdaWAC: the output of {self.layer!r} has no gradient, so nothing would be learned from its"
                " consistency."
            )
        sight = run_step(step, self, other, layers=[self.layer], norms_follow=self.norms_follow)
        if sight.call is None or sight.call.batch_size != call.batch_size:
            raise MisconfigurationException(f"AdaWAC: the other view of {call} has another number of samples.")
        aligned = self._aligned(_encoded(sight.features[self.layer], self.layer, call), draws, step)
        if aligned.shape != features.shape:
            raise MisconfigurationException(
                f"AdaWAC: {self.layer!r} gives {tuple(features.shape)} for the batch and {tuple(aligned.shape)} for its"
                " other view; they must be alike. Let `view` keep the size of the inputs."
            )
        consistency = self.lam * encoder_consistency(features, aligned)
        second = sight.call.learned_losses
        supervised = (call.losses + second.detach()) / 2
        samples = call.samples(self)
        weights = self._table.update(samples, supervised, consistency, self.eta, self.limit, call.sample_mass)
        step.notes[self] = _Found(weights, second, consistency)
        if step.is_logging:
            for name, value in (("weight", weights), ("supervised", supervised), ("consistency", consistency)):
                step.log(self, name, value.mean())
        return weights / 2

    @override
    def loss_term(self, call: "LossCall") -> Tensor | None:
        found: _Found = call.step.notes.pop(self)
        weights, second, consistency = found
        return weights / 2 * second + (1 - weights) * consistency

    def sample_report(self) -> SampleWeights:
        """The weight of each training sample: which labels are dense, and which are sparse.

        Returns:
            Weights ``b`` and visits by position in the training dataset; a report to print through rich or to write as
            CSV.

        Raises:
            RuntimeError: If nothing was trained yet.

        """
        logits, visits = self._table.all().unbind(1)
        return SampleWeights(logits.sigmoid(), visits.long())

    @property
    def _turns_back(self) -> bool:
        return self.view in _BUILT_IN

    def _draws(self, x: object, step: "Step") -> Tensor:
        turns = self.view == "symmetries"
        if not isinstance(x, Tensor) or x.dim() < 3 or (turns and x.shape[-1] != x.shape[-2]):
            shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            advice = 'view="flips", or ' if isinstance(x, Tensor) and x.dim() > 2 else ""
            raise MisconfigurationException(
                f"AdaWAC: view={self.view!r} turns {'square ' if turns else ''}images, and the entry"
                f" {self.input_key!r} of the batch is {shape}. Write {advice}a function of your own: `view=...`."
            )
        return draw_symmetries(len(x), self.generator(step), turns).to(x.device, non_blocking=True)

    def _aligned(self, features: Tensor, draws: Tensor | None, step: "Step") -> Tensor:
        if self.align is None:
            return features
        if self.align != "auto":
            aligned: Tensor = user_function(self.align, step.trainer, step.module, "AdaWAC(align=...)")(features)
            return aligned
        return features if draws is None or features.dim() < 4 else undo_symmetry(features, draws)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._table.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._table.load_state_dict(state_dict)


def _encoded(output: object, layer: str, call: "LossCall") -> Tensor:
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    found = tensors[-1] if tensors else None  # of several stages the deepest
    if found is None or found.dim() < 2 or len(found) != call.batch_size:
        what = "nothing before the loss" if found is None else f"{tuple(found.shape)}"
        raise MisconfigurationException(
            f"AdaWAC: {layer!r} gave {what}, where a tensor with a row for each of {call.batch_size} samples is needed."
            " Name the encoder, or the layer whose output the decoder or the head gets."
        )
    return found
