r"""Nested dropout: a classifier sees the first k features, so that they are ordered by importance."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.engine.data.entries import contents, find_entry
from lightning_reg.engine.host import distributed
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_bool, check_choice, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.run.phases import Member
from lightning_reg.engine.technique import LayerTechnique
from lightning_reg.noisy_labels.nested_dropout.core import (
    best_prefix,
    keep_prefix,
    prefix_correct,
    prefix_probabilities,
)

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.layers.edits import InputCall
    from lightning_reg.engine.step import Stage, Step

__all__ = ["NestedDropout"]

_TARGETS = ("label", "labels", "target", "targets", "y")


class NestedDropout(LayerTechnique):
    r"""Lets the classifier see only the first k features, with another k in each step.

    .. math:: \text{logits} = W (h \odot m_k) + b, \qquad P(k) \propto e^{-((k - \mu) / \eta)^2}, \quad k = 1 \dots D

    where :math:`m_k` is 1 on the first k features and 0 after. One k is drawn for the whole mini-batch, and nothing is
    rescaled. The first features are trained nearly always and the last seldom, so features are ordered by importance,
    the network is compressed, and a compressed network memorises wrong labels less. For a Gaussian around 0 the mean
    of k is about :math:`\eta / \sqrt\pi`, 5.97 for 10 and 49.3 for 100 (D = 128).

    After each validation of a fit the number of features K is chosen that classifies the validation data best
    (:func:`~lightning_reg.functional.best_prefix`, all K in one pass): ``chosen_k`` holds it, the checkpoint too, and
    a test, a prediction and a validation outside of a fit see the first K. Validations within a fit see all features,
    and what your own ``validation_step`` logs is with all. Logged: ``kept``, the k of a step; ``k``, the K chosen; and
    ``accuracy``, the validation's at that K, for a ``ModelCheckpoint`` to monitor. A second network that CoTeaching
    trains is cut as well, by another k in each of its steps::

        nested = NestedDropout("fc", eta=10)  # `fc` is the classifier, an nn.Linear
        best = ModelCheckpoint(monitor="reg/nested_dropout/accuracy", mode="max")
        Trainer(callbacks=[nested, best]).fit(model, datamodule)

    Use it for classification with real label noise and a small clean validation set, alone or before co-teaching, or to
    get features that may be cut. Leave it where no labels are clean: K would be chosen by wrong ones (pass ``k="all"``
    and average the last epochs). ``eta`` far below the number of classes leaves too few features to tell them apart.
    Ordinary dropout before the classifier is the paper's other bottleneck, and in places the better one: compare. On
    digits with 36 % wrong labels test accuracy went from 0.76 to 0.89, with dropout to 0.85
    (``benchmarks/effects/nested_dropout.py``). Name the classifier itself: behind a layer that mixes features (a
    normalisation, another linear layer) the order is lost.

    Source:
        Chen et al., "Compressing Features for Learning with Noisy Labels", IEEE TNNLS 2022, arXiv 2206.13140, and
        "Boosting Co-teaching with Compression Regularization for Label Noise", CVPR workshops 2021, arXiv 2104.13766;
        constants are those of the authors' code.

    Differs:
        K = 1 stays where it is the best, which the authors' co-teaching script turns into all features. K is never
        chosen by the sanity check, nor outside a fit. A classifier may have a bias. All ranks draw the same k.

    Args:
        layer: The linear classifier whose input is cut, as in ``named_modules()``; or several layers, of which K is
            chosen for the last one.
        eta: Width of the distribution of k, above 0. Paper: 100 (Clothing1M with D = 512, ANIMAL-10N, CIFAR-100), 10
            (CIFAR-10); sensible from the number of classes to D / 4. Neutral: 0.
        mu: Where the most probable k lies, at least 0. Paper: 0.
        k: Number of features in validation, test and prediction: ``"chosen"``, ``"all"``, or a number.
        in_turns: Whether of several layers one is drawn in each step, as published for the two feature layers of a VGG;
            else all are cut, each with a k of its own.
        target_key: Entry of a validation batch with the labels ``(B,)``, a key or a position. ``None``: the second
            entry of a sequence, or the one named "label", "labels", "target", "targets" or "y".
        name: Tells several instances in one Trainer apart.
        seed: Seed of the draws.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[NestedDropout("net.head", eta=10)], logger=False, enable_checkpointing=False)

    """

    edits_second: ClassVar[bool] = True
    stages: frozenset["Stage"] = frozenset({"train", "validate", "test", "predict"})

    def __init__(
        self,
        layer: str | list[str],
        eta: float = 100.0,
        mu: float = 0.0,
        k: Literal["chosen", "all"] | int = "chosen",
        in_turns: bool = True,
        target_key: str | None = None,
        name: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(name=name, seed=seed)
        check_number(self, "eta", eta, low=0)
        check_number(self, "mu", mu, low=0)
        if isinstance(k, str):
            check_choice(self, "k", k, ("chosen", "all"))
        else:
            check_number(self, "k", k, low=1, integer=True)
        check_bool(self, "in_turns", in_turns)
        self.layer, self.eta, self.mu, self.k, self.in_turns = layer, eta, mu, k, in_turns
        self.target_key = target_key
        self._layers = [layer] if isinstance(layer, str) else list(layer)
        if not self._layers or len(set(self._layers)) < len(self._layers):
            raise ValueError(f"NestedDropout: `layer` must name layers, at least one and none twice, got {layer!r}.")
        self.chosen_k: int | None = None  # by the last validation
        self._is_loaded = False
        self._probabilities: dict[int, Tensor] = {}
        self._correct: Tensor | None = None  # by the first 1, 2, ... features, in the validation under way
        self._samples: int | Tensor = 0

    @override
    def describe(self) -> str:
        if not self.eta:
            return "eta=0: inactive"
        where = ", ".join(self._layers) + (", in turns" if self.in_turns and len(self._layers) > 1 else "")
        return f"{where}: eta={self.eta:g}, mu={self.mu:g}; evaluates with k={self.k}"

    @override
    def conflict_with(self, other: Member) -> str | None:
        if not (other.copies_rows and getattr(other, "dropout", None) in self._layers):
            return None
        return (
            f"{self._layers[0]!r} would be cut to a prefix and dropped from at random, and features that are missing in"
            " the copies by chance are not ordered. Let NestedDropout act on the classifier behind the dropout layer."
        )

    @override
    def is_active(self, step: "Step") -> bool:
        return self.eta > 0 and (step.stage == "train" or self.k != "all")

    @override
    def inputs_to_edit(self, module: nn.Module) -> "Sequence[str]":
        return self._layers

    @override
    def edit_inputs(self, call: "InputCall") -> "tuple[tuple[Any, ...], Mapping[str, Any]] | None":
        features = call.input
        if not isinstance(features, Tensor) or features.dim() < 2 or not features.is_floating_point():
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise MisconfigurationException(
                f"NestedDropout: {call.name!r} must be given features (B, D), got {found}. Name the linear classifier."
            )
        if call.step.stage == "train":
            kept = self._draw(call.step, call.name, features.shape[-1])
        else:
            kept = self._kept(call, features)
        return None if kept is None else call.with_input(keep_prefix(features, kept))

    # -- training -----------------------------------------------------------------------------------------------------

    def _draw(self, step: "Step", layer: str, size: int) -> int | None:
        """How many features of a layer are kept in this step; ``None`` for all."""
        drawn: dict[str, int] = step.notes.setdefault(self, {})
        if layer not in drawn:
            generator = self.generator(step, same_on_ranks=True)
            if self.in_turns and len(self._layers) > 1:
                turn = self._layers[int(torch.randint(len(self._layers), (), generator=generator))]
                if turn != layer:
                    return None
            else:
                generator.manual_seed(self.derived_seed(f"{generator.initial_seed()} {layer}"))
            probabilities = self._probabilities.get(size)
            if probabilities is None:
                probabilities = self._probabilities[size] = prefix_probabilities(size, self.eta, self.mu)
            drawn[layer] = 1 + int(torch.multinomial(probabilities, 1, generator=generator))
            if step.is_logging:
                name = "kept" if len(self._layers) == 1 else f"kept_{layer}"
                step.log(self, name, torch.tensor(float(drawn[layer])))
        return drawn[layer]

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def _kept(self, call: "InputCall", features: Tensor) -> int | None:
        if call.name != self._layers[-1]:
            return None
        if self.k != "chosen":
            return int(self.k)
        trainer = call.step.trainer
        if trainer.state.fn != "fit" or call.step.stage == "predict":  # within a fit: a second network is asked
            return self.chosen_k
        if host.validates_in_fit(trainer):
            self._count(call, features)
        return None

    def _count(self, call: "InputCall", features: Tensor) -> None:
        layer, labels = call.layer, self._labels(call.step.batch)
        if not isinstance(layer, nn.Linear):
            raise MisconfigurationException(
                f"NestedDropout: K is chosen for an nn.Linear, and {call.name!r} is a {type(layer).__name__}. Name the"
                ' linear classifier in `layer`, or pass `k="all"` or a number.'
            )
        # Of positions of a text it is not known which label belongs to which: a language model's are shifted.
        if features.dim() != 2 or labels.shape != features.shape[:-1] or labels.is_floating_point():
            raise MisconfigurationException(
                f"NestedDropout: K is chosen by class indices (B,), one for each row (B, D) of {call.name!r},"
                f" got {labels.dtype} {tuple(labels.shape)} and rows {tuple(features.shape)}. Name the labels in"
                ' `target_key`, or pass `k="all"` or a number.'
            )
        correct = prefix_correct(features.detach(), layer.weight.detach(), labels, layer.bias)
        self._correct = correct if self._correct is None else self._correct + correct
        self._samples = self._samples + (labels >= 0).sum()

    def _labels(self, batch: object) -> Tensor:
        key = self.target_key
        if key is None:
            named = [name for name in _TARGETS if isinstance(batch, Mapping) and name in batch]
            key = "1" if isinstance(batch, Sequence) and len(batch) > 1 else named[0] if len(named) == 1 else None
        entry = None if key is None else find_entry(batch, key, "NestedDropout: target_key")
        if not isinstance(entry, Tensor):
            raise MisconfigurationException(
                f"NestedDropout: which entry of a validation batch holds the labels is not certain: it is"
                f' {contents(batch)}. Name it, `target_key="..."`, or pass `k="all"` or a number.'
            )
        return entry

    @override
    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        if not self._is_loaded:
            self.chosen_k = None  # it was another network's
        self._is_loaded = False

    @override
    def on_validation_epoch_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._correct, self._samples = None, 0

    @override
    def on_validation_epoch_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        if self._correct is None:
            return
        counted = torch.cat([self._correct, torch.as_tensor(self._samples, device=self._correct.device)[None]])
        *correct, samples = distributed.all_reduce_sum(counted).tolist()
        self._correct = None
        if samples:
            accuracies = torch.tensor(correct, dtype=torch.float64) / samples
            self.chosen_k = best_prefix(accuracies)
            accuracy = float(accuracies[self.chosen_k - 1])
            host.log_beside(trainer, {f"{self.log_key}/k": self.chosen_k, f"{self.log_key}/accuracy": accuracy})

    @override
    def on_fit_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        if self.eta and self.k == "chosen" and self.chosen_k is None:
            host.rank_zero_warn(
                "NestedDropout: no validation ran in this fit, so no number of features was chosen and a test will see"
                ' all of them. Give the fit validation data, or pass `k="all"` or a number.'
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"chosen_k": self.chosen_k}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.chosen_k, self._is_loaded = state_dict["chosen_k"], True
