"""OnePrompt: one set of prefix prompts for the attention layers of a vision transformer, for all tasks."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.continual.ovor.core import prefix_rows
from lightning_reg.engine.host.arguments import check_number
from lightning_reg.engine.host.errors import MisconfigurationException, check_patterns
from lightning_reg.engine.host.names import as_patterns, matches, plain_name
from lightning_reg.engine.layers.named import named_layers
from lightning_reg.engine.run.phases import Member, phases_of
from lightning_reg.engine.technique import LayerTechnique, ModuleTechnique

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.layers.edits import InputCall, LayerCall
    from lightning_reg.engine.step import Stage, Step

__all__ = ["OnePrompt"]

# What makes queries, keys and values in one, or keys and values, in layers of timm and transformers.
_MAKERS = (("qkv",), ("k_proj", "v_proj"), ("key", "value"))


class _Prefix(nn.Module):
    """Keys and values that stand before those of the tokens.

    Args:
        length: How many of each.
        widths: Width of a key, and of a value: all heads together.

    """

    def __init__(self, length: int, widths: tuple[int, int]) -> None:
        super().__init__()
        self.key = nn.Parameter(torch.rand(length, widths[0]))
        self.value = nn.Parameter(torch.rand(length, widths[1]))


class OnePrompt(ModuleTechnique, LayerTechnique):
    r"""Adapts a frozen vision transformer by prefixes of its attention, the same for all samples and all tasks.

    In the first attention layers, learned keys and values :math:`p_K, p_V` stand before those of the tokens:

    .. math:: \operatorname{softmax}\Bigl(\tfrac{1}{\sqrt d}\, Q\, [p_K; K]^\top\Bigr)\, [p_V; V]

    The prompts and what ``trained`` names are trained, all other weights are frozen for the time of the fit. The class
    of your network stays as it is, the prompts are in none of its keys, and they act in validation, test and prediction
    too. One prompt for all tasks needs neither a pool, nor a query by a second forward pass.

    Use it for class-incremental training of a pre-trained transformer, with :class:`VirtualOutliers` for the head. Keep
    the object from fit to fit: a further fit goes on with its prompts, and the optimizer knows nothing of them. Leave
    it for networks that are no transformers, or where all weights are to move. A prompted layer costs a query for each
    key that stands before the tokens, and their share of the attention.

    Hosts: attention with ``qkv`` in one layer (timm), or with ``k_proj`` and ``v_proj``, or ``key`` and ``value``
    (transformers), that gets tokens ``(B, T, D)`` without a mask.

    Source:
        Huang et al., "OVOR: OnePrompt with Virtual Outlier Regularization for Rehearsal-Free Class-Incremental
        Learning", ICLR 2024, arXiv 2402.04129; lengths and initial values by the authors' code, jpmorganchase/ovor.

    Differs:
        Where a network normalizes keys (``qk_norm``), the prompts' keys are normalized too.

    Args:
        trained: Shell patterns of names of the module's weights that are trained beside the prompts; paper: the head
            (``"*head*"``). ``None``: what you have left trainable.
        lengths: Of the first attention layers, in the order of the network: how many keys and values together, each
            even and at least 0. Paper: 10, 10, 40, 40, 40. Neutral: none, ``[]``.
        layers: Shell patterns of names of the attention layers to choose from. ``None``: all that are found.
        lr_factor: Learning rate, as a multiple of that of the optimizer's first group, at least 0.
        weight_decay: Weight decay of the prompts, at least 0. Paper: 0.
        own_optimizer: Position of the optimizer that trains them, if there are several.
        name: Tells several instances in one Trainer apart.
        seed: Seed of the initial values, uniform in [0, 1).

    Attributes:
        own: Their place; ``own["model.blocks.0.attn"].key`` is one of them.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> prompt = OnePrompt(trained="model.head*")
        >>> trainer = Trainer(max_epochs=50, callbacks=[prompt], logger=False, enable_checkpointing=False)

    """

    in_any_mode: ClassVar[bool] = True  # a frozen network is in evaluation mode, as from_pretrained gives it

    def __init__(
        self,
        trained: list[str] | str | None = None,
        lengths: Sequence[int] = (10, 10, 40, 40, 40),
        layers: list[str] | str | None = None,
        lr_factor: float = 1.0,
        weight_decay: float = 0.0,
        own_optimizer: int | None = None,
        name: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(name=name, seed=seed)
        if not isinstance(lengths, Sequence):
            raise ValueError(f"OnePrompt: `lengths` must be a list of whole numbers, got {lengths!r}.")
        for length in lengths:
            check_number(self, "lengths", length, low=0, integer=True)
            if length % 2:
                raise ValueError(f"OnePrompt: `lengths` must be even, keys and values together, got {length}.")
        self.train_own(lr_factor, weight_decay, own_optimizer)
        self.trained, self.lengths, self.layers = trained, list(lengths), layers
        self.lr_factor, self.weight_decay = lr_factor, weight_decay
        self.stages: frozenset[Stage] = frozenset({"train", "validate", "test", "predict"} if any(lengths) else ())
        self._frozen: list[str] = []
        self._places: dict[str, str] = {}  # layers that make keys or values, with the attention layer they are in

    @override
    def describe(self) -> str:
        if not any(self.lengths):
            return "no prompts: inactive"
        counts = ", ".join(str(length // 2) for length in self.lengths)
        chosen = "" if self.layers is None else f" among {', '.join(as_patterns(self.layers))}"
        beside = "what you have left trainable" if self.trained is None else ", ".join(as_patterns(self.trained))
        said = f"{counts} keys and values before those of the first {len(self.lengths)} attention layers{chosen}"
        return f"{said}; trained beside them: {beside}"

    @override
    def conflict_with(self, other: Member) -> str | None:
        if any(self.lengths) and self.trained is not None and {"map_weights", "edit_weights"} & {*phases_of(other)}:
            return (
                f"with `trained` it freezes the weights that {type(other).__name__} trains or changes. Leave out"
                " `trained`, and say by `requires_grad` what is to be trained."
            )
        if not isinstance(other, OnePrompt) or not any(self.lengths) or not any(other.lengths):
            return None
        return "each makes room before the same tokens. One of them with longer `lengths` does what two would do."

    @override
    def is_active(self, step: "Step") -> bool:
        return any(self.lengths)

    @override
    def prepare_model(self, module: "LightningModule") -> None:
        if self.trained is None or not any(self.lengths):
            return
        named = {plain_name(name): p for name, p in module.named_parameters()}
        check_patterns(self, "trained", self.trained, named, "parameter")
        self._frozen = [name for name, p in named.items() if p.requires_grad and not matches(name, self.trained)]
        for name in self._frozen:
            named[name].requires_grad = False

    @override
    def teardown(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        self._thaw(pl_module)

    @override
    def on_exception(self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException) -> None:
        self._thaw(pl_module)

    @override
    def own_modules(self, module: "LightningModule") -> "Mapping[str, nn.Module]":
        layers = named_layers(module)
        new: dict[str, nn.Module] = {}
        for name, length in self._chosen(module).items():
            made_by = [layers[f"{name}.{maker}"] for maker in _makers(layers[name])]
            widths = [int(maker.out_features) for maker in made_by]  # type: ignore[arg-type]  # linear layers
            both = (widths[0] // 3,) * 2 if len(widths) == 1 else (widths[0], widths[1])
            new[name] = _Prefix(length // 2, both)
        return self.own.modules if _shapes(new) == _shapes(self.own.modules) else new

    @override
    def inputs_to_edit(self, module: nn.Module) -> "Sequence[str]":
        return list(self._chosen(module))

    @override
    def edit_inputs(self, call: "InputCall") -> "tuple[tuple[Any, ...], Mapping[str, Any]] | None":
        tokens = call.input
        others = [value for value in (*call.args, *call.named.values()) if value is not tokens]
        if not isinstance(tokens, Tensor) or tokens.dim() != 3 or any(isinstance(one, Tensor) for one in others):
            found = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            beside = " and further tensors" if any(isinstance(one, Tensor) for one in others) else ""
            raise MisconfigurationException(
                f"OnePrompt: the attention layer {call.name!r} gets {found}{beside}. Keys can stand before those of"
                " tokens (B, T, D) that come without masks or positions. Choose other `layers`."
            )
        if call.step.stage == "train" and call.step.is_logging:
            with torch.no_grad():
                call.step.log(self, "norm", torch.cat([p.flatten() for p in self.own.parameters.values()]).norm())
        room = tokens.new_zeros(len(tokens), self._prefix(call).key.shape[0], tokens.shape[2])
        return call.with_input(torch.cat([room, tokens], dim=1))

    @override
    def features_to_edit(self, module: nn.Module) -> "Sequence[str]":
        layers, chosen = named_layers(module), list(self._chosen(module))
        self._places = {f"{name}.{maker}": name for name in chosen for maker in _makers(layers[name])}
        return [*self._places, *chosen]

    @override
    def edit_features(self, call: "LayerCall") -> Any:
        prefix = self._prefix(call)
        if call.name not in self._places:
            return _without_first(call.output, len(prefix.key), call.input.shape[1])
        rows: Tensor = call.output
        made = call.name.rpartition(".")[2]
        if made == "qkv":
            query = prefix.key.new_zeros(len(prefix.key), rows.shape[2] - prefix.key.shape[1] - prefix.value.shape[1])
            return prefix_rows(rows, torch.cat([query, prefix.key, prefix.value], dim=1))
        return prefix_rows(rows, prefix.key if made in ("k_proj", "key") else prefix.value)

    def _thaw(self, module: nn.Module) -> None:
        frozen, self._frozen = {*self._frozen}, []
        for name, parameter in module.named_parameters():
            if plain_name(name) in frozen:
                parameter.requires_grad = True

    def _chosen(self, module: nn.Module) -> dict[str, int]:
        """Attention layers that get a prompt, in the order of the network, with the prompt's length."""
        found = [name for name, layer in named_layers(module).items() if _makers(layer)]
        if self.layers is not None:
            check_patterns(self, "layers", self.layers, found, "attention layer")
            found = [name for name in found if matches(name, self.layers)]
        if len(found) < len(self.lengths):
            raise MisconfigurationException(
                f"OnePrompt(lengths={self.lengths}) prompts the first {len(self.lengths)} attention layers, and"
                f" {type(module).__name__} has {len(found)} whose keys and values can be told ({found}): layers with"
                " `qkv`, with `k_proj` and `v_proj`, or with `key` and `value`. Shorten `lengths`."
            )
        return {name: length for name, length in zip(found, self.lengths, strict=False) if length}

    def _prefix(self, call: "InputCall | LayerCall") -> _Prefix:
        name, module = self._places.get(call.name, call.name), call.step.module
        missing = f"there is no prompt for {name!r}"
        prefix = self.own.trained(name, partial(self.own_modules, module), module.device, "OnePrompt", missing)
        return cast("_Prefix", prefix)


def _makers(layer: nn.Module) -> tuple[str, ...]:
    """Names of the layers in it that make keys and values; none where it is no attention layer."""
    there = dict(layer.named_children())
    return next((m for m in _MAKERS if all(hasattr(there.get(name), "out_features") for name in m)), ())


def _shapes(modules: "Mapping[str, nn.Module]") -> dict[str, list[torch.Size]]:
    return {name: [p.shape for p in module.parameters()] for name, module in modules.items()}


def _without_first(output: object, count: int, tokens: int) -> object:
    """What an attention layer returned, without the rows of the placeholders: of tokens, and of queries in its maps."""
    if isinstance(output, tuple):
        return tuple(_without_first(one, count, tokens) for one in output)
    if not isinstance(output, Tensor):
        return output
    if output.dim() == 4 and output.shape[2] == tokens:
        return output[:, :, count:]
    return output[:, count:] if output.dim() == 3 and output.shape[1] == tokens else output
