r"""Loki: predictions by the least expected squared distance between labels, for a classifier as it is."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.engine.host.arguments import check_choice, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.technique import LayerTechnique
from lightning_reg.metric_learning.loki._rule import Kind, Rule, check_kind, own_distances
from lightning_reg.metric_learning.loki._space import LabelSpace

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.layers.edits import LayerCall
    from lightning_reg.engine.run.phases import Member
    from lightning_reg.engine.step import Stage, Step

__all__ = ["Loki"]

_MODES = ("train", "validate", "test", "predict")


class Loki(LayerTechnique):
    r"""Predicts the label whose expected squared distance is least, in place of the most probable one.

    Labels are seldom all equally wrong: they are nodes of a tree, steps of a scale, points with embeddings. Given
    distances between N labels and a classifier of K classes, what is probable pulls the prediction towards itself, also
    to labels in between that the classifier never saw. That costs one product with a fixed K x N matrix, and no
    training:

    .. math:: \hat y = \arg\min_{y} \sum_i P_i\, d(\lambda_i, y)^2

    In validation, test and prediction what the named layer returns (the logits) is replaced by scores whose ``argmax``
    is this label, so that the metrics in your own ``validation_step``, ``test_step`` and ``predict_step`` see it;
    ``trainer.test(model, loader)`` alone needs no fit. Training stays as it is, to the last bit. The scores are
    ``min_z E_z - E_y``: 0 for the prediction and less for others; they are no calibrated logits, so a validation loss
    computed from them is that of the fine-tuning form.

    *Fine-tuning*: with ``"train"`` among ``modes`` the scores stand in place of the logits in ``training_step`` as
    well, with gradient; your cross-entropy then trains through the rule, on any of the N labels.

    Use it where errors are counted by distance (:class:`MeanSquaredDistance`), or where most labels have no training
    samples. Leave it where the exact label alone counts: accuracy usually falls a little, because mass on two siblings
    gives what lies between them. Probabilities must mean something: an over-confident network gives back ``argmax``;
    raise ``temperature`` on validation data. On steps of a scale of which a third had training samples the squared
    distance fell from 13.9 to 7.8; on CIFAR-10 in a tree, with all classes known or six of ten, no effect was shown
    (``benchmarks/effects/loki.py``). Logged: ``validate_moved`` and ``test_moved``, the share of predictions
    that are no longer the most probable class.

    Source:
        Roberts, Li, Adila, Cromp, Huang, Zhao and Sala, "Geometry-Aware Adaptation for Pretrained Models", NeurIPS
        2023, arXiv 2307.12226; the fine-tuning form is that of the authors' code (``loki_exact_predict``).

    Differs:
        Sums are computed in float64, and labels that tie within its rounding tie exactly: the first is predicted. The
        order of the classifier's columns is an argument (``observed``), which the authors' scripts leave to chance.
        Their straight-through estimator, which their CLIP script trains with, and their polytope estimator are not
        there. Which labels can be predicted is told for trees
        and complete graphs (:func:`tree_locus`, :func:`is_complete`), and for other spaces as far as two classes reach
        (:func:`pairwise_locus`).

    Memory: the powers of the distances, 8 K N bytes; with ``chunk`` the distances in the type they are given in.

    Args:
        layer: Layer that returns the logits, as in ``named_modules()`` (``"net.head"``).
        distances: ``(N, N)`` between all labels, a list of rows or a tensor, not squared; or the rows ``(K, N)`` of the
            classifier's classes. :func:`tree_distances` and :func:`embedding_distances` make them. ``None``: those
            between the rows of the layer's own weight, as they are when an evaluation starts. Neutral: all labels
            equally far apart; the layer is then left alone.
        observed: The label of each of the classifier's K columns, in their order (scikit-learn's ``classes_``; folders
            are numbered by sorted names). ``None``: column i is label i. If the layer has a column for each of N
            labels, these are the labels that it was trained on, and the other columns do not count.
        power: Exponent of the distances, above 0. Paper: 2 (Fréchet mean); 1 gives the median.
        temperature: Divides the logits, above 0. Paper: 1 (CLIP's logits are 100 times the cosine).
        probabilities: What the layer returns: ``"softmax"``, logits of one label of all; ``"sigmoid"``, logits of one
            versus rest; ``"given"``, numbers of at least 0 (votes, probabilities), which ``temperature`` leaves alone.
        outputs: ``"all"``: a score for each of N labels; if K < N, the output is wider than it was, and metrics made
            with ``num_classes=K`` refuse it. ``"observed"``: for the K classes alone, in their columns.
        modes: In which steps it acts, of ``"train"``, ``"validate"``, ``"test"``, ``"predict"``.
        dim: Dimension of the layer's output that counts classes: -1, or 1 for maps ``(B, C, H, W)``.
        chunk: Labels that are computed at a time, at least 1; ``None``: all.
        name: Tells several instances in one Trainer apart.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_reg.functional import tree_distances
        >>> distances = tree_distances([("pet", "cat"), ("pet", "dog"), ("all", "pet"), ("all", "car")],
        ...                            labels=["cat", "dog", "car", "pet"])
        >>> loki = Loki("net.head", distances, observed=[0, 1, 2])  # the network knows no "pet"
        >>> trainer = Trainer(callbacks=[loki], logger=False, enable_checkpointing=False)

    """

    def __init__(
        self,
        layer: str,
        distances: Tensor | list[list[float]] | None = None,
        observed: list[int] | None = None,
        power: float = 2.0,
        temperature: float = 1.0,
        probabilities: Kind = "softmax",
        outputs: Literal["all", "observed"] = "all",
        modes: Sequence[Literal["train", "validate", "test", "predict"]] = ("validate", "test", "predict"),
        dim: int = -1,
        chunk: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        check_number(self, "power", power, low=0, low_open=True)
        check_number(self, "temperature", temperature, low=0, low_open=True)
        check_number(self, "dim", dim, integer=True)
        check_number(self, "chunk", chunk, low=1, integer=True, optional=True)
        check_choice(self, "probabilities", probabilities, ("softmax", "sigmoid", "given"))
        check_choice(self, "outputs", outputs, ("all", "observed"))
        for mode in modes:
            check_choice(self, "modes", mode, _MODES)
        if distances is None and "train" in modes:
            raise ValueError(
                "Loki: `distances` must be given where it acts in training, got None: distances between rows of the"
                " layer's weight would change with every step."
            )
        self.layer, self.distances, self.observed, self.power = layer, distances, observed, power
        self.temperature, self.probabilities, self.outputs = temperature, probabilities, outputs
        self.modes, self.dim, self.chunk = modes, dim, chunk
        self.stages: frozenset[Stage] = frozenset(modes)
        self._given = None if distances is None else LabelSpace(self, distances, observed)
        self._rule: Rule | None = None

    @override
    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_rule": None}

    @override
    def describe(self) -> str:
        where = f"in {', '.join(self.modes) or 'no step'}"
        if self._given is None:
            return f"{self.layer}, distances between rows of its weight, power={self.power:g}; {where}"
        if self._given.is_neutral:
            return f"{self.layer}, all labels equally far apart: inactive"
        known = f"{len(self._given.rows)} of {self._given.size} labels"
        return f"{self.layer}, {known}, power={self.power:g}, temperature={self.temperature:g}; {where}"

    @override
    def conflict_with(self, other: "Member") -> str | None:
        if not isinstance(other, Loki) or other.layer != self.layer or not self.stages & other.stages:
            return None
        return (
            f"both replace what {self.layer!r} returns, and the second would take the scores of the first for logits."
            " Remove one of them, or give them other `modes`."
        )

    @override
    def is_active(self, step: "Step") -> bool:
        return step.stage in self.stages and (self._given is None or not self._given.is_neutral)

    @override
    def features_to_edit(self, module: nn.Module) -> list[str]:
        return [self.layer]

    @override
    def edit_features(self, call: "LayerCall") -> Tensor:
        output = call.output
        if not isinstance(output, Tensor) or not -output.dim() <= self.dim < output.dim():
            found = f"of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise MisconfigurationException(
                f"Loki: {self.layer!r} must return a tensor of logits with classes in dimension {self.dim}, returned"
                f" {found}. Name the layer that makes them."
            )
        values = output.movedim(self.dim, -1)
        if self._rule is None or self._rule.device != values.device:
            self._rule = self._begin(call.layer, values)
        scores, moved = self._rule(values, self.probabilities, self.temperature)
        if call.step.is_logging:
            call.step.log(self, "moved", moved.float().mean())
        return scores.movedim(-1, self.dim)

    def _begin(self, layer: nn.Module, values: Tensor) -> Rule:
        space = self._given or LabelSpace(self, own_distances(layer, self.layer), self.observed)
        rule, width = Rule(space, self.outputs, self.power, self.chunk, values.device), values.shape[-1]
        if not rule.fits(width):
            raise MisconfigurationException(
                f"Loki: {self.layer!r} returned {width} columns in dimension {self.dim}, and the distances are of"
                f" {len(space.rows)} classes among {space.size} labels. Give a row for each column, or the label of"
                " each in `observed`."
            )
        check_kind(values.detach(), self.probabilities, self.layer)
        return rule

    # Another network, other weights: what was made for those before is made anew.

    @override
    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._rule = None

    @override
    def on_validation_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._rule = None

    @override
    def on_test_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._rule = None

    @override
    def on_predict_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._rule = None
