r"""Multi-sample dropout: several dropout masks on one pass through the backbone, and the mean of their losses."""

import hashlib
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.dropout.multi_sample_dropout._copies import Copies
from lightning_reg.dropout.multi_sample_dropout._plan import CopyPlan, LayerCopies
from lightning_reg.dropout.multi_sample_dropout.core import dropout_copies, kind_of, mask_shape
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_choice, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.names import near_names
from lightning_reg.engine.host.row_bits import global_rows, keep_mask
from lightning_reg.engine.layers.named import find_layer, named_layers
from lightning_reg.engine.loss.mixin import LossMixin
from lightning_reg.engine.run.phases import LOSS_PHASES, Member, phases_of
from lightning_reg.engine.technique import Technique

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.run.part import Part
    from lightning_reg.engine.step import Step

__all__ = ["MultiSampleDropout"]


class MultiSampleDropout(Technique):
    r"""Multi-sample dropout: what follows a dropout layer runs on M masks of one backbone pass; losses are averaged.

    .. math:: L = \frac1M \sum_j \frac1B \sum_b \ell\bigl(f(h_b \odot m_{jb}), y_b\bigr), \qquad
        m \in \{0, 1/(1 - p)\}

    The gradient is that of ordinary dropout in expectation, with 1/M of the variance that the masks cause. Per training
    step: the backbone once, M masks, one pass of the head with M * B rows, one loss, one backward. Validation, test and
    the trained network are those of ordinary dropout.

    The dropout layer is named. Later dropout modules get a mask per copy as well; functions (``F.dropout``) in the head
    draw from the global generator, for M * B rows. Your code sees B rows: the output of the outermost module around the
    layer is handed to it for the first copy, and the loss function is called with all of them (``outputs``, ``head``).
    Samples are the first dimension of what the layer gets; with another one first (time), the step is refused.
    What it computes from the output besides, an accuracy or a second term, is that of the first copy. Losses under any
    reduction are per sample, the mean over copies, so other techniques on the loss see B samples. Class scores, where
    one asks for them (ELR), are those of the mean prediction over the copies.

    Use it when dropout sits near the end of the network and what follows is cheap, with few steps or few data. Leave it
    where dropout is early or everywhere (M times the cost), inside blocks with residual connections around the dropout,
    and where there is none. Activation checkpoints go around layers without sampled dropout (the backbone); around
    sampled layers they are refused.

    Source:
        Inoue, "Multi-Sample Dropout for Accelerated Training and Better Generalization", 2019, arXiv 1905.09788; no
        code of the author's is known.

    Differs:
        One dropout layer where the paper has a dropout and a fully connected layer per sample with shared weights: the
        same function, as one matrix product. The masks belong to the rows of the global batch, so W ranks of batch b
        train as one process of batch W b does. The layer's own mask is drawn as ever and not used, so the global random
        state is that of the plain run. Diversity other than dropout, which an early version of the paper adds, is left
        out.

    Memory: M - 1 times the head's activations and a byte per feature, row and copy.

    Args:
        dropout: Name of the dropout layer, as in ``named_modules()`` (``"net.head.0"``): nn.Dropout, Dropout1d,
            Dropout2d, Dropout3d, AlphaDropout or FeatureAlphaDropout, with masks of its own kind.
        num_samples: Dropout samples M, at least 1. Paper: tried up to 64, gains flatten after about 8. Neutral: 1, the
            layer is left alone.
        p: Drop rate in its place, in [0, 1); ``None`` for the layer's own. Paper: tried 0.1 to 0.9. Larger M tolerates
            larger p. ``None`` with ``num_samples=1``.
        mode: ``"batched"``: one pass of the head with M * B rows; for losses of torch, and no batch normalization after
            the layer. ``"replay"``: the training step runs M times, the backbone once; for any loss, no other technique
            on the loss, automatic optimization. Batch normalization in the head then sees M batches.
        head: With ``"batched"``, the layer at whose output your code gets back B rows: the last one, if
            ``training_step`` calls several after the dropout. ``None``: the outermost module around the dropout layer.
        outputs: With ``"batched"``, what your code gets: the rows of the ``"first"`` copy, or of ``"all"``, M * B with
            copy j of row b at ``j * B + b``. ``"all"`` is needed where it works on the output before the loss.
        backbone: With ``"replay"``, the layer that runs in the first of the M runs only.
        name: Tells several instances in one Trainer apart.
        seed: Seed of the masks.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> dropout = MultiSampleDropout("net.head.0", num_samples=8)
        >>> trainer = Trainer(max_epochs=30, callbacks=[dropout], logger=False, enable_checkpointing=False)

    """

    def __init__(
        self,
        dropout: str,
        num_samples: int = 8,
        p: float | None = None,
        mode: Literal["batched", "replay"] = "batched",
        head: str | None = None,
        outputs: Literal["first", "all"] = "first",
        backbone: str | None = None,
        name: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(name=name, seed=seed)
        check_number(self, "num_samples", num_samples, low=1, integer=True)
        check_number(self, "p", p, low=0, high=1, high_open=True, optional=True)
        check_choice(self, "mode", mode, ("batched", "replay"))
        check_choice(self, "outputs", outputs, ("first", "all"))
        self.dropout, self.num_samples, self.p, self.mode = dropout, num_samples, p, mode
        self.head, self.outputs, self.backbone = head, outputs, backbone
        self._check_combination()

    def _check_combination(self) -> None:
        if self.p is not None and self.num_samples == 1:
            raise ValueError(
                "MultiSampleDropout: `p` must be None with num_samples=1, where the layer is left alone with its own"
                f" rate, got {self.p!r}."
            )
        if (self.mode == "replay") != (self.backbone is not None):
            raise ValueError(
                'MultiSampleDropout: `backbone` must name a layer with mode="replay" and be None otherwise, got'
                f" {self.backbone!r} with mode={self.mode!r}."
            )
        for argument, idle in (("head", self.head is None), ("outputs", self.outputs == "first")):
            if not idle and (self.mode == "replay" or (argument == "head" and self.outputs == "all")):
                raise ValueError(
                    f'MultiSampleDropout: `{argument}` must be left at its default with mode="replay", and `head` with'
                    f' outputs="all", got {getattr(self, argument)!r}.'
                )

    @override
    def describe(self) -> str:
        if self.num_samples == 1:
            return "num_samples=1: inactive"
        rate = "" if self.p is None else f", p={self.p:g}"
        how = f"{self.mode}, {self.backbone} once" if self.mode == "replay" else f"{self.mode}, {self.outputs} rows"
        return f"{self.num_samples} samples of {self.dropout}{rate}; {how}"

    @property
    @override
    def copies_rows(self) -> bool:
        return self.num_samples > 1

    @override
    def is_active(self, step: "Step") -> bool:
        return self.num_samples > 1

    @override
    def check(self, trainer: "Trainer", module: "LightningModule") -> None:
        if self.num_samples == 1:
            return
        if self.mode == "replay" and not module.automatic_optimization:
            raise MisconfigurationException(
                f"MultiSampleDropout runs `training_step` {self.num_samples} times for one optimizer step; with"
                " automatic_optimization=False each run would train. Let the copies be rows of one run."
            )
        if self.mode == "batched" and isinstance(module, LossMixin):
            raise MisconfigurationException(
                "MultiSampleDropout: the module computes its losses itself (LossMixin), for the rows it knows of, and"
                ' not for their copies. Pass `MultiSampleDropout(mode="replay", backbone="...")`.'
            )

    @override
    def conflict_with(self, other: Member) -> str | None:
        name = type(other).__name__
        if self.num_samples == 1:
            return None
        if isinstance(other, MultiSampleDropout) and other.num_samples > 1:
            return "each lets a part of the network run on several copies of the batch. Remove one of them."
        if self.mode == "replay" and (other.mixes != "none" or LOSS_PHASES.intersection(phases_of(other))):
            return (
                f"MultiSampleDropout runs the training step {self.num_samples} times, and {name} would act on the loss"
                " of each. Let the copies be rows of one run."
            )
        if "extra_views" in phases_of(other):
            return (
                f"{name} passes further views of the batch through the network beside it, and MultiSampleDropout lets a"
                " part of the network run on copies of the rows: which rows belong together is then not known. Remove"
                " one of them."
            )
        return None

    @override
    def parts(self, trainer: "Trainer", module: "LightningModule") -> "Sequence[Part]":
        if self.num_samples == 1:
            return ()
        way: Literal["rows", "passes"] = "rows" if self.mode == "batched" else "passes"
        plan = CopyPlan(self.num_samples, self.dropout, way, self.outputs, self.head, self.backbone)
        return [Copies(self, plan, module, self._layers, self._sample)]

    @override
    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._layers(pl_module)  # with num_samples=1 too, a wrong name is told

    def _layers(self, module: nn.Module) -> "Sequence[str]":
        layers = named_layers(module)
        if kind_of(find_layer(layers, self.dropout, "MultiSampleDropout")) is None:
            kinds = [name for name, layer in layers.items() if kind_of(layer)]
            raise MisconfigurationException(
                f"MultiSampleDropout: the layer {self.dropout!r} is a {type(layers[self.dropout]).__name__}, which is"
                f" none of torch's dropout modules. Near dropout layers: {near_names(self.dropout, kinds)}."
            )
        return [self.dropout, *(n for n, layer in layers.items() if kind_of(layer) and n != self.dropout)]

    def _sample(self, call: LayerCopies) -> Tensor | None:
        if not call.after and call.name != self.dropout:
            return None
        kind = kind_of(call.layer)
        p = self.p if self.p is not None and call.name == self.dropout else float(getattr(call.layer, "p", 0.0))
        batched = self.mode == "batched"
        copied = batched and call.after
        shape = None if kind is None else mask_shape(kind, call.input.shape)
        if kind is None or shape is None or p >= 1:
            raise MisconfigurationException(
                f"MultiSampleDropout: the layer {call.name!r} ({call.layer}) cannot be sampled on an input of shape"
                f" {tuple(call.input.shape)}: it must be a batch that the layer takes, and its rate below 1."
            )
        group = host.data_parallel_group(call.step.trainer)
        count = len(call.input) // self.num_samples if copied else len(call.input)
        rows = global_rows(count, call.input.device, group)
        copies = range(self.num_samples) if batched else range(call.run, call.run + 1)
        keep = keep_mask(self._seed_of(call), rows, copies, shape, p)
        return dropout_copies(call.input, keep, p, kind, copied=copied)

    def _seed_of(self, call: LayerCopies) -> int:
        base = self.generator(call.step, same_on_ranks=True).initial_seed()
        return int.from_bytes(hashlib.blake2b(f"{base} {call.number}".encode(), digest_size=8).digest(), "little") >> 1
