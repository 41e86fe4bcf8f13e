"""ContrastiveDistillation: a better model says how near all candidates of a batch are to each query."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.host.arguments import check_number
from lightning_reg.engine.run.phases import Member
from lightning_reg.engine.technique import LossTechnique
from lightning_reg.retrieval._candidates import tell_short_batch
from lightning_reg.retrieval._embeddings import embeddings_of
from lightning_reg.retrieval._guide import names_of, unit_rows_of_batch
from lightning_reg.retrieval.contrastive_distillation.core import ranking_distillation_losses

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_reg.engine.loss.call import LossCall
    from lightning_reg.engine.step import Step

__all__ = ["ContrastiveDistillation"]


class ContrastiveDistillation(LossTechnique):
    r"""The distribution of each query over the candidates of the batch follows that of a better model's embeddings.

    Beside the contrastive loss, which knows one right answer, a teacher's cosines say how near every document of the
    batch is to every query:

    .. math:: \ell_i + w \operatorname{KL}\bigl(\operatorname{softmax}_j(\cos(q^t_i, d^t_j) / \tau) \,\big\|\,
        \operatorname{softmax}_j(\cos(q_i, d_j) / \tau)\bigr)

    The teacher's embeddings are entries of the batch, computed once; they may be longer than the student's.

    Use it to train a small text encoder from a large one, in a loss ``F.cross_entropy`` of similarities ``(B,
    candidates)``. For several teachers, teachers of scores, networks as teachers, or sparse vectors, take
    ``EnsembleDistillation``. Search over docstrings with a small encoder and words with IDF as the teacher gained 7.7 ±
    1.6 points of MRR with ``weight=1`` (``benchmarks/effects/contrastive_distillation.py``), which is where the teacher
    is; a teacher that ranks no better has nothing to give.

    Source:
        Zhao et al., "KaLM-Embedding-V2: Superior Training Techniques and Data Inspire A Versatile Embedding Model",
        2025, arXiv 2506.20923, contrastive distillation (V2.5).

    Differs:
        Reconstruction: the released code has no distillation, and the formula is that of notes on the paper; the weight
        of the term is not known. There focal weights and Matryoshka slices apply to it as to the contrastive loss:
        here ``FocalContrastive`` weighs the contrastive loss alone, and with ``matryoshka_loss`` it takes the whole
        embeddings. Candidates are those of the own rank.

    Args:
        layer: Layer that puts out embeddings ``(rows, D)`` of documents, in the order of the logits' columns, in one
            pass or several; without ``query_layer`` of the queries first. A mapping counts by its
            ``"sentence_embedding"``.
        teacher_queries: Entry of the batch with the teacher's embeddings of the queries ``(B, E)``: keys and positions,
            separated by dots.
        teacher_documents: Entries with those of the documents ``(n, E)``, in the order of the columns.
        query_layer: Layer that puts out the embeddings of queries; ``None``: the same.
        temperature: :math:`\tau` of both distributions, above 0. Paper: 0.05.
        weight: w, at least 0. Neutral: 0.
        loss: Which loss call it works on, if there are several: its position in the step, its function's name, or its
            place in the code. ``None``: there must be just one.
        name: Tells several instances in one Trainer apart.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> technique = ContrastiveDistillation("encoder", "teacher_query", ["teacher_positive", "teacher_negatives"])
        >>> trainer = Trainer(max_epochs=10, callbacks=[technique], logger=False, enable_checkpointing=False)

    """

    def __init__(
        self,
        layer: str,
        teacher_queries: str,
        teacher_documents: list[str] | str,
        query_layer: str | None = None,
        temperature: float = 0.05,
        weight: float = 1.0,
        loss: int | str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(loss=loss, name=name)
        check_number(self, "temperature", temperature, low=0, low_open=True)
        check_number(self, "weight", weight, low=0)
        self.layer, self.query_layer = layer, query_layer
        self.teacher_queries, self.teacher_documents = teacher_queries, teacher_documents
        self.temperature, self.weight = temperature, weight

    @override
    def describe(self) -> str:
        if not self.weight:
            return "weight=0: inactive"
        layers = self.layer if self.query_layer is None else f"{self.query_layer} and {self.layer}"
        teacher = f"{self.teacher_queries} and {names_of(self.teacher_documents)}"
        return f"{layers} from {teacher}, temperature={self.temperature:g}, weight={self.weight:g}"

    @override
    def conflict_with(self, other: Member) -> str | None:
        if other.mixes != "none":
            return "a mixed sample has two documents, and the teacher's embeddings are of one. Remove one of them."
        if other.copies_rows:
            return (
                f"{type(other).__name__} passes each row several times, and which embeddings ContrastiveDistillation"
                " is to compare is then not known. Remove one of them."
            )
        return None

    @override
    def is_active(self, step: "Step") -> bool:
        return self.weight > 0

    @property
    @override
    def feature_layers(self) -> "Sequence[str]":
        layers = [self.layer] if self.query_layer is None else [self.layer, self.query_layer]
        return layers if self.weight else []

    @override
    def loss_term(self, call: "LossCall") -> Tensor:
        tell_short_batch(call, "ContrastiveDistillation")
        student = embeddings_of(call, self.layer, self.query_layer)
        teacher = unit_rows_of_batch(call, "ContrastiveDistillation", self.teacher_queries, self.teacher_documents)
        with torch.autocast(call.input.device.type, enabled=False):
            queries, documents = (F.normalize(each.float(), dim=1) for each in student)
            cosines = queries @ documents.T, teacher[0] @ teacher[1].T
            return self.weight * ranking_distillation_losses(*cosines, self.temperature)
