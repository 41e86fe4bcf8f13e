"""N:M sparsity whose constraint comes in gradually: MdGf and SdGf, with SR-STE, STE and one-shot pruning."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_bool, check_choice, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.names import as_patterns
from lightning_reg.engine.run import passes
from lightning_reg.engine.run.engine import attached_engine
from lightning_reg.engine.technique import WeightMapTechnique, WeightTechnique
from lightning_reg.engine.weights.swap import named_weights
from lightning_reg.sparsity.nm_sparsity._layers import Choice, Weight, check_apart, check_groups, weights_table
from lightning_reg.sparsity.nm_sparsity._network import SparseNetwork, change_gradient_, put_back_pruned_
from lightning_reg.sparsity.nm_sparsity._permute import Probe, permute_network_, weights_in_bar
from lightning_reg.sparsity.nm_sparsity._schedule import (
    NEVER,
    Schedule,
    check_phases,
    length_of_training,
    make_schedule,
    pattern_scalars,
    say_it_goes_back,
)
from lightning_reg.sparsity.nm_sparsity.core import apply_mask_
from lightning_reg.sparsity.nm_sparsity.report import SparsityReport

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

    from lightning_reg.engine.step import Step

__all__ = ["NMSparsity"]

_DENSE = Schedule("ste", NEVER, None, 0.0)


class NMSparsity(WeightTechnique):
    r"""N:M sparsity: of every M consecutive weights of the chosen layers N are left when training ends.

    Training is dense at first, then the constraint comes in by the recipe, then the final mask is fine-tuned. In each
    step :math:`W_\text{eff} = W \odot (\Phi + D\,(1 - \Phi))` stands in the parameter from the forward pass until the
    gradients are there; the mask :math:`\Phi` keeps the N largest magnitudes of each group of the dense W. The gradient
    with respect to :math:`W_\text{eff}` goes to W as it is, for kept and pruned entries alike (straight-through); the
    optimizer, clipping, weight decay and averages work on W. Groups lie along the reduction dimension: input features,
    or input channels at a fixed kernel position.

    ========================  ==========================================================================
    ``mdgf_linear``           :math:`D(j) = \max(1 - \beta j, 0)`, j in steps since the dense phase
    ``mdgf_exp``              :math:`D(j) = e^{-\beta j}`; the fine-tuning phase then has D = 0
    ``sdgf_stepwise``         D = 0; patterns M-1:M, M/2:M, M/4:M, ... N:M, for equally many steps each
    ``sdgf_geometric``        D = 0; patterns kN:kM, kN/2:kM/2, ... N:M
    ``srste``                 D = 0 and the pull :math:`\lambda_w (1 - \Phi) \odot W` on the gradient
    ``ste``                   D = 0
    ``one_shot``              the mask is chosen once, after the dense phase; pruned weights get no gradient
    ========================  ==========================================================================

    When training ends the weights are hardened: pruned ones are exactly zero in the module. From the moment that the
    final mask is in force, checkpoints hold N:M weights too, and beside them what is needed to go on exactly; those
    written with ``save_weights_only=True`` hold them alone, so that training cannot go on exactly from there. Files
    with averages of weights in them hold dense weights.

    Use it for 1:8 to 1:128 in feed-forward layers (MdGf) or 2:4 (SR-STE and plain STE do as well there). Training does
    not become faster; at inference some GPUs are faster with 2:4, and with no other pattern.

    Source:
        Bambhaniya et al., "Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers", CPAL 2025,
        arXiv 2402.04744; and the authors' code; SR-STE: Zhou et al., ICLR 2021; one-shot: NVIDIA's ASP.

    Differs:
        D falls to 1e-3 (exponential) or 0 (linear) after 70 % of the training unless ``beta`` is given. Phases are
        counted in optimizer steps and begin on time (the authors' fine-tuning begins an epoch late). Groups never reach
        into another row, and biases stay. SR-STE's pull joins once per optimizer step, whatever the accumulation.
        One-shot masks gradients before clipping, and multiplies by the mask where ASP overwrites the weights.

    Memory: a dense copy and one byte per sparse weight; in the checkpoint one bit. Masks are functions of the weights:
    ranks agree without communication. Where rows are split (``fully_shard``) all must call the methods below.

    Args:
        n: Weights kept in each group (N), 1 to ``m``. Neutral: ``m``.
        m: Length of a group (M). Paper: 4 to 128, a power of two.
        recipe: How the constraint comes in, see the table.
        layers: Shell patterns of names: of a weight, of its layer, or of a module around that, as in
            ``named_modules()``; ``"net.head"`` takes all weights in there, ``"*.fc[12]"`` those of all such layers.
            ``"auto"``: all linear, convolution and attention layers, and layers of other libraries whose 2-D
            ``weight`` multiplies the input (``Conv1D`` of transformers), but the first layer and the head, in the order
            in which the module registers them, and routers of experts (named ``router``, or ``gate`` with fewer outputs
            than inputs). Other parameters (stacked experts, recurrent ones) stay dense, as the
            table and :meth:`report` say.
        dim: ``"in"``: groups along input features or channels; ``"out"``: along output features or channels.
        beta: Rate of the decay per step, above 0. Paper: 2e-4 (linear), 1e-4 (exponential). ``None``: solved.
        dense_fraction: Share of the training that is dense, in [0, 1). Paper: 0.0125 to 0.1.
        finetune_fraction: Share of the training with the final mask, in [0, 1). Paper: 0.1 to 0.2.
        lambda_w: Pull of SR-STE on pruned weights, at least 0. Paper: 2e-4.
        geometric_k: First multiple of ``sdgf_geometric``, a power of two; halved for layers it does not fit. Paper: 16.
        grad: ``"ste"`` as published; ``"masked"`` multiplies gradients by :math:`\Phi + D\,(1 - \Phi)`.
        on_indivisible: ``"skip"`` leaves layers dense that the groups do not fit, and says so; or ``"error"``.
        permute: Whether input channels are permuted before training so that the masks keep more magnitude, where the
            traced layers allow it; the table at the start says where, or why not. For pretrained networks, once.
        harden_at_end: Whether pruned weights are set to zero in the module when training ends.
        exclude: Shell patterns of what stays dense, as for ``layers``.
        patterns: Other N and M for some layers: shell pattern to ``[n, m]``; the first that matches counts.
        dense_steps: Length of the dense phase in optimizer steps, in place of ``dense_fraction``.
        finetune_steps: Length of the last phase in optimizer steps, in place of ``finetune_fraction``.
        validate_hard_mask: Whether after each validation, which sees the weights of the moment, another one sees them
            with the mask of the target pattern, as if training ended there (and without averages that other callbacks
            put in). What the module logs is logged under ``reg/nm_sparsity/hard/...`` too. Costs a validation.
        refresh_every: Optimizer steps between two choices of the masks, at least 1. Paper: 1.
        log_layers: Whether each sparse weight is logged by its name too, on logging steps: ``flipped/<weight>``, the
            share of its entries whose mask changed, and ``kept_magnitude/<weight>``, the share of its magnitude that
            its mask keeps. ``lightning_reg.plots.masks_over_time`` draws them.
        name: Tells several instances in one Trainer apart; they must not share a layer.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> sparse = NMSparsity(1, 16, recipe="mdgf_exp", layers="*.mlp.fc[12]")
        >>> trainer = Trainer(max_epochs=350, callbacks=[sparse], logger=False, enable_checkpointing=False)

    """

    def __init__(
        self,
        n: int = 2,
        m: int = 4,
        recipe: Literal[
            "mdgf_linear", "mdgf_exp", "sdgf_stepwise", "sdgf_geometric", "srste", "ste", "one_shot"
        ] = "mdgf_exp",
        layers: str | list[str] = "auto",
        dim: Literal["in", "out"] = "in",
        beta: float | None = None,
        dense_fraction: float = 0.05,
        finetune_fraction: float = 0.15,
        lambda_w: float = 2e-4,
        geometric_k: int = 16,
        grad: Literal["ste", "masked"] = "ste",
        on_indivisible: Literal["error", "skip"] = "skip",
        permute: bool = False,
        harden_at_end: bool = True,
        exclude: list[str] | str | None = None,
        patterns: dict[str, list[int]] | None = None,
        dense_steps: int | None = None,
        finetune_steps: int | None = None,
        refresh_every: int = 1,
        validate_hard_mask: bool = False,
        log_layers: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.n, self.m, self.recipe, self.layers, self.dim = n, m, recipe, layers, dim
        self.beta, self.dense_fraction, self.finetune_fraction = beta, dense_fraction, finetune_fraction
        self.lambda_w, self.geometric_k, self.grad = lambda_w, geometric_k, grad
        self.on_indivisible, self.permute, self.harden_at_end = on_indivisible, permute, harden_at_end
        self.exclude, self.patterns = exclude, patterns
        self.dense_steps, self.finetune_steps, self.refresh_every = dense_steps, finetune_steps, refresh_every
        self.validate_hard_mask, self.log_layers = validate_hard_mask, log_layers
        chosen = as_patterns(exclude), dict(patterns or {})
        choice = Choice(n, m, dim, layers, *chosen, recipe, geometric_k, on_indivisible)
        self._check_arguments(choice)
        self._network = SparseNetwork(choice, self)
        self._schedule = _DENSE
        self._has_begun = False
        self._reset()

    def _check_arguments(self, choice: Choice) -> None:
        check_groups(self, choice)
        check_choice(self, "grad", self.grad, ("ste", "masked"))
        check_number(self, "beta", self.beta, low=0, low_open=True, optional=True)
        check_number(self, "lambda_w", self.lambda_w, low=0)
        for argument in ("permute", "harden_at_end", "validate_hard_mask", "log_layers"):
            check_bool(self, argument, getattr(self, argument))
        check_number(self, "refresh_every", self.refresh_every, low=1, integer=True)
        shares = {"dense_fraction": self.dense_fraction, "finetune_fraction": self.finetune_fraction}
        check_phases(self, shares, {"dense_steps": self.dense_steps, "finetune_steps": self.finetune_steps})
        if self.permute and self.dim == "out":
            raise ValueError(f'{type(self).__name__}: `permute` must be False with dim="out", got True.')

    def _reset(self) -> None:
        self._network.forget()
        self._pruned: dict[str, Any] = {}
        self._steps, self._step, self._factor, self._was_final = 0, 0, 1.0, False
        self._measures = True

    @override
    def describe(self) -> str:
        if self.n == self.m and not self.patterns:
            return f"{self.n}:{self.m} keeps all weights: inactive"
        said = f"{self.n}:{self.m} {self.recipe}, layers {self.layers}, dim={self.dim}"
        weights, schedule = self._network.weights, self._schedule
        said += f"; {len(self._network.sparse)} of {len(weights)} weights" if weights else ""
        if schedule != _DENSE:
            final = "the end" if schedule.final is None else f"step {schedule.final}"
            said += f"; dense until step {schedule.dense}, final mask from {final}"
            said += f", beta={schedule.beta:.3g}" if self.recipe.startswith("mdgf") else ""
        return said

    @override
    def check(self, trainer: "Trainer", module: "LightningModule") -> None:
        if any(getattr(callback, "save_weights_only", False) for callback in host.callbacks(trainer)):
            host.rank_zero_warn(
                "NMSparsity: a checkpoint callback has save_weights_only=True. Files written before the final mask is"
                " in force hold dense weights; `NMSparsity.harden(module)` makes them sparse after loading."
            )

    @override
    def weights_to_edit(self, module: nn.Module) -> list[str]:
        return self._network.choose(module)

    @override
    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        for other in host.callbacks(trainer):
            if isinstance(other, NMSparsity) and other is not self:
                check_apart(type(self).__name__, self._network.sparse, other._network.sparse)
            if isinstance(other, WeightMapTechnique) and other.maps_steps:
                self._check_steps_of(other, pl_module)
        self._schedule, self._has_begun = _DENSE, False  # in the sanity check

    def _check_steps_of(self, other: WeightMapTechnique, module: nn.Module) -> None:
        mapped = set(other.weights_to_map(module))
        shared = [weight.name for weight in self._network.sparse if weight.name in mapped]
        if shared:
            raise MisconfigurationException(
                f"{type(self).__name__} and {type(other).__name__} cannot stand together on {shared[0]!r}: masks are"
                " chosen for a weight, each step runs with another one there, and a product of factors has no zeros."
                " Exclude it in one of them, or give the layers that are exported to a training with masks."
            )

    @override
    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._has_begun = True
        self._network.masks.keep_own_rows(named_weights(pl_module))
        permuted: Mapping[str, object] = {}
        if host.batches_so_far(trainer) == 0:  # a new training, not a resumed or continued one
            self._reset()
            if self.permute:
                probe = Probe(trainer, pl_module, self)
                owner, shown = type(self).__name__, partial(weights_in_bar, trainer)
                permuted = permute_network_(pl_module, self._network.sparse, owner, probe.unchanged, shown)
        else:  # only now: callbacks that average load weights when they are restored
            put_back_pruned_(self._pruned, named_weights(pl_module))
            self._steps = self._steps or trainer.global_step  # joined a training under way
        self._pruned = {}
        # Not before: asking for the length sets up the loaders, and a loader that resumes must not be set up too early.
        dense, final = (self.dense_fraction, self.dense_steps), (self.finetune_fraction, self.finetune_steps)
        self._schedule = make_schedule(self.recipe, length_of_training(trainer), self.beta, dense, final)
        if self._schedule.factor(self._steps) > self._factor or (self._was_final and not self._is_final()):
            say_it_goes_back(self._factor, self._schedule.factor(self._steps))
        if trainer.is_global_zero and host.prints_summary(trainer):
            Console().print(weights_table(self._network.weights, self.describe(), permuted))

    @override
    def is_active(self, step: "Step") -> bool:
        self._step, self._measures = self._steps, step.is_logging or self.refresh_every > 1
        return bool(self._network.sparse) and self._schedule.factor(self._step) < 1.0

    @property
    @override
    def reorders_channels(self) -> bool:
        return self.permute

    @override
    def needs_whole_parameters(self) -> str | None:
        if self.dim == "out":
            return 'groups along dim="out" reach over many rows'
        transposed = next((weight.name for weight in self._network.sparse if weight.dim == "out"), None)
        if transposed is not None:
            return f"groups along the inputs of {transposed!r}, a weight of shape (in, out), reach over many rows"
        return "permute=True exchanges rows" if self.permute else None

    @override
    def weights_to_save(self, trainer: "Trainer", module: "LightningModule") -> "AbstractContextManager[None] | None":
        return self._network.hardened(module) if self._network.sparse and self._is_final() else None

    @override
    def edit_weights(self, weights: Mapping[str, Tensor]) -> None:
        factor = self._schedule.factor(self._step)
        if factor == 1.0 or self._network.is_hard:
            return
        refresh = self._network.masks.age >= self.refresh_every and self.recipe != "one_shot"
        patterns = {weight: now for weight, now in self._patterns_now().items() if weight.name in weights}
        masks = self._network.masks.choose(weights, patterns, refresh=refresh, measure=self._measures)
        for name, mask in masks.items():
            apply_mask_(weights[name], mask, factor)

    @override
    def on_before_optimizer_step(
        self, trainer: "Trainer", pl_module: "LightningModule", optimizer: "Optimizer"
    ) -> None:
        self._steps = self._step + 1  # once for a batch, whatever the number of optimizers
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        parameters = named_weights(pl_module)
        sparse = [w for w in self._network.sparse if id(parameters[w.name]) in owned]
        self._factor = self._schedule.factor(self._step)
        if not sparse or self._factor == 1.0:
            return
        self._network.masks.age += 1
        factor = self._factor if self.recipe == "one_shot" or self.grad == "masked" else 1.0
        pull = self.lambda_w if self.recipe == "srste" else 0.0
        for weight in sparse if factor < 1.0 or pull else ():
            change_gradient_(parameters[weight.name], self._network.masks[weight.name], factor=factor, pull=pull)

    @override
    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if host.is_logging_step(trainer) and self._network.sparse:
            self._log(pl_module)
        # A validation chooses masks for the next step, which then counts no flips, unlike that of a resumed run.
        self._step, self._measures = self._steps, True

    @override
    def on_validation_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        if self.validate_hard_mask and self._network.sparse and host.validates_in_fit(trainer):
            with self._network.hardened(pl_module):
                metrics = passes.validation_metrics(trainer, "NMSparsity: with the target mask")
            host.log_beside(trainer, {f"{self.log_key}/hard/{name}": value for name, value in metrics.items()})

    @override
    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        if self._network.sparse and self.harden_at_end and not self._is_final():
            host.rank_zero_warn(
                f"NMSparsity: training ended after {self._steps} steps, before the final mask was in force"
                f" (D = {self._factor:.3g}): hardening now changes the network's function. Train on, or write"
                " harden_at_end=False."
            )
        self.on_fit_end(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        # Again after `on_train_end`: another callback may have put its average in meanwhile.
        if self.harden_at_end and self._has_begun:
            self.harden(pl_module)

    def harden(self, module: nn.Module) -> None:
        """Sets pruned weights to zero, in place; once the final mask is in force this does not change the function.

        Args:
            module: The module, trained with this technique or not.

        """
        self._network.harden_(module)

    def verify(self, module: nn.Module) -> dict[str, tuple[float, int]]:
        """Whether the weights have the pattern.

        Args:
            module: The module.

        Returns:
            By name of the weight: share of weights that are not zero, number of groups with more than N of them.

        """
        return self._network.verify(module)

    def report(self, module: nn.Module) -> SparsityReport:
        """Shape, pattern, kept magnitude, zeros and FLOPs of every weight, also of those that stay dense, and why.

        Args:
            module: The module.

        Returns:
            A report to print through rich or to write as CSV.

        """
        return self._network.report(module)

    def packed_masks(self, module: nn.Module) -> dict[str, dict[str, Any]]:
        """The N:M masks of the module's weights, one bit per weight; see :func:`unpack_mask`.

        Args:
            module: The module.

        Returns:
            By name of the weight ``{"shape": [...], "bits": uint8}``.

        """
        return self._network.packed_masks(module)

    # -- state --------------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        last = {"steps": self._steps, "factor": self._factor, "final": self._is_final()}
        return {**last, **self._network.masks.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._reset()
        self._steps = self._step = state_dict["steps"]
        self._factor, self._was_final = state_dict["factor"], state_dict["final"]
        self._network.masks.load_state_dict(state_dict)
        self._pruned = state_dict.get("pruned", {})

    @override
    def on_save_checkpoint(self, trainer: "Trainer", pl_module: "LightningModule", checkpoint: dict[str, Any]) -> None:
        if self._network.sparse:
            state = checkpoint["callbacks"].setdefault(self.state_key, self.state_dict())
            state.update(self._network.state_of(pl_module, checkpoint["state_dict"], prune=self._is_final()))

    def _patterns_now(self) -> dict[Weight, tuple[int, int]]:
        return {weight: self._schedule.pattern(weight.patterns, self._step) for weight in self._network.sparse}

    def _is_final(self) -> bool:
        # Whether the last step that was made had the final mask: the weights have been trained with it.
        made = self._steps - 1
        return made >= 0 and self._schedule.is_final((w.patterns for w in self._network.sparse), made)

    def _log(self, module: "LightningModule") -> None:
        values = pattern_scalars(self._schedule.factor(self._step), self._patterns_now())
        flips = self._network.masks.flips(named_weights(module))
        if flips is not None:
            values["flips"] = flips.float()
        values |= self._network.layer_scalars(module) if self.log_layers else {}
        attached_engine(module.trainer).log_own(self, values)
