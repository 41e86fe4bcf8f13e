"""EnsembleDistillation: scores of candidates follow those of several teachers, dense and sparse ones."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.data.entries import find_entry
from lightning_reg.engine.host.arguments import check_choice, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.networks.foreign import ForeignNetwork
from lightning_reg.engine.networks.references import PLACES, ReferenceTechnique
from lightning_reg.engine.run.phases import Member
from lightning_reg.engine.technique import StepTechnique
from lightning_reg.retrieval._embeddings import check_trained, tensor_in
from lightning_reg.retrieval.idf_flops.core import ensemble_scores, score_distillation_loss

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.step import Step

__all__ = ["EnsembleDistillation"]


class EnsembleDistillation(ReferenceTechnique, StepTechnique):
    r"""Adds a distillation loss from several teachers, whose scores of the candidates are normalised and averaged.

    Each teacher's row of scores is brought to [0, 1] by its minimum and maximum, so that cosines of a dense teacher and
    dot products of a sparse one count alike; the mean times ``scale`` is the target:

    .. math:: \ell + w \, \frac1B \sum_q \operatorname{KL}\bigl(\operatorname{softmax}(S_q / \tau) \,\big\|\,
        \operatorname{softmax}(s_q / \tau)\bigr)

    A teacher is a frozen network that an import path makes, or scores that the batch has already (computed once, where
    candidates are fixed). A network gets one entry of the batch and gives scores ``(B, C)``, or two tensors: vectors of
    queries ``(B, D)`` and of documents ``(N, D)``, whose dot products are taken. The candidates of a query are all N
    documents of the batch (``C = N``) or its own (``C = N / B``), whichever the teachers' scores have; documents come
    in the order of their queries, the positive first::

        distillation = EnsembleDistillation(
            "model.documents", query_layer="query",
            teachers={"dense": "my_project.teachers.DenseTeacher"}, scores={"sparse": "sparse_scores"})

    Use it to train a retriever from rankers that are too dear to serve. Leave it where teachers rank no better.

    Source:
        Geng, Wang, Ru, Yang, "Towards Competitive Search Relevance For Inference-Free Learned Sparse Retrievers", 2024,
        arXiv 2411.04403; code: zhichao-aws/opensearch-sparse-model-tuning-sample.

    Differs:
        The term joins the user's loss; there it is the loss, for which ``training_step`` may return a zero with
        gradient. With margins over all documents of the batch each query's own positive is taken; there it is the first
        document of the batch for all. The batch of each rank has its own candidates, and means of ranks are averaged.

    Memory: the teachers' weights, out of the module, its checkpoint, its optimizer and DDP; a forward pass of each per
    step. Their hashes are saved: a resumed fit with other teachers is refused.

    Args:
        layer: Layer whose output is the student's scores ``(B, C)``, or the vectors of documents ``(N, V)`` where there
            is a ``query_layer``; as in ``named_modules()``. Of several passes the last one counts, and
            of a mapping its ``"sentence_embedding"``.
        query_layer: Layer whose output is the vectors of queries ``(B, V)``. ``None``: ``layer`` puts out scores.
        teachers: Import paths of classes of modules, or of functions that make one, by a name of yours.
        teacher_args: What these are made with, by the same name; plain data.
        teacher_entries: Which entry of the batch each gets, by the same name: keys and positions, separated by dots; ""
            is the whole batch. Without: ``"0"``.
        scores: Entries of the batch with scores ``(B, C)`` of further teachers, by a name of yours.
        weight: w, at least 0. Neutral: 0.
        kind: ``"kl"``, or ``"margin_mse"``: squared differences of the margins to the positive candidate.
        scale: Of the teachers' mean, above 0. Authors' code: 30.
        temperature: tau, above 0. Authors' code: 1.
        place: Where the teachers' weights lie: ``"device"``, ``"cpu"`` (copied there in each step), ``"bfloat16"``
            (half the bytes, rounded) or ``"cpu_bfloat16"``.
        name: Tells several instances in one Trainer apart.

    Raises:
        ValueError: If an argument is outside its range, or there is no teacher.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> technique = EnsembleDistillation("scores", scores={"dense": "dense_scores", "sparse": "sparse_scores"})
        >>> trainer = Trainer(callbacks=[technique], logger=False, enable_checkpointing=False)

    """

    def __init__(
        self,
        layer: str,
        query_layer: str | None = None,
        teachers: dict[str, str] | None = None,
        teacher_args: dict[str, dict[str, Any]] | None = None,
        teacher_entries: dict[str, str] | None = None,
        scores: dict[str, str] | None = None,
        weight: float = 1.0,
        kind: Literal["kl", "margin_mse"] = "kl",
        scale: float = 30.0,
        temperature: float = 1.0,
        place: str = "device",
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        check_number(self, "weight", weight, low=0)
        check_number(self, "scale", scale, low=0, low_open=True)
        check_number(self, "temperature", temperature, low=0, low_open=True)
        check_choice(self, "kind", kind, ("kl", "margin_mse"))
        check_choice(self, "place", place, PLACES)
        self.layer, self.query_layer, self.weight, self.kind = layer, query_layer, weight, kind
        self.teachers, self.teacher_args, self.teacher_entries = teachers, teacher_args, teacher_entries
        self.scores, self.scale, self.temperature, self.place = scores, scale, temperature, place
        named, arguments, entries = teachers or {}, teacher_args or {}, teacher_entries or {}
        if not named and not scores:
            raise ValueError("EnsembleDistillation: `teachers` or `scores` must name at least one teacher, got none.")
        if common := named.keys() & (scores or {}).keys():
            raise ValueError(
                f"EnsembleDistillation: `scores` must have other names than `teachers`, got {sorted(common)}."
            )
        for argument, given in (("teacher_args", {*arguments}), ("teacher_entries", {*entries})):
            if unknown := given - named.keys():
                raise ValueError(
                    f"EnsembleDistillation: `{argument}` must have names of `teachers` ({sorted(named)}), got"
                    f" {sorted(unknown)}."
                )
        self._networks = {
            key: ForeignNetwork(path, arguments.get(key), (), entries.get(key, "0"), place)
            for key, path in named.items()
        }

    @override
    def describe(self) -> str:
        if not self.weight:
            return "weight=0: inactive"
        made = [f"{key} ({network.describe()})" for key, network in self._networks.items()]
        return f"{self.kind}, weight={self.weight:g}, of {', '.join([*made, *(self.scores or {})])}"

    @override
    def conflict_with(self, other: Member) -> str | None:
        return super().conflict_with(other) if self.weight else None

    @override
    def check(self, trainer: "Trainer", module: "LightningModule") -> None:
        if self._networks:
            super().check(trainer, module)

    @override
    def is_active(self, step: "Step") -> bool:
        return self.weight > 0

    @property
    @override
    def feature_layers(self) -> "Sequence[str]":
        layers = [self.layer] if self.query_layer is None else [self.layer, self.query_layer]
        return layers if self.weight else []

    @property
    @override
    def references(self) -> "Sequence[ForeignNetwork]":
        return [*self._networks.values()]

    @override
    def observe_batch(self, step: "Step") -> None:
        if self._networks:  # scores of the batch need no copy of the module
            super().observe_batch(step)

    @override
    def step_term(self, step: "Step") -> Tensor | None:
        teachers = self._teachers(step)
        shape = teachers[0].shape
        student, positives = self._student(step, shape)
        if student.shape != shape:
            self._refuse("the student", student, f"scores {tuple(shape)} of the teachers' candidates")
        check_trained(step, self.feature_layers, [student], "EnsembleDistillation")
        target = ensemble_scores([scores.to(student.device) for scores in teachers], self.scale)
        return self.weight * score_distillation_loss(student, target, self.kind, self.temperature, positives)

    def _teachers(self, step: "Step") -> list[Tensor]:
        """Scores ``(B, C)`` of each."""
        found = {key: _scores(self.sight(step, n).features[""]) for key, n in self._networks.items()}
        for key, entry in (self.scores or {}).items():
            found[key] = find_entry(step.batch, entry, f"EnsembleDistillation: scores[{key!r}]")
        checked: list[Tensor] = []
        for key, scores in found.items():
            if not isinstance(scores, Tensor) or scores.dim() != 2 or (checked and scores.shape != checked[0].shape):
                self._refuse(
                    f"teacher {key!r}", scores, f"scores (B, C) of the same candidates as {next(iter(found))!r}"
                )
            checked.append(scores)
        return checked

    def _student(self, step: "Step", shape: torch.Size) -> tuple[Tensor, Tensor | None]:
        found = self._output(step, self.layer)
        if self.query_layer is None:
            return found, None
        queries, documents = self._output(step, self.query_layer), found
        count, width = len(queries), documents.shape[-1]
        if queries.shape != (count, width) or documents.dim() != 2 or len(documents) % max(count, 1):
            self._refuse("the student", queries, f"queries (B, V) for documents {tuple(documents.shape)}")
        with torch.autocast(queries.device.type, enabled=False):  # sums over a vocabulary are too long for half
            if shape[1] == len(documents):
                own = torch.arange(count, device=queries.device) * (len(documents) // count)
                return queries.float() @ documents.float().T, own
            grouped = documents.float().reshape(count, -1, width)
            return (grouped @ queries.float()[:, :, None])[:, :, 0], None

    def _output(self, step: "Step", layer: str) -> Tensor:
        given = tensor_in(step.features.get(layer))
        found = given if step.views is None or given is None else step.views.own(given)
        if not isinstance(found, Tensor) or found.dim() < 2:
            self._refuse(f"layer {layer!r}", found, "one tensor with a row per sample")
        return found

    def _refuse(self, who: str, found: object, wanted: str) -> NoReturn:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise MisconfigurationException(
            f"EnsembleDistillation: {who} gave {shape} in this step, where {wanted} are needed. Candidates are all"
            " documents of the batch or each query's own, the same for the student and for every teacher."
        )

    @override
    def state_dict(self) -> dict[str, Any]:
        return {key: network.state_dict() for key, network in self._networks.items()}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        for key, network in self._networks.items():
            network.load_state_dict(state_dict[key])


def _scores(output: object) -> object:
    """Scores that a network gave, or those of its two towers."""
    if isinstance(output, Tensor) or not isinstance(output, Sequence) or len(output) != 2:
        return output
    queries, documents = output
    with torch.autocast(queries.device.type, enabled=False):
        product: Tensor = queries.float() @ documents.float().T
    return product
