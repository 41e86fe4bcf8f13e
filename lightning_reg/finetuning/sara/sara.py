"""SaRA: the smallest weights of a trained network are trained, all others keep their bits; and controls of it."""

from collections.abc import Mapping, Sequence
from math import inf, isfinite
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_bool, check_choice, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.run.engine import attached_engine
from lightning_reg.engine.technique import PenaltyTechnique
from lightning_reg.engine.weights.entries import entries_of, positions_of, write_entries_
from lightning_reg.engine.weights.latents import Latents
from lightning_reg.engine.weights.summed import names_said
from lightning_reg.engine.weights.swap import named_weights
from lightning_reg.finetuning._choice import FineTuning
from lightning_reg.finetuning.sara.core import magnitude_threshold, nuclear_norm, small_masks

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.step import Step

__all__ = ["SaRA"]


class SaRA(PenaltyTechnique, FineTuning):
    r"""Trains the entries of weights that are smallest in a trained network, and leaves all others as they are.

    Of the chosen weights the entries with :math:`|P| < \theta` are trained, one threshold for all; they hardly matter
    to the network, so what it has learned stays, and what was trained is a sparse change. After a part of the training
    those go on that are still below :math:`\theta`, with new moments; the others stay where they are by then. The loss
    gains :math:`\lambda \lVert P \odot M \rVert_*`, the nuclear norm of the trained entries of one matrix, which is
    drawn anew for each step of the optimizer.

    The module stays the user's: no layer is wrapped, no key renamed. Whatever the optimizer, momentum and weight decay
    included, entries that are not chosen keep their bits. All other parameters are frozen unless ``train`` names them.
    ``select="random"`` is the control: entries drawn by chance, as in SHiRA. :func:`sparse_delta` gives what was
    trained, :func:`save_delta` writes it with at most 6 bytes an entry, :func:`delta_applied` and
    :func:`apply_delta_` put multiples and sums of it into a network. :func:`importance_curve` measures beforehand how
    much a network's smallest weights matter to it.

    Use it where prior knowledge must survive a mild change of task. Leave it for networks that have been pruned, for
    large changes, where the smallest weights learn worst, and with optimizers that need the shape of a matrix (Muon,
    Shampoo): the entries of a weight are one vector.

    Source:
        Hu, Zhang et al., "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank
        Adaptation", ICLR 2025, arXiv 2409.06633. SHiRA: arXiv 2406.13175.

    Differs:
        The threshold may be given by the share of entries below it. Biases, norms and embeddings are not chosen unless
        ``layers`` names them: many of them are zero. The authors' code drops the gradient of the nuclear norm on its
        default path and turns the signs of chosen entries; here is what the paper says. Singular values of zero have no
        gradient.

    Memory: of each entry that is or was trained its position, its first value and its present one (12 bytes in
    float32), and what the optimizer keeps of those that are trained; no copy of the weights. Gradients of the weights'
    size are let go one after the other, and with several processes only those of the entries are averaged; beside
    techniques that act on weights they are kept until the step.

    Args:
        fraction: Share of all entries of the chosen weights that is trained, in (0, 1]. Paper: 0.1 to 0.2.
        threshold: :math:`\theta` in place of ``fraction``, above 0; infinity for all entries. Code: 0.002.
        select: ``"smallest"`` (paper), or as controls ``"largest"`` and ``"random"``, whose entries are never chosen
            again.
        rank_weight: :math:`\lambda`, at least 0. Code: 0.0005. Neutral: 0. Beyond 0.01 it holds entries at zero.
        rank_every_n_steps: The nuclear norm counts in every n-th step; a matrix of 1280 by 1280 takes tens of
            milliseconds.
        min_side: Matrices of two dimensions count whose smaller side is at least this. Code: 65.
        readjust_at: Share of the training, in (0, 1), after which the entries are chosen again among themselves;
            ``None`` for never. Paper: 0.5.
        layers: Patterns of names, of layers as in ``named_modules()`` (``"*.query"``) or of weights themselves
            (``"*.in_proj_weight"``). ``"auto"``: all linear, convolution and attention layers, and layers of other
            libraries whose ``weight`` multiplies the input, without weights shared with a layer of another kind and
            without routers of experts. Others of two dimensions or more by pattern only.
        train: Patterns of names of parameters, and of layers that hold them, that are trained as they are
            (``"classifier*"``, ``"*.bias"``). A new head belongs here.
        exclude: Patterns of names of layers and weights that stay as they are (``"lm_head"``).
        rest_norms: Whether batch norm that is not trained is in evaluation mode meanwhile; in PEFT it is not.
        save: ``"full"`` checkpoints are those of the plain module and the callback's state beside it; ``"delta"`` ones
            hold what was trained, buffers and a hash of all else, and load where the module begins with the same.
        name: Tells several instances in one Trainer apart; they must not share a weight.
        seed: Seed of the matrices that are drawn, and of random entries.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> sara = SaRA(fraction=0.1, train="classifier*")
        >>> trainer = Trainer(max_epochs=2, callbacks=[sara], logger=False, enable_checkpointing=False)

    """

    def __init__(
        self,
        fraction: float = 0.1,
        threshold: float | None = None,
        select: Literal["smallest", "largest", "random"] = "smallest",
        rank_weight: float = 5e-4,
        rank_every_n_steps: int = 1,
        min_side: int = 65,
        readjust_at: float | None = 0.5,
        layers: list[str] | str = "auto",
        train: list[str] | str | None = None,
        exclude: list[str] | str | None = None,
        rest_norms: bool = False,
        save: Literal["full", "delta"] = "full",
        name: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(name=name, seed=seed)
        check_number(self, "fraction", fraction, low=0, high=1, low_open=True)
        check_choice(self, "select", select, ("smallest", "largest", "random"))
        if threshold is not None and threshold != inf:
            check_number(self, "threshold", threshold, low=0, low_open=True)
        if threshold is not None and select == "random":
            raise ValueError(f"SaRA: `threshold` must be None with select='random', got {threshold}.")
        check_number(self, "rank_weight", rank_weight, low=0)
        check_number(self, "rank_every_n_steps", rank_every_n_steps, low=1, integer=True)
        check_number(self, "min_side", min_side, low=1, integer=True)
        check_number(self, "readjust_at", readjust_at, low=0, high=1, low_open=True, high_open=True, optional=True)
        check_bool(self, "rest_norms", rest_norms)
        check_choice(self, "save", save, ("full", "delta"))
        self.fraction, self.threshold, self.select, self.rank_weight = fraction, threshold, select, rank_weight
        self.rank_every_n_steps, self.min_side, self.readjust_at = rank_every_n_steps, min_side, readjust_at
        self.layers, self.train, self.exclude, self.save = layers, train, exclude, save
        self.rest_norms = rest_norms
        self.latents = Latents(frozen=True, own_decay=True)
        self._left: dict[str, list[str]] = {}
        self._matrices: list[str] = []
        self._sizes = ""
        self._theta = 0.0
        self._steps: dict[str, int] = {}
        self._chosen_again: list[str] = []
        self._readjust_after = 0

    @override
    def describe(self) -> str:
        share = f"{100 * self.fraction:g} %" if self.threshold is None else f"below {self.threshold:g}"
        share = f"above {self.threshold:g}" if self.threshold is not None and self.select == "largest" else share
        again = f", chosen again at {self.readjust_at:g} of the training" if self._readjusts else ""
        of = f" of one in {len(self._matrices)} matrices" if self._sizes else ""
        rank = f", nuclear norm{of} by {self.rank_weight:g}" if self.rank_weight else ""
        left = "".join(f"; left alone, {why}: {names_said(names)}" for why, names in self._left.items())
        sizes = f"; {self._sizes}" if self._sizes else ""
        return f"the {self.select} {share}{again}{rank}, layers {self.layers}{sizes}{left}"

    @property
    def _readjusts(self) -> bool:
        return self.readjust_at is not None and self.select == "smallest"

    @override
    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._readjust_after = 0
        if self.readjust_at is None or not self._readjusts:
            return
        total = trainer.estimated_stepping_batches
        if not isfinite(total) or total < 0:
            raise MisconfigurationException(
                "SaRA chooses its entries again at a share of the training, whose length is not known. Give the"
                " Trainer `max_steps`, or write readjust_at=None."
            )
        self._readjust_after = max(1, round(self.readjust_at * total))

    @property
    def found_threshold(self) -> float:
        """The threshold of this training; 0 before it, and where entries are drawn by chance."""
        return self._theta

    @override
    def is_active(self, step: "Step") -> bool:
        return bool(self.rank_weight) or super().is_active(step)

    @override
    def penalty(self, module: "LightningModule") -> Tensor | None:
        steps = max(self._steps.values(), default=0)
        names = [name for name in self._matrices if name in self.latents.own]
        if not self.rank_weight or not names or steps % self.rank_every_n_steps:
            return None
        draw = torch.Generator().manual_seed(self.derived_seed(f"matrix of step {steps}"))
        name = names[int(torch.randint(len(names), (), generator=draw))]
        entries = self.latents.own[name]["entries"]
        shape = self.latents.shapes[name]
        matrix = entries.new_zeros(shape[0] * shape[1]).index_copy(0, self._trained(name).long(), entries)
        return self.rank_weight * nuclear_norm(matrix.view(shape))

    def _trained(self, name: str) -> Tensor:
        """Positions of the entries that are trained, which stand before those that were."""
        return self.latents.index[name][: len(self.latents.own[name]["entries"])]

    # -- the map ------------------------------------------------------------------------------------------------------

    @override
    def weights_to_map(self, module: nn.Module) -> list[str]:
        chosen, weights = self.choose_numbers(module, "train"), named_weights(module)
        self._matrices = [n for n in chosen if weights[n].dim() == 2 and min(weights[n].shape) >= self.min_side]
        return chosen

    @override
    def begin_map(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        self._steps, self._chosen_again = {}, []
        self._theta = self._threshold_of(list(weights.values()))
        values = {}
        for name, weight in weights.items():
            values[name] = self.latents.take(name, weight, positions_of(self._mask(name, weight)))
            kind = torch.promote_types(weight.dtype, torch.float32)
            self.latents.own[name] = {"entries": values[name].to(kind, copy=True).requires_grad_()}
        if not self.latents.size:
            raise MisconfigurationException(
                f"SaRA: no entry of the {len(weights)} chosen weights is to be trained: none is"
                f" {'above' if self.select == 'largest' else 'below'} {self._theta:g}. Write another `threshold`; where"
                " many entries are zero, a share of the smallest ends among these."
            )
        return values

    def _threshold_of(self, weights: Sequence[Tensor]) -> float:
        if self.select == "random":
            return 0.0
        if self.threshold is not None:
            return self.threshold
        return magnitude_threshold(weights, self.fraction if self.select == "smallest" else 1 - self.fraction)

    def _mask(self, name: str, weight: Tensor) -> Tensor:
        if self.select == "random":
            draw = torch.Generator().manual_seed(self.derived_seed(f"entries of {name}"))
            return (torch.rand(weight.shape, generator=draw) < self.fraction).to(weight.device)
        small = small_masks({name: weight}, self._theta)[name]
        return ~small if self.select == "largest" else small

    @override
    def latents_of(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        for name, weight in weights.items():
            self.latents.own[name]["entries"].copy_(entries_of(weight, self._trained(name)))
        return {name: self.latents.values[name] for name in weights}

    @override
    def map_weights(self, latents: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            write_entries_(weight, self._trained(name), self.latents.own[name]["entries"])
            if 0 < self._readjust_after <= self._steps.get(name, 0) and name not in self._chosen_again:
                self._choose_again(name)  # the last values of those that end here are in the weight now

    def _choose_again(self, name: str) -> None:
        entries = self.latents.own[name]["entries"].detach()
        still = self._mask(name, entries)
        order = torch.argsort(~still, stable=True)
        self.latents.index[name] = self.latents.index[name][order]
        self.latents.values[name] = self.latents.values[name][order]
        self.latents.own[name] = {"entries": entries[still].requires_grad_()}
        self.latents.forget_moments(name)
        self._chosen_again.append(name)

    @override
    def pull_back(
        self, latents: Mapping[str, Tensor], weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
    ) -> None:
        for name, gradient in gradients.items():
            self.latents.add_gradients(name, {"entries": entries_of(gradient, self._trained(name))})

    @override
    def follow_step(self, names: Sequence[str]) -> None:
        for name in names:
            self._steps[name] = self._steps.get(name, 0) + 1

    # -- what is logged, and state ------------------------------------------------------------------------------------

    @override
    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not host.is_logging_step(trainer) or not self.latents.own:
            return
        scalars: dict[str, Any] = {"trained": float(self.latents.size)}
        if self.select == "smallest":
            entries = {name: parts["entries"].detach() for name, parts in self.latents.own.items()}
            below = torch.stack([mask.sum() for mask in small_masks(entries, self._theta).values()]).sum()
            scalars["below"] = below / max(1, self.latents.size)
        attached_engine(trainer).log_own(self, scalars)

    @override
    def state_dict(self) -> dict[str, Any]:
        own = {"threshold": self._theta, "steps": dict(self._steps), "chosen_again": list(self._chosen_again)}
        return own | self.latents.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._theta, self._steps = state_dict["threshold"], dict(state_dict["steps"])
        self._chosen_again = list(state_dict["chosen_again"])
        self.latents.load_state_dict(state_dict)
