"""ALLoRA: low-rank fine-tuning whose rows learn fast at zero and slow down as they grow; and LoRA, rsLoRA, LoRA+."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_bool, check_choice, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.run.engine import attached_engine
from lightning_reg.engine.weights.factors import Factors, Layout, product, pulled_back, write_product_
from lightning_reg.engine.weights.latents import Latents
from lightning_reg.engine.weights.summed import names_said, summed_weights
from lightning_reg.engine.weights.swap import named_weights
from lightning_reg.finetuning._choice import FineTuning, trained_as_they_are
from lightning_reg.finetuning.allora._choice import layouts_for, starting_factors
from lightning_reg.finetuning.allora.core import allora_row_scale, low_rank_factor, low_rank_norm, new_low_rank

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["ALLoRA"]


class ALLoRA(FineTuning):
    r"""Low-rank fine-tuning without dropout and without a scaling factor: each row has a learning rate by its norm.

    Each chosen weight, as a matrix of outputs by inputs, is :math:`W = W_0 + BA` with :math:`W_0` frozen, and only the
    factors are trained. The gradient that reaches them through output row i is multiplied by

    .. math:: s_i = 1 / \sqrt{\lVert (BA)_i \rVert + 1/\eta^2},

    so a row at zero, where all begin, learns :math:`\eta` times faster. ``scale="fixed"`` is plain LoRA and
    ``scale="rank"`` rsLoRA, with ``b_lr_factor`` also LoRA+.

    The module stays the user's: no layer is wrapped, no key renamed, and the parameter holds W at all times, so
    validation, checkpoints and exports are those of an ordinary network and nothing is merged at the end. Of a linear,
    convolution or embedding layer the factors get their gradients at the layer, and nothing of the weight's size is
    made; of other weights (shared ones, attention's ``in_proj_weight``, stacked experts), and beside techniques that
    act on weights, the weight's own gradient is turned into theirs. The table at the start says which. Terms of yours
    may read such a weight in any step. All other parameters are frozen unless ``train`` names them. Factors and their
    moments are float32 in every precision, and W is rounded once.

    Use it for short fine-tuning, with optimizers like SGD. An Adam divides by the size of each entry's gradient, which
    cancels a row's factor: there ``mode="update"`` scales what the optimizer did. Leave it to PEFT to train on
    quantised weights, under FSDP, or to serve many adapters of one network.

    Source:
        Huang and Balestriero, "ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws", 2024, arXiv 2410.09692,
        section 4.2. LoRA: arXiv 2106.09685; rsLoRA: arXiv 2312.03732; LoRA+: arXiv 2402.12354.

    Differs:
        W is one weight and no branch beside the layer, which gives the same gradients. ``mode="update"`` is an
        addition. The paper's optimizer, layers and first factors were not found: A is uniform as in LoRA, B zero.
        The ablated output-dependent scales are left out.

    Memory: one copy of the chosen weights, in their own type (4 bytes a number in float32, 2 in bfloat16), on their
    device or with ``keep_on="cpu"`` off it; r (out + in) float32 numbers of factors for a weight, 4 bytes each, as many
    of gradients and what the optimizer keeps of them (8 bytes a number for Adam). With several processes only factors
    are averaged.

    Args:
        layers: Patterns of names, of layers as in ``named_modules()`` (``"*.query"``) or of weights themselves
            (``"*.in_proj_weight"``). ``"auto"``: all linear, convolution and attention layers, and layers of other
            libraries whose ``weight`` multiplies the input, without weights shared with a layer of another kind and
            without routers of experts. Embeddings and stacks of experts ``(E, out, in)`` by pattern only.
        rank: r, at least 1; in a smaller weight its smaller side. Paper: 4 to 64.
        scale: ``"row"`` (paper), ``"fixed"`` (LoRA: alpha/r) or ``"rank"`` (rsLoRA: alpha/sqrt(r)).
        eta: Multiplier of the learning rate of a row at zero, above 0. Paper: its square is 1, 2 or 4.
        alpha: Scaling of LoRA and rsLoRA, above 0; ``None`` for r. Not with ``"row"``, which has none.
        mode: Where a row is scaled: ``"grad"`` (paper), or ``"update"``, the change of B in the optimizer's step.
        b_lr_factor: Learning rate of B as a multiple of that of A, at least 0. LoRA+: 16. Neutral: 1.
        train: Patterns of names of parameters, and of layers that hold them, that are trained as they are:
            (``"classifier*"``, ``"*.bias"``, ``"*norm*"``). A new head belongs here. Neutral: ``"*"``.
        exclude: Patterns of names of layers and weights that get no factors (``"lm_head"``).
        rest_norms: Whether batch norm that is not trained is in evaluation mode meanwhile; in PEFT it is not.
        start: Folder of an adapter of PEFT's whose factors the training begins with, see :func:`from_peft`; ``None``
            for new ones.
        save: ``"full"`` checkpoints are those of the plain module and the callback's state beside it; ``"delta"`` ones
            hold what was trained, buffers and a hash of all else, and load where the module begins with the same.
        keep_on: Where the copy of the chosen weights lies: on their ``"device"``, or on the ``"cpu"``, from where each
            comes over once in a step of the optimizer.
        name: Tells several instances in one Trainer apart; they must not share a weight.
        seed: Seed of the first factors.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> allora = ALLoRA(layers=["*.query", "*.value"], rank=16, train="classifier*")
        >>> trainer = Trainer(max_epochs=2, callbacks=[allora], logger=False, enable_checkpointing=False)

    """

    is_product = True

    def __init__(
        self,
        layers: list[str] | str = "auto",
        rank: int = 8,
        scale: Literal["row", "fixed", "rank"] = "row",
        eta: float = 2.0,
        alpha: float | None = None,
        mode: Literal["grad", "update"] = "grad",
        b_lr_factor: float = 1.0,
        train: list[str] | str | None = None,
        exclude: list[str] | str | None = None,
        rest_norms: bool = False,
        start: str | None = None,
        save: Literal["full", "delta"] = "full",
        keep_on: Literal["device", "cpu"] = "device",
        name: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(name=name, seed=seed)
        check_number(self, "rank", rank, low=1, integer=True)
        check_choice(self, "scale", scale, ("row", "fixed", "rank"))
        check_number(self, "eta", eta, low=0, low_open=True)
        if alpha is not None:
            check_number(self, "alpha", alpha, low=0, low_open=True)
            if scale == "row":
                raise ValueError(f"ALLoRA: `alpha` must be None with scale='row', which has no factor, got {alpha}.")
        check_choice(self, "mode", mode, ("grad", "update"))
        check_number(self, "b_lr_factor", b_lr_factor, low=0)
        check_bool(self, "rest_norms", rest_norms)
        check_choice(self, "save", save, ("full", "delta"))
        check_choice(self, "keep_on", keep_on, ("device", "cpu"))
        self.layers, self.rank, self.scale, self.eta, self.alpha = layers, rank, scale, eta, alpha
        self.mode, self.b_lr_factor, self.train, self.exclude = mode, b_lr_factor, train, exclude
        self.rest_norms, self.start, self.save, self.keep_on = rest_norms, start, save, keep_on
        self.latents = Latents(lr_factor={"B": b_lr_factor}, frozen=True, on_cpu=keep_on == "cpu")
        self._layouts: dict[str, Layout] = {}
        self._tables: set[str] = set()
        self._left: dict[str, list[str]] = {}
        self._trained: list[str] = []
        self._sizes = ""
        self._scales: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}

    @override
    def describe(self) -> str:
        scales = {
            "row": f"row scale, eta={self.eta:g}, in the {'gradient' if self.mode == 'grad' else 'update'}",
            "fixed": f"LoRA, alpha={self.rank if self.alpha is None else self.alpha:g}",
            "rank": f"rsLoRA, alpha={self.rank if self.alpha is None else self.alpha:g}",
        }
        plus = f", B at {self.b_lr_factor:g} of the learning rate" if self.b_lr_factor != 1 else ""
        weights = f"; {self._sizes}" if self._layouts else ""
        left = "".join(f"; left alone, {why}: {names_said(names)}" for why, names in self._left.items())
        return f"rank {self.rank}, {scales[self.scale]}{plus}, layers {self.layers}{weights}{left}"

    @override
    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        adams = [
            type(optimizer).__name__ for optimizer in trainer.optimizers if "adam" in type(optimizer).__name__.lower()
        ]
        if adams and self.scale == "row" and self.mode == "grad":
            host.rank_zero_warn(
                f"ALLoRA(mode='grad') scales gradients by rows, and {adams[0]} divides by their size, which cancels"
                " that but for the first steps. Write mode='update', or scale='fixed' for plain LoRA."
            )

    @property
    def product_factor(self) -> float:
        """What the product of both factors is multiplied by: 1, alpha/r or alpha/sqrt(r)."""
        return low_rank_factor(self.scale, self.rank, self.alpha)

    @property
    def trained_beside(self) -> list[str]:
        """Names of the parameters that were trained as they are."""
        return list(self._trained)

    # -- the map ------------------------------------------------------------------------------------------------------

    @override
    def weights_to_map(self, module: nn.Module) -> list[str]:
        trained = trained_as_they_are(self, module, self.train)
        self._trained = sorted(trained)
        names, self._left = summed_weights(self, module, self.layers, self.exclude, "adapt", any_matrix=True)
        chosen = [name for name in names if name not in trained]
        self._layouts, self._tables = layouts_for(self, module, chosen)
        weights = named_weights(module)
        shapes = [self._layouts[name].matrix(weights[name]).shape for name in chosen]
        size = sum(prod(s[:-2]) * min(self.rank, *s[-2:]) * (s[-2] + s[-1]) for s in shapes)
        beside, frozen = len(trained - set(chosen)), len(weights.keys() - trained - set(chosen))
        self._sizes = f"{len(chosen)} weights by {size:,} numbers; {beside} parameters as they are, {frozen} frozen"
        self._sizes += self.norms_said(module, trained)
        return chosen

    @override
    def begin_map(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        given = {} if self.start is None else starting_factors(self, self.start, weights, self.product_factor)
        for name, weight in weights.items():
            shape = self._layouts[name].matrix(weight).shape
            generator = torch.Generator().manual_seed(self.derived_seed(f"factors of {name}"))
            rank = min(self.rank, *shape[-2:])
            new = new_low_rank(tuple(shape), rank, generator, table=name in self._tables)
            both = given.get(name, new)
            kind = torch.promote_types(weight.dtype, torch.float32)
            left, right = (factor.to(weight.device, kind).requires_grad_() for factor in both)
            self.latents.own[name] = {"B": left, "A": right}
        return {name: weight.clone() for name, weight in weights.items()}

    @override
    def latents_of(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {name: (weight - self._delta(name, weight)).to(weight.dtype) for name, weight in weights.items()}

    def _delta(self, name: str, weight: Tensor) -> Tensor:
        return self._layouts[name].weight(product(self._factors(name)), weight.shape)

    @override
    def map_weights(self, latents: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            write_product_(weight, latents[name], self._factors(name), self._layouts[name])

    def _factors(self, name: str) -> Factors:
        left, right = self.latents.own[name]["B"], self.latents.own[name]["A"]
        in_gradient = self.scale == "row" and self.mode == "grad"
        return Factors(left, right, self.product_factor, self._scales.get(name) if in_gradient else None)

    @override
    @torch.no_grad()
    def factors_of(self, name: str) -> Factors:
        left, right = self.latents.own[name]["B"], self.latents.own[name]["A"]
        if self.scale == "row":
            scale = allora_row_scale(left, right, self.eta)
            held = self._scales.get(name)
            if held is not None and held.device == scale.device:
                held.copy_(scale)  # the same tensor, to which compiled code holds on
            else:
                self._scales[name] = scale
            if self.mode == "update":
                self._before[name] = left.detach().clone()
        return self._factors(name)

    @override
    def pull_back(
        self, latents: Mapping[str, Tensor], weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
    ) -> None:
        for name, gradient in gradients.items():
            left, right = pulled_back(self._layouts[name].matrix(gradient), self._factors(name))
            self.latents.add_gradients(name, {"B": left, "A": right})

    @override
    def follow_step(self, names: Sequence[str]) -> None:
        for name in names if self._before else ():
            left, before = self.latents.own[name]["B"], self._before[name]
            left.sub_(before).mul_(self._scales[name].unsqueeze(-1)).add_(before)

    # -- what is logged, and state ------------------------------------------------------------------------------------

    @override
    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not host.is_logging_step(trainer) or not self.latents.own:
            return
        norms = [low_rank_norm(parts["B"], parts["A"]) for parts in self.latents.own.values()]
        scalars = {"norm": self.product_factor * torch.stack(norms).square().sum().sqrt()}
        if self._scales:
            scalars["scale"] = torch.stack([scale.mean() for scale in self._scales.values()]).mean()
        attached_engine(trainer).log_own(self, scalars)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"rank": self.rank, **self.latents.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["own"] and state_dict["rank"] != self.rank:
            raise MisconfigurationException(
                f"ALLoRA(rank={self.rank}): the checkpoint is of a training with rank={state_dict['rank']}. Go on with"
                " that, or train without `ckpt_path` from its weights."
            )
        self.latents.load_state_dict(state_dict)
