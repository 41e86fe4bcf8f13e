"""SyntheticUnknowns: image features of classes that have no images are made, and classified as well."""

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.engine.host import distributed
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_choice, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.names import plain_name
from lightning_reg.engine.host.row_bits import global_rows, keep_mask
from lightning_reg.engine.layers.embeddings import Pooling, class_numbers, pooled
from lightning_reg.engine.layers.named import find_layer, named_layers
from lightning_reg.engine.run.periods import Period
from lightning_reg.engine.technique import ModuleTechnique, StepTechnique
from lightning_reg.finetuning.ogen._statistics import ClassStatistics
from lightning_reg.finetuning.ogen.core import FeatureGenerator, nearest_classes, synthesis_losses

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.step import Step

__all__ = ["SyntheticUnknowns"]

Rows = Tensor | list[list[float]]


class SyntheticUnknowns(ModuleTechnique, StepTechnique):
    r"""Trains on made-up image features of classes that are known by their names alone.

    In a model that classifies by the product of an image's feature with an embedding for each class (CLIP, a cosine
    classifier), a small cross-attention makes features of one class out of those of the nearest others. It learns on
    the classes with images, each taken for unknown in turn, and with it features of the unknown classes are made, which
    join the loss:

    .. math:: \ell + w_{reg}\,\ell_{reg} + w_a\,\ell_a + \frac{w_b}{K} \sum_k \ell_{b,k} + \dots

    (``synthesis_losses`` in ``lightning_reg.functional`` has all of it). The generator is the technique's own and is
    trained by the user's optimizer; it is dropped after the fit. For a first share of the training it trains alone.

    Use it to fine-tune prompts of a model with many classes, when names of further ones are known. Leave it where the
    classes with images are few, or far from the unknown ones: with five digits each it did harm, accuracy on the
    unknown ones fell by more than without it (``benchmarks/effects/ogen.py``). To name the classes of the test is to
    use them in training.

    Source:
        Zang, Goh, Susskind, Huang, "Overcoming the Pitfalls of Vision-Language Model Finetuning for OOD
        Generalization", ICLR 2024, arXiv 2401.15914; code: apple/ml-ogen, ``trainers/ogen.py``.

    Differs:
        Weights are relative to the user's own loss, which counts 1; in the authors' code 0.25, with the three others
        and the regression 1, 1/4, 1/4 and 1/2. Means and deviations of the classes are those of the batches so far
        (authors' code: files that are not published); classes without any are left out until they have some. The
        generator is float32 (there half precision). ``scheme="each"`` is the paper's baseline, by our reading.

    Memory: the generator, 6 D^2 numbers, and ``C (2 D + 1)`` numbers of statistics; a pass of ``encoder`` per step if
    there is one. Under DDP two collectives per step.

    Args:
        layer: Layer whose output is the image features, ``(B, D)`` (``"clip.visual"``); their length does not count.
        known: Parameter, or layer whose output in each step is, the embeddings of the classes with images, ``(C, D)``
            in the order of their numbers (``"clip.text_projection"``). ``None``: those of ``known_tokens``.
        unknown: Embeddings of the classes without images, ``(C', D)``, fixed. ``None``: those of ``unknown_tokens``.
        encoder: Layer or method of the module that makes embeddings of tokens (``"clip.encode_text"``).
        known_tokens: What it gets for the classes with images, ``(C, T)``.
        unknown_tokens: What it gets for the others, ``(C', T)``.
        label_key: Entry of the batch with the class number of each sample, ``(B,)``: keys and positions, separated by
            dots.
        neighbours: K, at least 1, below C and at most C'. Paper: 3.
        noise: Share of a class's standard deviation by which its mean is moved, up to, in [0, 1]. Paper's code: 1.
        regression_weight: Of :math:`\ell_{reg}`, at least 0. Authors' code, relative to the user's loss: 4. Neutral: 0,
            and so of the other three.
        known_weight: Of the features made for known classes, :math:`\ell_a`, at least 0. Authors' code: 1.
        neighbour_weight: Of those made for their neighbours, :math:`\ell_b`, at least 0. Authors' code: 1.
        unknown_weight: Of those made for unknown classes, :math:`\ell_c`, at least 0. Authors' code: 2.
        warmup: Share of the training in which the regression is the only loss, in [0, 1). Authors' code: 0.2.
        scale: What products of unit vectors are multiplied by for a cross-entropy, above 0: as the model does. CLIP:
            100.
        scheme: Whether a feature is made from all neighbours at once (``"joint"``), or from one at a time (``"each"``).
        heads: Heads of the attention, a divisor of D. Paper's code: 4.
        dropout: Share of attention weights that are left out, in [0, 1). Paper's code: 0.1.
        lr_factor: Learning rate of the generator, as a multiple of the optimizer's.
        pooling: What counts of an output ``(B, T, D)`` of ``layer``: ``"flatten"``, ``"first"`` or ``"mean"``.
        own_optimizer: Position of the optimizer that trains the generator, if there are several.
        name: Tells several instances in one Trainer apart.
        seed: Seed of the generator's weights, of noise and dropout.

    Raises:
        ValueError: If an argument is outside its range, or embeddings are given twice or not at all.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> import torch
        >>> names = torch.randn(5, 32)  # of classes without images
        >>> technique = SyntheticUnknowns("encoder", known="prototypes", unknown=names, scale=20.0)
        >>> trainer = Trainer(max_epochs=10, callbacks=[technique], logger=False, enable_checkpointing=False)

    """

    def __init__(
        self,
        layer: str,
        known: str | None = None,
        unknown: Rows | None = None,
        encoder: str | None = None,
        known_tokens: Rows | None = None,
        unknown_tokens: Rows | None = None,
        label_key: str = "1",
        neighbours: int = 3,
        noise: float = 1.0,
        regression_weight: float = 4.0,
        known_weight: float = 1.0,
        neighbour_weight: float = 1.0,
        unknown_weight: float = 2.0,
        warmup: float = 0.2,
        scale: float = 100.0,
        scheme: Literal["joint", "each"] = "joint",
        heads: int = 4,
        dropout: float = 0.1,
        lr_factor: float = 1.0,
        pooling: Pooling = "flatten",
        own_optimizer: int | None = None,
        name: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(name=name, seed=seed)
        for argument, value in (("neighbours", neighbours), ("heads", heads)):
            check_number(self, argument, value, low=1, integer=True)
        check_number(self, "noise", noise, low=0, high=1)
        check_number(self, "warmup", warmup, low=0, high=1, high_open=True)
        check_number(self, "dropout", dropout, low=0, high=1, high_open=True)
        check_number(self, "scale", scale, low=0, low_open=True)
        self.train_own(lr_factor, own_optimizer=own_optimizer)
        given = (regression_weight, known_weight, neighbour_weight, unknown_weight)
        for of, weight in zip(("regression", "known", "neighbour", "unknown"), given, strict=True):
            check_number(self, f"{of}_weight", weight, low=0)
        check_choice(self, "scheme", scheme, ("joint", "each"))
        check_choice(self, "pooling", pooling, ("flatten", "first", "mean"))
        self.layer, self.known, self.unknown, self.encoder = layer, known, unknown, encoder
        self.known_tokens, self.unknown_tokens, self.label_key = known_tokens, unknown_tokens, label_key
        self.neighbours, self.noise, self.warmup = neighbours, noise, warmup
        self.regression_weight, self.known_weight = regression_weight, known_weight
        self.neighbour_weight, self.unknown_weight = neighbour_weight, unknown_weight
        self.scale, self.scheme, self.heads, self.dropout = scale, scheme, heads, dropout
        self.lr_factor, self.pooling = lr_factor, pooling
        self._weights = given
        self._check_sources()
        self._statistics = ClassStatistics()
        self._is_checked, self._is_known_by_layer = False, False
        self._moved: dict[int, Tensor] = {}

    def _check_sources(self) -> None:
        for argument in ("known", "unknown"):
            given, tokens = getattr(self, argument), getattr(self, f"{argument}_tokens")
            if (given is None) == (tokens is None):
                raise ValueError(
                    f"SyntheticUnknowns: `{argument}` must be given, or `{argument}_tokens` in its place, and not both."
                )
        if (self.encoder is None) != (self.known_tokens is None and self.unknown_tokens is None):
            raise ValueError(
                f"SyntheticUnknowns: `encoder` must be given where there are tokens, and only there, got"
                f" {self.encoder!r}."
            )

    @override
    def describe(self) -> str:
        if not any(self._weights):
            return "all weights 0: inactive"
        found = self.unknown if self.unknown_tokens is None else self.unknown_tokens
        count = 0 if found is None else len(found)
        alone = f"; generator alone for {self.warmup:.0%}" if self.warmup else ""
        return (
            f"{self.layer}, {count} unknown classes, {self.neighbours} neighbours, {self.scheme}, weights"
            f" {', '.join(f'{weight:g}' for weight in self._weights)}{alone}"
        )

    @override
    def check(self, trainer: "Trainer", module: "LightningModule") -> None:
        parameters = {plain_name(name) for name, _ in module.named_parameters()}
        self._is_known_by_layer = self.known is not None and self.known not in parameters
        if self._is_known_by_layer:
            find_layer(named_layers(module), str(self.known), type(self).__name__)
        if self.encoder is not None:
            try:
                attrgetter(self.encoder)(module)
            except AttributeError as error:
                raise MisconfigurationException(
                    f"SyntheticUnknowns: `encoder`={self.encoder!r} is no layer or method of {type(module).__name__}:"
                    f" {error}."
                ) from error

    @property
    @override
    def periods(self) -> "Sequence[Period]":
        return [Period(0, self.warmup, "share", loss="own")] if self.warmup and any(self._weights) else []

    @override
    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._is_checked = False
        if host.batches_so_far(trainer) == 0:  # a new training, not a resumed or continued one
            self._statistics.clear()

    @override
    def is_active(self, step: "Step") -> bool:
        return any(self._weights)

    @override
    def own_modules(self, module: "LightningModule") -> "Mapping[str, nn.Module]":
        if not any(self._weights):
            return {}
        width = self._unknown(module).shape[-1]
        if width % self.heads:
            raise MisconfigurationException(
                f"SyntheticUnknowns: embeddings have {width} numbers, which `heads`={self.heads} does not divide."
            )
        return {"generator": FeatureGenerator(width, self.heads, self.dropout)}

    @property
    @override
    def feature_layers(self) -> "Sequence[str]":
        if not any(self._weights):
            return []
        return [self.layer, str(self.known)] if self._is_known_by_layer else [self.layer]

    @override
    def step_term(self, step: "Step") -> Tensor:
        labels = class_numbers(self, step, self.label_key)
        features = self._features(step, len(labels))
        known, unknown = self._known(step), self._unknown(step.module)
        with torch.autocast(features.device.type, enabled=False):
            for what, rows in (("known", known), ("unknown", unknown)):
                if rows.dim() != 2:
                    raise MisconfigurationException(
                        f"SyntheticUnknowns: embeddings of {what} classes must be a matrix (C, D), found"
                        f" {tuple(rows.shape)}. Name where they are."
                    )
            v, w, u = (F.normalize(rows.float(), dim=1) for rows in (features, known, unknown))
            v = v.detach() if step.alone else v  # else the regression would train what makes the features
            self._check(v, w, u, labels)
            self._statistics.add(*self._of_all_ranks(step, v.detach(), labels), len(w))
            losses = self._losses(step, v, labels, w, u)
            if step.is_logging:
                for name, value in losses.items():
                    step.log(self, name, value)
            regression, a, b, c = self._weights
            term = regression * losses["regression"]
            if step.alone:
                return term
            return term + a * losses["a"] + (b * losses["b"] + c * losses["c"]) / self.neighbours

    def _losses(self, step: "Step", v: Tensor, labels: Tensor, w: Tensor, u: Tensor) -> dict[str, Tensor]:
        means, deviations, seen = self._statistics.read()
        near = nearest_classes(means, self.neighbours, seen, labels)
        draws = torch.rand(v.shape[1], generator=self.generator(step, v.device, same_on_ranks=True), device=v.device)
        values = means[near] + self.noise * draws * deviations[near]
        generator = self.own["generator"]
        keep = self._keep(step, v) if self.dropout else None
        rows = synthesis_losses(generator, v, labels, w, u, near, values, self.scale, scheme=self.scheme, keep=keep)
        counted = seen[near].all(1).float()  # a row whose neighbours had no features yet counts 0
        return {name: (value * counted).mean() for name, value in rows.items()}

    def _of_all_ranks(self, step: "Step", v: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        group = host.data_parallel_group(step.trainer)
        if group is None:
            return v, labels
        rows = torch.cat([v, labels[:, None].float()], dim=1)
        gathered, there, _ = distributed.all_gather_rows(rows, group, step.capacity)
        return gathered[there][:, :-1], gathered[there][:, -1].long()

    def _keep(self, step: "Step", v: Tensor) -> dict[str, Tensor]:
        base = self.generator(step, same_on_ranks=True).initial_seed()
        rows = global_rows(len(v), v.device, host.data_parallel_group(step.trainer))
        shapes = {"a": (1, self.neighbours), "b": (self.neighbours, 1), "c": (self.neighbours, 1)}
        return {
            name: keep_mask(self.derived_seed(f"{base} {name}"), rows, range(1), (self.heads, *shape), self.dropout)[0]
            for name, shape in shapes.items()
        }

    # -- where features and embeddings come from ----------------------------------------------------------------------

    def _features(self, step: "Step", rows: int) -> Tensor:
        found = step.features.get(self.layer)
        found = found if found is None or step.views is None else step.views.own(found)
        wanted = 2 if self.pooling == "flatten" else 3
        if not isinstance(found, Tensor) or found.dim() < wanted or len(found) != rows:
            what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise MisconfigurationException(
                f"SyntheticUnknowns: layer {self.layer!r} gave {what} in this step, where a feature for each of {rows}"
                " labels is needed. Name the layer that puts out one row per image."
            )
        return pooled(found, self.pooling)

    def _known(self, step: "Step") -> Tensor:
        if self.known_tokens is not None:
            return self._encoded(step.module, self.known_tokens)
        if not self._is_known_by_layer:
            return attrgetter(str(self.known))(step.module)  # type: ignore[no-any-return]  # a parameter
        found = step.features.get(str(self.known))
        if not isinstance(found, Tensor):
            raise MisconfigurationException(
                f"SyntheticUnknowns: the layer {self.known!r} gave {type(found).__name__} in this step, where the"
                " embeddings of the known classes, (C, D), are needed. Name another layer, or give `known_tokens`."
            )
        return found

    def _unknown(self, module: nn.Module) -> Tensor:
        if self.unknown_tokens is not None:
            return self._encoded(module, self.unknown_tokens)
        return self._on_device(self.unknown, module)

    def _encoded(self, module: nn.Module, tokens: Rows) -> Tensor:
        output = attrgetter(str(self.encoder))(module)(self._on_device(tokens, module))
        output = getattr(output, "pooler_output", output)  # transformers
        if not isinstance(output, Tensor):
            raise MisconfigurationException(
                f"SyntheticUnknowns: `encoder`={self.encoder!r} returned {type(output).__name__}, where a tensor of"
                " embeddings is needed. Write a method of the module that returns one."
            )
        return output

    def _on_device(self, rows: Rows | None, module: nn.Module) -> Tensor:
        device = next(module.parameters()).device
        held = self._moved.get(id(rows))
        if held is None or held.device != device:
            held = self._moved[id(rows)] = torch.as_tensor(rows, device=device)
        return held

    def _check(self, v: Tensor, w: Tensor, u: Tensor, labels: Tensor) -> None:
        """In the first step of a fit, whether all that is needed is there."""
        if self._is_checked:
            return
        self._is_checked, widths = True, {"features": v.shape[1], "known": w.shape[1], "unknown": u.shape[1]}
        if len({*widths.values()}) > 1:
            raise MisconfigurationException(
                f"SyntheticUnknowns: image features and embeddings of classes must have as many numbers, found"
                f" {widths}."
            )
        if self.neighbours >= len(w) or self.neighbours > len(u):
            raise MisconfigurationException(
                f"SyntheticUnknowns: `neighbours`={self.neighbours} must be below the number of known classes and at"
                f" most that of unknown ones, found {len(w)} and {len(u)}."
            )
        if int(labels.max()) >= len(w):
            raise MisconfigurationException(
                f"SyntheticUnknowns: the batch has class {int(labels.max())}, and there are embeddings of {len(w)}"
                " classes. Give those of all classes that have images, in the order of their numbers."
            )

    @override
    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_moved": {}}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"own": self.own.state_dict(), "statistics": self._statistics.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.own.load_state_dict(state_dict["own"])
        self._statistics.load_state_dict(state_dict["statistics"])
