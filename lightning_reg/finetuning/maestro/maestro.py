"""Maestro: trains each weight as a product of factors with ordered columns, and cuts those that add nothing."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_bool, check_choice, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.run.engine import attached_engine
from lightning_reg.engine.run.phases import Member, phases_of
from lightning_reg.engine.technique import PenaltyTechnique, WeightMapTechnique, WeightTechnique
from lightning_reg.engine.weights.latents import Latents
from lightning_reg.engine.weights.summed import names_said, summed_weights
from lightning_reg.engine.weights.swap import named_weights
from lightning_reg.finetuning.maestro._choice import factorizable
from lightning_reg.finetuning.maestro._matrices import Matrices
from lightning_reg.finetuning.maestro.core import (
    hierarchical_lasso,
    kept_rank,
    low_rank_gradients,
    low_rank_product,
    random_ranks,
    rank_pairs,
    svd_factors,
)

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.step import Step

__all__ = ["MaestroLowRank"]


class MaestroLowRank(WeightTechnique, PenaltyTechnique, WeightMapTechnique):
    r"""Finds each layer's rank by training: weights are products of factors with ordered columns, and tails are cut.

    Each chosen weight, as a matrix of outputs by inputs, is :math:`W = UV^\top`, at first of full rank and equal to the
    weight as it is (of a new network or a trained one). In each batch one layer runs with its first b columns,
    :math:`U_{:b}V_{:b}^\top`, where layer and b go through all pairs in random order: so the columns come into an order
    of importance, for the data and not for the weight. The loss gains the hierarchical group lasso

    .. math:: \lambda \sum_i \sum_{b=1}^{r_i} \lVert U^i_{b:} \rVert + \lVert V^i_{b:} \rVert,

    which empties the tails, and after an epoch those with :math:`\lVert U_{b:} \rVert \lVert V_{b:} \rVert < \epsilon`
    are cut off. :func:`export_low_rank` then makes a network of smaller layers, pairs of linear layers or of
    convolutions, where that is less work; any smaller ranks will do, and :func:`greedy_ranks` finds them for a budget.

    The module stays the user's: no layer is wrapped, no key renamed. The parameter holds W in validation, checkpoints
    and for other techniques, of full present rank, and the optimizer steps U and V, with the weight decay of the
    weight, in float32 at least. Compiled graphs stay as they are. So training costs no fewer operations than that of
    the dense network; the saving comes with the export. Statistics of batch norms are those of truncated passes, too:
    let ``reestimate_batchnorm`` find those of a network whose ranks were cut, before it is used.

    Use it to train a network that is to run at several sizes. Two factors want a smaller learning rate than one weight,
    a third or so. Leave it for one small layer or one fixed size, where a decomposition after the training may do.

    Source:
        Horváth, Laskaridis, Rajput and Wang, "Maestro: Uncovering Low-Rank Structures via Trainable Decomposition",
        ICML 2024, arXiv 2308.14929.

    Differs:
        Weights are dense in training, with the gradients of the factored layers. Columns that are cut leave the lasso
        too; a whole column of zeros can learn. Convolutions in groups are factorized group by group, with one rank; a
        layer keeps one column at least. The code's second pass through the full network, which its scripts leave out,
        and dense epochs before the factors are not here: train for these without the technique first.

    Memory: the factors, up to twice the chosen weights, what the optimizer keeps of them, and one copy of the weights
    in the time of a batch. Of weights' gradients one after the other is let go, and with several processes those of the
    factors are averaged.

    Args:
        layers: Patterns of names, of layers as in ``named_modules()`` (``"*.query"``) or of weights themselves.
            ``"auto"``: all linear, convolution and attention layers, and layers of other libraries whose ``weight``
            multiplies the input, without weights shared with a layer of another kind and without routers of experts.
            Frozen weights and such of one row or column for each group (depthwise convolutions) are left alone.
        lasso_weight: :math:`\lambda`, at least 0. Code: 1e-6. The larger, the smaller the network. Neutral: 0.
        threshold: :math:`\epsilon`, at least 0; 0 cuts nothing. Code: 1e-5.
        shrink_every_n_epochs: After how many epochs tails are cut, at least 1. Paper: 1.
        sampler: ``"single"`` (paper): one layer is truncated in each batch; ``"independent"``: each one, by a rank of
            its own; ``"none"``: none, so that nothing puts the columns in order.
        lr_factor: Learning rate of the factors as a multiple of the weight's, above 0. Paper: 1.
        decay: Whether the weight decay of the weight acts on its factors, which shrinks the tails as well. Paper: yes.
        exclude: Patterns of names of layers and weights to leave alone (``"*head*"``).
        name: Tells several instances in one Trainer apart; they must not share a weight.
        seed: Seed of the order of layers and ranks, the same in all processes.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> maestro = MaestroLowRank(lasso_weight=1e-5)
        >>> trainer = Trainer(max_epochs=300, callbacks=[maestro], logger=False, enable_checkpointing=False)

    """

    maps_steps = True

    def __init__(
        self,
        layers: list[str] | str = "auto",
        lasso_weight: float = 1e-6,
        threshold: float = 1e-5,
        shrink_every_n_epochs: int = 1,
        sampler: Literal["single", "independent", "none"] = "single",
        lr_factor: float = 1.0,
        decay: bool = True,
        exclude: list[str] | str | None = None,
        name: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(name=name, seed=seed)
        check_number(self, "lasso_weight", lasso_weight, low=0)
        check_number(self, "threshold", threshold, low=0)
        check_number(self, "shrink_every_n_epochs", shrink_every_n_epochs, low=1, integer=True)
        check_choice(self, "sampler", sampler, ("single", "independent", "none"))
        check_number(self, "lr_factor", lr_factor, low=0, low_open=True)
        check_bool(self, "decay", decay)
        self.layers, self.lasso_weight, self.threshold = layers, lasso_weight, threshold
        self.shrink_every_n_epochs, self.sampler, self.exclude = shrink_every_n_epochs, sampler, exclude
        self.lr_factor, self.decay = lr_factor, decay
        self.latents = Latents(lr_factor, frozen=True, own_decay=decay)
        self._matrices: dict[str, Matrices] = {}
        self._left: dict[str, list[str]] = {}
        self._batch, self._since, self._epoch = 0, 0, 0
        self._truncated: dict[str, int] = {}

    @override
    def describe(self) -> str:
        drawn = {"single": "one layer", "independent": "every layer", "none": "no layer"}[self.sampler]
        every = "each epoch" if self.shrink_every_n_epochs == 1 else f"every {self.shrink_every_n_epochs} epochs"
        cut = f"tails below {self.threshold:g} cut after {every}" if self.threshold else "no tail cut"
        ranks = sum(self.ranks.values())
        sizes = f"; {len(self._matrices)} weights{f' of {ranks:,} columns' if ranks else ''}" if self._matrices else ""
        left = "".join(f"; left alone, {why}: {names_said(names)}" for why, names in self._left.items())
        return f"{drawn} truncated, lasso by {self.lasso_weight:g}, {cut}, layers {self.layers}{sizes}{left}"

    @override
    def conflict_with(self, other: Member) -> str | None:
        if "change_gradients" not in phases_of(other):
            return None
        return (
            f"{type(other).__name__} changes gradients of weights, and a step that runs with other weights has none of"
            " these: its gradients go to the factors at once. Remove one of them."
        )

    @property
    def ranks(self) -> dict[str, int]:
        """Present rank of each weight by its name; of a training that has begun."""
        return {name: parts["U"].shape[-1] for name, parts in self.latents.own.items()}

    @override
    def is_active(self, step: "Step") -> bool:
        return self.sampler != "none" or bool(self.lasso_weight)

    # -- the step -----------------------------------------------------------------------------------------------------

    @override
    def on_train_batch_start(
        self, trainer: "Trainer", pl_module: "LightningModule", batch: Any, batch_idx: int
    ) -> None:
        self._batch = host.batches_so_far(trainer)
        if self._epoch < trainer.current_epoch:  # a run resumed from the last batch of an epoch has not seen its end
            self._end_epoch(trainer.current_epoch, pl_module, self._batch - 1)

    @override
    def weights_to_edit(self, module: nn.Module) -> list[str]:
        return [] if self.sampler == "none" else list(self._matrices)

    @override
    def edit_weights(self, weights: Mapping[str, Tensor]) -> None:
        drawn = self._drawn_ranks()
        for name, weight in weights.items():
            self._truncated[name] = drawn.get(name, self.ranks[name])
            if name in drawn:
                self._write(name, weight, drawn[name])

    def _drawn_ranks(self) -> dict[str, int]:
        """Ranks of the layers that this batch truncates; a function of how many batches ago ranks have changed."""
        names, ranks = list(self.ranks), list(self.ranks.values())
        position = self._batch - 1 - self._since
        walk, place = divmod(position, sum(ranks)) if self.sampler == "single" else (position, 0)
        draw = torch.Generator().manual_seed(self.derived_seed(f"ranks since {self._since}, {walk}"))
        if self.sampler == "independent":
            return dict(zip(names, random_ranks(ranks, draw), strict=True))
        layer, rank = rank_pairs(ranks, draw)[place].tolist()
        return {names[layer]: rank}

    @override
    def penalty(self, module: "LightningModule") -> Tensor | None:
        if not self.lasso_weight or not self.latents.own:
            return None
        each = [hierarchical_lasso(parts["U"], parts["V"]) for parts in self.latents.own.values()]
        return self.lasso_weight * torch.stack(each).sum()

    # -- the map ------------------------------------------------------------------------------------------------------

    @override
    def weights_to_map(self, module: nn.Module) -> list[str]:
        names, left = summed_weights(self, module, self.layers, self.exclude, "factorize", any_matrix=True)
        self._matrices, others = factorizable(self, module, names)
        self._left = left | others
        if not self._matrices:
            raise MisconfigurationException(
                f"MaestroLowRank: none of the {len(names)} chosen weights can be factorized: {names_said(names)} are"
                f" {' or '.join(others)}. Choose others in `layers`."
            )
        return list(self._matrices)

    @override
    def begin_map(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        self._since = self._batch - 1
        for name, weight in weights.items():
            self._factorize(name, weight)
        nothing = torch.zeros(0, dtype=torch.int32)
        return {name: self.latents.take(name, weight, nothing.to(weight.device)) for name, weight in weights.items()}

    def _factorize(self, name: str, weight: Tensor, rank: int | None = None) -> None:
        left, right = svd_factors(self._matrices[name].of(weight), rank)
        self.latents.own[name] = {"U": left.requires_grad_(), "V": right.requires_grad_()}
        self.latents.forget_moments(name)

    @override
    def latents_of(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        for name, weight in weights.items():
            matrix = self._matrices[name].of(weight)
            whole = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
            self._factorize(name, weight, max(self.ranks[name], int(torch.linalg.matrix_rank(whole).max())))
        self._since = self._batch - 1
        return {name: self.latents.values[name] for name in weights}

    @override
    def map_weights(self, latents: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            self._write(name, weight)

    def _write(self, name: str, weight: Tensor, rank: int | None = None) -> None:
        parts = self.latents.own[name]
        matrix = low_rank_product(parts["U"].detach(), parts["V"].detach(), rank)
        weight.copy_(self._matrices[name].weight(matrix, weight.shape))

    @override
    def pull_back(
        self, latents: Mapping[str, Tensor], weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
    ) -> None:
        self._pull_back(gradients, {})

    @override
    def pull_back_step(
        self, latents: Mapping[str, Tensor], weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
    ) -> None:
        self._pull_back(gradients, self._truncated)

    def _pull_back(self, gradients: Mapping[str, Tensor], ranks: Mapping[str, int]) -> None:
        for name, gradient in gradients.items():
            parts, matrix = self.latents.own[name], self._matrices[name].of(gradient)
            left, right = low_rank_gradients(matrix, parts["U"], parts["V"], ranks.get(name))
            self.latents.add_gradients(name, {"U": left, "V": right})

    # -- shrinking, what is logged, and state -------------------------------------------------------------------------

    @override
    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._truncated = {}
        if host.is_logging_step(trainer) and self.latents.own:
            full = sum(min(p["U"].shape[-2], p["V"].shape[-2]) for p in self.latents.own.values())
            attached_engine(trainer).log_own(self, {"rank": sum(self.ranks.values()) / full})

    @override
    def on_train_epoch_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._end_epoch(trainer.current_epoch + 1, pl_module, host.batches_so_far(trainer))

    @torch.no_grad()
    def _end_epoch(self, epochs: int, module: nn.Module, batches: int) -> None:
        self._epoch = epochs
        if not self.threshold or epochs % self.shrink_every_n_epochs:
            return
        parameters = named_weights(module)
        for name, present in self.ranks.items():
            parts = self.latents.own[name]
            rank = kept_rank(parts["U"], parts["V"], self.threshold)
            if rank < present:
                self.latents.cut(name, rank)
                self._write(name, parameters[name])
                self._since = batches

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"since": self._since, "epoch": self._epoch, **self.latents.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._since, self._epoch = state_dict["since"], state_dict["epoch"]
        self.latents.load_state_dict(state_dict)
